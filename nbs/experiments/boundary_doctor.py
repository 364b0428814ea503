"""Plant every known way in which boundaries die, and count how often the doctor names it.

    python nbs/experiments/boundary_doctor.py                          # all sets, about 6 CPU minutes
    python nbs/experiments/boundary_doctor.py --sets 'VTA, one ball'   # one of them

Each plant is a real, short training with what a user might write: a config with a bad value, a detector that starts at one end, or a subclass that forgot a detach. The doctor gets the trained
model, its saved settings and 64 held-out sequences; it does not know the plant. The thresholds of `vta.inspect` were chosen on the `selection` sets; the others differ in data and seeds.
What is in the result file already is not repeated.
"""
import argparse
import time
from pathlib import Path

import torch
from filelock import FileLock

from dreamer_wb.core.config import TrainConfig, from_dict, to_dict
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import read_json, write_json
from dreamer_wb.dreamer.world_model import DreamerWorldModel
from dreamer_wb.vta.bouncing_balls import bouncing_balls, color_patterns
from dreamer_wb.vta.dynamics import HierarchicalDynamics, key
from dreamer_wb.vta.figures import boundary_settings
from dreamer_wb.vta.inspect import boundary_checkup, diagnose_boundaries
from dreamer_wb.vta.model import VTA, VTATrainConfig, vta_batches

OUT = Path(__file__).resolve().parent/'results'/'boundary_doctor.json'


# --- mistakes that are no config ---

class LeakyVTA(VTA):
    "The KL of the upper latent times the boundary, with its gradient."
    def losses(self, trace, target):
        return super().losses(trace, target) | dict(kl_abs=trace.z[0].kl(trace.z[1])*trace.read)


class LeakyHierarchy(HierarchicalDynamics):
    "The same in a world model."
    def level_kl(self, trace, level):
        out = super().level_kl(trace, level)
        return {k: v*trace.post[key(level, 'boundary')][..., 0] for k, v in out.items()} if level else out


def start_at(model, logit):
    "Where the detector begins: READ for positive, COPY for negative logits."
    last = model.post_boundary.layers[-1] if isinstance(model, VTA) else model.dynamics.clocks[0].posterior.rest[-1]
    last = last if hasattr(last, 'bias') else last[-1]
    with torch.no_grad(): last.bias.copy_(torch.tensor([logit, -logit])/2)


# name: (what the doctor should say, config, start of the detector, leaky, share of the updates)
VTA_PLANTS = {
    'healthy': ('healthy', {}, 0, False, 1.5),
    'seg_len=1': ('all READ', dict(seg_len=1), 0, False, 5.),
    'starts at READ': ('all READ', {}, 12, False, .25),
    'seg_num=1': ('all COPY', dict(seg_num=1, seg_len=99), 0, False, 5.),
    'starts at COPY': ('all COPY', {}, -12, False, .25),
    'KL not detached, weight 30': ('all COPY', {}, 0, True, 5.),
    'posterior limited to 3 frames': ('periodic by force', dict(regularise='posterior', seg_len=3, seg_num=99), -8, False, .3),
    'posterior limited to 3 segments': ('front-loaded', dict(regularise='posterior', seg_num=3, seg_len=99), 3, False, .3),
    'not trained': ('unknown', {}, 0, False, 0.),
}


def wish(rate): return dict(boundary_rate=rate, boundary_scale=5.)

WORLD_PLANTS = {
    'healthy': ('healthy', dict(boundary_rate=.2, boundary_scale=1.), 0, False, 1.5),
    'boundary_rate=.97': ('all READ', wish(.97), 0, False, 1.),
    'starts at READ': ('all READ', {}, 14, False, .25),
    'boundary_rate=.005': ('all COPY', wish(.005), 0, False, 1.),
    'starts at COPY': ('all COPY', {}, -14, False, .25),
    'KL not detached, weight 3': ('all COPY', {}, 0, True, 3.),
    'posterior limited to 4 frames': ('periodic by force', dict(constrain='posterior', max_seg_len=4, boundary_force_scale=20.), -10, False, .3),
    'posterior limited to 3 segments': ('front-loaded', dict(wish(.97), constrain='posterior', max_seg_num=3, max_seg_len=0, boundary_force_scale=20.), 4, False, 1.),
    'not trained': ('unknown', {}, 0, False, 0.),
}

BALL, SMALL_BALL = dict(balls=1, radius=8., speed=2., noise=.05), dict(balls=1, radius=4., speed=1., noise=.02)
SETS = { # name: (model, data, seeds, updates); the doctor's thresholds were chosen on those marked by `selection`
    'VTA, one ball': ('vta', 'ball', (0, 1, 2), 40),
    'hierarchy, one ball': ('world', 'ball', (0, 1, 2), 40),
    'VTA, Simple Colors': ('vta', 'colours', (10, 11, 12), 40),
    'hierarchy, Simple Colors': ('world', 'colours', (10, 11, 12), 40),
}
SELECTION = ('VTA, one ball', 'hierarchy, one ball')


