"""Sweeps that leave the process: submitit's local executor, and a SLURM cluster that is played by four small programs."""
import os
import re
import subprocess
import sys

import pytest

from dreamer_wb.data.synthetic import make_waterbirds

pytest.importorskip('hydra_plugins.hydra_submitit_launcher')

SBATCH = '''#!{python}
# Keeps the script and runs every task of the array at once, in the background, as SLURM would on its nodes.
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[-1])
text = script.read_text()
pathlib.Path(os.environ['FAKE_SLURM'], 'sbatch.sh').write_text(text)
last = int(re.search(r'--array=0-(\\d+)', text)[1])
logs = re.search(r'--output=(\\S+)', text)[1].strip("'\\"")
for i in range(last + 1):
    env = dict(os.environ, SLURM_JOB_ID='77', SLURM_ARRAY_JOB_ID='77', SLURM_ARRAY_TASK_ID=str(i), SLURM_NTASKS='1', SLURM_PROCID='0', SLURM_LOCALID='0',
               SLURM_NODEID='0', SLURM_JOB_NUM_NODES='1', SLURM_JOB_NODELIST='here')
    subprocess.Popen(['bash', str(script)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
print('Submitted batch job 77')
'''
SRUN = '''#!/bin/bash
# Without its own options: the rest is the command.
while [[ "$1" == -* ]]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
'''
SACCT = '''#!/bin/bash
echo "JobID|State|NodeList"
for i in 0 1 2; do echo "77_$i|RUNNING|here"; done
'''


@pytest.fixture
def cluster(tmp_path):
    "Environment in which there is a cluster."
    (tmp_path/'bin').mkdir()
    for name, text in dict(sbatch=SBATCH.replace('{python}', sys.executable), srun=SRUN, sacct=SACCT, scontrol='#!/bin/bash\n').items():
        (tmp_path/'bin'/name).write_text(text)
        (tmp_path/'bin'/name).chmod(0o755)
    return dict(PATH=f'{tmp_path/"bin"}{os.pathsep}{os.environ["PATH"]}', FAKE_SLURM=str(tmp_path))


def sweep(checkout, cwd, *args, **env):
    "`dreamer-wb prepare -m` in a process of its own."
    env = dict(os.environ, PYTHONPATH=str(checkout), **env)
    code = 'import sys; from dreamer_wb.cli import main; sys.exit(main(sys.argv[1:]))'
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code, 'prepare', '-m', 'source=synthetic', 'n=100', 'size=16', 'out_dir=out_${source}_${seed}', *args],
                          cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(sys.platform == 'win32', reason='no SLURM there')
def test_slurm(checkout, tmp_path, cluster):
    "The preset asks for what it says, one array for the sweep; the jobs run and their results come back."
    done = sweep(checkout, tmp_path, 'seed=0,1', 'hydra/launcher=slurm', 'hydra.launcher.partition=gpu', 'hydra.launcher.timeout_min=90', **cluster)
    assert done.returncode == 0, done.stderr[-4000:]
    script = (tmp_path/'sbatch.sh').read_text()
    asked = dict(re.findall(r'^#SBATCH --([\w-]+)=(\S+)', script, re.M))
    wanted = dict(array='0-1%2', partition='gpu', time='90', mem='16GB', nodes='1')
    assert {k: asked.get(k) for k in wanted} == wanted and asked['gpus-per-node'] == '1' and asked['cpus-per-task'] == '4', script
    assert asked['signal'].strip("'") == 'USR2@120' and '#SBATCH --open-mode=append' in script
    for seed in (0, 1): assert len(list((tmp_path/f'out_synthetic_{seed}').rglob('*.npz'))) == 100
    assert list((tmp_path/'runs'/'multirun').rglob('slurm/**/*.sh')), 'the script is kept'


def test_errors_come_back(checkout, tmp_path):
    "A combination that fails in another process is named here, in one line; the other one is made."
    make_waterbirds(tmp_path/'raw', n=100, size=16)
    done = sweep(checkout, tmp_path, 'hydra/launcher=submitit_local', 'source=files', 'data_root=raw,nowhere', 'out_dir=out_${data_root}')
    assert done.returncode == 2 and re.search(r'dreamer-wb prepare: 1 of 2 runs failed: .*nowhere: no such folder', done.stderr.splitlines()[-1]), done.stderr[-3000:]
    assert len(list((tmp_path/'out_raw').rglob('*.npz'))) == 100


def test_missing_launcher(checkout, tmp_path):
    done = sweep(checkout, tmp_path, 'hydra/launcher=slum')
    assert done.returncode == 2 and 'hydra/launcher=slum: no such launcher; the one for SLURM is slurm, after `pip install' in done.stderr and done.stderr.count('\n') == 1
