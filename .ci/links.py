"""Check every link and anchor of the notebooks, the sidebar and the Markdown files; needs neither Quarto nor a network.

    python .ci/links.py            # the sources
    python .ci/links.py _docs      # and a rendered site: links, anchors, nothing loaded from another host
    python .ci/links.py --mend     # take the backticks off library symbols behind parameters (see `signature_problems`)

The sources are read as nbdev and Quarto will read them: headings become anchors by Pandoc's rule, exported symbols get an
anchor where nbdev shows them, a symbol in backticks is a link to that place. Links to this project's own pages on GitHub,
GitHub Pages and Colab are looked up in the checkout; other hosts are not asked.
"""
import argparse
import ast
import json
import re
import sys
from configparser import ConfigParser
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FENCE = re.compile(r'^([ \t]*)(```+|~~~+).*?^\1?[ \t]*\2[ \t]*$', re.M | re.S)
TARGET = re.compile(r'\]\(\s*<?((?:[^()\s<>]|\([^()\s]*\))+)>?(?:\s+(?:"[^"]*"|\'[^\']*\'))?\s*\)')
REFERENCE = re.compile(r'^\s{0,3}\[[^\]^][^\]]*\]:\s*(\S+)', re.M)
HTML_LINK = re.compile(r'<[^<>]*?\b(?:src|href)\s*=\s*["\']([^"\']+)["\']')
HEADING = re.compile(r'^#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$', re.M)
SYMBOL = re.compile(r'`([^`\s]+?)(?:\(\))?`')


# ---------------------------------------------------------------- text

def without_code(text):
    "`text` without fenced code, indented code, HTML comments and formulas."
    text = re.sub(r'<!--.*?-->', '', FENCE.sub('', text), flags=re.S)
    text = re.sub(r'(?:(?<=\n\n)|\A)(?:(?: {4}|\t).*\n?)+', '', text)
    return re.sub(r'\$\$.+?\$\$|(?<![\\$])\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d)', '', text, flags=re.S)


def targets(text):
    "Where the links and images of a Markdown text point."
    text = without_code(text)
    prose = re.sub(r'(`+)(?!`).+?(?<!`)\1(?!`)', '', text)
    return TARGET.findall(prose) + REFERENCE.findall(prose) + HTML_LINK.findall(prose)


def slug(heading, github=False):
    "The anchor that Pandoc (or GitHub) gives to a heading."
    given = re.search(r'\{[^}]*#([\w.:-]+)[^}]*\}\s*$', heading)
    if given and not github: return given[1]
    text = heading if github else re.sub(r'\s*\{[^}]*\}\s*$', '', heading)
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)                          # a link is its text
    text = ''.join(p if i % 2 else re.sub(r'\*|(?<!\w)_|_(?!\w)|--+|\.\.\.', '', p)   # marks, dashes and dots of prose
                   for i, p in enumerate(re.split(r'`([^`]*)`', text)))
    if github: return re.sub(r'\s', '-', re.sub(r'[^\w\s-]', '', text.lower()).strip())
    words = ''.join(c for c in text.lower() if c.isspace() or c.isalnum() or c in '_-.').split()
    return re.sub(r'\A[^a-z\u00aa-\uffff]+', '', '-'.join(words)) or 'section'


def heading_anchors(texts, github=False):
    "Anchors of all headings in `texts`; the second of two equal ones gets `-1`."
    found = set()
    for text in texts:
        for heading in HEADING.findall(FENCE.sub('', text)):
            base = name = slug(heading, github)
            n = 0
            while name in found: name = f'{base}-{(n := n + 1)}'
            found.add(name)
        found.update(re.findall(r'<[^<>]*?\bid\s*=\s*["\']([^"\']+)["\']', text))
        found.update(re.findall(r'\{[^{}\n]*#([\w.:-]+)[^{}\n]*\}', text))                # ::: {#id}, ![..](..){#fig-id}
    return found


# ---------------------------------------------------------------- notebooks

def sources(notebook, kind):
    "(number, text) of the cells of one kind."
    return [(i, ''.join(c['source'])) for i, c in enumerate(notebook['cells']) if c['cell_type'] == kind]


def flags(source):
    "The words of the `#|` lines at the top of a cell."
    return {line.split('|', 1)[1].strip() for line in source.splitlines() if re.match(r'\s*#\s*\|', line)}


def patched_name(node, as_shown=False):
    "`Class.method` for a function with @patch, else its own name; nbdev shows that too if @patch hides another decorator."
    names = [getattr(d, 'id', getattr(getattr(d, 'func', None), 'id', '')) for d in node.decorator_list]
    if 'patch' not in names or as_shown and names[-1] != 'patch': return node.name
    return f'{ast.unparse(node.args.args[0].annotation)}.{node.name}'


