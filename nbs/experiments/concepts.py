"""Are the counterfactuals of a world model good, and do they help a classifier?

    dreamer-wb demo seed=0,1,2 -m                          # stage A: three runs, with the episodes
    python nbs/experiments/concepts.py runs/demo/*         # stage C of each, with its own seed, as `dreamer-wb concepts` does it

For each run of stage A a study of `evaluation.concepts`: the world model learns the edit, edits are measured on held-out images of the test set, and heads on latents and a small CNN and a
ResNet-18 on images are retrained in every way, all with the same number of updates. The judges of edits are trained once, on images of another seed, and shared.
--controls adds, for the runs given, the autoencoder with a switch in place of the dynamics (same batches, as many updates); --variant trains the world model with other settings and measures it.
What is in the result file already is not repeated; studies stay in --cache.
"""
import argparse
import dataclasses
import shutil
import time
from pathlib import Path

import torch

from dreamer_wb.concepts.counterfactuals import edit_report
from dreamer_wb.concepts.env import read_scenes
from dreamer_wb.concepts.shifter import WorldEdit
from dreamer_wb.concepts.world import ConceptBatches, ConditionalAutoencoder, start_world
from dreamer_wb.core.config import compose
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import Run, atomic_write, plain, read_json, write_json
from dreamer_wb.data.episodes import EpisodeStore
from dreamer_wb.evaluation.concepts import EDITS, RECIPES, ConceptsConfig, Study

OUT = Path(__file__).resolve().parent/'results'/'concepts.json'
HEADS = [r for r in RECIPES if r not in ('reconstructions + world model', 'mean shift', 'exact of the masked')]
IMAGES = ['as is', 'cut-outs', 'factual + cut-outs', 'fine cut-outs', 'factual + fine cut-outs', 'segmented', 'factual + segmented', 'exact edits', 'factual + exact edits', 'GroupDRO', 'group-balanced', 'DFR', 'plain copies',
          'random direction', 'world model', 'reconstructions + world model']


def study(run, args, models, recipes, parts=(), more=(), name=''):
    "The study of one run of stage A, with its seed."
    seed = Run.open(run).config['seed']
    cfg = compose(ConceptsConfig, [f'run="{run}"', f'out="{args.cache}/s{seed}{name}"', f'seed={seed}', 'progress=false', 'train.loop.progress=false', f'looks_per_group={args.looks}',
                                   f'cnn_steps={args.cnn_steps}', f'head_steps={args.head_steps}', f'draws={args.draws}', f'judge_images={args.judge_images}', *more], group=None)
    s = Study(dataclasses.replace(cfg, models=list(models), recipes=list(recipes), edits=list(args.edits)))
    judges, shared = s.folder/'judges.pt', Path(args.cache)/'judges.pt'
    if shared.exists() and not judges.exists():
        s.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared, judges)
    s.judges
    if not shared.exists(): shutil.copy(judges, shared)
    return s


def autoencoder(s):
    "The control without dynamics, trained on the same batches, for as many updates as the world model had with pictures."
    path, cfg = s.folder/'autoencoder.pt', dataclasses.replace(s.cfg.train, start=str(s.run.path))
    net = start_world(cfg, ConditionalAutoencoder)
    if path.exists(): net.load_state_dict(torch.load(path, weights_only=True))
    else:
        set_seed(s.cfg.seed)
        fit(net, ConceptBatches(read_scenes(EpisodeStore(s.data/'train'), cfg.masks, s.cfg.seed), cfg.batch_size, cfg.batch_length, seed=s.cfg.seed), dataclasses.replace(cfg.loop, eval_every=0))
        with atomic_write(path) as f: torch.save(net.state_dict(), f)
    return WorldEdit(net.eval())


