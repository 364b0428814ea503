"""The promises of a run folder under bad conditions: full disks, killed processes, hostile files, two processes at once."""
import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamer_wb.core import runs
from dreamer_wb.core.runs import Run, UserError, atomic_write, load_checkpoint, progress, read_metrics, save_checkpoint


def save(path, value, n=1000):
    "A checkpoint of `n` numbers that are all `value`."
    save_checkpoint(path, 'test', dict(value=value), dict(w=torch.full((n,), float(value))))


def value(path): return load_checkpoint(path, 'test')['state']['w'][0].item()


def names(folder): return sorted(p.name for p in folder.iterdir())


def test_import_is_light(run_python):
    code = 'import sys; from dreamer_wb.core.runs import Run; print([m for m in ("torch", "pandas", "matplotlib", "yaml") if m in sys.modules])'
    assert run_python('-c', code).stdout.strip() == '[]'


def test_user_error_crosses_processes():
    "A worker's error arrives in the parent as it was."
    e = pickle.loads(pickle.dumps(UserError('a.npz: broken; delete it')))
    assert str(e) == 'a.npz: broken; delete it' and isinstance(e, UserError)


# --- full disks

@pytest.mark.parametrize('where', ['write', 'fsync', 'replace'])
@pytest.mark.parametrize('code, text', [(errno.ENOSPC, 'the disk is full; make room'), (errno.EDQUOT, 'the disk quota is used up; make room'),
                                        (errno.EROFS, 'permission denied; choose')], ids=['full', 'quota', 'read-only'])
def test_full_disk(tmp_path, monkeypatch, where, code, text):
    "Wherever the system notices that the disk is full, the old checkpoint stays and the message is one line."
    path = tmp_path/'last.ckpt'
    save(path, 1)
    def full(*args): raise OSError(code, os.strerror(code))
    if where == 'write':
        class Full:
            def __init__(self, f): self.f = f
            def __enter__(self): return self
            def __exit__(self, *e): self.f.close()
            def write(self, b): self.f.write(bytes(b[:100])); full()
        monkeypatch.setattr(runs, 'open', lambda *a, **k: Full(open(*a, **k)) if a[1] == 'wb' else open(*a, **k), raising=False)
    else: monkeypatch.setattr(os, where, full)
    with pytest.raises(UserError, match=f'last.ckpt: not written, {text}') as e: save(path, 2)
    monkeypatch.undo()
    assert '\n' not in str(e.value) and value(path) == 1 and names(tmp_path) == ['last.ckpt']


@pytest.mark.skipif(sys.platform == 'win32', reason='no RLIMIT_FSIZE')
def test_size_limit(tmp_path, run_python):
    "The system itself refuses to write on: a process whose files may not grow beyond 20 kB."
    path = tmp_path/'last.ckpt'
    save(path, 1)
    code = f'''
        import resource, torch
        from dreamer_wb.core.runs import UserError, save_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try: save_checkpoint({str(path)!r}, 'test', {{}}, dict(w=torch.zeros(100_000)))
        except UserError as e: print(e)'''
    out = run_python('-c', textwrap.dedent(code))
    assert out.stdout.strip().startswith(f'{path}: not written, the file would exceed the size limit; make room'), out.stderr
    assert value(path) == 1 and names(tmp_path) == ['last.ckpt']


def test_file_where_a_folder_should_be(tmp_path):
    (tmp_path/'runs').write_text('')
    with pytest.raises(UserError, match='a file stands where a folder should be'): Run.create({}, 'demo', tmp_path/'runs', 'a')


def test_link_stays_a_link(tmp_path):
    (tmp_path/'real').write_text('old')
    (tmp_path/'link').symlink_to(tmp_path/'real')
    with atomic_write(tmp_path/'link', 'w') as f: f.write('new')
    assert (tmp_path/'link').is_symlink() and (tmp_path/'real').read_text() == 'new'


# --- killed processes

@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
def test_killed_while_writing(tmp_path):
    "A process that does nothing but rewrite one checkpoint is killed at any moment: the file is always whole."
    path = tmp_path/'last.ckpt'
    code = f'import sys; sys.path[:0] = {sys.path!r}\n' + textwrap.dedent(f'''
        import itertools, torch
        from dreamer_wb.core.runs import save_checkpoint
        for i in itertools.count(): save_checkpoint({str(path)!r}, 'test', {{}}, dict(w=torch.full((300_000,), float(i))))''')
    process = subprocess.Popen([sys.executable, '-c', code])
    deadline = time.time() + 120
    while not path.exists() and time.time() < deadline: time.sleep(.02)
    seen = set()
    for pause in (.003, .011, .023, .037): 
        time.sleep(pause)
        w = load_checkpoint(path)['state']['w']                     # read while it is being replaced
        assert (w == w[0]).all()
        seen.add(w[0].item())
    process.kill()
    process.wait()
    w = load_checkpoint(path)['state']['w']
    assert (w == w[0]).all() and w[0] >= max(seen)


