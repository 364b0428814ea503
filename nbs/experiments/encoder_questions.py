"""Which latent classifies best, and why? Free nats, KL scale, repeats, image size, and contrastive terms beside and instead of pixels.

    python nbs/experiments/encoder_questions.py                       # everything, about 35 CPU minutes
    python nbs/experiments/encoder_questions.py --only base "free nats 3" --seeds 0

Every variant is the preset `demo` with one thing changed, trained for the same CPU time (not the same number of updates; both are in the result file), with a learning
rate that is annealed over that time. `as many pictures as repeat 8` alone stops when it has seen as many pictures as `repeat 8` had. The image sizes have
batches of 8, so that 224 pixels make some hundred updates. Each seed draws pictures of its own (synthetic Waterbirds) as well as weights, order and noise. Measured on held-out pictures:
the reconstruction, on the bird's pixels and on the others; linear probes for bird and place, fitted on group-balanced validation pictures; linear heads fitted on the biased
training pictures, plain (ERM) and with every group weighted alike; effective rank and variance of the latent, and how much of its variance bird and place account for.
Trivial answers stand beside them: the mean image, principal components, the untrained encoder, the majority class. Seed 0 leaves a UMAP map of every latent.
What is in the result file already is not repeated.
"""
import argparse
import math
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException

from dreamer_wb.classifier.latents import Features, balanced_draw, embed_2d, pca_features, probe
from dreamer_wb.classifier.metrics import group_accuracy, group_counts, group_metrics
from dreamer_wb.classifier.methods import group_weights
from dreamer_wb.core.config import TrainConfig, compose
from dreamer_wb.core.learner import fit, set_seed, use_bf16
from dreamer_wb.core.runs import read_json, write_json
from dreamer_wb.data.episodes import image_to_float
from dreamer_wb.data.synthetic import render_many, sample_specs
from dreamer_wb.dreamer.world_model import DreamerWorldModel, chroma, psnr, spread

OUT = Path(__file__).resolve().parent/'results'/'encoder_questions.json'
MATCHED = 'as many pictures as repeat 8'
BLIND = ['decoder.kind=none']


def term(kind, *more): return [f'representation.kind={kind}', *more]
def mults(*values): return [f'{part}.mults={list(values)}' for part in ('encoder', 'decoder')]


WEIGHTS = {'r2': 'scales.representation=0.3', 'infonce': 'scales.representation=10', 'barlow': 'scales.representation=0.3', 'simclr': 'scales.representation=30'}
VARIANTS = { # name: overrides
    'base': [],
    'untrained': [],
    **{f'free nats {n}': [f'dynamics.free_nats={n}'] for n in (0, 3, 100)},
    'KL / 5': ['scales.rep=0.02'], 'KL x 5': ['scales.rep=0.5'],
    'repeat 8': ['repeat=8', 'batch_size=8'], MATCHED: ['batch_size=8'],
    **{f'{k} instead': term(k, s, *BLIND) for k, s in WEIGHTS.items()},
    'nothing instead': BLIND,
    **{f'{k} beside': term(k, s) for k, s in WEIGHTS.items()},
    'categorical': ['dynamics.latent=categorical', 'dynamics.stoch=32'],
    '64 px': ['batch_size=8'], '128 px': ['size=128', 'batch_size=8', *mults(1, 2, 4, 8)], '224 px': ['size=224', 'batch_size=8', *mults(1, 2, 4, 8, 8)],
}
SIZES = {'64 px': 64, '128 px': 128, '224 px': 224}


