"""Clocks of a hierarchy beside one another: which find the boundaries of a sequence, inside a world model, and what does that do to its predictions?

    python nbs/experiments/clocks.py                                   # everything that is not in the results yet
    python nbs/experiments/clocks.py --only ball/learned --seeds 3 4   # some of it
    python nbs/experiments/clocks.py --list

One run at a time, each a world model of 16-pixel images trained for a fixed number of updates; results/clocks.json is written after each.
Settings were found on seeds 0 and 1, those of `planted_before` also on 10 and 11; see the article for which seeds were run. The weights of LOVE's and THICK's clocks:

    python nbs/experiments/clocks.py --seeds 0 --only colors/length_0.1 colors/length_0.5 colors/length_2 colors/gate_0.1 colors/gate_1 colors/gate_3
"""
import argparse
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dreamer_wb.core.config import TrainConfig, compose
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import read_json, write_json
from dreamer_wb.dreamer.world_model import DreamerWorldModel, open_loop, read_images
from dreamer_wb.vta.boundaries import baselines, boundary_prf, evaluate_boundaries, frame_delta, offset_scan, ranking, stack_episodes
from dreamer_wb.vta.bouncing_balls import COLORS, big_ball, color_patterns
from dreamer_wb.vta.inspect import world_boundaries

HERE = Path(__file__).parent
RESULTS = HERE/'results'/'clocks.json'
T, SIZE, CONTEXT = 12, 16, 6


def colors(n, seed):
    "Simple Colors, cut out of longer sequences, so that the first frame says nothing about the next boundary."
    data, at = color_patterns(n, T + 2, seed, size=SIZE), np.random.default_rng([seed, 1]).integers(0, 3, n)
    return {k: np.stack([x[i, a:a + T] for i, a in enumerate(at)]) for k, x in data.items()}


def ball(n, seed):
    "One big ball that changes its colour at the walls, on a grey background, which the networks read as 0."
    data = big_ball(n, T, seed, size=SIZE, radius=4., speed=1., noise=.025)
    data['obs'][(data['obs'] == 0).all(-1)] = 128
    return data


def planted(n, seed, T=T):
    "Colours in patterns of 7 to 9 frames that grow brighter by the same amount in every frame; half brightness brings a reward, and no pixel shows anything special then."
    rng, count = np.random.default_rng(seed), 2 + T//7
    length, number = rng.integers(7, 10, (n, count)), rng.choice(3, (n, count), p=[.4, .2, .4])
    low, speed = rng.uniform(.12, .28, (n, count)), rng.uniform(.06, .09, (n, count))
    start, t = np.cumsum(length, 1) - length - rng.integers(0, 7, (n, 1)), np.arange(T)          # (n,count); (T,)
    which = (start[:, None] <= t[:, None]).sum(-1) - 1                                          # (n,T) number of the pattern
    pick = lambda x: np.take_along_axis(x, which, 1)
    bright = pick(low) + pick(speed)*(t - pick(start))
    pixel = (COLORS[pick(number)]*bright[..., None]).astype(np.uint8)
    obs = np.broadcast_to(pixel[:, :, None, None], (n, T, SIZE, SIZE, 3))
    return dict(obs=np.ascontiguousarray(obs), read=pick(start) == t, rew=((bright >= .5) & (bright - pick(speed) < .5)).astype(np.float32))


DATA = dict(colors=colors, ball=ball, planted=planted, planted_before=planted)
BASE = ['size=16', 'encoder.depth=8', 'decoder.depth=8', 'encoder.mults=[1,2]', 'decoder.mults=[1,2]', 'dynamics.name=hierarchy', 'dynamics.stoch=8', 'dynamics.deter=64',
        'dynamics.hidden=64', 'dynamics.blocks=1', 'dynamics.free_nats=0', 'loop.lr=3e-3', 'loop.progress=false', 'loop.tensorboard=false', 'loop.eval_every=0', 'loop.amp=off']


def h(**settings): return [f'dynamics.hierarchy.{k}={v}' for k, v in settings.items()]


COMMON = [*h(max_seg_len=0, max_duration=16, boundary_rate=.2, upper_kl=.1), 'scales.rep=.5', 'scales.dyn=.5', 'loop.lr=4e-3', 'loop.clip=1']
LEARNED = [*COMMON, *h(boundary_gradient='leave_one_out', change='true', boundary_scale=10, explore=1)]
CODES, SPARSITIES = (.1, .5, 2), (.1, 1, 3, 10, 30)                                       # what was searched


