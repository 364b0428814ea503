"""data.prepare: interrupted, repeated, changed and wrong in every way; the result is always that of one undisturbed call, or one line."""
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamer_wb.core.config import compose
from dreamer_wb.core.runs import UserError, read_json
from dreamer_wb.data import prepare as module
from dreamer_wb.data.episodes import EpisodeStore, read_episode
from dreamer_wb.data.prepare import PrepareConfig, prepare
from dreamer_wb.data.waterbirds import SPLITS, mask_box, read_table

posix = pytest.mark.skipif(os.name != 'posix', reason='needs fork and signals')


@pytest.fixture
def cfg(tmp_path):
    "Thirty small photographs in the first recipe's layout."
    rng = np.random.default_rng(0)
    for split in SPLITS:
        (tmp_path/'raw'/split).mkdir(parents=True)
        for i in range(10): Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(tmp_path/'raw'/split/f'鳥 {i}.png')
        (tmp_path/'raw'/split/'class.txt').write_text(''.join(f'鳥 {i}.png {i % 2} {i // 2 % 2}\n' for i in range(10)), 'utf-8')
    return PrepareConfig(data_root=str(tmp_path/'raw'), out_dir=str(tmp_path/'out'), size=16)

def contents(cfg): return {p.relative_to(cfg.out_dir).as_posix(): p.read_bytes() for p in sorted(Path(cfg.out_dir).rglob('*.npz'))}

def times(cfg): return {p.name: p.stat().st_mtime_ns for p in Path(cfg.out_dir, 'train').glob('*.npz')}

def fails(cfg, *words):
    with pytest.raises(UserError) as e: prepare(cfg)
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_whole(cfg):
    table = prepare(cfg)
    assert len(table) == 30 and list(contents(cfg)) == sorted(table['episode'])
    e = read_episode(Path(cfg.out_dir)/'train/鳥 3.npz')
    assert {k: v.shape for k, v in e.items()} == dict(obs=(1, 16, 16, 3), act=(1, 1), rew=(1,), done=(1,), label=(), place=())
    assert (e['act'], e['rew'], e['done'], e['label'], e['place']) == ([[0]], [0], [True], 1, 1)
    assert EpisodeStore(Path(cfg.out_dir)/'val').group.tolist() == [0, 2, 1, 3, 0, 2, 1, 3, 0, 2]

def test_command_line(cfg):
    said = compose(PrepareConfig, [f'data_root={cfg.data_root}', f'out_dir={cfg.out_dir}', 'size=16', 'workers=1'])
    assert len(prepare(said)) == 30

def test_second_call_touches_nothing(cfg):
    prepare(cfg)
    before = times(cfg)
    prepare(replace(cfg, workers=3, compress=True))              # settings that do not change the pictures
    assert times(cfg) == before

def test_moved_folders_go_on(cfg, tmp_path):
    prepare(cfg)
    before = times(cfg)
    (tmp_path/'new').mkdir()
    for name in ('raw', 'out'): (tmp_path/name).rename(tmp_path/'new'/name)
    moved = replace(cfg, data_root=str(tmp_path/'new/raw'), out_dir=str(tmp_path/'new/out'))
    prepare(moved)
    assert times(moved) == before and len(read_table(tmp_path/'new/out/index.csv')) == 30

@pytest.mark.parametrize('change', [dict(size=17), dict(crop=.5), dict(resample='box'), dict(fix_labels=True)])
def test_other_settings(cfg, change):
    prepare(cfg)
    key, value = next(iter(change.items()))
    fails(replace(cfg, **change), cfg.out_dir, f'now {key}={value}', 'overwrite=true')
    assert len(prepare(replace(cfg, overwrite=True, **change))) == 30
    assert read_json(Path(cfg.out_dir)/'prepare.json')['settings'][key] == value

def test_what_changed_is_made_again(cfg, tmp_path):
    prepare(cfg)
    before = times(cfg)
    Image.new('RGB', (5, 5), (1, 2, 3)).save(tmp_path/'raw/train/鳥 0.png')                                # another picture
    text = (tmp_path/'raw/train/class.txt').read_text('utf-8')
    (tmp_path/'raw/train/class.txt').write_text(text.replace('鳥 1.png 1 0', '鳥 1.png 0 0').replace('鳥 2.png 0 1\n', ''), 'utf-8')
    (tmp_path/'raw/train/鳥 2.png').unlink()                                                                # a picture less
    out = tmp_path/'out/train'
    (out/'鳥 3.npz').write_bytes((out/'鳥 3.npz').read_bytes()[:200])                                       # a damaged episode
    (out/'鳥 4.npz').unlink()                                                                               # a missing one
    assert len(prepare(cfg)) == 29
    after = times(cfg)
    assert {k for k in before if after.get(k) != before[k]} == {f'鳥 {i}.npz' for i in range(5)} and '鳥 2.npz' not in after
    assert (read_episode(out/'鳥 0.npz')['obs'] == (1, 2, 3)).all() and read_episode(out/'鳥 1.npz')['label'] == 0
    assert len(EpisodeStore(out)) == 9

def test_strangers_are_not_touched(cfg):
    prepare(cfg)
    stranger = Path(cfg.out_dir)/'test/mine.npz'
    stranger.write_bytes(b'mine')
    fails(cfg, 'mine.npz', 'was not made by this command')
    assert stranger.read_bytes() == b'mine'
    prepare(replace(cfg, overwrite=True))
    assert not stranger.exists()

