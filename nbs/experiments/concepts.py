"""Are the counterfactuals of a world model good, and do they help a classifier?

    dreamer-wb demo seed=0,1,2 -m                                       # stage A: three runs, 2 CPU minutes of world model each
    python nbs/experiments/concepts.py runs/demo/*                      # stage C from their weights, three trainings a seed

For each run of stage A: the preset `waterbirds_concept_cpu` is trained on from its weights (edits learned from every fifth image of the training set), and beside it, with as many
updates on the same batches, the same model without the open-loop loss and an autoencoder with a switch (no dynamics). Then every kind of edit is measured on held-out images of the test set, as many of each group, by judges that
were trained on pictures of another seed; and heads on latents are retrained in every way, all with the encoder of the same world model and the same number of updates, and tested on
the posterior latents of the real test images. Exact edits use the masks of all training images; they are what the world model's edits should come close to.
What is in the result file already is not repeated; trained models stay in --cache.
"""
import argparse
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch

from dreamer_wb.classifier.latents import balanced_draw
from dreamer_wb.classifier.metrics import group_counts
from dreamer_wb.classifier.models import small_cnn
from dreamer_wb.concepts.counterfactuals import (Judges, edit_report, edited, encode_rows, plot_examples, retrain, robustness, train_judges, training_rows)
from dreamer_wb.concepts.env import draw_scenes, read_scenes
from dreamer_wb.concepts.shifter import BackgroundEdit, LatentEdit, WorldEdit, edit_strip, plot_strips
from dreamer_wb.concepts.world import ConceptBatches, ConceptTrainConfig, ConditionalAutoencoder, start_world, train_concepts
from dreamer_wb.core.config import compose
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import Run, atomic_write, read_json, write_json
from dreamer_wb.data.episodes import EpisodeStore
from dreamer_wb.data.synthetic import Spec, read_specs, twin
from dreamer_wb.dreamer.world_model import DreamerWorldModel

OUT = Path(__file__).resolve().parent/'results'/'concepts.json'
EDITS = ('exact', 'world model', 'no open-loop loss', 'autoencoder', 'mean shift', 'random direction')
WAYS = { # name: (rows to train on, edit, method, group labels that are used)
    'as is': ('as is', None, 'erm', 'none'),
    'world model': ('edits', 'world model', 'erm', 'none'),
    'factual + world model': ('factual + edits', 'world model', 'erm', 'none'),
    'autoencoder': ('edits', 'autoencoder', 'erm', 'none'),
    'exact edits': ('edits', 'exact', 'erm', 'none'),
    'factual + exact edits': ('factual + edits', 'exact', 'erm', 'none'),
    'plain copies': ('copies', None, 'erm', 'none'),
    'random direction': ('factual + edits', 'random direction', 'erm', 'none'),
    'mean shift': ('factual + edits', 'mean shift', 'erm', 'none'),
    'group-balanced': ('as is', None, 'group_balanced', 'train, val'),
    'GroupDRO': ('as is', None, 'group_dro', 'train, val'),
    'DFR': ('as is', None, 'dfr', 'val'),
}


