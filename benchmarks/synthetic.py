"""How fast synthetic Waterbirds are drawn and written.

    python benchmarks/synthetic.py                 # 64, 96, 128 and 224 pixels, one core
    python benchmarks/synthetic.py --sizes 64 --n 1000 --workers 2

CPU seconds of one process, so that other work on the machine counts little; the best of the repeats. The last
column, with `--workers`, is the time on the clock with that many processes.
"""
import argparse
import os
import tempfile
import time
from pathlib import Path

for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[k] = '1'

from dreamer_wb.data.synthetic import make_waterbirds, render, sample_specs  # noqa: E402


def cpu(f, n, repeats):
    "Least CPU milliseconds per image."
    best = float('inf')
    for _ in range(repeats):
        start = time.process_time()
        f()
        best = min(best, time.process_time()-start)
    return 1000*best/n


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', type=int, nargs='+', default=[64, 96, 128, 224])
    p.add_argument('--n', type=int, default=400, help='images per measurement at 64 px; fewer for larger ones')
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--workers', type=int, default=0, help='also write with so many processes')
    a = p.parse_args()
    print('  px   draw ms  images/s   write ms  images/s' + '   with workers, images/s'*bool(a.workers))
    for size in a.sizes:
        n = max(64, a.n*64//size)
        specs = sample_specs(n)['test']
        render(specs[0], size)                                                   # the matrices are made once
        draw = cpu(lambda: [render(s, size) for s in specs], len(specs), a.repeats)
        with tempfile.TemporaryDirectory() as tmp:
            roots = iter(Path(tmp)/str(i) for i in range(100))
            write = cpu(lambda: make_waterbirds(next(roots), n=n, size=size), n, a.repeats)
            row = f'{size:4d} {draw:9.2f} {1000/draw:9.0f} {write:10.2f} {1000/write:9.0f}'
            if a.workers:
                start = time.perf_counter()
                make_waterbirds(next(roots), n=n, size=size, workers=a.workers)
                row += f'{n/(time.perf_counter()-start):24.0f}'
        print(row, flush=True)


if __name__ == '__main__': main()
