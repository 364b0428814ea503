"""What every test process has in common: one thread, no display, no network logging, stable fuzzing."""
import importlib.util
import os
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent

# Before anything imports numpy or torch: pytest-xdist shares out the cores, so each process computes on one thread.
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'NUMBA_NUM_THREADS'): os.environ.setdefault(name, '1')
os.environ.update(MPLBACKEND='Agg', WANDB_MODE='offline', WANDB_SILENT='true')
os.environ.pop('IN_TEST', None)   # nbdev exports nothing while it is set

try:
    from hypothesis import settings
    settings.register_profile('dreamer_wb', deadline=None, derandomize=True, database=None)
    settings.load_profile('dreamer_wb')
except ImportError: pass

try:   # absl (of tensorboard and dm_control) closes the stderr that it found when Hydra sets up logging: let that not be pytest's
    from absl import logging as absl_logging
    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
except ImportError: pass


def load_script(name):
    "The script `.ci/<name>.py` as a module."
    spec = importlib.util.spec_from_file_location(f'ci_{name}', root/'.ci'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_opener(monkeypatch):
    "urllib keeps the proxies that it met first; a test that sets others must not leave them to the next one."
    monkeypatch.setattr('urllib.request._opener', None)


@pytest.fixture(scope='session')
def checkout():
    "The folder of the checkout."
    return root


@pytest.fixture(scope='session')
def script():
    "Function that loads a script of `.ci/` as a module."
    return load_script


@pytest.fixture(scope='session')
def run_python():
    "Function that runs Python on arguments in the checkout and returns the finished process."
    import subprocess
    def run(*args, **kwargs):
        return subprocess.run([sys.executable, *map(str, args)], cwd=root, capture_output=True, text=True, **kwargs)
    return run
