"Boundaries as a user meets them: sequences on disk, training, the page, the doctor; killed, resumed, and asked for what is not there."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamer_wb.cli import COMMANDS, kind_of, main
from dreamer_wb.core.config import compose
from dreamer_wb.core.runs import Run, load_checkpoint, read_json, read_metrics
from dreamer_wb.data.episodes import EpisodeStore, write_episode
from dreamer_wb.vta.bouncing_balls import color_patterns
from dreamer_wb.vta.inspect import run_episodes
from dreamer_wb.vta.model import VTATrainConfig

TINY = ['belief_size=8', 'state_size=3', 'seq_size=8', 'init_size=2', 'batch_size=4', 'eval_size=16', 'loop.tensorboard=false', 'loop.log_every=5']
WORLD = ['size=32', 'encoder.depth=4', 'encoder.mults=[1,2]', 'decoder.depth=4', 'decoder.mults=[1,2]', 'dynamics.name=hierarchy', 'dynamics.stoch=4', 'dynamics.deter=16', 'dynamics.hidden=16',
         'dynamics.blocks=2', 'dynamics.hierarchy.max_seg_len=5', 'action_dim=3', 'batch_size=4', 'batch_length=10', 'loop.steps=4', 'loop.eval_every=0', 'loop.tensorboard=false', 'experiment=custom']
BALLS = ['source=bouncing_balls', 'n=40', 'n_val=8', 'n_test=1', 'steps=30', 'balls.balls=1', 'balls.radius=8']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Walks through the maze on disk, a VTA and a hierarchy that saw a few of them."
    root = tmp_path_factory.mktemp('runs')
    assert main(['prepare', 'source=3d_maze', f'out_dir={root}/maze', 'n=12', 'n_val=8', 'n_test=1', 'steps=40']) == 0
    assert main(['train', 'experiment=maze_cpu', f'data_dir={root}/maze', f'runs_dir={root}', 'name=vta', 'loop.steps=6', 'loop.eval_every=3', *TINY]) == 0
    assert main(['train', f'data_dir={root}/maze', f'runs_dir={root}', 'name=world', *[w for w in WORLD if not w.startswith('experiment')]]) == 0
    return dict(root=root, vta=root/'maze_cpu'/'vta', world=root/'custom'/'world', maze=root/'maze')


def test_the_maze_has_actions_rewards_and_boundaries(runs):
    store = EpisodeStore(runs['maze']/'train')
    assert len(store) == 12 and store.data['act'].shape[-1] == 3 and store.data['rew'].any() and (store.lengths == 40).all()
    first = store.offsets[:-1]
    assert store.data['read'][first].all() and not store.data['rew'][first].any() and not store.data['act'][first].any()
    assert (store.data['read'] | (store.data['rew'] == 0)).all()                                # a new hallway is a new segment


def test_training_logs_scores_and_films(runs):
    rows = read_metrics(runs['vta']/'metrics.csv')
    assert {'rate', 'precision', 'recall', 'f1', 'auc', 'f1_random', 'f1_clock', 'f1_frame_difference'} <= set(rows.columns)
    assert all(f.read_bytes()[:6] == b'GIF89a' for f in (runs['vta']/'videos').glob('*.gif')) and len(list((runs['vta']/'videos').glob('*.gif'))) == 2
    assert [s['step'] for s in read_json(runs['vta']/'doctor.json')['boundaries_training']] == [3, 6]


@pytest.mark.parametrize('kind', ['vta', 'world'])
def test_the_page(runs, kind, capsys):
    assert main(['boundaries', f'run={runs[kind]}', 'n=8', 'n_permutations=40', 'n_bootstrap=20', 'events=[delta,reward]', 'window=boundary']) == 0
    folder = runs[kind]/'boundaries'
    assert f'page: {folder}/report.html' in capsys.readouterr().out
    result, page = read_json(folder/'boundary_eval.json'), (folder/'report.md').read_text('utf-8')
    assert [e['event'] for e in result['events']] == ['frame delta > 90 %', 'reward'] and result['truth']['n_true'] > 0
    assert result['diagnosis']['cause'] in page and (folder/'figures'/'boundary_grid.png').stat().st_size > 1000
    limit = {'vta': 10, 'world': 5}[kind]
    assert result['model']['max_seg_len'] == limit and 'As they were saved with the run' in page


