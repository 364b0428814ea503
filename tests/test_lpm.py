"""Curiosity and the noisy television: the zero test with forms that must fail it, prequential order, the users' script."""
import importlib.util
import sys

import numpy as np
import pytest
import torch

from dreamer_wb.lpm.curiosity import FORMS, KINDS, CuriosityConfig, make_curiosity
from dreamer_wb.lpm.noisy_tv import Pictures, load_pictures
from dreamer_wb.lpm.worlds import choose, is_zero, run_noise


@pytest.fixture(scope='module')
def noise():
    "What every form is worth on pure noise, two seeds."
    bank = Pictures('noise', np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 3), np.uint8))
    names = ('LPM, Eq. 3', 'clamp', 'abs', 'released, eta 0.4', 'prediction error')
    runs = [run_noise(bank, seed, versions=260, burn=100, names=names) for seed in (0, 1)]
    return {k: [r[k] for r in runs] for k in names}


def test_progress_is_zero_on_noise(noise): assert is_zero(noise['LPM, Eq. 3']), noise['LPM, Eq. 3']


@pytest.mark.parametrize('form', ['clamp', 'abs', 'released, eta 0.4', 'prediction error'])
def test_other_forms_are_not(noise, form): assert not is_zero(noise[form]), noise[form]


def test_forms_have_their_sign():
    g, m = torch.tensor([0., -1., 2.]), torch.tensor([1., 1., 1.])
    eps = m.log()
    assert FORMS['log'](g, eps, m, 1.).tolist() == [0., -1., 2.]
    assert FORMS['clamp'](g, eps, m, 1.).tolist() == [0., 0., 2.]
    assert FORMS['abs'](g, eps, m, 1.).tolist() == [0., 1., 2.]
    assert FORMS['released'](g, eps, m, .4)[0] == pytest.approx(-.6)


@pytest.mark.parametrize('kind', list(KINDS))
def test_a_reward_is_measured_before_it_is_learnt_from(kind):
    torch.manual_seed(0)
    cfg = CuriosityConfig(kind=kind, queue=16, memory=16, warmup=1, lag=2, hidden=8, steps=3, batch=8)
    curious = make_curiosity(cfg, 4, 2, 3)
    batch = lambda: dict(feat=torch.randn(16, 4), act=torch.randn(16, 2), obs=torch.randn(16, 3), target=torch.randn(16, 3), error=torch.rand(16))
    for _ in range(4): curious.update(batch())
    new, state = batch(), torch.get_rng_state()
    if kind == 'rnd': curious.moments.add = lambda x: None           # its observation moments may include the new ones
    before = curious.reward_real(new)
    torch.set_rng_state(state)
    assert float(curious.update(new)['intrinsic']) == pytest.approx(float(before.mean()), abs=1e-6)
    assert curious.reward(torch.randn(5, 7, 4), torch.randn(5, 7, 2)).shape == (5, 7)


def test_no_reward_before_the_queue_is_full():
    curious = make_curiosity(CuriosityConfig(kind='lpm_exact', queue=40, warmup=0, hidden=8), 4, 2)
    for n in (16, 32):
        batch = dict(feat=torch.randn(16, 4), act=torch.randn(16, 2), error=torch.rand(16))
        assert curious.reward_real(batch).abs().sum() == 0 and not curious.ready
        curious.update(batch)
    curious.update(batch)
    assert curious.ready and curious.reward_real(batch).abs().sum() > 0


def test_choices_do_not_depend_on_units():
    torch.manual_seed(0)
    value = torch.tensor([0., .1, .2, .9])
    shares = [choose(k * value, 20_000).bincount(minlength=4) / 20_000 for k in (1e-3, 1e3)]
    assert (shares[0] - shares[1]).abs().max() < .02 and shares[0].argmax() == 3


def test_banks_are_named_and_do_not_replace_one_another(tmp_path):
    names = {load_pictures(source).name for source in ('photos', 'textures', 'static')}
    assert len(names) == 3
    with pytest.raises(Exception, match='no CIFAR-10'): load_pictures(f'cifar10:{tmp_path}')


def test_the_users_script(checkout, capsys):
    spec = importlib.util.spec_from_file_location('train_lpm', checkout/'train_lpm.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = '--steps 10000 --noisy-tv --seed 3 --env-name Pendulum-v1 --wandb --wandb-project Dreamer-LPM tv.trigger=torque'.split()
    assert script.overrides(flags) == ['steps=10000', 'noisy_tv=true', 'seed=3', 'env_name=Pendulum-v1', 'wandb=true', 'wandb_project=Dreamer-LPM', 'tv.trigger=torque']
    assert script.overrides([]) == []
    with pytest.raises(SystemExit): script.overrides(['--noise'])
    assert 'unknown: --noise' in capsys.readouterr().err


def test_the_users_docker_files(checkout):
    yaml = pytest.importorskip('yaml')
    service = yaml.safe_load((checkout/'docker-compose.yml').read_text())['services']['dreamer']
    assert service['deploy']['resources']['reservations']['devices'][0]['capabilities'] == ['gpu']
    assert (checkout/'Dockerfile').read_text().split('FROM ')[1].startswith('pytorch/pytorch:')
    assert sys.platform == 'win32' or (checkout/'start.sh').stat().st_mode & 0o100
