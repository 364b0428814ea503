"""The doctor as a user meets it: the command, its errors, the warning in the first minute, and that looking changes nothing."""
import warnings

import numpy as np
import pytest
import torch

from dreamer_wb.cli import main
from dreamer_wb.core.config import DecoderConfig, DynamicsConfig, EncoderConfig, LoopConfig, RepresentationConfig, ScalesConfig, TrainConfig
from dreamer_wb.core.learner import fit, set_seed
from dreamer_wb.core.runs import Run, UserError, read_json
from dreamer_wb.data.episodes import EpisodeStore, write_episode
from dreamer_wb.dreamer.collapse import RULES, GreyWarning, checks_at, diagnose, doctor_callback, excess, measure, sample_batch
from dreamer_wb.dreamer.world_model import DreamerWorldModel, read_images, train_world_model


def config(root, tmp_path, steps=60, **keys):
    loop = LoopConfig(steps=steps, lr=1e-2, log_every=10, eval_every=0, progress=False, tensorboard=False, amp='off')
    return TrainConfig(**dict(size=24, encoder=EncoderConfig(depth=4, mults=[1, 2, 4]), decoder=DecoderConfig(depth=16, mults=[1, 2, 4]),
                              dynamics=DynamicsConfig(stoch=8, classes=4, deter=32, hidden=32, blocks=4), experiment='test', name='run',
                              runs_dir=str(tmp_path/'runs'), data_dir=str(root), batch_size=8, loop=loop) | keys)


@pytest.fixture(scope='module')
def episodes(tmp_path_factory):
    "40 + 24 still images whose colour and brightness vary."
    root, rng = tmp_path_factory.mktemp('episodes'), np.random.default_rng(0)
    for split, n in (('train', 40), ('val', 24)):
        for i in range(n):
            colour, ramp = rng.integers(0, 200, 3), np.linspace(0, 55, 24)[:, None, None]
            write_episode(root/split/f'{i:03d}.npz', (colour + ramp + np.zeros((24, 24, 3))).astype(np.uint8)[None])
    return root


def warned(f):
    "What `f` returns, and the doctor's warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        out = f()
    return out, [str(w.message) for w in caught if w.category is GreyWarning]


def test_a_healthy_run_is_not_disturbed_and_the_command_says_so(episodes, tmp_path, capsys):
    run, said = warned(lambda: train_world_model(config(episodes, tmp_path)))
    assert not said
    seen = read_json(run.path/'doctor.json')['training']
    assert [s['step'] for s in seen] == checks_at(60) and not any(s['ill'] for s in seen)
    assert main(['doctor', f'run={run.path}', 'images=24']) == 0
    assert 'healthy' in capsys.readouterr().out
    assert (run.figures/'doctor.png').stat().st_size > 1000
    record = read_json(run.path/'doctor.json')
    assert record['run']['cause'] == 'healthy' and record['training'] == seen


def test_the_switch_and_the_look_change_no_weight(episodes, tmp_path):
    weights = []
    for name, on in (('on', True), ('off', False)):
        run = train_world_model(config(episodes, tmp_path, 30, name=name, doctor=on))
        assert (run.path/'doctor.json').exists() == on
        weights.append(DreamerWorldModel.load_from_checkpoint(run.checkpoints/'world_model.ckpt').state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))


def test_a_config_that_collapses_is_named_in_training_and_after(episodes, tmp_path, capsys):
    run, said = warned(lambda: train_world_model(config(episodes, tmp_path, 400, scales=ScalesConfig(dyn=100., rep=100.))))
    assert len(said) == 1 and 'KL scale too high' in said[0] and 'mend: scales.rep=0.1' in said[0] and '(> 2)' in said[0]
    assert len(read_json(run.path/'doctor.json')['training']) == 2                    # it looked twice and warned once
    assert main(['doctor', f'run={run.path}']) == 0
    out = capsys.readouterr().out
    assert out.count('KL scale too high') == 2 and 'at step 16 of the training' in out


class MeanMSE(DreamerWorldModel):
    "The loss of a user's own subclass, with the default reduction of `F.mse_loss`."
    def forward(self, batch):
        losses, metrics = super().forward(batch)
        return losses | {'image': losses['image'] / batch['obs'][0, 0].numel()}, metrics


