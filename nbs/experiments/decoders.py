"""Which decoder draws best at equal parameters and equal CPU time?

    python nbs/experiments/decoders.py --size 64 --seconds 10 --seeds 0 1 2
    python nbs/experiments/decoders.py --size 224 --seconds 30 --seeds 0 1 2

One world model for each decoder: the same encoder, the same Gaussian latent, and a decoder whose `depth` is chosen so that all have the parameters
of the strided one (within 5 %; `small vit` has a fifth of them, because a ViT of the full size makes few updates in the time). Each trains for the same number of CPU seconds, in bfloat16 where the machine has it, with the learning rate annealed
by the share of the time spent. Time stands still while a model is measured on held-out pictures: PSNR, variation among and colour of the
reconstructions, and sharpness (energy of the differences between neighbouring pixels, reconstruction / picture). The mean picture and a linear
code of the same size (PCA) are measured beside them. What is in the result file already is not repeated.
"""
import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from PIL import Image

from dreamer_wb.core.config import TrainConfig, compose
from dreamer_wb.core.learner import fit, set_seed, use_bf16
from dreamer_wb.core.runs import read_json, write_json
from dreamer_wb.data.episodes import image_to_float
from dreamer_wb.data.synthetic import render_many, sample_specs
from dreamer_wb.dreamer.decoders import count_parameters, match_parameters
from dreamer_wb.dreamer.world_model import DreamerWorldModel, chroma, image_rows, psnr, spread

RESULTS = Path(__file__).resolve().parent/'results'

KINDS = {
    'strided': {}, 'residual': dict(kind='residual'), 'unet': dict(kind='unet'), 'vit': dict(kind='vit'),
    'pool': dict(kind='pool', kernel=5), 'logistic mixture': dict(output='logistic_mixture'), 'small vit': dict(kind='vit'),
}
SHARE = {'small vit': .2} # of the strided decoder's parameters; 1 if not named
SIZES = { # images for training and test, batch size, encoder and decoder
    64: (2000, 300, 32, dict(depth=16, mults=[1, 2, 4])),
    224: (600, 96, 8, dict(depth=8, mults=[1, 2, 4, 8, 8])),
}


def sharpness(x):
    "Energy of the differences between neighbouring pixels."
    return ((x[..., 1:, :] - x[..., :-1, :]).square().mean() + (x[..., 1:] - x[..., :-1]).square().mean()).item()


def measure(recon, image):
    "What is reported of reconstructions."
    return dict(psnr=psnr(recon, image), std_ratio=spread(recon) / spread(image), chroma_ratio=chroma(recon) / chroma(image),
                sharpness=sharpness(recon) / sharpness(image))


def pictures(size):
    "Training and test pictures (N, 3, H, W) uint8, the same for all runs; kept in the temporary folder."
    file = Path(tempfile.gettempdir())/f'dreamer_wb_decoders_{size}.npy'
    n_train, n_test, *_ = SIZES[size]
    if not file.exists():
        specs = sample_specs(6000, seed=0)
        np.save(file, render_many(specs['train'][:n_train] + specs['test'][:n_test], size)[0])
    return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2).contiguous().split([n_train, n_test])


def baselines(train, test, k):
    "The mean picture, and the best linear code of k numbers."
    mean, test = image_to_float(train).mean(0), image_to_float(test)
    x = (image_to_float(train) - mean).flatten(1)
    values, vectors = torch.linalg.eigh(x @ x.T)                                                 # (N,), (N, N), ascending
    axes = vectors[:, -k:].T @ x / values[-k:, None].sqrt()                                      # (k, 3HW), orthonormal
    recon = ((test - mean).flatten(1) @ axes.T @ axes).view_as(test) + mean
    return {'mean picture': measure(mean.expand_as(test), test), f'PCA, {k} numbers': measure(recon, test)}


def config(size, kind, k=128):
    "The world model of a variant: only the decoder differs, matched to the strided one."
    cfg = compose(TrainConfig, ['experiment=demo', f'size={size}', f'dynamics.stoch={k}', f'batch_size={SIZES[size][2]}'])
    cfg.encoder, cfg.decoder = (replace(c, **SIZES[size][3]) for c in (cfg.encoder, cfg.decoder))
    n_in = cfg.dynamics.stoch + cfg.dynamics.deter
    target = SHARE.get(kind, 1) * count_parameters(size, n_in, cfg.decoder)
    cfg.decoder = match_parameters(size, n_in, replace(cfg.decoder, **KINDS[kind]), target)
    assert abs(count_parameters(size, n_in, cfg.decoder) / target - 1) < .05
    cfg.loop.steps, cfg.loop.eval_every, cfg.loop.log_every, cfg.loop.progress = 10**6, 0, 10**6, False
    return cfg


