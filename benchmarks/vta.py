"""What a training step of the original VTA costs: CPU milliseconds of ours and of the same function written one frame at a time.

    python benchmarks/vta.py                         # B=16, H=32: about half a minute
    python benchmarks/vta.py --batch 64 --belief 128 --rounds 2   # the published size: some minutes

`slowly` is the step as one writes it down from the equations: a loop over the frames with `nn.GRUCell`s, float32, torch's default memory layout.
Ours computes the three recurrent encoders in one scan, takes everything out of the loop that does not depend on the last frame, collects weight
gradients over time, has kernels for batch norm and ELU (`core.kernels`), and (third row) lets the convolutions run in bfloat16. Both are given the same
weights, data and noise; `--check` compares their losses and gradients in float64, and those of float32 with that. The least of alternating rounds is printed, since whatever else the machine does can only add to it.

All rows run as the training loop does (`cpu_settings`: one thread, no denormal numbers, and freed memory stays with the process, which spares large
tensors their page faults). The last columns compare with the published code (taesupkim/vta): as it is, and with the same settings of memory and
denormals, which it does not make; at the published size more than a quarter of its time goes into page faults. It has no licence and is not in this repository;
what it costs was measured beside `slowly`, in processes that took turns (forward pass, backward pass, clipping, Adam; float32, one thread, torch 2.15,
median over 7 to 40 turns), and is kept as a multiple of `slowly` in `PUBLISHED`, since milliseconds are those of a machine and of a day: it took from
5,570 to 8,730 ms at B=64, H=128 and from 231 to 336 at B=16, H=32. The last row is the floor of float32: the
operations of the convolutions and matrix products of one step, at the rate of the model's own largest convolution here.
"""
import argparse
import time
from copy import deepcopy
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from dreamer_wb.core.learner import cpu_settings
from dreamer_wb.vta.bouncing_balls import bouncing_balls
from dreamer_wb.vta.model import NEAR, VTA, VTAConfig, read_frames


# {(B, H): how much slower than `slowly` the published code is, as it is and with our settings of memory}, T=20
PUBLISHED = {(64, 128): (1.31, .98), (16, 128): (1.17, .94), (16, 64): (1.02, .95), (16, 32): (1.06, 1.00), (8, 32): (1.06, .99), (16, 16): (1.07, 1.02)}


def normal(layer, *xs):
    x = torch.cat(xs, -1)
    return Normal(layer.mean(x), layer.std(x).sigmoid())


def encode(m, x, mask):
    "Three recurrent encoders, frame by frame."
    B, L, H = x.shape
    abs_fwd, abs_bwd, obs_fwd = [], [None]*L, []
    f = b = o = x.new_zeros(B, H)
    for t in range(L):
        f = m.abs_post_fwd(x[:, t], f)
        o = m.obs_post_fwd(x[:, t], mask[:, t, 1:] * o)
        abs_fwd.append(f); obs_fwd.append(o)
    for t in reversed(range(L)):
        b = m.abs_post_bwd(x[:, t], b)
        abs_bwd[t] = b
        b = mask[:, t, 1:] * b
    return abs_fwd, abs_bwd, obs_fwd