def exported(source):
    "Syntax trees of the functions and classes that a cell exports and nbdev shows."
    words = flags(source)
    if not {w.split()[0] for w in words if w} & {'export', 'exports'} or words & {'hide', 'include: false'}: return []
    nodes = ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M)).body
    return [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]


def shown(source):
    "Anchors of what nbdev shows for a code cell: its exported symbols, and what it calls `show_doc` on."
    names = {patched_name(n, as_shown=True).lower() for n in exported(source) if not n.name.startswith('_') or n.name.startswith('__')}
    names |= {word.partition(':')[2].strip() for word in flags(source) if word.startswith('label:')}
    return names | {name.lower() for name in re.findall(r'\bshow_doc\(\s*([\w.]+)', source)}


def documented(source):
    "The exported functions and classes of a cell whose docstrings and signatures are on the page."
    return [n for n in exported(source) if not n.name.startswith('_')]


def docstrings(source):
    "The docstrings of a code cell that nbdev shows."
    return '\n'.join(ast.get_docstring(n) or '' for n in documented(source))


def signature_lines(source):
    "Numbers of the lines with parameters, return values and fields, whose comments nbdev shows inside the signature."
    nodes = [m for n in documented(source) for m in ([n] if not isinstance(n, ast.ClassDef) else n.body)]
    return [i for n in nodes if not isinstance(n, ast.Expr) for i in range(n.lineno - 1, n.body[0].lineno - 1 if hasattr(n, 'body') else n.end_lineno)]


