"""Levels, clocks and goals: the table of related work, each row backed by runs of the agent on a small task with one sparse reward.

    python nbs/experiments/levels.py                              # everything
    python nbs/experiments/levels.py --part rooms                 # a known world: managers and worker alone
    python nbs/experiments/levels.py --part keys --only flat --seeds 10

`rooms`: two rooms whose optimum is known, features given, nothing but the behavior is learnt. `four`: four rooms, farther than dreams. `clock`: would a clock on the critic of a
flat agent tick where it should? `keys`: the whole agent on Keys from pixels, online; preset and overrides stand in KEYS. Each run
ends with 100 episodes on environments that it has never seen, with the most probable actions, and says when managers chose new goals. What is in the result file is not repeated.
"""
import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dreamer_wb.core.config import compose, from_dict
from dreamer_wb.core.runs import read_json, read_metrics, write_json
from dreamer_wb.dreamer.agent import AgentConfig, Player, load_agent, train_agent
from dreamer_wb.dreamer.behavior import ActorCritic, BehaviorConfig
from dreamer_wb.dreamer.distributions import TwoHot
from dreamer_wb.dreamer.envs import EnvConfig, Stream, evaluate, make_envs, random_policy
from dreamer_wb.vta.director import Director, TwoRooms, follow_goals, goal_segments, keys_optimum

OUT = Path(__file__).resolve().parent/'results'/'levels.json'
SEEDS = 10, 11, 12
ROOMS = { # name: (updates, behavior.director or None for the flat actor)
    'flat': (250, None),
    'every 4 steps': (250, dict(every=4)),
    'every 4 steps, absorb=False': (250, dict(every=4, absorb=False)),
    'value clock': (600, dict(clock='value', every=6, rate=.2, threshold=.02)),
    'value clock with a fixed bar': (600, dict(clock='value', every=6, rate=0., threshold=.1)),
    'three levels, 3 and 9 steps': (600, dict(levels=3, every=3)),
    'three levels, all paid by the task': (250, dict(levels=3, every=3, below=.5)),
    'three levels, all paid by the task, longer': (600, dict(levels=3, every=3, below=.5)),
}
FOUR = { # ways of up to 34 steps, dreams of 12: (updates, director, do dreams begin only where actors have been that start at one end?)
    'flat': (250, None, False),
    'every 4 steps': (250, dict(every=4), False),
    'flat, from one end': (200, None, True),
    'every 4 steps, from one end': (200, dict(every=4), True),
}
LEARNED = ['dynamics.name=hierarchy', 'dynamics.hierarchy.clock=learned', 'dynamics.hierarchy.max_seg_len=8', 'dynamics.hierarchy.constrain=posterior', 'dynamics.hierarchy.boundary_rate=0.25',
           'dynamics.hierarchy.boundary_scale=1']
