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
