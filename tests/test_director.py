"""Managers and worker in the whole agent: interrupted and resumed, any clock, motors, one clear line for what cannot be."""
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from dreamer_wb.core.config import compose
from dreamer_wb.core.runs import UserError, load_checkpoint, read_metrics
from dreamer_wb.dreamer.agent import AgentConfig, DreamerAgent, Player, load_agent, train_agent
from dreamer_wb.dreamer.envs import EnvConfig, Stream, evaluate, make_envs
from dreamer_wb.vta.director import Director

SMALL = ['experiment=tiny_director', 'encoder.depth=4', 'decoder.depth=4', 'dynamics.deter=16', 'dynamics.hidden=16', 'dynamics.blocks=2', 'dynamics.stoch=4', 'heads.units=8',
         'behavior.units=8', 'behavior.horizon=4', 'behavior.starts=0', 'env.n=2', 'prefill=60', 'batch_size=4', 'batch_length=8', 'train_ratio=8', 'loop.log_every=5', 'loop.amp=off',
         'loop.eval_every=10', 'eval_episodes=1', 'loop.tensorboard=false', 'loop.progress=false', 'loop.checkpoint_seconds=0', 'video=false']


def config(folder, *more): return compose(AgentConfig, [*SMALL, f'runs_dir={folder}', 'name=one', *more])


class Stop(Callback):
    "Interrupts after so many updates."
    order = 99
    def __init__(self, after): self.after = after
    def after_batch(self):
        if self.learn.train_iter >= self.after: raise KeyboardInterrupt


def test_interrupted_and_resumed(tmp_path, monkeypatch):
    "The state dict is complete: an interrupted run goes on with every weight, critic and rate of the managers, and a saved agent chooses the same goals."
    with pytest.raises(KeyboardInterrupt): train_agent(config(tmp_path, 'loop.steps=20'), cbs=[Stop(7)])
    saved = load_checkpoint(tmp_path/'tiny_director'/'one'/'checkpoints'/'last.ckpt')
    step, kept = saved['meta']['step'], {k: v for k, v in saved['state']['model'].items() if k.startswith('behavior.')}
    assert 0 < step <= 7 and {'behavior.goals.beta', 'behavior.levels.1.critics.task.scale.high', 'behavior.levels.0.critics.goal.slow.0.weight'} <= set(kept)
    seen, losses = [], Director.losses
    def watched(self, *args):
        if not seen: seen.append({f'behavior.{k}': v.clone() for k, v in self.state_dict().items()})
        return losses(self, *args)
    monkeypatch.setattr(Director, 'losses', watched)
    run = train_agent(config(tmp_path, 'loop.steps=20'))
    assert set(seen[0]) == set(kept) and all(torch.equal(v, seen[0][k]) for k, v in kept.items())
    df = read_metrics(run)
    assert df['step'].iloc[-1] == 20 and np.isfinite(df[['loss', 'actor', 'manager1', 'critic', 'critic0_goal', 'critic1_explore', 'goals', 'eval_return']].iloc[-1]).all()
    row, played = Stream(make_envs(EnvConfig('dreamer_wb/Keys-v0', n=2), 16)).reset(), []
    for _ in range(2):
        torch.manual_seed(0)
        player = Player(load_agent(run.checkpoints/'agent.ckpt'))
        player(row)
        played.append(player.memory['goal1'])
    assert torch.equal(*played)


@pytest.mark.parametrize('more', [('behavior.director.clock=value', 'behavior.director.levels=3', 'behavior.director.below=0.5'),
                                  ('dynamics.name=hierarchy', 'behavior.director.clock=dynamics'),
                                  ('env.name=Pendulum-v1', 'env.steps=10', 'behavior.director.space=deter', 'behavior.director.explore=0')])
def test_clocks_and_motors(tmp_path, more):
    run = train_agent(config(tmp_path, 'loop.steps=4', 'loop.eval_every=4', *more))
    assert np.isfinite(read_metrics(run)[['loss', 'actor', 'manager1', 'goals', 'eval_return']].iloc[-1]).all()


@pytest.mark.parametrize('clock', ['every', 'value'])
def test_the_shortest_segment_is_a_step(clock):
    "`every=1` ticks at each step on any clock, and nobody divides by zero when every episode ends at once."
    agent = DreamerAgent(config('.', 'action_dim=5', 'behavior.director.every=1', f'behavior.director.clock={clock}'), True)
    batch = dict(obs=torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8), act=torch.zeros(2, 8, 5), rew=torch.randn(2, 8),
                 done=torch.ones(2, 8, dtype=torch.bool), first=torch.ones(2, 8, dtype=torch.bool))
    losses, metrics = agent(batch)
    sum(v.mean() for v in losses.values()).backward()
    assert metrics['ticks1'] == 1 and all(torch.isfinite(p.grad).all() for p in agent.parameters() if p.grad is not None)


@pytest.mark.parametrize('more', [('behavior.director.clock=value',), ('dynamics.name=hierarchy', 'behavior.director.clock=dynamics')])
def test_half_precision_trains_every_level(more):
    "A dream casts weights without gradient; the losses must not be given these."
    torch.manual_seed(0)
    agent = DreamerAgent(config('.', 'action_dim=5', *more), True)
    batch = dict(obs=torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8), act=torch.eye(5)[torch.randint(5, (2, 8))], rew=torch.rand(2, 8),
                 done=torch.zeros(2, 8, dtype=torch.bool), first=torch.zeros(2, 8, dtype=torch.bool))
    with torch.autocast('cpu', torch.bfloat16): losses, _ = agent(batch)
    sum(v.mean() for v in losses.values()).backward()
    assert all(v.dtype == torch.float32 for v in losses.values()) and not [n for n, p in agent.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize('more, why', [(('behavior.director.clock=dynamics',), 'dynamics.hierarchy.levels=2'), (('behavior.director.levels=1',), 'at least 2'),
                                       (('behavior.director.clock=values',), 'did you mean `value`'), (('behavior.actor_grad=dynamics',), 'reinforce'),
                                       (('behavior.director.evry=3',), 'behavior.director.every')])
def test_what_cannot_be_is_said_in_one_line(tmp_path, more, why):
    with pytest.raises(UserError, match=why) as e: train_agent(config(tmp_path, 'loop.steps=2', *more))
    assert '\n' not in str(e.value)