@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
def test_lock_dies_with_its_process(tmp_path):
    "One process at a time; after kill -9 the run is free again and its leftovers are swept up."
    code = f'import sys; sys.path[:0] = {sys.path!r}\n' + textwrap.dedent(f'''
        import time
        from dreamer_wb.core.runs import Run
        run = Run.create(dict(seed=1), 'demo', {str(tmp_path)!r}, 'a')
        run.checkpoints.mkdir()
        (run.checkpoints/'.last.ckpt.1.tmp').write_text('half')
        print('ready', flush=True)
        time.sleep(100)''')
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    with pytest.raises(UserError, match='a: another process is working on this run'): Run.create(dict(seed=1), 'demo', tmp_path, 'a')
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = Run.create(dict(seed=1), 'demo', tmp_path, 'a')
    assert names(run.checkpoints) == []
    run.close()


# --- hostile and damaged checkpoints

class Call:
    "A pickle that calls `function` when it is loaded."
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('make', [lambda p: Call(os.system, f'touch {p}'), lambda p: Call(eval, f'open({str(p)!r}, "w")'),
                                  lambda p: Call(exec, f'open({str(p)!r}, "w")')], ids=['system', 'eval', 'exec'])
def test_malicious_pickle(tmp_path, make, legacy):
    "It is refused, and it has not run."
    path, proof = tmp_path/'evil.ckpt', tmp_path/'executed'
    data = dict(format=runs.FORMAT, version=runs.VERSION, kind='test', config={}, meta={}, state=dict(w=[make(proof)]))
    torch.save(data, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match='evil.ckpt: (refused|not a checkpoint)') as e: load_checkpoint(path)
    assert not proof.exists() and '\n' not in str(e.value)
    torch.load(path, weights_only=False)                               # the trap was live
    assert proof.exists()


def test_not_a_checkpoint(tmp_path):
    torch.save(dict(w=torch.zeros(3)), tmp_path/'weights.pt')
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr('hello', 'world')
    (tmp_path/'empty').write_bytes(b'')
    for name, text in {'weights.pt': 'not a checkpoint of dreamer_wb', 'a.zip': 'damaged', 'empty': 'not a checkpoint', 'none': 'no such checkpoint',
                       '.': 'is a folder'}.items():
        with pytest.raises(UserError, match=text): load_checkpoint(tmp_path/name)


@settings(max_examples=40)
@given(data=st.data())
def test_damaged_checkpoint(tmp_path_factory, data):
    "Cut short or with a byte changed: a `UserError`, or, where the byte does not matter, the very same content."
    folder = tmp_path_factory.getbasetemp()
    whole = folder/'whole.ckpt'
    if not whole.exists(): save(whole, 1, n=300)
    blob = bytearray(whole.read_bytes())
    i = data.draw(st.integers(0, len(blob) - 1))
    if data.draw(st.booleans()): blob = blob[:i]
    else: blob[i] ^= data.draw(st.integers(1, 255))
    (folder/'bad.ckpt').write_bytes(blob)
    try: ckpt = load_checkpoint(folder/'bad.ckpt', 'test')
    except UserError as e: assert 'bad.ckpt: ' in str(e) and '\n' not in str(e)
    else: assert ckpt['state']['w'].tolist() == [1.]*300 and ckpt['config'] == dict(value=1)


# --- the rest

def test_damaged_run(tmp_path):
    run = Run.create(dict(seed=1), 'demo', tmp_path, 'a')
    run.close()
    (run.path/'config.yaml').write_text('seed: [1')
    with pytest.raises(UserError, match='config.yaml: damaged'): Run.open(run.path)
    run.metrics.write_text('step,loss\n1,x\n')
    with pytest.raises(UserError, match='metrics.csv: damaged'): read_metrics(run)


def test_runs_of_the_same_second(tmp_path):
    a, b = (Run.create({}, 'demo', tmp_path) for _ in range(2))
    assert a.path != b.path
    a.close(), b.close()


def test_notebook_bar(monkeypatch):
    "In a notebook the bar is one line of HTML, made once and then updated."
    ipd = pytest.importorskip("IPython.display")
    shown = []
    class Handle:
        def update(self, html): shown.append(html.data)
    monkeypatch.setattr(ipd, 'display', lambda html, display_id: shown.append(html.data) or Handle())
    monkeypatch.setattr(runs, 'bar_place', lambda: 'notebook')
    runs._notebook_bar.cache_clear()
    with progress(3, '<train>', mininterval=0) as bar:
        for _ in range(3): bar.update(1)
        bar.set_postfix_str('loss 0.1')
    runs._notebook_bar.cache_clear()
    assert len(shown) > 3 and 'value="3" max="3"' in shown[-1] and '&lt;train&gt;: 100%' in shown[-1] and 'loss 0.1' in shown[-1]


def test_terminal_bar(monkeypatch, capsys):
    monkeypatch.setenv('DREAMER_WB_PROGRESS', '1')
    assert sum(progress(range(4), 'count')) == 6
    assert 'count: 100%' in capsys.readouterr().err
    monkeypatch.delenv('DREAMER_WB_PROGRESS')
    assert sum(progress(range(4), 'count')) == 6
    assert capsys.readouterr().err == ''                               # not a terminal: silence
