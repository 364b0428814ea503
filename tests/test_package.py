"""The package as a whole: light to import, built floor upon floor, metadata in one place."""
import ast
import configparser
import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

import dreamer_wb

root = Path(__file__).resolve().parent.parent
package = Path(dreamer_wb.__file__).resolve().parent
sources = {'.'.join(p.relative_to(package).with_suffix('').parts): ast.parse(p.read_text('utf-8'))
           for p in sorted(package.rglob('*.py')) if not p.name.startswith('_')}

FLOORS = ['core', 'data', 'dreamer', 'classifier', 'vta', 'lpm', 'concepts', 'evaluation', 'cli']
STRANGERS = {'vta', 'lpm', 'classifier'}                       # never import one another
HEAVY = {'torch', 'torchvision', 'fastai', 'numpy', 'pandas', 'matplotlib', 'sklearn', 'umap', 'numba', 'wandb', 'tensorboard', 'hydra', 'PIL', 'scipy'}
LIGHT = {'numpy', 'fastcore', 'dreamer_wb'} | set(sys.stdlib_module_names)
TORCH = {'dreamer', 'classifier', 'vta', 'lpm', 'concepts'}     # chapters that are about networks
MAY_ALSO = {**{f'evaluation.{m}': {'torch'} for m in ('tcav', 'gradcam', 'corruptions', 'evaluate', 'concepts')}, 'core.deferred': {'torch'}, 'core.graph': {'torch'},
            'core.kernels': {'torch', 'numba'},
            'core.learner': {'torch', 'fastai'},              # the one training loop is a fastai Learner
            'data.episodes': {'torch'}, 'data.synthetic': {'PIL'}}   # what they hand out, what they draw with


def imported(module, nodes):
    "Full names of what `nodes` of a module import; relative names are resolved, `from x import y` gives x and x.y."
    parts = ['dreamer_wb', *module.split('.')]
    for node in nodes:
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(parts[:len(parts) - node.level] + [node.module or '']).strip('.') if node.level else node.module
            yield base
            yield from (f'{base}.{a.name}' for a in node.names)

def at_import_time(body):
    "Statements that run when a module is imported: not those inside functions, nor for type checkers only."
    for node in body:
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test): continue
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ('body', 'orelse', 'handlers', 'finalbody'): yield from at_import_time(getattr(node, field, []))

def floor(name):
    "Number of the floor of `dreamer_wb.<floor>...`, or None for another package."
    parts = name.split('.')
    return FLOORS.index(parts[1]) if parts[0] == 'dreamer_wb' and len(parts) > 1 and parts[1] in FLOORS else None


# ---------------------------------------------------------------- imports

def test_import_is_light(run_python):
    "`import dreamer_wb` loads nothing heavy and costs well under a second."
    program = ('import sys, time; start = time.process_time(); import dreamer_wb; dir(dreamer_wb); seconds = time.process_time() - start\n'
               f'print(seconds, *({HEAVY!r} & sys.modules.keys()))')
    done = run_python('-c', program)
    assert done.returncode == 0, done.stderr
    seconds, *heavy = done.stdout.split()
    assert not heavy and float(seconds) < 0.2

def test_every_public_name_resolves(run_python):
    "Each name that `dir(dreamer_wb)` promises is there, and is what its own module exports."
    program = ('import dreamer_wb, importlib\nfor name, module in dreamer_wb._homes.items():\n'
               "    home = importlib.import_module('dreamer_wb.' + module)\n"
               '    assert getattr(dreamer_wb, name) is getattr(home, name) and name in home.__all__ and name in dir(dreamer_wb), name')
    done = run_python('-W', 'ignore', '-c', program)
    assert done.returncode == 0, done.stderr
    assert set(dreamer_wb.__all__) == set(dreamer_wb._homes) and len(dreamer_wb.__all__) > 10

def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'dreamer_wb' has no attribute 'nonsense'"): dreamer_wb.nonsense

@pytest.mark.parametrize('module', sources)
def test_floors(module):
    "A module imports from its own floor or below; VTA, LPM and classifier never import one another."
    own, problems = floor(f'dreamer_wb.{module}'), []
    assert own is not None, f'{module}: on no floor of DESIGN ({", ".join(FLOORS)})'
    for name in imported(module, ast.walk(sources[module])):
        other = floor(name)
        if other is None: continue
        if other > own or {FLOORS[own], FLOORS[other]} <= STRANGERS and own != other: problems.append(f'dreamer_wb.{module} imports {name}')
    assert not problems, '\n'.join(problems)

