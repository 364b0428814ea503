"""Does synthetic Waterbirds show the effect of the real set, and can it be undone?

    python nbs/experiments/synthetic_bias.py                       # seeds 3, 4, 5, about 6 CPU minutes each
    python nbs/experiments/synthetic_bias.py --seeds 0 --difficulty hard --out hard.json

Each seed draws a set of its own (official sizes, 64 pixels, in memory) and trains the small CNN from scratch on it in four ways:
ERM, GroupDRO, ERM with a new last layer (DFR, fitted on validation or on training images), and ERM on the training images together with their
exact twins (same bird, other place). Every way is tested on the same images. On some of them the place, or the bird, is exchanged, to see how often the answer changes.
The result file is written after every step; what is in it already is not repeated.
"""
import argparse
import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from dreamer_wb.classifier.latents import Features, probe
from dreamer_wb.classifier.methods import features_of, predict, refit_last, train_classifier
from dreamer_wb.classifier.metrics import GROUPS, group_counts, group_metrics, seed_interval, wilson
from dreamer_wb.classifier.models import small_cnn
from dreamer_wb.core.runs import write_json
from dreamer_wb.data.synthetic import VERSION, look_at, render_many, sample_specs, swap_bird, twin

OUT = Path(__file__).resolve().parent/'results'/'synthetic_bias.json'
ROBUST = dict(adjustment=2., weight_decay=.1)  # GroupDRO needs more regularisation than ERM, as its authors found
METHODS = 'erm', 'dfr', 'dfr_train', 'group_dro', 'twins'


def features(specs, args, name):
    "Pictures of `specs` in memory."
    images, _ = render_many(specs, args.size, args.look, args.workers)
    return Features(images.transpose(0, 3, 1, 2), np.array([s.label for s in specs]), np.array([s.place for s in specs]), name)


def joined(a, b): return Features(*(np.concatenate([getattr(a, k), getattr(b, k)]) for k in ('x', 'label', 'place')), f'{a.folder} + {b.folder}')


class Data:
    "The pictures of one seed."
    def __init__(self, seed, args):
        specs = sample_specs(tuple(args.n), args.bias, seed)
        self.train, self.val, self.test = (features(specs[k], args, k) for k in ('train', 'val', 'test'))
        some = specs['test'][:args.edits]
        self.moved, self.swapped = features([twin(s) for s in some], args, 'moved'), features([swap_bird(s) for s in some], args, 'swapped')
        self.specs, self.args = specs, args

    def twins(self): return joined(self.train, features([twin(s) for s in self.specs['train']], self.args, 'twins'))


def measure(net, data):
    "All figures of one network."
    prob, n = predict(net, data.test), len(data.moved)
    m = group_metrics(data.test.label, prob, data.test.group, group_counts(data.train.group))
    answer = prob[:n].argmax(-1)
    m['place_flips'] = float((predict(net, data.moved).argmax(-1) != answer).mean())
    m['bird_flips'] = float((predict(net, data.swapped).argmax(-1) != answer).mean())
    m['train_acc'] = float((predict(net, data.train).argmax(-1) == data.train.label).mean())
    val, test = (Features(features_of(net, d), d.label, d.place, d.folder) for d in (data.val, data.test))
    m['probe'] = {t: probe(val, test, t)['acc'] for t in ('label', 'place')}
    return m


def train(method, data, seed, args):
    "A trained network."
    torch.manual_seed(seed)
    rows, epochs = (data.twins(), .6*args.epochs) if method == 'twins' else (data.train, args.epochs)
    if method == 'group_dro': return train_classifier(small_cnn(args.size), rows, data.val, method, seed=seed, epochs=.5*epochs, **ROBUST)
    return train_classifier(small_cnn(args.size), rows, data.val, 'erm', seed=seed, epochs=epochs)


