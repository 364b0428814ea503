"""Every notebook runs, is in sync with all that is made from it, and has the form that CONTRIBUTING.md describes."""
import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.notebooks

root = Path(__file__).resolve().parent.parent
notebooks = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
modules = [p for p in notebooks if re.match(r'\d', p.name) and p.parent.name == 'nbs']
REFRESH = 'run `python .ci/refresh.py --no-run`'


@cache
def read(path): return json.loads(path.read_text('utf-8'))

@cache
def code(path):
    "(number, source) of the code cells of a notebook."
    return [(i, ''.join(c['source'])) for i, c in enumerate(read(path)['cells']) if c['cell_type'] == 'code']

@cache
def parse(source):
    "Syntax tree of a cell without its magics; an empty one if it is not Python."
    if source.lstrip().startswith('%%'): return ast.Module([], [])
    return ast.parse(re.sub(r'^\s*[%!].*$', 'pass', source, flags=re.M))

def directives(source): return [line.split('|', 1)[1].split() for line in source.splitlines() if re.match(r'#\s*\|', line)]

def is_exported(source): return any(d[:1] in (['export'], ['exports'], ['exporti']) for d in directives(source))

def exported(path): return [(i, source) for i, source in code(path) if is_exported(source)]

def place(path, cell=None): return path.relative_to(root).as_posix() + ('' if cell is None else f', cell {cell}')

def report(problems, mend):
    "Fail with all problems, one a line, and what mends them."
    problems = list(problems)
    if problems: pytest.fail('\n'.join(problems) + f'\n-> {mend}', pytrace=False)


# ---------------------------------------------------------------- they run

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_runs(path, tmp_path, script):
    "nbdev's runner executes the notebook, and nbdev makes a page of it that shows every exported symbol."
    before, page = set(path.parent.iterdir()), tmp_path/'page.ipynb'
    env = {k: v for k, v in os.environ.items() if k not in ('MPLBACKEND', 'IN_TEST')}
    env['PYTHONPATH'] = os.pathsep.join([str(root), env.get('PYTHONPATH', '')]).strip(os.pathsep)
    done = subprocess.run([sys.executable, 'tests/run_notebook.py', path, page], cwd=root, env=env, capture_output=True, text=True)
    if done.returncode: pytest.fail(f'{done.stdout[-2000:]}{done.stderr[-6000:]}\n-> python tests/run_notebook.py {place(path)} /tmp/page.ipynb',
                                    pytrace=False)
    assert not (left := set(path.parent.iterdir()) - before), f'{place(path)} leaves {sorted(p.name for p in left)} behind'
    cells = json.loads(page.read_text('utf-8'))['cells']
    text = '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', []))
    links = script('links')
    expected = {links.patched_name(n) for _, source in code(path) for n in links.exported(source) if not n.name.startswith('_')}
    hidden = set() if skips_docs(path) else expected - set(re.findall(r'^#+ (\S+)$', text, re.M))
    report([f'{place(path)}: {name} is not on the page under this name' for name in sorted(hidden)],
           'a decorator between @patch and def hides the class: `with torch.no_grad():` in the body, or a private function that is wrapped')

def skips_docs(path): return 'skip_showdoc: true' in ''.join(read(path)['cells'][0]['source'])


# ---------------------------------------------------------------- they are in sync

