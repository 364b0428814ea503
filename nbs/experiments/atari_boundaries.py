"""Small hierarchical world models of three Atari games, and what their boundaries have to do with rewards, lives and rooms.

    python nbs/experiments/atari_boundaries.py                       # everything that is not in the results yet
    python nbs/experiments/atari_boundaries.py --only breakout/pixels

Episodes are played by the scripted players of `vta.atari`, 16 for training and 6 that are never trained on; a model is a `dreamer-wb train experiment=hierarchy_atari`.
Results go to results/atari_boundaries.json, the figures of the held-out episode of each game that has most boundaries to results/atari_*.jpg.
"""
import argparse
import json
from pathlib import Path

import torch

from dreamer_wb.core.config import TrainConfig, compose
from dreamer_wb.core.runs import Run, atomic_write, read_json, read_metrics, write_json
from dreamer_wb.data.episodes import read_episode
from dreamer_wb.dreamer.world_model import train_world_model
from dreamer_wb.vta.atari import write_games
from dreamer_wb.vta.figures import boundary_figures, boundary_settings, judge_boundaries
from dreamer_wb.vta.inspect import diagnose_episodes, run_episodes

HERE = Path(__file__).parent
RESULTS = HERE/'results'/'atari_boundaries.json'
GAMES, LENGTH = ('breakout', 'frostbite', 'private_eye'), 300
KINDS = {'pixels': [], 'image': ['scales.image=100'], 'value': ['dynamics.hierarchy.value=true', 'dynamics.hierarchy.signal_scale=30']}
RUNS = [f'{game}/{kind}' for kind in KINDS for game in GAMES]


def episodes_of(game, data):
    "Folders of training and held-out episodes, written if they are not there; and the number of actions."
    for split, n, seed in (('train', 16, 0), ('val', 6, 1000)): paths = write_games(Path(data)/game/split, game, n, LENGTH, seed, size=32)
    return str(Path(data)/game), len(json.loads(str(read_episode(paths[0])['info']))['actions'])


def train(game, kind, seed, args):
    "A finished run."
    folder, actions = episodes_of(game, args.data)
    cfg = compose(TrainConfig, ['experiment=hierarchy_atari', *KINDS[kind], f'data_dir={folder}', f'action_dim={actions}', f'seed={seed}', f'runs_dir={args.runs}',
                                'loop.progress=false', 'loop.tensorboard=false', *args.set])
    cfg.experiment, cfg.name = f'{game}_{kind}', f'seed{seed}'
    return train_world_model(cfg)


def look(run, pictures):
    "The evaluation of `dreamer-wb boundaries` on the held-out episodes, with its figures if they are wanted."
    episodes, settings = run_episodes(run, n=6), boundary_settings(run, 1)
    result, diagnosis = judge_boundaries(episodes, settings, tol=(0, 1), n=2000, draws=500), diagnose_episodes(episodes, settings)
    most = max(episodes, key=lambda e: (e['read'] & ~e['forced']).sum())
    window = 'boundary' if (most['read'] & ~most['forced']).any() else 'delta'
    for name, fig in (boundary_figures(most, settings, window, 24) if pictures else {}).items():
        with atomic_write(HERE/'results'/f'{pictures}_{name}.jpg') as f: fig.savefig(f, format='jpeg', dpi=60, pil_kwargs=dict(quality=70))
    rows = read_metrics(run.metrics)
    return dict(events=result['events'], summary=result['summary'], verdicts=result['verdicts'], diagnosis=str(diagnosis), cause=diagnosis.cause,
                psnr=read_json(run.path/'world_model.json')['psnr'], cpu_seconds=float(rows['cpu_seconds'].iloc[-1]) if 'cpu_seconds' in rows else None, steps=int(rows['step'].iloc[-1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', default=RUNS, choices=RUNS, metavar='GAME/KIND', help='which runs')
    parser.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    parser.add_argument('--data', default='datasets/atari', help='folder of the episodes')
    parser.add_argument('--runs', default='runs/atari_boundaries', help='folder of the runs')
    parser.add_argument('--set', nargs='*', default=[], metavar='KEY=VALUE', help='further keys of the config, for trying out')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for name in args.only:
            if RESULTS.exists() and f'{name}/{seed}' in read_json(RESULTS): continue
            game, kind = name.split('/')
            out = look(Run.open(train(game, kind, seed, args).path), f'atari_{game}' if kind == 'pixels' and seed == args.seeds[0] else '')
            write_json(RESULTS, dict(read_json(RESULTS) if RESULTS.exists() else {}, **{f'{name}/{seed}': out}))


if __name__ == '__main__': main()
