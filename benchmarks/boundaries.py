"""Evaluation of boundaries: CPU seconds for 3 episodes of 1,000 frames with 2,000 permutations, and each part of it.

    python benchmarks/boundaries.py
    python benchmarks/boundaries.py --episodes 20 --frames 1000

The whole evaluation (truth at three tolerances, three kinds of events, all baselines, intervals) must stay below 2 CPU seconds at the
default size. The last lines compare the vectorised parts with the same thing written as a loop; both give the same numbers (checked).
"""
import argparse
import time

import numpy as np

from dreamer_wb.vta.boundaries import baselines, bursty, count_matches, evaluate_boundaries, permutation_test, stack_episodes


def cpu(f, repeats=3):
    "Least CPU seconds of `f()`, and what it returned."
    best = float('inf')
    for _ in range(repeats):
        start = time.process_time()
        out = f()
        best = min(best, time.process_time() - start)
    return best, out


def loop_matches(a, b, tol):
    "One-to-one matching of one pair of sequences, one frame position at a time."
    a, b, i, j, n = np.flatnonzero(a), np.flatnonzero(b), 0, 0, 0
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= tol: i, j, n = i + 1, j + 1, n + 1
        elif a[i] < b[j]: i += 1
        else: j += 1
    return n


def loop_permutations(read, x, n):
    "Circular shifts one by one."
    rng, null = np.random.default_rng(0), np.zeros(n)
    for r, v in zip(read[:, 1:], x[:, 1:].astype(float)):
        for k in range(n): null[k] += v[np.roll(r, rng.integers(len(r)))].sum()
    return null/read[:, 1:].sum()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--episodes', type=int, default=3, help='episodes (default 3)')
    p.add_argument('--frames', type=int, default=1000, help='frames of each (default 1000)')
    p.add_argument('--permutations', type=int, default=2000, help='permutations (default 2000)')
    args = p.parse_args()
    N, T, n = args.episodes, args.frames, args.permutations
    rng = np.random.default_rng(0)
    true = bursty(N, T, rate=.06, busy=.3, seed=1)
    prob = np.clip(.6*(true & (rng.random((N, T)) < .7)) + .5*rng.random((N, T))**2, 0, 1)
    data = dict(read_prob=prob, true=true, delta=rng.gamma(2, 1, (N, T)) + 2*true, rew=bursty(N, T, seed=2)*1., events={'door': bursty(N, T, rate=.02, seed=3)})
    d = stack_episodes(data)
    parts = {'evaluate_boundaries, all of it': lambda: evaluate_boundaries(data, n=n),
             'permutation_test, circular': lambda: permutation_test(d['read'], true, n=n),
             'permutation_test, interval': lambda: permutation_test(d['read'], true, n=n, kind='interval'),
             'permutation_test, uniform': lambda: permutation_test(d['read'], true, n=n, kind='uniform'),
             'baselines': lambda: baselines(d)}
    print(f'{N} episodes of {T} frames, {n} permutations, numpy {np.__version__}\n')
    for name, f in parts.items(): print(f'{name:34}{cpu(f)[0]:8.3f} CPU-s')
    many = baselines(d)['random']                                                # (200,N,T)
    pairs = [(a, b) for run in many for a, b in zip(run, true)]
    fast, ours = cpu(lambda: count_matches(many, true, 2))
    slow, theirs = cpu(lambda: [loop_matches(a, b, 2) for a, b in pairs], 1)
    assert ours.ravel().tolist() == theirs
    print(f'\nmatching {len(pairs)} pairs within 2 frames: {fast:.3f} CPU-s; in a loop over boundaries {slow:.3f} ({slow/fast:.1f}x)')
    fast, ours = cpu(lambda: permutation_test(d['read'], true, n=n))
    slow, theirs = cpu(lambda: loop_permutations(d['read'], true, n), 1)
    assert np.allclose(ours['null'].mean(), theirs.mean(), atol=.01)
    print(f'{n} circular shifts: {fast:.3f} CPU-s; in a loop over shifts {slow:.3f} ({slow/fast:.1f}x)')


if __name__ == '__main__': main()