def train_vta(data, seed, steps, plant):
    "A VTA with a plant, its settings, and 64 held-out sequences."
    _, change, logit, leaky, share = plant
    shape = dict(env_type='bouncing_balls', balls=BALL, seq_size=12, init_size=2, seg_num=2, seg_len=12) if data == 'ball' else dict(env_type='simple_colors', seq_size=18, init_size=3, seg_num=6, seg_len=8)
    loop = dict(steps=max(1, round(steps*share)), lr=4e-3, log_every=1000, eval_every=0, progress=False, tensorboard=False, threads=1)
    cfg = from_dict(VTATrainConfig, dict(shape, belief_size=8, state_size=4, batch_size=6, eval_size=64, beta_anneal=2, seed=seed, loop=loop) | change)
    set_seed(seed)
    model, (batches, valid) = (LeakyVTA if leaky else VTA)(cfg), vta_batches(cfg)
    if leaky: model.scales = dict(model.scales, kl_abs=30.)
    if logit: start_at(model, logit)
    if share: fit(model, batches, cfg.loop)
    return model, boundary_settings(to_dict(cfg)), dict(obs=valid[0]['obs'])


def sequences(data, n, seed, steps=12):
    "A batch as a world model reads it."
    made = bouncing_balls(n, steps, seed, size=16, **SMALL_BALL) if data == 'ball' else color_patterns(n, steps, seed, size=16)
    first = torch.zeros(n, steps, dtype=torch.bool)
    first[:, 0] = True
    return dict(obs=torch.from_numpy(made['obs']).permute(0, 1, 4, 2, 3).contiguous(), act=torch.zeros(n, steps, 1), first=first, rew=torch.zeros(n, steps), done=torch.zeros_like(first))


def train_world(data, seed, steps, plant):
    "A world model with a hierarchy and a plant, its settings, and 64 held-out sequences."
    _, change, logit, leaky, share = plant
    hierarchy = dict(dict(max_seg_len=10, max_duration=12), **change)
    net, loop = dict(depth=4, mults=[1, 2]), dict(steps=max(1, round(steps*share)), lr=6e-3, log_every=1000, eval_every=0, progress=False, tensorboard=False, threads=1)
    cfg = from_dict(TrainConfig, dict(size=16, encoder=net, decoder=net, seed=seed, loop=loop,
                                      dynamics=dict(name='hierarchy', stoch=4, deter=16, hidden=16, blocks=2, free_nats=0., hierarchy=hierarchy), **(dict(scales=dict(dyn=3., rep=3.)) if leaky else {})))
    set_seed(seed)
    world = DreamerWorldModel(cfg)
    if leaky: world.dynamics.__class__ = LeakyHierarchy
    if logit: start_at(world, logit)
    if share: fit(world, lambda step: sequences(data, 6, [seed, 0, step]), cfg.loop)
    return world, boundary_settings(to_dict(cfg), 1), sequences(data, 64, [seed, 1])


def one(name, plant, seed):
    "Train and diagnose; a plain record."
    kind, data, _, steps = SETS[name]
    plants, train = (VTA_PLANTS, train_vta) if kind == 'vta' else (WORLD_PLANTS, train_world)
    start = time.process_time()
    model, settings, batch = train(data, seed, steps, plants[plant])
    found = boundary_checkup(model, batch, settings)
    return dict(set=name, plant=plant, seed=seed, planted=plants[plant][0], found=found.cause, text=str(found), measurements=found.measurements, cpu_seconds=round(time.process_time() - start, 2))


def diagnosed(records):
    "The records with the diagnoses that the table gives now."
    return [dict(r, found=(d := diagnose_boundaries(r['measurements'])).cause, text=str(d)) for r in records]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sets', nargs='*', default=list(SETS), choices=list(SETS), metavar='SET', help=f'which: {"; ".join(SETS)}')
    parser.add_argument('--plants', nargs='*', help='only these')
    parser.add_argument('--seeds', nargs='*', type=int, help='only these')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.sets:
        for plant in VTA_PLANTS if SETS[name][0] == 'vta' else WORLD_PLANTS:
            for seed in (s for s in SETS[name][2] if (not args.plants or plant in args.plants) and (not args.seeds or s in args.seeds)):
                done = read_json(OUT) if OUT.exists() else []
                if any((r['set'], r['plant'], r['seed']) == (name, plant, seed) for r in done): continue
                record = one(name, plant, seed)
                with FileLock(f'{OUT}.lock'): write_json(OUT, [*(read_json(OUT) if OUT.exists() else []), record])
                print(f'{name:26} {plant:32} {seed:3} {record["planted"]:18} {record["found"]:18} {record["cpu_seconds"]:6.1f} s', flush=True)


if __name__ == '__main__': main()
