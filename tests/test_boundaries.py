"Boundaries: scores and tests hold for any input, and the Atari data for any seed."
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dreamer_wb.core.runs import UserError, plain
from dreamer_wb.vta.boundaries import (boundary_prf, boundary_report, bursty, count_matches, evaluate_boundaries, offset_scan,
                                       permutation_test, ranking, stack_episodes, window_metrics)

bools = hnp.arrays(bool, st.tuples(st.just(2), st.integers(1, 4), st.integers(1, 25)))


def most_pairs(a, b, tol):
    "Largest one-to-one matching by dynamic programming over prefixes: another algorithm than the one under test."
    a, b = np.flatnonzero(a), np.flatnonzero(b)
    best = np.zeros((len(a) + 1, len(b) + 1), int)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            best[i, j] = max(best[i - 1, j], best[i, j - 1], best[i - 1, j - 1] + (abs(a[i - 1] - b[j - 1]) <= tol))
    return best[-1, -1]


@settings(max_examples=60, deadline=None)
@given(bools, st.integers(0, 30))
def test_matching_is_the_largest(ab, tol):
    pred, true = ab
    assert count_matches(pred, true, tol).tolist() == [most_pairs(a, b, tol) for a, b in zip(pred, true)]
    assert (count_matches(pred, true, tol) == count_matches(true, pred, tol)).all()


@settings(max_examples=40, deadline=None)
@given(bools)
def test_scores_stay_in_range(ab):
    pred, true = ab
    for tol in (0, 2):
        s = boundary_prf(pred, true, tol)
        assert all(math.isnan(s[k]) or 0 <= s[k] <= 1 for k in ('precision', 'recall', 'f1'))
    if true[:, 1:].any(): assert boundary_prf(true, true)['f1'] == 1
    w = window_metrics(pred, true)
    assert all(math.isnan(w[k]) or 0 <= w[k] <= 1 for k in ('pk', 'windowdiff')) and not w['pk'] > w['windowdiff']
    assert window_metrics(true, true)['windowdiff'] in (0, pytest.approx(math.nan, nan_ok=True))
    assert offset_scan(pred, true, 2)[0] == pytest.approx(boundary_prf(pred, true)['f1'], nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.sampled_from([0, .1, .5, 1])), st.randoms())
def test_ranking_agrees_with_scikit_learn(score, random):
    from sklearn.metrics import average_precision_score, roc_auc_score
    label = np.array([random.random() < .5 for _ in score])
    if label.all() or not label.any(): return
    assert ranking(score, label) == pytest.approx((roc_auc_score(label, score), average_precision_score(label, score)))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.just(4), st.integers(1, 9), st.integers(1, 30))), st.booleans())
def test_any_episodes_can_be_evaluated(x, ragged):
    read, true, event, forced = x
    eps = [dict(read=r, true=t, rew=e*1., forced=f, delta=e + r*.5) for r, t, e, f in zip(read, true, event, forced)]
    if ragged: eps = [{k: v[:1 + i % len(v)] for k, v in e.items()} for i, e in enumerate(eps)]
    out = evaluate_boundaries(eps, n=20, draws=20)
    json.dumps(plain(out))
    assert out['verdicts'] and 'nan' not in ' '.join(out['verdicts']) and boundary_report(out)
    d = stack_episodes(eps)
    assert out['summary']['scored'] == sum(len(e['read']) - max(1, e['forced'].sum() + (not e['forced'][0])) for e in eps) == d['scored'].sum()


def test_forced_frames_do_not_count():
    read, true = bursty(6, 100, seed=1), bursty(6, 100, seed=2)
    forced = np.random.default_rng(0).random(read.shape) < .2
    def scores(r, t): return {k: v for k, v in evaluate_boundaries(dict(read=r, true=t, forced=forced), n=50, draws=50).items() if k != 'settings'}
    assert plain(scores(read, true)['truth']) == plain(scores(read | forced, true | forced)['truth'])


@pytest.mark.parametrize('kind', ['circular', 'interval', 'uniform', 'episode'])
def test_permutations_keep_what_they_promise(kind):
    read, x = bursty(8, 60, rate=.2, seed=3), np.random.default_rng(1).random((8, 60))
    out = permutation_test(read, x, kind=kind, n=3000)
    assert out['null'].mean() == pytest.approx(x[:, 1:].mean(), abs=.03) and 0 < out['p'] <= 1
    assert permutation_test(read, read, kind=kind, n=200)['p'] == pytest.approx(1/201)
    assert math.isnan(permutation_test(read & False, x, kind=kind, n=5)['p'])


def test_torch_and_numpy_alike():
    import torch
    read, true = bursty(3, 50, seed=1), bursty(3, 50, seed=2)
    prob = np.random.default_rng(0).random((3, 50))
    a = evaluate_boundaries(dict(read=read, read_prob=prob, true=true), n=20)
    b = evaluate_boundaries(dict(read=torch.tensor(read), read_prob=torch.tensor(prob, requires_grad=True), true=torch.tensor(true)), n=20)
    assert str(plain(a)) == str(plain(b))


def test_a_kind_that_does_not_exist():
    with pytest.raises(UserError, match='block'): evaluate_boundaries(dict(read=bursty(2, 30)), kind='block')


def test_atari_episode_round_trip(tmp_path):
    pytest.importorskip('ale_py')
    from dreamer_wb.data.episodes import read_episode
    from dreamer_wb.vta.atari import game_events, play, write_games
    path, = write_games(tmp_path, 'private_eye', 1, 60, seed=3)
    back, fresh = game_events(read_episode(path)), game_events(play('private_eye', 60, 3))
    assert (back['obs'] == fresh['obs']).all() and (back['room'] == fresh['room']).all() and 'lives' not in back
    assert read_episode(path)['act'][0].sum() == 0 and not read_episode(path)['done'].any()
