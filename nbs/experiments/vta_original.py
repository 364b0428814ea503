"""The original VTA on data with known segments: which switches make its boundaries right, and do they stay right?

    python nbs/experiments/vta_original.py                          # everything that is not in the results yet
    python nbs/experiments/vta_original.py --only colors/ours --seeds 10
    python nbs/experiments/vta_original.py --gradients              # straight-through beside the exact gradient, a CPU minute
    python nbs/experiments/vta_original.py --drawing --seeds 0 1 2  # the image networks alone on two small balls, a CPU minute

Every run is a `dreamer-wb train` in --runs; interrupted (also by SIGTERM), the same command goes on where it was. The curves, the evaluations and the
boundaries of some sequences go to results/vta_original.json after each run.
"""
import argparse
from pathlib import Path

import torch
from torch import nn

from dreamer_wb.core.config import compose
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import Run, read_json, read_metrics, write_json
from dreamer_wb.vta.model import VTA, VTATrainConfig, make_decoder, make_encoder, make_sequences, read_frames, train_vta, vta_batches, window_episodes

HERE = Path(__file__).parent
RESULTS = HERE/'results'/'vta_original.json'
QUIET = ['loop.progress=false', 'loop.tensorboard=false', 'loop.checkpoint_seconds=60', 'doctor=false']
STRAIGHT = ['look_ahead=true', 'boundary_gradient=straight_through', 'beta_anneal=1', 'explore=0']
PUBLISHED = [*STRAIGHT, 'obs_post_lag=0', 'causal=false', 'boundary_lag=0', 'num_layers=3']
COLORS, BALL = ['experiment=colors', 'eval_size=192'], ['experiment=bouncing_balls_cpu', 'eval_size=192']
TWO = ['experiment=two_balls_cpu', 'eval_size=192']
EIGHT = [*TWO, 'batch_size=8', 'advantage=5', 'explore=800', 'loop.steps=1400', 'loop.eval_every=200', 'loop.schedule=constant']
TWO_BEFORE = [*TWO, 'batch_size=8', 'advantage=5', 'state_size=32', 'drawing=0', 'identity_start=false', 'relative=false', 'credit=3', 'explore=1600', 'loop.steps=2400', 'loop.eval_every=200',
              'loop.lr=3e-3', 'loop.schedule=constant']
RUNS = {'colors/ours': COLORS, 'big_ball/ours': BALL, 'two_balls/ours': TWO, 'two_balls/eight': EIGHT, 'two_balls/before': TWO_BEFORE, 'maze/ours': ['experiment=maze_cpu', 'eval_size=192'],
        'colors/no_coin': [*COLORS, 'explore=0', 'loop.steps=800'], 'big_ball/no_coin': [*BALL, 'explore=0', 'loop.steps=1000'], 'colors/published': [*COLORS, *PUBLISHED, 'loop.steps=600'],
        'colors/lags': [*COLORS, *STRAIGHT, 'loop.steps=600'], 'big_ball/published': [*BALL, *PUBLISHED, 'loop.steps=600'],
        'colors/look_ahead': [*COLORS, 'look_ahead=true', 'loop.steps=600'], 'big_ball/look_ahead': [*BALL, 'look_ahead=true'],
        'colors/seg_num_9': [*COLORS, 'seg_num=9', 'loop.steps=600'], 'big_ball/seg_num_5': [*BALL, 'seg_num=5']}
COLUMNS = ('step', 'cpu_seconds', 'rate', 'precision', 'recall', 'f1', 'f1_tol1', 'auc', 'auc_prior', 'f1_random', 'f1_clock', 'f1_frame_difference',
           'mse', 'kl_abs', 'kl_obs', 'kl_mask')


def collect(run, cfg):
    "Curve of the evaluations, the final tables and some sequences of a finished or unfinished run."
    rows = read_metrics(run.metrics).dropna(subset=['f1'])
    out = dict(done=run.done('train'), curve={k: rows[k].tolist() for k in COLUMNS})
    if (run.path/'boundary_eval.json').exists(): out['truth'] = read_json(run.path/'boundary_eval.json')['truth']
    if out['done']:
        first = {k: v[:6] for k, v in vta_batches(cfg)[1][0].items()}
        model = VTA.load_from_checkpoint(run.checkpoints/'vta.ckpt')
        windows = window_episodes(model, [first])
        if cfg.env_type == 'bouncing_balls' and cfg.balls.balls == 1: out['changes'] = changes(model, cfg)
        out['examples'] = {k: windows[k].tolist() for k in ('read', 'true')}
    return out


