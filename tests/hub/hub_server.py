"""A stand-in for the Hub on loopback, spoken to by the real `huggingface_hub` client.

It keeps commits of whole trees, LFS objects by hash, branches, pull requests and private repositories, and can be told
to fail: `server.fail("PUT", "/lfs/", after=1000)` drops a connection, `status=429` answers with an error, `times` says
how often. What it does follows the requests that the client was seen to send; it is no evidence about the real Hub.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest

from diffusers_msfp import publish

BASE_CARD = b"---\nlicense: openrail++\npipeline_tag: text-to-image\n---\n# base\n"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TOKEN = "hf_dummy"
LFS_BYTES = 10_000


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/N → commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        listed = json.dumps([[path, git_hash(data)] for path, data in sorted(files.items())])
        oid = hashlib.sha1(f"{len(self.commits)}{listed}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        return oid


@dataclass
class Failure:
    method: str
    path: str
    times: int
    status: int | None
    after: int | None
    headers: dict[str, str]


class Hub(ThreadingHTTPServer):
    """Use as a context manager; `url` is its endpoint."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def add(self, repo: str, files: dict[str, bytes], private: bool = False) -> str:
        made = self.repos.setdefault(repo, Repo(private))
        return made.commit("main", files)

    def fail(self, method, path, *, times=1, status=None, after=None, headers=None) -> None:
        """Let requests whose path holds `path` fail: with a status, or by hanging up after so many bytes."""
        self.failures.append(Failure(method, path, times, status, after, headers or {}))

    def files(self, repo: str, ref: str = "main") -> dict[str, bytes]:
        made = self.repos[repo]
        return made.commits[made.refs[ref]]

    def handle_error(self, request, client_address) -> None:
        pass  # clients hang up


class Refused(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.url, self.read = urlsplit(self.path), None
        self.query = {key: values[0] for key, values in parse_qs(self.url.query).items()}
        route = unquote(self.url.path)
        self.server.requests.append(f"{self.command} {route}")
        failure = next(
            (f for f in self.server.failures if f.method == self.command and f.path in route and f.times), None
        )
        self.drop_after = None
        if failure:
            failure.times -= 1
            if failure.status:
                self.body()
                return self.answer({"error": "out of luck"}, failure.status, failure.headers)
            if self.command == "PUT":
                self.rfile.read(failure.after)
                self.close_connection = True
                return self.connection.shutdown(2)
            self.drop_after = failure.after
        try:
            for method, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, route)
                if match and self.command in method:
                    return handle(self, *match.groups())
            raise Refused(404, None, f"no route {route}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.body()
            return self.answer({"error": refused.message}, refused.status, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def body(self) -> bytes:
        if self.read is None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.read = data
        return self.read

    def answer(self, content, status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.drop_after is not None:
            self.wfile.write(data[: self.drop_after])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        self.wfile.write(data)

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, writing: bool = False) -> Repo:
        found = self.server.repos.get(name)
        if found is None or (found.private and not self.allowed()):
            raise Refused(404 if self.allowed() else 401, "RepoNotFound", "Repository not found")
        if writing and not self.allowed():
            raise Refused(403, None, "Forbidden: a token with write access is needed")
        return found

    def resolve(self, name: str, revision: str | None) -> tuple[Repo, str]:
        repo = self.repo(name)
        oid = repo.refs.get(revision or "main", revision)
        if oid not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"no revision {revision}")
        return repo, oid

    # ── endpoints ────────────────────────────────────────────────────────────────────────────────────────────

    def whoami(self) -> None:
        if not self.allowed():
            raise Refused(401, None, "Invalid credentials")
        self.answer({"type": "user", "name": "user", "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        wanted = json.loads(self.body())
        if not self.allowed():
            raise Refused(401, None, "Invalid username or password.")
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, bool(private))
        return self.answer({"url": url, "name": name, "id": name})

    def info(self, name: str, revision: str | None = None) -> None:
        repo, oid = self.resolve(name, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        self.answer({"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        repo, oid = self.resolve(name, revision)
        self.answer([self.entry(path, data) for path, data in sorted(repo.commits[oid].items())])

    def entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in self.server.objects:
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return entry

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, writing=True)
        self.body()
        if branch in repo.refs:
            raise Refused(409, None, "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self.answer({})

    def preupload(self, name: str, revision: str) -> None:
        repo, files = self.repo(name, writing=True), json.loads(self.body())["files"]
        present = repo.commits[repo.refs.get(revision, revision)]
        modes = []
        for file in files:
            lfs = file["size"] > LFS_BYTES or file["path"].endswith(".safetensors")
            known = present.get(file["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest() if lfs else git_hash(known)
            modes.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self.answer({"files": modes})

    def batch(self, name: str) -> None:
        self.repo(name, writing=True)
        objects = json.loads(self.body())["objects"]
        for one in objects:
            if one["oid"] not in self.server.objects:
                one["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs/{one['oid']}/verify"},
                }
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(422, None, "hash mismatch")
        self.server.objects[oid] = data
        self.answer({})

    def verify(self, oid: str) -> None:
        size = json.loads(self.body())["size"]
        if len(self.server.objects.get(oid, b"")) != size:
            raise Refused(422, None, "not what was announced")
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        repo = self.repo(name, writing=True)
        header, *lines = map(json.loads, self.body().splitlines())
        parent = repo.refs.get(revision)
        if parent is None:
            raise Refused(404, "RevisionNotFound", f"no branch {revision}")
        if header["value"].get("parentCommit") not in (None, parent):
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        ref = f"refs/pr/{number}" if self.query.get("create_pr") else revision
        oid = repo.commit(ref, files)
        done = {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid}
        self.answer(done | {"pullRequestUrl": f"{self.server.url}/{name}/discussions/{number}"})

    def validate_yaml(self) -> None:
        text = json.loads(self.body())["content"]
        errors = [] if "license:" in text else [{"message": '"license" is required'}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def file(self, name: str, revision: str, path: str) -> None:
        repo, oid = self.resolve(name, revision)
        data = repo.commits[oid].get(path)
        if data is None:
            raise Refused(404, "EntryNotFound", f"no file {path}")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.answer(data, 200, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        return self.answer(
            data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        )


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/models/{_NAME}", Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(.+)", Handler.tree),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(\w+)", Handler.put),
    ("POST", r"/lfs/(\w+)/verify", Handler.verify),
    ("GET HEAD", rf"/{_NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.file),
]


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The client may use the network (loopback), has an empty cache and no Xet, and does not wait between tries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def hub(online):
    with Hub() as server:
        server.add("org/base", {"README.md": BASE_CARD})
        yield server


ASKED = {"license": "mit", "base_model": "org/base", "num_samples": 1, "num_inference_steps": 1}


def send(server: Hub, folder: Path, **changes) -> dict:
    """Publish a checkpoint there."""
    arguments = ASKED | {"token": TOKEN} | changes
    return publish(folder, arguments.pop("repo", "user/tiny"), endpoint=server.url, **arguments)


def rehearse(folder: Path, out: Path, **more) -> dict:
    """Write what would be published to a folder."""
    return publish(folder, "user/tiny", dry_run=out, **ASKED, **more)
