"The original VTA: equal to the slow way of writing it, frame by frame; its traps; its command."
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamer_wb.cli import COMMANDS, kind_of, main
from dreamer_wb.core.config import compose
from dreamer_wb.core.runs import UserError, read_json, read_metrics
from dreamer_wb.vta.bouncing_balls import bouncing_balls
from dreamer_wb.vta.model import VTA, VTAConfig, VTATrainConfig, learn_drawing, make_sequences, read_frames, train_vta, vta_batches, window_episodes

spec = importlib.util.spec_from_file_location('bench_vta', Path(__file__).parents[1]/'benchmarks/vta.py')
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

SMALL = dict(belief_size=8, state_size=3, seq_size=6, init_size=2)


@pytest.mark.parametrize('kw', [{}, dict(obs_post_lag=1), dict(causal=True, boundary_lag=1), dict(seg_len=1), dict(seg_num=99, seg_len=99), dict(init_size=1)])
def test_same_as_frame_by_frame(kw):
    assert bench.check(**{**dict(seq_size=6), **kw}) < 1e-9


def test_float32_kernels_are_as_exact_as_torch():
    "Losses and gradients of a step, against the frame-by-frame version in float64."
    with bench.cpu_settings(1): ours, torchs = bench.precision()
    assert ours < 3*torchs and torchs < 1e-4


def small(**kw): return VTA(VTAConfig(**{**SMALL, **kw}))
def frames(n=3, steps=10): return torch.from_numpy(bouncing_balls(n, steps)['obs']).permute(0, 1, 4, 2, 3).contiguous()


def test_causal_boundaries_do_not_see_the_future():
    for kw, sees in ((dict(causal=True), 0), (dict(causal=True, boundary_lag=1), -1), (dict(num_layers=1), 2)):
        model = small(**kw).eval()
        enc = torch.randn(1, 9, 8, requires_grad=True)
        model.post_boundary(enc)[0, 4].sum().backward()
        seen = enc.grad[0].abs().sum(-1).nonzero().ravel()
        assert seen.max() == 4 + sees


def test_segments_are_cut_off_from_one_another():
    "At READ the backward encoder starts afresh, and so does the forward encoder of details."
    model = small().double()
    enc, mask = torch.randn(1, 10, 8, dtype=torch.double), torch.tensor([0., 1.]).double().repeat(1, 10, 1)
    mask[0, 5] = torch.tensor([1., 0.])
    a = model.encode_segments(enc, mask)
    late, early = enc.clone(), enc.clone()
    late[0, 6], early[0, 4] = 9, 9
    b, c = model.encode_segments(late, mask), model.encode_segments(early, mask)
    same = lambda x, y: (x == y).all(-1)[:, 0].tolist()
    assert same(a[1], b[1]) == [True]*5 + [False]*2 + [True]        # abs_bwd: only the segment itself
    assert same(a[2], c[2]) == [True]*4 + [False] + [True]*3        # obs_fwd: nothing of the last segment
    assert same(a[0], c[0]) == [True]*4 + [False]*4                 # abs_fwd goes through


def test_no_look_ahead():
    "The posterior of z at frame t has seen the frames up to t, and nothing behind."
    model, copy = small(look_ahead=False).double(), torch.tensor([0., 1.]).double().repeat(1, 10, 1)
    enc = torch.randn(1, 10, 8, dtype=torch.double)
    late = enc.clone()
    late[0, 5] = 9
    fwd, bwd, _ = (x != y for x, y in zip(model.encode_segments(enc, copy), model.encode_segments(late, copy)))
    assert bwd.any(-1)[:, 0].nonzero().ravel().tolist() == [5] and fwd.any(-1)[:, 0].nonzero().ravel()[0] == 5


@pytest.mark.parametrize('kw', [{}, dict(look_ahead=False), dict(regularise='posterior'), dict(obs_post_lag=1, causal=True, boundary_lag=1)])
def test_leave_one_out(kw):
    "Two samples in training, one in evaluation; losses of one batch; only the detector's gradient is new."
    model = small(boundary_gradient='leave_one_out', **kw)
    losses, metrics = model(dict(obs=frames()))
    assert {v.shape for v in losses.values()} == {(3, 6)} and np.isfinite(float(metrics['mse']))
    losses['obs_cost'].sum().backward(retain_graph=True)
    weight = model.post_boundary.layers[-1].weight
    assert weight.grad is None and all(v.isfinite().all() for v in losses.values())
    losses['kl_mask'].sum().backward()
    assert weight.grad.abs().sum() > 0
    assert model.eval()(dict(obs=frames()))[0]['kl_mask'].shape == (3, 6)