def gradients(seed, updates=100, n=64):
    "What READ saves at every frame of `n` sequences, and what straight-through believes."
    cfg = compose(VTATrainConfig, [*RUNS['colors/lags'], *QUIET, f'seed={seed}', f'loop.steps={updates}', 'loop.eval_every=0'])
    set_seed(seed)
    model, logits = VTA(cfg), []
    batches, valid = vta_batches(cfg)
    fit(model, batches, cfg.loop)
    model.train()
    model.post_boundary.register_forward_hook(lambda module, args, out: logits.append(out))
    C, T, obs, true = cfg.init_size, cfg.seq_size, valid[0]['obs'][:n], valid[0]['read'][:n, cfg.init_size:cfg.init_size + cfg.seq_size]
    noise = model.draw_noise(obs)
    x = read_frames(obs, cfg.obs_bit, noise['obs'])
    def cost(noise):
        losses = model.losses(model.observe(x, noise), x[:, C:C + T])
        return sum(losses[k].sum(1) for k in ('obs_cost', 'kl_abs', 'kl_obs'))                  # (n,)
    total = cost(noise).sum()
    slope, = torch.autograd.grad(total, logits[0])                                              # (n,L,2)
    slope, saved = (slope[..., 0] - slope[..., 1])[:, C:C + T], torch.zeros(n, T)
    with torch.no_grad():
        for t in range(1, T):
            both = []
            for read in (1, 0):                                                                  # the other decisions keep their noise
                u = noise['boundary'].clone()
                u[:, C + t] = torch.tensor([1 - 1e-6, 1e-6] if read else [1e-6, 1 - 1e-6])
                both.append(cost(dict(noise, boundary=u)))
            saved[:, t] = both[1] - both[0]
    change = (obs[:, C:C + T] != obs[:, C - 1:C + T - 1]).flatten(2).any(-1)
    kinds = dict(change=true & change, same=true & ~change, inside=~true)
    return {k: dict(saved=saved[:, 1:][m[:, 1:]].tolist(), slope=slope[:, 1:][m[:, 1:]].tolist()) for k, m in kinds.items()}


def predict(batches, held_out, before, mean_start, updates, every=25):
    "Error of each frame of the held-out sequences, as a share of the mean image's, while encoder and decoder alone learn to draw a frame from itself (`before=0`) or from those before it."
    k, mean = max(before, 1), read_frames(held_out['obs']).mean((0, 1, 3, 4))
    enc, dec = make_encoder(64, 32, 16), make_decoder(64, 32, 16)
    enc[0][0] = nn.Conv2d(3*k, 16, 4, 2, 1, bias=False)
    if mean_start: dec[-2].bias.data.copy_(mean.atanh())
    net = nn.Sequential(enc, dec).to(memory_format=torch.channels_last)
    opt, out = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0., fused=True), []
    def pairs(obs):
        x = read_frames(obs)
        seen = torch.cat([x[:, 2 - i:x.shape[1] - i] for i in (range(1, k + 1) if before else [0])], 2)
        return [v[:, ::2].flatten(0, 1).contiguous(memory_format=torch.channels_last) for v in (seen, x[:, 2:])]
    seen, wanted = pairs(held_out['obs'])
    blank, new = (wanted - mean.view(1, 3, 1, 1)).square().mean(), held_out['read'][:, 2:][:, ::2].flatten()
    for step in range(1, updates + 1):
        a, b = pairs(batches(step)['obs'])
        with torch.autocast('cpu', torch.bfloat16): rec = net.train()(a).float()
        (8*(rec - b).square().sum((1, 2, 3)).mean()).backward()                                          # as obs_std=.25
        nn.utils.clip_grad_norm_(net.parameters(), 10.)
        opt.step(); opt.zero_grad()
        if step % every: continue
        with torch.no_grad(): error = (net.eval()(seen) - wanted).square().mean((1, 2, 3))/blank
        out.append(dict(step=step, all=float(error.mean()), inside=float(error[~new].mean()), change=float(error[new].mean())))
    return out