class Site:
    "A checkout as its readers see it: pages, anchors, symbols, addresses on the web."
    def __init__(self, root):
        self.root, self.nbs = Path(root).resolve(), Path(root).resolve()/'nbs'
        parser = ConfigParser(delimiters=['='])
        parser.read(self.root/'settings.ini', 'utf-8')
        cfg = parser['DEFAULT']
        self.docs = cfg['doc_host'] + cfg['doc_baseurl'].rstrip('/')
        repo, branch = f'{cfg["user"]}/{cfg["repo"]}', cfg['branch']
        self.git = [f'{cfg["git_url"]}/{kind}/{branch}' for kind in ('blob', 'tree', 'raw', 'edit')]
        self.git += [f'https://raw.githubusercontent.com/{repo}/{branch}', f'https://colab.research.google.com/github/{repo}/blob/{branch}']

    @cached_property
    def notebooks(self):
        "{path: notebook} of everything that becomes a page."
        paths = [p for p in sorted(self.nbs.rglob('*.ipynb')) if not any(x[0] in '._' for x in p.relative_to(self.nbs).parts)]
        return {p: json.loads(p.read_text('utf-8')) for p in paths}

    @cached_property
    def pages(self):
        "{address on the site: path of the notebook}, with nbdev's rule for page names."
        return {p.relative_to(self.nbs).with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.name.lower())).with_suffix('.html').as_posix(): p
                for p in self.notebooks}

    @cached_property
    def texts(self):
        "Markdown files at the top and in nbs/."
        return sorted(self.root.glob('*.md')) + sorted(p for p in self.nbs.rglob('*.md') if '.ipynb_checkpoints' not in p.parts)

    @cached_property
    def symbols(self):
        "{symbol: (page, anchor)} from the exported index, as nbdev resolves words in backticks."
        index = {}
        path = self.root/'dreamer_wb'/'_modidx.py'
        if path.is_file(): exec(path.read_text('utf-8'), index)
        table = {}
        for module, symbols in index.get('d', {}).get('syms', {}).items():
            for name, (place, _) in symbols.items(): table[name] = tuple(place.split('#'))
        for module, symbols in index.get('d', {}).get('syms', {}).items():
            for name in symbols: table.setdefault(name.removeprefix(module + '.'), table[name])
        return table

    @cached_property
    def anchors(self):
        "{path: anchors} of notebooks (whose first cell becomes front matter) and Markdown files."
        found = {p: heading_anchors([t for i, t in sources(nb, 'markdown') if i]).union(*[shown(t) for _, t in sources(nb, 'code')])
                 for p, nb in self.notebooks.items()}
        return {**found, **{p: heading_anchors([p.read_text('utf-8')], github=True) for p in self.texts}}

    def problem(self, source, target):
        "What is wrong with a link in file `source` that points at `target`; '' if nothing."
        url = urlsplit(target)
        if target.startswith(self.docs): return self.page_problem(target.removeprefix(self.docs))
        own = next((g for g in self.git if target.startswith(g + '/')), None)
        if own:
            path = unquote(target.removeprefix(own + '/').split('#')[0].split('?')[0])
            return '' if (self.root/path).exists() else f'no such file in the repository: {path}'
        if url.scheme in ('http', 'https'): return '' if re.fullmatch(r'[\w-]+(\.[\w-]+)+(:\d+)?', url.netloc) else 'no host in this address'
        if url.scheme in ('mailto', 'data'): return ''
        if url.scheme: return f'a link of kind {url.scheme}:'
        if target.startswith('/'): return 'an absolute path'
        return self.local_problem(source, unquote(url.path), unquote(url.fragment))

    def page_problem(self, address):
        "What is wrong with an address on the project's own site."
        page, _, anchor = address.lstrip('/').partition('#')
        path = self.pages.get(page or 'index.html')
        if path is None: return f'no notebook makes the page {page}'
        return '' if not anchor or anchor in self.anchors[path] else f'{page} has no anchor #{anchor}'

    def local_problem(self, source, path, anchor):
        "What is wrong with a relative link."
        file = (source.parent/path).resolve() if path else source
        if file.suffix == '.html' and not file.exists():
            page = file.relative_to(self.nbs).as_posix() if file.is_relative_to(self.nbs) else path
            file = self.pages.get(page, file)
        if not file.exists(): return 'no such file'
        if not file.is_relative_to(self.root): return 'a file outside the repository'
        if source.is_relative_to(self.nbs) and not file.is_relative_to(self.nbs):
            return f'outside nbs/, so not on the site: use {self.git[0]}/{file.relative_to(self.root).as_posix()}'
        if not anchor: return ''
        if file not in self.anchors: return f'anchors of {file.suffix} files cannot be checked'
        return '' if anchor in self.anchors[file] else f'{file.name} has no anchor #{anchor} (near: {nearest(anchor, self.anchors[file])})'

    def symbol_problem(self, name):
        "What is wrong with the link that nbdev makes of `name` in backticks."
        if name not in self.symbols: return ''
        page, anchor = self.symbols[name]
        if page not in self.pages: return f'{page} is not a page: run `python .ci/refresh.py --no-run`'
        if anchor in self.anchors[self.pages[page]]: return ''
        if name.split('.')[-1].startswith('_'): return f'{page} does not show what is private: write <code>{name}</code>, or describe it'
        return f'{page} does not show {name}: give the method its own cell with @patch as its only decorator, or write <code>{name}</code>'

    # ------------------------------------------------------------ all that is to be checked

    def notebook_problems(self):
        "Problems of the links, images and words in backticks of every notebook."
        for path, notebook in self.notebooks.items():
            name = path.relative_to(self.root).as_posix()
            for i, text in sources(notebook, 'markdown'):
                yield from self.text_problems(path, f'{name}, cell {i}', text)
            for i, text in sources(notebook, 'code'):
                yield from self.text_problems(path, f'{name}, cell {i}', docstrings(text))
                yield from self.signature_problems(f'{name}, cell {i}', text)
            for i, cell in enumerate(notebook['cells']):
                for text in output_texts(cell):
                    for target in targets(text): yield from self.found(path, f'{name}, output of cell {i}', target)

    def text_problems(self, path, place, text):
        "Problems of one text in a notebook."
        for target in targets(text): yield from self.found(path, place, target)
        for word in SYMBOL.findall(without_code(text)):
            problem = self.symbol_problem(word)
            if problem: yield f'{place}: `{word}`: {problem}'

    def signature_problems(self, place, source):
        "nbdev makes links of symbols in backticks in a signature too, where they are shown as raw text."
        lines = source.splitlines()
        for word in SYMBOL.findall('\n'.join(lines[i].partition(' #')[2] for i in signature_lines(source))):
            if word in self.symbols: yield f'{place}: `{word}` behind a parameter is shown as the raw text of a link: run `python .ci/refresh.py --no-run`'

    def mended(self, source):
        "A code cell without what `signature_problems` finds."
        lines = source.splitlines(True)
        for i in signature_lines(source):
            code, mark, comment = lines[i].partition(' #')
            lines[i] = code + mark + SYMBOL.sub(lambda m: m[0].strip('`') if m[1] in self.symbols else m[0], comment)
        return ''.join(lines)

    def mend(self):
        "Rewrite the notebooks that `signature_problems` complains about; their outputs stay."
        for path, notebook in self.notebooks.items():
            new = {i: self.mended(text) for i, text in sources(notebook, 'code')}
            changed = {i: text for i, text in new.items() if text != ''.join(notebook['cells'][i]['source'])}
            for i, text in changed.items(): notebook['cells'][i]['source'] = text.splitlines(True)
            if changed: path.write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + '\n', 'utf-8')

    def found(self, path, place, target):
        "The problem of one link as a line, or nothing."
        problem = self.problem(path, target)
        if problem: yield f'{place}: {target}: {problem}'

    def file_problems(self):
        "Problems of the links in Markdown files."
        for path in self.texts:
            for target in targets(path.read_text('utf-8')): yield from self.found(path, path.relative_to(self.root).as_posix(), target)

    def sidebar_problems(self):
        "Problems of the pages and files that _quarto.yml names."
        import yaml
        config = yaml.safe_load((self.root/'_quarto.yml').read_text('utf-8'))
        for key, value in walk(config):
            is_file = key in ('logo', 'favicon', 'css') or key in ('theme', 'light', 'dark') and value.endswith('.scss')
            if is_file or key in ('href', 'contents', 'file'): yield from self.found(self.nbs/'_quarto.yml', f'_quarto.yml, {key}', value)

    def problems(self):
        "Every problem of the sources."
        for part in (self.notebook_problems, self.file_problems, self.sidebar_problems): yield from part()