def test_two_samples_differ_by_their_decisions_alone():
    "Until the first decision in which they differ, the two samples cost the same."
    torch.manual_seed(0)
    model = small(boundary_gradient='leave_one_out', look_ahead=False).train()
    noise = model.draw_noise(frames())
    x = read_frames(frames(), 5, noise['obs'])
    trace = model.observe(x, noise)
    a, b = sum(v for k, v in model.losses(trace, x[:, 2:8]).items() if k != 'kl_mask').detach().chunk(2)
    before = (trace.read[:3] == trace.read[3:]).cumprod(1).bool()
    assert not before.all() and (before[:, 1:].any() and torch.allclose(a[before], b[before], rtol=1e-4)) and not torch.allclose(a[~before], b[~before])


def test_coin_comes_first():
    "While the coin draws all boundaries, the detector learns nothing; afterwards it does."
    torch.manual_seed(0)
    model = small(boundary_gradient='leave_one_out', explore=100, seg_num=3)
    weight = model.post_boundary.layers[-1].weight
    for step, coin, learns in ((0, 1., False), (60, .8, True), (100, 0., True)):
        model.anneal(step)
        losses, metrics = model(dict(obs=frames()))
        grad, = torch.autograd.grad(sum(v.mean() for v in losses.values()), weight)
        assert abs(model.coin - coin) < 1e-6 and (grad.abs().sum() > 0) == learns
    model.coin = 1.
    read = torch.cat([model.observe(read_frames(frames()), model.draw_noise(frames())).read[:, 1:] for _ in range(40)])
    assert .4 < read.mean() < .6                                    # seg_num of 3 in 6 frames


def test_relative_learns_where_from_the_start():
    "Judged against the average READ the detector learns while the coin draws all; `credit` bounds what a decision is paid for."
    torch.manual_seed(0)
    model = small(boundary_gradient='leave_one_out', look_ahead=False, explore=100, seg_num=3, relative=True)
    model.anneal(0)
    weight = model.post_boundary.layers[-1].weight
    losses, _ = model(dict(obs=frames()))
    grad, = torch.autograd.grad(sum(v.mean() for v in losses.values()), weight)
    assert model.coin == 1 and grad.abs().sum() > 0
    for credit in (0, 1, 3):                                        # a cost at frame 4 moves the decisions at frames 4 - credit to 4
        model.cfg.credit, model.cfg.relative, model.coin = credit, False, 0.
        trace = model.observe(read_frames(frames()), model.draw_noise(frames()))
        cost = {k: torch.zeros(6, 6) for k in model.scales}
        cost['obs_cost'][:3, 4] = 1.
        slope, = torch.autograd.grad(model.leave_one_out(cost, trace)['kl_mask'].sum(), trace.post_logit)
        assert slope.abs().sum((0, 2)).nonzero().ravel().tolist() == [t for t in range(1, 5) if t >= 4 - credit]


def test_drawing_comes_first_and_goes_on_where_it_was(tmp_path):
    "The image networks have their own record, and a second start of the run finds them as they were left."
    kw = dict(env_type='simple_colors', batch_size=2, eval_size=4, drawing=3, identity_start=True, doctor=False, runs_dir=str(tmp_path), name='a', **SMALL)
    cfg = VTATrainConfig(**kw)
    cfg.loop.steps, cfg.loop.progress, cfg.loop.tensorboard = 2, False, False
    run = train_vta(cfg)
    assert (run.path/'metrics_drawing.csv').exists() and (run.checkpoints/'drawing.ckpt').exists()
    found = []
    for seed in (0, 1):                                             # whatever they start from, they get the weights of the checkpoint
        torch.manual_seed(seed)
        model = VTA(cfg)
        before = model.enc_obs[0][0].weight.clone()
        learn_drawing(model, vta_batches(cfg)[0], cfg.loop, run)
        found.append(model.enc_obs[0][0].weight)
        assert not torch.equal(before, found[-1])
    assert torch.equal(*found)


def test_posterior_constraint_bounds_segments():
    for kw in (dict(seg_len=2, seg_num=99), dict(seg_num=2, seg_len=99)):
        model = small(regularise='posterior', **kw).eval()
        for b in (5., -5.):                                         # a detector that would always, or never, READ
            last = model.post_boundary.layers[-1]
            with torch.no_grad(): last.weight.zero_(); last.bias.copy_(torch.tensor([b, -b]))
            read = model.boundaries(frames())['read']
            if 'seg_len' in kw and kw['seg_len'] == 2: assert read[:, ::2].all() or b > 0
            if kw['seg_num'] == 2: assert (read.sum(1) <= 2).all()