def length(code): return [*LEARNED, *h(clock='length', code=code, boundary_scale=0), 'dynamics.latent=categorical', 'dynamics.stoch=4', 'dynamics.classes=8']
def gate(sparsity): return [*COMMON, *h(clock='gate', on_tick='keep', sparsity=sparsity)]


METHODS = {
    'learned': LEARNED,                                                                   # VTA-Dreamer, as it is meant to be used
    'equal_price': [*LEARNED, *h(upper_kl=1)],                                            # the same, a nat costs the same on both levels
    'straight_through': [*COMMON, *h(boundary_gradient='straight_through', max_seg_len=10)],     # VTA-Dreamer, the way of the seed
    'length': length(2),                                                                  # LOVE
    'gate': gate(10),                                                                     # THICK
    'fixed': [*COMMON, *h(clock='fixed', every=3, on_tick='keep')],                      # CW-VAE
    'oracle': [*COMMON, *h(clock='event', event_key='read')],
    'rssm': [*COMMON, *h(levels=1)],
    'rssm_long': [*COMMON, *h(levels=1)],                                                 # for as many CPU seconds as `learned`
    'learned_3': [*LEARNED, *h(levels=3)],
    'fixed_3': [*COMMON, *h(clock='fixed', every=3, on_tick='keep', levels=3)],
    'informed': [*LEARNED, *h(event_key='value', event_change='true', signal_scale=100)],     # value-informed: the clock reads the change of a value estimate
    'informed_reward': [*LEARNED, *h(event_key='rew', signal_scale=100)],                    # the same, reads the reward
    'informed_critic': [*LEARNED, *h(value='true', signal_scale=100)],                       # the same, reads the change of a critic that learns beside it
    'value_event': [*COMMON, *h(clock='event', event_key='value', event_change='true', event_threshold=.35)],       # ticks where the estimate changes by more than .35
}
PLANTED = {'planted': h(boundary_rate=.24, min_seg_len=2),                                   # for all clocks: the rate of colours and rewards together
           'planted_before': [*h(boundary_rate=.24, boundary_scale=10, min_seg_len=2, explore=.5, upper_kl=1), 'loop.lr=3e-3', 'loop.clip=100']}      # of a session before, seeds 11 to 13
SEARCH = {f'length_{c}': length(c) for c in CODES} | {f'gate_{s}': gate(s) for s in SPARSITIES}
STEPS, LONGER = dict(colors=80, ball=180, planted=240, planted_before=240), dict(rssm_long=3)
PLAIN = ('learned', 'length', 'gate', 'straight_through', 'fixed', 'rssm', 'rssm_long', 'learned_3', 'fixed_3', 'oracle', 'equal_price')
RUNS = [*(f'{d}/{m}' for d in ('ball', 'colors') for m in PLAIN), *(f'planted/{m}' for m in ('learned', 'informed', 'informed_reward', 'informed_critic', 'value_event'))]
SEARCHED = [*(f'{d}/{m}' for d in ('colors', 'ball') for m in SEARCH), *(f'planted_before/{m}' for m in ('learned', 'informed', 'value_event'))]


def small(obs):
    "Frame t and the one before (n,T,H,W,3) as 2 x 48 numbers each."
    x = torch.from_numpy(obs).float().unflatten(2, (4, -1)).unflatten(4, (4, -1)).mean((3, 5)).flatten(2)/255 - .5    # (n,T,48)
    return torch.cat([x, torch.cat([x[:, :1], x[:, :-1]], 1)], -1)


@cache
def critic(seed, updates=3000):
    "A value estimate for `planted`, trained on discounted Monte Carlo returns of 600 episodes of 60 frames, of which the last 20 are left out."
    set_seed(seed)
    data, g = planted(600, [seed, 3], 60), np.zeros(600)
    returns = np.zeros((600, 60), np.float32)
    for t in reversed(range(59)): returns[:, t] = g = data['rew'][:, t + 1] + .9*g
    x, y = small(data['obs'])[:, 1:40].flatten(0, 1), torch.from_numpy(returns)[:, 1:40].flatten()
    net = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(updates):
        for group in opt.param_groups: group['lr'] = 2e-3*(1 - step/updates)
        i = torch.randint(len(x), (256,))
        loss = (net(x[i]).squeeze(-1) - y[i]).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
    return net.requires_grad_(False)