def test_episodes_are_aligned_with_their_files(runs):
    store = EpisodeStore(runs['maze']/'val')
    for kind, part in (('vta', slice(2, 34)), ('world', slice(0, 40))):                        # 36 - 4 frames are four windows of 8
        for i, e in enumerate(run_episodes(Run.open(runs[kind]))):
            assert (e['true'] == store[i]['read'][part]).all() and (e['obs'] == store[i]['obs'][part]).all() and (e['rew'] == store[i]['rew'][part]).all()


def test_doctor_of_both_kinds(runs, capsys):
    assert main(['doctor', f'run={runs["vta"]}', 'images=8']) == 0
    assert capsys.readouterr().out.startswith('boundaries: ')
    assert main(['doctor', f'run={runs["world"]}', 'images=8']) == 0
    out = capsys.readouterr().out
    assert out.startswith('pictures: ') and '\nboundaries: ' in out
    assert read_json(runs['world']/'doctor.json').keys() >= {'run', 'boundaries', 'boundaries_training'}
    assert (runs['vta']/'figures'/'doctor_boundaries.png').exists()


def test_events_of_games(runs, tmp_path):
    "Lives, score and room stand in `info`; they need no emulator."
    data = color_patterns(2, 40, size=32)
    for i in range(2):
        info = dict(lives=[3]*20 + [2]*20, score=[0]*10 + [5]*30, room=[1]*15 + [7]*25)
        write_episode(tmp_path/f'{i}.npz', data['obs'][i], act=np.zeros((40, 3)), rew=np.diff(info['score'], prepend=0), info=json.dumps(info))
    assert main(['boundaries', f'run={runs["world"]}', f'episodes={tmp_path}', 'events=[lives,score,room]', 'n_permutations=20', 'n_bootstrap=20', f'out={tmp_path}/page']) == 0
    events = read_json(tmp_path/'page'/'boundary_eval.json')['events']
    assert {e['event']: e['n_events'] for e in events} == {'life loss': 2, 'score change': 2, 'room change': 2}


@pytest.mark.parametrize('args, said', [
    (['boundaries'], 'run: not given'),
    (['boundaries', 'run=nowhere'], 'not a run folder'),
    (['boundaries', 'run={flat}'], 'one level'),
    (['boundaries', 'run={vta}', 'episodes=nowhere'], 'no such folder'),
    (['boundaries', 'run={vta}', 'level=2'], 'one level of boundaries'),
    (['boundaries', 'run={world}', 'level=2'], 'level=2: the model has 2 levels'),
    (['boundaries', 'run={vta}', 'events=[lifes]'], 'choose delta'),
    (['boundaries', 'run={vta}', 'max_seg_len=50'], 'unknown key'),
    (['boundaries', 'run={vta}', 'show=99'], 'there are 8 episodes'),
    (['prepare', 'source=bouncing_bals'], 'did you mean `bouncing_balls`'),
    (['prepare', 'source=3d_maze', 'out_dir={maze}', 'steps=7'], 'steps=40, now steps=7'),
    (['prepare', 'source=3d_maze', 'data_root=x'], 'unknown key')])
def test_errors_are_one_line(runs, tmp_path, capsys, args, said):
    flat = Run.create({'dynamics': {'name': 'rssm'}}, 'flat', tmp_path, 'a')
    assert main([a.format(flat=flat.path, **runs) for a in args]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1, err


def test_the_look_changes_no_weight_and_the_bar_shows_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('DREAMER_WB_PROGRESS', '1')
    weights = []
    for name, on in (('looked', 'true'), ('left', 'false')):
        assert main(['train', 'experiment=colors', f'runs_dir={tmp_path}', f'name={name}', f'doctor={on}', 'loop.steps=8', 'loop.eval_every=4', *TINY]) == 0
        weights.append(load_checkpoint(tmp_path/'colors'/name/'checkpoints'/'vta.ckpt')['state'])
        assert (tmp_path/'colors'/name/'doctor.json').exists() == (on == 'true')
    bar = capsys.readouterr().err
    assert all(f' {word} ' in bar for word in ('rate', 'precision', 'recall', 'f1', 'f1_random', 'auc'))
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))