KEYS = { # name: (levels, when the upper ones tick, overrides)
    'flat': (1, '-', ['experiment=tiny_keys']),
    'manager every 4 steps': (2, 'fixed', ['experiment=tiny_director']),
    'manager on the learned clock': (2, 'learned', ['experiment=tiny_director', *LEARNED, 'behavior.director.clock=dynamics', 'behavior.director.every=8']),
    'manager on the learned clock, no limit': (2, 'learned', ['experiment=tiny_director', *LEARNED, 'behavior.director.clock=dynamics', 'behavior.director.every=1000']),
    'manager on the learned clock that reads value': (2, 'learned, value', ['experiment=tiny_director', *LEARNED, 'dynamics.hierarchy.value=true', 'behavior.director.clock=dynamics',
                                                                              'behavior.director.every=8']),
    "manager where the critic's value changes most": (2, 'value', ['experiment=tiny_director', 'behavior.director.clock=value', 'behavior.director.every=8', 'behavior.director.rate=0.2', 'behavior.director.threshold=0.02']),
    "manager where the critic's value changes most, no floor": (2, 'value, no floor', ['experiment=tiny_director', 'behavior.director.clock=value', 'behavior.director.every=8', 'behavior.director.rate=0.2', 'behavior.director.threshold=0']),
    "manager where the critic's value changes by a fixed amount": (2, 'value, fixed bar', ['experiment=tiny_director', 'behavior.director.clock=value', 'behavior.director.every=8', 'behavior.director.rate=0', 'behavior.director.threshold=0.1']),
    'learned clock, no goals': (2, 'learned', ['experiment=tiny_keys', *LEARNED]),
    'two managers, 3 and 9 steps': (3, 'fixed', ['experiment=tiny_director', 'behavior.director.levels=3', 'behavior.director.every=3']),
    'two managers, 3 and 9 steps, all levels paid by the task': (3, 'fixed', ['experiment=tiny_director', 'behavior.director.levels=3', 'behavior.director.every=3', 'behavior.director.below=0.5']),
}
LOVE = [*LEARNED[:1], 'dynamics.hierarchy.clock=length', 'dynamics.hierarchy.max_seg_len=8', 'dynamics.hierarchy.code=.5', 'behavior.director.clock=dynamics', 'behavior.director.every=8']
KEYS |= { # learned from what the flat agent of the same seed saw in its training; nothing is played but the evaluations
    'flat, from recorded episodes': (1, '-', ['experiment=tiny_keys', 'recorded=FLAT']),
    'manager on the learned clock, from recorded episodes': (2, 'learned', ['recorded=FLAT', *KEYS['manager on the learned clock'][2]]),
    "manager on LOVE's clock, from recorded episodes": (2, 'length of a code', ['experiment=tiny_director', 'recorded=FLAT', *LOVE]),
}
COLUMNS = ('step', 'env_steps', 'cpu_seconds', 'episode_return', 'eval_return', 'eval_length', 'reward0_goal', 'ticks1', 'goal_error', 'tick_1')


# ---------------------------------------------------------------- rooms

class FourRooms(TwoRooms):
    "Longer than a dream: up to 34 steps; dreams have 12."
    plan = tuple(''.join('#' if c in (4, 9, 14) and r != {4: 0, 9: 4, 14: 0}[c] else '.' for c in range(19)) for r in range(5))


def start_places(net, world, actors):
    "Where 16 actors have been after 8 more steps each; episodes of 100 steps begin at place 0 and end at G."
    with torch.no_grad():
        for _ in range(8):
            first = actors['age'] == 0
            act, actors['memory'] = net.act(world, actors, first, actors.get('memory'), True)
            actors['at'], actors['age'] = world.img_step(actors, act)['at'], actors['age'] + 1
            over = (actors['at'] == world.goal) | (actors['age'] >= 100)
            actors['won'] += int((actors['at'] == world.goal).sum())
            actors['at'], actors['age'] = actors['at'].masked_fill(over, 0), actors['age'].masked_fill(over, 0)
            actors['seen'].append(actors['at'].clone())
    return torch.cat(actors['seen'])


def rooms(name, seed, gamma=.95, world=TwoRooms, table=None, limit=40, explore=False):
    "Train a behavior in a known world. Dreams begin anywhere, or where actors have been."
    updates, director = (table or ROOMS)[name][:2]
    torch.manual_seed(seed)
    world, keys = world(), dict(layers=2, units=32, horizon=12, discount=gamma, entropy=3e-3, slow_rate=.1)
    cfg = from_dict(BehaviorConfig, keys | ({} if director is None else dict(name='director', director=dict(codes=4, classes=4, entropy=3e-3) | director)))
    net = (ActorCritic if director is None else Director)(world.n, 5, True, cfg)
    opt, began = torch.optim.Adam(net.parameters(), 3e-3), time.process_time()
    actors = dict(at=torch.zeros(16, dtype=torch.long), age=torch.zeros(16, dtype=torch.long), seen=[torch.zeros(16, dtype=torch.long)], won=0)
    for _ in range(updates):
        places = start_places(net, world, actors) if explore else torch.arange(world.n)
        losses = net.losses(net.dream(world, dict(at=places[torch.randint(len(places), (64,))])))[0]
        opt.zero_grad()
        sum(v.mean() for v in losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.)
        opt.step()
    took = world.play(net, limit)
    found = dict(visited=len(torch.cat(actors['seen']).unique())/world.n, won=actors['won'], steps=float(min(took[0], limit + 1))) if explore else {}
    return dict(updates=updates, score=world.score(took, gamma), found=float(np.isfinite(took).mean()), cpu_seconds=time.process_time() - began, **found)


