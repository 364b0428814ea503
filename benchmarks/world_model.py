"""What an update of the world model costs on this CPU: the package against the same function written naively, in CPU time on one thread.

    python benchmarks/world_model.py                 # everything, about four CPU minutes
    python benchmarks/world_model.py --batches 8x32  # without the largest batch, about one
    python benchmarks/world_model.py --only rssm

The model has the sizes of dreamerv3-torch's default (deter 512, hidden 512, 32 x 32 categorical latent, depth 32, layer norms, 64 pixels, 6 actions; its GRU is
dense, this one has 8 blocks: 15.3M parameters against 15.7M). `plain` is the same function
with the same weights and noise, written the way that comes first to mind: projections, action path, prior and a prior sample inside the scan,
torch.distributions with its checks, outputs that grow by torch.cat, a look at the resets at every step, Adam parameter by parameter, glibc's way with memory.
That both compute the same numbers is checked before anything is timed. Times are medians; take ratios.

The figures of the public implementation were measured on a machine of the same kind on another day; they stand beside, not in, the ratios.
"""
import argparse
import statistics
import time

import torch
from torch import distributions as td
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dreamer_wb.core.config import DecoderConfig, DynamicsConfig, EncoderConfig, HeadsConfig, WorldModelConfig
from dreamer_wb.core.learner import keep_memory
from dreamer_wb.dreamer.world_model import DreamerWorldModel, read_images

PUBLIC = {('rssm', '16x64'): 1779, ('rssm', '8x32'): '490-571', ('update', '16x64'): 6840, ('update', '8x32'): '1642-1774',
          ('stills', 64): 267, ('stills', 128): 836}      # dreamerv3-torch 6ef8646, ms, fp32
COUNTS = {'kernels': 11939, 'syncs': 855}                 # of one update with 64 steps


def reference(size=64, stages=4, **dynamics):
    "A world model of the reference sizes."
    mults = [2**i for i in range(stages)]
    conv = dict(depth=32, mults=mults, norm='layer')
    dynamics = dict(latent='categorical', stoch=32, classes=32, deter=512, hidden=512, obs_layers=1, img_layers=1, norm='layer') | dynamics
    torch.manual_seed(0)
    return DreamerWorldModel(WorldModelConfig(size=size, action_dim=6, encoder=EncoderConfig(**conv), decoder=DecoderConfig(**conv),
                                              dynamics=DynamicsConfig(**dynamics), heads=HeadsConfig(True, True, 2, 512)))