def row_key(row): return tuple(row.get(k) for k in ('study', 'edit', 'model', 'recipe', 'seed'))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', help='run folders of `dreamer-wb demo`')
    p.add_argument('--parts', nargs='+', default=['edits', 'heads', 'images', 'looks'], choices=['edits', 'heads', 'images', 'looks'], help='what to do (%(default)s)')
    p.add_argument('--edits', nargs='+', default=list(EDITS), choices=list(EDITS), metavar='NAME', help='kinds of edits (all)')
    p.add_argument('--recipes', nargs='+', default=list(RECIPES), choices=list(RECIPES), metavar='NAME', help='ways of retraining (all)')
    p.add_argument('--heads', nargs='+', default=['linear', 'mlp'], choices=['linear', 'mlp'], help='heads on latents (both)')
    p.add_argument('--images', nargs='+', default=['cnn', 'resnet18'], choices=['cnn', 'resnet18'], help='classifiers of images (both)')
    p.add_argument('--controls', action='store_true', help='measure the autoencoder, too')
    p.add_argument('--variant', nargs=2, metavar=('NAME', 'OVERRIDES'), help="measure a world model trained otherwise, e.g. fewer_masks 'train.masks=.4'")
    p.add_argument('--masks', type=float, default=1., help='share of the training birds whose mask is known, to the world model and to the network that cuts out; less than 1 is a study of its own (%(default)s)')
    p.add_argument('--looks', type=int, default=15, help='test images of each group for TCAV, Grad-CAM and corruptions (%(default)d)')
    p.add_argument('--cnn-steps', type=int, default=300, help='updates of the small CNN (%(default)d)')
    p.add_argument('--head-steps', type=int, default=600, help='updates of a head (%(default)d)')
    p.add_argument('--draws', type=int, default=1, help='edits of each training image for each place (%(default)d)')
    p.add_argument('--judge-images', type=int, default=3000, help='images that the judges are trained on (%(default)d)')
    p.add_argument('--cache', default='runs/concepts', help='folder of the studies (%(default)s)')
    p.add_argument('--out', type=Path, default=OUT, help='result file (%(default)s)')
    args = p.parse_args()
    torch.set_num_threads(1)
    done = read_json(args.out) if args.out.exists() else dict(torch=torch.__version__, settings={}, judges={}, edits=[], classifiers=[], cut={}, variants=[], cpu_seconds={})
    for run in args.runs:
        def timed(part, work):
            start = time.process_time()
            found = work()
            if (spent := time.process_time() - start) > 1: done['cpu_seconds'][f'{part} {seed}'] = round(spent + done['cpu_seconds'].get(f'{part} {seed}', 0), 1)
            return found
        seed = Run.open(run).config['seed']
        if args.variant:
            name, more = args.variant
            s = study(run, args, (), (), more=more.split(), name=f'_{name}')
            timed(f'variant {name}', lambda: s.world)
            done['variants'].append(plain(dict(variant=name, settings=more, seed=seed, **edit_report(WorldEdit(s.world), *(h := s.held_out())[:1], s.judges, s.world, h[1], seed=seed))))
            write_json(args.out, done)
            continue
        few = args.masks < 1
        s = study(run, args, args.heads, [r for r in HEADS if r in args.recipes], more=[f'train.masks={args.masks}'] * few, name=f'_masks{args.masks}' * few)
        timed('world model', lambda: s.world)
        if 'edits' in args.parts: timed('edits', s.measure_edits)
        if args.controls and not any(r['edit'] == 'autoencoder' for r in s.done['edits']):
            (scenes, twins), d = s.held_out(), timed('autoencoder', lambda: autoencoder(s))
            s.keep('edits', dict(edit='autoencoder') | edit_report(d, scenes, s.judges, s.world, twins, seed=seed))
        if 'heads' in args.parts: timed('heads', s.retrain_all)
        if 'images' in args.parts:
            s.cfg = dataclasses.replace(s.cfg, models=args.images, recipes=[r for r in IMAGES if r in args.recipes])
            timed('images', s.retrain_all)
        if 'looks' in args.parts: timed('looks', s.look_all)
        s.write()
        if few:
            new = {(args.masks, *row_key(r)): r for r in [dict(masks=args.masks, study=seed, **r) for r in s.done['classifiers']]}
            done['few_masks'] = [r for r in done.setdefault('few_masks', []) if (r['masks'], *row_key(r)) not in new] + list(new.values())
            write_json(args.out, done)
            continue
        for part in ('edits', 'classifiers'):
            new = {row_key(r): r for r in [dict(study=seed, **r) for r in s.done[part]]}
            done[part] = [r for r in done[part] if row_key(r) not in new] + list(new.values())
        done['settings'], done['judges'][str(seed)] = {k: v for k, v in s.done['settings'].items() if k not in ('data', 'seed')}, s.done['judges']
        if 'cut-out' in s.cfg.edits: done['cut'][str(seed)] = list(s.cut())
        write_json(args.out, done)
        print(run, 'done', flush=True)


if __name__ == '__main__': main()
