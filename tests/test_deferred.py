"""The fast path of recurrent scans computes what the plain one computes: any length, resets, both latents, bf16, other cells."""
import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dreamer_wb.core.config import DynamicsConfig
from dreamer_wb.core.deferred import deferred
from dreamer_wb.dreamer.networks import mlp
from dreamer_wb.dreamer.rssm import RSSM

E, A = 10, 2


def rssm(latent, norm='rms', **keys):
    torch.manual_seed(0)
    model = RSSM(E, A, DynamicsConfig(latent=latent, stoch=6, classes=5, deter=32, hidden=16, blocks=4, norm=norm, **keys))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))                     # no parameter at a special value
    return model


def run(model, fast, T, B=3, seed=0, bf16=False, sample=True, reset=.2):
    torch.manual_seed(seed)
    embed, act, first = torch.randn(B, T, E, requires_grad=True), torch.randn(B, T, A), torch.rand(B, T) < reset
    state = {k: torch.randn_like(v) for k, v in model.initial(B).items()}
    model.cfg.deferred = fast
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        trace = model.observe(embed, act, first, state, sample)
        losses = model.losses(trace)
        dream = model.imagine(torch.randn(B, 4, A), {k: v[:, -1] for k, v in trace.post.items()}, sample=sample)
    loss = sum(v.sum() for v in losses.values()) + sum(v.square().mean() for v in (*trace.post.values(), *dream.values()))
    return trace, torch.autograd.grad(loss, [embed, *model.parameters()], allow_unused=True)


def close(a, b, rtol):
    if a is None: return b is None
    return (a - b).norm() <= rtol * a.norm() + 1e-6


def agree(model, T, **keys):
    (one, plain), (two, fast) = (run(model, on, T, **keys) for on in (False, True))
    for part in ('post', 'prior'):
        for k, v in getattr(one, part).items(): torch.testing.assert_close(getattr(two, part)[k], v, rtol=1e-5, atol=1e-5)
    for a, b in zip(plain, fast): assert close(a, b, 1e-4)


@pytest.mark.parametrize('latent', ['gaussian', 'categorical'])
def test_every_length_to_64(latent):
    model = rssm(latent)
    for T in (*range(1, 9), 15, 16, 17, 31, 33, 48, 63, 64): agree(model, T, seed=T)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(['gaussian', 'categorical']), st.sampled_from(['rms', 'layer', 'none']), st.integers(1, 12), st.integers(1, 5),
       st.booleans(), st.floats(0, 1), st.integers(0, 99))
def test_any_kind(latent, norm, T, B, sample, reset, seed):
    agree(rssm(latent, norm, obs_layers=seed % 3), T, B=B, sample=sample, reset=reset, seed=seed)


@pytest.mark.parametrize('latent', ['gaussian', 'categorical'])
def test_bf16_is_no_worse_than_plain_bf16(latent):
    "Against float32 gradients; with modes, since one latent drawn otherwise would change everything after it."
    model = rssm(latent)
    for T in (2, 16):
        exact = run(model, False, T, sample=latent == 'gaussian')[1]
        error = lambda grads: torch.stack([(a - b).norm() / (a.norm() + 1e-6) for a, b in zip(exact, grads) if a is not None]).mean().item()
        plain, fast = (error(run(model, on, T, bf16=True, sample=latent == 'gaussian')[1]) for on in (False, True))
        assert fast < max(1.2 * plain, .02), (fast, plain)


class Cell(nn.Module):
    "A GRU, an MLP and a tied linear layer, used twice a step, with an output nobody needs."
    def __init__(self):
        super().__init__()
        self.gru, self.net, self.tied = nn.GRUCell(4, 6), mlp(6, 2, 8, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x, T):
        h = None
        for _ in range(T):
            h = self.gru(self.tied(x), h)
            x = self.tied(x + self.net(h))
            self.net(h)                                                                    # not part of the loss
        return h.square().sum() + x.sum()


@pytest.mark.parametrize('T', [1, 2, 17])
def test_cells_of_any_make(T):
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(5, 4)
    plain = torch.autograd.grad(cell(x, T), cell.parameters())
    with deferred(cell): loss = cell(x, T)
    for a, b in zip(plain, torch.autograd.grad(loss, cell.parameters(), retain_graph=True)): assert close(a, b, 1e-4)
    for a, b in zip(plain, torch.autograd.grad(loss, cell.parameters())): assert close(a, b, 1e-4)          # a second backward pass


def test_frozen_weights_and_a_loss_on_the_first_half():
    cell, x = Cell(), torch.randn(5, 4, requires_grad=True)
    for p in cell.gru.parameters(): p.requires_grad_(False)
    twin = copy.deepcopy(cell)
    with deferred(cell):
        loss = cell(x, 4)
        cell(x, 4)                                                                         # a scan that is dropped
    loss.backward()
    grad, x.grad = x.grad, None
    twin(x, 4).backward()
    assert close(x.grad, grad, 1e-4) and cell.gru.weight_hh.grad is None
    assert close(twin.tied.weight.grad, cell.tied.weight.grad, 1e-4)


def test_an_error_inside_leaves_the_modules_as_they_were():
    cell = Cell()
    with pytest.raises(ZeroDivisionError):
        with deferred(cell): 1 / 0
    assert not any('forward' in vars(m) for m in cell.modules())


@pytest.mark.parametrize('backward', [False, True])
def test_a_dropped_scan_frees_its_memory(backward):
    "Also after a backward pass that never comes to the weights."
    class Box:
        def __init__(self, x): self.x = x
    boxes = []
    def pack(x):
        box = Box(x.detach())                                                              # x itself would hold the graph that holds the box
        boxes.append(weakref.ref(box))
        return box
    cell, x = Cell(), torch.randn(5, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.x), deferred(cell): loss = cell(x, 3)
    if backward: torch.autograd.grad(loss, x, retain_graph=True)
    assert sum(b() is not None for b in boxes) > 20
    del loss
    gc.collect()
    assert not any(b() is not None for b in boxes)
