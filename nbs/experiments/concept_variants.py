"""Variants of concept editing: two concepts in one world model, what keeps the original place out of an edit, and drawn birds in the style of photographs.

    dreamer-wb demo seed=0,1,2 -m                                # stage A: three runs, with the episodes
    python nbs/experiments/concepts.py runs/demo/*               # stage C with one concept, and the judges
    python nbs/experiments/concept_variants.py runs/demo/*       # this

--parts several    one world model, two concepts: taught on latents from factual images, from edited ones (starts), and with the leak penalty; then with pictures; measured against exact edits
        leak       one concept, on latents only: edited starts and the penalty, against the leak of the original place
        heads      heads on latents that are retrained with what the world models draw
        style      the small CNN on images that are retrained with drawn birds in the style of photographs
What is in the result file already is not repeated; --cache is that of concepts.py.
"""
import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from dreamer_wb.concepts.counterfactuals import edited, encode_rows, even_classes, image_features, leak_test, region_psnr, retrain, robustness, stacked
from dreamer_wb.concepts.directions import CONCEPTS
from dreamer_wb.concepts.env import concept_edit
from dreamer_wb.concepts.several import as_it_is, edited_to, judged, leaks
from dreamer_wb.concepts.shifter import WorldEdit, edit_grid, plot_grids, soft_mask
from dreamer_wb.concepts.world import ConceptBatches, edit_latents, first_moved, learn_edits, start_world
from dreamer_wb.core.config import compose
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import Run, atomic_write, plain, read_json, write_json
from dreamer_wb.data.episodes import float_to_image
from dreamer_wb.evaluation.concepts import ConceptsConfig, Study

OUT = Path(__file__).resolve().parent/'results'/'concept_variants.json'
BOTH = tuple(CONCEPTS)
SEVERAL = {'factual starts': False, 'starts': True} # whether half of the episodes begin with an edit