def slowly(m, x, noise):
    "The four losses of a VTA in training mode, one frame at a time."
    c = m.cfg
    C, T, B, near = c.init_size, c.seq_size, len(x), x.new_tensor([NEAR, -NEAR])
    enc = m.enc_obs(x.flatten(0, 1)).view(B, T + 2*C, -1)
    post = m.post_boundary(enc)
    log_sample = ((post - (-noise['boundary'].log()).log()) / m.beta).log_softmax(-1)
    soft = log_sample.exp()
    mask = F.one_hot(soft.argmax(-1), 2) + (soft - soft.detach())
    mask[:, :C + 1] = mask[:, -C:] = x.new_tensor([1., 0.])
    abs_fwd, abs_bwd, obs_fwd = encode(m, enc, mask)
    feats, kl_abs, kl_obs, kl_mask = [], [], [], []
    length = number = x.new_zeros(B, 1)
    for i, t in enumerate(range(C, C + T)):
        read, copy = mask[:, t, :1], mask[:, t, 1:]
        belief = read * m.update_abs_belief(z, belief) + copy * belief if i else abs_fwd[t - 1]
        prior_z, post_z = normal(m.prior_abs_state, belief), normal(m.post_abs_state, abs_fwd[t - 1], abs_bwd[t])
        new = post_z.loc + post_z.scale * noise['z'][:, i]
        z = read * new + copy * z if i else read * new
        abs_feat = m.abs_feat(torch.cat([belief, z], -1))
        h = read * abs_feat + copy * m.update_obs_belief(torch.cat([s, abs_feat], -1), h) if i else abs_feat
        prior_s, post_s = normal(m.prior_obs_state, h), normal(m.post_obs_state, obs_fwd[t - c.obs_post_lag], abs_feat)
        s = post_s.loc + post_s.scale * noise['s'][:, i]
        feats.append(m.obs_feat(torch.cat([h, s], -1)))
        kl_abs.append(kl_divergence(post_z, prior_z).sum(-1) * read[:, 0].detach())
        kl_obs.append(kl_divergence(post_s, prior_s).sum(-1))
        length, number = read.detach() + copy.detach() * (length + 1), number + read.detach()
        prior = torch.where(number >= c.seg_num, -near, m.prior_boundary(feats[-1]))
        prior = torch.where(length >= c.seg_len, near, prior)
        density = lambda a: (a - m.beta * log_sample[:, t + 1]).sum(-1) - 2 * (a - m.beta * log_sample[:, t + 1]).logsumexp(-1)
        kl_mask.append(density(post[:, t + 1]) - density(prior))
    rec = m.dec_obs(torch.stack(feats, 1).flatten(0, 1)).view(B, T, 3, c.size, c.size)
    cost = -Normal(rec, c.obs_std).log_prob(x[:, C:C + T]).sum((2, 3, 4))
    return dict(obs_cost=cost, kl_abs=torch.stack(kl_abs, 1), kl_obs=torch.stack(kl_obs, 1), kl_mask=torch.stack(kl_mask, 1))


def plainly(m, x, noise):
    "The same with torch's own layers."
    with patch('dreamer_wb.core.kernels.fits', return_value=False): return slowly(m, x, noise)


def ours(m, x, noise):
    return m.losses(m.observe(x, noise), x[:, m.cfg.init_size:m.cfg.init_size + m.cfg.seq_size])


def prepare(batch, belief, dtype=torch.float32, **kw):
    "Two equal models, frames and noise."
    torch.manual_seed(0)
    cfg = VTAConfig(belief_size=belief, **kw)
    fast = VTA(cfg).to(dtype).train()
    slow = VTA(cfg).to(dtype, memory_format=torch.contiguous_format).train()
    slow.load_state_dict(fast.state_dict())
    obs = torch.from_numpy(bouncing_balls(batch, cfg.seq_size + 2*cfg.init_size)['obs']).permute(0, 1, 4, 2, 3).contiguous()
    noise = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fast.draw_noise(obs).items()}
    return fast, slow, obs, noise


def evaluated(model, x, noise, losses):
    "Losses and gradients."
    out = losses(model, x, noise)
    sum(v.mean() for v in out.values()).backward()
    return [*out.values(), *(p.grad for p in model.parameters())]


def distance(some, others):
    "Largest relative difference."
    return max(((a.double() - b.double()).norm() / (b.double().norm() + 1e-12)).item() for a, b in zip(some, others))


def check(**kw):
    "Distance of losses and gradients in float64, with constraints that are often met."
    fast, slow, obs, noise = prepare(4, 8, torch.float64, **{**dict(seg_num=3, seg_len=4), **kw})
    x = read_frames(obs, noise=noise['obs']).double()
    return distance(evaluated(fast, x, noise, ours), evaluated(slow, x, noise, slowly))