def test_export_is_in_sync(tmp_path):
    "The package is what a fresh export gives: nothing missing, nothing edited by hand, no module of a notebook that is gone."
    shutil.copy(root/'settings.ini', tmp_path)
    shutil.copytree(root/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', 'results', '_*', 'images'))
    (tmp_path/'dreamer_wb').mkdir()
    shutil.copy(root/'dreamer_wb'/'__init__.py', tmp_path/'dreamer_wb')      # written by hand; nbdev only sets the version in it
    env = dict(os.environ, XDG_CONFIG_HOME=str(tmp_path/'config'))
    done = subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    fresh, ours = ({p.relative_to(top/'dreamer_wb'): p.read_text('utf-8') for p in (top/'dreamer_wb').rglob('*.py')} for top in (tmp_path, root))
    assert len(fresh) > len(modules)
    problems = [f'dreamer_wb/{p}: not exported from any notebook (delete it)' for p in sorted(ours.keys() - fresh.keys())]
    problems += [f'dreamer_wb/{p}: missing' for p in sorted(fresh.keys() - ours.keys())]
    problems += [f'dreamer_wb/{p}: differs from its notebook' for p in sorted(fresh.keys() & ours.keys()) if fresh[p] != ours[p]]
    report(problems, f'edit notebooks, not modules; then {REFRESH}')

def test_metadata_is_clean():
    "`nbdev_clean` would change nothing."
    from execnb.nbio import nb2str
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    config, problems = get_config(), []
    for path in notebooks:
        text = path.read_text('utf-8')
        notebook = json.loads(text)
        clean_nb(notebook, config.clear_all, config.allowed_metadata_keys.split(), config.allowed_cell_metadata_keys.split(), config.clean_ids)
        if nb2str(notebook) != text: problems.append(f'{place(path)}: not clean')
    report(problems, REFRESH)

def test_readme_is_in_sync(run_python):
    "README.md is made from nbs/index.ipynb."
    done = run_python('.ci/readme.py', '--check')
    assert done.returncode == 0, done.stderr

def test_heads_are_in_sync(run_python):
    "Every notebook opens in Colab: badge, and an install cell that is hidden from docs and tests."
    done = run_python('.ci/colab.py', '--check')
    assert done.returncode == 0, done.stderr
    for path in notebooks:
        sources = [''.join(c['source']) for c in read(path)['cells'][1:3]]
        assert f'/blob/main/{place(path)})' in sources[0] and 'colab-badge.svg' in sources[0], place(path)
        assert sources[1].startswith('#| hide\n#| eval: false\n! [ -e /content ] && pip install'), place(path)


# ---------------------------------------------------------------- they have one form

def test_there_are_notebooks(): assert len(modules) >= 16 and root/'nbs'/'index.ipynb' in notebooks

def test_title_and_summary():
    "The first cell is `# title` and `> summary`, nothing else: nbdev drops the rest of that cell from the page."
    problems = []
    for path in notebooks:
        first = read(path)['cells'][0]
        if first['cell_type'] != 'markdown' or not re.fullmatch(r'# \S[^\n]*\n+> \S[^\n]*(\n+- [a-z][a-z_-]*: [^\n]+)*\s*', ''.join(first['source'])):
            problems.append(f'{place(path)}: first cell is not `# title`, `> summary` and front matter')
    report(problems, 'mend the title cell, then `python .ci/colab.py`')

def test_one_notebook_one_module():
    "`21_dreamer.rssm.ipynb` exports to `dreamer.rssm`, and nowhere else."
    problems = []
    for path in modules:
        name = re.sub(r'^\d+_', '', path.stem)
        found = [d for _, source in code(path) for d in directives(source) if d[:1] == ['default_exp']]
        if found != [['default_exp', name]]: problems.append(f'{place(path)}: `#| default_exp {name}` expected, {found} found')
        problems += [f'{place(path, i)}: exports to another module' for i, source in exported(path)
                     for d in directives(source) if d[0] in ('export', 'exports', 'exporti') and d[1:]]
    report(problems, 'name notebook and module alike')

def test_imports_stand_alone():
    "nbdev runs every cell that imports when it builds the docs, and no other: such a cell must not need the cells before it."
    def imports(nodes): return [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
    problems = []
    for path in notebooks:
        for i, source in code(path):
            body = parse(source).body
            near = imports(body) if is_exported(source) else imports(ast.walk(parse(source)))
            if near and len(imports(body)) < len(body): problems.append(f'{place(path, i)}: imports and other code in one cell')
    report(problems, 'give the imports a cell of their own')

def test_exported_cells_are_short():
    report([f'{place(path, i)}: {n} lines' for path in notebooks for i, source in exported(path)
            if (n := len([line for line in source.splitlines() if line.strip()])) > 40], 'split the cell (@patch for methods); 25 lines are a good limit')

def test_nothing_that_breaks_elsewhere():
    "No cell that needs nbdev at the reader's, no output that only shows here, no path of one machine."
    written = re.compile(r'(?<![\w.:/-])/(?:home|root|Users|work|mnt)/[\w.-]+|[A-Z]:\\\\\w+')
    printed = re.compile(written.pattern + r'|(?<![\w.:/-])/(?:tmp|opt|var|usr)/[\w.-]+|site-packages')
    problems = []
    for path in notebooks:
        text = path.read_text('utf-8')
        if len(text) > 300_000: problems.append(f'{place(path)}: {len(text)//1000} KB, 300 are allowed')
        if 'vnd.jupyter.widget' in text: problems.append(f'{place(path)}: widget state in an output')
        for i, cell in enumerate(read(path)['cells']):
            source, outputs = ''.join(cell['source']), json.dumps([o.get('data', {}).get('text/plain', o.get('text', '')) for o in cell.get('outputs', [])])
            if 'nbdev.showdoc' in source or 'nbdev_export(' in source: problems.append(f'{place(path, i)}: needs nbdev where it is read')
            if found := written.search(source) or printed.search(outputs): problems.append(f'{place(path, i)}: {found[0]}')
            if any(o['output_type'] == 'error' for o in cell.get('outputs', [])): problems.append(f'{place(path, i)}: a stored error')
    report(problems, 'mend the cell and run `python .ci/refresh.py <notebook>`')

def test_outputs_are_stored():
    "The site shows stored outputs: a notebook that plots has its plots in it."
    problems = [place(path) for path in modules if any('plot_' in s or 'show_' in s for _, s in code(path) if not is_exported(s))
                and not any(k.startswith('image/') for c in read(path)['cells'] for o in c.get('outputs', []) for k in o.get('data', {}))]
    report(problems, 'run `python .ci/refresh.py <notebook>`')


# ---------------------------------------------------------------- exported code explains itself

def public(path):
    "(cell number, source, function or class) of all that a notebook exports under a public name."
    for i, source in exported(path):
        if ['exporti'] in [d[:1] for d in directives(source)]: continue
        for node in parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'): yield i, source, node

def comments(source):
    "Numbers of the lines that have a comment: {line: is there nothing else on it?}."
    return {t.start[0]: not t.line[:t.start[1]].strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}

def undocumented(source, node):
    "Parameters of a function, or fields of a dataclass, without a comment behind them or alone on the line before."
    found = comments(source)
    def explained(last, first): return last in found or found.get(first - 1, False)
    if isinstance(node, ast.ClassDef):
        is_dataclass = any('dataclass' in ast.unparse(d) for d in node.decorator_list)
        return [n.target.id for n in node.body if is_dataclass and isinstance(n, ast.AnnAssign) and not explained(n.end_lineno, n.lineno)]
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    defaults = {d.lineno: d.end_lineno for d in node.args.defaults + [d for d in node.args.kw_defaults if d]}
    named = [a for a in arguments if a.arg not in ('self', 'cls') and not a.arg.startswith('_')]
    return [a.arg for a in named if not explained(a.end_lineno, a.lineno) and defaults.get(a.end_lineno) not in found]

def test_docstrings():
    report([f'{place(path, i)}: {node.name}' for path in notebooks for i, _, node in public(path) if not ast.get_docstring(node)],
           'give it a docstring of one line')

def test_docments():
    "Parameters are explained behind their names: shape, unit, range."
    problems = [f'{place(path, i)}: {node.name}({", ".join(names)})' for path in notebooks for i, source, node in public(path)
                if (names := undocumented(source, node))]
    report(problems, 'put each parameter on a line of its own with a comment behind it')

def test_docment_check_finds_what_it_should():
    source = 'def f(\n    a:int, # first\n    b:int,\n    c=(1,\n       2), # third\n    *, d=1): # fourth\n    return a\ndef g(x, y): return x\n'
    first, second = parse(source).body
    assert undocumented(source, first) == ['b'] and undocumented(source, second) == ['x', 'y']