def one_seed(seed, done, args):
    "Yield a row for each method that is not done."
    todo = [m for m in METHODS if m in args.methods and (seed, m) not in done]
    if not todo: return
    start = time.process_time()
    data, erm = Data(seed, args), None
    print(f'seed {seed}: {sum(args.n)} pictures and {2*args.edits} edits, {time.process_time()-start:.0f} CPU s', flush=True)
    if any(m in todo for m in METHODS[:3]): erm = train('erm', data, seed, args)
    for method in todo:
        start = time.process_time()
        if method == 'erm': got = erm
        elif method.startswith('dfr'): got = refit_last(erm, data.train, data.val, 'train' if method == 'dfr_train' else 'val', seed)
        else: got = train(method, data, seed, args)
        m = measure(got.net, data)
        yield dict(seed=seed, method=method, selection=got.selection, step=got.step, cpu_seconds=round(time.process_time()-start, 1), **m)
        print(f'  {method:10s} adjusted {m["acc_adj"]:.3f}  worst {m["acc_worst"]:.3f} ({m["worst_group"]})  '
              + ' '.join(f'{g} {m[f"acc_{g}"]:.3f}' for g in GROUPS) + f'  place flips {m["place_flips"]:.3f}', flush=True)


def summary(rows):
    "Means over seeds with 95 % intervals: over seeds (Student), and of the pooled test images of the worst group (Wilson)."
    out = {}
    for method in METHODS:
        mine = [r for r in rows if r['method'] == method]
        if not mine: continue
        keys = ['acc_adj', 'acc_worst', 'acc_mean', 'place_flips', 'bird_flips', *(f'acc_{g}' for g in GROUPS)]
        out[method] = {k: dict(mean=float(np.mean([r[k] for r in mine])), seeds=[r[k] for r in mine], interval=seed_interval([r[k] for r in mine])) for k in keys}
        out[method]['acc_worst']['wilson'] = wilson(out[method]['acc_worst']['mean'], sum(r[f'n_{r["worst_group"]}'] for r in mine))
    return out


def table(s):
    lines = ['method       adjusted   worst group (95 % over seeds)   place flips  bird flips']
    for k, v in s.items():
        low, high = v['acc_worst']['interval']
        lines.append(f'{k:10s} {100*v["acc_adj"]["mean"]:9.1f} {100*v["acc_worst"]["mean"]:12.1f} ({100*low:.1f} .. {100*high:.1f})'
                     f'{100*v["place_flips"]["mean"]:18.1f} {100*v["bird_flips"]["mean"]:11.1f}')
    return '\n'.join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[3, 4, 5], help='the default look was chosen on seeds 0, 1 and 2')
    p.add_argument('--n', type=int, nargs=3, default=[4795, 1199, 5794], help='training, validation and test images')
    p.add_argument('--methods', nargs='+', default=METHODS, choices=METHODS)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--bias', type=float, default=.95)
    p.add_argument('--difficulty', default='default', help='easy, default, hard or a number from 0 to 1')
    p.add_argument('--epochs', type=float, default=20.)
    p.add_argument('--edits', type=int, default=1000, help='test images whose place or bird is exchanged')
    p.add_argument('--workers', type=int, default=1, help='processes that draw')
    p.add_argument('--out', type=Path, default=OUT)
    args = p.parse_args()
    args.look = look_at(args.difficulty)
    torch.set_num_threads(1)
    recipe = dict(drawing=VERSION, look=asdict(args.look), group_dro=dict(ROBUST, epochs=.5*args.epochs), twins=dict(epochs=.6*args.epochs), **{k: getattr(args, k) for k in ('n', 'size', 'bias', 'difficulty', 'epochs', 'edits')})
    recipe = json.loads(json.dumps(recipe))
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows = old['rows'] if old.get('recipe') == recipe else []
    versions = {k: version(k) for k in ('numpy', 'pillow', 'torch', 'scikit-learn')}
    for seed in args.seeds:
        for row in one_seed(seed, {(r['seed'], r['method']) for r in rows}, args):
            rows.append(row)
            write_json(args.out, dict(recipe=recipe, versions=versions, summary=summary(rows), rows=rows))
    print(table(summary(rows)))


if __name__ == '__main__': main()
