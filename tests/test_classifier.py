"""The comparison of classifiers: what an interruption, damage, wrong input or a look at the test labels would do."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dreamer_wb.classifier import compare, methods
from dreamer_wb.classifier.compare import ClassifyConfig, CnnFit, HeadFit, ResnetFit, classify
from dreamer_wb.classifier.latents import Features, balanced_draw, evaluation_batches, training_batches
from dreamer_wb.classifier.methods import predict, train_classifier
from dreamer_wb.classifier.metrics import GROUPS, group_counts, group_metrics, wilson
from dreamer_wb.classifier.models import linear_head, resnet50, small_cnn
from dreamer_wb.core.config import DecoderConfig, EncoderConfig, TrainConfig
from dreamer_wb.core.runs import Run, UserError, read_json
from dreamer_wb.data.episodes import EpisodeStore, write_episode
from dreamer_wb.dreamer.world_model import DreamerWorldModel

COUNTS = dict(train=(60, 8, 6, 26), val=(16, 16, 12, 12), test=(20, 20, 14, 14))


def paint(folder, counts, seed, shuffle_labels=False):
    "Noise images whose upper half says the bird and whose lower half the place."
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(4), counts))
    labels = np.random.default_rng(99).permutation(groups//2) if shuffle_labels else groups//2
    folder.mkdir(parents=True)
    for i, (g, label) in enumerate(zip(groups, labels)):
        obs = rng.integers(60, 196, (1, 16, 16, 3))
        obs[:, :8] += 25*(2*(g//2) - 1)
        obs[:, 8:] += 60*(2*(g%2) - 1)
        write_episode(folder/f'{i:03}.npz', obs.astype(np.uint8), label=np.int64(label), place=np.int64(g%2))


def make_run(folder, data):
    "A finished run with an untrained world model: its latents are random projections, which is enough here."
    cfg = TrainConfig(experiment='test', data_dir=str(data), size=16, encoder=EncoderConfig(mults=[1, 2]), decoder=DecoderConfig(mults=[1, 2]))
    run = Run.create(cfg, 'test', folder, name='run')
    torch.manual_seed(0)
    DreamerWorldModel(cfg).save(run.checkpoints/'world_model.ckpt')
    run.close()
    return run.path


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('classifier')/'data'
    for seed, (split, counts) in enumerate(COUNTS.items()): paint(folder/split, counts, seed)
    return folder


@pytest.fixture
def run(tmp_path, data): return make_run(tmp_path, data)


def config(run, **kwargs):
    default = dict(models=['dreamer_linear', 'small_cnn'], methods=['erm', 'group_dro', 'dfr'], seeds=[0], maps=[], progress=False,
                   head=HeadFit(steps=20, evals=4), cnn=CnnFit(size=16, epochs=3, batch_size=25, evals=3))
    return ClassifyConfig(run=str(run), **{**default, **kwargs})


def cells(run): return {p.name: read_json(p)['row'] for p in sorted((Path(run)/'classify'/'cells').glob('*.json'))}
def timeless(rows): return {k: {c: v for c, v in row.items() if c != 'cpu_seconds'} for k, row in rows.items()}


@pytest.fixture(scope='module')
def reference(tmp_path_factory, data):
    "The cells of an undisturbed comparison in two processes; every other test computes in one."
    run = make_run(tmp_path_factory.mktemp('reference'), data)
    table = classify(config(run, workers=2, maps=['tsne']))
    assert list(table['model'].unique()) == ['dreamer_linear', 'small_cnn'] and len(table) == 6
    return timeless(cells(run))


# --- selection and the test set

def test_test_labels_do_not_choose(tmp_path, data, run):
    "With shuffled test labels every network, step and rule is the same; only the scores change."
    other = tmp_path/'shuffled'
    for split in ('train', 'val'): shutil.copytree(data/split, other/split)
    paint(other/'test', COUNTS['test'], 2, shuffle_labels=True)
    again = make_run(tmp_path/'again', other)
    for path in (run, again): classify(config(path))
    for name in ('dreamer_linear-erm-0', 'small_cnn-erm-0'):
        a, b = (torch.load(p/'classify'/'cells'/f'{name}.ckpt', weights_only=True)['state'] for p in (run, again))
        assert all(torch.equal(a[k], b[k]) for k in a), name
    first, second = cells(run), cells(again)
    assert {k: (r['step'], r['selection']) for k, r in first.items()} == {k: (r['step'], r['selection']) for k, r in second.items()}
    assert any(first[k]['acc_mean'] != second[k]['acc_mean'] for k in first)


@pytest.mark.parametrize('rule', ['val worst group', 'val average', 'last'])
def test_kept_weights_are_the_best_by_the_rule(rule):
    rng = np.random.default_rng(0)
    def rows(n):
        label, place = rng.integers(0, 2, (2, n))
        return Features(np.stack([label + rng.normal(size=n), place + .1*rng.normal(size=n)], 1), label, place)
    train, val = rows(200), rows(100)
    done = train_classifier(linear_head(2), train, val, 'erm', rule, epochs=4, batch_size=20, evals=8, lr=.3)
    best = max(done.history, key=lambda h: h['score']) if rule != 'last' else done.history[-1]
    assert done.history[done.history.index(best)]['step'] == done.step and done.selection.startswith(rule)
    assert methods.val_score(rule, val.label, predict(done.net, val, amp='auto'), val.group) == best['score']


# --- interruptions and damage

def test_interrupted_comparison_goes_on(run, reference, monkeypatch):
    "Ctrl-C in the fifth training: the finished cells stay untouched, the rest becomes what it would have been."
    real, calls = methods.train_classifier, []
    def train(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(compare, 'train_classifier', train)
    with pytest.raises(KeyboardInterrupt): classify(config(run))
    before = {p: p.stat().st_mtime_ns for p in (run/'classify'/'cells').glob('*.json')}
    assert 0 < len(before) < 6
    monkeypatch.undo()
    table = classify(config(run))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert timeless(cells(run)) == reference and len(table) == 6


def test_killed_comparison_goes_on(run, reference):
    "kill -9 after two cells."
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_classifier as t; t.classify(t.config({str(run)!r}))'
    process = subprocess.Popen([sys.executable, '-c', code], cwd=Path(__file__).parent.parent)
    end = time.time() + 300
    while len(list((run/'classify'/'cells').glob('*.json'))) < 2 and process.poll() is None and time.time() < end: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(cells(run)) >= 2
    classify(config(run))
    assert timeless(cells(run)) == reference
    assert not list((run/'classify').rglob('*.tmp'))


def test_interrupted_training_goes_on_bit_for_bit(tmp_path, data, monkeypatch):
    "Ctrl-C in mid-training of a network: weights, chosen step and history are those of an undisturbed training."
    stores = [EpisodeStore(data/s) for s in ('train', 'val')]
    def train(run, **kwargs):
        torch.manual_seed(0)
        return train_classifier(small_cnn(16), *stores, 'group_dro', seed=3, batch_size=25, epochs=6, evals=6, run=run, checkpoint_seconds=0, **kwargs)
    whole = train(None)
    real, calls = methods.predict, []
    def predict_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(methods, 'predict', predict_once)
    run = Run(tmp_path/'run', {})
    with pytest.raises(KeyboardInterrupt): train(run)
    monkeypatch.undo()
    parts = train(run)
    assert (parts.step, parts.history) == (whole.step, whole.history)
    for k, v in whole.net.state_dict().items(): assert torch.equal(v, parts.net.state_dict()[k]), k


def test_damage_is_mended(run, reference):
    "One process gives what two gave; damaged cells, networks and features are made again, to the same values."
    classify(config(run))
    assert timeless(cells(run)) == reference                          # one process, two processes: the same numbers
    folder = run/'classify'
    (folder/'cells'/'small_cnn-erm-0.json').write_text('{"key": ')
    (folder/'cells'/'small_cnn-erm-0.ckpt').write_bytes(b'PK\x03\x04 not a checkpoint')
    (folder/'cells'/'dreamer_linear-dfr-0.json').unlink()
    for f in folder.glob('features/*.npz'): os.truncate(f, 100)
    classify(config(run))
    assert timeless(cells(run)) == reference


def test_only_what_changed_is_made_again(run):
    classify(config(run))
    before = {p.name: p.stat().st_mtime_ns for p in (run/'classify'/'cells').glob('*.json')}
    classify(config(run, head=HeadFit(steps=21, evals=4)))
    changed = {p.name for p in (run/'classify'/'cells').glob('*.json') if p.stat().st_mtime_ns != before[p.name]}
    assert changed == {n for n in before if n.startswith('dreamer')}


# --- what is written

def test_results(run):
    table = classify(config(run, models=['dreamer_linear', 'pca_linear'], methods=['erm', 'group_balanced', 'group_dro', 'dfr', 'dfr_train'], seeds=[0, 1, 2], maps=['tsne']))
    folder = run/'classify'
    assert len(table) == 10 and set(table.seeds) == {3} and table.acc_worst_low.notna().all()
    rows, kept = pd.read_csv(folder/'results_seeds.csv'), json.loads((folder/'results.json').read_text())
    assert len(rows) == 30 and len(kept['table']) == 10 and kept['counts']['train'] == list(COUNTS['train'])
    for _, row in table.iterrows():
        own = rows[(rows.model == row['model']) & (rows.method == row['method'])]
        assert np.isclose(own.acc_worst.mean(), row.acc_worst) and np.isclose(own.acc_adj.mean(), row.acc_adj)
        assert row.selection == {'erm': 'last', 'dfr': 'C by worst group on half of val (needs val groups)', 'dfr_train': 'C by worst group on val (needs val groups)'}.get(
            row.method, 'val worst group (needs val groups)')
        assert np.array(row.confusion).sum() == 3*sum(COUNTS['test'])
    text = (folder/'results.md').read_text()
    assert text.count('\n| ') >= 11 and 'worst group' in text and (folder/'probes.csv').exists()
    assert {p.name for p in (run/'figures').iterdir()} == {'groups.png', 'map_tsne.png'}


def test_last_rows_are_named_from_scratch(run):
    with pytest.warns(UserWarning, match='STARTS FROM SCRATCH'):
        table = classify(config(run, models=['resnet50'], resnet=ResnetFit(weights='none', size=16, methods=['erm'], epochs=.3, batch_size=16, evals=1)))
    assert list(table['name']) == ['ResNet-50 (from scratch)'] and list(table['method']) == ['erm']


# --- weights of ResNet-50

@pytest.fixture
def offline(tmp_path, monkeypatch):
    "No network: every connection goes to a port on which nobody listens."
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'): monkeypatch.setenv(name, 'http://127.0.0.1:9')
    for name in ('no_proxy', 'NO_PROXY'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    return tmp_path/'torch'/'hub'/'checkpoints'


def test_resnet_without_network(offline):
    with pytest.warns(UserWarning, match='FROM SCRATCH .IMAGENET1K_V2 could not be downloaded'): net = resnet50('auto', size=32)
    assert net.title == 'resnet50 (from scratch)'
    with pytest.raises(UserError, match='IMAGENET1K_V2 could not be downloaded'): resnet50('IMAGENET1K_V2')
    offline.mkdir(parents=True, exist_ok=True)                       # weights that torch has fetched before need no network
    torch.save({**net[1].state_dict(), 'fc.weight': torch.zeros(1000, 2048), 'fc.bias': torch.zeros(1000)}, offline/'resnet50-11ad3fa6.pth')
    again = resnet50('auto', size=32)
    assert again.title == 'resnet50 (IMAGENET1K_V2)' and torch.equal(again[1].conv1.weight, net[1].conv1.weight)


def test_malicious_weights_are_refused(tmp_path):
    import pickle
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'exploded'),)
    (tmp_path/'bomb.pth').write_bytes(pickle.dumps({'conv1.weight': Bomb()}))
    with pytest.raises(UserError, match='bomb.pth'): resnet50(str(tmp_path/'bomb.pth'))
    assert not (tmp_path/'exploded').exists()


# --- wrong input

@pytest.mark.parametrize('kwargs, words', [
    (dict(models=['dreamer_liner']), 'did you mean `dreamer_linear`'), (dict(methods=['group_dra']), 'did you mean `group_dro`'),
    (dict(seeds=[1, 1]), 'named twice'), (dict(maps=['pca']), 'umap, tsne'), (dict(data_dir='/nowhere'), '/nowhere')])
def test_wrong_config(run, kwargs, words):
    with pytest.raises(UserError, match=words) as error: classify(config(run, **kwargs))
    assert '\n' not in str(error.value)


def test_missing_parts(tmp_path, run, data):
    with pytest.raises(UserError, match='not a run folder'): classify(config(tmp_path/'nothing'))
    (run/'checkpoints'/'world_model.ckpt').unlink()
    with pytest.raises(UserError, match='world_model.ckpt: not there'): classify(config(run))
    assert len(classify(config(run, models=['pca_linear'], methods=['erm']))) == 1       # the others do not need it


def test_unknown_places_and_labels(tmp_path, data):
    for split in COUNTS:
        (tmp_path/'data'/split).mkdir(parents=True)
        for i, path in enumerate(sorted((data/split).glob('*.npz'))):
            with np.load(path) as f: write_episode(tmp_path/'data'/split/path.name, f['obs'], label=f['label'])
    run = make_run(tmp_path, tmp_path/'data')
    with pytest.raises(UserError, match='group_dro needs images of all four groups'): classify(config(run))
    with pytest.raises(UserError, match='all four groups'): classify(config(run, methods=['erm'], selection='val worst group'))
    table = classify(config(run, methods=['erm']))                    # without places there is an accuracy, but no worst group
    assert table.acc_mean.between(0, 1).all() and table.acc_worst.isna().all()


def test_nan_latents(run):
    ckpt = torch.load(run/'checkpoints'/'world_model.ckpt', weights_only=True)
    for v in ckpt['state'].values(): v.fill_(float('nan')) if v.is_floating_point() else None
    torch.save(ckpt, run/'checkpoints'/'world_model.ckpt')
    with pytest.raises(UserError, match='NaN'): classify(config(run))


# --- properties

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 1), st.sampled_from([0., .2, .5, .7, 1.])), min_size=1, max_size=40), st.lists(st.integers(0, 90), min_size=4, max_size=4))
def test_metrics_agree_with_sklearn(items, train_counts):
    import warnings
    from sklearn import metrics as sk
    label, place, p = map(np.array, zip(*items))
    group = np.where(place < 0, -1, 2*label + place)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        row = group_metrics(label, np.stack([1 - p, p], 1), group, train_counts)
        pred = (p > .5).astype(int)
        assert np.isclose(row['acc_mean'], sk.accuracy_score(label, pred))
        assert row['confusion'] == sk.confusion_matrix(label, pred, labels=[0, 1]).tolist()
        assert np.isclose(row['macro_f1'], sk.f1_score(label, pred, average='macro', labels=[0, 1], zero_division=0))
        if len(set(label)) == 2: assert np.isclose(row['auroc'], sk.roc_auc_score(label, p))
        else: assert np.isnan(row['auroc'])
    accs = [sk.accuracy_score(label[group == g], pred[group == g]) if (group == g).any() else np.nan for g in range(4)]
    assert np.allclose([row[f'acc_{g}'] for g in GROUPS], accs, equal_nan=True)
    assert (group < 0).all() or np.isclose(row['acc_worst'], np.nanmin(accs))
    for g, a in zip(GROUPS, accs): assert np.isnan(a) or 0 <= row[f'low_{g}'] <= a + 1e-9 and a <= row[f'high_{g}'] + 1e-9 <= 1 + 2e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_solves_the_score_equation(n, share):
    "At both ends (p - p0)^2 = z^2 p0 (1 - p0) / n, or the end is the edge."
    p, z2 = round(share*n)/n, 1.959963984540054**2
    for end in wilson(p, n): assert end in (0, 1) or np.isclose((p - end)**2, z2*end*(1 - end)/n, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 60), st.integers(1, 70), st.integers(0, 5))
def test_batches_cover_every_epoch(n, batch_size, seed):
    data = Features(np.arange(2*n, dtype=np.float32).reshape(n, 2), np.arange(n) % 2, np.arange(n)//2 % 2)
    batches = training_batches(data, batch_size, seed)
    size = min(batch_size, n)
    seen = np.concatenate([batches(s)['index'] for s in range(2*n)])[:2*n]
    assert sorted(seen[:n]) == sorted(seen[n:]) == list(range(n)) and len(batches(0)['index']) == size
    assert np.concatenate([b['index'] for b in evaluation_batches(data, batch_size)]).tolist() == list(range(n))
    index = balanced_draw(data.group, np.random.default_rng(seed))
    assert len(set(index)) == len(index) and len(set(group_counts(data.group[index]))) == 1
