"""Does the agent learn? Reach, a task with a known optimum, on fresh seeds; why it did not at first; Pendulum-v1 from pixels as far as a CPU allows.

    python nbs/experiments/agent.py                                  # everything, see RUNS for the number of updates
    python nbs/experiments/agent.py --only reach --seeds 10
    python nbs/experiments/agent.py --only pendulum --seeds 10 --updates 2000    # goes on where the run stopped, up to update 2000
    python nbs/experiments/agent.py --only notice                    # how soon a world model notices the squares, by how they are drawn

Each run is the preset named in RUNS with the keys given there; what is in the result file with so many updates already is not repeated. At the end of a run the
agent plays 100 episodes (Pendulum: 20) on environments that it has never seen, with the most probable actions. Beside it: random actions, and a controller that sees the true state.
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from dreamer_wb.core.config import compose
from dreamer_wb.core.learner import make_optimizer, set_seed
from dreamer_wb.core.runs import read_json, read_metrics, write_json
from dreamer_wb.data.episodes import float_to_image, image_to_float
from dreamer_wb.dreamer.agent import AgentConfig, Player, load_agent, train_agent
from dreamer_wb.dreamer.envs import EnvConfig, Stream, draw_reach, evaluate, make_envs, random_policy, reach_optimum, scripted_policy
from dreamer_wb.dreamer.world_model import DreamerWorldModel

OUT = Path(__file__).resolve().parent/'results'/'agent.json'
STRIPS = OUT.with_name('agent_strips.npz')
RUNS = { # name: (overrides, seeds, updates, episodes of the last evaluation)
    'reach': (['experiment=tiny_pixels'], (10, 11, 12), 1600, 100),
    'reach, hierarchy': (['experiment=tiny_pixels', 'dynamics.name=hierarchy', 'dynamics.hierarchy.clock=fixed'], (10, 11, 12), 1600, 100),
    'pendulum': (['experiment=pendulum', 'loop.eval_every=100'], (10, 11, 12, 13), 1100, 20),
}
COLUMNS = ('step', 'env_steps', 'cpu_seconds', 'episode_return', 'eval_return', 'image', 'reward', 'return_task', 'entropy', 'psnr')


# ---------------------------------------------------------------- agents

def played(cfg, policy, episodes, seed=77_777):
    "Returns on new environments."
    stream = Stream(make_envs(EnvConfig(cfg.env.name, min(10, episodes), cfg.env.repeat, cfg.env.steps), cfg.size), seed)
    return evaluate(stream, policy(stream), episodes)['returns']


def baselines(cfg, episodes):
    "What random actions and the controller earn, with standard errors."
    players = dict(random=random_policy, scripted=scripted_policy)
    scores = {name: np.array(played(cfg, p, episodes)) for name, p in players.items()}
    return {k: dict(mean=float(x.mean()), se=float(x.std(ddof=1)/len(x)**.5), n=len(x)) for k, x in scores.items()}


@torch.no_grad()
def strip(cfg, agent, steps=12):
    "An episode that the agent plays, and how it goes on in its imagination after one picture (Pendulum: five): two arrays (steps,H,W,3) uint8."
    seen, seed = (1, 34) if 'Reach' in cfg.env.name else (5, 5)              # of that seed, the goal is six steps away
    stream, world = Stream(make_envs(EnvConfig(cfg.env.name, 1, cfg.env.repeat, cfg.env.steps), cfg.size), seed), agent.world
    player, rows = Player(agent, explore=False), [stream.reset()]
    while len(rows) < steps: rows.append(stream.step(player(rows[-1])))
    obs, act = (torch.from_numpy(np.stack([r[k] for r in rows], 1)) for k in ('obs', 'act'))
    torch.manual_seed(0)
    known = world.encoder(obs.permute(0, 1, 4, 2, 3)[:, :seen], act[:, :seen])
    dreamt = world.decoder(torch.cat([known.feat, world.rollout(known, act[:, seen:], sample=False)], 1))[0]
    return obs[0].numpy(), float_to_image(dreamt).permute(0, 2, 3, 1).numpy()


def ways(cfg, returns):
    "Reach: in what share of the episodes the agent took a shortest way, and in which it never arrived; the controller plays the same ones."
    if 'Reach' not in cfg.env.name: return {}
    best = np.array(played(cfg, scripted_policy, len(returns)))
    return dict(shortest=float(np.mean(np.array(returns) >= best)), never=float(np.mean(np.array(returns) == 0)))


def one(name, seed, updates, runs):
    "Train, or go on, up to so many updates; the curve and a last evaluation."
    overrides, _, _, episodes = RUNS[name]
    cfg = compose(AgentConfig, [*overrides, f'seed={seed}', f'runs_dir={runs}', f"name='{name} {seed}'", f'loop.steps={updates}', 'loop.tensorboard=false'])
    run = train_agent(cfg)
    table, agent = read_metrics(run), load_agent(run.checkpoints/'agent.ckpt')
    returns = played(cfg, lambda stream: Player(agent, explore=False), episodes)
    real, dreamt = strip(cfg, agent)
    np.savez_compressed(STRIPS, **(dict(np.load(STRIPS)) if STRIPS.exists() else {}) | {f'{name} {seed} real': real, f'{name} {seed} dreamt': dreamt})
    curve = [{k: row[k] for k in COLUMNS if k in row and row[k] == row[k]} for row in table.to_dict('records')]
    return dict(updates=updates, env_steps=int(table['env_steps'].max()), parameters=sum(p.numel() for p in agent.parameters() if p.requires_grad),
                cpu_seconds=run.stages()['train']['cpu_seconds'], final=dict(mean=float(np.mean(returns)), se=float(np.std(returns, ddof=1)/len(returns)**.5), n=len(returns)), curve=curve)


# ---------------------------------------------------------------- how soon a world model notices the squares

DRAWINGS = { # name: (floor, whole cells, further keys)
    'dark floor, small square': (30, False, []), 'grey floor, small square': (128, False, []), 'dark floor, whole cells': (30, True, []),
    'dark floor, small square, loop.clip=1': (30, False, ['loop.clip=1']), 'grey floor, whole cells': (128, True, []), 'grey floor, whole cells, batch norm': (128, True, ['encoder.norm=batch']),
}


def picture(place, goal, floor, whole):
    "As `draw_reach` draws, with another floor, or with a square that covers the middle of its cell only, 2 x 2 of 16 pixels, so that the goal shows behind it."
    out = draw_reach(place, goal)
    if not whole:
        (i, j), (x, y) = np.multiply(place, 4), np.multiply(goal, 4)
        out[:] = 128
        out[y:y + 4, x:x + 4], out[j + 1:j + 3, i + 1:i + 3] = (40, 200, 60), (230, 50, 47)
    return np.where((out == 128).all(-1, keepdims=True), np.uint8(floor), out)


def walks(n, steps, rng):
    "Random walks: cells of place and goal (n,T) and actions (n,T,5)."
    moves, act = np.array([(0, 0), (0, -1), (1, 0), (0, 1), (-1, 0)]), rng.integers(0, 5, (n, steps))
    at, goal = (np.stack([c % 4, c//4], 1) for c in rng.permuted(np.tile(np.arange(16), (n, 1)), axis=1)[:, :2].T)
    places = [at]
    for t in range(1, steps): places.append(np.clip(places[-1] + moves[act[:, t]], 0, 3))
    place = np.stack(places, 1)
    return place[..., 0] + 4*place[..., 1], np.tile(goal[:, :1] + 4*goal[:, 1:], (1, steps)), np.eye(5, dtype=np.float32)[act]


def notice(name, seed, updates=200, every=20, steps=8):
    "World model alone, on random walks: after how many updates its reconstructions show place and goal where they are, on 64 held-out walks."
    floor, whole, more = DRAWINGS[name]
    cfg, rng = compose(AgentConfig, ['experiment=tiny_pixels', 'action_dim=5', 'device=cpu', 'encoder.norm=none', *more]), np.random.default_rng([seed, 7])
    cells = np.array([(i % 4, i//4) for i in range(16)])
    pictures = torch.from_numpy(np.stack([picture(a, b, floor, whole) for a in cells for b in cells])).permute(0, 3, 1, 2)        # place*16 + goal
    def batch(n):
        place, goal, act = walks(n, steps, rng)
        met = torch.from_numpy(place == goal)
        first = (torch.arange(steps) == 0).expand(n, steps)
        return dict(obs=pictures[place*16 + goal], act=torch.from_numpy(act), rew=(met & ~first).float(), done=torch.zeros(n, steps, dtype=torch.bool), first=first), place, goal
    test, place, goal = batch(64)
    set_seed(seed)
    world, rows, spent = DreamerWorldModel(cfg), [], 0.
    opt, flat = make_optimizer(world, cfg.loop), image_to_float(pictures).flatten(1)
    for u in range(1, updates + 1):
        data, start = batch(cfg.batch_size)[0], time.process_time()
        for g in opt.param_groups: g['lr'] = g['initial_lr']*min(1, u/20)
        losses, metrics = world(data)
        sum(v.float().mean()*world.scales[k] for k, v in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_(world.parameters(), cfg.loop.clip)
        opt.step()
        opt.zero_grad()
        spent += time.process_time() - start
        if u % every == 0:
            world.eval()
            with torch.no_grad(): drawn = world.decoder(world.encoder(test['obs'], test['act'], test['first']).feat).flatten(0, 1).flatten(1)
            world.train()
            nearest = torch.cdist(drawn, flat).argmin(-1).view(64, steps).numpy()
            rows.append(dict(step=u, cpu_seconds=spent, place=float((nearest//16 == place).mean()), goal=float((nearest % 16 == goal).mean()),
                             image=float(losses['image'].detach().mean()), kl=float(metrics['kl'])))
    return rows


def keep(*path, value):
    "Put a value into the result file, which another process may have changed meanwhile."
    results = at = read_json(OUT) if OUT.exists() else {}
    for k in path[:-1]: at = at.setdefault(k, {})
    at[path[-1]] = value
    write_json(OUT, results)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=[*RUNS, 'notice'], default=[*RUNS, 'notice'])
    parser.add_argument('--seeds', type=int, nargs='+')
    parser.add_argument('--updates', type=int, help='instead of what RUNS says')
    parser.add_argument('--runs', default='runs/experiments', help='folder for the runs')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    os.environ.setdefault('DREAMER_WB_PROGRESS', '0')
    get = lambda *path: (lambda x: [x := x.get(k, {}) for k in path][-1])(read_json(OUT) if OUT.exists() else {})
    for name in args.only:
        if name == 'notice':
            for seed in args.seeds or (0, 1, 2):
                for drawing in DRAWINGS:
                    if not get('notice', drawing, str(seed)): keep('notice', drawing, str(seed), value=notice(drawing, seed))
                    print(drawing, seed, get('notice', drawing, str(seed))[-1], flush=True)
            continue
        overrides, seeds, updates, episodes = RUNS[name]
        if not get(name, 'baselines'):
            cfg = compose(AgentConfig, overrides)
            for k, v in dict(overrides=overrides, repeat=cfg.env.repeat, baselines=baselines(cfg, max(100, episodes))).items(): keep(name, k, value=v)
            if cfg.env.name.startswith('dreamer_wb/Reach'): keep(name, 'optimum', value=reach_optimum())
        for seed in args.seeds or seeds:
            wanted = args.updates or updates
            if get(name, 'seeds', str(seed)).get('updates', 0) < wanted: keep(name, 'seeds', str(seed), value=one(name, seed, wanted, args.runs))
            done = get(name, 'seeds', str(seed))
            print(f"{name}, seed {seed}: {done['final']['mean']:.2f} +- {done['final']['se']:.2f} after {done['env_steps']} steps, {done['cpu_seconds']:.0f} CPU s; {get(name, 'baselines')}", flush=True)


if __name__ == '__main__': main()
