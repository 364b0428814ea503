"""Training that is stopped in every way that we know, and goes on as if nothing had happened."""
import errno
import math
import os
import random
import signal
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.basics import Callback
from fastai.callback.tracker import EarlyStoppingCallback
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dreamer_wb.core import learner
from dreamer_wb.core.config import LoopConfig
from dreamer_wb.core.learner import Anneal, TensorBoardLog, fit, make_learner, set_seed
from dreamer_wb.core.runs import Run, UserError, load_checkpoint, read_metrics

LOOP = LoopConfig(steps=24, lr=1e-2, log_every=4, eval_every=9, checkpoint_seconds=0, tensorboard=False, progress=False, amp='off')


class Net(nn.Module):
    "Uses every global generator and a running mean, so that whatever a resume forgets shows in the weights."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(.1), nn.Linear(16, 2))
        self.scales = dict(fit=1., small=.1)

    def forward(self, batch):
        x = batch['obs'] + .1*torch.randn_like(batch['obs'])                                              # (B,T,3)
        y = self.net(x.flatten(0, 1)).view(*x.shape[:2], 2)*(1 + .1*np.random.rand())
        return dict(fit=(y[..., 0] - batch['rew'])**2, small=y[..., 1]**2*random.random()), dict(size=y.abs().mean())


def batches(step):
    g = np.random.default_rng(step)
    x = g.normal(size=(6, 2, 3)).astype('float32')
    return dict(obs=torch.from_numpy(x), rew=torch.from_numpy(x.sum(-1)))


class Valid:
    def __len__(self): return 2
    def batches(self, i): return {k: v[:6 - 3*i] for k, v in batches(1000 + i).items()}


class At(Callback):
    "Does something after a step."
    order = 95
    def __init__(self, step, do): self.step_, self.do = step, do
    def after_batch(self):
        if self.training and self.train_iter == self.step_: self.do()


def crash(): raise ZeroDivisionError('dark')


def train(folder, name, loop=LOOP, cbs=(), data=batches, **kwargs):
    "One command: seed, model, run, fit."
    set_seed(3)
    model, run = Net(), Run.create(dict(loop=vars(loop)), 'net', folder, name)
    try: return fit(model, data, loop, run, Valid(), cbs, **kwargs)
    finally: run.close()


def same(a, b):
    "Weights, buffers, optimizer and record of two learners are equal to the last bit."
    for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(x, y)
    for x, y in zip(a.opt.opt.state.values(), b.opt.opt.state.values()):
        for k in x: assert torch.equal(x[k], y[k])
    frames = [read_metrics(Path(l.path)/'metrics.csv').drop(columns=['seconds', 'cpu_seconds']) for l in (a, b)]
    assert frames[0].equals(frames[1]), frames
    return True


@pytest.fixture(scope='module')
def whole(tmp_path_factory): return train(tmp_path_factory.mktemp('whole'), 'whole')


# --- exactness

class SaveAt(Callback):
    "A checkpoint after this step and no other."
    order = 80
    def __init__(self, step): self.step_ = step
    def after_batch(self): self.checkpoint.loop.checkpoint_seconds = 0. if self.train_iter == self.step_ else 1e9


@settings(max_examples=10)
@given(cuts=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=2))
def test_resume_anywhere(tmp_path_factory, whole, cuts):
    "Power cuts at any steps, the last checkpoint at any step before, or none: rows and weights are those of the undisturbed run."
    folder = tmp_path_factory.mktemp('cut')
    for saved, step in cuts:
        try: train(folder, 'a', replace(LOOP), [SaveAt(saved), At(step, crash)])
        except ZeroDivisionError: pass
    same(whole, train(folder, 'a'))


@pytest.mark.parametrize('change', [dict(opt='sgd'), dict(opt='laprop'), dict(schedule='onecycle', weight_decay=.1), dict(schedule='cosine', clip=0.), dict(amp='bf16'),
                                    dict(eval_every=0)], ids=str)
