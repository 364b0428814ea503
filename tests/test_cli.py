"""The console command as a user meets it: the seed's commands from raw images to the report, errors, sweeps, kill -9."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamer_wb.cli import COMMANDS, main
from dreamer_wb.core.runs import Run

SMALL = ['dynamics.deter=32', 'dynamics.hidden=32', 'dynamics.stoch=8', 'dynamics.blocks=4', 'cnn_depth=4', 'batch_size=8', 'loop.progress=false', 'loop.tensorboard=false']


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    "The seed's layout: train/ val/ test/ with images and a class.txt of lines `name label place`."
    from PIL import Image
    from dreamer_wb.data.synthetic import Spec, render_many
    root = tmp_path_factory.mktemp('waterbirds')/'raw'
    for s, (split, n) in enumerate(dict(train=48, val=24, test=24).items()):
        specs = [Spec(i % 2, i//2 % 2, 1000*s + i, 5000 + 1000*s + i) for i in range(n)]
        images, _ = render_many(specs, 64)
        (root/split).mkdir(parents=True)
        for i, image in enumerate(images): Image.fromarray(image).save(root/split/f'bird {i}.png')
        (root/split/'class.txt').write_text(''.join(f'bird {i}.png {x.label} {x.place}\n' for i, x in enumerate(specs)), encoding='utf-8')
    return root


def command(*args, **kwargs):
    "`dreamer-wb` in a process of its own."
    return subprocess.Popen([sys.executable, '-c', 'import sys; from dreamer_wb.cli import main; sys.exit(main())', *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_seed_commands(raw, tmp_path, monkeypatch, capsys):
    "prepare, train, classify and report, spelled as in the users' document."
    monkeypatch.chdir(tmp_path)
    assert main(['prepare', f'data_root={raw}', 'out_dir=datasets/waterbirds_episodes', 'size=64']) == 0
    assert main(['train', 'experiment=waterbirds_minimal', 'data_dir=datasets/waterbirds_episodes', 'name=first', 'loop.steps=3', *SMALL]) == 0
    run = 'runs/waterbirds_minimal/first'
    assert f'next: dreamer-wb classify run={run}' in capsys.readouterr().out
    assert main(['classify', f'run={run}', 'models=[dreamer_linear,pca_linear]', 'methods=[erm,dfr]', 'seeds=[0]', 'pca_dims=4', 'maps=[]', 'head.steps=3', 'progress=false']) == 0
    assert main(['report', f'run={run}']) == 0
    page = Path(run, 'report.html').read_text(encoding='utf-8')
    assert 'Dreamer latents, linear' in page and 'land bird on water' in page
    numbers = json.loads(Path(run, 'report.json').read_text(encoding='utf-8'))
    assert numbers['config']['dynamics']['deter'] == 32 and set(numbers['stages']) >= {'train', 'classify'}


def test_help_into_a_closed_pipe():
    "`dreamer-wb train --help | head -1` ends quietly."
    for args in (['--help'], ['train', '--help']):
        p = command(*args)
        p.stdout.close()
        assert (p.stderr.read(), p.wait()) == ('', 0)


def test_help_is_complete_and_light():
    "Help of each command names every key of its schema; the overview does not load torch."
    from dreamer_wb.cli import command_help
    from dreamer_wb.core.config import leaves
    for name, c in ((name, kind) for name, c in COMMANDS.items() for kind in (c, *c.kinds)):
        text = command_help(c)
        missing = [k for k in leaves(c.load('schema')) if f'{k}=' not in text and f'{k.partition(".")[0]}.…' not in text]
        assert not missing, (name, missing)
        assert all(not line.rstrip().endswith('=') for line in text.splitlines())
        config, shown = c.load('schema')(), text.replace(' ', '')                # defaults are those of the command, not of the part
        if hasattr(config, 'encoder'): assert f'encoder.depth={config.encoder.depth}' in shown and f'encoder.mults={config.encoder.mults}'.replace(' ', '') in shown, name
    code = 'import sys; from dreamer_wb.cli import main; main(["--help"]); sys.exit("torch" in sys.modules or "hydra" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


@pytest.mark.parametrize('args, said', [
    (['trian'], 'did you mean `train`?'),
    (['train', 'batchsize=3'], 'did you mean `batch_size`?'),
    (['lpm', 'stepz=3'], 'did you mean `steps`?'),
    (['train', 'experiment=waterbird_minimal'], 'did you mean `waterbirds_minimal`?'),
    (['train', 'data_dir=nowhere'], 'nowhere/train'),
    (['train'], 'data_dir'),
    (['prepare', '--data_root', 'x'], 'write key=value'),
    (['prepare', 'data_root=nowhere'], 'nowhere'),
    (['classify', 'run=nowhere'], 'nowhere'),
    (['report'], 'run: not given'),
    (['train', 'loop.steps=0'], 'at least 1'),
    (['train', 'seed=0,1'], 'add -m')])
def test_errors_are_one_line(args, said, tmp_path, monkeypatch, capsys):
    "Exit status 2 and one line that names the thing and the mend."
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count('\n') == 1 and 'Traceback' not in err


def test_sweep(tmp_path, monkeypatch, capsys):
    "-m runs every combination; one that fails does not stop the others, but the exit status says so."
    monkeypatch.chdir(tmp_path)
    for name in 'ab': Run.create(dict(seed=0), 'x', 'runs', name).close()
    assert main(['report', 'run=runs/x/a,runs/x/b', '-m']) == 0
    assert all(Path('runs/x', name, 'report.html').exists() for name in 'ab')
    assert capsys.readouterr().out.count('report: ') == 2
    assert main(['report', 'run=runs/x/missing,runs/x/b', '-m']) == 2
    assert '1 of 2 runs failed' in capsys.readouterr().err


def test_kill_and_go_on(raw, tmp_path, monkeypatch):
    "kill -9 in mid-training; the same command finishes, with the weights of a run that was never disturbed."
    import torch
    from dreamer_wb.core.runs import load_checkpoint
    monkeypatch.chdir(tmp_path)
    assert main(['prepare', f'data_root={raw}', 'out_dir=episodes', 'size=64']) == 0
    args = ['train', 'experiment=waterbirds_minimal', 'data_dir=episodes', 'loop.steps=120', 'loop.eval_every=0', 'loop.checkpoint_seconds=0', 'loop.log_every=10', *SMALL]
    victim = command(*args, 'name=killed', env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
    file = tmp_path/'runs/waterbirds_minimal/killed/checkpoints/last.ckpt'
    for _ in range(1200):
        if file.exists() or victim.poll() is not None: break
        time.sleep(.05)
    assert victim.poll() is None, victim.communicate()
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not (file.parent/'world_model.ckpt').exists()
    assert load_checkpoint(file)['meta']['step'] < 120
    assert main([*args, 'name=killed']) == 0
    assert main([*args, 'name=whole', 'loop.checkpoint_seconds=60']) == 0
    weights = [load_checkpoint(tmp_path/'runs/waterbirds_minimal'/name/'checkpoints/world_model.ckpt')['state'] for name in ('killed', 'whole')]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
