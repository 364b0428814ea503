"""Where the time of an agent goes: environment steps and updates per CPU second of the whole loop, a profile, its growth with environments and batch, and an update at public sizes.

    python benchmarks/agent.py                          # everything, about three CPU minutes; all but `reference` on the preset tiny_pixels
    python benchmarks/agent.py --preset pendulum --only loop
    python benchmarks/agent.py --only reference         # an update at the size of dreamerv3-torch's default

CPU time on one thread, medians; take ratios. `reference` has the sizes of dreamerv3-torch's default (deter 512, hidden 512, 32 x 32 categorical latent, depth 32, 16 x 64 steps of
64 pixels, 6 actions, 1,024 dreams of 15 steps). The figures of that implementation were measured on a machine of the same kind on another day: they stand beside, not in, the ratios.
The numbers of kernels and of waits do not depend on the machine.
"""
import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace

import torch
from world_model import Count, random_batch

from dreamer_wb.core.config import compose
from dreamer_wb.core.learner import keep_memory, make_optimizer, set_seed, use_bf16
from dreamer_wb.dreamer.agent import AgentConfig, Collector, DreamerAgent, Replay, env_steps, make_agent
from dreamer_wb.dreamer.envs import Stream, make_env, make_envs

PUBLIC = {'world model': 6840, 'actor and critic': 7150}                                # dreamerv3-torch 6ef8646, ms, fp32, 16 x 64
COUNTS = {'dreamerv3-torch': (11_939 + 3_098, 855 + 186), 'r2dreamer': (22_059, 325)}   # kernels and waits of a whole update with 64 steps and dreams of 15
SIZES = ['size=64', 'action_dim=6', 'batch_size=16', 'batch_length=64', 'dynamics.latent=categorical', 'dynamics.stoch=32', 'dynamics.classes=32', 'dynamics.deter=512', 'dynamics.hidden=512',
         'dynamics.obs_layers=1', 'dynamics.img_layers=1', 'dynamics.norm=layer', 'encoder.depth=32', 'encoder.norm=layer', 'decoder.depth=32', 'decoder.norm=layer', 'heads.units=512', 'heads.layers=2',
         'behavior.units=512', 'behavior.layers=2', 'behavior.horizon=15', 'behavior.starts=0', 'behavior.replay_critic=0']


def cpu_ms(call, repeats=5):
    "Median CPU milliseconds of a call, after one to warm up."
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1000*(time.process_time() - start))
    return statistics.median(times)


class Parts:
    "CPU milliseconds between stamps, over many calls."
    def __init__(self): self.times, self.last = {}, 0.
    def start(self): self.last = time.process_time()
    def __call__(self, name):
        now = time.process_time()
        self.times.setdefault(name, []).append(1000*(now - self.last))
        self.last = now
    def medians(self): return {k: statistics.median(v[1:]) for k, v in self.times.items()}


def step_of(opt, module, clip):
    "Clip, step, forget the gradients."
    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    opt.step()
    opt.zero_grad()


class Loop:
    "Agent, environments and replay of a config, filled and ready."
    def __init__(self, folder, *overrides):
        cfg = compose(AgentConfig, ['device=cpu', *overrides])
        self.stream = Stream(make_envs(cfg.env, cfg.size), 0)
        self.cfg = cfg = replace(cfg, action_dim=self.stream.actions.n, prefill=max(cfg.prefill, 4*cfg.batch_length*cfg.env.n))
        set_seed(0)
        self.agent = make_agent(cfg, self.stream)
        self.replay = Replay(folder, cfg.capacity, self.stream.n, cfg.size, cfg.action_dim, cfg.batch_size, cfg.batch_length)
        self.collector, self.opt, self.step = Collector(self.agent, self.stream, self.replay), make_optimizer(self.agent, cfg.loop), 0
        self.collector.fill(0)
        self.agent.train()
        self.amp = use_bf16(cfg.loop.amp, torch.device('cpu'), 1)

    def autocast(self): return torch.autocast('cpu', torch.bfloat16, enabled=self.amp)

    def update(self):
        "One update, without collecting."
        with self.autocast(): losses, _ = self.agent(self.replay.batches(self.step))
        sum(v.float().mean()*self.agent.scales[k] for k, v in losses.items()).backward()
        step_of(self.opt, self.agent, self.cfg.loop.clip)
        self.step += 1

    def update_in_parts(self, part):
        "The same, piece by piece; the dreams' backward pass comes first, which is no matter, because they begin at states without gradient."
        agent, total = self.agent, lambda losses: sum(v.float().mean()*agent.scales[k] for k, v in losses.items())
        part.start()
        batch = self.replay.batches(self.step)
        part('sample a batch')
        with self.autocast():
            world, _, post = agent.world.examine(batch)
            part('world model, forward')
            flat = {k: v.detach().flatten(0, 1) for k, v in post.items()}
            which = torch.randperm(len(flat['deter']))[:self.cfg.behavior.starts or None]
            dream = agent.behavior.dream(agent.world, {k: v[which] for k, v in flat.items()})
            part('dream')
            behavior, starts, _ = agent.behavior.losses(dream)
            if 'critic_replay' in agent.scales:
                feat = agent.world.dynamics.feat(post)
                world['critic_replay'] = agent.behavior.replay_loss(feat, batch, agent._worth(feat, which, starts))
        part('actor and critic, forward')
        total(behavior).backward()
        part('actor and critic, backward')
        total({k: v for k, v in world.items() if k in agent.scales}).backward()
        part('world model, backward')
        step_of(self.opt, agent, self.cfg.loop.clip)
        part('clip and optimizer')
        self.step += 1

    def tick(self): self.collector.tick(0, 0)

    def tick_in_parts(self, part):
        "One row of collecting, piece by piece."
        c = self.collector
        part.start()
        act = c.player(c.row)
        part('act')
        c.row = self.stream.step(act)
        part('step the environments')
        self.replay.add(c.row)
        part('store')


