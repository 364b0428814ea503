"""Two processes, started by `accelerate launch` and connected by gloo, train what one process trains at the same global batch."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip('accelerate')

from dreamer_wb.core.runs import load_checkpoint, read_metrics
from distributed_worker import MODELS

LAUNCH = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
          '--dynamo_backend', 'no', '--num_cpu_threads_per_process', '1', '--main_process_port', '0']


def launch(checkout, *args, **env):
    "Start a command twice, on the CPU."
    env = dict(os.environ, ACCELERATE_USE_CPU='true', PYTHONPATH=os.pathsep.join([str(checkout), str(checkout/'tests')]), **env)
    return subprocess.run([sys.executable, *LAUNCH, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def two(tmp_path_factory, checkout):
    "What each of two processes got, and their folder."
    folder = tmp_path_factory.mktemp('two')
    done = launch(checkout, checkout/'tests'/'distributed_worker.py', folder)
    files = [folder/f'{i}.json' for i in range(2)]
    assert all(f.exists() for f in files), done.stderr[-6000:]
    return [json.loads(f.read_text()) for f in files], folder, done


@pytest.mark.parametrize('name', ['still', 'laprop', 'fixed'])
def test_same_as_one_process(two, name, tmp_path):
    "Without noise the two trajectories are the same, to rounding: losses of the record, evaluations, weights."
    (main, other), _, _ = two
    one = MODELS[name](tmp_path)
    assert one['loss'][-1] < .9*one['loss'][0]
    for k in ('loss', 'valid', 'weights'): np.testing.assert_allclose(main[name][k], one[k], rtol=2e-4, atol=2e-6)
    assert main[name]['weights'] == other[name]['weights'] and main[name]['loss'] == other[name]['loss']


def test_noise_is_their_own(two, tmp_path):
    "A world model draws other numbers in each process, so the curve differs from one process's as seeds do."
    (main, other), _, _ = two
    one = MODELS['dream'](tmp_path)
    assert main['dream']['draw'] != other['dream']['draw'] and main['dream']['weights'] == other['dream']['weights']
    assert one['loss'][-1] < .6*one['loss'][0]
    np.testing.assert_allclose(main['dream']['loss'], one['loss'], rtol=.1)


def test_only_the_main_process_writes(two):
    "One record, without a row twice, one environment, no files of others."
    _, folder, _ = two
    run = folder/'net'/'whole'
    assert sorted(p.name for p in run.iterdir()) == ['.lock', 'checkpoints', 'config.yaml', 'environment.json', 'metrics.csv']
    assert read_metrics(run/'metrics.csv')['step'].tolist() == [4, 8, 9, 12, 16, 18, 20, 24]
    assert len(json.loads((run/'environment.json').read_text())) == 1 and [p.name for p in (run/'checkpoints').iterdir()] == ['last.ckpt']


def test_resume(two):
    "A checkpoint that the main process wanted after step 9, a crash of both after 15: what follows is exact, noise included."
    (main, other), folder, _ = two
    assert main['cut'] == other['cut'] == ['ZeroDivisionError', 'dark'] and main['saved_at'] == 10     # decided with the gradients of the next step
    for results in (main, other):
        for k in ('weights', 'draw'): assert results['resumed'][k] == results['whole'][k]
    a, b = (read_metrics(folder/'net'/name/'metrics.csv').drop(columns=['seconds', 'cpu_seconds']) for name in ('whole', 'cut'))
    assert a.equals(b)


def test_all_stop_together(two):
    "One process was asked to stop: both do, after the same step, with a checkpoint."
    (main, other), _, _ = two
    assert main['asked'][0] == other['asked'][0] == 'KeyboardInterrupt' and main['asked_at'] == other['asked_at'] == 8


def test_errors(two):
    "NaN in the share of one, a batch that cannot be shared, another config: all processes end, and the message names the mend."
    (main, other), folder, done = two
    assert main['nan'][1].startswith('step 6: fit became NaN or infinite, its batch is in') and other['nan'][1].startswith('step 6: fit became NaN')
    assert np.load(folder/'net'/'nan'/'nan_batch.npz')['rew'].shape == (8, 2)                            # the whole batch
    assert main['odd'] == other['odd'] == ['UserError', 'a batch of 7 cannot be shared by 2 processes; choose a batch_size that 2 divides']
    assert [r['other'] for r in (main, other)] == ['from the main one0', 'from the main one1']
    assert done.returncode and len(re.findall('UserError: .* was made with another config', done.stderr)) == 1


def test_one_process_goes_on(two, tmp_path):
    "What two processes saved, one can read: same format, one generator state more."
    _, folder, _ = two
    state = load_checkpoint(folder/'net'/'whole'/'checkpoints'/'last.ckpt', 'training')['state']
    assert len(state['others']) == 1 and not (state['rng']['torch'] == state['others'][0]['torch']).all()
