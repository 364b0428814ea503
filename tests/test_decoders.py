"""Decoders inside a world model: any config, checkpoints, gradients, training in bfloat16."""
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from dreamer_wb.core.config import DecoderConfig, DynamicsConfig, EncoderConfig, LoopConfig, WorldModelConfig
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import UserError
from dreamer_wb.dreamer.decoders import DECODERS, count_parameters, image_decoder
from dreamer_wb.dreamer.world_model import DreamerWorldModel

KINDS = [(kind, out) for kind in DECODERS for out in ('sigmoid', 'logistic_mixture')]


def config(kind, out, **more):
    decoder = DecoderConfig(kind=kind, output=out, mixtures=2, kernel=5 if kind == 'pool' else 4, depth=4, mults=[1, 2, 4], **more)
    return WorldModelConfig(size=24, encoder=EncoderConfig(depth=4, mults=[1, 2, 4]), decoder=decoder,
                            dynamics=DynamicsConfig(stoch=8, deter=32, hidden=32, free_nats=0.))


def batch(n=4, seed=0):
    obs = torch.randint(0, 256, (n, 1, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return dict(obs=obs, act=torch.zeros(n, 1, 1), first=torch.ones(n, 1, dtype=torch.bool))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(KINDS), st.integers(8, 72), st.integers(1, 7), st.lists(st.integers(1, 4), min_size=1, max_size=3),
       st.integers(0, 12), st.sampled_from(['none', 'layer', 'group', 'batch', 'rms']), st.integers(1, 3))
def test_any_config_draws_or_says_why(kind, size, depth, mults, patch, norm, mixtures):
    cfg = DecoderConfig(kind=kind[0], output=kind[1], depth=depth, mults=mults, patch=patch, norm=norm, mixtures=mixtures, kernel=5 if kind[0] == 'pool' else 4)
    try: decoder = image_decoder(size, 5, cfg)
    except UserError as e:
        assert str(size) in str(e) and '\n' not in str(e)
        return
    net_out = decoder.net_out(torch.randn(2, 5))
    target = torch.randint(0, 256, (2, 3, size, size)) / 255 - .5
    assert net_out.shape == (2, decoder.output.channels, size, size) and decoder.output(net_out).shape == (2, 3, size, size)
    assert decoder.image_loss(net_out, target).isfinite().all()
    assert count_parameters(size, 5, cfg) == sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize('kind,out', KINDS)
def test_checkpoints_and_gradients(kind, out, tmp_path):
    torch.manual_seed(0)
    world, data = DreamerWorldModel(config(kind, out)), batch()
    opt = torch.optim.SGD(world.parameters(), 1e-4)
    for _ in range(2):                                                      # what starts at zero hides what is below it in the first step
        losses, metrics = world(data)
        opt.zero_grad()
        sum(world.scales[k] * v.mean() for k, v in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_(world.parameters(), 10.)
        opt.step()
    assert not [n for n, p in world.decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert world.encoder.net.stages[0][0].weight.grad.any() and metrics['psnr'].isfinite()
    world.save(tmp_path/'world_model.ckpt')
    again, obs = DreamerWorldModel.load_from_checkpoint(tmp_path/'world_model.ckpt').eval(), data['obs'][:, 0]
    assert torch.equal(again.reconstruct(obs), world.eval().reconstruct(obs))


@pytest.mark.parametrize('kind,out', [('unet', 'sigmoid'), ('vit', 'sigmoid'), ('residual', 'logistic_mixture')])
def test_training_in_bfloat16_learns(kind, out):
    set_seed(0)
    world, data = DreamerWorldModel(config(kind, out)), batch()
    fit(world, lambda step: data, LoopConfig(steps=60, lr=3e-3, amp='bf16', log_every=10, eval_every=0, clip=1000, progress=False))
    start = DreamerWorldModel(dataclasses.replace(config(kind, out)))(data)[0]['image'].mean()
    assert world(data)[0]['image'].mean() < .95 * start and math.isfinite(start)
