"Synthetic Waterbirds: same seed, same bytes; exact twins; the proportions and the layout of the real set; what bad arguments get."
import errno
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dreamer_wb.core.runs import UserError
from dreamer_wb.data import synthetic as sw
from dreamer_wb.data.waterbirds import read_table

ROOT = Path(__file__).resolve().parent.parent
seeds = st.integers(0, 2**40)
specs = st.builds(sw.Spec, st.integers(0, 1), st.integers(0, 1), seeds, seeds)


def digest(folder):
    h = hashlib.sha256()
    for p in sorted(Path(folder).rglob('*')):
        if p.is_file(): h.update(str(p.relative_to(folder)).encode() + p.read_bytes())
    return h.hexdigest()


@pytest.fixture(scope='module')
def made(tmp_path_factory): return sw.make_waterbirds(tmp_path_factory.mktemp('synthetic')/'birds', n=96, seed=3, kind='png')


def test_same_seed_same_bytes_in_another_process_and_with_workers(made, tmp_path):
    code = f'from dreamer_wb.data.synthetic import make_waterbirds; make_waterbirds({str(tmp_path/"b")!r}, n=96, seed=3, kind="png", workers=2)'
    env = dict(PYTHONPATH=str(ROOT), PYTHONHASHSEED='7', OMP_NUM_THREADS='2', PATH='/usr/bin:/bin')
    subprocess.run([sys.executable, '-c', code], check=True, env=env, timeout=300)
    assert digest(made) == digest(tmp_path/'b')


def test_another_seed_other_bytes(made, tmp_path):
    other = sw.make_waterbirds(tmp_path/'b', n=96, seed=4, kind='png')
    a, b = ({hashlib.sha256(p.read_bytes()).hexdigest() for p in d.glob('0*/*.png')} for d in (made, other))
    assert len(a) == len(b) == 96 and not a & b


@settings(deadline=None, max_examples=12)
@given(specs, st.sampled_from([48, 64, 96]), st.sampled_from(['easy', 'default', 'hard']))
def test_twins_are_exact(spec, size, difficulty):
    (a, mask, ia), (b, same, ib) = (sw.render(s, size, difficulty) for s in (spec, sw.twin(spec)))
    whole = sw.draw_bird(spec, size, sw.look_at(difficulty))[1] == 1
    assert (mask == same).all() and (whole <= mask).all() and whole.sum() > .6*mask.sum()
    assert (a[whole] == b[whole]).all() and (a[~mask] != b[~mask]).any(-1).mean() > .5
    assert {k: ia[k] for k in ia if k not in ('scene', 'mixed')} == {k: ib[k] for k in ib if k not in ('scene', 'mixed')}


@settings(deadline=None, max_examples=12)
@given(specs)
def test_place_does_not_know_the_bird(spec):
    far = replace(spec, label=1-spec.label, bird_seed=spec.bird_seed+1)
    assert (sw.draw_place(spec, 48, sw.Look())[0] == sw.draw_place(far, 48, sw.Look())[0]).all()


@settings(deadline=None, max_examples=25)
@given(specs, st.sampled_from([48, 64]), st.floats(0, 1))
def test_birds_are_whole_and_large(spec, size, difficulty):
    _, mask, info = sw.render(spec, size, difficulty)
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert .02 < mask.mean() < .6 and info['area'] == pytest.approx(mask.mean(), abs=1e-4)
    assert max(np.ptp(rows), np.ptp(cols)) + 1 >= .55*size
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert edge.mean() < .02


@settings(deadline=None, max_examples=60)
@given(st.integers(16, 20000), st.sampled_from(list(sw.OFFICIAL)), st.floats(0, 1))
def test_group_sizes(n, split, bias):
    sizes = sw.group_sizes(n, split, bias)
    assert sum(sizes) == n and min(sizes) >= 4
    if n >= 2000:
        water = sum(sw.OFFICIAL[split][2:])/sum(sw.OFFICIAL[split])
        share = bias if split == 'train' else .5
        want = np.array([(1-water)*share, (1-water)*(1-share), water*(1-share), water*share])*n
        assert np.abs(np.maximum(want, 4) - sizes).max() < 6


