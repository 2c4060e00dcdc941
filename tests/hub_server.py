"""A Hub on loopback: as much of the Hugging Face Hub's API as its own client needs to push and to load a model.

It keeps what it is sent, in memory, and notes every request, so that a test can see what was stored and where the
user's token went. Small files are served by the endpoint itself. Those that the Hub keeps in large file storage go to
and come from another host, here "localhost" instead of "127.0.0.1": as on the Hub, no token belongs there.

    with HubServer() as hub:
        subprocess.run(..., env=hub.environment(tmp_path))
        hub.files("me/model")
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_metadata import metadata_problems

TOKEN = "hf_SecretOfTheTests0123456789abcdefgh"
USER = "me"
BINARY = (".safetensors", ".bin", ".pt", ".png", ".gguf")


@dataclass
class Commit:
    """A state of a repository."""

    files: dict[str, bytes]
    message: str
    oid: str


@dataclass
class Repo:
    """A model repository: its commits by their hash, and the hash of each branch's last one."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{branch} {message} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = Commit(files, message, oid)
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Request:
    """What the server was asked, and what it answered."""

    method: str
    path: str
    host: str
    authorization: str | None
    body: bytes
    status: int = 0


class HubServer:
    """The server in a thread of its own, while the context lasts. `forbidden` names repositories that answer 403.

    Attributes:
        repos: what is stored, by id. requests: what was asked, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.forbidden: set[str] = set()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_host = f"localhost:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that send a process's Hub client here, with `token`, and its cache and settings to `home`."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, by their path."""
        return self.repos[repo_id].at(revision).files


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.request_seen = Request(
            method, path, self.headers["Host"], self.headers.get("Authorization"), self._read_body()
        )
        with self.hub.lock:
            self.hub.requests.append(self.request_seen)
            for methods, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in methods:
                    return answer(self, **match.groupdict())
        return self._refuse(501, f"tests/hub_server.py has no route for {method} {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.request_seen.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _refuse(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        more = {"X_Error_Code": code} if code else {}
        self._json({"error": message}, status, X_Error_Message=message, **more, **headers)

    # --- who may do what ---------------------------------------------------------------------------------------------

    def _may(self, repo_id: str, write: bool) -> Repo | None:
        """The repository, or None once the request is refused."""
        given, repo = self.request_seen.authorization, self.hub.repos.get(repo_id)
        if given is not None and given != f"Bearer {TOKEN}":
            return self._refuse(401, "Invalid credentials in Authorization header")
        if write and given is None:
            return self._refuse(401, "Invalid username or password.")
        if write and (repo_id in self.hub.forbidden or repo_id.partition("/")[0] != USER):
            return self._refuse(403, "You do not have the required permissions for this repository")
        if repo is None or (repo.private and given is None):
            return self._refuse(404 if given else 401, "Repository not found", "RepoNotFound")
        return repo

    def _whoami(self) -> None:
        if self.request_seen.authorization != f"Bearer {TOKEN}":
            return self._refuse(401, "Invalid credentials in Authorization header")
        return self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    # --- writing -----------------------------------------------------------------------------------------------------

    def _validate_yaml(self) -> None:
        errors, warnings = metadata_problems(json.loads(self.request_seen.body)["content"])
        as_items = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        self._json(as_items, 400 if errors else 200)

    def _create_repo(self) -> None:
        wanted = json.loads(self.request_seen.body)
        repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
        existing = self.hub.repos.get(repo_id)
        self.hub.repos.setdefault(repo_id, Repo(wanted.get("visibility") == "private"))
        repo = self._may(repo_id, write=True)
        if repo is None:
            if existing is None:
                del self.hub.repos[repo_id]
        else:
            if existing is None:
                repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, 409 if existing else 200)

    def _create_branch(self, repo_id: str, branch: str) -> None:
        if repo := self._may(repo_id, write=True):
            exists = branch in repo.branches
            start = json.loads(self.request_seen.body or b"{}").get("startingPoint", "main")
            repo.branches.setdefault(branch, repo.at(start).oid)
            self._json({}, 409 if exists else 200)

    def _preupload(self, repo_id: str, revision: str) -> None:
        if repo := self._may(repo_id, write=True):
            if repo.at(revision) is None:
                return self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            files = json.loads(self.request_seen.body)["files"]
            modes = [("lfs" if file["path"].endswith(BINARY) else "regular", file["path"]) for file in files]
            self._json({"files": [{"path": path, "uploadMode": m, "shouldIgnore": False} for m, path in modes]})

    def _lfs_batch(self, repo_id: str) -> None:
        if self._may(repo_id, write=True):
            objects = json.loads(self.request_seen.body)["objects"]
            for item in objects:
                if item["oid"] not in self.hub.large_files:
                    upload = f"http://{self.hub.storage_host}/storage/{item['oid']}"
                    verify = f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"
                    item["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            self._json({"transfer": "basic", "objects": objects})

    def _lfs_verify(self, repo_id: str) -> None:
        if self._may(repo_id, write=True):
            oid = json.loads(self.request_seen.body)["oid"]
            self._json({}, 200 if oid in self.hub.large_files else 404)

    def _store(self, oid: str) -> None:
        body = self.request_seen.body
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400, "the content does not have this hash")
        self.hub.large_files[oid] = body
        return self._send(200, b"", {})

    def _commit(self, repo_id: str, revision: str) -> None:
        if repo := self._may(repo_id, write=True):
            header, *operations = [json.loads(line) for line in self.request_seen.body.splitlines()]
            files = dict(repo.at(revision).files)
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large_files[value["oid"]]
                else:
                    return self._refuse(501, f"tests/hub_server.py knows no {operation['key']}")
            oid = repo.commit(revision, files, header["value"]["summary"])
            self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    # --- reading -----------------------------------------------------------------------------------------------------

    def _read(self, repo_id: str, revision: str | None) -> tuple[Repo, Commit] | None:
        repo = self._may(repo_id, write=False)
        if repo is None:
            return None
        commit = repo.at(revision or "main")
        return (repo, commit) if commit else self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _model_info(self, repo_id: str, revision: str | None = None) -> None:
        if found := self._read(repo_id, revision):
            repo, commit = found
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            facts = {"id": repo_id, "sha": commit.oid, "private": repo.private, "gated": False, "tags": []}
            self._json({**facts, "modelId": repo_id, "siblings": siblings, "downloads": 0, "likes": 0})

    def _refs(self, repo_id: str) -> None:
        if repo := self._may(repo_id, write=False):
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
            self._json({"branches": refs, "tags": [], "converts": []})

    def _tree(self, repo_id: str, revision: str, folder: str | None = None) -> None:
        if found := self._read(repo_id, revision):
            prefix = f"{folder}/" if folder else ""
            paths = [path for path in sorted(found[1].files) if path.startswith(prefix)]
            if folder and not paths:
                return self._refuse(404, f"{folder} does not exist", "EntryNotFound", X_Repo_Commit=found[1].oid)
            sizes = {path: len(found[1].files[path]) for path in paths}
            oids = {path: hashlib.sha1(found[1].files[path]).hexdigest() for path in paths}
            self._json([{"type": "file", "path": path, "size": sizes[path], "oid": oids[path]} for path in paths])

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._read(repo_id, revision)
        if found is None:
            return None
        content, commit = found[1].files.get(path), {"X-Repo-Commit": found[1].oid}
        if content is None:
            return self._refuse(404, "Entry not found", "EntryNotFound", **commit)
        if not path.endswith(BINARY):
            return self._send_file(content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **commit})
        oid = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), **commit}
        return self._send(302, b"", {"Location": f"http://{self.hub.storage_host}/storage/{oid}", **linked})

    def _fetch(self, oid: str) -> None:
        if oid not in self.hub.large_files:
            return self._refuse(404, "no such object")
        return self._send_file(self.hub.large_files[oid], {"ETag": f'"{oid}"'})

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, content, {"Accept-Ranges": "bytes", **headers})
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        part = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return self._send(206, content[start : end + 1], {**part, **headers})


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler._whoami),
    (("POST",), r"/api/validate-yaml", _Handler._validate_yaml),
    (("POST",), r"/api/repos/create", _Handler._create_repo),
    (("POST",), rf"/api/models/{_ID}/branch/(?P<branch>.+)", _Handler._create_branch),
    (("POST",), rf"/api/models/{_ID}/preupload/(?P<revision>.+)", _Handler._preupload),
    (("POST",), rf"/api/models/{_ID}/commit/(?P<revision>.+)", _Handler._commit),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/verify", _Handler._lfs_verify),
    (("PUT",), r"/storage/(?P<oid>\w+)", _Handler._store),
    (("GET", "HEAD"), r"/storage/(?P<oid>\w+)", _Handler._fetch),
    (("GET",), rf"/api/models/{_ID}", _Handler._model_info),
    (("GET",), rf"/api/models/{_ID}/revision/(?P<revision>.+)", _Handler._model_info),
    (("GET",), rf"/api/models/{_ID}/refs", _Handler._refs),
    (("GET",), rf"/api/models/{_ID}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler._tree),
    (("GET", "HEAD"), rf"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", _Handler._resolve),
]
