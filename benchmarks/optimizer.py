"""What an optimizer step costs: AdamW fused, foreach and one tensor at a time, and LaProp, on the parameters of a world model.

    python benchmarks/optimizer.py                    # preset demo, about 15 s
    python benchmarks/optimizer.py --preset waterbirds_minimal --device cuda

Median time of alternating rounds: CPU milliseconds of one thread, or milliseconds between two synchronisations of a GPU, and ratios to the fused AdamW.
The last column is the share of a whole update (forward, backward, step) at the preset's batch, on a CPU for at most 8 images.
"""
import argparse
import statistics
import time

import torch


def optimizers(params):
    "Name -> optimizer over copies of the parameters."
    from dreamer_wb.core.learner import LaProp
    def adam(**how): return lambda ps: torch.optim.AdamW(ps, lr=1e-4, **how)
    kinds = {'AdamW fused': adam(fused=True), 'AdamW foreach': adam(foreach=True), 'AdamW one by one': adam(foreach=False),
             'LaProp + AGC': lambda ps: LaProp(ps, lr=4e-5)}
    out = {}
    for name, kind in kinds.items():
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        for p in copies: p.grad = torch.randn_like(p)*1e-2
        out[name] = kind(copies)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', default='demo', help='experiment whose world model is taken')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--steps', type=int, default=5, help='optimizer steps in a round')
    parser.add_argument('--rounds', type=int, default=9, help='rounds of which the median counts')
    args = parser.parse_args()
    from dreamer_wb.core.config import TrainConfig, compose
    from dreamer_wb.core.learner import DictLoss, cpu_settings
    from dreamer_wb.dreamer.world_model import DreamerWorldModel
    cfg, device = compose(TrainConfig, [f'experiment={args.preset}']), torch.device(args.device)
    world = DreamerWorldModel(cfg).to(device)
    n = cfg.batch_size if device.type == 'cuda' else min(8, cfg.batch_size)
    batch = dict(obs=torch.randint(0, 256, (n, cfg.batch_length, 3, cfg.size, cfg.size), dtype=torch.uint8, device=device),
                 act=torch.zeros(n, cfg.batch_length, cfg.action_dim, device=device), first=torch.ones(n, cfg.batch_length, dtype=torch.bool, device=device))

    def clock():
        if device.type == 'cuda': torch.cuda.synchronize()
        return time.perf_counter() if device.type == 'cuda' else time.process_time()

    def model_step():
        world.zero_grad()
        DictLoss(world.scales)(world(batch)).backward()

    jobs = {name: opt.step for name, opt in optimizers(list(world.parameters())).items()} | {'model': model_step}
    times = {name: [] for name in jobs}
    with cpu_settings(1):
        for job in jobs.values(): job()
        for _ in range(args.rounds):
            for name, job in jobs.items():
                start, steps = clock(), args.steps if name != 'model' else 1
                for _ in range(steps): job()
                times[name].append((clock() - start)/steps*1e3)
    ms = {name: statistics.median(t) for name, t in times.items()}
    model, count = ms.pop('model'), sum(p.numel() for p in world.parameters())
    print(f'{args.preset}: {count:,} parameters in {len(list(world.parameters()))} tensors, forward and backward of {n}x{cfg.batch_length} images {model:.1f} ms, {device}')
    print(f'{"optimizer":<20}{"ms/step":>9}{"to fused":>10}{"of an update":>14}')
    for name, t in ms.items(): print(f'{name:<20}{t:>9.2f}{t/ms["AdamW fused"]:>10.2f}{t/(t + model):>14.1%}')


if __name__ == '__main__': main()
