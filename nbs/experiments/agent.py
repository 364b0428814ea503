"""Does the agent learn? Reach, a task with a known optimum, on three seeds; Pendulum-v1 from pixels as far as the machine allows.

    python nbs/experiments/agent.py                                  # everything, see RUNS for the number of updates
    python nbs/experiments/agent.py --only reach --seeds 0
    python nbs/experiments/agent.py --only pendulum --seeds 0 --updates 2000    # goes on where the run stopped, up to update 2000

Each run is the preset named in RUNS with the keys given there; what is in the result file with so many updates already is not repeated. At the end of a run the
agent plays 100 episodes (Pendulum: 20) on environments that it has never seen, with the most probable actions. Beside it: random actions, and a controller that sees the true state.
"""
import argparse
import os
from pathlib import Path

import numpy as np
import torch

from dreamer_wb.core.config import compose
from dreamer_wb.core.runs import read_json, read_metrics, write_json
from dreamer_wb.dreamer.agent import AgentConfig, Player, load_agent, train_agent
from dreamer_wb.dreamer.envs import EnvConfig, Stream, evaluate, make_envs, random_policy, reach_optimum, scripted_policy

OUT = Path(__file__).resolve().parent/'results'/'agent.json'
RUNS = { # name: (overrides, seeds, updates, episodes of the last evaluation)
    'reach': (['experiment=tiny_pixels'], (0, 1, 2), 1200, 100),
    'reach, Gaussian latent': (['experiment=tiny_pixels', 'dynamics.latent=gaussian', 'dynamics.stoch=32'], (0, 1, 2), 1200, 100),
    'pendulum': (['experiment=pendulum', 'loop.eval_every=250'], (0,), 2000, 20),
}
COLUMNS = ('step', 'env_steps', 'cpu_seconds', 'episode_return', 'eval_return', 'image', 'reward', 'return_task', 'entropy', 'psnr')


def played(cfg, policy, episodes, seed=77_777):
    "Returns on new environments."
    stream = Stream(make_envs(EnvConfig(cfg.env.name, min(10, episodes), cfg.env.repeat, cfg.env.steps), cfg.size), seed)
    return evaluate(stream, policy(stream), episodes)['returns']


def baselines(cfg, episodes):
    "What random actions and the controller earn, with standard errors."
    players = dict(random=random_policy, scripted=scripted_policy)
    scores = {name: np.array(played(cfg, p, episodes)) for name, p in players.items()}
    return {k: dict(mean=float(x.mean()), se=float(x.std(ddof=1)/len(x)**.5), n=len(x)) for k, x in scores.items()}


def one(name, seed, updates, runs):
    "Train, or go on, up to so many updates; the curve and a last evaluation."
    overrides, _, _, episodes = RUNS[name]
    cfg = compose(AgentConfig, [*overrides, f'seed={seed}', f'runs_dir={runs}', f"name='{name} {seed}'", f'loop.steps={updates}', 'loop.tensorboard=false'])
    run = train_agent(cfg)
    table, agent = read_metrics(run), load_agent(run.checkpoints/'agent.ckpt')
    returns = played(cfg, lambda stream: Player(agent, explore=False), episodes)
    curve = [{k: row[k] for k in COLUMNS if k in row and row[k] == row[k]} for row in table.to_dict('records')]
    return dict(updates=updates, env_steps=int(table['env_steps'].max()), parameters=sum(p.numel() for p in agent.parameters() if p.requires_grad),
                cpu_seconds=run.stages()['train']['cpu_seconds'], final=dict(mean=float(np.mean(returns)), se=float(np.std(returns, ddof=1)/len(returns)**.5), n=len(returns)), curve=curve)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=list(RUNS), default=list(RUNS))
    parser.add_argument('--seeds', type=int, nargs='+')
    parser.add_argument('--updates', type=int, help='instead of what RUNS says')
    parser.add_argument('--runs', default='runs/experiments', help='folder for the runs')
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault('DREAMER_WB_PROGRESS', '0')
    results = read_json(OUT) if OUT.exists() else {}
    for name in args.only:
        overrides, seeds, updates, episodes = RUNS[name]
        if name not in results:
            cfg = compose(AgentConfig, overrides)
            results[name] = dict(overrides=overrides, repeat=cfg.env.repeat, baselines=baselines(cfg, max(100, episodes)), seeds={})
            if cfg.env.name.startswith('dreamer_wb/Reach'): results[name]['optimum'] = reach_optimum()
        for seed in args.seeds or seeds:
            wanted, done = args.updates or updates, results[name]['seeds'].get(str(seed), {})
            if done.get('updates', 0) < wanted:
                found = one(name, seed, wanted, args.runs)
                mine, results = results[name], read_json(OUT) if OUT.exists() else {}     # another process may have written meanwhile
                results.setdefault(name, mine)['seeds'][str(seed)] = done = found
                write_json(OUT, results)
            print(f"{name}, seed {seed}: {done['final']['mean']:.2f} +- {done['final']['se']:.2f} after {done['env_steps']} steps, {done['cpu_seconds']:.0f} CPU s; {results[name]['baselines']}")


if __name__ == '__main__': main()
