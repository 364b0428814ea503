"""MLflow with a real store: what it is told, over a power cut, and what it says when it cannot be reached."""
import sys

import pytest
import torch
from fastai.basics import Callback
from torch import nn

pytest.importorskip('mlflow')
pytest.importorskip('sqlalchemy')

from dreamer_wb.core.config import LoopConfig
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import Run, UserError, read_metrics

LOOP = LoopConfig(steps=24, lr=1e-2, log_every=4, eval_every=12, checkpoint_seconds=0, tensorboard=False, progress=False, amp='off', mlflow=True)


class Net(nn.Module):
    "Has an image loss and a KL, as a world model."
    def __init__(self):
        super().__init__()
        self.net, self.scales, self.ratios = nn.Linear(3, 2), dict(image=2., dyn=.5), dict(image_to_kl=(['image'], ['dyn', 'rep']))
    def forward(self, batch):
        y = self.net(batch['obs'])
        return dict(image=(y[..., 0] - batch['obs'].sum(-1))**2, dyn=1 + y[..., 1]**2), {}


class At(Callback):
    order = 95
    def after_batch(self):
        if self.training and self.train_iter == 15: raise ZeroDivisionError('dark')


def batches(step): return dict(obs=torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(step)))

def train(folder, cbs=(), **kwargs):
    set_seed(3)
    run = Run.create(dict(loop=vars(LOOP), words='x'*600), 'net', folder, 'a')
    try: return fit(Net(), batches, LOOP, run, cbs=cbs, **kwargs)
    finally: run.close()

def stored(uri):
    "Client, and the runs in the store, oldest first."
    from mlflow import MlflowClient
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name('net').experiment_id
    return client, client.search_runs([experiment], order_by=['start_time'])


def test_store_in_the_run_folder(tmp_path, monkeypatch):
    "A power cut, then to the end: one run, no step twice, all numbers of metrics.csv; the ratio that one plots; nothing outside of the folder."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    uri = f'sqlite:///{tmp_path/"runs/net/a/mlflow.db"}'
    with pytest.raises(ZeroDivisionError): train(tmp_path/'runs', [At()])
    assert [r.info.status for r in stored(uri)[1]] == ['FAILED']
    train(tmp_path/'runs')
    client, [run] = stored(uri)
    assert run.info.status == 'FINISHED' and run.info.run_name == 'a/train'
    assert run.data.params['loop.lr'] == '0.01' and len(run.data.params['words']) == 500
    table = read_metrics(tmp_path/'runs/net/a/metrics.csv').set_index('step')
    for name in ('loss', 'image', 'lr', 'image_to_kl'):
        history = client.get_metric_history(run.info.run_id, name)
        assert [m.step for m in history] == [4, 8, 12, 16, 20, 24]
        assert [m.value for m in history] == pytest.approx(table[name].tolist(), rel=1e-5)
    assert table['image_to_kl'].tolist() == pytest.approx((2*table['image']/(.5*table['dyn'])).tolist(), rel=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ['runs']


def test_store_elsewhere(tmp_path, monkeypatch):
    "`MLFLOW_TRACKING_URI` gathers several runs; a training that starts over is a new one."
    uri = f'sqlite:///{tmp_path/"all.db"}'
    monkeypatch.setenv('MLFLOW_TRACKING_URI', uri)
    monkeypatch.chdir(tmp_path)
    train(tmp_path/'runs')
    train(tmp_path/'runs', resume=False)
    client, runs = stored(uri)
    assert len(runs) == 2 and all(len(client.get_metric_history(r.info.run_id, 'loss')) == 6 for r in runs)
    assert not (tmp_path/'runs/net/a/mlflow.db').exists()


def test_one_line_errors(tmp_path, monkeypatch):
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'nonsense://here')
    with pytest.raises(UserError, match='MLflow did not start at nonsense://here .*; check MLFLOW_TRACKING_URI, or loop.mlflow=false'): train(tmp_path/'a')
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    with pytest.raises(UserError, match='loop.mlflow=true needs MLflow: `pip install mlflow`, or loop.mlflow=false'): train(tmp_path/'b')