class Data:
    "Pictures of one seed in memory: training, validation and test."
    def __init__(self, counts, size, seed, cache):
        specs, self.features = sample_specs(counts, seed=seed), {}
        for split, some in specs.items():
            file = cache and Path(cache)/f'{split}_{size}_{seed}_{len(some)}.npz'
            if file and file.exists(): x, mask = np.load(file).values()
            else: x, mask = render_many(some, size)
            if file and not file.exists(): np.savez(file, x, mask)
            x, self.mask = x.transpose(0, 3, 1, 2), torch.from_numpy(mask)[:, None]            # of the last split, test
            self.features[split] = Features(x, [s.label for s in some], [s.place for s in some], split)
        self.obs = {k: torch.from_numpy(f.x) for k, f in self.features.items()}

    def batches(self, size, seed, repeat):
        "Batches of still images as a function of the step."
        train, per_epoch = self.obs['train'], len(self.obs['train']) // size
        first = (torch.arange(repeat) == 0).expand(size, repeat)
        def batch(step):
            order = np.random.default_rng([seed, step // per_epoch]).permutation(len(train))
            obs = train[order[step % per_epoch * size:][:size]].unsqueeze(1).expand(-1, repeat, -1, -1, -1)
            return dict(obs=obs, act=torch.zeros(size, repeat, 1), first=first)
        return batch


class Budget(Callback):
    "Stops after `seconds` of CPU time, or after `steps` updates if given, and anneals the learning rate by its share."
    order = 40
    def __init__(self, seconds, steps, lr): self.seconds, self.steps, self.lr = seconds, steps, lr
    def before_fit(self): self.start = time.process_time()
    @property
    def share(self): return self.train_iter / self.steps if self.steps else (time.process_time() - self.start) / self.seconds
    def before_batch(self):
        share = min(1., self.share)
        for group in self.opt.opt.param_groups: group['lr'] = self.lr * min(1., share / .03) * (1 + math.cos(math.pi * share)) / 2
    def after_batch(self):
        if self.share >= 1: raise CancelFitException


@torch.no_grad()
def look(world, obs, amp, repeat, draw=False):
    "Posterior means (N, S) of still images after their last repeat, and reconstructions (N, 3, H, W) or None."
    z, recon = [], []
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        for x in obs.split(100):
            latent = world.encoder(x.unsqueeze(1).expand(-1, repeat, -1, -1, -1))
            z.append(latent.stoch[:, -1].float())
            if draw: recon.append(world.decoder(latent.feat[:, -1]))
    return torch.cat(z).numpy(), torch.cat(recon) if draw else None


def pictures(recon, obs, mask):
    "Figures of the reconstructions, and of the trivial answer; on the bird's pixels and the others, the share of the mean image's error that is gone."
    image = image_to_float(obs)
    mean = image.mean(0).expand_as(image)
    out = dict(psnr_mean_image=psnr(mean, image), bird_area=mask.float().mean().item())
    if recon is None: return out
    error = lambda x, where: ((x - image).square() * where).sum().item()
    parts = {f'explained_{name}': 1 - error(recon, where) / error(mean, where) for name, where in (('bird', mask), ('place', ~mask))}
    return out | parts | dict(psnr=psnr(recon, image), std_ratio=spread(recon) / spread(image), chroma_ratio=chroma(recon) / chroma(image))


def effective_rank(z):
    "Exponential of the entropy of the normalised singular values of the centred latents (Roy & Vetterli 2007)."
    p = np.linalg.svd(z - z.mean(0), compute_uv=False)
    p = p / p.sum()
    return float(np.exp(-(p * np.log(p + 1e-12)).sum()))


def explained(z):
    "Share of the variance of the standardised latents that is due to the bird, and to the place, with every group equally often."
    index = balanced_draw(z.group, np.random.default_rng(0), np.bincount(z.group).min())
    x = z.x[index]
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    share = lambda of: np.mean([np.square(x[of[index] == c].mean(0)) for c in (0, 1)])
    return dict(variance_label=float(share(z.label)), variance_place=float(share(z.place)))


def head(train, test, balanced):
    "A linear head on the biased training latents: accuracy of the worst group, and mean weighted as in training."
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, C=.1))
    weights = group_weights(train.group) * len(train) / 4 if balanced else None
    prob = model.fit(train.x, train.label, logisticregression__sample_weight=weights).predict_proba(test.x)
    m = group_metrics(test.label, prob, test.group, group_counts(train.group))
    return dict(worst=m['acc_worst'], adjusted=m['acc_adj'])


def classify(z):
    "What linear classifiers make of latents: probes and heads."
    out = {f'probe_{t}': probe(z['val'], z['test'], t, draws=3)['acc'] for t in ('label', 'place')}
    for name, balanced in (('erm', False), ('balanced', True)): out |= {f'{name}_{k}': v for k, v in head(z['train'], z['test'], balanced).items()}
    x = z['test'].x
    return out | explained(z['test']) | dict(effective_rank=effective_rank(x), variance=float(x.var(0).mean()), active_units=float((x.var(0) > .01).mean()))


