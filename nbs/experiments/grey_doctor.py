"""Plant every known cause of grey reconstructions, and count how often the doctor names it.

    python nbs/experiments/grey_doctor.py                     # all sets, about 35 CPU minutes
    python nbs/experiments/grey_doctor.py --sets selection    # only the models on which the thresholds were chosen

Each plant is made as a user would make it: a config with a bad value, or a subclass of `DreamerWorldModel` with a wrong loss. The doctor gets the
trained model and 64 held-out images and does not know the plant. `selection` is the set on which the thresholds of `dreamer.collapse` were chosen;
the others differ from it in size, data, kind of latent and seeds.
What is in the result file already is not repeated.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dreamer_wb.core.config import TrainConfig, compose
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import read_json, write_json
from dreamer_wb.data.synthetic import render_many, sample_specs
from dreamer_wb.dreamer.collapse import diagnose, measure
from dreamer_wb.dreamer.distributions import sum_mse
from dreamer_wb.dreamer.representation import ViewsLoss, two_views
from dreamer_wb.dreamer.world_model import DreamerWorldModel, LatentEncoder, read_images

OUT = Path(__file__).resolve().parent/'results'/'grey_doctor.json'


# --- losses as users write them ---

class Own(DreamerWorldModel):
    "A user's subclass with a forward of its own; what is planted overrides one of the small methods."
    def forward(self, batch):
        trace = self.dynamics.observe(self.encoder.embed(self.see(batch)), batch['act'], batch['first'])
        recon = self.decoder(self.read(self.dynamics.feat(trace.post)))
        return {'image': self.compare(recon, batch['obs']), **self.dynamics.losses(trace)}, {}

    def see(self, batch): return read_images(batch['obs'])
    def read(self, feat): return feat
    def compare(self, recon, obs): return sum_mse(recon, read_images(obs))


class MeanMSE(Own):
    def compare(self, recon, obs): return (recon - read_images(obs)).square().mean((-3, -2, -1))

class MeanMSE255(Own):
    def compare(self, recon, obs): return 255. * (recon - read_images(obs)).square().mean((-3, -2, -1))

class SigmoidSigned(Own):      # output in [0, 1], data in [-1, 1]
    def compare(self, recon, obs): return (recon + .5 - (obs.float() / 127.5 - 1)).square().sum((-3, -2, -1))

class TanhBytes(Own):          # output in [-1, 1], data in 0..255
    def compare(self, recon, obs): return (2 * recon - obs.float()).square().sum((-3, -2, -1))

class TanhUnit(Own):           # output in [-1, 1], data in [0, 1]: it can be learned, and is shown in the wrong units
    def compare(self, recon, obs): return (2 * recon - obs.float() / 255).square().sum((-3, -2, -1))

class Detached(Own):
    def read(self, feat): return feat.detach()

class OtherImages(Own):        # targets of other images: a bug in the data loader
    def compare(self, recon, obs): return sum_mse(recon, read_images(obs.roll(1, 0)))

class Blank(Own):              # the encoder gets black images: another one
    def see(self, batch): return torch.full_like(read_images(batch['obs']), -.5)

class BytesEncoder(LatentEncoder):
    def embed(self, image): return super().embed((image + .5) * 255)

class BytesInput(DreamerWorldModel):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.encoder = BytesEncoder(self.encoder.net, self.dynamics)


class Agree(ViewsLoss):        # two views shall agree, and nothing keeps images apart
    def forward(self, batch, image, embed, feat, look):
        a, b = look(two_views(image, self.cfg).flatten(0, 1)).chunk(2)
        return (a - b).square().sum(-1)

def only_agreement(world): world.representation.__class__ = Agree


def layers(module): return [m for m in module.modules() if isinstance(m, (nn.Linear, nn.ConvTranspose2d))]

def zero_decoder(world):
    for layer in layers(world.decoder):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)

def closed_relus(world): nn.init.constant_(layers(world.decoder)[0].bias, -30.)

def freeze_transition(world):
    dyn = world.dynamics
    for part in (dyn.cell, dyn.prior, dyn.in_deter, dyn.in_stoch, dyn.in_act): part.requires_grad_(False)


def kl(x): return [f'scales.dyn={x}', f'scales.rep={x}']
def free(x): return [f'dynamics.free_nats={x}']
def blind(kind, scale): return ['decoder.kind=none', f'representation.kind={kind}', f'scales.representation={scale}']
def norm(x): return [f'encoder.norm={x}', f'decoder.norm={x}']

PLANTS = { # name: (what the doctor should say, class, overrides, change after building, steps of an episode)
    'healthy': ('healthy', DreamerWorldModel, [], None, 1),
    'healthy, own forward': ('healthy', Own, [], None, 1),
    'healthy, free nats 0': ('healthy', DreamerWorldModel, free(0), None, 1),
    'healthy, free nats 3': ('healthy', DreamerWorldModel, free(3), None, 1),
    'healthy, KL weight 1': ('healthy', DreamerWorldModel, kl(1), None, 1),
    'healthy, BatchNorm': ('healthy', DreamerWorldModel, norm('batch'), None, 1),
    'healthy, tanh': ('healthy', DreamerWorldModel, ['decoder.output=tanh'], None, 1),
    'healthy, 4 steps': ('healthy', DreamerWorldModel, [], None, 4),
    'free nats 100': ('healthy', DreamerWorldModel, free(100), None, 1),
    'frozen transition, 1 step': ('healthy', DreamerWorldModel, [], freeze_transition, 1),
    'data -1..1, sigmoid': ('range mismatch', SigmoidSigned, [], None, 1),
    'data 0..255, tanh': ('range mismatch', TanhBytes, ['decoder.output=tanh'], None, 1),
    'data 0..1, tanh': ('range mismatch', TanhUnit, ['decoder.output=tanh'], None, 1),
    '0..255 input': ('0..255 input', BytesInput, [], None, 1),
    'mean MSE': ('averaged pixel loss', MeanMSE, [], None, 1),
    'mean MSE, KL weight 1': ('averaged pixel loss', MeanMSE, kl(1) + free(0), None, 1),
    '255 x mean MSE': ('averaged pixel loss', MeanMSE255, [], None, 1),
    '255 x mean MSE, KL weight 1': ('averaged pixel loss', MeanMSE255, kl(1) + free(0), None, 1),
    'KL weight 10': ('KL scale too high', DreamerWorldModel, kl(10), None, 1),
    'KL weight 100': ('KL scale too high', DreamerWorldModel, kl(100), None, 1),
    'decoder starts at zero': ('dead decoder', DreamerWorldModel, [], zero_decoder, 1),
    'closed ReLUs': ('dead decoder', DreamerWorldModel, ['decoder.act=relu'], closed_relus, 1),
    'detached latent': ('cut gradient', Detached, [], None, 1),
    'decoder depth 1': ('decoder too small', DreamerWorldModel, ['decoder.depth=1'], None, 1),
    'BatchNorm, batch 1': ('BatchNorm at batch 1', DreamerWorldModel, norm('batch') + ['batch_size=1'], None, 1),
    'frozen transition, 4 steps': ('untrained transition', DreamerWorldModel, [], freeze_transition, 4),
    'free nats 100, 4 steps': ('free nats too high', DreamerWorldModel, free(100), None, 4),
    **{f'healthy, {kind} without decoder': ('healthy', DreamerWorldModel, blind(kind, scale), None, 1) for kind, scale in (('r2', .3), ('infonce', 10), ('barlow', .3), ('simclr', 30))},
    'no loss, no decoder': ('no signal', DreamerWorldModel, ['decoder.kind=none'], None, 1),
    'r2 of scale 0, no decoder': ('no signal', DreamerWorldModel, blind('r2', 0), None, 1),
    'only agreement, no decoder': ('collapsed latent', DreamerWorldModel, blind('simclr', 1), only_agreement, 1),
    'only agreement, no KL, no decoder': ('collapsed latent', DreamerWorldModel, blind('simclr', 1) + kl(0), only_agreement, 1),
    'KL weight 100, no decoder': ('KL scale too high', DreamerWorldModel, blind('r2', .3) + kl(100), None, 1),
    'targets of other images': ('unknown', OtherImages, [], None, 1),
    'encoder sees black': ('unknown', Blank, [], None, 1),
}

ONCE = 'healthy, own forward', 'healthy, free nats 0', 'healthy, free nats 3', 'frozen transition, 1 step'     # in the selection set only


def both(key, value): return [f'encoder.{key}={value}', f'decoder.{key}={value}']

BASE = ['dynamics.stoch=32', 'dynamics.deter=64', 'dynamics.hidden=64', 'dynamics.obs_layers=0', 'loop.lr=2e-3', 'loop.schedule=cosine',
        'loop.clip=1000', 'loop.warmup=.03', 'loop.eval_every=0', 'loop.progress=false', 'loop.log_every=1000']

SETS = { # name: (size, data, difficulty, seeds, updates, overrides)
    'selection': (32, 'birds', 'default', (0, 1, 2), 200, both('depth', 8) + both('mults', '[1,2,4]')),
    'categorical, 48 px, hard': (48, 'birds', 'hard', (10, 11, 12), 160, both('depth', 12) + both('mults', '[1,2]') + ['dynamics.latent=categorical', 'dynamics.stoch=16', 'dynamics.classes=16']),
    'photographs, 40 px': (40, 'photographs', None, (20, 21, 22), 160, both('depth', 8) + both('mults', '[1,2,3]') + ['dynamics.stoch=48', 'dynamics.hidden=96']),
    '96 px, easy': (96, 'birds', 'easy', (30, 31, 32), 120, both('depth', 8) + both('mults', '[1,2,4,4]') + ['batch_size=16', 'dynamics.stoch=24']),
}


def photographs(n, size, seed):
    "Random crops of the two photographs that come with scikit-learn, each at half its resolution."
    from sklearn.datasets import load_sample_images
    rng, photos = np.random.default_rng([seed, 5]), [p[::2, ::2] for p in load_sample_images().images]
    def crop():
        photo = photos[rng.integers(2)]
        y, x = (rng.integers(0, s - size) for s in photo.shape[:2])
        return photo[y:y + size, x:x + size]
    return np.stack([crop() for _ in range(n)])


def pictures(kind, size, difficulty, seed):
    "1,000 training and 64 held-out images (N, 3, H, W)."
    if kind == 'birds': x = render_many(sample_specs(2600, seed=seed)['train'][:1064], size, difficulty)[0]
    else: x = photographs(1064, size, seed)
    x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    return x[:1000], x[1000:]


def episodes(obs, T):
    "Still images as episodes of `T` equal steps."
    n = len(obs)
    return dict(obs=obs.unsqueeze(1).expand(-1, T, -1, -1, -1).contiguous(), act=torch.zeros(n, T, 1), first=(torch.arange(T) == 0).expand(n, T).contiguous())


def run(plant, set_name, seed, images):
    "Train one planted model and ask the doctor."
    (expected, cls, overrides, change, T), (size, _, _, _, steps, base) = PLANTS[plant], SETS[set_name]
    cfg = compose(TrainConfig, [f'size={size}', *BASE, *base, *overrides, f'loop.steps={steps}'])
    start = time.process_time()
    set_seed(seed)
    world = cls(cfg)
    if change: change(world)
    train, test = images
    B = cfg.batch_size if T == 1 or cfg.batch_size == 1 else cfg.batch_size // 2
    fit(world, lambda step: episodes(train[np.random.default_rng([seed, step]).integers(0, len(train), B)], T), cfg.loop)
    trained = time.process_time()
    measured = measure(world, episodes(test, T))
    found = diagnose(measured)
    return dict(plant=plant, expected=expected, found=found.cause, seed=seed, cpu_train=round(trained - start, 2), cpu_doctor=round(time.process_time() - trained, 2), measurements=measured)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sets', nargs='+', default=list(SETS), choices=list(SETS), help='which sets')
    parser.add_argument('--plants', nargs='+', default=list(PLANTS), help='which plants')
    parser.add_argument('--seeds', nargs='+', type=int, help='only these seeds')
    parser.add_argument('--out', type=Path, default=OUT, help='result file (%(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = read_json(args.out) if args.out.exists() else dict(torch=torch.__version__, results={})
    for name in args.sets:
        size, kind, difficulty, seeds, *_ = SETS[name]
        rows = done['results'].setdefault(name, [])
        for seed in args.seeds or seeds:
            todo = [p for p in args.plants if not (name != 'selection' and p in ONCE) and not any(r['plant'] == p and r['seed'] == seed for r in rows)]
            images = pictures(kind, size, difficulty, seed) if todo else None
            for plant in todo:
                rows.append(run(plant, name, seed, images))
                row = rows[-1]
                print(f'{name}, seed {seed}: {plant:28} {"right" if row["found"] == row["expected"] else "WRONG"}: {row["found"]}', flush=True)
                write_json(args.out, done)


if __name__ == '__main__': main()