def loop(folder, preset):
    "Updates and environment steps per CPU second with the preset's train ratio, and what they are made of."
    it = Loop(folder, f'experiment={preset}')
    update, tick = cpu_ms(it.update, 9), cpu_ms(it.tick, 20)
    rows = (env_steps(it.cfg, 1000) - env_steps(it.cfg, 0))/1000                        # environment steps an update
    each = update + tick*rows/it.stream.n
    print(f'{preset}: {it.stream.n} environments, batch {it.cfg.batch_size} x {it.cfg.batch_length}, {it.cfg.size} pixels, {"bf16" if it.amp else "fp32"}, '
          f'{sum(p.numel() for p in it.agent.parameters() if p.requires_grad):,} parameters, {rows:.0f} environment steps an update')
    print(f'  whole loop: {1000/each:.1f} updates/s, {1000*rows/each:.0f} environment steps/s; collecting alone: {1000*it.stream.n/tick:.0f} environment steps/s')
    parts = Parts()
    for _ in range(10): it.update_in_parts(parts)
    times = parts.medians()
    parts = Parts()
    it.agent.eval()
    for _ in range(40): it.tick_in_parts(parts)
    times |= {k: v*rows/it.stream.n for k, v in parts.medians().items()}
    whole = sum(times.values())
    for k, v in times.items(): print(f'  {k:28}{v:9.2f} ms {v/whole:7.1%}')
    print(f'  {"together":28}{whole:9.2f} ms        (measured as one: {each:.2f})')


def dynamics(preset):
    "An update with other dynamics, as a multiple of that with an RSSM."
    kinds = {'rssm': [], '2 levels, fixed clock': ['clock=fixed'], '3 levels, fixed clock': ['clock=fixed', 'levels=3'], '2 levels, learned clock': ['clock=learned']}
    with tempfile.TemporaryDirectory() as d:
        its = {k: Loop(f'{d}/{i}', f'experiment={preset}', *(['dynamics.name=hierarchy'] if v else []), *(f'dynamics.hierarchy.{x}' for x in v)) for i, (k, v) in enumerate(kinds.items())}
        rows = [{k: cpu_ms(it.update, 1) for k, it in its.items()} for _ in range(5)]                      # in turns
    for k in kinds: print(f'  {k:28}{statistics.median(r[k] for r in rows):9.2f} ms  {statistics.median(r[k]/r["rssm"] for r in rows):6.2f}x')


def growth(preset, key, values, call, unit):
    "How a call grows."
    first = None
    for v in values:
        with tempfile.TemporaryDirectory() as d: ms = cpu_ms(getattr(Loop(d, f'experiment={preset}', f'{key}={v}'), call))
        first = first or (v, ms)
        print(f'  {key}={v:<5} {ms:9.2f} ms  {ms/first[1]:6.2f}x for {v/first[0]:g}x {unit}', flush=True)


def environments():
    "Steps per CPU second of single environments."
    for name, kw in (('Pendulum-v1', {}), ('Pendulum-v1', dict(drawing='render')), ('dreamer_wb/Reach-v0', dict(size=16)), ('dreamer_wb/Maze-v0', {}), ('ALE/Breakout-v5', {}), ('dmc_walker_walk', {})):
        try:
            env = make_env(name, **kw)
            env.reset(seed=0)
        except Exception as e:
            print(f'  {name} {kw}: {e}')
            continue
        def some():
            for _ in range(50):
                if any(env.step(env.action_space.sample())[2:4]): env.reset()
        print(f'  {name:22}{str(kw):24}{50_000/cpu_ms(some, 3):10.0f} steps/s', flush=True)