def precision():
    "How far ours and the plain version are in float32 from the plain one in float64."
    fast, slow, obs, noise = prepare(4, 32)
    exact, x = deepcopy(slow).double(), read_frames(obs, noise=noise['obs'])
    want = evaluated(exact, x.double(), {k: v.double() for k, v in noise.items()}, slowly)
    return distance(evaluated(fast, x, noise, ours), want), distance(evaluated(slow, x, noise, plainly), want)


def step(model, opt, obs, losses, amp=False):
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        noise = model.draw_noise(obs)
        loss = losses(model, read_frames(obs, noise=noise['obs']), noise)
    sum(v.mean() for v in loss.values()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 10.)
    opt.step()
    opt.zero_grad()


def cpu_ms(f):
    start = time.process_time()
    f()
    return (time.process_time() - start)*1e3


def floor(step, batch, belief, rounds):
    "GFLOP of a step, GFLOP/s of the largest convolution of the encoder, alone."
    with FlopCounterMode(display=False) as count: step()
    x = torch.randn(30*batch, belief, 16, 16).to(memory_format=torch.channels_last)
    w = torch.randn(belief, belief, 4, 4).to(memory_format=torch.channels_last)
    ms = min(cpu_ms(lambda: F.conv2d(x, w, None, 2, 1)) for _ in range(rounds + 1))
    return count.get_total_flops()/1e9, 2*30*batch*64*16*belief**2/ms/1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=16, help='sequences')
    parser.add_argument('--belief', type=int, default=32, help='units H')
    parser.add_argument('--rounds', type=int, default=9, help='rounds of which the fastest counts')
    parser.add_argument('--check', action='store_true', help='compare losses and gradients first')
    args = parser.parse_args()
    with cpu_settings(1): measure(args)


def measure(args):
    if args.check:
        print(f'largest relative difference of losses and gradients in float64: {max(check(), check(obs_post_lag=1)):.1e}')
        print('of float32 to that: ours {:.1e}, one frame at a time {:.1e}'.format(*precision()))
    fast, slow, obs, _ = prepare(args.batch, args.belief)
    def adam(m): return torch.optim.AdamW(m.param_groups(SimpleNamespace(opt='adamw')), lr=5e-4, weight_decay=0., fused=m is fast)
    opts = {m: adam(m) for m in (fast, slow)}
    rows = {'one frame at a time': lambda: step(slow, opts[slow], obs, plainly), 'ours, float32': lambda: step(fast, opts[fast], obs, ours),
            'ours, bfloat16': lambda: step(fast, opts[fast], obs, ours, True)}
    times = {name: [] for name in rows}
    for f in rows.values(): f()
    for _ in range(args.rounds):
        for name, f in rows.items(): times[name].append(cpu_ms(f))
    flops, rate = floor(rows['ours, float32'], args.batch, args.belief, args.rounds)
    least = {name: min(ts) for name, ts in times.items()} | {'floor, float32': flops/rate*1e3}
    base, public = least['one frame at a time'], PUBLISHED.get((args.batch, args.belief), ())
    print(f'B={args.batch}, T=20, H={args.belief}, {sum(p.numel() for p in fast.parameters()):,} parameters; the least of {args.rounds} rounds')
    print(f'{"":<22}{"CPU ms/step":>12}{"faster":>9}' + ''.join(f'{how:>22}' for how, _ in zip(('than published', 'with our memory'), public)))
    for name, ms in least.items(): print(f'{name:<22}{ms:>12.0f}{base/ms:>8.2f}x' + ''.join(f'{p*base/ms:>21.2f}x' for p in public))
    print(f'floor: {flops:.1f} GFLOP at {rate:.0f} GFLOP/s')


if __name__ == '__main__': main()
