"""The original VTA on data with known segments: which switches make its boundaries right, and do they stay right?

    python nbs/experiments/vta_original.py                          # everything that is not in the results yet
    python nbs/experiments/vta_original.py --only big_ball/lag --seeds 0

Every run is a `dreamer-wb train` in --runs; interrupted (also by SIGTERM), the same command goes on where it was. The curves and the evaluations go to
results/vta_original.json after each run.
"""
import argparse
from pathlib import Path

from dreamer_wb.core.config import compose
from dreamer_wb.core.runs import Run, read_json, read_metrics, write_json
from dreamer_wb.vta.model import VTATrainConfig, train_vta

HERE = Path(__file__).parent
RESULTS = HERE/'results'/'vta_original.json'
QUIET = ['loop.progress=false', 'loop.tensorboard=false', 'loop.checkpoint_seconds=20']
BALL = ['experiment=bouncing_balls_cpu', 'eval_size=192']
COLORS = ['experiment=colors', 'eval_size=128']
LAG = ['obs_post_lag=1', 'causal=true', 'belief_size=16', 'loop.steps=4000', 'loop.eval_every=250', 'loop.lr=2e-3']
RUNS = {'big_ball/lag': [*BALL, *LAG], 'colors/lag': [*COLORS, *LAG], 'colors/published': COLORS, 'big_ball/published': BALL}
COLUMNS = ('step', 'cpu_seconds', 'rate', 'precision', 'recall', 'f1', 'f1_tol1', 'auc', 'auc_prior', 'f1_random', 'f1_clock', 'f1_frame_difference',
           'mse', 'kl_abs', 'kl_obs', 'kl_mask')


def collect(run):
    "Curve of the evaluations and the final tables of a finished or unfinished run."
    rows = read_metrics(run.metrics).dropna(subset=['f1'])
    out = dict(done=run.done('train'), curve={k: rows[k].tolist() for k in COLUMNS})
    if (run.path/'boundary_eval.json').exists(): out['truth'] = read_json(run.path/'boundary_eval.json')['truth']
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', default=list(RUNS), choices=list(RUNS), help='which runs')
    parser.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    parser.add_argument('--runs', default='runs/vta_original', help='folder of the runs')
    parser.add_argument('--collect', action='store_true', help='only gather what is there, finished or not')
    args = parser.parse_args()
    for seed in args.seeds:
        for name in args.only:
            results, key = read_json(RESULTS) if RESULTS.exists() else {}, f'{name}/{seed}'
            if results.get(key, {}).get('done'): continue
            cfg = compose(VTATrainConfig, [*RUNS[name], *QUIET, f'seed={seed}', f'runs_dir={args.runs}'])
            cfg.experiment, cfg.name = name.replace('/', '_'), f'seed{seed}'
            folder = Path(args.runs)/cfg.experiment/cfg.name
            if args.collect and not (folder/'metrics.csv').exists(): continue
            run = Run.open(folder) if args.collect else train_vta(cfg)
            results = read_json(RESULTS) if RESULTS.exists() else {}
            write_json(RESULTS, dict(results, **{key: collect(run)}))


if __name__ == '__main__': main()
