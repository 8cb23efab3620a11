"""The part of the Hugging Face Hub's HTTP interface that the huggingface_hub client uses, on 127.0.0.1.

Repositories (models and datasets) with branches, tags and pull requests; create_repo, preupload, LFS upload in one or
several parts, commit, model_info, resolve with ETag, redirect and byte ranges; tokens, private and gated repositories.
Contents lie in a folder by their SHA-256, the rest in memory. `faults` makes requests slow, broken or refused. Large
files are stored on and served from another port, as the Hub's are from another host; a token sent there is an error.

Xet is not spoken: the client needs HF_HUB_DISABLE_XET=1.
"""
import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_LFS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.png')
_PART = 8 << 20  # LFS uploads over this size go in parts


@dataclass
class Fault:
    """What happens to the next `times` requests 'METHOD path' that match `pattern`.

    The answer waits `delay` seconds; then it is `status`, or has the body `tamper`. With `drop_after`, its body breaks
    off after so many bytes, and then the wait comes; a request with a body is cut off after reading as much.
    """
    pattern: str
    times: int = 1
    delay: float = 0.
    status: int = 0
    drop_after: int | None = None
    tamper: bytes | None = None


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # branch, tag or refs/pr/N -> commit
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # commit -> path -> SHA-256

    def commit(self, ref: str, files: dict[str, str]) -> str:
        sha = hashlib.sha1(f'{ref} {len(self.commits)} {sorted(files.items())}'.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def files(self, revision: str) -> dict[str, str] | None:
        return self.commits.get(self.refs.get(revision, revision))


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: 'HubServer') -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.hub = hub

    def handle_error(self, request, client_address) -> None:
        pass  # clients that are killed or drop a connection are part of the tests


class HubServer:
    def __init__(self, root: Path) -> None:
        self.root = root  # contents by SHA-256
        self.tokens = {'hf_owner': 'owner', 'hf_stranger': 'stranger'}
        self.repos: dict[str, Repo] = {}  # 'OWNER/NAME', 'datasets/OWNER/NAME'
        self.requests: list[str] = []  # 'METHOD path' of each request answered
        self.faults: list[Fault] = []
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self.api, self.storage = _HttpServer(self), _HttpServer(self)
        self.endpoint, self.storage_url = (f'http://127.0.0.1:{s.server_port}' for s in (self.api, self.storage))

    def store(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        (self.root / sha256).write_bytes(data)
        return sha256

    def put(self, repo_id: str, files: dict[str, bytes], revision: str = 'main', **kwargs) -> Repo:
        """Add files to a repository as a commit, and make it if there is none."""
        repo = self.repos.setdefault(repo_id, Repo())
        for name, value in kwargs.items():
            setattr(repo, name, value)
        repo.commit(revision, {**(repo.files(revision) or {}), **{p: self.store(d) for p, d in files.items()}})
        return repo

    def read(self, repo_id: str, path: str, revision: str = 'main') -> bytes:
        return (self.root / self.repos[repo_id].files(revision)[path]).read_bytes()

    @contextmanager
    def running(self) -> Iterator['HubServer']:
        threads = [threading.Thread(target=s.serve_forever, daemon=True) for s in (self.api, self.storage)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server, thread in zip((self.api, self.storage), threads, strict=True):
                server.shutdown()
                server.server_close()
                thread.join()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = '') -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: _HttpServer

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    # One request.

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        request = f'{self.command} {unquote(parts.path)}'
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, request)), None)
            if fault:
                fault.times -= 1
        self.fault = fault
        if fault and fault.delay and fault.drop_after is None:
            time.sleep(fault.delay)
        length = int(self.headers.get('Content-Length', 0))
        if fault and fault.drop_after is not None and length:
            self.rfile.read(min(fault.drop_after, length))
            return self._hang_up()
        self.body = self.rfile.read(length)
        try:
            if fault and fault.status:
                raise _Refused(fault.status, 'Made to fail')
            if self.server is self.hub.storage and 'Authorization' in self.headers:
                raise _Refused(400, 'A token was sent to the storage')
            for pattern, handler in _ROUTES:
                match = re.fullmatch(pattern, request)
                if match:
                    return handler(self, **match.groupdict())
            raise _Refused(404, 'This server does not speak that')
        except _Refused as e:
            headers = {'X-Error-Code': e.code, 'X-Error-Message': e.message} if e.code else {}
            self._send(e.status, json.dumps({'error': e.message}).encode(), {'X-Request-Id': 'test', **headers})

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _send(self, status: int, body: bytes = b'', headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.fault and self.fault.drop_after is not None:
            self.wfile.write(body[:self.fault.drop_after])
            self.wfile.flush()
            time.sleep(self.fault.delay)
            return self._hang_up()
        self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {'Content-Type': 'application/json'})

    # Who may do what.

    def _user(self) -> str | None:
        header = self.headers.get('Authorization', '')
        if not header:
            return None
        user = self.hub.tokens.get(header.removeprefix('Bearer '))
        if user is None:
            raise _Refused(401, 'Invalid credentials in Authorization header')
        return user

    def _readable(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        user = self._user()
        owner = repo_id.split('/')[-2]
        if repo is None or (repo.private and user != owner):
            # As the Hub: nobody learns whether a private repository exists.
            raise _Refused(404 if user else 401, 'Repository not found', 'RepoNotFound')
        return repo

    def _writable(self, repo_id: str) -> Repo:
        user = self._user()
        if user is None:
            raise _Refused(401, 'Invalid username or password.')
        repo = self._readable(repo_id)
        if user != repo_id.split('/')[-2]:
            raise _Refused(403, 'You have read access but not the required permissions for this operation')
        return repo

    def _files(self, repo: Repo, revision: str) -> dict[str, str]:
        files = repo.files(revision)
        if files is None:
            raise _Refused(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return files

    # The API.

    def _create_repo(self) -> None:
        request = json.loads(self.body)
        user = self._user()
        if user is None:
            raise _Refused(401, 'Invalid username or password.')
        owner = request.get('organization') or user
        repo_id = f'{owner}/{request["name"]}'
        if owner != user:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace \"{owner}\"")
        if repo_id in self.hub.repos:
            raise _Refused(409, 'You already created this model repo')
        private = request.get('visibility') == 'private' or request.get('private')  # newer and older clients
        repo = self.hub.repos[repo_id] = Repo(private=bool(private))
        repo.commit('main', {})
        self._json({'url': f'{self.hub.endpoint}/{repo_id}', 'name': repo_id})

    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Refused(401, 'Invalid username or password.')
        self._json({'name': user, 'type': 'user', 'orgs': []})

    def _validate_yaml(self) -> None:
        self._json({'errors': [], 'warnings': []})

    def _info(self, repo_id: str, revision: str | None = None) -> None:
        repo = self._readable(repo_id)
        files = self._files(repo, revision or 'main')
        sha = repo.refs.get(revision or 'main', revision)
        self._json({
            'id': repo_id, 'modelId': repo_id, 'sha': sha, 'private': repo.private,
            'gated': 'manual' if repo.gated else False, 'disabled': False, 'downloads': 0, 'likes': 0, 'tags': [],
            'siblings': [{'rfilename': path} for path in sorted(files)]})

    def _create_branch(self, repo_id: str, revision: str) -> None:
        repo = self._writable(repo_id)
        if revision in repo.refs:
            raise _Refused(409, f'Reference already exists: {revision}')
        start = json.loads(self.body or b'{}').get('startingPoint', 'main')
        repo.refs[revision] = repo.refs[start]
        self._json({})

    def _preupload(self, repo_id: str, revision: str) -> None:
        repo = self._writable(repo_id) if 'create_pr' not in self.query else self._readable(repo_id)
        files = self._files(repo, revision)
        answer = []
        for file in json.loads(self.body)['files']:
            lfs = file['path'].endswith(_LFS_SUFFIXES) or file['size'] > 10 << 20
            oid = None
            if file['path'] in files:
                data = (self.hub.root / files[file['path']]).read_bytes()
                git = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
                oid = files[file['path']] if lfs else git
            answer.append({'path': file['path'], 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False,
                           'oid': oid})
        self._json({'files': answer})

    def _lfs_batch(self, repo_id: str) -> None:
        self._readable(repo_id)
        objects = []
        for o in json.loads(self.body)['objects']:
            path = f'lfs/{repo_id}/{o["oid"]}'
            base, api = f'{self.hub.storage_url}/{path}', f'{self.hub.endpoint}/{path}'
            entry = {'oid': o['oid'], 'size': o['size']}
            if not (self.hub.root / o['oid']).exists():
                header = {}
                href = base
                if o['size'] > _PART:
                    count = -(-o['size'] // _PART)
                    header = {'chunk_size': str(_PART), **{str(i + 1): f'{base}/{i + 1}' for i in range(count)}}
                    href = f'{api}/complete'
                entry['actions'] = {
                    'upload': {'href': href, 'header': header}, 'verify': {'href': f'{api}/verify', 'header': {}}}
            objects.append(entry)
        self._json({'transfer': 'multipart', 'objects': objects})

    def _lfs_put(self, repo_id: str, oid: str, part: str | None = None) -> None:
        if part:
            with self.hub.lock:
                self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        elif self.hub.store(self.body) != oid:
            raise _Refused(400, 'These bytes do not have that SHA-256')
        self._send(200, headers={'ETag': f'"{hashlib.md5(self.body).hexdigest()}"'})

    def _lfs_complete(self, repo_id: str, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        if self.hub.store(b''.join(parts[i] for i in sorted(parts))) != oid:
            raise _Refused(400, 'These parts do not have that SHA-256')
        self._json({'success': True})

    def _lfs_verify(self, repo_id: str, oid: str) -> None:
        if not (self.hub.root / oid).exists():
            raise _Refused(404, 'Not uploaded')
        self._json({})

    def _commit(self, repo_id: str, revision: str) -> None:
        pr = 'create_pr' in self.query
        repo = self._readable(repo_id) if pr and self._user() else self._writable(repo_id)
        files = dict(self._files(repo, revision))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'file':
                files[value['path']] = self.hub.store(base64.b64decode(value['content']))
            elif entry['key'] == 'lfsFile':
                if not (self.hub.root / value['oid']).exists():
                    raise _Refused(400, f'LFS object {value["oid"]} was not uploaded')
                files[value['path']] = value['oid']
        number = sum(ref.startswith('refs/pr/') for ref in repo.refs) + 1
        ref = f'refs/pr/{number}' if pr else revision
        sha = repo.commit(ref, files)
        self._json({
            'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.endpoint}/{repo_id}/commit/{sha}',
            'hookOutput': '', 'pullRequestUrl': f'{self.hub.endpoint}/{repo_id}/discussions/{number}' if pr else ''})

    # Files.

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._readable(repo_id)
        if repo.gated and self._user() != repo_id.split('/')[-2]:
            raise _Refused(403, f'Access to model {repo_id} is restricted and you are not in the authorized list. '
                                f'Visit {self.hub.endpoint}/{repo_id} to ask for access.', 'GatedRepo')
        files = self._files(repo, revision)
        commit = repo.refs.get(revision, revision)
        if path not in files:
            raise _Refused(404, 'Entry not found', 'EntryNotFound')
        sha256 = files[path]
        if not path.endswith(_LFS_SUFFIXES):
            return self._content(sha256, {'X-Repo-Commit': commit, 'ETag': f'"{sha256}"'})
        # Large files live elsewhere: the client is sent on and told what to expect there.
        self._send(302, headers={
            'Location': f'{self.hub.storage_url}/cdn/{repo_id}/{sha256}', 'X-Repo-Commit': commit,
            'X-Linked-ETag': f'"{sha256}"', 'X-Linked-Size': str((self.hub.root / sha256).stat().st_size)})

    def _cdn(self, repo_id: str, sha256: str) -> None:
        self._content(sha256, {'ETag': f'"{sha256}"'})

    def _content(self, sha256: str, headers: dict[str, str]) -> None:
        data = (self.hub.root / sha256).read_bytes()
        if self.fault and self.fault.tamper is not None:
            data = self.fault.tamper
        match = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        start = int(match[1]) if match else 0
        headers['Accept-Ranges'] = 'bytes'
        if match:
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        self._send(206 if match else 200, data[start:], headers)


_ID = r'(?P<repo_id>(?:datasets/)?[\w.-]+/[\w.-]+)'
_REV = r'(?P<revision>refs/pr/\d+|[^/]+)'
_ROUTES = [
    (r'POST /api/repos/create', _Handler._create_repo),
    (r'GET /api/whoami-v2', _Handler._whoami),
    (r'POST /api/validate-yaml', _Handler._validate_yaml),
    (rf'GET /api/models/{_ID}', _Handler._info),
    (rf'GET /api/models/{_ID}/revision/{_REV}', _Handler._info),
    (rf'POST /api/models/{_ID}/branch/{_REV}', _Handler._create_branch),
    (rf'POST /api/models/{_ID}/preupload/{_REV}', _Handler._preupload),
    (rf'POST /api/models/{_ID}/commit/{_REV}', _Handler._commit),
    (rf'POST /{_ID}\.git/info/lfs/objects/batch', _Handler._lfs_batch),
    (rf'PUT /lfs/{_ID}/(?P<oid>[0-9a-f]{{64}})(?:/(?P<part>\d+))?', _Handler._lfs_put),
    (rf'POST /lfs/{_ID}/(?P<oid>[0-9a-f]{{64}})/complete', _Handler._lfs_complete),
    (rf'POST /lfs/{_ID}/(?P<oid>[0-9a-f]{{64}})/verify', _Handler._lfs_verify),
    (rf'(?:GET|HEAD) /{_ID}/resolve/{_REV}/(?P<path>.+)', _Handler._resolve),
    (rf'(?:GET|HEAD) /cdn/{_ID}/(?P<sha256>[0-9a-f]{{64}})', _Handler._cdn),
]
