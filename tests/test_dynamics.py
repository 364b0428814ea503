"A hierarchy as the dynamics of a world model, trained by the one loop on episodes from disk."
import warnings

import pytest
import torch

from dreamer_wb.core.config import DecoderConfig, DynamicsConfig, EncoderConfig, HierarchyConfig, LoopConfig, TrainConfig
from dreamer_wb.core.runs import UserError
from dreamer_wb.dreamer.collapse import sample_batch
from dreamer_wb.dreamer.world_model import DreamerWorldModel, batches_for, image_report, open_stores, train_world_model
from dreamer_wb.vta.bouncing_balls import color_patterns, write_sequences
from dreamer_wb.vta.dynamics import HierarchicalDynamics


@pytest.fixture(scope='module')
def episodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('colours')
    for seed, split in enumerate(('train', 'val', 'test')):
        data = color_patterns(16, 12, seed=seed, size=16)
        write_sequences(folder / split, data['obs'], data['read'])
    return folder


def config(episodes, tmp_path, **hierarchy):
    dynamics = DynamicsConfig('hierarchy', stoch=4, deter=16, hidden=16, blocks=2, hierarchy=HierarchyConfig(max_duration=8, **hierarchy))
    return TrainConfig(size=16, encoder=EncoderConfig(depth=4, mults=[1, 2]), decoder=DecoderConfig(depth=4, mults=[1, 2]), dynamics=dynamics,
                       runs_dir=str(tmp_path), experiment='test', name='run', device='cpu', data_dir=str(episodes), batch_size=8, batch_length=12,
                       loop=LoopConfig(steps=6, log_every=2, eval_every=3, progress=False, tensorboard=False, threads=1, amp='off'))


def test_train_learned(episodes, tmp_path):
    cfg = config(episodes, tmp_path, levels=3)
    run = train_world_model(cfg)
    rows = (run.path / 'metrics.csv').read_text().splitlines()
    assert {'tick_1', 'tick_2', 'kl_1', 'duration'} <= {name.rpartition('/')[2] for name in rows[0].split(',')}
    world = DreamerWorldModel.load_from_checkpoint(run.checkpoints / 'world_model.ckpt')
    assert isinstance(world.dynamics, HierarchicalDynamics) and world.dynamics.n_levels == 3
    assert int(world.dynamics.updates) == 6                       # evaluations and the doctor do not move the schedules
    assert image_report(world, open_stores(cfg)[1])['n'] == 16


def test_event_key(episodes, tmp_path):
    cfg = config(episodes, tmp_path, clock='event', event_key='read')
    batches, evaluation = batches_for(cfg, *open_stores(cfg))
    world, batch = DreamerWorldModel(cfg), batches(0)
    losses, metrics = world(batch)
    assert torch.isfinite(losses['dyn']).all() and abs(float(metrics['tick_1']) - 3/11) < 1e-6        # the oracle's own rate
    assert torch.isfinite(world(sample_batch(evaluation.store, 16, evaluation.length, evaluation.repeat, evaluation.keys))[0]['dyn']).all()
    with pytest.raises(UserError, match='event_key=read: the episodes'): world({k: v for k, v in batch.items() if k != 'read'})
    cfg.dynamics.hierarchy.event_key = 'reed'
    with pytest.raises(UserError, match='event_key=reed'): batches_for(cfg, *open_stores(cfg))


def test_presets_train(tmp_path):
    "The presets of hierarchies, from the command line: a few updates, scores of the boundaries in the record, and a second sample that leaves no trace in the states."
    from dreamer_wb.cli import main
    from dreamer_wb.core.config import compose
    from dreamer_wb.core.runs import read_metrics
    assert main(['prepare', 'source=simple_colors', f'out_dir={tmp_path}/colors', 'n=16', 'n_val=16', 'n_test=1', 'steps=12', 'size=16']) == 0
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*could not')       # the doctors of pictures and of boundaries look at it, too
        assert main(['train', 'experiment=hierarchy_colors', f'data_dir={tmp_path}/colors', f'runs_dir={tmp_path}', 'name=run', 'loop.steps=4', 'loop.eval_every=2', 'loop.tensorboard=false']) == 0
    rows = read_metrics(tmp_path/'hierarchy_colors'/'run'/'metrics.csv')
    assert {'rate', 'precision', 'recall', 'f1', 'auc', 'f1_random', 'f1_frame_difference'} <= set(rows.columns) and len(rows.dropna(subset=['f1'])) == 2
    cfg = compose(TrainConfig, ['experiment=hierarchy_atari', 'action_dim=18', 'dynamics.hierarchy.value=true', 'dynamics.hierarchy.signal_scale=1'])
    world, B, T = DreamerWorldModel(cfg), 3, 6
    batch = dict(obs=torch.randint(0, 256, (B, T, 3, 32, 32), dtype=torch.uint8), act=torch.randn(B, T, 18), first=(torch.arange(T) == 0).repeat(B, 1), rew=torch.randn(B, T))
    losses, _, post = world.examine(batch)
    assert {k: v.shape for k, v in losses.items()} == dict.fromkeys(world.scales, (B, T)) and 'value' in losses and post['deter'].shape == (B, T, 64)
    sum(losses[k].mean()*w for k, w in world.scales.items()).backward()
    clock = world.dynamics.clocks[0].posterior.embed.weight.grad
    assert clock.abs().sum() > 0 and all(torch.isfinite(p.grad).all() for p in world.parameters() if p.grad is not None)


def test_the_clock_finds_colours():
    "With this seed leave-one-out finds every change of colour, and nothing else, within 100 updates (see nbs/experiments/clocks.ipynb)."
    from dreamer_wb.core.config import compose
    from dreamer_wb.core.learner import fit, set_seed
    from dreamer_wb.vta.inspect import world_scores
    cfg = compose(TrainConfig, ['experiment=hierarchy_colors', 'loop.steps=100', 'dynamics.hierarchy.explore_steps=100', 'loop.eval_every=0', 'loop.progress=false', 'loop.tensorboard=false'])
    def batch(seed, n):
        data = color_patterns(n, 12, [7, seed], size=16)
        obs = torch.from_numpy(data['obs']).permute(0, 1, 4, 2, 3).contiguous()
        return dict(obs=obs, act=torch.zeros(n, 12, 1), first=(torch.arange(12) == 0).repeat(n, 1), rew=torch.zeros(n, 12), read=torch.from_numpy(data['read']))
    set_seed(0)
    world = DreamerWorldModel(cfg)
    fit(world, lambda step: batch(step, 16), cfg.loop)
    held = batch(10**6, 64)
    changes = (held['obs'][:, 1:] != held['obs'][:, :-1]).flatten(2).any(-1)
    held['read'][:, 1:] = changes                                 # what can be seen: two patterns of one colour look like one
    found = world_scores(world, held)
    assert found['f1'] > .95 and found['f1_random'] < .5, found
