"A hierarchy as the dynamics of a world model, trained by the one loop on episodes from disk."
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