class Seed:
    "All that one run of stage A leads to; parts are made when they are asked for."
    def __init__(self, run, args):
        self.run, self.args, self.cache = Path(run), args, Path(args.cache)
        self.seed = Run.open(run).config['seed']
        self.stores = {s: EpisodeStore(self.run/'episodes'/s) for s in ('train', 'val', 'test')}
        self.cfg = compose(ConceptTrainConfig, ['experiment=waterbirds_concept_cpu', f'start={run}', f'data_dir={run}/episodes', f'runs_dir={args.cache}', f'name=seed{self.seed}',
                                                f'seed={self.seed}', 'loop.progress=false', *([f'loop.steps={args.steps}'] if args.steps else [])])
        self._world = self._rows = None

    @property
    def world(self):
        if self._world is None: self._world = DreamerWorldModel.load_from_checkpoint(train_concepts(self.cfg).checkpoints/'world_model.ckpt').eval()
        return self._world

    def scenes(self, split, **kw): return read_scenes(self.stores[split], **kw)

    def autoencoder(self):
        "The control without dynamics, trained on the same batches."
        path, net = self.cache/f'autoencoder_{self.seed}.pt', start_world(self.cfg, ConditionalAutoencoder)
        if path.exists(): net.load_state_dict(torch.load(path, weights_only=True))
        else:
            set_seed(self.seed)
            fit(net, ConceptBatches(self.scenes('train', share=self.cfg.masks, seed=self.seed), self.cfg.batch_size, self.cfg.batch_length, seed=self.seed), self.cfg.loop)
            with atomic_write(path) as f: torch.save(net.state_dict(), f)
        return net.eval()

    def without_open_loop(self):
        "The same training without the open-loop loss."
        cfg = dataclasses.replace(self.cfg, scales=dataclasses.replace(self.cfg.scales, open_loop=0.), name=f'seed{self.seed}_no_open_loop')
        return DreamerWorldModel.load_from_checkpoint(train_concepts(cfg).checkpoints/'world_model.ckpt').eval()

    def held_out(self, n):
        "As many test images of each group, and their twins."
        scenes = self.scenes('test')
        index = balanced_draw(self.stores['test'].group, np.random.default_rng([self.seed, 1]), n // 4)
        specs, look, size = read_specs(self.run/'episodes'/'raw')
        number = [int(self.stores['test'].ids[i].rpartition('_')[2]) - 1 for i in index]      # the images are numbered in the order of the specs
        chosen = [specs[k] for k in number]
        assert [s.label for s in chosen] == scenes.label[index].tolist() and [s.place for s in chosen] == scenes.place[index].tolist()
        return scenes[torch.from_numpy(index)], draw_scenes([twin(s) for s in chosen], size, difficulty=look).obs

    def edit(self, name):
        "An edit by its name."
        if name == 'exact': return BackgroundEdit(self.scenes('train').donors())
        if name == 'world model': return WorldEdit(self.world)
        if name == 'autoencoder': return WorldEdit(self.autoencoder())
        if name == 'no open-loop loss': return WorldEdit(self.without_open_loop())
        z = self.factual['train']
        means = [[torch.from_numpy(z.x[z.group == 2*label + place]).mean(0) for place in (0, 1)] for label in (0, 1)]
        shift = sum(m[1] - m[0] for m in means) / 2                                            # group-balanced
        if name == 'random direction':
            v = torch.randn(len(shift), generator=torch.Generator().manual_seed(self.seed))
            shift = v / v.norm() * shift.norm()
        return LatentEdit(shift, self.world)

    @property
    def factual(self): # latents of all images
        if self._rows is None: self._rows = {s: training_rows('as is', self.world, self.scenes(s)) for s in self.stores}
        return self._rows


def judges_for(args):
    "The judges, trained once on pictures of another seed and kept."
    path = Path(args.cache)/'judges.pt'
    if path.exists():
        state = torch.load(path, weights_only=True)
        judges = Judges(small_cnn(64), small_cnn(64))
        for k in ('place', 'bird'): getattr(judges, k).load_state_dict(state[k])
        return Judges(judges.place.eval(), judges.bird.eval()), state['right']
    specs = [Spec(i // 2 % 2, i % 2, 5 * 10**9 + i, 5 * 10**9 + i) for i in range(args.judge_images + 400)]
    scenes = draw_scenes(specs, 64)
    judges = train_judges(scenes[torch.arange(args.judge_images)], epochs=8)
    rest = scenes[torch.arange(args.judge_images, len(specs))]
    water, bird = judges(rest.obs)
    right = dict(place=float(((water > .5) == rest.place).float().mean()), bird=float(((bird > .5) == rest.label).float().mean()))
    with atomic_write(path) as f: torch.save(dict(place=judges.place.state_dict(), bird=judges.bird.state_dict(), right=right), f)
    return judges, right


def heads(way, s, moved):
    "Both heads retrained in one way: a row for each."
    rows, edit, method, groups = WAYS[way]
    train, val = s.scenes('train'), s.factual['val']
    data = s.factual['train'] if rows == 'as is' else training_rows(rows, s.world, train, edit and s.edit(edit), seed=100 + s.seed)
    counts, out = group_counts(s.factual['train'].group), {}
    for head in ('linear', 'mlp'):
        nets = [retrain(data, val, head, method, seed=10 * s.seed + k, steps=s.args.head_steps) for k in range(s.args.repeats)]
        found = [robustness(n, s.factual['test'], moved, counts) for n in nets]
        out |= {f'{head}_{k}': float(np.mean([f[k] for f in found])) for k in found[0]}
    return dict(seed=s.seed, groups=groups, rows=len(data), **out)


def finite(row): return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def pictures(s, scenes, twins, folder):
    "Examples of the first run, for the article."
    import matplotlib.pyplot as plt
    d = s.edit('world model')
    some = scenes[torch.from_numpy(np.random.default_rng(0).permutation(len(scenes))[:8])]
    for name, fig in dict(examples=plot_examples(d, scenes, twins, 8), strips=plot_strips(some.obs, edit_strip(d, some.obs, np.linspace(0, 1, 7)))).items():
        fig.savefig(folder/f'concepts_{name}.jpg', dpi=50, pil_kwargs=dict(quality=70))
        plt.close(fig)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', help='run folders of `dreamer-wb demo`')
    p.add_argument('--parts', nargs='+', default=['train', 'edits', 'heads'], choices=['train', 'edits', 'heads'], help='what to do (%(default)s)')
    p.add_argument('--edits', nargs='+', default=list(EDITS), choices=EDITS, metavar='NAME', help='kinds of edits')
    p.add_argument('--ways', nargs='+', default=list(WAYS), choices=list(WAYS), metavar='NAME', help='ways of retraining')
    p.add_argument('--n', type=int, default=600, help='held-out images for the measures of edits (%(default)d)')
    p.add_argument('--judge-images', type=int, default=1200, help='images that the judges are trained on (%(default)d)')
    p.add_argument('--steps', type=int, default=0, help='updates of stage C, 0: those of the preset')
    p.add_argument('--head-steps', type=int, default=600, help='updates of each head (%(default)d)')
    p.add_argument('--repeats', type=int, default=2, help='heads with different weights for each way, averaged (%(default)d)')
    p.add_argument('--cache', default='runs', help='folder for trained models (%(default)s)')
    p.add_argument('--out', type=Path, default=OUT, help='result file (%(default)s)')
    args = p.parse_args()
    torch.set_num_threads(1)
    Path(args.cache).mkdir(parents=True, exist_ok=True)
    done = read_json(args.out) if args.out.exists() else dict(torch=torch.__version__, n=args.n, judges=None, edits={}, heads={}, cpu_seconds={})
    def keep(part, name, row, start):
        done[part].setdefault(name, []).append(finite(row))
        done['cpu_seconds'][f'{part} {name} {row["seed"]}'] = round(time.process_time() - start, 1)
        write_json(args.out, done)
        print(f'{name:22} seed {row["seed"]}', ' '.join(f'{k} {v:.3g}' for k, v in row.items() if isinstance(v, float)), flush=True)
    def missing(part, names, seed): return [n for n in names if all(r['seed'] != seed for r in done[part].get(n, []))]
    for run in args.runs:
        s = Seed(run, args)
        if 'train' in args.parts: s.world
        done['updates'] = s.cfg.loop.steps
        if 'edits' in args.parts and (names := missing('edits', args.edits, s.seed)):
            judges, done['judges'] = judges_for(args)
            scenes, twins = s.held_out(args.n)
            if s.seed == 0 and args.out == OUT: pictures(s, scenes, twins, OUT.parent)
            for name in names:
                start = time.process_time()
                keep('edits', name, dict(seed=s.seed, **edit_report(s.edit(name), scenes, judges, s.world, twins, seed=s.seed)), start)
        if 'heads' in args.parts and (names := missing('heads', args.ways, s.seed)):
            test, exact = s.scenes('test'), s.edit('exact')
            some = test[torch.from_numpy(balanced_draw(s.stores['test'].group, np.random.default_rng([s.seed, 2]), 250))]
            moved = tuple(encode_rows(s.world, edited(exact, some, p, 7 + p), some.label, torch.full_like(some.place, p)) for p in (0, 1))
            for name in names:
                start = time.process_time()
                keep('heads', name, heads(name, s, moved), start)


if __name__ == '__main__': main()