def batch_of(name, n, seed):
    "Tensors of `n` sequences, as a world model reads them."
    data = DATA[name](n, seed)
    if 'rew' in data: data['value'] = critic(seed[0])(small(data['obs'])).squeeze(-1).numpy()
    out = dict(obs=torch.from_numpy(data['obs']).permute(0, 1, 4, 2, 3).contiguous(), act=torch.zeros(n, T, 1), first=(torch.arange(T) == 0).repeat(n, 1))
    data['read'] = data['read'].copy(); data['read'][:, 0] = True
    return out | {k: torch.from_numpy(data[k]).float() for k in ('read', 'rew', 'value') if k in data}


def first_frames(read):
    "All that is left out: a frame at which the clock had to wait for `min_seg_len` may be an event that it missed."
    return np.arange(read.shape[1])[None].repeat(len(read), 0) == 0


def bound(world, batch):
    "Squared error and KLs of all levels and clocks, all with weight 1, nats per frame; one sample of all that is drawn, the same for every model of a kind."
    dyn, image, was = world.dynamics, read_images(batch['obs']), world.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        key = getattr(dyn, 'event_key', '')
        trace = dyn.eval().observe(world.encoder.embed(image), batch['act'], batch['first'], sample=True, **({'event': batch[key]} if key else {}))
        error = world.decoder.image_loss(world.decoder.net_out(dyn.feat(trace.post)), image)
        kls = [dyn.level_kl(trace, l)['dyn'] for l in range(dyn.n_levels)] + [dyn.tick_kl(trace, l)['dyn'] for l in range(1, dyn.n_levels)]
    world.train(was)
    return dict(bound=float((error + sum(kls)).mean()), image=float(error.mean()), kls=[float(k.mean()) for k in kls])


def scores(world, batch):
    "Boundaries of every level against the truth, and open-loop error."
    true, levels = batch['read'].bool().numpy(), range(1, world.dynamics.n_levels)
    out, delta = {}, np.stack([frame_delta(x.permute(0, 2, 3, 1).numpy()) for x in batch['obs']])
    for l in levels:
        b = world_boundaries(world, batch, l)
        d = stack_episodes(dict(read=b['read'], read_prob=b['read_prob'], forced=first_frames(b['read']), delta=delta, true=true))
        r = boundary_prf(b['read'], true, 0, ~d['scored'])
        row = {k: r[k] for k in ('precision', 'recall', 'f1')} | dict(rate=b['read'][d['scored']].mean(), true_rate=true[d['scored']].mean(), auc=ranking(b['read_prob'][d['scored']], true[d['scored']])[0],
               early=offset_scan(b['read'], true, 1, ~d['scored'])[1])
        for name, pred in baselines(d, draws=20).items():
            if name != 'every frame': row['f1_' + name.replace(' ', '_')] = float(np.mean([boundary_prf(p, true, 0, ~d['scored'])['f1'] for p in pred]))
        out[f'level_{l}'] = {k: float(v) for k, v in row.items()}
    was = world.training
    world.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        dream = open_loop(world, batch, CONTEXT)
        error = (dream - read_images(batch['obs'])).square().mean((0, 2, 3, 4))
    world.train(was)
    return out | bound(world, batch) | dict(reconstruction=float(error[:CONTEXT].mean()), open_loop=float(error[CONTEXT:].mean()), open_loop_by_step=error[CONTEXT:].tolist())


def config(name, method, seed, steps):
    "The config of a run."
    return compose(TrainConfig, [*BASE, *(METHODS | SEARCH)[method], *PLANTED.get(name, []), *h(explore_steps=steps), f'seed={seed}', f'loop.steps={steps}'])