def test_a_loss_of_ones_own_is_named_in_training(episodes, tmp_path):
    cfg, store = config(episodes, tmp_path), EpisodeStore(episodes/'val')
    set_seed(0)
    _, said = warned(lambda: fit(MeanMSE(cfg), lambda step: sample_batch(store, 8), cfg.loop, cbs=[doctor_callback(store, steps=60)]))
    assert len(said) == 1 and 'averaged pixel loss' in said[0] and 'sum_mse' in said[0]


def test_looking_leaves_the_model_and_the_generators_alone(episodes, tmp_path):
    world = DreamerWorldModel(config(episodes, tmp_path, decoder=DecoderConfig(depth=4, mults=[1, 2, 4], norm='batch')))
    before, mode, state = {k: v.clone() for k, v in world.state_dict().items()}, world.training, torch.get_rng_state()
    measure(world, EpisodeStore(episodes/'val'))
    assert torch.equal(state, torch.get_rng_state()) and world.training == mode
    assert all(torch.equal(v, before[k]) for k, v in world.state_dict().items())
    assert all(p.grad is None for p in world.parameters())


@pytest.mark.parametrize('output', ['sigmoid', 'tanh', 'linear', 'logistic_mixture'])
@pytest.mark.parametrize('latent', ['gaussian', 'categorical'])
def test_no_output_and_no_latent_is_a_mismatch_by_itself(episodes, tmp_path, output, latent):
    cfg = config(episodes, tmp_path, decoder=DecoderConfig(depth=4, mults=[1, 2, 4], output=output), dynamics=DynamicsConfig(latent=latent, stoch=8, classes=4, deter=32, hidden=32, blocks=4))
    found = diagnose(measure(DreamerWorldModel(cfg), EpisodeStore(episodes/'val'), thorough=False), slow=False)
    assert found.cause == 'unknown', str(found)                                      # nothing is wrong, but nothing is learned yet
    if output != 'logistic_mixture': np.testing.assert_allclose([found.measurements[k] for k in ('image_weight', 'target_scale')], 1, rtol=1e-2)
    np.testing.assert_allclose(found.measurements['kl_weight'], .1, rtol=.02)


def test_without_a_decoder_the_embedding_is_judged(episodes, tmp_path):
    cfg = config(episodes, tmp_path, decoder=DecoderConfig(kind='none'), representation=RepresentationConfig(kind='infonce', width=16, hidden=16))
    world, store = DreamerWorldModel(cfg), EpisodeStore(episodes/'val')
    m = measure(world, store)
    assert 'psnr' not in m and m['embed_rank'] > 1
    with torch.no_grad():
        for p in world.encoder.net.parameters(): p.zero_()
    assert diagnose(measure(world, store)).cause == 'collapsed embedding'


def test_a_decoder_taken_away_and_nothing_in_its_place(episodes, tmp_path, capsys):
    run, said = warned(lambda: train_world_model(config(episodes, tmp_path, decoder=DecoderConfig(kind='none'))))
    assert len(said) == 1 and 'no signal' in said[0] and 'representation.kind' in said[0]
    assert main(['doctor', f'run={run.path}', 'images=24']) == 0
    assert 'no signal' in capsys.readouterr().out and (run.figures/'doctor.png').stat().st_size > 1000
    m = read_json(run.path/'doctor.json')['run']['measurements']
    assert m['information'] < 1
    found = diagnose(m | dict(taught=1., embed_rank=40.))                                      # as if something pulled, but not apart; a rank sees nothing
    assert found.cause == 'collapsed latent', str(found)


def test_a_missing_figure_fires_no_rule():
    assert all(excess(rule, {}) == 0 for rule in RULES)
    assert all(excess(rule, {k: float('nan') for k, *_ in rule.needs}) == 0 for rule in RULES)


@pytest.mark.parametrize('args, text', [([], 'run: not given'), (['run=nowhere'], 'not a run folder'), (['run={run}'], 'holds no world model yet'), (['run={run}', 'images=3'], 'too few')])
def test_errors_are_one_line(episodes, tmp_path, capsys, args, text):
    run = Run.create(config(episodes, tmp_path), 'test', tmp_path/'runs', 'empty')
    assert main(['doctor', *(a.format(run=run.path) for a in args)]) == 2
    err = capsys.readouterr().err
    assert text in err and err.count('\n') == 1


def test_too_few_images_are_refused(episodes, tmp_path):
    with pytest.raises(UserError, match='at least 8'): measure(DreamerWorldModel(config(episodes, tmp_path)), sample_batch(EpisodeStore(episodes/'val'), 4))