def test_official_proportions_and_no_seed_twice():
    specs = sw.sample_specs()
    counts = {k: tuple(np.bincount([s.group for s in v])) for k, v in specs.items()}
    assert counts == {'train': (3498, 184, 56, 1057), 'val': (467, 466, 133, 133), 'test': (2255, 2255, 642, 642)}
    every = [s for v in specs.values() for s in v]
    assert len({s.bird_seed for s in every}) == len({s.bg_seed for s in every}) == len(every) == 11788


def test_public_layout(made):
    table = read_table(made, segmentations=made/'segmentations')
    specs, look, size = sw.read_specs(made)
    assert (made/'metadata.csv').read_text().startswith('img_id,img_filename,y,split,place,place_filename\n1,')
    assert list(table['label']) == [s.label for s in specs] and list(table['place']) == [s.place for s in specs]
    assert (look, size) == (sw.Look(), 64)
    for i in (0, 50, 95):
        img, mask, _ = sw.render(specs[i], size, look)
        assert (np.asarray(Image.open(table['path'][i])) == img).all()
        assert ((np.asarray(Image.open(table['mask'][i])) > 127) == mask).all()


def test_jpg_is_close_and_without_chroma_subsampling(tmp_path):
    root = sw.make_waterbirds(tmp_path/'b', n=64)
    specs, look, size = sw.read_specs(root)
    table, err = read_table(root), []
    for i in range(16):
        im = Image.open(table['path'][i])
        assert im.format == 'JPEG' and [layer[1:3] for layer in im.layer] == [(1, 1)]*3
        err.append(((np.asarray(im, float) - sw.render(specs[i], size, look)[0])**2).mean())
    assert 10*np.log10(255**2/np.mean(err)) > 35


def test_an_interrupted_set_is_written_again(made, tmp_path, monkeypatch):
    root, write, count = tmp_path/'b', sw._write, []

    def stop(job):
        if len(count) == 40: raise KeyboardInterrupt
        count.append(1)
        return write(job)
    monkeypatch.setattr(sw, '_write', stop)
    with pytest.raises(KeyboardInterrupt): sw.make_waterbirds(root, n=96, seed=3, kind='png')
    assert not (root/'metadata.csv').exists()
    with pytest.raises(UserError): read_table(root)
    monkeypatch.undo()
    sw.make_waterbirds(root, n=96, seed=3, kind='png')
    assert digest(root) == digest(made)


def test_a_complete_set_is_left_alone_and_another_is_refused(made):
    before = {p: p.stat().st_mtime_ns for p in made.rglob('*')}
    assert sw.make_waterbirds(made, n=96, seed=3, kind='png') == made
    assert before == {p: p.stat().st_mtime_ns for p in made.rglob('*')}
    for other in (dict(n=96, seed=3), dict(n=97, seed=3, kind='png'), dict(n=96, seed=3, kind='png', bg_mix=.1)):
        difficulty = sw.look_at(**{k: other.pop(k) for k in ('bg_mix',) if k in other})
        with pytest.raises(UserError, match='holds another set'): sw.make_waterbirds(made, difficulty=difficulty, **other)


@pytest.mark.parametrize('bad, words', [(dict(n=20), 'too few'), (dict(bias=2.), 'from 0 to 1'), (dict(size=8), 'size=8'), (dict(kind='gif'), 'jpg or png'),
                                        (dict(difficulty='mild'), 'easy, default, hard'), (dict(difficulty=1.5), 'from 0 to 1'), (dict(n=(100, 100)), 'three')])
def test_bad_arguments(tmp_path, bad, words):
    with pytest.raises(UserError, match=words) as e: sw.make_waterbirds(tmp_path/'b', **{'n': 96, **bad})
    assert '\n' not in str(e.value) and not (tmp_path/'b').exists()


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(UserError, match='disk is full'): sw.make_waterbirds(tmp_path/'b', n=64)
    assert not (tmp_path/'b'/'metadata.csv').exists()


def test_damaged_recipe(made, tmp_path):
    (tmp_path/'synthetic.json').write_text('{"n": [')
    with pytest.raises(UserError, match='synthetic.json'): sw.read_specs(tmp_path)
    (tmp_path/'synthetic.json').write_text(json.dumps({'look': {}}))
    with pytest.raises(UserError, match='synthetic.json'): sw.read_specs(tmp_path)
