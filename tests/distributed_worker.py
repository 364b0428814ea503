"""What each of several processes does in test_distributed.py; its functions also run in one process, for comparison."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fastai.basics import Callback
from torch import nn

from dreamer_wb.core.config import DecoderConfig, DynamicsConfig, EncoderConfig, LoopConfig, WorldModelConfig
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import Run, UserError, is_main, load_checkpoint, on_main, processes
from dreamer_wb.dreamer.world_model import DreamerWorldModel

LOOP = LoopConfig(steps=24, lr=1e-2, log_every=4, eval_every=9, checkpoint_seconds=1e9, tensorboard=False, progress=False, amp='off')


class Net(nn.Module):
    "A small network, with or without noise."
    def __init__(self, noise):
        super().__init__()
        self.net, self.noise, self.scales = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2)), noise, dict(fit=1., small=.1)

    def forward(self, batch):
        y = self.net(batch['obs'] + self.noise*torch.randn_like(batch['obs']))                            # (B,T,2)
        return dict(fit=(y[..., 0] - batch['rew'])**2, small=y[..., 1]**2), dict(size=y.abs().mean())


def batches(step):
    x = np.random.default_rng(step).normal(size=(8, 2, 3)).astype('float32')
    return dict(obs=torch.from_numpy(x), rew=torch.from_numpy(x.sum(-1)))

def bad(step):
    "One sample of the second half is broken."
    batch = batches(step)
    if step == 6: batch['rew'][7] = torch.inf
    return batch


class Valid:
    def __len__(self): return 2
    def batches(self, i): return {k: v[:8 - 3*i] for k, v in batches(1000 + i).items()}


class At(Callback):
    "Does something after a step, in the processes named."
    order = 85
    def __init__(self, step, do, ranks=(0, 1)): self.step_, self.do, self.ranks = step, do, ranks
    def after_batch(self):
        if self.training and self.train_iter == self.step_ and rank() in self.ranks: self.do(self.learn)


class Fixed(DreamerWorldModel):
    "Always in evaluation mode: the most probable latent instead of a drawn one."
    def train(self, mode=True): return super().train(False)


def world_model(kind=DreamerWorldModel):
    return kind(WorldModelConfig(size=16, encoder=EncoderConfig(depth=4, mults=[1, 2]), decoder=DecoderConfig(depth=4, mults=[1, 2]),
                                 dynamics=DynamicsConfig(stoch=8, deter=16, hidden=16, blocks=2)))

def pictures(step):
    "Squares of random colour and place, moving; (8, 3, 3, 16, 16)."
    g, obs = np.random.default_rng([7, step]), np.zeros((8, 3, 3, 16, 16), 'uint8')
    for i in range(8):
        x, y, colour = *g.integers(0, 10, 2), g.integers(50, 255, 3)
        for t in range(3): obs[i, t, :, y:y + 5, x + t:x + t + 4] = colour[:, None, None]
    first = torch.tensor([True, False, False]).expand(8, 3)
    return dict(obs=torch.from_numpy(obs), act=torch.zeros(8, 3, 1), first=first.clone())


def rank(): return processes().process_index if processes() else 0

def crash(learn): raise ZeroDivisionError('dark')

def ask(learn): learn.checkpoint.asked = KeyboardInterrupt()

def save(learn): learn.checkpoint.saved = -1e12


def train(folder, name, model, data=batches, loop=LOOP, cbs=(), valid=Valid()):
    "One command: run, fit. Returns the record's losses and the weights."
    loop = replace(loop)
    run = Run.create(dict(loop=vars(loop)), 'net', folder, name)
    try: learn = fit(model, data, loop, run, valid, cbs)
    finally: run.close()
    return dict(loss=[row['loss'] for row in learn.recorder.rows], valid=[row['valid_loss'] for row in learn.recorder.rows if 'valid_loss' in row],
                weights=[x for p in model.parameters() for x in p.detach().flatten().tolist()], draw=torch.rand(1).item())

def net(noise):
    set_seed(3)
    return Net(noise)

def dream(kind):
    set_seed(3)
    return world_model(kind)

def outcome(function):
    "What it returned, or the name and the words of what it raised."
    try: return function()
    except (UserError, KeyboardInterrupt, ZeroDivisionError) as e: return [type(e).__name__, str(e)]


MODELS = dict(still=lambda folder: train(folder, 'still', net(0.)),
              laprop=lambda folder: train(folder, 'laprop', net(0.), loop=replace(LOOP, opt='laprop', weight_decay=.1)),
              fixed=lambda folder: train(folder, 'fixed', dream(Fixed), pictures, replace(LOOP, lr=2e-3), valid=None),
              dream=lambda folder: train(folder, 'dream', dream(DreamerWorldModel), pictures, replace(LOOP, lr=2e-3, steps=60), valid=None))


def main(folder):
    results = {name: function(folder) for name, function in MODELS.items()}

    results['whole'] = train(folder, 'whole', net(.1))
    results['cut'] = outcome(lambda: train(folder, 'cut', net(.1), cbs=[At(9, save, [0]), At(15, crash)]))
    results['saved_at'] = load_checkpoint(folder/'net'/'cut'/'checkpoints'/'last.ckpt')['meta']['step']
    results['resumed'] = train(folder, 'cut', net(.1))

    results['asked'] = outcome(lambda: train(folder, 'asked', net(0.), cbs=[At(7, ask, [1])]))
    results['asked_at'] = load_checkpoint(folder/'net'/'asked'/'checkpoints'/'last.ckpt')['meta']['step']
    results['nan'] = outcome(lambda: train(folder, 'nan', net(0.), bad))
    results['odd'] = outcome(lambda: train(folder, 'odd', net(0.), lambda step: {k: v[:7] for k, v in batches(step).items()}))
    results['other'] = outcome(lambda: on_main(lambda: 'from the main one') + str(rank()))
    (folder/f'{rank()}.json').write_text(json.dumps(results))
    if rank() == 1: assert not is_main()
    Run.create(dict(loop=dict(steps=1)), 'net', folder, 'whole')                  # another config: an error in the main process, the other one goes quietly


if __name__ == '__main__': main(Path(sys.argv[1]))
