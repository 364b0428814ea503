"""Are the tests of boundaries calibrated, and what can they see? Writes results/boundary_calibration.json.

    python nbs/experiments/boundary_calibration.py             # all scenarios, about 5 CPU-minutes
    python nbs/experiments/boundary_calibration.py bursty      # one of them
    python nbs/experiments/boundary_calibration.py --trials 50 --out /tmp/x.json

Null scenarios: boundaries and events are independent, so that a calibrated test has p < .05 in 5 % of the trials. Power: a share
of the events also triggers a boundary. What the result file holds already is not computed again.
"""
import argparse
import time
from pathlib import Path

import numpy as np
from scipy.stats import fisher_exact, ttest_ind

from dreamer_wb.core.runs import read_json, write_json
from dreamer_wb.vta.boundaries import bursty, permutation_test

KINDS = ('circular', 'interval', 'episode', 'uniform')
COUPLINGS = (0, .02, .05, .1, .2, .4)


def independent(n, T, seed):
    "Bursty boundaries and bursty events of the same kind, independent."
    return bursty(n, T, seed=2*seed + 1), bursty(n, T, seed=2*seed + 2)


def sparse(n, T, seed):
    "Few events, in long bursts."
    return bursty(n, T, rate=.05, seed=2*seed + 1), bursty(n, T, rate=.02, burst=40, busy=.3, seed=2*seed + 2)


def unclustered(n, T, seed):
    "Every frame on its own: the case for which the naive tests are made."
    return tuple(np.random.default_rng([seed, i]).random((n, T)) < .1 for i in range(2))


def magnitude(n, T, seed):
    "Events are a quantity with memory (autoregressive, half-life 14 frames), as pixel change is."
    noise = np.random.default_rng([seed, 1]).normal(size=(T, n))
    for t in range(1, T): noise[t] = .95*noise[t - 1] + noise[t]*(1 - .95**2)**.5
    return bursty(n, T, seed=2*seed + 1), noise.T


def trend(n, T, seed):
    "Both are front-loaded in every episode, and otherwise independent."
    fade = np.linspace(1.7, .3, T)
    return tuple(np.random.default_rng([seed, i]).random((n, T)) < .1*fade for i in range(2))


NULLS = {'bursty': (independent, 3, 1000), 'one episode': (independent, 1, 1000), 'short': (independent, 64, 20), 'sparse': (sparse, 3, 1000),
         'unclustered': (unclustered, 3, 1000), 'magnitude': (magnitude, 3, 1000), 'trend': (trend, 3, 1000), 'bursty, 10 episodes': (independent, 10, 1000), 'trend, 10 episodes': (trend, 10, 1000)}


def coupled(n, T, seed, q):
    "Independent trains, but a share `q` of the events also triggers a boundary."
    read, event = independent(n, T, seed)
    return read | event & (np.random.default_rng([seed, 7]).random((n, T)) < q), event


def naive(read, x):
    "p of Welch's t-test and, for events, of Fisher's exact test, both on frames as if they were independent."
    r, v = read[:, 1:].ravel(), x[:, 1:].ravel()
    out = {'t-test': ttest_ind(v[r].astype(float), v[~r].astype(float), equal_var=False, alternative='greater').pvalue if 1 < r.sum() < len(r) - 1 else 1.}
    if v.dtype == bool: out['Fisher'] = fisher_exact([[(v & r).sum(), (~v & r).sum()], [(v & ~r).sum(), (~v & ~r).sum()]], alternative='greater').pvalue
    return out


def trial(pair, seed, permutations, kinds):
    "All p-values of one pair of trains."
    return {k: permutation_test(*pair, kind=k, n=permutations, seed=seed)['p'] for k in kinds if k != 'episode' or len(pair[0]) >= 7} | naive(*pair)


def run(make, trials, uniform_trials, permutations):
    "Share of trials with p < .05 for each test, and the number of trials."
    ps = {}
    for seed in range(trials):
        kinds = KINDS if seed < uniform_trials else KINDS[:3]                    # uniform re-placement costs 20 times as much
        for k, p in trial(make(seed), seed, permutations, kinds).items(): ps.setdefault(k, []).append(p)
    return {k: dict(below=float(np.mean(np.array(p) < .05)), trials=len(p)) for k, p in ps.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', help=f'scenarios: {", ".join(NULLS)}, power (default: all)')
    p.add_argument('--trials', type=int, default=2000, help='trials of each null scenario (default 2000)')
    p.add_argument('--permutations', type=int, default=499, help='permutations of each test (default 499)')
    p.add_argument('--out', default=str(Path(__file__).parent/'results/boundary_calibration.json'))
    args = p.parse_args()
    done = read_json(args.out) if Path(args.out).exists() else {}
    for name in args.names or [*NULLS, 'power']:
        if name in done: continue
        start = time.process_time()
        if name == 'power':
            rows = {str(q): run(lambda seed: coupled(3, 1000, 10**6 + seed, q), args.trials//4, 0, args.permutations) for q in COUPLINGS}
        else:
            make, n, T = NULLS[name]
            rows = run(lambda seed: make(n, T, seed), args.trials, args.trials//4, args.permutations) | dict(episodes=n, frames=T, about=make.__doc__)
        done[name] = dict(result=rows, permutations=args.permutations, cpu_seconds=round(time.process_time() - start, 1))
        write_json(args.out, done)
        print(name, done[name])


if __name__ == '__main__': main()