# ---------------------------------------------------------------- keys

def ticks(agent, episodes=50, seed=55_555):
    "When the clocks of levels 1, 2, … tick: per episode a string of digits (highest level that ticks, step by step) and the step that takes the key, or -1."
    stream, player = Stream(make_envs(EnvConfig('dreamer_wb/Keys-v0', 10), agent.cfg.size), seed), Player(agent, explore=False)
    row, now, out = stream.reset(), [['', -1] for _ in range(10)], [[] for _ in range(10)]
    while min(map(len, out)) < episodes//10:
        act, taken = player(row), stream.info.get('taken', np.zeros(10, bool)).astype(bool)
        marks = [v[:, 0].numpy() > .5 for k, v in sorted(player.memory.items()) if k[:4] == 'tick'] if player.memory else [player.state['boundary'][:, 0].numpy() > .5]
        for i in range(10):
            if row['first'][i]: now[i] = ['', -1]
            elif taken[i] and now[i][1] < 0: now[i][1] = len(now[i][0])
            now[i][0] += str(sum(m[i] for m in marks))
            if row['last'][i]: out[i].append(now[i])
        row = stream.step(act)
    return [x for lane in out for x in lane[:episodes//10]]                           # as many of each lane, so that short episodes are not preferred


def auc(x, event):
    "Probability that x is larger at an event than elsewhere; ties count half."
    a, b = x[event][:, None], x[~event][None]
    return float(((a > b) + .5*(a == b)).mean())


def jumps(agent, pressed, episodes=100, seed=66_666):
    "Does the agent's own critic notice the key? Changes of value and of the picture in the step that takes it, and in others; with random actions, or its most probable ones."
    stream, player = Stream(make_envs(EnvConfig('dreamer_wb/Keys-v0', 10), agent.cfg.size), seed), Player(agent, explore=False)
    row, had, last, found, over, anything = stream.reset(), np.zeros(10, bool), None, [], 0, random_policy(stream)
    while over < episodes:
        act = player(row)
        with torch.no_grad(): value = agent.behavior.critics['task'](agent.world.dynamics.feat(player.state)).mode.numpy()
        has, go_on = stream.info.get('taken', np.zeros(10, bool)).astype(bool) & ~row['first'], ~row['first'] & (row['rew'] == 0)
        if last is not None:
            moved = np.abs(row['obs'].astype(float) - last[1]).mean((1, 2, 3))
            found += [np.stack([has & ~had, np.abs(value - last[0]), moved], 1)[go_on]]
        had, last = has, (value, row['obs'].astype(float))
        row = stream.step(anything(row) if pressed == 'random' else act)
        over += row['last'].sum()
    key, change, moved = np.concatenate(found).T
    key = key > 0
    if not key.any(): return dict(keys=0, steps=len(key))
    return dict(keys=int(key.sum()), steps=len(key), at_key=float(change[key].mean()), elsewhere=float(change[~key].mean()), auc_value=auc(change, key), auc_picture=auc(moved, key))


def changes(agent, pressed, episodes=200, seed=88_888):
    "Per episode: [change of value, change of the picture] of every step but its first and last, and the step that takes the key, or -1. The critic is the slow copy, which a Director asks too."
    stream, player = Stream(make_envs(EnvConfig('dreamer_wb/Keys-v0', 10), agent.cfg.size), seed), Player(agent, explore=False)
    critic, anything, row, out, now, last = agent.behavior.critics['task'], random_policy(stream), stream.reset(), [[] for _ in range(10)], [None]*10, None
    while min(map(len, out)) < episodes//10:
        act = player(row)
        with torch.no_grad(): value = TwoHot(critic.slow(agent.world.dynamics.feat(player.state)), critic.bins).mode.numpy()
        seen, taken = row['obs'].astype(float), stream.info.get('taken', np.zeros(10, bool)).astype(bool)
        for i in range(10):
            if row['first'][i] or now[i] is None: now[i] = [[], -1]
            elif not row['last'][i]:
                if taken[i] and now[i][1] < 0: now[i][1] = len(now[i][0])
                now[i][0].append([abs(value[i] - last[0][i]), np.abs(seen[i] - last[1][i]).mean()])
            if row['last'][i]: out[i].append((np.array(now[i][0]).reshape(-1, 2), now[i][1])); now[i] = None
        last, row = (value, seen), stream.step(anything(row) if pressed == 'random' else act)
    return [x for lane in out for x in lane[:episodes//10]]


def clocked(found, column, rate=.2, recent=500, fixed=None, draws=10_000):
    "Ticks where a change exceeds all but a share `rate` of the `recent` ones before it (or a fixed amount): shares at the key and elsewhere, and how often a step drawn from each of these episodes would do as well."
    past, at, rest, chance = [], [], [], []
    for x, key in found:
        tick = np.zeros(len(x), bool)
        for t, c in enumerate(x[:, column]):
            bar = fixed if fixed is not None else np.quantile(past[-recent:], 1 - rate, method='inverted_cdf') if len(past) >= recent else np.inf
            tick[t] = c > bar
            past.append(c)
        if len(past) - len(x) < recent: continue                                    # the bar is not known yet
        if key >= 0: at.append(tick[key]); chance.append(tick)
        rest += np.delete(tick, key).tolist() if key >= 0 else tick.tolist()
    if not at: return dict(keys=0)
    rng = np.random.default_rng(0)
    drawn = np.sum([rng.choice(t, draws) for t in chance], 0)
    return dict(keys=len(at), steps=len(rest), at_key=float(np.mean(at)), elsewhere=float(np.mean(rest)), p=float((1 + (drawn >= sum(at)).sum())/(1 + draws)))


def noticed(seed, steps):
    "Would a clock on the critic of a trained flat agent tick where the key is taken?"
    folder = tempfile.mkdtemp(prefix='levels_')
    cfg = compose(AgentConfig, [*KEYS['flat'][2], f'seed={seed}', f'runs_dir={folder}', 'name=run', f'loop.steps={steps}', 'eval_episodes=0', 'video=false', 'loop.tensorboard=false', 'loop.progress=false'])
    run = train_agent(cfg)
    agent, out = load_agent(run.checkpoints/'agent.ckpt'), {}
    for pressed in ('random', 'own'):
        found = changes(agent, pressed)
        out[pressed] = {'value, usual changes': clocked(found, 0), 'value, changes of .1': clocked(found, 0, fixed=.1), 'picture, usual changes': clocked(found, 1)}
    shutil.rmtree(folder)
    return out


def asked(agent, steps=400, seed=77_777):
    "What became of the goals of a director, and the story for a picture."
    torch.manual_seed(0)
    story = follow_goals(agent, Stream(make_envs(EnvConfig('dreamer_wb/Keys-v0', 1), agent.cfg.size), seed), steps)
    rows = goal_segments(story)
    mean = lambda f: float(np.mean([f(r) for r in rows]))
    return dict(goals=len(rows), kept=mean(lambda r: r['stop'] - r['start']), nearer_than_other=mean(lambda r: r['after'] > r['other']), **{k: mean(lambda r: r[k]) for k in ('before', 'after', 'other')}), story


def kept_goals(folder):
    "`asked` of all kept agents; pictures of the one on the learned clock."
    out = {}
    for path in sorted(Path(folder).glob('*.ckpt')):
        agent, (name, seed) = load_agent(path), path.stem.replace('_', ' ').rsplit('-', 1)
        if agent.cfg.behavior.name != 'director': continue
        row, story = asked(agent)
        out.setdefault(name, {})[seed] = row
        if path.stem == 'manager_on_the_learned_clock-10': np.savez_compressed(OUT.with_name('levels_goals.npz'), **{k: v[:60].numpy() for k, v in story.items()})
    return out


def recording(seed, steps):
    "What a flat agent sees in its training, from random actions to a player that mostly succeeds."
    return train_agent(settings(KEYS['flat'][2], seed, steps, Path(tempfile.gettempdir())/'levels_recorded', f'{steps}-{seed}')).path/'replay'


def settings(overrides, seed, steps, folder, name):
    "Of an agent on Keys."
    return compose(AgentConfig, [*overrides, f'seed={seed}', f'runs_dir={folder}', f'name={name}', f'loop.steps={steps}', 'loop.eval_every=50', 'eval_episodes=16', 'video=false',
                                 'loop.tensorboard=false', 'loop.progress=false', 'loop.checkpoint_seconds=1000000'])


def keys(name, seed, steps, keep=None):
    "Train an agent from pixels; its checkpoint may be kept in a folder."
    folder, overrides = tempfile.mkdtemp(prefix='levels_'), KEYS[name][2]
    if 'recorded=FLAT' in overrides: overrides = [f'recorded={recording(seed, steps)}' if o == 'recorded=FLAT' else o for o in overrides]
    cfg = settings(overrides, seed, steps, folder, 'run')
    run = train_agent(cfg)
    table, agent = read_metrics(run), load_agent(run.checkpoints/'agent.ckpt')
    found = evaluate(Stream(make_envs(EnvConfig('dreamer_wb/Keys-v0', 10), cfg.size), 77_777), Player(agent, explore=False), 100)
    curve = [{k: round(row[k], 4) for k in COLUMNS if k in row and row[k] == row[k]} for row in table.to_dict('records')]
    clocked = cfg.behavior.name == 'director' or cfg.dynamics.name == 'hierarchy'
    out = dict(updates=steps, env_steps=0 if cfg.recorded else int(table['env_steps'].max()), cpu_seconds=run.stages()['train']['cpu_seconds'], parameters=sum(p.numel() for p in agent.parameters() if p.requires_grad),
               success=float(np.mean(found['returns'])), length=float(np.mean(found['lengths'])), episodes=len(found['returns']), ticks=ticks(agent) if clocked else None,
               jumps={pressed: jumps(agent, pressed) for pressed in ('random', 'own')}, curve=curve)
    if keep: shutil.copy(run.checkpoints/'agent.ckpt', Path(keep)/f"{name.replace(' ', '_')}-{seed}.ckpt")
    shutil.rmtree(folder)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--part', choices=('rooms', 'four', 'clock', 'keys', 'goals'), nargs='+', default=['rooms', 'four', 'clock', 'keys'])
    parser.add_argument('--only', nargs='+', help='names in ROOMS or KEYS')
    parser.add_argument('--seeds', type=int, nargs='+', default=SEEDS)
    parser.add_argument('--steps', type=int, default=400, help='updates of the whole agent')
    parser.add_argument('--keep', help='folder for the trained agents; default: none is kept. --part goals looks at those that are there')
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read_json(OUT) if OUT.exists() else {}
    if 'goals' in args.part: write_json(OUT, data | dict(goals=kept_goals(args.keep)))
    for part, names in (('rooms', ROOMS), ('four', FOUR), ('clock', ['flat']), ('keys', KEYS)):
        if part not in args.part: continue
        for seed in args.seeds:                                                     # seed by seed, so that a part of the runs compares all rows
            for name in (n for n in names if not args.only or n in args.only):
                if str(seed) in data.get(part, {}).get(name, {}): continue
                result = rooms(name, seed) if part == 'rooms' else rooms(name, seed, world=FourRooms, table=FOUR, limit=100, explore=FOUR[name][2]) if part == 'four' else noticed(seed, args.steps) if part == 'clock' else keys(name, seed, args.steps, args.keep)
                data = read_json(OUT) if OUT.exists() else {}
                data.setdefault(part, {}).setdefault(name, {})[str(seed)] = result
                data['baselines'] = data['baselines'] if 'four' in data.get('baselines', {}) else baselines()
                write_json(OUT, data)
                print(part, name, seed, {k: v for k, v in result.items() if k not in ('curve', 'ticks')}, flush=True)


def baselines(gamma=.95):
    "What is best, and what pressing anything achieves."
    world, far, stream = TwoRooms(), FourRooms(), Stream(make_envs(EnvConfig('dreamer_wb/Keys-v0', 10), 16), 77_777)
    torch.manual_seed(0)
    found = evaluate(stream, random_policy(stream), 2000)
    four = [far.play(None, 100) for _ in range(50)]
    return dict(four=dict(optimum=far.score(far.far, gamma), random=float(np.mean([far.score(x, gamma) for x in four]))), rooms=dict(optimum=world.score(world.far, gamma), random=float(np.mean([world.score(world.play(None), gamma) for _ in range(50)]))),
                keys=dict(optimum=keys_optimum(), random_success=float(np.mean(found['returns'])), random_length=float(np.mean(found['lengths']))))


if __name__ == '__main__': main()