class Reference:
    "An agent at the sizes of dreamerv3-torch's default, on a batch that is given."
    def __init__(self, grad, bf16, B=16, T=64):
        self.cfg = compose(AgentConfig, [*SIZES, f'behavior.actor_grad={grad}'])
        set_seed(0)
        self.agent, self.bf16, self.batch = DreamerAgent(self.cfg, discrete=grad == 'reinforce').train(), bf16, random_batch(B, T)
        self.world_opt, self.behavior_opt = (make_optimizer(m, self.cfg.loop) for m in (self.agent.world, self.agent.behavior))
        self.start = None

    def world(self):
        "Update of the world model."
        world = self.agent.world
        with torch.autocast('cpu', torch.bfloat16, enabled=self.bf16): losses, _, post = world.examine(self.batch)
        sum(v.float().mean()*world.scales[k] for k, v in losses.items()).backward()
        step_of(self.world_opt, world, 1000.)
        self.start = {k: v.detach().flatten(0, 1) for k, v in post.items()}

    def behavior(self):
        "Update of actor and critic."
        behavior = self.agent.behavior
        with torch.autocast('cpu', torch.bfloat16, enabled=self.bf16): losses, *_ = behavior.losses(behavior.dream(self.agent.world, self.start))
        sum(v.float().mean() for v in losses.values()).backward()
        step_of(self.behavior_opt, behavior, 100.)

    def update(self):
        self.world()
        self.behavior()


def reference(repeats):
    "An update beside the public one."
    print(f'\nan update at the sizes of dreamerv3-torch, 16 x 64 steps{"":14}{"world model":>14}{"actor, critic":>15}{"together":>12}')
    show = lambda name, *ms: print(f'  {name:66}{ms[0]:10.0f} ms{ms[1]:12.0f} ms{sum(ms):9.0f} ms', flush=True)
    show('dreamerv3-torch, fp32, another day', *PUBLIC.values())
    for bf16 in (False, True):
        world = None
        for grad in ('reinforce', 'dynamics'):
            it = Reference(grad, bf16)
            if world is None: world = cpu_ms(it.world, repeats)
            else: it.world()
            behavior = cpu_ms(it.behavior, repeats)
            show(f'dreamer_wb, {"bf16" if bf16 else "fp32"}, {"buttons, likelihood ratio" if grad == "reinforce" else "motors, through the dream"}', world, behavior)
            print(f'  {"":28}{"times as fast":>38}{PUBLIC["world model"]/world:13.2f}{PUBLIC["actor and critic"]/behavior:15.2f}{sum(PUBLIC.values())/(world + behavior):12.2f}', flush=True)


def counts():
    "Operations and waits of one whole update; they do not depend on the batch."
    print(f'\none update, 64 steps, dreams of 15{"":12}{"kernels":>9}{"waits":>8}')
    rows = dict(COUNTS)
    for grad in ('reinforce', 'dynamics'):
        it = Reference(grad, False, B=2)
        it.update()
        with Count() as count: it.update()
        rows[f'dreamer_wb, {"likelihood ratio" if grad == "reinforce" else "through the dream"}'] = count.kernels, count.syncs
    for name, (kernels, waits) in rows.items(): print(f'  {name:42}{kernels:>10,}{waits:>8,}')


PARTS = ['loop', 'dynamics', 'envs', 'batch', 'single', 'counts', 'reference']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', default='tiny_pixels')
    parser.add_argument('--only', nargs='+', default=PARTS, choices=PARTS)
    parser.add_argument('--repeats', type=int, default=3, help='calls of which the median counts, in `reference`')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_memory(True)                                                                   # as `fit` does it
    print(f'torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n')
    if 'loop' in args.only:
        with tempfile.TemporaryDirectory() as folder: loop(folder, args.preset)
    if 'dynamics' in args.only:
        print('\none update, by dynamics:')
        dynamics(args.preset)
    if 'envs' in args.only:
        print('\none row of collecting (acting in and stepping all environments):')
        growth(args.preset, 'env.n', (1, 4, 16, 64), 'tick', 'environments')
    if 'batch' in args.only:
        print('\none update:')
        growth(args.preset, 'batch_size', (8, 32, 128), 'update', 'batch')
    if 'single' in args.only:
        print('\nsingle environments:')
        environments()
    if 'counts' in args.only: counts()
    if 'reference' in args.only: reference(args.repeats)
    print(f'\n{time.process_time():.0f} CPU seconds, load {os.getloadavg()[0]:.1f}')


if __name__ == '__main__': main()
