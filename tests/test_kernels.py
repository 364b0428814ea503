"Kernels compiled by numba: where they are used, where torch's own layers are, and what they leave on the disk."
import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import dreamer_wb.core.kernels as kernels
from dreamer_wb.core.kernels import NormELU, ToRGB, WholeConv, WholeConvTranspose, fits


@pytest.fixture
def one_thread():
    old = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(old)


@pytest.fixture
def calls(monkeypatch, one_thread):
    "Names of the kernels that were called."
    names = []
    for name in ('norm_elu', 'norm_elu_grad', 'lay_over'):
        def spy(*args, name=name, kernel=getattr(kernels, name)):
            names.append(name)
            return kernel(*args)
        monkeypatch.setattr(kernels, name, spy)
    return names


def net(): return nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1, bias=False), NormELU(6), ToRGB(6)).to(memory_format=torch.channels_last)


def test_used_in_float32_training_on_one_thread_only(calls):
    x = torch.randn(4, 3, 8, 8)
    net()(x).sum().backward()
    assert calls == ['norm_elu', 'lay_over', 'norm_elu_grad']
    calls.clear()
    with torch.autocast('cpu', torch.bfloat16): net()(x).sum().backward()
    net().double()(x.double()).sum().backward()
    torch.set_num_threads(2)
    net()(x).sum().backward()
    assert calls == []
    torch.set_num_threads(1)
    net().eval()(x)
    assert calls == ['lay_over']                                           # which has no statistics


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_not_used_on_a_gpu(one_thread):
    assert not fits(torch.zeros(1, device='cuda'))
    net().cuda()(torch.randn(4, 3, 8, 8, device='cuda')).sum().backward()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 7), st.integers(1, 7), st.booleans(), st.floats(-50, 50), st.integers(0, 2**31))
def test_any_shape_and_layout(n, channels, height, width, last, mean, seed):
    "Output and gradients of torch's layers in float64; contiguous, channels_last, strided and expanded inputs and gradients."
    if n*height*width == 1: return
    torch.manual_seed(seed)
    old, _ = torch.get_num_threads(), torch.set_num_threads(1)
    ours = NormELU(channels)
    theirs = nn.Sequential(nn.BatchNorm2d(channels), nn.ELU()).double()
    theirs[0].load_state_dict(ours.state_dict())
    x = mean + torch.randn(2*n, channels, height, width)[::2]
    if last: x = x.contiguous(memory_format=torch.channels_last)
    gy = torch.randn(n, 1, height, width).expand(x.shape)
    x, x64 = x.requires_grad_(), x.detach().double().requires_grad_()
    y, y64 = ours(x), theirs(x64)
    got = [y, *torch.autograd.grad(y, [x, *ours.parameters()], gy), ours.running_mean, ours.running_var]
    want = [y64, *torch.autograd.grad(y64, [x64, *theirs.parameters()], gy.double()), theirs[0].running_mean, theirs[0].running_var]
    torch.set_num_threads(old)
    noise = 1e-5 * (1 + abs(mean))                                         # the input itself is rounded to 24 bits
    for a, b in zip(got, want): assert torch.allclose(a.double(), b, rtol=1e-4, atol=noise * max(1, b.abs().max().item(), (n*height*width)**.5))


def test_the_same_state_as_torchs(one_thread):
    "Checkpoints of either load into the other, and evaluation is the same to the bit."
    ours, theirs = NormELU(4), nn.BatchNorm2d(4)
    for _ in range(3): ours(torch.randn(8, 4, 3, 3))
    theirs.load_state_dict(ours.state_dict())
    assert theirs.num_batches_tracked == 3
    x = torch.randn(8, 4, 3, 3)
    assert torch.equal(ours.eval()(x), nn.functional.elu(theirs.eval()(x)))
    copy.deepcopy(ours).load_state_dict(theirs.state_dict())


def test_other_sizes_are_convolutions(one_thread):
    "A kernel that is smaller than the image still slides."
    x = torch.randn(2, 3, 6, 5)
    conv, up = WholeConv(3, 4, 4, bias=False), WholeConvTranspose(3, 4, 4, bias=False)
    assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight)) and torch.equal(up(x), nn.functional.conv_transpose2d(x, up.weight))


def test_two_processes_compile_at_once(tmp_path):
    "A fresh installation, two trainings that begin together: both are right, and the machine code is kept."
    shutil.copy(Path(kernels.__file__), tmp_path/'fresh_kernels.py')
    program = """
import torch
torch.set_num_threads(1)
from fresh_kernels import NormELU
torch.manual_seed(0)
x = torch.randn(8, 4, 3, 3, requires_grad=True)
NormELU(4)(x).square().sum().backward()
print(x.grad.sum().item(), x.grad.norm().item())
"""
    both = [subprocess.Popen([sys.executable, '-c', program], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[0] for p in both]
    assert said[0] == said[1] and said[0] and not any(p.returncode for p in both)
    assert list((tmp_path/'__pycache__').glob('*.nbc'))
