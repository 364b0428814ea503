"""CUDA graphs: the same training as without, on a GPU; on a CPU nothing happens."""
import pytest
import torch

from dreamer_wb.core.config import DecoderConfig, DynamicsConfig, EncoderConfig, HeadsConfig, LoopConfig, WorldModelConfig
from dreamer_wb.core.graph import GraphedForward
from dreamer_wb.core.learner import fit
from dreamer_wb.dreamer.world_model import DreamerWorldModel

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def world(device, **keys):
    torch.manual_seed(0)
    conv = dict(depth=4, mults=[1, 2, 4])
    dynamics = DynamicsConfig(stoch=4, classes=4, deter=16, hidden=16, blocks=4, **keys)
    return DreamerWorldModel(WorldModelConfig(size=24, action_dim=2, encoder=EncoderConfig(**conv), decoder=DecoderConfig(**conv),
                                              dynamics=dynamics, heads=HeadsConfig(True, True, 1, 16))).to(device)


def batches(step, B=4, T=5):
    g = torch.Generator().manual_seed(step)
    first = torch.rand(B, T, generator=g) < .2
    return dict(obs=torch.randint(0, 256, (B, T, 3, 24, 24), generator=g, dtype=torch.uint8), act=torch.randn(B, T, 2, generator=g), first=first,
                rew=torch.randn(B, T, generator=g), done=torch.zeros(B, T, dtype=torch.bool))


def test_off_the_gpu_the_switch_changes_nothing():
    rows = []
    for graph in ('off', 'auto'):
        model = world('cpu')
        torch.manual_seed(1)
        rows.append(fit(model, batches, LoopConfig(steps=4, log_every=1, cuda_graph=graph, amp='off', progress=False)).recorder.rows)
        assert 'forward' not in vars(model)
    assert [r['loss'] for r in rows[0]] == [r['loss'] for r in rows[1]]


@gpu
@pytest.mark.parametrize('latent', ['gaussian', 'categorical'])
@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('deferred', [False, True])
def test_replayed_gradients_are_the_eager_ones(latent, amp, deferred, monkeypatch):
    eager, other = world('cuda', latent=latent, deferred=deferred), world('cuda', latent=latent, deferred=deferred)
    for model in (eager, other): monkeypatch.setattr(model.dynamics, 'noise', lambda *lead, sample=True: [None] * lead[0])   # modes: no random numbers
    door = GraphedForward(other, after=1)
    for step in range(4):
        batch = {k: v.cuda() for k, v in batches(step).items()}
        grads = []
        for model, forward in ((eager, eager), (other, door)):
            model.zero_grad()
            with torch.autocast('cuda', torch.bfloat16, enabled=amp): losses, metrics = forward(batch)
            sum(losses[k].float().mean() * s for k, s in model.scales.items()).backward()
            grads.append((losses, [None if p.grad is None else p.grad.clone() for p in model.parameters()]))
        for k in grads[0][0]: torch.testing.assert_close(grads[0][0][k], grads[1][0][k], rtol=1e-2 if amp else 1e-4, atol=1e-3)
        for a, b in zip(grads[0][1], grads[1][1]):
            if a is not None: assert (a - b).norm() <= (5e-2 if amp else 1e-3) * a.norm() + 1e-5
    assert door.replays == 3 and not door.failed
    door({k: v.cuda() for k, v in batches(9, B=2).items()})
    assert door.replays == 3


@gpu
def test_training_with_a_graph_learns():
    model = world('cuda')
    rows = fit(model, batches, LoopConfig(steps=60, log_every=20, lr=3e-3, cuda_graph='auto', progress=False)).recorder.rows
    assert rows[-1]['loss'] < .8 * rows[0]['loss'] and 'forward' not in vars(model)