def drawing(seed, updates=100):
    "How fast two small balls are drawn without any recurrence or latent, and what a change of colour costs a model that repeats the last frame."
    cfg = compose(VTATrainConfig, [*TWO, f'seed={seed}', 'eval_size=32'])
    batches, held_out, out = vta_batches(cfg)[0], make_sequences(cfg, 32, [seed, 1, 0]), {}
    for name, kw in dict(zero=(0, False), mean=(0, True), last=(1, True), last_two=(2, True)).items():
        set_seed(seed)
        out[name] = predict(batches, held_out, *kw, updates)
    for name, what in dict(two_balls=TWO, big_ball=BALL).items():
        d = make_sequences(compose(VTATrainConfig, what), 512, [seed, 2, 0])
        x, new = d['obs'].float()/127.5, d['read'][:, 1:]
        error = (x[:, 1:] - x[:, :-1]).square().mean((2, 3, 4))/(x - x.mean((0, 1, 3, 4)).view(3, 1, 1)).square().mean()
        out[f'repeat_{name}'] = dict(inside=float(error[~new].mean()), change=float(error[new].mean()))
    return out


def changes(model, cfg):
    "Of the big ball's changes from each colour (1 to 6, in binary red green blue) to each other one: found, found one frame late only, all."
    cfg.eval_size = 512
    valid, C, T = vta_batches(cfg)[1], cfg.init_size, cfg.seq_size
    windows, counts = window_episodes(model, valid), torch.zeros(3, 6, 6, dtype=int)
    lit = torch.cat([b['obs'][:, C - 1:C + T] for b in valid]).amax((-1, -2)) > 127                    # (N,T+1,3): nothing but the ball is lit
    colour = (lit * torch.tensor([4, 2, 1])).sum(-1).numpy()
    for i, t in zip(*(windows['true'] & ~windows['forced']).nonzero()):
        at, read = (colour[i, t] - 1, colour[i, t + 1] - 1), windows['read'][i]
        counts[2][at] += 1
        counts[0][at] += int(read[t])
        counts[1][at] += int(not read[t] and t + 1 < T and read[t + 1])
    return dict(zip(('found', 'late', 'all'), counts.tolist()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', default=list(RUNS), choices=list(RUNS), help='which runs')
    parser.add_argument('--seeds', nargs='*', type=int, default=[10, 11, 12], help='not those that the settings were found with, which were 0, 1, 2')
    parser.add_argument('--runs', default='runs/vta_original', help='folder of the runs')
    parser.add_argument('--collect', action='store_true', help='only gather what is there, finished or not')
    parser.add_argument('--gradients', action='store_true', help='only compare gradients')
    parser.add_argument('--drawing', action='store_true', help='only the image networks on two balls')
    args = parser.parse_args()
    def keep(key, value): write_json(RESULTS, dict(read_json(RESULTS) if RESULTS.exists() else {}, **{key: value}))
    if args.gradients: return keep('gradients', {str(seed): gradients(seed) for seed in args.seeds})
    if args.drawing:
        torch.set_num_threads(1)
        for seed in args.seeds: keep('drawing', dict(read_json(RESULTS).get('drawing', {}), **{str(seed): drawing(seed)}))
        return
    for seed in args.seeds:
        for name in args.only:
            if not args.collect and RESULTS.exists() and read_json(RESULTS).get(f'{name}/{seed}', {}).get('done'): continue
            cfg = compose(VTATrainConfig, [*RUNS[name], *QUIET, f'seed={seed}', f'runs_dir={args.runs}'])
            cfg.experiment, cfg.name = name.replace('/', '_'), f'seed{seed}'
            folder = Path(args.runs)/cfg.experiment/cfg.name
            if args.collect and not (folder/'metrics.csv').exists(): continue
            run = Run.open(folder) if args.collect else train_vta(cfg)
            keep(f'{name}/{seed}', collect(run, cfg))


if __name__ == '__main__': main()
