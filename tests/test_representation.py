"World models without a decoder on the path that a user takes, and representation losses on odd batches."
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamer_wb.cli import main
from dreamer_wb.core.config import TrainConfig, compose
from dreamer_wb.core.runs import Run, UserError
from dreamer_wb.data.prepare import PrepareConfig, prepare
from dreamer_wb.dreamer.representation import barlow_loss, info_nce, nt_xent, same_picture
from dreamer_wb.dreamer.world_model import DreamerWorldModel, train_world_model

torch.set_num_threads(1)
SMALL = ['size=32', 'encoder.depth=8', 'encoder.mults=[1,2,4]', 'decoder.depth=8', 'decoder.mults=[1,2,4]', 'dynamics.deter=32', 'dynamics.hidden=32', 'dynamics.stoch=16', 'batch_size=16',
         'loop.steps=6', 'loop.eval_every=3', 'loop.progress=false', 'loop.tensorboard=false']


@pytest.fixture(scope='module')
def episodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')/'episodes'
    prepare(PrepareConfig(source='synthetic', n=200, size=32, out_dir=str(folder)))
    return folder


def test_train_classify_report_without_a_decoder(episodes, tmp_path):
    assert main(['train', *SMALL, 'decoder.kind=none', 'representation.kind=simclr', f'data_dir={episodes}', f'runs_dir={tmp_path}', 'name=a']) == 0
    run = Run.open(tmp_path/'custom/a')
    facts = json.loads((run.path/'world_model.json').read_text())
    assert set(facts) == {'n', 'kl', 'active_units'} and not list(run.figures.glob('reconstructions*'))
    assert main(['classify', f'run={run.path}', 'models=[dreamer_linear]', 'methods=[erm]', 'seeds=[0]', 'maps=[]', 'head.steps=20', 'progress=false']) == 0
    assert main(['report', f'run={run.path}']) == 0
    assert 'no decoder' in (run.path/'report.md').read_text() and 'PSNR' not in (run.path/'report.md').read_text()
    with pytest.raises(UserError, match='no decoder'): DreamerWorldModel.load_from_checkpoint(run.checkpoints/'world_model.ckpt').decoder(torch.zeros(2, 16))


@pytest.mark.parametrize('kind', ['r2', 'simclr'])
def test_an_interrupted_training_goes_on_bit_for_bit(episodes, tmp_path, kind):
    def train(name, steps):
        cfg = compose(TrainConfig, [*SMALL, f'representation.kind={kind}', 'decoder.kind=none', f'data_dir={episodes}', f'runs_dir={tmp_path}', f'name={name}', f'loop.steps={steps}', 'loop.schedule=constant', 'loop.warmup=0'])
        return torch.load(train_world_model(cfg).checkpoints/'world_model.ckpt', weights_only=True)['state']
    train('parts', 3)
    whole, parts = train('whole', 6), train('parts', 6)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_mudreamer_refuses_still_images_in_one_line(episodes, tmp_path, capsys):
    assert main(['train', *SMALL, 'representation.kind=mudreamer', 'heads.reward=true', 'repeat=3', f'data_dir={episodes}', f'runs_dir={tmp_path}', 'name=m']) == 2
    assert 'all actions are equal' in capsys.readouterr().err
    assert main(['train', *SMALL, 'representation.kind=mudreamer', f'data_dir={episodes}', f'runs_dir={tmp_path}', 'name=s']) == 2
    assert 'still images' in capsys.readouterr().err


def test_a_sweep_ends_in_a_table_and_a_figure(episodes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['train', *SMALL, f'data_dir={episodes}', 'dynamics.free_nats=0,3', 'seed=0,1,2', '-m']) == 0
    folder, = (tmp_path/'runs/multirun').iterdir()
    assert (folder/'sweep.png').stat().st_size > 1000 and len((folder/'sweep.csv').read_text().splitlines()) == 7
    text = (folder/'sweep.md').read_text()
    assert text in capsys.readouterr().out and text.count('±') > 4 and 'dynamics.free_nats' in text


def test_losses_are_the_same_under_autocast():
    a, b = torch.randn(32, 16), torch.randn(32, 16)
    for loss in (barlow_loss, info_nce, nt_xent):
        plain = loss(a, b)
        with torch.autocast('cpu', torch.bfloat16): assert torch.equal(loss(a, b), plain)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(1, 8), st.floats(0, 1e4), st.integers(0, 99))
def test_losses_are_finite_and_not_negative(n, p, scale, seed):
    torch.manual_seed(seed)
    a, b = (scale * torch.randn(n, p)).requires_grad_(), scale * torch.randn(n, p)
    for loss in (barlow_loss(a, b), info_nce(a, b).sum(), nt_xent(a, b).sum()):
        grad, = torch.autograd.grad(loss, a)
        assert loss >= -1e-4 and loss.isfinite() and grad.isfinite().all()


def test_a_batch_of_one_picture_has_nothing_to_contrast():
    x = torch.randint(0, 255, (1, 1, 3, 4, 4)).expand(1, 5, 3, 4, 4)
    same = same_picture(x)
    assert same.all() and info_nce(torch.randn(5, 4), torch.randn(5, 4), same=same).eq(0).all()