def output_texts(cell):
    "Markdown and HTML among the outputs of a cell."
    for out in cell.get('outputs', []):
        for kind in ('text/markdown', 'text/html'):
            if kind in out.get('data', {}): yield ''.join(out['data'][kind])


def nearest(anchor, anchors):
    "The anchor that was probably meant."
    import difflib
    return next(iter(difflib.get_close_matches(anchor, anchors, 1, 0)), 'none')


def walk(value, key=''):
    "(key, text) of every text in nested YAML; the items of a list have the list's key."
    if isinstance(value, dict):
        for k, v in value.items(): yield from walk(v, k)
    elif isinstance(value, list):
        for v in value: yield from walk(v, key)
    elif isinstance(value, str): yield key, value


# ---------------------------------------------------------------- a rendered site

class Page(HTMLParser):
    "The ids of an HTML page and the addresses it names."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text('utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or '' for k, v in attrs}
        self.ids.update(attrs[k] for k in ('id', 'name') if k in attrs and (k == 'id' or tag == 'a'))
        for key in ('href', 'src'):
            if attrs.get(key): (self.links if tag in ('a', 'img', 'area') else self.loads).append(attrs[key])


def rendered_problems(folder, site):
    "Problems of the HTML files in `folder`: files and anchors that do not exist, files loaded from other hosts."
    folder = Path(folder).resolve()
    pages = {p: Page(p) for p in sorted(folder.rglob('*.html'))}
    if not pages: yield f'{folder}: no .html file'
    for path, page in pages.items():
        for target in page.links + page.loads:
            problem = rendered_problem(folder, pages, path, target, site, loaded=target in page.loads)
            if problem: yield f'{path.relative_to(folder)}: {target}: {problem}'
    for name in site.pages:
        if folder/name not in pages: yield f'{name}: page missing from {folder.name}'


def rendered_problem(folder, pages, path, target, site, loaded):
    "What is wrong with one address of an HTML page."
    if target.startswith(site.docs): target = '/' + target.removeprefix(site.docs).lstrip('/')
    url = urlsplit(target)
    if url.scheme in ('http', 'https') or target.startswith('//'):
        if loaded and url.netloc != urlsplit(site.docs).netloc: return 'loaded from another host'
        return site.problem(path, target)
    if url.scheme or target == '#' or url.fragment.startswith('category='): return ''
    local = unquote(url.path)
    file = path if not local else (folder/local.lstrip('/') if local.startswith('/') else path.parent/local).resolve()
    if file.is_dir(): file = file/'index.html'
    if not file.exists(): return 'no such file'
    if url.fragment and file in pages and unquote(url.fragment) not in pages[file].ids: return f'{file.name} has no such anchor'
    return ''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rendered', nargs='?', help='folder of a rendered site, e.g. _docs')
    parser.add_argument('--mend', action='store_true', help='rewrite the notebooks where that is all that is needed')
    parser.add_argument('--root', default=Path(__file__).resolve().parent.parent, help='the checkout')
    args = parser.parse_args()
    site = Site(args.root)
    if args.mend: return site.mend()
    problems = list(site.problems()) + (list(rendered_problems(args.rendered, site)) if args.rendered else [])
    for line in problems: print(line)
    if problems: sys.exit(f'{len(problems)} broken links')
    print(f'{len(site.notebooks)} notebooks, {len(site.texts)} Markdown files: every link and anchor found')


if __name__ == '__main__': main()
