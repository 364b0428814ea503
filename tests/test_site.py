"""The site without Quarto: sidebar, links, anchors, configuration, workflows; and the link checker finds what is broken."""
import configparser
import json
import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.notebooks

root = Path(__file__).resolve().parent.parent

def load_yaml(path):
    import yaml
    return yaml.safe_load((root/path).read_text('utf-8'))


# ---------------------------------------------------------------- sidebar and configuration

def listed(contents):
    "Pages of a sidebar, in order."
    for item in contents:
        if isinstance(item, str): yield item
        elif 'contents' in item: yield from listed(item['contents'])
        else: yield item['href']

def test_sidebar_lists_every_notebook():
    "Every notebook is in the sidebar once, every entry is a notebook, chapters are in the order of their numbers."
    pages = list(listed(load_yaml('_quarto.yml')['website']['sidebar']['contents']))
    notebooks = {p.relative_to(root/'nbs').as_posix() for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    assert len(pages) == len(set(pages))
    assert not (missing := notebooks - set(pages)), f'not in the sidebar: {sorted(missing)} -> add them to _quarto.yml'
    assert not (gone := set(pages) - notebooks), f'in the sidebar without a notebook: {sorted(gone)} -> remove them from _quarto.yml'
    numbered = [p for p in pages if p[0].isdigit()]
    assert numbered == sorted(numbered)

def test_page_names_are_unique(script):
    site = script('links').Site(root)
    assert len(site.pages) == len(site.notebooks) and 'index.html' in site.pages

def test_site_configuration():
    "One hand-edited file at the top, included where nbdev looks for it; no CDN, search and links to the source."
    assert load_yaml('nbs/_quarto.yml') == {'metadata-files': ['../_quarto.yml', 'nbdev.yml']}
    config = load_yaml('_quarto.yml')
    html, website = config['format']['html'], config['website']
    assert list(config['format']) == ['html'] and 'keep-md' not in html     # commonmark output breaks diagrams and figure labels
    assert html['html-math-method'] == 'mathml'
    assert website['repo-subdir'] == 'nbs' and {'source', 'issue'} <= set(website['repo-actions']) and website['navbar']['search']
    for sheet in ('theme.scss', 'theme-dark.scss'): assert re.search(r'^/\*-- scss:(defaults|rules) --\*/$', (root/'nbs'/sheet).read_text(), re.M)
    assert '$web-font-path: false' in (root/'nbs'/'theme.scss').read_text()

def test_nbdev_yml_is_in_sync(tmp_path):
    "nbs/nbdev.yml is what nbdev writes from settings.ini."
    from nbdev.config import get_config
    from nbdev.quarto import _nbdev_yml
    config = get_config(path=root)
    values = {k: config[k] for k in ('title', 'description', 'branch', 'git_url', 'doc_host', 'doc_baseurl')}
    assert (root/'nbs'/'nbdev.yml').read_text() == _nbdev_yml.format(**values, doc_path=config.doc_path.name), 'run `python .ci/refresh.py --no-run`'


# ---------------------------------------------------------------- workflows

def steps(job): return [step.get('uses') or step['run'] for step in job['steps']]

def test_workflow_for_tests():
    "Pinned notebooks on three Pythons through `.ci/run`; the newest dependencies without nbdev, also once a week."
    workflow = load_yaml('.github/workflows/test.yaml')
    assert {'push', 'pull_request', 'schedule'} <= workflow[True].keys()          # YAML reads the key `on` as true
    notebooks, newest = workflow['jobs']['notebooks'], workflow['jobs']['newest']
    assert notebooks['strategy']['matrix']['python'] == ['3.10', '3.11', '3.12'] and '.ci/run' in steps(notebooks)
    commands = '\n'.join(steps(newest))
    assert 'pip install . ' in commands and '[dev]' not in commands and 'pytest -m "not notebooks"' in commands

def test_workflow_for_the_site():
    "Quarto's version is pinned, every rendered link is checked, and only then is anything published."
    workflow = load_yaml('.github/workflows/deploy.yaml')
    build, deploy = workflow['jobs']['build'], workflow['jobs']['deploy']
    order = [next(i for i, s in enumerate(steps(build)) if want in s) for want in
             ('quarto-actions/setup', 'pip install -e ".[dev]"', 'nbdev_docs', '.ci/links.py _docs', 'upload-pages-artifact')]
    assert order == sorted(order)
    quarto = next(s for s in build['steps'] if 'quarto-actions' in s.get('uses', ''))
    assert re.fullmatch(r'\d+\.\d+\.\d+', str(quarto['with']['version']))
    assert deploy['needs'] == 'build' and any('deploy-pages' in s for s in steps(deploy))

@pytest.mark.parametrize('name', ['test', 'deploy'])
def test_workflows_name_actions_by_version(name):
    for job in load_yaml(f'.github/workflows/{name}.yaml')['jobs'].values():
        for step in steps(job): assert '/' not in step.split()[0] or re.search(r'@v\d+$', step) or 'run' in step, step

def test_run_script_is_the_second_command(checkout):
    "`.ci/run` installs with the README's words and then calls pytest, nothing else."
    text = (checkout/'.ci'/'run').read_text()
    assert 'pip" install -e ".[dev]"' in text and text.rstrip().splitlines()[-1].startswith('pytest "$@"')
    assert 'torch==' not in text and (checkout/'.ci'/'run').stat().st_mode & 0o100

def test_readme_shows_the_two_commands(checkout):
    text = (checkout/'README.md').read_text('utf-8')
    assert 'pip install -e . && dreamer-wb demo' in text and 'pip install -e ".[dev]" && pytest' in text


# ---------------------------------------------------------------- links

def test_links(run_python):
    done = run_python('.ci/links.py')
    assert done.returncode == 0, done.stdout + done.stderr

PANDOC = {   # heading: identifier, as printed by pandoc 3.9
    'Heading identifiers in HTML': 'heading-identifiers-in-html', "Maître d'hôtel": 'maître-dhôtel', '*Dogs*?--in *my* house?': 'dogsin-my-house',
    '3. Applications': 'applications', '33': 'section', 'KL balance: `free_nats` and *dyn*/*rep*': 'kl-balance-free_nats-and-dynrep',
    'A --- dash... and "quotes"': 'a-dash-and-quotes', 'What `f(x)` costs — 20 % less': 'what-fx-costs-20-less',
    r'The $\beta$-VAE and $x^2$': 'the-beta-vae-and-x2', 'Custom {#own-id}': 'own-id', 'Classes {.unnumbered}': 'classes',
    'core.runs: Run.create': 'core.runs-run.create', 'snake_case and _emph_ and 2x': 'snake_case-and-emph-and-2x', 'Émile & co (GPU)': 'émile-co-gpu',
    'Link to [a page](x.html) here': 'link-to-a-page-here', "It's 10:30": 'its-1030'}

@pytest.mark.parametrize('heading', PANDOC)
def test_anchors_are_pandocs(heading, script): assert script('links').slug(heading) == PANDOC[heading]

def test_equal_headings_are_numbered(script):
    assert script('links').heading_anchors(['## Same\n\n### Same', '# Same']) == {'same', 'same-1', 'same-2'}

@pytest.mark.parametrize('text, found', [
    ('[a](b.ipynb) and ![c](d.png "title") and [![e](f.svg)](g)', ['b.ipynb', 'd.png', 'f.svg', 'g']),
    ('[wiki](https://en.wikipedia.org/wiki/A_(b)) <img src="x.png">', ['https://en.wikipedia.org/wiki/A_(b)', 'x.png']),
    ('`[not](a-link)` $p(x)[y](z)$\n\n```\n[nor](this)\n```\n\n    [nor](that)\n', []),
    ('see [the paper][p]\n\n[p]: https://arxiv.org/abs/1\n[^1]: a footnote', ['https://arxiv.org/abs/1']),
])
def test_targets(text, found, script): assert script('links').targets(text) == found

@pytest.fixture
def planted(tmp_path, script):
    "Function that writes a small checkout with `text` in a notebook and returns the problems found in it."
    def cell(kind, source): return dict(cell_type=kind, id='a', metadata={}, source=source.splitlines(True), **({'outputs': []} if kind == 'code' else {}))
    def write(name, *cells): (tmp_path/'nbs'/name).write_text(json.dumps({'cells': list(cells), 'metadata': {}}))
    def problems(text='', readme='', sidebar='00_core.one.ipynb', code=''):
        shutil.copy(root/'settings.ini', tmp_path)
        (tmp_path/'nbs').mkdir()
        (tmp_path/'dreamer_wb').mkdir()
        (tmp_path/'dreamer_wb'/'_modidx.py').write_text("d = {'syms': {'dreamer_wb.core.one': {'dreamer_wb.core.one.f': ('core.one.html#f', ''), "
            "'dreamer_wb.core.one.C': ('core.one.html#c', ''), 'dreamer_wb.core.one._p': ('core.one.html#_p', ''), 'dreamer_wb.core.one.C.hidden': ('core.one.html#c.hidden', '')}}}")
        (tmp_path/'_quarto.yml').write_text(f'website:\n  sidebar:\n    contents:\n      - section: Core\n        contents: [{sidebar}]\n')
        (tmp_path/'README.md').write_text('# Top\n\n## Two words!\n' + readme)
        write('00_core.one.ipynb', cell('markdown', '# core.one\n\n> One.'), cell('markdown', '## Shared section'),
              cell('code', '#| export\ndef f(): pass\n'), cell('code', '#| export\nclass C:\n    def hidden(self): pass\n'))
        write('01_core.two.ipynb', cell('markdown', '# core.two\n\n> Two.'), cell('markdown', text), cell('code', code))
        return list(script('links').Site(tmp_path).problems())
    return problems

GOOD = ['[x](00_core.one.ipynb)', '[x](00_core.one.ipynb#shared-section)', '[x](core.one.html#f)', '`f` and `C` and `f()` and `unknown.name`',
        '[x](https://arxiv.org/abs/2301.04104)', '## Here\n\n[x](#here)', '[x](https://github.com/dreamer-wb/dreamer_wb/blob/main/README.md)',
        '[x](https://dreamer-wb.github.io/dreamer_wb/core.one.html#c)', '[x](https://colab.research.google.com/github/dreamer-wb/dreamer_wb/blob/main/nbs/01_core.two.ipynb)']

@pytest.mark.parametrize('text', GOOD)
def test_good_links_pass(text, planted): assert planted(text) == []

BROKEN = {'[x](02_core.three.ipynb)': 'no such file', '[x](00_core.one.ipynb#shared-sektion)': 'no anchor #shared-sektion (near: shared-section)',
          '[x](core.three.html)': 'no such file', '[x](#nowhere)': 'no anchor', '![x](images/plot.png)': 'no such file', '<img src="plot.png">': 'no such file',
          '[x](../README.md)': 'not on the site', '[x](/etc/hosts)': 'absolute path', '[x](https:/arxiv.org)': 'no host', '[x](file:///tmp/a)': 'a link of kind file:',
          '`C.hidden`': 'does not show C.hidden', '`_p`': 'does not show what is private', '[x](https://github.com/dreamer-wb/dreamer_wb/blob/main/GONE.md)': 'no such file in the repository: GONE.md',
          '[x](https://dreamer-wb.github.io/dreamer_wb/gone.html)': 'no notebook makes the page', '[x](00_core.one.ipynb#core.one)': 'no anchor'}

@pytest.mark.parametrize('text', BROKEN)
def test_broken_links_are_found(text, planted):
    found = planted(text)
    assert len(found) == 1 and found[0].startswith('nbs/01_core.two.ipynb, cell 1: ') and BROKEN[text] in found[0]

def test_broken_links_elsewhere_are_found(planted):
    found = planted(readme='[x](nbs/gone.ipynb) [y](#two-words) [z](#two-words!)', sidebar='00_core.one.ipynb, 09_gone.ipynb',
                    code='#| export\ndef g(\n    a, # as in `f`, or `other`\n):\n    "See `C.hidden`."\n')
    assert [f.split(':')[0] for f in found] == ['nbs/01_core.two.ipynb, cell 2'] * 2 + ['README.md'] * 2 + ['_quarto.yml, contents']

def test_names_on_the_page(script):
    "What nbdev shows, and under which anchor: public names, @patch methods of their class, bare where another decorator is hidden."
    cell = '#| export\n@patch\ndef a(self: C): pass\n@patch\n@contextmanager\ndef b(self: C): pass\n@patch(as_prop=True)\ndef c(self: C): pass\ndef _d(): pass\nclass E: pass\n'
    assert script('links').shown(cell) == {'c.a', 'b', 'c.c', 'e'} and script('links').shown(cell.replace('export', 'exporti')) == set()
    assert script('links').shown('#| label: fig-x\nplot()') == {'fig-x'}

def test_symbols_behind_parameters_are_mended(planted, tmp_path, script):
    "Inside a signature nbdev shows a link as raw text: `--mend` takes the backticks off library symbols there, and nowhere else."
    code = '#| export\ndef g(\n    a=1, # as in `f`, `C.hidden` or `other`\n): # what `f()` gives\n    "See `f`."\n    return a # `f`\n'
    code += '@dataclass\nclass K:\n    "As `f`."\n    b: int = 0 # of `C`\n    def m(self): return 1 # `f`\n'
    assert len(planted(code=code)) == 4
    script('links').Site(tmp_path).mend()
    cell = json.loads((tmp_path/'nbs'/'01_core.two.ipynb').read_text())['cells'][2]
    assert ''.join(cell['source']) == code.replace('`f`, `C.hidden` or', 'f, C.hidden or').replace('`f()` gives', 'f() gives').replace('`C`', 'C')
    assert list(script('links').Site(tmp_path).problems()) == []

def test_rendered_site(tmp_path, script):
    "The HTML that Quarto makes is checked too: files, anchors, and nothing from another host."
    links = script('links')
    site, docs = links.Site(root), tmp_path/'_docs'
    docs.mkdir()
    for page in site.pages:
        (docs/page).parent.mkdir(exist_ok=True)
        (docs/page).write_text('<h2 id="here">x</h2><a href="/index.html#here">y</a><a href="#">z</a>')
    assert list(links.rendered_problems(docs, site)) == []
    (docs/'index.html').write_text('<h2 id="here"></h2><a href="gone.html">1</a><a href="core.config.html#gone">2</a><script src="https://cdn.example.org/a.js"></script>'
                                   '<img src="gone.png"><a href="https://dreamer-wb.github.io/dreamer_wb/core.runs.html#gone">3</a>')
    found = list(links.rendered_problems(docs, site))
    assert [f.split(': ')[-1] for f in found] == ['no such file', 'core.config.html has no such anchor', 'no such file', 'core.runs.html has no such anchor',
                                                  'loaded from another host']
    (docs/'core.config.html').unlink()
    assert 'core.config.html: page missing from _docs' in list(links.rendered_problems(docs, site))


# ---------------------------------------------------------------- the other scripts

def test_head_is_written_once(script):
    "A paragraph leaves the title cell, badge and install cell come in, a second run changes nothing, an old head is replaced."
    colab = script('colab')
    path = root/'nbs'/'21_dreamer.rssm.ipynb'
    title = colab.make_cell('markdown', '# dreamer.rssm\n\n> Memory.\n- skip_exec: true\n\nA paragraph with $x$.\n\n- a: list')
    cells = colab.with_head({'cells': [title, colab.make_cell('code', '#| default_exp dreamer.rssm')]}, path)
    texts = [''.join(c['source']) for c in cells]
    assert texts[0] == '# dreamer.rssm\n\n> Memory.\n- skip_exec: true' and texts[3:] == ['A paragraph with $x$.\n\n- a: list', '#| default_exp dreamer.rssm']
    assert texts[1].endswith('/dreamer-wb/dreamer_wb/blob/main/nbs/21_dreamer.rssm.ipynb)') and texts[2].startswith('#| hide\n#| eval: false\n! [ -e /content ]')
    assert colab.with_head({'cells': cells}, path) == cells
    assert [''.join(c['source']) for c in colab.with_head({'cells': cells}, root/'nbs'/'22_x.ipynb')][1].endswith('/nbs/22_x.ipynb)')
    index = colab.with_head({'cells': cells}, root/'nbs'/'index.ipynb')
    assert '/nbs/index.ipynb) [![test](' in ''.join(index[1]['source']) and colab.with_head({'cells': index}, root/'nbs'/'index.ipynb') == index

def test_install_cell_keeps_torch(script):
    "pip is told the package only: no --upgrade, no version of anything."
    command = script('colab').install().splitlines()[-1]
    assert 'git+https://github.com/dreamer-wb/dreamer_wb' in command and not re.search(r'\s(-U|--upgrade|-\w*U\w*)\s|torch[=<>]', command)

def test_readme_of_a_notebook(script):
    "Links are relative to the top, hidden cells are left out, outputs follow their code."
    readme, pictures = script('readme'), {}
    def text(kind, source, outputs=()): return readme.cell_text(dict(cell_type=kind, source=[source], outputs=list(outputs)), 3, pictures).strip()
    assert text('markdown', '# t\n> s\n\n[a](21_x.ipynb#b) ![c](images/d.svg) [e](https://f.org) [g](#h) [i](../LICENSE)') == \
        '# t\n\n> s\n\n[a](nbs/21_x.ipynb#b) ![c](nbs/images/d.svg) [e](https://f.org) [g](#h) [i](LICENSE)'
    assert text('markdown', '```{mermaid}\na --> b\n```\n\n::: {.callout-note}\nn\n:::') == '```mermaid\na --> b\n```\n\nn'
    assert text('code', '#| hide\nx') == '' and text('code', '#| echo: false\nx', [dict(text='1\n2')]) == '1\n    2'
    assert text('code', 'plot()', [dict(data={'image/png': 'AAAA'})]) == '```python\nplot()\n```\n\n![](README_files/figure-3-0.png)'
    assert pictures == {'README_files/figure-3-0.png': b'\0\0\0'}
