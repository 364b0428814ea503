"""data.waterbirds: fetching and unpacking, against a server on this machine that does what bad servers and bad lines do."""
import hashlib
import io
import os
import tarfile
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dreamer_wb.core.runs import UserError
from dreamer_wb.data import waterbirds
from dreamer_wb.data.waterbirds import download_waterbirds, fetch, read_table, unpack

DATA = np.random.default_rng(0).bytes(300_000)


class Server:
    "What it serves and how; `asked` holds the byte at which each request wanted to start."
    def __init__(self):
        self.data, self.ranges, self.tag, self.date, self.length = DATA, True, '"v1"', '', True
        self.breaks, self.status, self.asked = [], {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self): outer.answer(self)
            def log_message(self, *args): pass
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}/birds.tar.gz'
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, h):
        "One request: `breaks[i]` bytes of the i-th answer come through, `status[i]` replaces it."
        n, wish = len(self.asked), h.headers.get('Range') or ''
        start = int(wish[6:-1]) if wish else 0
        self.asked.append(start)
        if n in self.status:
            h.send_response(self.status[n])
            h.end_headers()
            return
        if not self.ranges or h.headers.get('If-Range', self.tag or self.date) not in (self.tag, self.date): start = 0
        if start >= len(self.data):
            h.send_response(416)
            h.send_header('Content-Range', f'bytes */{len(self.data)}')
            h.end_headers()
            return
        h.send_response(206 if start else 200)
        if start: h.send_header('Content-Range', f'bytes {start}-{len(self.data) - 1}/{len(self.data)}')
        if self.length: h.send_header('Content-Length', str(len(self.data) - start))
        if self.tag: h.send_header('ETag', self.tag)
        if self.date: h.send_header('Last-Modified', self.date)
        h.end_headers()
        end = start + self.breaks[n] if n < len(self.breaks) and self.breaks[n] is not None else None
        h.wfile.write(self.data[start:end])
        h.close_connection = True

@pytest.fixture
def server():
    s = Server()
    yield s
    s.http.shutdown()
    s.http.server_close()

def get(server, path, **kwargs): return fetch(server.url, path, **{**dict(wait=0.001, timeout=5), **kwargs})

def left(folder): return sorted(p.name for p in folder.iterdir())


# ---- fetching

def test_whole(server, tmp_path):
    path = get(server, tmp_path/'new'/'a.bin', sha256=hashlib.sha256(DATA).hexdigest().upper())
    assert path.read_bytes() == DATA and left(path.parent) == ['a.bin']
    get(server, path)
    assert server.asked == [0]                                                # it is there

def test_broken_connections_are_gone_on_with(server, tmp_path):
    server.breaks = [100_000, 50_000, 0, 1]
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA
    assert server.asked == [0, 100_000, 150_000, 150_000, 150_001]

def test_next_call_goes_on(server, tmp_path):
    server.breaks = [100_000] + [0] * 3
    with pytest.raises(UserError) as e: get(server, tmp_path/'a.bin', retries=2)
    assert server.url in str(e.value) and '100000 bytes are in' in str(e.value) and 'goes on from there' in str(e.value)
    assert left(tmp_path) == ['a.bin.part', 'a.bin.part.json'] and (tmp_path/'a.bin.part').stat().st_size == 100_000
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA and server.asked[4] == 100_000
    assert left(tmp_path) == ['a.bin']

def test_server_without_range(server, tmp_path):
    server.ranges, server.breaks = False, [100_000, 250_000]
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA
    assert server.asked == [0, 100_000, 250_000]

def test_server_without_range_that_always_breaks(server, tmp_path):
    server.ranges, server.breaks = False, [100_000] * 99
    with pytest.raises(UserError, match='100000 bytes'): get(server, tmp_path/'a.bin', retries=3)
    assert len(server.asked) == 5

@pytest.mark.parametrize('tag, date', [('W/"weak"', ''), ('', ''), ('W/"weak"', 'Mon, 01 Jan 2024 00:00:00 GMT')])
def test_weak_tags(server, tmp_path, tag, date):
    "Without a tag that says that the file is the same, only a checksum allows going on."
    server.tag, server.date, server.breaks = tag, date, [100_000]
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA
    assert server.asked == [0, 100_000 if date else 0]
    server.asked.clear()
    assert get(server, tmp_path/'b.bin', sha256=hashlib.sha256(DATA).hexdigest()).read_bytes() == DATA
    assert server.asked == [0, 100_000]

