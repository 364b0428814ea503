"Measures of the evaluation against other people's code, and what a user does with the commands."
import numpy as np
import pytest
import torch
from torch import nn

from dreamer_wb.core.runs import UserError
from dreamer_wb.evaluation.corruptions import COMMON, corrupt
from dreamer_wb.evaluation.gradcam import energy, hottest, iou, localisation, pointing
from dreamer_wb.evaluation.tcav import class_score, draw_cavs, layer_gradients, tcav_scores


@pytest.fixture(scope='module')
def maps():
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 16, 16), bool)
    for i, m in enumerate(masks): m[2 + i % 3:9 + i % 4, 3:11] = True
    return rng.random(masks.shape).astype(np.float32), masks


def test_agrees_with_quantus(maps):
    "Energy, pointing game and, through the rank accuracy, the IoU of matched areas."
    quantus = pytest.importorskip('quantus')
    m, masks = maps
    given = dict(model=nn.Identity(), x_batch=np.zeros((len(m), 1, 16, 16), np.float32), y_batch=np.zeros(len(m), int), a_batch=m[:, None], s_batch=masks[:, None], device='cpu')
    def ask(metric): return np.array(metric(disable_warnings=True, display_progressbar=False, normalise=False, abs=False)(**given), float)
    np.testing.assert_allclose(ask(quantus.AttributionLocalisation), energy(m, masks), rtol=1e-5)
    np.testing.assert_allclose(ask(quantus.PointingGame), pointing(m, masks))
    rank = ask(quantus.RelevanceRankAccuracy)
    np.testing.assert_allclose(iou(hottest(m, masks.sum((1, 2))), masks), rank/(2 - rank), rtol=1e-6)


def test_maps_that_know_nothing_score_the_area(maps):
    _, masks = maps
    found = localisation(np.ones(masks.shape), masks)
    np.testing.assert_allclose(found['energy'], masks.mean((1, 2)))
    np.testing.assert_allclose(found['pointing'], masks.mean((1, 2)))


class Squares(nn.Module):
    "Two channels of brightness, squared: gradients that differ from picture to picture."
    def __init__(self):
        super().__init__()
        self.body, self.w = nn.AvgPool2d(8), nn.Parameter(torch.tensor([[1., -1, .5], [.5, 1, -1]]))

    def forward(self, obs):
        a = self.body(obs.float()/255).flatten(2).mean(-1)
        return a.square() @ self.w.T


def test_tcav_of_a_known_function():
    "The gradient at a layer is known by hand: 2a(w1 - w0) at each position's share."
    torch.manual_seed(0)
    model, obs = Squares(), np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
    a = torch.as_tensor(obs).float().mean((2, 3)).div(255).numpy()
    by_hand = 2*a*(model.w[1] - model.w[0]).detach().numpy()
    np.testing.assert_allclose(layer_gradients(model, 'body', obs), by_hand, rtol=1e-3, atol=1e-4)
    sign, magnitude = tcav_scores(by_hand, np.eye(3))
    np.testing.assert_allclose(sign, [0, 1, 0])
    np.testing.assert_allclose(magnitude, by_hand.mean(0), rtol=1e-5)
    np.testing.assert_allclose(class_score(torch.tensor([[1., 3]]), 1), [2])


def test_same_seed_same_directions():
    a, b = np.random.default_rng(0).normal(size=(2, 30, 5)) + np.array([1, 0])[:, None, None]
    for x, y in zip(draw_cavs(a, b, 3, seed=4), draw_cavs(a, b, 3, seed=4)): np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('name', COMMON)
def test_every_corruption_is_its_own_and_reproducible(name):
    pytest.importorskip('imagecorruptions')
    image = (np.random.default_rng(1).random((64, 64, 3))*255).astype(np.uint8)
    once, again, other = (corrupt(image, name, 5, k) for k in ('a', 'a', 'b'))
    assert once.shape == (224, 224, 3) and once.dtype == np.uint8
    np.testing.assert_array_equal(once, again)
    random = {'gaussian_noise', 'shot_noise', 'impulse_noise', 'glass_blur', 'motion_blur', 'snow', 'frost', 'fog', 'elastic_transform'}
    assert (once != other).any() == (name in random)


def test_unknown_names_are_one_line():
    with pytest.raises(UserError, match='there are gaussian_noise'): corrupt(np.zeros((8, 8, 3), np.uint8), 'hail', 1)


