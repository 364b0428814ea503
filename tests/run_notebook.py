"""Run one notebook in this process: nbdev's own test runner, then what nbdev makes of it for the site.

    python tests/run_notebook.py NOTEBOOK PAGE

`test_notebooks.py` starts a process for each notebook, so that nothing one of them leaves behind can reach another. The page
that Quarto would get is written to PAGE.
"""
import sys
from pathlib import Path


def main(notebook, page):
    from execnb.nbio import read_nb, write_nb
    from nbdev.config import get_config
    from nbdev.processors import FilterDefaults
    from nbdev.test import test_nb
    config = get_config()
    passed, seconds = test_nb(notebook, skip_flags=config.tst_flags.split(), basepath=config.config_path)
    if not passed: sys.exit(1)
    print(f'{notebook.name}: {seconds:.1f} s')
    processed = read_nb(notebook)
    FilterDefaults()(processed)
    write_nb(processed, page)


if __name__ == '__main__': main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