@pytest.mark.parametrize('module', sources)
def test_imports_are_lazy(module):
    "At the top of a module: the standard library, numpy, fastcore, and torch where networks are. The rest is imported where it is used."
    allowed = LIGHT | ({'torch'} if module.split('.')[0] in TORCH else set()) | MAY_ALSO.get(module, set())
    names = {name.split('.')[0] for name in imported(module, at_import_time(sources[module].body))}
    assert not (heavy := names - allowed), f'dreamer_wb.{module} imports {sorted(heavy)} at its top'

@pytest.mark.parametrize('module', sources)
def test_only_the_learner_needs_fastai(module):
    "Nobody pays for fastai by importing a module: `core.learner` is imported where something is trained."
    names = set(imported(module, at_import_time(sources[module].body)))
    assert module == 'core.learner' or 'dreamer_wb.core.learner' not in names

def test_checks_see_what_they_should():
    "The two rules above, on a module that breaks them."
    tree = ast.parse('import os\nfrom ..cli import main\ndef f():\n    import pandas\ntry:\n    import wandb.sdk\nexcept ImportError: pass')
    assert {'dreamer_wb.cli', 'pandas', 'wandb.sdk'} <= set(imported('data.prepare', ast.walk(tree)))
    top = {n.split('.')[0] for n in imported('data.prepare', at_import_time(tree.body))}
    assert top == {'os', 'dreamer_wb', 'wandb'} and floor('dreamer_wb.cli.main') == 8 and floor('pandas.io') is None


# ---------------------------------------------------------------- metadata

@pytest.fixture(scope='module')
def config():
    "settings.ini, which both setup.py and nbdev read."
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', 'utf-8')
    return parser['DEFAULT']

def test_version(config): assert dreamer_wb.__version__ == config['version']

def test_readers_keep_their_torch(config):
    "No upper bound on what a reader (or Colab) has already: an upgrade of this package must not replace torch or numpy."
    requirements = {re.split(r'[<>=!~\[;]', r)[0]: r for r in config['requirements'].split()}
    for name in ('torch', 'torchvision', 'numpy', 'pandas', 'matplotlib', 'pillow'):
        assert not re.search(r'<|==|~=', requirements.get(name, '')), requirements[name]
    assert 'nbdev' not in requirements and 'torchvision' in requirements

def test_wheel_has_what_the_package_reads(run_python, tmp_path):
    "Presets and style sheets are part of what setup.py installs."
    files = {p.relative_to(package).as_posix() for p in package.rglob('*') if p.is_file() and p.suffix != '.py' and '__pycache__' not in p.parts}
    done = run_python('-W', 'ignore', 'setup.py', '-q', 'build', '--build-base', tmp_path, 'egg_info', '--egg-base', tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    built = {p.relative_to(tmp_path/'lib'/'dreamer_wb').as_posix() for p in (tmp_path/'lib').rglob('*') if p.is_file()}
    assert files and not files - built
    assert {f'{m.replace(".", "/")}.py' for m in sources} <= built

def plain_name(requirement): return re.split(r'[^\w.-]', requirement)[0].lower().replace('_', '-')

def needed(names):
    "Distributions that these need, themselves included, without what only extras ask for."
    todo, found = list(names), set()
    while todo:
        name = todo.pop()
        if name in found: continue
        found.add(name)
        try: todo += [plain_name(r) for r in requires(name) or () if 'extra ==' not in r]
        except PackageNotFoundError: continue                  # for another system
    return found

ALONE = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.partition('.')[0] in {absent} else find(name, *more)
from dreamer_wb.cli import main
sys.exit(main(['demo', 'images=200', 'size=32', {runs!r}, 'train.loop.steps=4', 'classify.models=[dreamer_linear]', 'classify.workers=1', 'classify.maps=[]',
               'concepts.train.loop.steps=2', 'concepts.train.latent_steps=2', 'concepts.images=40', 'concepts.judge_images=80', 'concepts.head_steps=5', 'concepts.cnn_steps=2', 'concepts.recipes=[as is,world model]']))
"""

def test_demo_needs_no_extra(config, run_python, tmp_path):
    "What only developers and extras install is hidden: the README's first command runs without it."
    base = needed(plain_name(r) for r in config['requirements'].split())
    more = {plain_name(r) for key in config if key.endswith('_requirements') for r in config[key].split()} - base
    absent = {module for module, owners in packages_distributions().items() if {plain_name(o) for o in owners} & more}
    assert {'accelerate', 'nbdev', 'wandb', 'mlflow'} <= absent and not absent & {'torch', 'fastai', 'hydra', 'gymnasium'}
    done = run_python('-W', 'ignore', '-c', ALONE.format(absent=absent, runs=f'runs_dir={tmp_path}'))
    assert done.returncode == 0 and (tmp_path/'demo/seed0/report.html').exists(), done.stderr[-3000:]
