"""Where the time of an agent goes: environment steps and updates per CPU second of the whole loop, its profile, its growth with environments and batch.

    python benchmarks/agent.py                          # everything on the preset tiny_pixels, under a CPU minute
    python benchmarks/agent.py --preset pendulum --only loop profile
    python benchmarks/agent.py --only reference         # an update at the size of dreamerv3-torch's default, minutes

CPU time on one thread, medians; take ratios. `reference` has the sizes of dreamerv3-torch's default (deter 512, hidden 512, 32 x 32 categorical latent, depth 32, 16 x 64
steps of 64 pixels, horizon 15). That implementation needed 6840 ms for the world model and 7150 ms for the behavior, on a machine of the same kind on another day: these figures stand beside, not in, the ratios.
"""
import argparse
import statistics
import tempfile
import time
from dataclasses import replace

import torch

from dreamer_wb.core.config import compose
from dreamer_wb.core.learner import make_optimizer, set_seed, use_bf16
from dreamer_wb.dreamer.agent import AgentConfig, Collector, Replay, env_steps, make_agent
from dreamer_wb.dreamer.envs import Stream, make_env, make_envs


def cpu_ms(call, repeats=5):
    "Median CPU milliseconds of a call, after one to warm up."
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1000*(time.process_time() - start))
    return statistics.median(times)


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
        self.opt.step()
        self.opt.zero_grad()
        self.step += 1

    def tick(self): self.collector.tick(0, 0)


def profile(loop):
    "What an update is made of, in ms."
    agent, batch = loop.agent, loop.replay.batches(0)
    with loop.autocast():
        _, _, post = agent.world.examine(batch)
        flat = {k: v.detach().flatten(0, 1)[:loop.cfg.behavior.starts or None] for k, v in post.items()}
        dream = agent.behavior.dream(agent.world, flat)
        parts = {'sample a batch': lambda: loop.replay.batches(1), 'world model, forward': lambda: agent.world.examine(batch),
                 'dream': lambda: agent.behavior.dream(agent.world, flat), 'actor and critic, forward': lambda: agent.behavior.losses(dream)}
        times = {k: cpu_ms(f) for k, f in parts.items()}
    whole = cpu_ms(loop.update)
    times['backward, optimizer, rest'] = whole - sum(times.values())
    print(f'\none update: {whole:.1f} ms ({"bf16" if loop.amp else "fp32"}, {sum(p.numel() for p in agent.parameters() if p.requires_grad):,} parameters)')
    for k, v in times.items(): print(f'  {k:28} {v:8.1f} ms {v/whole:6.0%}')
    return whole


def whole(loop):
    "Updates and environment steps per CPU second, with the preset's train ratio."
    update, tick = cpu_ms(loop.update), cpu_ms(loop.tick, 20)
    rows = (env_steps(loop.cfg, 1000) - env_steps(loop.cfg, 0))/1000
    each = update + tick*rows/loop.stream.n
    print(f'whole loop: {1000/each:.1f} updates/s, {1000*rows/each:.1f} environment steps/s (ratio {loop.cfg.train_ratio:g}); '
          f'acting and stepping take {tick*rows/loop.stream.n/each:.1%}, {1000*loop.stream.n/tick:.0f} steps/s by themselves')


def growth(preset, key, values, call, unit):
    "How a call grows."
    first = None
    for v in values:
        with tempfile.TemporaryDirectory() as d: ms = cpu_ms(getattr(Loop(d, f'experiment={preset}', f'{key}={v}'), call))
        first = first or (v, ms)
        print(f'  {key}={v:<5} {ms:9.2f} ms  {ms/first[1]:6.2f}x for {v/first[0]:g}x {unit}')


def environments():
    "Steps per CPU second of single environments."
    for name, kw in (('Pendulum-v1', {}), ('Pendulum-v1', dict(drawing='render')), ('dreamer_wb/Reach-v0', dict(size=16)), ('ALE/Breakout-v5', {})):
        try: env = make_env(name, **kw)
        except Exception as e: print(f'  {name} {kw}: {e}'); continue
        env.reset(seed=0)
        def some():
            for _ in range(50):
                if any(env.step(env.action_space.sample())[2:4]): env.reset()
        print(f'  {name:22}{str(kw):24}{50_000/cpu_ms(some):10.0f} steps/s')


def reference():
    "An update at the size of dreamerv3-torch's default, fp32 and bf16."
    keys = ['size=64', 'env.name=Pendulum-v1', 'batch_size=16', 'batch_length=64', 'prefill=300', 'dynamics.latent=categorical', 'dynamics.stoch=32', 'dynamics.classes=32', 'dynamics.deter=512',
            'dynamics.hidden=512', 'encoder.depth=32', 'decoder.depth=32', 'heads.units=512', 'heads.layers=2', 'behavior.units=512', 'behavior.layers=2', 'behavior.discount=0.997']
    for amp in ('off', 'bf16'):
        with tempfile.TemporaryDirectory() as d:
            loop = Loop(d, *keys, f'loop.amp={amp}')
            profile(loop)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', default='tiny_pixels')
    parser.add_argument('--only', nargs='+', default=['loop', 'profile', 'envs', 'batch', 'single'], choices=['loop', 'profile', 'envs', 'batch', 'single', 'reference'])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if {'loop', 'profile'} & set(args.only):
            loop = Loop(folder, f'experiment={args.preset}')
            if 'profile' in args.only: profile(loop)
            if 'loop' in args.only: whole(loop)
    if 'envs' in args.only:
        print('\none row of collecting (acting and stepping all environments):')
        growth(args.preset, 'env.n', (1, 4, 16, 64), 'tick', 'environments')
    if 'batch' in args.only:
        print('\none update:')
        growth(args.preset, 'batch_size', (8, 32, 128), 'update', 'batch')
    if 'single' in args.only:
        print('\nsingle environments:')
        environments()
    if 'reference' in args.only: reference()


if __name__ == '__main__': main()
