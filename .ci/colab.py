"""Give every notebook the same head: a title cell, the "Open in Colab" badge, a hidden install cell.

    python .ci/colab.py            # write
    python .ci/colab.py --check    # exit 1 and name the notebooks that differ

The title cell keeps only the title, the `> summary` and front matter: nbdev turns that cell into the head of the page and
drops whatever else stands in it, so a paragraph there moves into a cell of its own. The install cell does nothing outside
Colab and is skipped by tests and docs (`eval: false`). Our requirements leave torch open, so that pip keeps the one that
Colab has. Running the script twice changes nothing.
"""
import hashlib
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
TITLE = re.compile(r'\A(# [^\n]+\n+> [^\n]+(?:\n+- [a-z][a-z_-]*: [^\n]+)*)\s*')


def settings(top=root):
    "The `[DEFAULT]` section of settings.ini."
    parser = ConfigParser(delimiters=['='])
    parser.read(top/'settings.ini', 'utf-8')
    return parser['DEFAULT']


def make_cell(kind, text):
    "A notebook cell whose id follows from its text."
    cell = dict(cell_type=kind, id=hashlib.sha1(text.encode()).hexdigest()[:8], metadata={}, source=text.splitlines(True))
    return cell if kind == 'markdown' else dict(cell, execution_count=None, outputs=[])


def badge(path, top=root):
    "Markdown of the badge that opens notebook `path` in Colab; the notebook of the README also shows the state of the workflows."
    cfg = settings(top)
    url = f'https://colab.research.google.com/github/{cfg["user"]}/{cfg["repo"]}/blob/{cfg["branch"]}'
    text = f'[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url}/{path.relative_to(top).as_posix()})'
    if path.name != cfg['readme_nb']: return text
    flows = f'{cfg["git_url"]}/actions/workflows'
    return (f'{text} [![test]({flows}/test.yaml/badge.svg)]({flows}/test.yaml) '
            f'[![docs]({flows}/deploy.yaml/badge.svg)]({cfg["doc_host"]}{cfg["doc_baseurl"]}/)')


def install(top=root):
    "Source of the hidden cell that installs the package on Colab and nowhere else."
    cfg = settings(top)
    return f'#| hide\n#| eval: false\n! [ -e /content ] && pip install -qq "{cfg["lib_name"]} @ git+{cfg["git_url"]}"  # keeps the torch that is there'


def is_head(cell):
    "Was this cell written by this script?"
    text = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return text.startswith('[![Open In Colab](') and '\n' not in text
    return '! [ -e /content ] && pip install' in text


def with_head(notebook, path, top=root):
    "The cells of `notebook` with the head that `path` should have."
    cells = [c for c in notebook['cells'] if not is_head(c)]
    first, rest = cells[:1], cells[1:]
    found = TITLE.match(''.join(first[0]['source'])) if first and first[0]['cell_type'] == 'markdown' else None
    if found:
        body = ''.join(first[0]['source'])[found.end():].strip('\n')
        first[0] = dict(first[0], source=found.group(1).rstrip().splitlines(True))
        if body: rest.insert(0, make_cell('markdown', body))
    return first + [make_cell('markdown', badge(path, top)), make_cell('code', install(top))] + rest


def main():
    stale = []
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        if any(part[0] in '._' for part in path.relative_to(root).parts): continue
        text = path.read_text('utf-8')
        notebook = json.loads(text)
        notebook['cells'] = with_head(notebook, path)
        new = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + '\n'
        if new == text: continue
        stale.append(path.relative_to(root).as_posix())
        if '--check' not in sys.argv: path.write_text(new, 'utf-8')
    if stale and '--check' in sys.argv: sys.exit(f'{", ".join(stale)}: other head than the rest, run `python .ci/colab.py`')


if __name__ == '__main__': main()
