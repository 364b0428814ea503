"""What levels and clocks cost: CPU milliseconds of a training step of a world model with 1, 2 and 3 levels, and of the RSSM, in one run.

    python benchmarks/hierarchy.py                          # 16 pixels, 64 units, B=16, T=12: about half a minute
    python benchmarks/hierarchy.py --deter 256 --size 64    # larger

A step is forward and backward pass of the whole model. Every level costs about one RSSM; `leave_one_out` runs everything but the encoder twice.
All variants take turns, and the ratios are those of the medians of their rounds.
"""
import argparse
import statistics
import time

import torch

from dreamer_wb.core.config import WorldModelConfig, from_dict
from dreamer_wb.dreamer.world_model import DreamerWorldModel

VARIANTS = {
    'rssm': dict(name='rssm'),
    'hierarchy, 1 level': dict(hierarchy=dict(levels=1)),
    '2 levels, fixed': dict(hierarchy=dict(levels=2, clock='fixed')),
    '2 levels, gate': dict(hierarchy=dict(levels=2, clock='gate')),
    '2 levels, learned, straight-through': dict(hierarchy=dict(levels=2)),
    '2 levels, learned, leave-one-out': dict(hierarchy=dict(levels=2, boundary_gradient='leave_one_out', change=True)),
    '2 levels, value-informed': dict(hierarchy=dict(levels=2, boundary_gradient='leave_one_out', change=True, value=True, signal_scale=1.)),
    '2 levels, with surprise': dict(hierarchy=dict(levels=2, boundary_gradient='leave_one_out', surprise=True)),
    '3 levels, fixed': dict(hierarchy=dict(levels=3, clock='fixed')),
    '3 levels, learned, straight-through': dict(hierarchy=dict(levels=3)),
    '3 levels, learned, leave-one-out': dict(hierarchy=dict(levels=3, boundary_gradient='leave_one_out', change=True)),
}


def build(args, dynamics):
    mults = [1, 2] if args.size == 16 else [1, 2, 4] if args.size == 32 else [1, 2, 4, 8]
    common = dict(name='hierarchy', stoch=args.stoch, deter=args.deter, hidden=args.deter, blocks=1)
    conv = dict(depth=args.depth, mults=mults)
    torch.manual_seed(0)
    return DreamerWorldModel(from_dict(WorldModelConfig, dict(size=args.size, action_dim=2, encoder=conv, decoder=conv, dynamics=common | dynamics)))


def step(world, batch):
    "CPU milliseconds."
    start = time.process_time()
    losses, _ = world(batch)
    sum(losses[k].mean()*w for k, w in world.scales.items()).backward()
    world.zero_grad()
    return 1e3*(time.process_time() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (('batch', 16, 'sequences'), ('length', 12, 'steps of each'), ('size', 16, 'side of the images: 16, 32 or 64'), ('deter', 64, 'units of memory of a level'),
                                ('stoch', 8, 'dimensions of a latent'), ('depth', 8, 'channels of the first convolution'), ('rounds', 7, 'of all variants')):
        parser.add_argument(f'--{name}', type=int, default=default, help=f'{what} (default {default})')
    args = parser.parse_args()
    torch.set_num_threads(1)
    B, T = args.batch, args.length
    batch = dict(obs=torch.randint(0, 256, (B, T, 3, args.size, args.size), dtype=torch.uint8), act=torch.randn(B, T, 2), first=(torch.arange(T) == 0).repeat(B, 1),
                 rew=torch.randn(B, T), done=torch.zeros(B, T, dtype=torch.bool))
    worlds = {name: build(args, dynamics) for name, dynamics in VARIANTS.items()}
    for world in worlds.values(): step(world, batch)
    times = {name: [] for name in worlds}
    for _ in range(args.rounds):
        for name, world in worlds.items(): times[name].append(step(world, batch))
    rows = {name: statistics.median(t) for name, t in times.items()}
    print(f'B={B}, T={T}, {args.size} pixels, {args.deter} units, one thread, median of {args.rounds}\n')
    print(f'{"":38s}{"ms":>8s}{"x RSSM":>9s}{"parameters":>13s}')
    for name, ms in rows.items(): print(f'{name:38s}{ms:8.1f}{ms/rows["rssm"]:9.2f}{sum(p.numel() for p in worlds[name].parameters()):13,d}')


if __name__ == '__main__': main()