def test_resume_settings(tmp_path, change):
    loop = replace(LOOP, **change)
    with pytest.raises(ZeroDivisionError): train(tmp_path, 'cut', loop, [At(17, crash)])
    same(train(tmp_path, 'whole', loop), train(tmp_path, 'cut', loop))


@pytest.mark.parametrize('every', [0, 9])
@pytest.mark.parametrize('first', [20, 24])
def test_more_steps(tmp_path, every, first):
    "A run that was made longer, after a power cut in its first part as well, has the weights of one that was planned so long."
    short, long = (replace(LOOP, steps=n, eval_every=every, warmup=5) for n in (first, 40))
    with pytest.raises(ZeroDivisionError): train(tmp_path, 'grown', short, [At(17, crash)])
    train(tmp_path, 'grown', short)
    grown, planned = train(tmp_path, 'grown', long), train(tmp_path, 'planned', long)
    assert all(torch.equal(x, y) for x, y in zip(grown.model.state_dict().values(), planned.model.state_dict().values()))
    last = [l.recorder.rows[-1] for l in (grown, planned)]
    assert last[0]['valid_loss'] == last[1]['valid_loss'] and last[0]['step'] == 40
    with pytest.raises(UserError, match='loop.steps was 40, now 24'): train(tmp_path, 'grown', replace(LOOP, steps=24, eval_every=every, warmup=5))


def test_evaluation_does_not_disturb(tmp_path, whole):
    "Other evaluations, same weights, even if somebody draws pictures; two evaluations of one model draw the same noise."
    class Pictures(Callback):
        def after_validate(self): torch.rand(3), np.random.rand(3), random.random()
    other = train(tmp_path, 'other', replace(LOOP, eval_every=5), cbs=[Pictures()])
    for x, y in zip(whole.model.state_dict().values(), other.model.state_dict().values()): assert torch.equal(x, y)
    frozen = train(tmp_path, 'frozen', replace(LOOP, eval_every=5, lr=0.), cbs=[Anneal(lambda model, pct: model.net[1].eval())])
    assert len(set(read_metrics(Path(frozen.path)/'metrics.csv').valid_fit.dropna())) == 1


def test_finished_run_is_not_repeated(tmp_path):
    first = train(tmp_path, 'a')
    again = train(tmp_path, 'a', data=None)                            # no data: no step
    assert same(first, again) and not again.model.training


def test_resume_false_starts_over(tmp_path):
    first = train(tmp_path, 'a')
    same(first, train(tmp_path, 'a', resume=False))


def test_early_stopping_remembers(tmp_path):
    "fastai's own callback finds its `best` and `wait` again, and a run that was stopped early stays stopped."
    loop = replace(LOOP, steps=200, lr=.05, eval_every=5)
    early = lambda: EarlyStoppingCallback(patience=3)
    whole = train(tmp_path, 'whole', loop, [early()])
    assert whole.train_iter < 200
    with pytest.raises(ZeroDivisionError): train(tmp_path, 'cut', loop, [early(), At(whole.train_iter - 1, crash)])
    again = train(tmp_path, 'cut', loop, [early(), At(-1, crash)])
    assert again.train_iter == whole.train_iter and same(whole, again)
    assert train(tmp_path, 'cut', loop, [early(), At(-1, crash)]).train_iter == whole.train_iter


def test_callback_state(tmp_path):
    "What a callback with a `state_dict` has gathered is there after a resume."
    class Collect(Callback):
        seen = torch.zeros(0)
        def after_batch(self): self.seen = torch.cat([self.seen, self.xb[0]['rew'][0, :1]]) if self.training else self.seen
        def state_dict(self): return dict(seen=self.seen)
        def load_state_dict(self, state): self.seen = state['seen']
    with pytest.raises(ZeroDivisionError): train(tmp_path, 'a', cbs=[Collect(), At(9, crash)])
    collect = Collect()
    train(tmp_path, 'a', cbs=[collect, At(9, lambda: None)])
    assert torch.equal(collect.seen, torch.stack([batches(i)['rew'][0, 0] for i in range(24)]))