def random_batch(B, T, size=64):
    "A batch with a reset in mid-sequence."
    g = torch.Generator().manual_seed(0)
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 0] = True
    first[::3, T//2] = True
    return dict(obs=torch.randint(0, 256, (B, T, 3, size, size), generator=g, dtype=torch.uint8), act=torch.randn(B, T, 6, generator=g),
                first=first, rew=torch.randn(B, T, generator=g), done=torch.rand(B, T, generator=g) < .01)


# --- the naive way ---

def plain_cell(cell, weight, h, shared, action):
    "The GRU as in the paper: all inputs joined, gate by gate."
    G, B = cell.hid.groups, len(h)
    split = lambda x: x.reshape(B, G, -1).transpose(0, 1)
    dense = nn.functional.linear(torch.cat([shared, action], -1), weight)
    u = cell.act(cell.norm(torch.baddbmm(cell.hid.bias, split(h), cell.hid.weight).transpose(0, 1).reshape(B, -1) + dense))
    reset, cand, gate = torch.chunk(torch.baddbmm(cell.gates.bias, split(u.to(cell.gates.weight.dtype)), cell.gates.weight).float(), 3, -1)
    reset, gate = torch.sigmoid(reset), torch.sigmoid(gate - 1)
    cand = torch.tanh(reset * cand)
    return (gate * cand + (1 - gate) * split(h)).transpose(0, 1).reshape(B, -1)


def plain_dist(rssm, raw):
    "A joint one-hot distribution with 1 % of the uniform one."
    probs = raw.float().unflatten(-1, (rssm.cfg.stoch, rssm.cfg.classes)).softmax(-1)
    return td.Independent(td.OneHotCategorical(probs=(1 - rssm.cfg.unimix) * probs + rssm.cfg.unimix / probs.shape[-1]), 1)


def plain_sample(dist, noise):
    "Straight through; the noise is given, so that both ways draw the same latents."
    probs = dist.base_dist.probs
    hard = nn.functional.one_hot((probs / noise).argmax(-1), probs.shape[-1]).float()
    return (hard + probs - probs.detach()).flatten(-2)


def plain_observe(rssm, embed, act, first, noise):
    "Posterior and prior logits, memory, latent, each (B, T, ...)."
    B, T = first.shape
    deter, stoch = torch.zeros(B, rssm.n_deter), torch.zeros(B, rssm.n_stoch)
    cell_weight = torch.cat([rssm.cell.shared.weight, rssm.cell.action.weight], 1)          # the package keeps them apart
    post_weight = torch.cat([rssm.posterior.deter.weight, rssm.posterior.embed.weight], 1)
    first_layer = lambda h, e: nn.functional.linear(torch.cat([h, e], -1), post_weight, rssm.posterior.deter.bias)
    out = None
    for t in range(T):
        a = act[:, t]
        if first[:, t].any():                                                               # a host sync
            mask = 1 - first[:, t, None].float()
            deter, stoch, a = deter * mask, stoch * mask, a * mask
        a = a / torch.clamp(a.abs(), min=1).detach()
        deter = plain_cell(rssm.cell, cell_weight, deter, torch.cat([rssm.in_deter(deter), rssm.in_stoch(stoch)], -1), rssm.in_act(a))
        prior = rssm.prior(deter)
        plain_dist(rssm, prior).sample()                                                    # nobody needs it
        post = rssm.posterior.rest(first_layer(deter, embed[:, t]))
        stoch = plain_sample(plain_dist(rssm, post), noise[t])
        step = [x.float().unsqueeze(1) for x in (post, prior, deter, stoch)]
        out = step if out is None else [torch.cat([o, s], 1) for o, s in zip(out, step)]
    return out


def plain_kl(rssm, post, prior):
    "Balanced KL with free nats."
    q, p, q0, p0 = (plain_dist(rssm, x) for x in (post, prior, post.detach(), prior.detach()))
    return dict(dyn=td.kl_divergence(q0, p).clamp(min=rssm.cfg.free_nats), rep=td.kl_divergence(q, p0).clamp(min=rssm.cfg.free_nats))


def plain_two_hot(logits, bins, target):
    "Cross-entropy against a dense target."
    below = ((bins <= target[..., None]).sum(-1) - 1).clamp(0, len(bins) - 2)
    share = (target - bins[below]) / (bins[below + 1] - bins[below])
    hot = lambda i: nn.functional.one_hot(i, len(bins)).float()
    dense = hot(below) * (1 - share[..., None]) + hot(below + 1) * share[..., None]
    return -(dense * torch.log_softmax(logits.float(), -1)).sum(-1)


def plain_losses(world, batch, noise):
    "The losses of `world.forward`."
    rssm, target = world.dynamics, read_images(batch['obs'])
    post, prior, deter, stoch = plain_observe(rssm, world.encoder.embed(target), batch['act'], batch['first'], noise)
    feat = lambda: torch.cat([stoch, deter], -1)                                            # once for each head
    cont = td.Independent(td.Bernoulli(logits=world.heads['cont'](feat()).float()), 1)
    image = (world.decoder(feat()) - target).square().sum((-3, -2, -1))
    return dict(image=image, **plain_kl(rssm, post, prior), reward=plain_two_hot(world.heads['reward'](feat()), world.bins, batch['rew']),
                cont=-cont.log_prob((~batch['done']).float()[..., None]))


# --- what is timed ---

def autocast(bf16): return torch.autocast('cpu', torch.bfloat16, enabled=bf16)


def rssm_call(world, batch, plain, bf16):
    "Observe, KL and backward on given embeddings; returns a function without arguments that returns the loss."
    rssm = world.dynamics
    embed = torch.randn(*batch['first'].shape, rssm.posterior.embed.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def call():
        torch.manual_seed(1)
        world.zero_grad(set_to_none=True)
        with autocast(bf16):
            if plain:
                noise = rssm.noise(*batch['first'].shape[::-1])
                losses = plain_kl(rssm, *plain_observe(rssm, embed, batch['act'], batch['first'], noise)[:2])
            else: losses = rssm.losses(rssm.observe(embed, batch['act'], batch['first']))
        loss = (.5 * losses['dyn'] + .1 * losses['rep']).mean()
        loss.backward()
        return loss.detach()
    return call


def update_call(world, batch, plain, bf16):
    "Forward, backward, clipping, optimizer."
    opt = torch.optim.Adam(world.parameters(), lr=1e-5, foreach=False) if plain else torch.optim.AdamW(world.parameters(), lr=1e-5, fused=True)

    def call():
        torch.manual_seed(1)
        opt.zero_grad(set_to_none=True)
        with autocast(bf16):
            losses = plain_losses(world, batch, world.dynamics.noise(*batch['first'].shape[::-1])) if plain else world(batch)[0]
        loss = sum(losses[k].mean() * s for k, s in world.scales.items())
        loss.backward()
        nn.utils.clip_grad_norm_(world.parameters(), 1000.)
        opt.step()
        return loss.detach()
    return call


class Count(TorchDispatchMode):
    "Counts operations that do work (no views, no allocation) and those that wait for a value."
    QUIET = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'detach', 'alias', '_unsafe_view', '_reshape_alias', 'lift_fresh'}
    SYNC = {'_local_scalar_dense', 'nonzero', 'equal', 'is_nonzero', 'masked_select'}

    def __init__(self):
        super().__init__()
        self.kernels = self.syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.syncs += name in self.SYNC
        self.kernels += not (name in self.QUIET or name in self.SYNC or func.is_view)
        return func(*args, **kwargs or {})


def cpu_ms(call, repeats, keep):
    "Median CPU milliseconds of a call, after one that warms up."
    keep_memory(keep)                                                                       # as `fit` does it
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        call()
        times.append((time.process_time() - start) * 1e3)
    keep_memory(False)
    return statistics.median(times[1:])


def peak_mb(call):
    "Most memory during a call, in MB beyond what there was; None where the kernel does not tell."
    read = lambda key: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(key)) / 1024
    try:
        with open('/proc/self/clear_refs', 'w') as f: f.write('5')                          # forget the old peak
        before = read('VmRSS')
        call()
        return read('VmHWM') - before
    except OSError: return None