def command(*args): return subprocess.Popen([sys.executable, '-c', 'from dreamer_wb.cli import main; main()', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                            env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))


def kill_when(victim, ready):
    "SIGKILL as soon as something is there."
    for _ in range(15000):
        if ready() or victim.poll() is not None: break
        time.sleep(.02)
    assert victim.poll() is None, victim.communicate()
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()


def test_prepare_and_train_go_on_after_kill(tmp_path):
    "kill -9 while episodes are written, and again in mid-training: the same commands finish with the same bytes and weights."
    args = ['prepare', *BALLS, 'n=400', 'compress=true']
    kill_when(command(*args, f'out_dir={tmp_path}/a'), lambda: (tmp_path/'a'/'train'/'00010.npz').exists())
    assert not read_json(tmp_path/'a'/'prepare.json')['complete']
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path/'a').rglob('*.npz')}
    for out in 'ab': assert main([*args, f'out_dir={tmp_path}/{out}']) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    files = [{p.relative_to(tmp_path/x): p.read_bytes() for p in (tmp_path/x).rglob('*.npz')} for x in 'ab']
    assert files[0] == files[1] and len(files[0]) == 409

    args = ['train', 'experiment=bouncing_balls_cpu', f'data_dir={tmp_path}/a', f'runs_dir={tmp_path}/runs', *TINY, 'loop.steps=60', 'loop.eval_every=30', 'loop.checkpoint_seconds=0']
    last = tmp_path/'runs'/'bouncing_balls_cpu'/'killed'/'checkpoints'/'last.ckpt'
    kill_when(command(*args, 'name=killed'), last.exists)
    assert load_checkpoint(last)['meta']['step'] < 60
    for name in ('killed', 'whole'): assert main([*args, f'name={name}']) == 0
    weights = [load_checkpoint(tmp_path/'runs'/'bouncing_balls_cpu'/name/'checkpoints'/'vta.ckpt')['state'] for name in ('killed', 'whole')]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))
    seen = [read_json(tmp_path/'runs'/'bouncing_balls_cpu'/name/'doctor.json')['boundaries_training'] for name in ('killed', 'whole')]
    assert [s['step'] for s in seen[0]] == [30, 60] and seen[0] == seen[1]


SEED = '''{
  "exp_name": "vta_bouncing_balls_3070",
  "env_type": "bouncing_balls",
  "work_dir": "experiments5_test",
  "batch_size": 96,
  "epoch_data_size": 20000,
  "max_iters": 60000,
  "beta_anneal": 75,
  "learn_rate": 0.0005,
  "seg_num": 5,
  "seg_len": 8,
  "dt": 2.0,
  "data_mode": "fixed",
  "use_amp": true
}
'''

@pytest.mark.parametrize('how', [['--config', '{}'], ['--config={}'], ['config={}'], ['experiment={}']])
def test_the_published_config_file(tmp_path, monkeypatch, how):
    "The file of the users' repository, verbatim, in each way of giving it; a few updates, in the folder that it names."
    monkeypatch.chdir(tmp_path)
    Path('bouncing_balls_3070.json').write_text(SEED)
    args = [a.format('bouncing_balls_3070.json') for a in how]
    if how[0].startswith('experiment'):
        cfg = compose(VTATrainConfig, args)
        assert (cfg.batch_size, cfg.epoch_data_size, cfg.loop.steps, cfg.beta_anneal, cfg.loop.lr, cfg.seg_num, cfg.seg_len, cfg.dt, cfg.data_mode, cfg.use_amp) == (96, 20000, 60000, 75, 5e-4, 5, 8, 2., 'fixed', True)
        assert kind_of(COMMANDS['train'], args).schema == 'vta.model:VTATrainConfig'
    assert main(['train', *args, 'name=a', 'loop.steps=1', *TINY]) == 0
    assert (tmp_path/'experiments5_test'/'vta_bouncing_balls_3070'/'a'/'boundary_eval.json').exists()