def test_unreadable_image(cfg, tmp_path):
    bad = tmp_path/'raw/val/鳥 7.png'
    data = bad.read_bytes()
    bad.write_bytes(data[:100])
    fails(replace(cfg, workers=1), str(bad), 'not a readable image', 'replace it')
    kept = times(cfg)
    assert len(kept) == 10
    bad.write_bytes(data)
    assert len(prepare(cfg)) == 30 and times(cfg) == kept

@pytest.mark.parametrize('change, words', [
    (dict(data_root='none'), ('none: no such folder', 'download=true')),
    (dict(crop=0.), ('crop=0.0',)), (dict(crop=1.5), ('crop=1.5',)),
    (dict(layout='metadata'), ('no metadata.csv',)), (dict(segmentations='none'), ('none: no such folder',)),
])
def test_wrong_settings(cfg, change, words): fails(replace(cfg, **change), *words)

def test_empty_split(cfg, tmp_path):
    for p in (tmp_path/'raw/val').glob('*.png'): p.unlink()
    (tmp_path/'raw/val/class.txt').write_text('')
    fails(cfg, str(tmp_path/'raw/val'), 'no images in this split')

def test_masks(cfg, tmp_path):
    seg = tmp_path/'segmentations'
    seg.mkdir()
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 6:24] = 255
    Image.fromarray(mask).save(seg/'鳥 0.png')
    cfg = replace(cfg, segmentations=str(seg))
    with pytest.warns(UserWarning, match='27 of 30 images have no segmentation'): table = prepare(cfg)
    store = EpisodeStore(Path(cfg.out_dir)/'train')
    assert mask_box(store[0]['mask'][0]) == (3, 4, 13, 12) and not store[1]['mask'].any()
    assert table['box'][0] == (6, 5, 24, 15) and table['box'][1] is None
    assert read_table(Path(cfg.out_dir)/'index.csv')['box'].tolist() == table['box'].tolist()
    Image.fromarray(mask[:10]).save(seg/'鳥 0.png')              # another mask, of the wrong size
    with pytest.warns(UserWarning): fails(cfg, '鳥 0.png: a mask of 30x10 for an image of 30x20')

def test_names_that_would_collide(cfg, tmp_path):
    raw = tmp_path/'raw/train'
    for name in ('a/b.png', 'a-b.png', 'a-b.jpg'):
        (raw/name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (9, 9)).save(raw/name)
    with open(raw/'class.txt', 'a', encoding='utf-8') as f: f.write('a/b.png 0\na-b.png 0\na-b.jpg 0\n')
    assert len(prepare(cfg)) == 33 and len(contents(cfg)) == 33
    before = times(cfg)
    prepare(cfg)
    assert times(cfg) == before

def test_only_one_at_a_time(cfg):
    from filelock import FileLock
    Path(cfg.out_dir).mkdir()
    with FileLock(Path(cfg.out_dir)/'.lock'): fails(cfg, cfg.out_dir, 'another `dreamer-wb prepare`')
    assert len(prepare(cfg)) == 30

def die_in_the_middle(cfg):
    real, calls = module.write_episode, []
    def write(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 8:
            (path.parent/f'.{path.name}.1.tmp').write_bytes(b'half')                # what a killed write leaves
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, *args, **kwargs)
    module.write_episode = write
    prepare(cfg)

def without_room(cfg, out):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))                         # as on a full disk: the lists fit, an episode does not
    try: prepare(replace(cfg, size=64))
    except UserError as e: Path(out).write_text(str(e), 'utf-8')

def in_child(f, *args):
    child = multiprocessing.get_context('fork').Process(target=f, args=args)
    child.start()
    child.join(60)
    return child.exitcode

@posix
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_killed(cfg):
    assert in_child(die_in_the_middle, replace(cfg, workers=1)) == -signal.SIGKILL
    kept = times(cfg)
    assert len(kept) == 7
    prepare(cfg)
    assert {k: v for k, v in times(cfg).items() if k in kept} == kept
    whole = contents(cfg)
    assert not list(Path(cfg.out_dir).rglob('*.tmp'))
    prepare(replace(cfg, out_dir=cfg.out_dir + '2'))
    assert contents(replace(cfg, out_dir=cfg.out_dir + '2')) == whole

@posix
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_full_disk(cfg, tmp_path):
    assert in_child(without_room, cfg, tmp_path/'error') == 0
    text = (tmp_path/'error').read_text('utf-8')
    assert 'not written' in text and '.npz' in text and '\n' not in text
    assert contents(cfg) == {}

def test_drawn_images(tmp_path):
    cfg = PrepareConfig(source='synthetic', n=100, size=16, out_dir=str(tmp_path/'out'), workers=1)
    table = prepare(cfg)
    assert len(table) == 100 and (table['mask'] != '').all() and (tmp_path/'out/raw/metadata.csv').is_file()
    before = times(cfg)
    prepare(cfg)
    assert times(cfg) == before
    fails(replace(cfg, n=120), 'n=100, now n=120')
    assert len(prepare(replace(cfg, n=120, overwrite=True))) == 120
    fails(replace(cfg, data_root=str(tmp_path/'out/raw'), out_dir=str(tmp_path/'b'), seed=1), 'holds another set')