def test_corruptions_without_the_extra(monkeypatch):
    "One line that says what to install."
    import sys
    monkeypatch.setitem(sys.modules, 'imagecorruptions', None)
    with pytest.raises(UserError, match=r'pip install "dreamer_wb\[corruptions\]"'): corrupt(np.zeros((8, 8, 3), np.uint8), 'fog', 1)


def test_alexnet_is_for_imagenet_alone(monkeypatch):
    "The mCE of two classes does not know of AlexNet."
    import pandas as pd
    from dreamer_wb.evaluation import corruptions
    errors = pd.DataFrame([dict(model=m, corruption=c, severity=s, error=e*(1 + s), worst=e) for m, e in dict(a=.1, b=.2).items() for c, s in [('clean', 0), *((c, 3) for c in COMMON)]])
    monkeypatch.setattr(corruptions, 'ALEXNET', {})
    assert corruptions.mce(errors, 'a', 'b')['mce'] == pytest.approx(50) and corruptions.mce(errors, 'b', 'b')['mce'] == pytest.approx(100)
    with pytest.raises(KeyError): corruptions.imagenet_c_mce(dict.fromkeys(COMMON, .5))


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    "Pictures and an untrained ResNet-18, and what the command is told about them."
    from torchvision.models import get_model
    from dreamer_wb.cli import main
    folder = tmp_path_factory.mktemp('network')
    assert not main(['prepare', 'source=synthetic', 'n=240', 'size=32', f'out_dir={folder}/data', 'workers=1'])
    torch.manual_seed(0)
    torch.save(get_model('resnet18', num_classes=2).state_dict(), folder/'r18.pt')
    return folder, ['evaluate', 'network=resnet18', f'weights={folder}/r18.pt', f'data_dir={folder}/data', 'size=64', f'out={folder}/r18', 'images=16', 'runs=3', 'concepts=[background]']


def test_what_is_found_is_not_lost(network, monkeypatch, capsys):
    "Interrupted after the maps: they, TCAV and the predictions are not computed again; other settings are."
    from dreamer_wb.cli import main
    from dreamer_wb.core.runs import read_json
    from dreamer_wb.evaluation import evaluate
    folder, args = network
    def stop(*a, **k): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(evaluate, '_corruptions', stop)
        assert main(args) == 130
    assert not (folder/'r18/results.json').exists()
    with monkeypatch.context() as m:
        for name in ('tcav', 'cam_maps'): m.setattr(evaluate, name, stop)
        assert main([*args, 'parts=[tcav,gradcam]']) == 0
        assert main([*args, 'parts=[tcav,gradcam]', 'cams=[gradcam,layercam]']) == 130      # one of the two is new
    assert main([*args, 'parts=[tcav,gradcam]', 'cams=[gradcam,layercam]']) == 0
    found = read_json(folder/'r18/results.json')
    assert {'resnet18', 'resnet18, layercam'} < {r['map'] for r in found['gradcam']}
    assert [t['part'] for t in found['times']] == ['accuracy', 'tcav', 'gradcam'] and 'evaluate: about' in capsys.readouterr().out


def test_a_network_without_a_run_has_a_page(network):
    "Also beside a second one, in tables that other programs read."
    import pandas as pd
    from dreamer_wb.cli import main
    folder, args = network
    assert main([*args, 'parts=[gradcam]']) == 0 and main([*args, 'parts=[gradcam]', f'out={folder}/again', 'seed=1']) == 0
    assert main(['report', f'run={folder}/r18']) == 0
    page = (folder/'r18/report.html').read_text()
    assert 'What does the network look at?' in page and 'Activation maps' in page and 'evaluate network=resnet18' in page
    assert main(['report', f'runs=[{folder}/r18,{folder}/again]', f'out={folder}/both']) == 0
    table = pd.read_csv(folder/'both/tables/gradcam.csv')
    assert set(table['run']) == {'r18', 'again'} and (folder/'both/tables/gradcam.tex').read_text().startswith(r'\begin{table}')


@pytest.mark.parametrize('more, words', [(['reference=alexnet'], 'there are resnet18'), (['layers=[body.layer3]'], 'there are'), (['cams=[gradcom]'], 'did you mean `gradcam`'), (['corruptions=[fogg]'], 'did you mean `fog`')])
def test_what_evaluate_refuses(network, capsys, more, words):
    "One line, before anything is computed."
    from dreamer_wb.cli import main
    assert main([*network[1], *more]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and '\n' not in said
