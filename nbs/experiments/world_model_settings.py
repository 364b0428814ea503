"""Which settings of the world model buy most quality per CPU second?

    python nbs/experiments/world_model_settings.py                      # every variant, 30 CPU seconds each
    python nbs/experiments/world_model_settings.py --only demo --seconds 150 --seeds 0 1 2 --out nbs/experiments/results/world_model_demo.json

Each variant changes the preset `demo` in one respect and trains for the same number of CPU seconds on the same 2,441 synthetic pictures (the
training split of `dreamer-wb demo`). Time stands still while a model is measured, on held-out pictures: PSNR, variation and colour of the
reconstructions, KL, and how well a linear probe on group-balanced latents reads bird and place. The learning rate follows the share of the time
budget, so that slow and fast variants are both annealed. What is in the result file already is not repeated.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException

from dreamer_wb.classifier.latents import Features, probe
from dreamer_wb.core.config import TrainConfig, compose, to_dict
from dreamer_wb.core.learner import fit, set_seed, use_bf16
from dreamer_wb.core.runs import read_json, write_json
from dreamer_wb.data.episodes import image_to_float
from dreamer_wb.data.synthetic import render_many, sample_specs
from dreamer_wb.dreamer.world_model import DreamerWorldModel, chroma, psnr, spread

OUT = Path(__file__).resolve().parent/'results'/'world_model_settings.json'


def both(key, value): return [f'encoder.{key}={value}', f'decoder.{key}={value}']


VARIANTS = {
    'demo': [],
    'mults 1,2,4,8': both('mults', '[1,2,4,8]'),
    'depth 16': both('depth', 16), 'depth 32': both('depth', 32),
    'kernel 6': both('kernel', 6),
    'norm batch': both('norm', 'batch'), 'norm group': both('norm', 'group'), 'norm layer': both('norm', 'layer'),
    'relu': both('act', 'relu'),
    'pool': both('kind', 'pool') + both('kernel', 5),
    'output linear': ['decoder.output=linear'],
    'posterior with a hidden layer': ['dynamics.obs_layers=1'],
    'stoch 64': ['dynamics.stoch=64'], 'stoch 256': ['dynamics.stoch=256'],
    'categorical 32x32': ['dynamics.latent=categorical', 'dynamics.stoch=32'],
    'rep 0.02': ['scales.rep=0.02'],
    'lr 6e-4': ['loop.lr=6e-4'], 'lr 2e-3': ['loop.lr=2e-3'],
    'batch 16': ['batch_size=16'],
    'float32': ['loop.amp=off'],
}


class Data:
    "Pictures of the demo's size and seed in memory: training, validation (for the probes) and test."
    def __init__(self, images, seed):
        specs = sample_specs(images, seed=seed)
        self.features = {}
        for split, some in (('train', specs['train']), ('val', specs['val']), ('test', specs['test'][:1200])):
            x = render_many(some)[0].transpose(0, 3, 1, 2)
            self.features[split] = Features(x, [s.label for s in some], [s.place for s in some], split)
        self.obs = {k: torch.from_numpy(f.x) for k, f in self.features.items()}

    def batches(self, size, seed):
        "Batches of still images as a function of the step."
        train, first = self.obs['train'], torch.ones(size, 1, dtype=torch.bool)
        per_epoch = len(train) // size
        def batch(step):
            order = np.random.default_rng([seed, step // per_epoch]).permutation(len(train))
            index = order[step % per_epoch * size:][:size]
            return dict(obs=train[index].unsqueeze(1), act=torch.zeros(size, 1, 1), first=first)
        return batch


@torch.no_grad()
def latents(world, obs, amp):
    "Posterior means and reconstructions of still images."
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        pairs = [(z.stoch.float(), world.decoder(z.feat)) for z in (world.encoder(x) for x in obs.split(100))]
    return [torch.cat(x) for x in zip(*pairs)]


class Budget(Callback):
    "Stops after `seconds` of CPU time, anneals the learning rate by its share, and measures at `marks`."
    order = 40
    def __init__(self, data, seconds, marks, lr, amp): self.data, self.seconds, self.marks, self.lr, self.amp, self.curve = data, seconds, list(marks), lr, amp, []

    def before_fit(self): self.start = time.process_time()

    def before_batch(self):
        share = min(1., (time.process_time() - self.start) / self.seconds)
        for group in self.opt.opt.param_groups: group['lr'] = self.lr * min(1., share / .03) * (1 + math.cos(math.pi * share)) / 2

    def after_batch(self):
        spent = time.process_time() - self.start
        if spent < self.marks[0]: return
        paused = time.process_time()
        self.model.eval()
        recon, image = latents(self.model, self.data.obs['test'], self.amp)[1], image_to_float(self.data.obs['test'])
        self.model.train()
        self.curve.append(dict(cpu_seconds=round(spent, 1), step=self.train_iter, psnr=psnr(recon, image), std_ratio=spread(recon) / spread(image),
                               chroma_ratio=chroma(recon) / chroma(image), kl=float(self.learn.loss_func.metrics['kl'])))
        self.marks.pop(0)
        self.start += time.process_time() - paused
        if not self.marks: raise CancelFitException


def run(overrides, data, seconds, seed):
    "Train one variant and measure it."
    cfg = compose(TrainConfig, ['experiment=demo', *overrides])
    cfg.loop.steps, cfg.loop.eval_every, cfg.loop.log_every, cfg.loop.progress = 10**6, 0, 10**6, False
    set_seed(seed)
    world, amp = DreamerWorldModel(cfg), use_bf16(cfg.loop.amp, torch.device('cpu'))
    marks = [m for m in (10, 20, 40, 60, 80, 100, 120, 150, 200, 300) if m < seconds] + [seconds]
    budget = Budget(data, seconds, marks, cfg.loop.lr, amp)
    fit(world, data.batches(cfg.batch_size, seed), cfg.loop, cbs=[budget])
    world.eval()
    z = {k: Features(latents(world, data.obs[k], amp)[0].numpy(), data.features[k].label, data.features[k].place, k) for k in ('val', 'test')}
    probes = {target: probe(z['val'], z['test'], target)['acc'] for target in ('label', 'place')}
    return dict(seed=seed, parameters=sum(p.numel() for p in world.parameters()), curve=budget.curve, probe=probes, config=to_dict(cfg))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', default=list(VARIANTS), help='names of variants')
    parser.add_argument('--seconds', type=float, default=30, help='CPU seconds of training for each (%(default)g)')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='seeds of weights, noise and data order; the pictures stay')
    parser.add_argument('--images', type=int, default=6000, help='size of the whole set (%(default)d)')
    parser.add_argument('--out', type=Path, default=OUT, help='result file (%(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = read_json(args.out) if args.out.exists() else dict(seconds=args.seconds, images=args.images, torch=torch.__version__, results={})
    data = Data(args.images, 0)
    image = image_to_float(data.obs['test'])
    done['mean_image'] = psnr(image.mean(0).expand_as(image), image)
    for name in args.only:
        for seed in args.seeds:
            if any(r['seed'] == seed for r in done['results'].get(name, [])): continue
            done['results'].setdefault(name, []).append(run(VARIANTS[name], data, args.seconds, seed))
            last = done['results'][name][-1]
            print(f'{name:30} {last["curve"][-1]["step"]:5} steps', ' '.join(f'{p["psnr"]:.2f}' for p in last['curve']), 'dB; bird {label:.3f} place {place:.3f}'.format(**last['probe']), flush=True)
            write_json(args.out, done)


if __name__ == '__main__': main()