def test_file_that_changes_in_between(server, tmp_path):
    server.breaks = [100_000] + [0] * 9
    with pytest.raises(UserError): get(server, tmp_path/'a.bin', retries=1)
    server.data, server.tag, server.breaks = DATA[::-1], '"v2"', []
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA[::-1]           # nothing of the old one

def test_other_address_starts_anew(server, tmp_path):
    server.breaks = [100_000, 0]
    with pytest.raises(UserError): get(server, tmp_path/'a.bin', retries=0)
    server.asked.clear()
    server.breaks = []
    fetch(server.url + '?v=2', tmp_path/'a.bin')
    assert server.asked == [0]

def test_killed_between_the_last_byte_and_the_name(server, tmp_path):
    get(server, tmp_path/'a.bin')
    (tmp_path/'a.bin').rename(tmp_path/'a.bin.part')
    waterbirds.write_json(tmp_path/'a.bin.part.json', dict(url=server.url, tag='"v1"'))
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA and server.asked == [0, 300_000]

def test_part_that_is_too_long(server, tmp_path):
    (tmp_path/'a.bin.part').write_bytes(DATA + b'more')
    waterbirds.write_json(tmp_path/'a.bin.part.json', dict(url=server.url, tag='"v1"'))
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA

def test_unknown_length(server, tmp_path):
    server.length = False
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA

def test_wrong_checksum(server, tmp_path):
    with pytest.raises(UserError) as e: get(server, tmp_path/'a.bin', sha256='0' * 64)
    assert hashlib.sha256(DATA).hexdigest() in str(e.value) and 'deleted' in str(e.value) and left(tmp_path) in ([], ['a.bin.part.json'])
    (tmp_path/'a.bin').write_bytes(b'old')
    with pytest.raises(UserError, match='checksum'): get(server, tmp_path/'a.bin', sha256='0' * 64)
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA

@pytest.mark.parametrize('code, tries', [(404, 1), (403, 1), (500, 4), (503, 4), (429, 4)])
def test_refusals(server, tmp_path, code, tries):
    server.status = {i: code for i in range(9)}
    with pytest.raises(UserError) as e: get(server, tmp_path/'a.bin', retries=3)
    assert str(code) in str(e.value) and server.url in str(e.value) and len(server.asked) == tries and '\n' not in str(e.value)

def test_short_illness(server, tmp_path):
    server.status = {0: 503, 2: 500}
    server.breaks = [None, 100_000]
    assert get(server, tmp_path/'a.bin').read_bytes() == DATA and server.asked == [0, 0, 100_000, 100_000]

def test_nobody_there(server, tmp_path):
    server.http.server_close()
    server.http.shutdown()
    with pytest.raises(UserError) as e: fetch('http://127.0.0.1:9/birds.tar.gz', tmp_path/'a.bin', retries=1, wait=0.001)
    assert '127.0.0.1:9' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('url', ['birds.tar.gz', 'file:///etc/passwd', 'ftp://x/y', 'http://x/a b', 'https://x/鳥'])
def test_other_addresses(tmp_path, url):
    with pytest.raises(UserError, match='not a web address'): fetch(url, tmp_path/'a')

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_full_disk(server, tmp_path):
    (tmp_path/'a.bin.part').symlink_to('/dev/full')
    with pytest.raises(UserError, match='the disk is full'): get(server, tmp_path/'a.bin')
    assert server.asked == [0]                                                 # and the server is not asked again


# ---- unpacking

def pack(path, *entries, mode='w:gz'):
    "(name, bytes) or (name, target, type)"
    with tarfile.open(path, mode) as tar:
        for name, content, *kind in entries:
            member = tarfile.TarInfo(name)
            if kind: member.type, member.linkname = kind[0], content
            else: member.size = len(content)
            tar.addfile(member, None if kind else io.BytesIO(content))
    return path

def test_unpack(tmp_path):
    for mode in ('w', 'w:gz', 'w:bz2', 'w:xz'):
        out = tmp_path/mode[2:]/'out'
        assert unpack(pack(tmp_path/'a.tar', ('birds/a.txt', b'1'), ('birds/鳥/b.txt', b'22'), ('c', b''), mode=mode), out) == [out/'birds', out/'c']
        assert (out/'birds/鳥/b.txt').read_bytes() == b'22' and left(out) == ['birds', 'c']