def test_titles_have_their_own_files(tmp_path):
    run = Run.create({}, 'net', tmp_path, 'a')
    for title in ('train', 'head'): fit(Net(), batches, LOOP, run, title=title)
    assert {p.name for p in run.checkpoints.iterdir()} == {'last.ckpt', 'head.ckpt'}
    assert (run.path/'metrics.csv').exists() and (run.path/'metrics_head.csv').exists()
    run.close()


# --- kill -9, Ctrl-C, SIGTERM

COMMAND = textwrap.dedent('''
    import sys
    sys.path[:0] = {path!r}
    import os, signal, test_resume as t
    class Kill(t.Callback):
        def after_pred(self):
            if self.training and self.train_iter == 16: os.kill(os.getpid(), signal.SIGKILL)
    t.train({folder!r}, 'killed', cbs=[Kill()])''')


@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
def test_kill_9(tmp_path, run_python, whole):
    "A process that is killed in the middle of a step; the same command in another process (this one) ends with the weights of the undisturbed run."
    code = COMMAND.format(path=[str(Path(__file__).parent), *sys.path], folder=str(tmp_path))
    assert run_python('-c', code).returncode == -signal.SIGKILL
    step = load_checkpoint(tmp_path/'net/killed/checkpoints/last.ckpt')['meta']['step']
    assert 0 < step <= 16
    same(whole, train(tmp_path, 'killed', cbs=[At(-1, None)]))


