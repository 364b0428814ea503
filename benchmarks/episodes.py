"""Training batches out of `EpisodeStore` against opening the .npz files, in CPU seconds on one thread.

    python benchmarks/episodes.py
    python benchmarks/episodes.py --n 4795 --size 128

Both sides make the same batches (checked) of the same uint8 images, channels first, as torch tensors. The files are in the system's
cache for both, so the ratio is the cost of opening, not of the disk.
"""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dreamer_wb.data.episodes import Batches, EpisodeStore, write_episode


def from_files(files, index, keys):
    "A batch of still images, file by file, as simply as it can be done."
    parts = {k: [] for k in keys}
    for i in index:
        with np.load(files[i]) as f:
            for k in keys: parts[k].append(f[k])
    out = {k: torch.from_numpy(np.stack(v)) for k, v in parts.items()}
    out['obs'] = out['obs'].permute(0, 1, 4, 2, 3).contiguous()
    return out


def cpu(f, rounds, repeats=3):
    "Least CPU seconds per call of `f(step)` over `repeats` series of `rounds` calls."
    best = float('inf')
    for _ in range(repeats):
        start = time.process_time()
        for step in range(rounds): f(step)
        best = min(best, (time.process_time() - start) / rounds)
    return best


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=1000, help='images (default 1000)')
    p.add_argument('--size', type=int, default=64, help='side of the images in pixels (default 64)')
    p.add_argument('--batch-size', type=int, default=32, help='images in a batch (default 32)')
    args = p.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as tmp:
        for i in range(args.n):
            write_episode(Path(tmp)/f'{i:05d}.npz', rng.integers(0, 256, (1, args.size, args.size, 3), np.uint8), label=i % 2, place=i // 2 % 2)
        start = time.process_time()
        store = EpisodeStore(tmp)
        build = time.process_time() - start
        time.sleep(2.1)                      # files this young are compared by content, not by time
        EpisodeStore(tmp)
        start = time.process_time()
        store = EpisodeStore(tmp)
        again = time.process_time() - start
        batches, files = Batches(store, args.batch_size), sorted(Path(tmp).glob('*.npz'))
        index = [batches(step)['index'].tolist() for step in range(200)]
        keys = ('obs', 'act', 'rew', 'done')
        one, two = from_files(files, index[0], keys), batches(0)
        assert all(torch.equal(one[k], two[k]) for k in keys)
        slow = cpu(lambda step: from_files(files, index[step], keys), 10)
        images = cpu(lambda step: from_files(files, index[step], ('obs',)), 10)
        fast = cpu(batches, 200)
    B = args.batch_size
    print(f'{args.n} images of {args.size} px, batches of {B}, torch {torch.__version__}, numpy {np.__version__}\n')
    print(f"{'':34}{'ms/batch':>10}{'images/s':>12}{'ratio':>8}")
    for name, t in (('.npz files, all four keys', slow), ('.npz files, images only', images), ('EpisodeStore, everything', fast)):
        print(f'{name:34}{t * 1e3:10.2f}{B / t:12.0f}{t / fast:8.1f}')
    print(f'\nbuilding the store: {build:.2f} s once, {args.n / build:.0f} images/s; opening it again: {again * 1e3:.0f} ms')


if __name__ == '__main__': main()