VARIANTS = [('plain, fp32', True, False), ('package, fp32', False, False), ('package, no deferral', False, False),
            ('plain, bf16', True, True), ('package, bf16', False, True)]


def compare(kind, batch, args):
    "A table of all variants for one part and one batch."
    make, name = dict(rssm=rssm_call, update=update_call)[kind], f'{batch["first"].shape[0]}x{batch["first"].shape[1]}'
    public, rows = PUBLIC.get((kind, name)), {}
    losses = [make(reference(), batch, plain, False)().item() for plain in (True, False)]
    assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[0]), f'plain and package compute different losses: {losses}'
    for label, plain, bf16 in VARIANTS:
        call = make(reference(deferred='no deferral' not in label), batch, plain, bf16)
        rows[label] = cpu_ms(call, args.repeats, not plain), peak_mb(call)
        base = rows['plain, fp32'][0]
        peak = '' if rows[label][1] is None else f'{rows[label][1]:9.0f}'
        print(f'{kind:8}{name:8}{label:24}{rows[label][0]:9.0f}{base / rows[label][0]:8.2f}{peak:>10}   '
              + (f'public implementation, another day: {public}' if plain and not bf16 and public else ''), flush=True)


def counts(T=64):
    "Operations and waits of one update."
    print(f'\none update with {T} steps{"":10}{"kernels":>9}{"syncs":>8}   (public implementation: {COUNTS["kernels"]:,} and {COUNTS["syncs"]})')
    batch = random_batch(2, T)
    for label, plain, bf16 in VARIANTS:
        call = update_call(reference(deferred='no deferral' not in label), batch, plain, bf16)
        call()
        with Count() as count: call()
        print(f'  {label:29}{count.kernels:>10,}{count.syncs:>8,}', flush=True)


def stills(args):
    "Batches of 32 still images."
    print('\nstill images, batch 32, length 1: CPU ms of an update')
    for size, stages in ((64, 4), (128, 5), (224, 5)):
        times = [cpu_ms(update_call(reference(size, stages), random_batch(32, 1, size), plain, bf16), args.repeats, not plain)
                 for plain, bf16 in ((True, False), (False, False), (False, True))]
        print(f'  {size:4} px   plain {times[0]:6.0f}   package fp32 {times[1]:6.0f}   bf16 {times[2]:6.0f}   '
              f'public implementation, another day: {PUBLIC.get(("stills", size), "fails")}', flush=True)


def growth(args):
    "The RSSM part over T and B."
    print('\ngrowth: CPU ms of observe + KL + backward, package, fp32; per step in brackets')
    for kind, shapes in (('T', [(8, T) for T in (8, 16, 32, 64, 128)]), ('B', [(B, 16) for B in (4, 8, 16, 32, 64)])):
        cells = []
        for B, T in shapes:
            t = cpu_ms(rssm_call(reference(), random_batch(B, T, 64), False, False), args.repeats, True)
            cells.append(f'{B}x{T} {t:.0f} ({t / (B * T):.2f})')
        print(f'  {kind}: ' + '   '.join(cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batches', nargs='+', default=['8x32', '16x64'], help='batch sizes and lengths (default 8x32 16x64)')
    parser.add_argument('--only', nargs='+', default=['rssm', 'update', 'counts', 'stills', 'growth'], help='parts to run')
    parser.add_argument('--repeats', type=int, default=3, help='calls of which the median counts')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    world = reference()
    print(f'torch {torch.__version__}, bf16 in hardware: {torch.cpu.get_capabilities().get("amx_bf16", False)}, '
          f'{sum(p.numel() for p in world.parameters()):,} parameters\n')
    if {'rssm', 'update'} & {*args.only}: print(f'{"part":8}{"batch":8}{"":24}{"CPU ms":>9}{"ratio":>8}{"peak MB":>10}')
    for name in args.batches:
        batch = random_batch(*map(int, name.split('x')))
        for kind in ('rssm', 'update'):
            if kind in args.only: compare(kind, batch, args)
    if 'counts' in args.only: counts()
    if 'stills' in args.only: stills(args)
    if 'growth' in args.only: growth(args)


if __name__ == '__main__': main()