@pytest.mark.skipif(sys.platform == 'win32', reason='no such signals')
@pytest.mark.parametrize('number, error', [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize('where', ['before_batch', 'after_pred', 'before_validate'])
def test_signals(tmp_path, whole, capsys, number, error, where):
    "In the middle of a step or of an evaluation: the step is finished and saved, the signal raised, and the resume exact."
    loop, handler = replace(LOOP, checkpoint_seconds=1e9), signal.getsignal(number)
    class Send(Callback): pass
    def send(self):
        if self.train_iter == 18 and not self.sent and (self.training or where == 'before_validate'):
            self.sent = True
            os.kill(os.getpid(), number)
    setattr(Send, where, send)
    Send.sent = False
    with pytest.raises(error): train(tmp_path, 'a', loop, [Send()])
    assert 'stopping after this step' in capsys.readouterr().err and signal.getsignal(number) is handler
    assert load_checkpoint(tmp_path/'net/a/checkpoints/last.ckpt')['meta']['step'] == (18 if where == 'before_validate' else 19)
    cb = Send()
    cb.sent = True
    same(whole, train(tmp_path, 'a', loop, [cb]))


def test_second_ctrl_c_is_immediate(tmp_path):
    "The step is not finished."
    class Twice(Callback):
        def after_pred(self):
            for _ in range(2 if self.train_iter == 5 else 0): os.kill(os.getpid(), signal.SIGINT)
            if self.train_iter == 5: pytest.fail('still there')
    with pytest.raises(KeyboardInterrupt): train(tmp_path, 'a', replace(LOOP, checkpoint_seconds=1e9), [Twice()])
    assert not (tmp_path/'net/a/checkpoints/last.ckpt').exists()


# --- bad numbers, full disks, wrong files

def poisoned(key, step=16, value=math.nan):
    "Batches of which number `step` is bad."
    return lambda i: {**batches(i), key: torch.full_like(batches(i)[key], value)} if i == step else batches(i)


@pytest.mark.parametrize('lazy', [False, True], ids=['cpu', 'as on a gpu'])
def test_nan_loss(tmp_path, monkeypatch, lazy):
    "The first bad step is named and its batch is kept, whether one looks at each step or only when the record is read."
    if lazy: monkeypatch.setattr(learner, 'StopOnNan', lambda path, each_step, f=learner.StopOnNan: f(path, False))
    with pytest.raises(UserError, match='step 16: fit became NaN or infinite, its batch is in .*nan_batch.npz; try a smaller loop.lr') as e:
        train(tmp_path, 'a', data=poisoned('rew'))
    batch = np.load(tmp_path/'net/a/nan_batch.npz', allow_pickle=False)
    assert '\n' not in str(e.value) and batch['step'] == 16 and np.isnan(batch['rew']).all() and np.array_equal(batch['obs'], batches(16)['obs'])
    ckpt = load_checkpoint(tmp_path/'net/a/checkpoints/last.ckpt')
    assert ckpt['meta']['step'] <= 16 and all(v.isfinite().all() for v in ckpt['state']['model'].values())


@pytest.mark.parametrize('lazy', [False, True], ids=['cpu', 'as on a gpu'])
def test_nan_gradient(tmp_path, monkeypatch, lazy):
    "A finite loss with an infinite gradient."
    class Root(Net):
        def forward(self, batch):
            losses, metrics = super().forward(batch)
            zero = (self.net[0].weight[0, 0]*0*batch['rew']).abs()
            return dict(losses, small=zero.sqrt() if batch['rew'][0, 0] == 5 else zero), metrics             # d sqrt(0) = inf
    if lazy: monkeypatch.setattr(learner, 'StopOnNan', lambda path, each_step, f=learner.StopOnNan: f(path, False))
    run = Run.create({}, 'net', tmp_path, 'a')
    with pytest.raises(UserError, match='step 9: the gradient became NaN or infinite'): fit(Root(), poisoned('rew', 9, 5.), LOOP, run)
    run.close()


def test_full_disk(tmp_path, monkeypatch, whole):
    "A checkpoint that cannot be written ends the training with one line; the one before is intact, and goes on once there is room."
    move = os.replace
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(UserError, match='last.ckpt: not written, the disk is full; make room'):
        train(tmp_path, 'a', cbs=[At(12, lambda: monkeypatch.setattr(os, 'replace', full))])
    monkeypatch.setattr(os, 'replace', move)
    assert load_checkpoint(tmp_path/'net/a/checkpoints/last.ckpt')['meta']['step'] == 12
    same(whole, train(tmp_path, 'a', cbs=[At(-1, crash)]))


def test_full_disk_for_the_record(tmp_path, monkeypatch):
    "A row that does not fit, and a new column for which the file cannot be rewritten: one line, and the rows before are there."
    log, path = learner.CsvLog(tmp_path/'metrics.csv'), tmp_path/'metrics.csv'
    log(dict(step=1, loss=1.))
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        with pytest.raises(UserError, match='metrics.csv: not written, the disk is full'): log(dict(step=2, loss=1., valid_loss=1.))
    assert list(read_metrics(path).step) == [1]
    if os.path.exists('/dev/full'):
        log.file, log.columns = open('/dev/full', 'a'), ['step', 'loss']
        with pytest.raises(UserError, match='metrics.csv: not written, the disk is full'): log(dict(step=3, loss=1.))


def test_checkpoint_of_another_training(tmp_path):
    run = Run.create({}, 'net', tmp_path, 'a')
    fit(Net(), batches, LOOP, run)
    with pytest.raises(UserError, match='loop.lr was 0.01, now 0.1'): fit(Net(), batches, replace(LOOP, lr=.1), run)
    other = Net()
    other.net[4] = nn.Linear(16, 3)
    with pytest.raises(UserError, match='last.ckpt: belongs to another model') as e: fit(other, batches, LOOP, run)
    assert '\n' not in str(e.value)
    run.close()


# --- the loop itself

def test_no_wait_within_a_step():
    "Between two rows of the record no value is fetched from the device (on a CPU, where we can count: except for the watch for NaN)."
    from torch.utils._python_dispatch import TorchDispatchMode
    fetched = []
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if 'local_scalar_dense' in str(func) or 'is_nonzero' in str(func): fetched.append(str(func))
            return func(*args, **(kwargs or {}))
    class Quiet(Net):
        def forward(self, batch):
            y = self.net(batch['obs'].flatten(0, 1)).view(6, 2, 2)
            return dict(fit=y[..., 0]**2, small=y[..., 1]**2), dict(size=y.mean())
    learn = make_learner(Quiet(), batches, replace(LOOP, steps=30, log_every=30, eval_every=0))
    learn.stop_on_nan.each_step = False
    with Count(): learn.fit(1)
    assert len(learn.recorder.rows) == 1 and fetched == []               # `tolist` of the one row does not count as a scalar
    learn = make_learner(Quiet(), batches, replace(LOOP, steps=30, log_every=30, eval_every=0))
    with Count(): learn.fit(1)
    assert len(fetched) == 60                                            # the counter counts: loss and gradient of each step


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('amp', ['off', 'bf16'])
def test_gpu(tmp_path, amp):
    "On a GPU: the same exactness, and CUDA itself watches that no step waits."
    loop = replace(LOOP, amp=amp, log_every=10, checkpoint_seconds=1e9)
    def go(name, *cbs):
        set_seed(3)
        run = Run.create({}, 'net', tmp_path, name)
        try: return fit(Net().cuda(), batches, loop, run, cbs=cbs)
        finally: run.close()
    watch = lambda mode: lambda: torch.cuda.set_sync_debug_mode(mode)
    whole = go('whole', At(2, watch('error')), At(9, watch('default')))
    with pytest.raises(ZeroDivisionError): go('cut', At(12, lambda: setattr(loop, 'checkpoint_seconds', 0)), At(17, crash))
    same(whole, go('cut', At(-1, crash), At(-2, crash)))


def test_param_groups(tmp_path):
    "A model's own groups keep their own learning rates under the schedule."
    class Groups(Net):
        def param_groups(self, loop):
            return [dict(params=list(self.net[:2].parameters()), lr=loop.lr/10), dict(params=list(self.net[2:].parameters()))]
    rates = []
    class Watch(Callback):
        def after_batch(self): rates.append([g['lr'] for g in self.opt.opt.param_groups])
    fit(Groups(), batches, replace(LOOP, schedule='cosine'), cbs=[Watch()])
    assert all(math.isclose(a*10, b, abs_tol=1e-12) for a, b in rates) and rates[-1][1] < .1*max(b for _, b in rates)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = train(tmp_path, 'a', replace(LOOP, tensorboard=True))
    events = EventAccumulator(str(Path(learn.path)/'tb')).Reload()
    assert {'loss/train', 'loss/valid', 'fit/train', 'grad_norm/train'} <= set(events.Tags()['scalars'])
    assert [e.step for e in events.Scalars('loss/valid')] == [9, 18, 24]


@pytest.mark.parametrize('name, log', [('wandb', dict(wandb=True)), ('torch.utils.tensorboard', dict(tensorboard=True))])
def test_missing_logger(tmp_path, monkeypatch, name, log):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match='`pip install (wandb|tensorboard)`'): train(tmp_path, 'a', replace(LOOP, **log))


def test_wandb_offline(tmp_path, monkeypatch):
    "WANDB_MODE=offline needs neither account nor network; the files lie in the run folder."
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    learn = train(tmp_path, 'a', replace(LOOP, wandb=True))
    files = list(Path(learn.path).glob('wandb/offline-run-*/*.wandb'))
    deadline = time.time() + 30                                          # wandb's own process writes the file
    while b'valid_loss' not in files[0].read_bytes() and time.time() < deadline: time.sleep(.1)
    assert len(files) == 1 and b'valid_loss' in files[0].read_bytes()


def test_bar(tmp_path, monkeypatch, capsys):
    "The bar shows the total, the losses and the evaluation."
    monkeypatch.setenv('DREAMER_WB_PROGRESS', '1')
    train(tmp_path, 'a', replace(LOOP, progress=True))
    err = capsys.readouterr().err
    assert all(word in err for word in ('train: 100%', 'loss ', 'fit ', 'small ', 'valid_loss '))
