"""Behaviour of the world model that users rely on: their own snippets, checkpoints, interrupted runs, bad input."""
import copy
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from dreamer_wb.core.config import (DecoderConfig, DreamerConfig, DynamicsConfig, EncoderConfig, HeadsConfig, LoopConfig, TrainConfig,
                                    WorldModelConfig, compose, presets, to_dict, unknown_keys)
from dreamer_wb.core.runs import UserError, read_json, save_checkpoint
from dreamer_wb.data.episodes import EpisodeStore, image_to_float, write_episode
from dreamer_wb.dreamer.world_model import DreamerWorldModel, image_report, train_world_model

HEADS = HeadsConfig(reward=True, cont=True, units=16)


def small(**keys):
    "Keywords of a config with a model of 24-pixel images that updates in milliseconds."
    return dict(size=24, encoder=EncoderConfig(depth=4, mults=[1, 2, 4]), decoder=DecoderConfig(depth=4, mults=[1, 2, 4]),
                dynamics=DynamicsConfig(stoch=8, classes=4, deter=32, hidden=32, blocks=4)) | keys


@pytest.fixture(scope='module')
def episodes(tmp_path_factory):
    "40 + 12 still images whose colour and brightness vary."
    root, rng = tmp_path_factory.mktemp('episodes'), np.random.default_rng(0)
    for split, n in (('train', 40), ('val', 12)):
        for i in range(n):
            colour, ramp = rng.integers(0, 200, 3), np.linspace(0, 55, 24)[:, None, None]
            obs = (colour + ramp + np.zeros((24, 24, 3))).astype(np.uint8)
            write_episode(root/split/f'{i:03d}.npz', obs[None], label=i % 2, place=i // 2 % 2)
    return root


def config(episodes, tmp_path, steps=30, **keys):
    loop = LoopConfig(steps=steps, lr=1e-2, log_every=10, eval_every=10, checkpoint_seconds=0., progress=False, tensorboard=False, amp='off')
    return TrainConfig(**small(experiment='test', name='run', runs_dir=str(tmp_path/'runs'), data_dir=str(episodes), batch_size=8, loop=loop) | keys)


# --- the snippets of the users' documents (seeds 000 and 002) ---

EXTRACT = """
world = DreamerWorldModel.load_from_checkpoint('world_model.ckpt').eval().cuda()
with torch.no_grad():
    z = world.encoder(img_batch.cuda())[0]  # stoch 部
"""
HEAD = """
head = nn.Sequential(nn.Linear(latent_dim,256), nn.ReLU(), nn.Linear(256,2))
loss = nn.CrossEntropyLoss()
"""
DREAM = """
zs = world.rollout(z0, actions=a_seq)
images = world.decoder(zs)
"""


@pytest.mark.parametrize('size', [64, 224])
def test_the_users_snippets_run_verbatim(tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    DreamerWorldModel(WorldModelConfig(size=size, encoder=EncoderConfig(depth=8), decoder=DecoderConfig(depth=8))).save('world_model.ckpt')
    cuda = torch.cuda.is_available()
    space = dict(DreamerWorldModel=DreamerWorldModel, torch=torch, nn=nn, img_batch=torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8))
    exec(EXTRACT if cuda else EXTRACT.replace('.cuda()', ''), space)
    z = space['z']
    assert z.shape == (4, 64) and not z.requires_grad
    space['latent_dim'] = z.shape[1]
    exec(HEAD, space)
    logits = space['head'](z.cpu())
    space['loss'](logits, torch.tensor([0, 1, 1, 0])).backward()
    space |= dict(z0=z, a_seq=torch.zeros(8, 1))
    with torch.no_grad(): exec(DREAM, space)
    assert space['zs'].shape == (4, 8, 64 + 256)
    assert space['images'].shape == (4, 8, 3, size, size) and space['images'].abs().max() <= .5


def test_eval_is_deterministic_and_train_samples():
    torch.manual_seed(0)
    world = DreamerWorldModel(WorldModelConfig(**small()))
    obs = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    assert not torch.equal(world.encoder(obs)[0], world.encoder(obs)[0])
    world.eval()
    assert torch.equal(world.encoder(obs)[0], world.encoder(obs)[0])
    assert torch.equal(world.encoder(obs).stoch, world.encoder(obs).state['mean'])
    assert torch.equal(world.encoder(obs)[0], world.encoder(obs[:, None])[0][:, 0]), 'a still is an episode of length 1'


def test_a_copy_shares_nothing():
    world = DreamerWorldModel(WorldModelConfig(**small()))
    twin = copy.deepcopy(world)
    assert twin.encoder.dynamics is twin.dynamics is twin.decoder.dynamics is not world.dynamics
    names = [n for n, _ in world.named_parameters()]
    assert len(names) == len(set(world.state_dict())) == len(set(names)), 'every weight is stored once'


def test_images_of_other_kinds_are_refused():
    world = DreamerWorldModel(WorldModelConfig(**small())).eval()
    obs = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    with pytest.raises(TypeError, match='uint8'): world.encoder(image_to_float(obs))
    with pytest.raises(UserError, match='channels first'): world.encoder(obs.permute(0, 2, 3, 1))
    with pytest.raises(UserError, match='expected .N, 3, 24, 24'): world.encoder(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(UserError, match='expected'): world.encoder(obs[0])
    with pytest.raises(UserError, match='use size 48, 64'): DreamerWorldModel(WorldModelConfig(size=100))


# --- every combination that the config offers ---

@pytest.mark.parametrize('latent', ['gaussian', 'categorical'])
@pytest.mark.parametrize('kind,kernel', [('strided', 4), ('pool', 5)])
@pytest.mark.parametrize('norm', ['none', 'layer', 'group', 'batch', 'rms'])
def test_every_part_gets_a_gradient(latent, kind, kernel, norm):
    torch.manual_seed(0)
    net = dict(kind=kind, kernel=kernel, norm=norm, depth=4, mults=[1, 2, 4])
    cfg = small(encoder=EncoderConfig(**net), decoder=DecoderConfig(**net), heads=HEADS)
    cfg['dynamics'].latent, cfg['dynamics'].free_nats = latent, 0.
    world = DreamerWorldModel(WorldModelConfig(**cfg))
    cfg['dynamics'].latent = 'gaussian'
    first = torch.zeros(3, 4, dtype=torch.bool)
    first[:, 0] = first[1, 2] = True
    batch = dict(obs=torch.randint(0, 256, (3, 4, 3, 24, 24), dtype=torch.uint8), act=torch.randn(3, 4, 1), first=first,
                 rew=torch.randn(3, 4), done=torch.zeros(3, 4, dtype=torch.bool))
    losses, metrics = world(batch)
    assert losses.keys() == world.scales.keys() and all(v.shape == (3, 4) and v.isfinite().all() for v in losses.values())
    assert all(v.ndim == 0 for v in metrics.values())
    sum(world.scales[k] * v.mean() for k, v in losses.items()).backward()
    zero_start = 'heads.reward.0', 'heads.reward.1'                        # below a head that starts at zero
    missing = [n for n, p in world.named_parameters() if (p.grad is None or not p.grad.any()) and not n.startswith(zero_start)]
    assert not missing


@pytest.mark.parametrize('name', [name for name in sorted(presets()) if not unknown_keys(TrainConfig, [f'experiment={name}'])])
def test_presets_build(name):
    cfg = compose(TrainConfig, [f'experiment={name}'])
    with torch.device('meta'): world = DreamerWorldModel(cfg)
    assert world.dynamics.n_feat > 0


# --- checkpoints ---

def test_a_checkpoint_names_classes_of_ours_only(tmp_path):
    world = DreamerWorldModel(WorldModelConfig(**small()))
    path = tmp_path/'world_model.ckpt'
    world.save(path)
    data = torch.load(path, weights_only=True)
    data['config']['dynamics']['name'] = 'os.system'
    torch.save(data, path)
    with pytest.raises(UserError, match='os.system'): DreamerWorldModel.load_from_checkpoint(path)


def test_damaged_checkpoints_are_one_line(tmp_path):
    world, path = DreamerWorldModel(WorldModelConfig(**small())), tmp_path/'world_model.ckpt'
    world.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match='world_model.ckpt') as e: DreamerWorldModel.load_from_checkpoint(path)
    assert '\n' not in str(e.value)
    state = world.state_dict()
    state.pop('decoder.net.inner.weight')
    save_checkpoint(path, 'world_model', to_dict(world.cfg), state)
    with pytest.raises(UserError, match='do not fit') as e: DreamerWorldModel.load_from_checkpoint(path)
    assert '\n' not in str(e.value)


# --- training ---

def test_training_leaves_a_model_that_reconstructs(episodes, tmp_path):
    wide = dict(encoder=EncoderConfig(depth=8, mults=[1, 2, 4]), decoder=DecoderConfig(depth=8, mults=[1, 2, 4]))
    run = train_world_model(config(episodes, tmp_path, steps=150, **wide))
    world = DreamerWorldModel.load_from_checkpoint(run.checkpoints/'world_model.ckpt').eval()
    report = read_json(run.path/'world_model.json')
    assert set(report) == {'n', 'psnr', 'psnr_mean_image', 'psnr_shuffled', 'std_ratio', 'chroma_ratio', 'kl', 'active_units'}
    assert report['n'] == 12 and report['psnr'] > report['psnr_mean_image'] + 3 > report['psnr_shuffled'] + 3
    assert .6 < report['std_ratio'] < 1.2
    again = image_report(world, EpisodeStore(episodes/'val'))
    assert again == pytest.approx(report, rel=1e-4)
    pictures = sorted(p.name for p in run.figures.glob('*.png'))
    assert pictures[0] == 'reconstructions.png' and len(pictures) == 1 + 15
    other = DreamerWorldModel.load_from_checkpoint(run.checkpoints/'last.ckpt').eval()              # the loop's own checkpoint works too
    assert torch.equal(other.encoder.net.stages[0][0].weight, world.encoder.net.stages[0][0].weight)
    before = (run.checkpoints/'world_model.ckpt').stat().st_mtime_ns
    assert train_world_model(config(episodes, tmp_path, steps=150, **wide)).done('train')                    # finished: nothing to do
    assert (run.checkpoints/'world_model.ckpt').stat().st_mtime_ns == before


@pytest.mark.parametrize('keys', [dict(repeat=8), dict(repeat=8, batch_length=8), dict(batch_length=1)])
def test_repeats_train(episodes, tmp_path, keys):
    assert train_world_model(config(episodes, tmp_path, steps=3, **keys)).done('train')


def test_interrupted_training_ends_where_the_uninterrupted_one_does(episodes, tmp_path):
    whole = train_world_model(config(episodes, tmp_path, name='whole'))
    script = textwrap.dedent(f'''
        import os, torch
        from tests.test_world_model import config
        from dreamer_wb.dreamer import world_model as w
        from pathlib import Path
        torch.set_num_threads(1)
        save = w.save_pictures
        def killed(world, store, path, n=10):
            if '000020' in str(path): os._exit(9)
            save(world, store, path, n)
        w.save_pictures = killed
        w.train_world_model(config(Path({str(episodes)!r}), Path({str(tmp_path)!r}), name='killed'))
    ''')
    assert subprocess.run([sys.executable, '-c', script], capture_output=True).returncode == 9
    killed = train_world_model(config(episodes, tmp_path, name='killed'))
    a, b = (DreamerWorldModel.load_from_checkpoint(r.checkpoints/'world_model.ckpt').state_dict() for r in (whole, killed))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('keys,message', [
    (dict(data_dir=''), 'data_dir'), (dict(data_dir='nowhere'), 'nowhere'), (dict(size=48), 'size=48'), (dict(action_dim=3), 'action_dim=1'),
    (dict(device='cuda:99'), 'device'), (dict(repeat=4, batch_length=8), 'repeat=4'), (dict(dreamer=DreamerConfig(use_policy=True)), 'use_policy')])
def test_what_a_user_can_mend_is_said_in_one_line(episodes, tmp_path, keys, message):
    with pytest.raises(UserError, match=message) as e: train_world_model(config(episodes, tmp_path, **keys))
    assert '\n' not in str(e.value)
