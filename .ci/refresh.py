"""Execute notebooks in place so that readers see their outputs, then clean, export and write README.md.

    python .ci/refresh.py                            # every notebook, then all that is made from them
    python .ci/refresh.py nbs/21_dreamer.rssm.ipynb  # one notebook, then all that is made from them
    python .ci/refresh.py --no-run                   # no execution: heads, clean metadata, export, README.md, nbs/nbdev.yml

Runs exactly the cells that `nbdev_test` runs, each notebook in a process of its own; what a cell writes to stderr (progress
bars, warnings) is not stored. Quarto is not needed. A second run changes nothing but printed timings.
"""
import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def run_notebook(path):
    "Execute `path` the way `nbdev_test` does and store the outputs; returns the seconds it took."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    skip = set(get_config().tst_flags.split())
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if str(nb.frontmatter_.get('skip_exec', False)).lower() == 'true': return 0.

    def not_run(cell):
        if cell.cell_type != 'code': return True
        directives = getattr(cell, 'directives_', None) or {}
        return directives.get('eval:', [''])[0].lower() == 'false' or bool(skip & directives.keys())

    ran = {cell.id: cell for cell in nb.cells if not not_run(cell)}
    for cell in ran.values(): cell.outputs = []              # a cell that prints nothing any more keeps no old output
    sys.path.insert(0, str(root))
    shell, start = CaptureShell(path), time.time()
    try:
        with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=not_run)
    except Exception:
        sys.exit(shell.prettytb(fname=path))
    stored = read_nb(path)                                   # keep the file's own cells, take only the outputs
    for cell in stored.cells:
        if cell.id in ran: cell.outputs = [o for o in ran[cell.id].outputs if o.get('name') != 'stderr']
    write_nb(stored, path)
    return time.time() - start


def run_all(paths, jobs, env):
    "Execute `paths`, `jobs` at a time; stops with the error of the first that failed."
    def one(path): return subprocess.run([sys.executable, __file__, '--one', str(path)], env=env).returncode
    with ThreadPoolExecutor(jobs) as pool: failed = [p.name for p, code in zip(paths, pool.map(one, paths)) if code]
    if failed: sys.exit(f'{", ".join(failed)} failed; nothing was exported')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--no-run', action='store_true', help='do not execute anything')
    parser.add_argument('--jobs', '-j', type=int, default=1, help='notebooks executed at the same time')
    parser.add_argument('--one', type=Path, help=argparse.SUPPRESS)   # a notebook executed in this process
    args = parser.parse_args()
    if args.one:
        print(f'{args.one.name}: {run_notebook(args.one.resolve()):.1f} s', flush=True)
        return
    notebooks = [p.resolve() for p in args.notebooks] or sorted((root/'nbs').rglob('*.ipynb'))
    os.chdir(root)
    env = dict(os.environ, MPLBACKEND='module://matplotlib_inline.backend_inline', OMP_NUM_THREADS='1')
    env.pop('IN_TEST', None)                                 # with it nbdev_export exports nothing
    if not args.no_run: run_all(notebooks, args.jobs, dict(env, IN_TEST='1'))
    def nbdev(command): subprocess.run([str(Path(sys.executable).with_name(command))], check=True, env=env)
    def script(*command): subprocess.run([sys.executable, *command], check=True, env=env)
    script('.ci/colab.py')
    nbdev('nbdev_clean')
    nbdev('nbdev_export')
    script('.ci/links.py', '--mend')                         # needs the index of the export, and changes what is exported
    nbdev('nbdev_export')
    script('.ci/readme.py')
    from nbdev.quarto import refresh_quarto_yml
    refresh_quarto_yml()


if __name__ == '__main__': main()