def train(name, method, seed, steps=None, evals=4):
    "One run: the scores along the way and in the end, and the CPU seconds of its updates alone."
    from fastai.callback.core import Callback
    cfg, pool, held = config(name, method, seed, (steps or STEPS[name])*LONGER.get(method, 1)), batch_of(name, 2000, [seed, 0]), batch_of(name, 200, [seed, 1])
    set_seed(seed)
    world, curve, spent, every = DreamerWorldModel(cfg), [], [0.], cfg.loop.steps//evals
    def batches(step):
        i = torch.from_numpy(np.random.default_rng([seed, 2, step]).integers(0, 2000, 16))
        return {k: v[i] for k, v in pool.items()}
    class Watch(Callback):
        def before_fit(self): self.start = time.process_time()
        def after_batch(self):
            if not self.training or self.train_iter % every: return
            spent[0] += time.process_time() - self.start
            curve.append(dict(step=self.train_iter, cpu_seconds=spent[0]) | scores(world, held))
            print(name, method, seed, {k: round(v, 3) for k, v in (curve[-1].get('level_1', {}) | dict(cpu=spent[0], open_loop=curve[-1]['open_loop'])).items() if k in ('precision', 'recall', 'f1', 'auc', 'rate', 'cpu', 'open_loop')}, flush=True)
            self.start = time.process_time()
    fit(world, batches, cfg.loop, cbs=[Watch()])
    out = dict(curve=curve, examples=examples(world, held), parameters=sum(p.numel() for p in world.parameters()))
    if 'rew' in held: out['events'] = against_rewards(world, held)
    elif method in ('learned', 'equal_price'): out['saved'] = saved(world, {k: v[:64] for k, v in held.items()})
    return out


def saved(world, batch):
    "What a READ of level 1 saves at each frame, in nats and with the weights of the training: everything twice, READ and COPY there, all other noise being the same."
    dyn, T, parts = world.dynamics, batch['first'].shape[1], {}
    clock, image = dyn.clocks[0], read_images(batch['obs'])
    def cost(t, read):
        calls, draw = iter(range(T)), type(clock).draw
        clock.draw = lambda *args: torch.full_like(draw(clock, *args), read) if next(calls) == t else draw(clock, *args)
        torch.manual_seed(t)
        trace = dyn.observe(world.encoder.embed(image), batch['act'], batch['first'], sample=True)
        del clock.draw
        kl = lambda l: dyn.level_kl(trace, l)['dyn']*dyn.cfg.hierarchy.upper_kl**l
        return dict(image=world.decoder.image_loss(world.decoder.net_out(dyn.feat(trace.post)), image), below=kl(0), above=kl(1), clock=dyn.tick_kl(trace, 1)['dyn'])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for t in range(1, T):
            read, copy = cost(t, 1.), cost(t, 0.)
            for k in read: parts.setdefault(k, []).append((copy[k] - read[k]).sum(1))
    true, parts = batch['read'][:, 1:].bool(), {k: torch.stack(v, 1) for k, v in parts.items()}        # (n,T-1)
    parts['total'] = sum(parts.values())
    return {name: {k: dict(mean=float(v[at].mean()), median=float(v[at].median()), share=float((v[at] > 0).float().mean())) for k, v in parts.items()} for name, at in (('true', true), ('elsewhere', ~true))}


def examples(world, batch, n=8):
    "Decisions on the first sequences."
    return dict(true=batch['read'][:n].bool().tolist()) | {f'level_{l}': world_boundaries(world, batch, l)['read'][:n].tolist() for l in range(1, world.dynamics.n_levels)}


def against_rewards(world, batch):
    "The statistics of `vta.boundaries` for rewards as events: rate at and off boundaries, lift, AUC, permutation test."
    b = world_boundaries(world, batch, 1)
    eps = dict(read=b['read'], read_prob=b['read_prob'], forced=first_frames(b['read']), rew=batch['rew'].numpy())
    eps['delta'] = np.stack([frame_delta(x.permute(0, 2, 3, 1).numpy()) for x in batch['obs']])
    result = evaluate_boundaries(eps, tol=(0,), words=['reward'], kind='circular', n=2000, draws=1000)
    d = stack_episodes(eps)
    plain = boundary_prf(d['read'], d['rew'] != 0, 0, ~d['scored'])
    return dict(rows=result['events'], verdicts=result['verdicts'], **{k: plain[k] for k in ('precision', 'recall', 'f1')})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', default=RUNS, choices=[*RUNS, *SEARCHED], metavar='DATA/METHOD', help='which runs')
    parser.add_argument('--seeds', nargs='*', type=int, default=[20, 21, 22])
    parser.add_argument('--list', action='store_true', help='print the names of the runs and stop')
    args = parser.parse_args()
    if args.list: return print('\n'.join([*RUNS, *SEARCHED]))
    torch.set_num_threads(1)
    for seed in args.seeds:
        for run in args.only:
            if RESULTS.exists() and f'{run}/{seed}' in read_json(RESULTS): continue
            out = train(*run.split('/'), seed)
            write_json(RESULTS, dict(read_json(RESULTS) if RESULTS.exists() else {}, **{f'{run}/{seed}': out}))


if __name__ == '__main__': main()
