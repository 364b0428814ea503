"""What one step of `fit` costs beyond the model: CPU microseconds against a loop written by hand and against fastai as it comes.

    python benchmarks/loop.py              # about 20 s
    python benchmarks/loop.py --steps 5000

The model is as small as can be, so that the loops are what is measured. All three reduce the same three losses, clip the gradient, step a fused AdamW
and keep the means of all scalars per 50 steps. The medians of several alternating rounds are printed.
"""
import argparse
import statistics
import time

import torch
from torch import nn


class Tiny(nn.Module):
    "Three losses and two metrics of a linear layer."
    def __init__(self):
        super().__init__()
        self.net, self.scales = nn.Linear(8, 8), dict(image=1., dyn=.5, rep=.1)

    def forward(self, batch):
        y = self.net(batch['obs'])                                                                        # (B,T,8)
        return dict(image=y[..., 0]**2, dyn=y[..., 1]**2, rep=y[..., 2]**2), dict(mean=y.mean(), first=y[0, 0, 0])


BATCH = dict(obs=torch.randn(8, 4, 8), act=torch.zeros(8, 4, 1), rew=torch.zeros(8, 4), first=torch.zeros(8, 4, dtype=torch.bool))


def bare(steps):
    "The loop that one writes by hand."
    model, window = Tiny(), []
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(steps):
        losses, metrics = model(BATCH)
        parts = {k: v.mean() for k, v in losses.items()}
        loss = sum(parts[k]*s for k, s in model.scales.items())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 100.)
        opt.step()
        opt.zero_grad()
        window += [v.detach() for v in (loss, norm, *parts.values(), *metrics.values())]
        if step % 50 == 49: window = torch.stack(window).tolist() and []


def ours(steps):
    from dreamer_wb.core.config import LoopConfig
    from dreamer_wb.core.learner import fit
    fit(Tiny(), lambda step: BATCH, LoopConfig(steps=steps, log_every=50, eval_every=0, amp='off', progress=False))


def fastai(steps):
    "A Learner with fastai's default callbacks, less its progress bar, and `GradientClip`; it records one loss."
    from fastai.basics import DataLoaders, Learner, OptimWrapper
    from fastai.callback.progress import ProgressCallback
    from fastai.callback.training import GradientClip
    model = Tiny()
    model.forward = lambda batch, f=model.forward: f(batch)[0]
    func = lambda losses, _: sum(losses[k].mean()*s for k, s in model.scales.items())
    opt = OptimWrapper(opt=torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
    learn = Learner(DataLoaders([(BATCH, torch.zeros(8))]*steps, []), model, func, opt, cbs=GradientClip(100.), train_bn=False, wd_bn_bias=True)
    with learn.no_logging(), learn.removed_cbs(learn._grab_cbs(ProgressCallback)): learn.fit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=2000, help='steps in a round')
    parser.add_argument('--rounds', type=int, default=5, help='rounds of which the median counts')
    args = parser.parse_args()
    torch.set_num_threads(1)
    loops = dict(bare=bare, fit=ours, fastai=fastai)
    times = {name: [] for name in loops}
    for loop in loops.values(): loop(100)                                                                # imports, warm-up
    for _ in range(args.rounds):
        for name, loop in loops.items():
            start = time.process_time()
            loop(args.steps)
            times[name].append((time.process_time() - start)/args.steps*1e6)
    base = statistics.median(times['bare'])
    print(f'{"loop":<24}{"CPU us/step":>12}{"beyond bare":>14}{"of a 50 ms step":>18}')
    for name, text in dict(bare='by hand', fit='dreamer_wb fit', fastai='fastai, its defaults').items():
        t = statistics.median(times[name])
        print(f'{text:<24}{t:>12.0f}{t - base:>14.0f}{(t - base)/50e3:>18.2%}')


if __name__ == '__main__': main()
