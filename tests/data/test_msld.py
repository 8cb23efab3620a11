"""The MSLD download against a faulty server."""
import _thread
import csv
import threading
import time
import urllib.parse
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import MSLD, hash_files, needs_msld

from timm_densese.cli import main
from timm_densese.data.msld import download_msld
from timm_densese.errors import DownloadError, OptionError


@contextmanager
def source(faults):
    """Serve the MSLD images under their paths in the source repository.

    `faults` maps a file to the answers its first requests get: a status code, 'truncated' or 'wrong'.
    """
    with open(MSLD / 'manifest.csv', newline='') as file:
        files = {row['source_path']: row['file'] for row in csv.DictReader(file)}
    requests = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = files[urllib.parse.unquote(self.path).lstrip('/')]
            with lock:
                requests[name] += 1
                answers = faults.get(name, [])
                fault = answers[min(requests[name], len(answers)) - 1] if answers else None
            if isinstance(fault, int) and fault != 200:
                return self.send_error(fault)
            body = (MSLD / name).read_bytes()
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[:100] if fault == 'truncated' else body[::-1] if fault == 'wrong' else body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}', requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@needs_msld
def test_download_and_passing_faults(tmp_path, capsys):
    passing = {'Monkeypox/M01_01.jpg': [500, 503, 200], 'Others/NM01_01.jpg': ['truncated', 200],
               'Monkeypox/M09_02.jpg': ['wrong', 200], 'Others/NM68_01.jpg': [429, 200]}
    with source(passing) as (url, requests):
        assert main(['data', 'msld', '--output', str(tmp_path / 'msld'), '--base-url', url]) == 0
    assert hash_files(tmp_path / 'msld') == hash_files(MSLD)
    assert len(hash_files(MSLD)) == 228
    assert requests['Monkeypox/M01_01.jpg'] == 3
    out = capsys.readouterr().out
    assert 'never for diagnosis' in out
    assert '228 images' in out
    with open(tmp_path / 'msld' / 'manifest.csv', newline='') as file:
        assert len({row['patient'] for row in csv.DictReader(file)}) == 162


@pytest.mark.slow
@needs_msld
def test_download_says_what_failed_and_goes_on_from_there(tmp_path):
    lasting = {'Monkeypox/M01_01.jpg': [404], 'Others/NM01_01.jpg': ['wrong'], 'Monkeypox/M09_02.jpg': ['truncated']}
    with source(lasting) as (url, requests), pytest.raises(DownloadError) as error:
        download_msld(tmp_path, url, backoff=.01)
    message = str(error.value)
    assert '3 of 228' in message
    assert 'Monkeypox/M01_01.jpg: HTTP 404' in message
    assert 'Others/NM01_01.jpg: invalid hash value' in message
    assert '--base-url' in message
    assert requests['Monkeypox/M01_01.jpg'] == 1
    assert requests['Others/NM01_01.jpg'] == 5
    assert len(hash_files(tmp_path)) == 225  # nothing half-written under its name
    assert not (tmp_path / 'manifest.csv').exists()

    (tmp_path / 'Others' / 'NM02_01.jpg').write_bytes(b'damaged since')
    with source({}) as (url, requests):
        download_msld(tmp_path, url)
    assert set(requests) == {*lasting, 'Others/NM02_01.jpg'}
    assert hash_files(tmp_path) == hash_files(MSLD)


def test_a_manifest_of_something_else_stays(tmp_path, capsys):
    (tmp_path / 'manifest.csv').write_text('mine')
    assert main(['data', 'msld', '--output', str(tmp_path), '--base-url', 'http://127.0.0.1:9']) == 1
    assert 'manifest.csv is of something else' in capsys.readouterr().err
    assert (tmp_path / 'manifest.csv').read_text() == 'mine'


@needs_msld
def test_download_without_a_server(tmp_path, capsys):
    with source({}) as (url, _):
        pass
    with pytest.raises(DownloadError, match=rf'{url} could not be reached .*nothing was downloaded.*--base-url'):
        download_msld(tmp_path / 'msld', url)
    assert not (tmp_path / 'msld').exists()
    (tmp_path / 'file').touch()
    with pytest.raises(OptionError, match=r'--output .*file is a file, not a folder'):
        download_msld(tmp_path / 'file' / 'msld', url)


def test_download_ends_at_ctrl_c(tmp_path, monkeypatch):
    """What was begun ends, nothing is begun or tried again, and all that came is kept."""
    begun, started = [], time.monotonic()

    def fail(url, file, **kwargs):
        begun.append(file)
        if len(begun) == 1:
            _thread.interrupt_main()
        raise OSError('busy')

    monkeypatch.setattr('torch.hub.download_url_to_file', fail)
    monkeypatch.setattr('timm_densese.data.msld._check_reachable', lambda url: None)
    with pytest.raises(KeyboardInterrupt, match='the same command goes on'):
        download_msld(tmp_path, backoff=20.)
    assert time.monotonic() - started < 10
    assert len(begun) < 20
