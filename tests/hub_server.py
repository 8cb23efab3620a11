"""The part of the Hugging Face Hub's HTTP interface that downloads use, on 127.0.0.1, from a folder.

A repository is a folder `root/OWNER/NAME`; every revision serves the files that are there, and a file that changes
makes a new commit. Answers carry the headers that the real huggingface_hub client needs: the commit, an ETag and the
size on HEAD, byte ranges on GET.
"""
import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_RESOLVE = re.compile(r'^/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<path>[^?]+)')


def _commit(repo: Path) -> str:
    files = sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in repo.rglob('*') if p.is_file())
    return hashlib.sha1(repr(files).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.root = root
        self.requests: list[str] = []  # 'METHOD path' of each request answered

    @property
    def endpoint(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'

    @contextmanager
    def running(self) -> Iterator['HubServer']:
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: HubServer

    def do_HEAD(self) -> None:
        self._resolve(with_body=False)

    def do_GET(self) -> None:
        self._resolve(with_body=True)

    def _resolve(self, with_body: bool) -> None:
        self.server.requests.append(f'{self.command} {self.path}')
        match = _RESOLVE.match(self.path)
        if match is None:
            return self._error('404 is all this server says to other paths', '')
        repo = self.server.root / match['repo']
        if not repo.is_dir():
            return self._error('Repository not found', 'RepoNotFound')
        file = repo / match['path']
        if not file.is_file() or not file.resolve().is_relative_to(repo.resolve()):
            return self._error('Entry not found', 'EntryNotFound', _commit(repo))

        data = file.read_bytes()
        start = int(re.match(r'bytes=(\d+)-', self.headers.get('Range', 'bytes=0-'))[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        self.send_header('X-Repo-Commit', _commit(repo))
        self.send_header('ETag', f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header('Accept-Ranges', 'bytes')
        self.send_header('Content-Length', str(len(data) - start))
        self.end_headers()
        if with_body:
            self.wfile.write(data[start:])

    def _error(self, message: str, code: str, commit: str = '') -> None:
        self.send_response(404)
        self.send_header('X-Error-Code', code)
        self.send_header('X-Error-Message', message)
        if commit:
            self.send_header('X-Repo-Commit', commit)
        self.send_header('Content-Length', '0')
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass
