"""data.episodes: what has no place in the notebook: damage, several processes, full disks, fuzzing."""
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dreamer_wb.core.runs import UserError
from dreamer_wb.data import episodes
from dreamer_wb.data.episodes import Batches, EpisodeStore, Sequential, check_episode, read_episode, write_episode

posix = pytest.mark.skipif(os.name != 'posix', reason='needs fork and signals')


def pixels(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

def fill(folder, lengths=(1,) * 6, size=8, **kwargs):
    for i, T in enumerate(lengths): write_episode(folder/f'{i:03d}.npz', pixels(T, size, size, 3, seed=i), label=i % 2, place=i % 3 % 2, **kwargs)
    return folder

def one_line(error, *words):
    text = str(error.value)
    assert '\n' not in text and all(w in text for w in words), text

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'home'))


# ---- files

good = dict(obs=pixels(2, 8, 8, 3), act=np.zeros((2, 1), np.float32), rew=np.zeros(2, np.float32), done=np.array([False, True]))

@pytest.mark.parametrize('change, words', [
    (dict(obs=pixels(2, 8, 8, 3) / 255), ("'obs' is float64", 'uint8')),
    (dict(obs=pixels(2, 8, 8, 3).astype(np.int64)), ("'obs' is int64", 'uint8')),
    (dict(obs=pixels(8, 8, 3)), ("'obs' has shape (8, 8, 3)", '(T,H,W,C)')),
    (dict(obs=pixels(2, 3, 8, 8)), ('channels are first',)),
    (dict(obs=pixels(2, 8, 8, 4)), ("C = 1 or 3",)),
    (dict(obs=pixels(0, 8, 8, 3)), ("'obs' has shape (0, 8, 8, 3)",)),
    (dict(act=np.zeros((3, 1))), ("'act' has shape (3, 1)", '(2,A)')),
    (dict(act=np.zeros(2)), ("'act' has shape (2,)",)),
    (dict(act=np.full((2, 1), np.nan)), ("'act' has NaN",)),
    (dict(act=np.full((2, 1), 1e300)), ("'act' has values too large",)),
    (dict(act=np.array([['a'], ['b']])), ("'act' is <U1",)),
    (dict(rew=np.array([np.inf, 0])), ("'rew' has NaN or infinite",)),
    (dict(rew=np.zeros(2, np.complex64)), ("'rew' is complex64",)),
    (dict(done=np.array([0, 2])), ("'done' has values that are not bool",)),
    (dict(done=np.array([True, False])), ("'done' is set before the last step",)),
    (dict(label=np.array([1])), ("'label' has shape (1,)",)),
    (dict(label=np.array(.5)), ("'label' is float64",)),
    (dict(mask=np.zeros((2, 4, 4), bool)), ("'mask' has shape (2, 4, 4)", '(2,8,8)')),
    (dict(image=np.zeros(2)), ("unknown key 'image'",)),
    (dict(info=np.array(3)), ("'info' is int64",)),
])
def test_wrong_arrays(tmp_path, change, words):
    np.savez(tmp_path/'bad.npz', **{**good, **change})
    with pytest.raises(UserError) as e: read_episode(tmp_path/'bad.npz')
    one_line(e, str(tmp_path/'bad.npz'), *words)

@pytest.mark.parametrize('key', ['obs', 'act', 'rew', 'done'])
def test_missing_keys(tmp_path, key):
    np.savez(tmp_path/'bad.npz', **{k: v for k, v in good.items() if k != key})
    with pytest.raises(UserError) as e: read_episode(tmp_path/'bad.npz')
    one_line(e, f'no key {key!r}', 'bad.npz')

def test_harmless_differences_are_mended(tmp_path):
    np.savez_compressed(tmp_path/'a.npz', obs=np.asfortranarray(good['obs']), act=np.zeros((2, 1), np.int64), rew=np.zeros(2), done=np.array([0., 1.]))
    e = read_episode(tmp_path/'a.npz')
    assert {k: str(v.dtype) for k, v in e.items()} == dict(obs='uint8', act='float32', rew='float32', done='bool')
    assert (e['obs'] == good['obs']).all() and e['done'].tolist() == [False, True]

def test_every_key_comes_back(tmp_path):
    full = dict(good, label=1, place=0, mask=np.ones((2, 8, 8), bool), read=np.array([True, False]), info=json.dumps({'from': '鳥'}))
    write_episode(tmp_path/'a.npz', **full)
    back = read_episode(tmp_path/'a.npz')
    assert list(back) == list(episodes.KEYS) and all((back[k] == full[k]).all() for k in full)

def test_same_episode_same_bytes(tmp_path):
    for name in 'ab': write_episode(tmp_path/f'{name}.npz', good['obs'])
    assert (tmp_path/'a.npz').read_bytes() == (tmp_path/'b.npz').read_bytes()

def test_folder_or_nothing_instead_of_a_file(tmp_path):
    for path, words in ((tmp_path, 'not a readable'), (tmp_path/'none.npz', 'no such file')):
        with pytest.raises(UserError) as e: read_episode(path)
        one_line(e, words, str(path))


# ---- fuzzing

class Payload:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

def npz(compress=False, **arrays):
    f = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(f, **arrays)
    return f.getvalue()

def npy(x):
    f = io.BytesIO()
    np.save(f, x)
    return f.getvalue()

def zipped(members):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as zf:
        for k, v in members.items(): zf.writestr(f'{k}.npy', v)
    return f.getvalue()

trap = os.path.join(tempfile.gettempdir(), f'dreamer_wb_payload_{os.getpid()}')
bases = [npz(**good), npz(compress=True, **good), npz(**{**good, 'obs': np.array([Payload(trap)], object)})]
change = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(['set', 'cut', 'insert', 'drop']), st.integers(0, 255))

def mutate(data, changes):
    data = bytearray(data)
    for at, how, value in changes:
        i = int(at * len(data))
        if how == 'set' and data: data[i] = value
        elif how == 'insert': data[i:i] = bytes([value] * (1 + value % 7))
        elif how == 'drop': del data[i:i + 1 + value % 7]
        elif how == 'cut' and value < 40: del data[i:]
    return bytes(data)

def survives(data):
    "`read_episode` of these bytes is an episode or a one-line `UserError`, and nothing is executed."
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)/'fuzz.npz'
        path.write_bytes(data)
        try: check_episode(read_episode(path))
        except UserError as e: assert '\n' not in str(e) and str(path) in str(e)
    assert not os.path.exists(trap)

@settings(max_examples=200, deadline=None)
@given(st.sampled_from(bases), st.lists(change, min_size=1, max_size=4))
def test_fuzz_zip(base, changes): survives(mutate(base, changes))

@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(good)), st.lists(change, min_size=1, max_size=3))
def test_fuzz_arrays(key, changes):
    "Damage that no checksum of the zip gives away."
    members = {k: npy(v) for k, v in good.items()}
    head = members[key][:128]
    survives(zipped({**members, key: mutate(head, changes) + members[key][128:]}))

@pytest.mark.parametrize('header', [
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "{'descr': '|u1', 'fortran_order': False, 'shape': (1 << 60,), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,), }", "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -384), }",
    "{'descr': '<U999999999', 'fortran_order': False, 'shape': (), }", '(' * 5000, "{'descr': '|V0', 'fortran_order': False, 'shape': (384,), }",
    "__import__('os').mkdir('" + trap + "')", "{'descr': [('a', '|u1')], 'fortran_order': True, 'shape': (384,), }", ''], ids=range(10))
def test_headers_of_ill_will(header):
    body = header.encode()
    bad = b'\x93NUMPY\x01\x00' + len(body).to_bytes(2, 'little') + body + bytes(384)
    survives(zipped({**{k: npy(v) for k, v in good.items()}, 'obs': bad}))

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
def test_any_lengths(lengths, length, batch_size, seed, step):
    "Windows lie inside their episodes, hold what the files hold, and an epoch has each of them once."
    with tempfile.TemporaryDirectory() as tmp:
        store = EpisodeStore(fill(Path(tmp), lengths, size=2))
        if max(lengths) < length:
            with pytest.raises(UserError): Batches(store, batch_size, length)
            return
        batches = Batches(store, batch_size, length, seed=seed)
        batch = batches(step)
        index, start = batches._in_turn(step)
        for b, (i, a) in enumerate(zip(index, start)):
            assert 0 <= a <= lengths[i] - length
            assert (batch['obs'][b].permute(0, 2, 3, 1).numpy() == pixels(lengths[i], 2, 2, 3, seed=i)[a:a + length]).all()
            assert batch['done'][b].tolist() == [t == lengths[i] - 1 for t in range(a, a + length)]
        windows = list(zip(*batches._order(3)))
        assert len(set(windows)) == len(windows) == sum(T // length for T in lengths)
        assert sum(len(b['index']) for b in Sequential(store, batch_size, length)) == len(windows)


# ---- the store

def test_empty_missing_and_mixed_folders(tmp_path):
    (tmp_path/'empty').mkdir()
    for name, words in (('none', 'no such folder'), ('empty', 'no .npz episodes')):
        with pytest.raises(UserError) as e: EpisodeStore(tmp_path/name)
        one_line(e, words, name, 'dreamer-wb prepare')
    fill(tmp_path/'mixed')
    write_episode(tmp_path/'mixed'/'x.npz', pixels(1, 9, 9, 3), label=0, place=0)
    with pytest.raises(UserError) as e: EpisodeStore(tmp_path/'mixed')
    one_line(e, 'x.npz', '(1, 9, 9, 3)', '000.npz')
    write_episode(tmp_path/'mixed'/'x.npz', pixels(1, 8, 8, 3))
    with pytest.raises(UserError) as e: EpisodeStore(tmp_path/'mixed')
    one_line(e, 'x.npz', 'has the keys')
    (tmp_path/'mixed'/'x.npz').write_bytes(b'PK')
    with pytest.raises(UserError) as e: EpisodeStore(tmp_path/'mixed')
    one_line(e, 'x.npz', 'not a readable .npz')
    assert [p.name for p in (tmp_path/'mixed/.store').iterdir() if p.is_dir()] == []

def test_images_that_are_not_square(tmp_path):
    write_episode(tmp_path/'a.npz', pixels(1, 8, 6, 3))
    store = EpisodeStore(tmp_path)
    assert store.images().shape == (1, 8, 6, 3)
    with pytest.raises(UserError) as e: store.size
    one_line(e, '8x6', 'size=')

def test_cache_follows_the_files(tmp_path):
    store = EpisodeStore(fill(tmp_path/'a'))
    write_episode(tmp_path/'a'/'006.npz', pixels(1, 8, 8, 3, seed=6), label=0, place=0)
    assert len(EpisodeStore(tmp_path/'a')) == 7
    write_episode(tmp_path/'a'/'000.npz', pixels(1, 8, 8, 3, seed=9), label=0, place=0)     # same name and size, a moment later
    assert (EpisodeStore(tmp_path/'a').images([0])[0] == pixels(1, 8, 8, 3, seed=9)).all()
    (tmp_path/'a'/'006.npz').unlink()
    assert len(EpisodeStore(tmp_path/'a')) == 6
    assert len([p for p in (tmp_path/'a/.store').iterdir() if p.is_dir()]) == 1           # old ones are gone
    assert (store.images([0])[0] == pixels(1, 8, 8, 3, seed=0)).all()                     # but stay readable for who has them

def test_copied_folder_keeps_its_cache(tmp_path, monkeypatch):
    import shutil
    EpisodeStore(fill(tmp_path/'a'))
    shutil.copytree(tmp_path/'a', tmp_path/'b')                # new times
    monkeypatch.setattr(episodes, '_build', None)
    assert len(EpisodeStore(tmp_path/'b')) == 6

def test_old_files_are_not_opened_again(tmp_path, monkeypatch):
    fill(tmp_path)
    for p in tmp_path.glob('*.npz'): os.utime(p, (1e9, 1e9))
    EpisodeStore(tmp_path)
    monkeypatch.setattr(episodes, '_open_npz', None)
    assert len(EpisodeStore(tmp_path)) == 6

@pytest.mark.parametrize('damage', ['truncate', 'remove', 'meta', 'known'])
def test_damaged_cache_is_built_again(tmp_path, damage):
    store = EpisodeStore(fill(tmp_path))
    del store.data
    file = {'truncate': store.cache/'obs.npy', 'remove': store.cache/'obs.npy', 'meta': store.cache/'meta.json', 'known': tmp_path/'.store/known.json'}[damage]
    if damage == 'remove': file.unlink()
    else: file.write_bytes(file.read_bytes()[:-20])
    assert (EpisodeStore(tmp_path).images() == np.concatenate([pixels(1, 8, 8, 3, seed=i) for i in range(6)])).all()

def test_cache_elsewhere(tmp_path):
    fill(tmp_path/'a')
    (tmp_path/'a'/'.store').write_text('in the way')            # a folder that cannot be written, whoever runs the test
    store = EpisodeStore(tmp_path/'a')
    assert tmp_path/'home' in store.cache.parents and len(store) == 6
    assert tmp_path/'mine' in EpisodeStore(tmp_path/'a', cache_dir=tmp_path/'mine').cache.parents
    fill(tmp_path/'other'/'a', (1, 2))
    assert len(EpisodeStore(tmp_path/'other'/'a', cache_dir=tmp_path/'mine')) == 2          # same name, another folder
    assert len(EpisodeStore(tmp_path/'a', cache_dir=tmp_path/'mine')) == 6

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_read_only_folder(tmp_path):
    fill(tmp_path/'a').chmod(0o500)
    try: assert tmp_path/'home' in EpisodeStore(tmp_path/'a').cache.parents
    finally: (tmp_path/'a').chmod(0o700)

def test_files_that_change_while_being_read(tmp_path, monkeypatch):
    fill(tmp_path)
    real = episodes._fill
    def meanwhile(part, files):
        real(part, files)
        write_episode(tmp_path/'000.npz', pixels(1, 8, 8, 3, seed=5), label=0, place=0)
    monkeypatch.setattr(episodes, '_fill', meanwhile)
    with pytest.raises(UserError) as e: EpisodeStore(tmp_path)
    one_line(e, 'changed while they were read')

def test_other_process_gets_the_same_maps(tmp_path):
    store = pickle.loads(pickle.dumps(EpisodeStore(fill(tmp_path))))
    assert len(store) == 6 and len(pickle.dumps(store)) < 1000


# ---- several processes

def in_child(f, *args):
    "Run `f` in a forked process; returns the process."
    p = multiprocessing.get_context('fork').Process(target=f, args=args)
    p.start()
    return p

def open_slowly(folder, log, out):
    real = episodes._fill
    def slow(part, files):
        with open(log, 'a') as f: f.write(f'{os.getpid()}\n')
        time.sleep(0.5)
        real(part, files)
    episodes._fill = slow
    store = EpisodeStore(folder)
    (out/str(os.getpid())).write_text(hashlib.sha256(store.images().tobytes()).hexdigest())

@posix
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_two_processes_build_once(tmp_path):
    folder, out = fill(tmp_path/'a'), tmp_path/'out'
    out.mkdir()
    children = [in_child(open_slowly, folder, tmp_path/'log', out) for _ in range(3)]
    for c in children: c.join(30)
    assert [c.exitcode for c in children] == [0, 0, 0]
    assert len((tmp_path/'log').read_text().split()) == 1       # one built, two waited
    assert {p.read_text() for p in out.iterdir()} == {hashlib.sha256(EpisodeStore(folder).images().tobytes()).hexdigest()}

def die_building(folder):
    real = episodes._start_array
    def start(path, x, rows):
        if path.name == 'rew.npy': os.kill(os.getpid(), signal.SIGKILL)
        return real(path, x, rows)
    episodes._start_array = start
    EpisodeStore(folder)

@posix
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_killed_builder_leaves_no_harm(tmp_path):
    child = in_child(die_building, fill(tmp_path))
    child.join(30)
    assert child.exitcode == -signal.SIGKILL and list((tmp_path/'.store').glob('part-*'))
    assert len(EpisodeStore(tmp_path)) == 6
    assert not list((tmp_path/'.store').glob('part-*'))

def open_on_full_disk(folder, out):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))   # every file ends at 20 kB, with an error as on a full disk
    try: EpisodeStore(folder)
    except UserError as e: out.write_text(str(e))

@posix
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_full_disk(tmp_path):
    fill(tmp_path/'a', (1,) * 6, size=48)
    child = in_child(open_on_full_disk, tmp_path/'a', tmp_path/'error')
    child.join(30)
    assert child.exitcode == 0
    text = (tmp_path/'error').read_text()
    assert 'cannot be written' in text and 'make room' in text and '\n' not in text
    assert not [p for p in (tmp_path/'a/.store').iterdir() if p.is_dir()]
    assert len(EpisodeStore(tmp_path/'a')) == 6

SCRIPT = """
import hashlib, sys
from dreamer_wb.data.episodes import Batches, EpisodeStore
batches = Batches(EpisodeStore(sys.argv[1]), 4, length=2, seed=7)
digest = hashlib.sha256()
for step in range(5, 9):
    for k, v in sorted(batches(step).items()): digest.update(v.numpy().tobytes())
print(digest.hexdigest())
"""

def test_order_is_the_same_in_another_process(tmp_path):
    store = EpisodeStore(fill(tmp_path, (1, 5, 2, 8, 3, 4)))
    digest, batches = hashlib.sha256(), Batches(store, 4, length=2, seed=7)
    np.random.seed(123)                                          # neither global generator has a say
    torch.manual_seed(123)
    for step in (8, 7, 6, 5): batches(step)                      # nor what was asked before
    for step in range(5, 9):
        for k, v in sorted(batches(step).items()): digest.update(v.numpy().tobytes())
    env = dict(os.environ, PYTHONHASHSEED='42', PYTHONPATH=str(Path(episodes.__file__).parents[2]))
    other = subprocess.run([sys.executable, '-c', SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest.hexdigest()

def test_selected_episodes_and_weights(tmp_path):
    store = EpisodeStore(fill(tmp_path, (1, 5, 2, 8, 3, 4)))
    some = Batches(store, 5, indices=[1, 3])
    assert {i for s in range(6) for i in some(s)['index'].tolist()} == {1, 3}
    assert Batches(store, 5, indices=store.label == 1)(0)['label'].tolist() == [1] * 5
    weights = np.array([0, 1, 0, 0, 0, 1.])
    assert {i for s in range(9) for i in Batches(store, 5, length=4, weights=weights)(s)['index'].tolist()} == {1, 5}
    for bad in (np.zeros(6), np.full(6, np.nan), np.array([1, 0, 0, 0, 0, 0.])):     # the last: an episode too short for the window
        with pytest.raises(UserError): Batches(store, 5, length=4, weights=bad)
    with pytest.raises(UserError) as e: Batches(store, 5, indices=[])
    one_line(e, 'no episode is selected')
    with pytest.raises(UserError) as e: Batches(store, 0)
    one_line(e, 'batch_size')
    with pytest.raises(UserError) as e: Batches(store, 1, keys=('mask',))
    one_line(e, "no 'mask'")