class Budget(Callback):
    "Stops after `seconds` of CPU time; anneals the learning rate by its share; calls `look` at `marks`; rests after `piece` seconds, to be gone on with."
    order = 40
    def __init__(self, seconds, marks, lr, look, piece, file):
        self.seconds, self.marks, self.lr, self.look, self.piece, self.file = seconds, marks, lr, look, piece, file
        self.before, self.step, self.curve = 0., 0, []                    # of earlier pieces

    def before_fit(self):
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.model.load_state_dict(state['model'])
            self.opt.opt.load_state_dict(state['opt'])
            torch.set_rng_state(state['rng'])
            self.before, self.step, self.curve = state['spent'], state['step'], state['curve']
        self.start = time.process_time()

    @property
    def spent(self): return self.before + time.process_time() - self.start

    def before_batch(self):
        share = min(1., self.spent / self.seconds)
        for group in self.opt.opt.param_groups: group['lr'] = self.lr * min(1., share / .03) * (1 + math.cos(math.pi * share)) / 2

    def after_batch(self):
        self.step += 1
        if self.spent >= self.marks[len(self.curve)]:
            paused = time.process_time()
            self.curve.append(dict(cpu_seconds=round(self.spent, 1), step=self.step, **self.look()))
            self.start += time.process_time() - paused
        if len(self.curve) == len(self.marks): raise CancelFitException
        if self.spent - self.before > self.piece:
            torch.save(dict(model=self.model.state_dict(), opt=self.opt.opt.state_dict(), rng=torch.get_rng_state(),
                            spent=self.spent, step=self.step, curve=self.curve), self.file)
            raise CancelFitException


def run(size, kind, seed, train, test, seconds, piece):
    "Train one variant and measure it; returns the record and the reconstructions, or None if a piece is done and others are to follow."
    cfg, image = config(size, kind), image_to_float(test)
    set_seed(seed)
    world, amp = DreamerWorldModel(cfg), use_bf16(cfg.loop.amp, torch.device('cpu'))
    def reconstruct():
        with torch.autocast('cpu', torch.bfloat16, enabled=amp): return torch.cat([world.reconstruct(x) for x in test.split(16)])
    def look():
        world.eval()
        found = measure(reconstruct(), image)
        world.train()
        return found
    n, first = cfg.batch_size, torch.ones(cfg.batch_size, 1, dtype=torch.bool)
    file = Path(tempfile.gettempdir())/f'dreamer_wb_decoders_{size}_{kind.replace(" ", "_")}_{seed}_{seconds:g}.pt'
    def batch(step):
        step = budget.step
        order = np.random.default_rng([seed, step * n // len(train)]).permutation(len(train))
        return dict(obs=train[order[step * n % (len(train) - n):][:n]].unsqueeze(1), act=torch.zeros(n, 1, 1), first=first)
    budget = Budget(seconds, [seconds / 2, seconds], cfg.loop.lr, look, piece, file)
    fit(world, batch, cfg.loop, cbs=[budget])
    if len(budget.curve) < 2: return None, None
    file.unlink(missing_ok=True)
    world.eval()
    last = budget.curve[-1]
    return dict(seed=seed, depth=cfg.decoder.depth, parameters=sum(p.numel() for p in world.decoder.parameters()), bf16=amp,
                ms_per_update=round(1000 * last['cpu_seconds'] / last['step'], 1), curve=budget.curve), reconstruct()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, choices=list(SIZES), default=64, help='side of the pictures (%(default)d)')
    parser.add_argument('--only', nargs='+', default=list(KINDS), help='names of variants')
    parser.add_argument('--seconds', type=float, default=20, help='CPU seconds of training for each (%(default)g)')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='seeds of weights, noise and data order; the pictures stay')
    parser.add_argument('--piece', type=float, default=math.inf, help='stop after so many CPU seconds; the same command goes on (%(default)g)')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder of decoders_SIZE.json; seed 0 also leaves pictures there (%(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    file, (train, test) = args.out/f'decoders_{args.size}.json', pictures(args.size)
    load = lambda: read_json(file) if file.exists() else dict(seconds=args.seconds, torch=torch.__version__, results={})
    def strip(x, name): # some pictures side by side
        n = 8 if args.size < 100 else 4
        Image.fromarray(image_rows(x[::len(x) // n][:n])).save(args.out/f'decoders_{args.size}_{name.replace(" ", "_")}.jpg', quality=88)
    if 'baselines' not in load():
        found = baselines(train, test, 128)
        strip(test, 'input')
        write_json(file, load() | dict(baselines=found))
    for seed, kind in ((s, k) for s in args.seeds for k in args.only):
        if any(r['seed'] == seed for r in load()['results'].get(kind, [])): continue
        found, recon = run(args.size, kind, seed, train, test, load()['seconds'], args.piece)
        if found is None: return print(f'{args.size} {kind} seed {seed}: a piece is done, go on with the same command')
        record = load()                                                          # another process may have added to it
        record['results'].setdefault(kind, []).append(found)
        if seed == 0: strip(recon, kind)
        write_json(file, record)
        last = found['curve'][-1]
        print(f'{args.size} {kind:18} seed {seed} {found["ms_per_update"]:7.1f} ms', ' '.join(f'{p["psnr"]:.2f}' for p in found['curve']),
              'dB; std {std_ratio:.2f} chroma {chroma_ratio:.2f} sharpness {sharpness:.2f}'.format(**last), flush=True)


if __name__ == '__main__': main()