def run(name, data, seconds, limit, seed):
    "Train one variant, for `limit` updates if given, and measure it."
    cfg = compose(TrainConfig, ['experiment=demo', *VARIANTS[name]])
    cfg.loop.steps, cfg.loop.eval_every, cfg.loop.log_every, cfg.loop.progress, cfg.loop.tensorboard = 10**6, 0, 10**6, False, False
    set_seed(seed)
    world, amp = DreamerWorldModel(cfg), use_bf16(cfg.loop.amp, torch.device('cpu'))
    steps, kl = 0, None
    if name != 'untrained':
        learn = fit(world, data.batches(cfg.batch_size, seed, cfg.repeat), cfg.loop, cbs=[Budget(seconds, limit, cfg.loop.lr)])
        steps, kl = learn.train_iter, float(learn.recorder.rows[-1]['kl'])
    world.eval()
    seen = {k: look(world, obs, amp, cfg.repeat, k == 'test' and 'image' in world.scales) for k, obs in data.obs.items()}
    z = {k: Features(seen[k][0], f.label, f.place, k) for k, f in data.features.items()}
    row = dict(seed=seed, steps=steps, images=steps * cfg.batch_size, kl=kl, **pictures(seen['test'][1], data.obs['test'], data.mask), **classify(z))
    if seed == 0: row['map'] = draw_map(z['test'])
    return row


def draw_map(z):
    "UMAP of as many test latents of each group."
    index = balanced_draw(z.group, np.random.default_rng(0), 75)
    return dict(xy=np.round(embed_2d(z.x[index]), 2).tolist(), label=z.label[index].tolist(), place=z.place[index].tolist())


def trivial(data, seed):
    "Principal components of the pixels, as many as the latent has dimensions, and the answer of the majority."
    z = dict(zip(data.features, pca_features(*data.features.values(), dims=128)))
    row = dict(seed=seed, **classify(z))
    if seed == 0: row['map'] = draw_map(z['test'])
    test, counts = data.features['test'], group_counts(data.features['train'].group)
    most = np.full(len(test), np.bincount(data.features['train'].label).argmax())
    acc = group_accuracy(test.label, most, test.group)
    return dict(PCA=row, majority=dict(seed=seed, erm_worst=float(acc.min()), erm_adjusted=float(acc @ counts / counts.sum()), probe_label=.5, probe_place=.5))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', default=list(VARIANTS), choices=list(VARIANTS), metavar='NAME', help='names of variants')
    p.add_argument('--seconds', type=float, default=25, help='CPU seconds of training for each (%(default)g)')
    p.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='of pictures, weights, order and noise')
    p.add_argument('--n', type=int, nargs=3, default=[1600, 800, 1000], help='training, validation and test pictures')
    p.add_argument('--cache', help='folder that keeps the drawn pictures')
    p.add_argument('--out', type=Path, default=OUT, help='result file (%(default)s)')
    args = p.parse_args()
    torch.set_num_threads(1)
    done = read_json(args.out) if args.out.exists() else dict(seconds=args.seconds, n=args.n, torch=torch.__version__, variants={}, results={})
    def keep(name, row):
        done['results'].setdefault(name, []).append(row)
        done['variants'] |= {name: VARIANTS.get(name, [])}
        write_json(args.out, done)
        print(f'{name:16} seed {row["seed"]}', ' '.join(f'{k} {v:.3g}' for k, v in row.items() if isinstance(v, float)), flush=True)
    find = lambda name, seed: next((r for r in done['results'].get(name, []) if r['seed'] == seed), None)
    load = lru_cache(1)(lambda size, seed: Data(tuple(args.n), size, seed, args.cache))
    for name in (*(['PCA', 'majority'] if 'base' in args.only else []), *args.only):
        for seed in args.seeds:
            if find(name, seed): continue
            data = load(SIZES.get(name, 64), seed)
            if name in ('PCA', 'majority'): keep(name, trivial(data, seed)[name])
            else: keep(name, run(name, data, done['seconds'], find('repeat 8', seed)['steps'] if name == MATCHED else None, seed))


if __name__ == '__main__': main()
