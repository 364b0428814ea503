"""Execute notebooks in place so that readers see their outputs, then clean, export and write README.md.

    python .ci/refresh.py                            # every notebook
    python .ci/refresh.py nbs/21_dreamer.rssm.ipynb  # one
    python .ci/refresh.py --no-run                   # clean, export, README only

Runs exactly the cells that `nbdev_test` runs. Quarto is not needed. A second run changes nothing but timings.
"""
import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def run_notebook(path):
    "Execute `path` the way `nbdev_test` does and store the outputs; returns the seconds it took."
    from execnb.nbio import write_nb
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    skip = set(get_config().tst_flags.split())
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if str(getattr(nb, 'frontmatter_', {}).get('skip_exec', False)).lower() == 'true': return 0.

    def not_run(cell):
        if cell.cell_type != 'code': return True
        directives = getattr(cell, 'directives_', None) or {}
        return directives.get('eval:', [''])[0].lower() == 'false' or bool(skip & directives.keys())

    sys.path.insert(0, str(root))
    shell, start = CaptureShell(path), time.time()
    sources = [cell.source for cell in nb.cells]
    try:
        with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=not_run)
    except Exception:
        sys.exit(shell.prettytb(fname=path))
    from execnb.nbio import read_nb
    stored = read_nb(path)                                   # keep the file's own cells, take only the outputs
    for cell, ran, source in zip(stored.cells, nb.cells, sources):
        if cell.cell_type == 'code' and not not_run(ran): cell.outputs = ran.outputs
    write_nb(stored, path)
    return time.time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--no-run', action='store_true', help='only clean, export and write README.md')
    parser.add_argument('--one', type=Path, help=argparse.SUPPRESS)   # a notebook executed in a process of its own
    args = parser.parse_args()
    if args.one:
        print(f'{args.one.name}: {run_notebook(args.one.resolve()):.1f} s', flush=True)
        return
    os.chdir(root)
    env = dict(os.environ, IN_TEST='1', MPLBACKEND='module://matplotlib_inline.backend_inline')
    if not args.no_run:
        for path in args.notebooks or sorted((root/'nbs').rglob('*.ipynb')):
            subprocess.run([sys.executable, __file__, '--one', str(path)], check=True, env=env)
    env.pop('IN_TEST')                                       # with it nbdev_export exports nothing
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([str(Path(sys.executable).with_name(command))], check=True, env=env)
    subprocess.run([sys.executable, str(root/'.ci'/'readme.py')], check=True, env=env)


if __name__ == '__main__': main()