class Work:
    "One seed: a study of `evaluation.concepts`, results, clock."
    def __init__(self, run, args, done):
        self.run, self.args, self.done, self.seed = run, args, done, Run.open(run).config['seed']
        self.study = Study(compose(ConceptsConfig, [f'run="{run}"', f'out="{args.cache}/s{self.seed}"', f'seed={self.seed}', 'progress=false', 'train.loop.progress=false', *args.study], group=None))
        self.cfg, self.folder = self.study.cfg.train, Path(args.cache)/f's{self.seed}'/'variants'
        self.folder.mkdir(parents=True, exist_ok=True)

    def have(self, part, **row): return any(all(r.get(k) == v for k, v in dict(row, seed=self.seed).items()) for r in self.done[part])
    def keep(self, part, **row):
        self.done[part].append({k: v for k, v in plain(dict(seed=self.seed) | row).items() if v == v})      # nan: not measured
        write_json(self.args.out, self.done)
        print(part, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def world(self, concepts=BOTH):
        set_seed(self.seed)
        return start_world(dataclasses.replace(self.cfg, start=str(self.run), concepts=list(concepts)))

    def batches(self, rows, length, concepts=BOTH, stills=0., starts=0.): return ConceptBatches(self.study.scenes['train'], rows, length, 'do', stills, self.seed, True, 1, concepts, starts)

    def latents(self, concepts=BOTH): # stats, acts, moved: encoded once
        file, n = self.folder/f'latents_{len(concepts)}.pt', self.args.encode
        if not file.exists():
            world, made = self.world(concepts).eval(), self.batches(32, 6, concepts)
            with atomic_write(file) as f: torch.save((*edit_latents(world, made, n), first_moved(world, made, n)), f)
        return torch.load(file, weights_only=True)


def half_moved(stats, moved): # every second episode begins with the bird on a place at random
    half = torch.arange(len(next(iter(moved.values())))) % 2 == 0
    def first(k, v):
        v = v.clone()
        v[half, 0] = moved[k][half]
        return v
    return {k: first(k, v) for k, v in stats.items()}


def taught(w, name):
    "The two-concept world model after the steps on latents."
    file, world = w.folder/f'several_{name.replace(" ", "_")}.pt', w.world()
    if file.exists(): world.load_state_dict(torch.load(file, weights_only=True))
    else:
        stats, acts, moved = w.latents()
        learn_edits(world, half_moved(stats, moved) if SEVERAL[name] else stats, acts, w.args.latent_steps, w.seed, 48)
        with atomic_write(file) as f: torch.save(world.state_dict(), f)
    return world


def drawn(w):
    "The same with pictures, from edited starts."
    file, world = w.folder/'several_pictures.pt', taught(w, 'starts')
    if file.exists(): world.load_state_dict(torch.load(file, weights_only=True))
    else:
        set_seed(w.seed)
        fit(world.train(), w.batches(w.cfg.batch_size, 2, stills=w.cfg.stills, starts=.5), dataclasses.replace(w.cfg.loop, steps=w.args.picture_steps, eval_every=0))
        with atomic_write(file) as f: torch.save(world.state_dict(), f)
    return world.eval()


def held_out(w): # the first of each group: images that all studies measure their edits on, and their true twins
    scenes, twins = w.study.held_out()
    group = 2 * scenes.label + scenes.place
    i = torch.cat([torch.nonzero(group == g)[:w.args.images // 4, 0] for g in range(4)]).sort().values
    return scenes[i], twins[i]


def measure(w, d, world, **name):
    (scenes, twins), start = held_out(w), time.process_time()
    own = as_it_is(scenes)
    moved = edited_to(d, scenes, torch.stack([1 - own[:, 0], own[:, 1]], 1), w.seed)
    w.keep('several', **name, **judged(d, scenes, w.study.judges, world, seed=w.seed), **leaks(d, scenes, world, seed=w.seed), psnr_bird=region_psnr(moved, twins, scenes.mask), measuring=time.process_time() - start)


def several(w):
    for name in w.args.variants:
        if w.have('several', edit=name): continue
        start = time.process_time()
        world = taught(w, name).eval()
        measure(w, WorldEdit(world), world, edit=name, seconds=time.process_time() - start)
    if not w.have('several', edit='exact'): measure(w, concept_edit(w.study.scenes['train'], BOTH), w.study.world, edit='exact')
    if w.have('several', edit='starts, pictures') or not w.args.picture_steps: return
    start = time.process_time()
    world = drawn(w)
    measure(w, WorldEdit(world), world, edit='starts, pictures', seconds=time.process_time() - start)
    grids(w, world)


def grids(w, world, n=4):
    "Both edits of a few birds for a page: exact, of the model that was taught on latents alone, and of the one that was then taught with pictures."
    from matplotlib import pyplot as plt
    scenes, _ = held_out(w)
    few = scenes[torch.linspace(20, len(scenes) - 21, n).long()]
    exact = concept_edit(w.study.scenes['train'], BOTH)
    for name, d, known in (('exact', exact, dict(mask=few.mask, label=few.label)), ('latents', WorldEdit(taught(w, 'starts').eval()), {}), ('pictures', WorldEdit(world), {})):
        fig = plot_grids(few.obs, edit_grid(d, few.obs, **known))
        with atomic_write(w.args.out.parent/f'concept_variants_{name}_{w.seed}.jpg') as f: fig.savefig(f, format='jpg', dpi=50, pil_kwargs=dict(quality=70))
        plt.close(fig)


LEAK = {'factual starts': (False, 0.), 'starts': (True, 0.), 'starts + penalty .3': (True, .3), 'starts + penalty 1': (True, 1.)} # edited starts, weight of the penalty


def pull(w, d, scenes):
    "How much more of a water bird the judge sees if the bird came from water, all being asked for the same place; mean over families and places."
    water = [w.study.judges(edited(d, scenes, p, w.seed))[1] for p in (0, 1)]
    return float(np.mean([x[(scenes.label == b) & (scenes.place == 1)].mean() - x[(scenes.label == b) & (scenes.place == 0)].mean() for x in water for b in (0, 1)]))


def leak(w):
    for name in w.args.penalties:
        if w.have('leak', way=name, updates=w.args.latent_steps): continue
        (starts, weight), start, one = LEAK[name], time.process_time(), BOTH[:1]
        world, (stats, acts, moved) = w.world(one), w.latents(one)
        learn_edits(world, half_moved(stats, moved) if starts else stats, acts, w.args.latent_steps, w.seed, 48, moved=moved, leak=weight)
        with atomic_write(w.folder/f'leak_{name.replace(" ", "_")}.pt') as f: torch.save(world.state_dict(), f)
        seconds, d, (scenes, twins) = time.process_time() - start, WorldEdit(world.eval()), held_out(w)
        base, other = float_to_image(world.reconstruct(scenes.obs)), edited(d, scenes, 'other', w.seed)
        (water, bird), (_, before) = w.study.judges(other), w.study.judges(base)
        share = lambda x: x.float().mean().item()
        w.keep('leak', way=name, updates=w.args.latent_steps, rows=48, batches=w.args.encode, images=len(scenes), flip=share((water > .5) != scenes.place), bird_agrees=share((bird > .5) == (before > .5)), bird_right=share((bird > .5) == scenes.label),
               psnr_bird=region_psnr(other, twins, scenes.mask), pull=pull(w, d, scenes), **leak_test(d, scenes, world, w.seed), seconds=seconds)


def heads(w):
    "Two-layer heads on latents, retrained with what world models taught on latents draw of the training images; the encoder is that of stage A."
    sets = {k: image_features(s.obs, s.label, s.place) for k, s in w.study.scenes.items()}
    train, reader = w.study.scenes['train'], w.world(BOTH[:1]).eval()
    read, kept = lambda x: encode_rows(reader, x), {}
    for name in w.args.penalties:
        file = w.folder/f'leak_{name.replace(" ", "_")}.pt'
        todo = [r for r in ('world model', 'factual + world model') if not w.have('heads', way=name, recipe=r)]
        if not todo or not file.exists(): continue
        if not kept:
            kept = {k: read(x) for k, x in sets.items()}
            if not w.have('heads', way='as is'): w.keep('heads', way='as is', recipe='as is', **robustness(retrain(kept['train'], kept['val'], 'mlp', 'erm', 1000 * w.seed, w.args.head_steps).eval(), kept['test'], (), w.study.counts))
        world = w.world(BOTH[:1])
        world.load_state_dict(torch.load(file, weights_only=True))
        made = [read(image_features(edited(WorldEdit(world.eval()), train, p, w.seed), train.label, p)) for p in (0, 1)]
        for r in todo:
            rows = even_classes(stacked(*[kept['train']] * ('+' in r), *made), w.seed)
            net = retrain(rows, kept['val'], 'mlp', 'erm', 1000 * w.seed, w.args.head_steps)
            w.keep('heads', way=name, recipe=r, **robustness(net.eval(), kept['test'], (), w.study.counts))


def styled(w, world, scenes, way, chunk=200):
    "Birds over imagined places, land and water, in the style of photographs; masks are those that the world model was taught with."
    made = []
    for p in (0, 1):
        new, old = edited(WorldEdit(world), scenes, p, w.seed).float(), torch.cat([float_to_image(world.reconstruct(x)) for x in scenes.obs.split(chunk)]).float()
        rest = scenes.obs.float() - old                                                           # what the decoder could not draw of the photograph
        if way == 'residual on the bird': new = new + soft_mask(scenes.mask) * rest
        if way == 'residual on both': # the bird's own, and for the place that of a photograph of such a place
            empty = scenes.donors().places[p][:300]
            lost = empty.float() - float_to_image(world.reconstruct(empty)).float()
            stranger = lost[torch.from_numpy(np.random.default_rng([w.seed, p]).integers(len(lost), size=len(scenes)))]
            new = new + torch.lerp(stranger, rest, soft_mask(scenes.mask))
        made.append(image_features(new.round().clamp(0, 255).to(torch.uint8), scenes.label, p))
    return stacked(*made)


STYLES = ('as drawn', 'residual on the bird', 'residual on both')


def style(w):
    "The small CNN on images."
    for way in w.args.styles:
        if w.have('style', way=way): continue
        start, images = time.process_time(), lambda s: image_features(s.obs, s.label, s.place)
        rows = even_classes(styled(w, w.study.world, w.study.scenes['train'], way), w.seed)
        net = retrain(rows, images(w.study.scenes['val']), 'cnn', 'erm', 1000 * w.seed, w.args.cnn_steps)
        w.keep('style', way=way, **robustness(net.eval(), images(w.study.scenes['test']), (), w.study.counts), seconds=time.process_time() - start)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', help='run folders of `dreamer-wb demo`')
    p.add_argument('--parts', nargs='+', default=list(PARTS), choices=list(PARTS), help='what to do (%(default)s)')
    p.add_argument('--variants', nargs='*', default=list(SEVERAL), choices=list(SEVERAL), metavar='NAME', help='ways to teach two concepts on latents (all)')
    p.add_argument('--penalties', nargs='*', default=list(LEAK), choices=list(LEAK), metavar='NAME', help='ways to keep the original place out (all)')
    p.add_argument('--styles', nargs='*', default=list(STYLES), choices=list(STYLES), metavar='NAME', help='styles of drawn birds (all)')
    p.add_argument('--head-steps', type=int, default=600, help='updates of a head (%(default)d)')
    p.add_argument('--cnn-steps', type=int, default=200, help='updates of the small CNN (%(default)d)')
    p.add_argument('--images', type=int, default=400, help='held-out images on which edits are measured (%(default)d)')
    p.add_argument('--encode', type=int, default=48, help='batches of 32 episodes that are encoded (%(default)d)')
    p.add_argument('--latent-steps', type=int, default=400, help='updates on latents (%(default)d)')
    p.add_argument('--picture-steps', type=int, default=200, help='updates with pictures (%(default)d)')
    p.add_argument('--study', nargs='*', default=['draws=3', 'head_steps=1200', 'cnn_steps=300', 'judge_images=5000', 'looks_per_group=15'], help='settings of the studies in --cache (%(default)s)')
    p.add_argument('--cache', default='runs/concepts', help='folder of the studies (%(default)s)')
    p.add_argument('--out', type=Path, default=OUT, help='result file (%(default)s)')
    args = p.parse_args()
    torch.set_num_threads(1)
    done = read_json(args.out) if args.out.exists() else dict(torch=torch.__version__, settings={}, several=[], leak=[], heads=[], style=[])
    done['settings'] |= {k: v for k in ('images', 'encode', 'latent_steps', 'picture_steps', 'head_steps', 'cnn_steps', 'study') if (v := getattr(args, k))}
    for part in args.parts:
        for run in args.runs: PARTS[part](Work(run, args, done))


PARTS = dict(several=several, leak=leak, heads=heads, style=style)
if __name__ == '__main__': main()