def test_modes_are_left_as_they_were_and_inputs_untouched():
    model, obs = small().train(), frames()
    before = obs.clone()
    model.full_generation(obs[:, :2], 3); model.jumpy_generation(obs[:, :2], 3); model.boundaries(obs)
    assert model.training and model.enc_obs.training and (obs == before).all()


def test_errors_name_the_mend():
    with pytest.raises(UserError, match='need 10'): small()(dict(obs=frames(1, 9)))
    with pytest.raises(UserError, match='32, 64 or 128'): VTA(VTAConfig(size=96))
    with pytest.raises(TypeError, match='uint8'): small()(dict(obs=frames().float()))


def test_64_pixels():
    model = small(size=64)
    obs = torch.zeros(2, 10, 3, 64, 64, dtype=torch.uint8)
    losses, _ = model(dict(obs=obs))
    assert losses['obs_cost'].shape == (2, 6) and model.full_generation(obs[:, :2], 2)[0].shape == (2, 2, 3, 64, 64)


def test_the_seeds_json_is_a_config(tmp_path):
    file = tmp_path/'bouncing_balls_3070.json'
    file.write_text('{"exp_name": "vta_bouncing_balls_3070", "env_type": "bouncing_balls", "work_dir": "experiments", "batch_size": 128, "epoch_data_size": 24000, '
                    '"max_iters": 50000, "beta_anneal": 75, "learn_rate": 0.0005, "seg_num": 5, "seg_len": 8, "dt": 2.0, "data_mode": "fixed", "use_amp": true}')
    args = [f'experiment={file}']
    assert kind_of(COMMANDS['train'], args).schema == 'vta.model:VTATrainConfig'
    cfg = compose(VTATrainConfig, args)
    assert (cfg.experiment, cfg.runs_dir, cfg.loop.steps, cfg.loop.lr, cfg.dt) == ('vta_bouncing_balls_3070', 'experiments', 50000, 5e-4, 2.)


def test_fixed_data_come_again_and_infinite_data_do_not():
    for mode, again in (('fixed', True), ('infinite', False)):
        cfg = VTATrainConfig(**SMALL, data_mode=mode, epoch_data_size=8, batch_size=4)
        batches, valid = vta_batches(cfg)
        first = [batches(i)['obs'] for i in range(2)]
        assert any((batches(2)['obs'] == x).all() for x in first) == again
        assert (batches(1)['obs'] == first[1]).all() and not (valid[0]['obs'][:4] == first[0]).all()


def test_command(tmp_path, capsys):
    args = ['train', 'experiment=colors', f'runs_dir={tmp_path}', 'name=a', 'loop.steps=4', 'loop.eval_every=2', 'loop.tensorboard=false',
            'belief_size=8', 'batch_size=4', 'seq_size=6', 'eval_size=16']
    assert main(args) == 0
    run = tmp_path/'colors'/'a'
    rows = read_metrics(run/'metrics.csv')
    assert {'rate', 'precision', 'recall', 'f1', 'auc', 'f1_random', 'f1_clock', 'f1_frame_difference', 'valid_obs_cost'} <= set(rows.columns)
    assert rows.beta.iloc[-1] < rows.beta.iloc[0]
    assert (run/'videos'/'boundaries_000004.gif').read_bytes()[:6] == b'GIF89a'
    assert read_json(run/'boundary_eval.json')['truth']['rows'][0]['method'] == 'model'
    assert main(args) == 0                                           # finished: nothing is done again
    assert main(['report', f'run={run}']) == 0
    page = (run/'report.md').read_text()
    assert '## Where segments begin' in page and '| frame difference |' in page and 'figures/boundary_grid.png' in page and 'bird' not in page
    assert main(['report', f'runs=[{run}]', f'out={tmp_path}/joint']) == 0 and 'a,model' in (tmp_path/'joint'/'tables'/'boundaries.csv').read_text()
    assert main(['boundaries', f'run={run}', 'n=4', 'n_permutations=20', 'n_bootstrap=20']) == 0 and (run/'boundaries'/'report.html').exists()
    model = VTA.load_from_checkpoint(run/'checkpoints'/'vta.ckpt')
    data = make_sequences(VTATrainConfig(env_type='simple_colors', init_size=3, seq_size=6), 2, 0)
    assert np.isfinite(window_episodes(model, [data])['read_prob']).all()
    with pytest.raises(UserError, match='vta'): VTA.load_from_checkpoint(run/'checkpoints'/'last.ckpt')