@pytest.mark.parametrize('entry, words', [
    (('../evil', b'1'), 'leads out of the folder'), (('birds/../../evil', b'1'), 'leads out of the folder'), (('birds\\..\\evil', b'1'), 'leads out'),
    (('/tmp/evil', b'1'), 'absolute path'), (('C:\\evil', b'1'), 'absolute path'), (('\\evil', b'1'), 'absolute path'),
    (('birds/link', '/etc', tarfile.SYMTYPE), "link to '/etc'"), (('birds/link', '../../x', tarfile.SYMTYPE), 'is a link'),
    (('birds/hard', '/etc/passwd', tarfile.LNKTYPE), 'is a link'), (('birds/dev', '', tarfile.CHRTYPE), 'neither a file nor'),
    (('birds/pipe', '', tarfile.FIFOTYPE), 'neither a file nor'),
])
def test_evil_entries(tmp_path, entry, words):
    with pytest.raises(UserError) as e: unpack(pack(tmp_path/'a.tgz', ('birds/a.txt', b'1'), entry), tmp_path/'deep/out')
    assert words in str(e.value) and 'a.tgz' in str(e.value) and 'nothing was unpacked' in str(e.value) and '\n' not in str(e.value)
    assert left(tmp_path/'deep/out') == [] and left(tmp_path/'deep') == ['out'] and left(tmp_path) == ['a.tgz', 'deep']

def test_damaged_archives(tmp_path):
    good = pack(tmp_path/'a.tgz', ('birds/a.txt', DATA)).read_bytes()
    for bad in (b'', b'not an archive', good[:-100], good[:200], good[:5000] + b'xx' + good[5002:]):
        (tmp_path/'b.tgz').write_bytes(bad)
        with pytest.raises(UserError, match=r'b\.tgz: not a readable archive .*fetch it again'): unpack(tmp_path/'b.tgz', tmp_path/'out')
        assert left(tmp_path/'out') == []
    with pytest.raises(UserError, match='no such archive'): unpack(tmp_path/'c.tgz', tmp_path/'out')

def test_nothing_is_overwritten(tmp_path):
    (tmp_path/'out/birds').mkdir(parents=True)
    with pytest.raises(UserError, match='is there already'): unpack(pack(tmp_path/'a.tgz', ('a', b''), ('birds/a.txt', b'1')), tmp_path/'out')
    assert left(tmp_path/'out') == ['birds'] and left(tmp_path/'out/birds') == []

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1535), st.integers(0, 255)), min_size=1, max_size=6))
def test_fuzz_archives(changes):
    with tempfile.TemporaryDirectory() as tmp:
        path = pack(Path(tmp)/'a.tar', ('birds/a.txt', b'1'), mode='w')
        data = bytearray(path.read_bytes())
        for i, value in changes: data[i] = value
        data[148:156] = b'%06o\0 ' % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))   # a checksum that fits, so that damage gets inside
        path.write_bytes(data)
        try: unpack(path, Path(tmp)/'out')
        except UserError as e: assert '\n' not in str(e)
        assert set(left(Path(tmp))) <= {'a.tar', 'out'}


# ---- both

def waterbirds_archive(tmp_path):
    from dreamer_wb.data.synthetic import make_waterbirds
    make_waterbirds(tmp_path/'made'/'birds', n=100, size=16)
    with tarfile.open(tmp_path/'made.tgz', 'w:gz') as tar: tar.add(tmp_path/'made'/'birds', 'birds')
    return (tmp_path/'made.tgz').read_bytes()

def test_download_waterbirds(server, tmp_path):
    server.data = waterbirds_archive(tmp_path)
    server.breaks = [10_000]
    folder = download_waterbirds(tmp_path/'raw', server.url, hashlib.sha256(server.data).hexdigest(), wait=0.001)
    assert folder == tmp_path/'raw/birds' and left(tmp_path/'raw') == ['birds'] and len(read_table(tmp_path/'raw')) == 100
    assert download_waterbirds(tmp_path/'raw', server.url) == folder and len(server.asked) == 2
    download_waterbirds(tmp_path/'keep', server.url, keep=True)
    assert left(tmp_path/'keep') == ['birds', 'birds.tar.gz']

def test_archive_of_something_else(server, tmp_path):
    server.data = pack(tmp_path/'a.tgz', ('cats/a.txt', b'1')).read_bytes()
    with pytest.raises(UserError, match='no metadata.csv inside'): download_waterbirds(tmp_path/'raw', server.url)
