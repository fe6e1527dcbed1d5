"""A Hub on loopback: the endpoints that the installed, unmodified `huggingface_hub` calls, and faults on demand.

No kept implementation does this. `olah` (PyPI, read at 0.5.4) serves `HF_ENDPOINT` too, but it is a caching mirror:
its routes are GET and HEAD (and paths-info), what it lacks it fetches from huggingface.co, and it neither creates
repositories nor takes uploads, commits or tags. Nor can a finished server be told to cut the third request.

Two listeners, as on the Hub: `hub.url` is the API, `hub.storage_url` (another origin) the object storage that large
files are redirected to; it takes signed addresses only and refuses a request that carries a token. The state is plain
Python (`hub.repos`, `hub.objects`), a commit is one assignment under a lock, every request is in `hub.requests`. Xet
is not spoken: no answer offers it for downloads, and with `HF_HUB_DISABLE_XET`, which the fixture sets, clients upload
by LFS. (With Xet, `upload_folder` may make several commits of one folder; `create_commit` makes one either way.)

    hub.inject("status", match=r"^POST /api/.*/commit/", status=503)  # the next commit meets a 503
    hub.inject("cut_download", match=r"^GET /objects/", after=1000, times=2)

`match` is searched in "METHOD /path?query"; the first fault that matches and has `times` left (None: always) takes
the request:

* `status`: answers `status` instead of acting, with `error_code` and `message` (headers that the client reads),
  `retry_after`;
* `cut_upload`: reads `after` bytes of the request's body and drops the connection; nothing is stored;
* `cut_download`: announces the whole body, sends `after` bytes, drops the connection (`reset=True`: by RST, not FIN);
* `drop_response`: does the work, then drops the connection without an answer;
* `truncate`: keeps the first `after` bytes, of a PUT what is stored, of a GET what is sent, Content-Length agreeing;
* `corrupt`: flips the bits of byte `at` (default: the middle), of a PUT in what is stored, of a GET in what is sent;
* `wrong_sha`: the answer states another sha256 for large files (ETag, X-Linked-Etag, JSON) than their content has.

Who notices what. The client compares *sizes* only: a truncated download, and (by `verify`) a truncated upload, fail;
`corrupt` and `wrong_sha` pass `hf_hub_download`, `snapshot_download` and `create_commit` in silence, as they would on
the Hub when a proxy or a disk lies. So whoever publishes must fetch what was uploaded and compare its sha256 with the
local files'. `HfApi.verify_repo_checksums` compares a download with the hashes that the server states, which are those
that the uploader stated. A large file whose stored bytes do not hash to its name counts as absent in the next LFS
batch, so that publishing again repairs it.
"""

import base64
import fnmatch
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import socketserver
import struct
import sys
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest
import yaml


FAULTS = ("status", "cut_upload", "cut_download", "drop_response", "truncate", "corrupt", "wrong_sha")
LFS_SUFFIXES = (
    "7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar"
    " safetensors tar tflite tgz wasm xz zip zst"
).split()
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
SHA256 = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")

ID = r"(?P<id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{ID}"
GIT = rf"(?:/(?P<kind>datasets|spaces))?/{ID}"
ROUTES = [
    (method, re.compile(pattern), handler)
    for method, pattern, handler in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("DELETE", r"/api/repos/delete", "delete_repo"),
        ("GET", r"/api/(?P<kind>models|datasets|spaces)", "list_repos"),
        ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", "repo_info"),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"{API}/refs", "refs"),
        ("GET", rf"{API}/commits/(?P<revision>[^/]+)", "commits"),
        ("GET", rf"{API}/auth-check(?P<write>/write)?", "auth_check"),
        ("PUT", rf"{API}/settings", "settings"),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"{API}/tag/(?P<name>[^/]+)", "create_tag"),
        ("DELETE", rf"{API}/tag/(?P<name>[^/]+)", "delete_tag"),
        ("POST", rf"{API}/branch/(?P<name>[^/]+)", "create_branch"),
        ("DELETE", rf"{API}/branch/(?P<name>[^/]+)", "delete_branch"),
        ("POST", rf"{GIT}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"{GIT}\.git/info/lfs/objects/verify", "lfs_verify"),
        ("POST", r"/api/complete-multipart/(?P<oid>[0-9a-f]{64})", "complete_multipart"),
        ("GET", rf"{GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
]
STORAGE_ROUTES = [
    ("PUT", re.compile(r"/uploads/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)"), "store"),
    ("GET", re.compile(r"/objects/(?P<oid>[0-9a-f]{64})"), "fetch"),
]


@dataclass(frozen=True)
class File:
    """A file of a commit: a regular one carries its bytes, a large one the sha256 under which the storage has them."""

    size: int
    data: bytes | None = None
    sha256: str | None = None

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def blob_id(self) -> str:
        """Git's id of the blob, which for a large file is its pointer's."""
        data = self.pointer if self.sha256 else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A whole tree and where it comes from."""

    id: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """A repository: commits by id, branches and tags by name."""

    kind: str  # "models", "datasets", "spaces"
    id: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit id means."""
        name = re.sub(r"^refs/(heads|tags)/", "", revision)
        found = self.branches.get(name) or self.tags.get(name)
        if found is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = next((sha for sha in self.commits if sha.startswith(revision)), None)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found]

    def add_commit(self, branch: str, title: str, message: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        tree = sorted((path, file.blob_id) for path, file in files.items())
        sha = hashlib.sha1(repr((self.kind, self.id, parent, title, message, len(self.commits), tree)).encode())
        commit = Commit(sha.hexdigest(), parent, title, message, date, files)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit


@dataclass
class Fault:
    """A fault that waits for its request."""

    kind: str
    match: re.Pattern
    times: int | None
    options: dict
    fired: int = 0


@dataclass
class Request:
    """A request as it came in, and with what it was answered (`status` None: by a dropped connection)."""

    method: str
    target: str
    headers: dict[str, str]
    query: dict[str, list[str]]
    storage: bool = False
    body: bytes = b""
    status: int | None = None
    fault: str | None = None

    @property
    def line(self) -> str:
        return f"{self.method} {self.target}"

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Reply:
    """An answer; a file (`ranged`) may be asked for in part."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ranged: bool = False


class Refusal(Exception):
    """An error answer, with the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self.reply = as_json({"error": message, **body}, status, named)


class Dropped(Exception):
    """The connection ends here, without an answer."""


def as_json(data, status: int = 200, headers: dict | None = None) -> Reply:
    body = json.dumps(data, default=str).encode()
    return Reply(body, status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_ref_name(name: str) -> bool:
    """Whether git takes a name for a branch or tag: the rules of `git check-ref-format`."""
    parts = name.split("/")
    return (
        all(part and not part.startswith(".") and not part.endswith(".lock") for part in parts)
        and not re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|\.$", name)
        and not name.startswith("-")
        and name not in ("@", "HEAD")
    )


def flipped(data: bytes, at: int | None = None) -> bytes:
    """The same bytes but for one, by default the middle one."""
    at = len(data) // 2 if at is None else at
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def front_matter(text: str) -> dict | None:
    """The metadata of a card; None without any. ValueError when it is not a YAML mapping."""
    block = re.match(r"\s*---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    if block is None:
        return None
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise ValueError(f"YAML metadata cannot be read: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError("YAML metadata must be a mapping")
    return data


def card_errors(data: dict, kind: str) -> list[str]:
    """What the Hub would refuse in a card's metadata: the part of its rules that is documented."""
    errors = []
    for name in ("pipeline_tag", "library_name", "license_name", "license_link", "sdk", "title"):
        if name in data and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    for name in ("license", "tags", "language", "datasets", "metrics", "base_model"):
        values = data.get(name) if data.get(name) is not None else []
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{name}" must be a string or an array of strings')
    colours = ["red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"]
    if kind == "space":
        if data.get("sdk") not in ("gradio", "streamlit", "docker", "static"):
            errors.append('"sdk" must be one of [gradio, streamlit, docker, static]')
        for name in ("colorFrom", "colorTo"):
            if data.get(name, "red") not in colours:
                errors.append(f'"{name}" must be one of {colours}')
        if len(str(data.get("short_description", ""))) > 60:
            errors.append('"short_description" length must be less than or equal to 60 characters long')
    if "model-index" in data:
        from huggingface_hub.repocard_data import model_index_to_eval_results

        try:
            model_index_to_eval_results(data["model-index"])
        except Exception as error:  # whatever shape it has instead
            errors.append(f'"model-index" is malformed: {error!r}')
    return errors


class Hub:
    """The server's state and endpoints. See the module's docstring; other tests take it from the fixture `hub`."""

    user = "tester"
    organization = "org"

    def __init__(self, home: Path):
        self.home = home
        self.token = "hf_" + secrets.token_hex(17)
        self.stranger_token = "hf_" + secrets.token_hex(17)  # valid, but somebody else's: reads what is public
        self.repos: dict[str, Repo] = {}  # "org/name", "datasets/org/name", "spaces/org/name"
        self.objects: dict[str, bytes] = {}  # large files by the sha256 that their upload stated
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.waits: list[float] = []  # what the client in this process would have slept between attempts
        self.page_size = 1000
        self.lfs_threshold = 10_000_000
        self.multipart_threshold = 5_000_000_000
        self.chunk_size = 20_000_000
        self._lock = threading.RLock()
        self._parts: dict[tuple[str, int], bytes] = {}
        self._secret = secrets.token_bytes(16)
        self._servers = [_Server(self, storage=False), _Server(self, storage=True)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    # For tests

    def api(self, token: str | bool | None = None):
        """The real client on this Hub; `token=False` for nobody's."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.url, token=self.token if token is None else token)

    def env(self, **extra: str) -> dict[str, str]:
        """The environment of a child process whose Hub this is."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **extra,
        }

    def inject(self, fault: str, match: str = "", times: int | None = 1, **options) -> Fault:
        """Arms a fault for the requests that `match`; see the module's docstring."""
        if fault not in FAULTS:
            raise ValueError(f"fault must be one of {FAULTS}, got {fault!r}")
        self.faults.append(Fault(fault, re.compile(match), times, options))
        return self.faults[-1]

    def seen(self, match: str) -> list[Request]:
        """The requests so far that match."""
        return [request for request in self.requests if re.search(match, request.line)]

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        """A file as the server has it."""
        file = self.repos[repo].at(revision).files[path]
        return self.objects[file.sha256] if file.sha256 else file.data

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # Serving

    def answer(self, request: Request) -> Reply:
        """Routes a request, and turns refusals into answers."""
        path = urlsplit(request.target).path
        method = "GET" if request.method == "HEAD" else request.method
        try:
            if request.storage and "authorization" in request.headers:
                raise Refusal(400, "Only one auth mechanism allowed: a signed address takes no token")
            for verb, pattern, name in STORAGE_ROUTES if request.storage else ROUTES:
                found = pattern.fullmatch(path)
                if found and verb == method:
                    values = {key: value and unquote(value) for key, value in found.groupdict().items()}
                    with self._lock:
                        return getattr(self, f"_{name}")(request, **values)
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            return refusal.reply

    def fault_for(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if (fault.times is None or fault.fired < fault.times) and fault.match.search(request.line):
                    fault.fired += 1
                    request.fault = fault.kind
                    return fault
        return None

    def _signed(self, method: str, path: str) -> str:
        signature = hmac.new(self._secret, f"{method} {path}".encode(), "sha256").hexdigest()
        return f"{path}?signature={signature}"

    def _check_signature(self, request: Request) -> None:
        method = "GET" if request.method == "HEAD" else request.method
        if request.target != self._signed(method, urlsplit(request.target).path):
            raise Refusal(403, "SignatureDoesNotMatch")

    # Who may

    def _name(self, request: Request) -> str | None:
        """Whose token came along; None: nobody's."""
        header = request.headers.get("authorization")
        if header is None:
            return None
        names = {f"Bearer {self.token}": self.user, f"Bearer {self.stranger_token}": "stranger"}
        if header not in names:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return names[header]

    def _owns(self, name: str | None, namespace: str) -> bool:
        return namespace in ((self.user, self.organization) if name == self.user else (name,))

    def _require_write(self, request: Request, namespace: str) -> None:
        name = self._name(request)
        if name is None:
            raise Refusal(401, "Invalid username or password.")
        if not self._owns(name, namespace):
            raise Refusal(403, f"You don't have the rights to write to the namespace {namespace!r}")

    def _repo(self, request: Request, kind: str | None, id: str, write: bool = False, content: bool = False) -> Repo:
        """The repository, if the caller may know of it, write to it, read its files."""
        name = self._name(request)
        repo = self.repos.get(id if kind in (None, "models") else f"{kind}/{id}")
        owns = self._owns(name, id.split("/")[0])
        if repo is None or (repo.private and not owns):
            # Over https the client takes any 401 here for a missing repository; over http it needs the code.
            raise Refusal(404 if name else 401, "Repository not found", "RepoNotFound")
        if write:
            self._require_write(request, id.split("/")[0])
        if content and repo.gated and not owns:
            raise Refusal(403 if name else 401, f"Access to {id} is restricted", "GatedRepo")
        return repo

    # Accounts and repositories

    def _whoami(self, request: Request) -> Reply:
        name = self._name(request)
        if name is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": self.organization, "roleInOrg": "admin"}] if name == self.user else []
        role = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write" if orgs else "read"}}
        return as_json({"type": "user", "id": name, "name": name, "fullname": name, "orgs": orgs, "auth": role})

    def _validate_yaml(self, request: Request) -> Reply:
        body = request.json()
        try:
            data = front_matter(body["content"])
            errors = card_errors(data or {}, body["repoType"]) if data or body["repoType"] == "space" else []
        except ValueError as error:
            data, errors = {"unreadable": True}, [str(error)]
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        answer = {"errors": [{"message": error} for error in errors], "warnings": warnings}
        return as_json(answer, 400 if errors else 200)

    def _create_repo(self, request: Request) -> Reply:
        body = request.json()
        kind = body.get("type", "model") + "s"
        namespace = body.get("organization") or self._name(request) or ""
        self._require_write(request, namespace)
        id = f"{namespace}/{body['name']}"
        key = id if kind == "models" else f"{kind}/{id}"
        answer = {"url": f"{self.url}/{key}", "name": id, "id": id}
        if key in self.repos:
            raise Refusal(409, f"You already created this {kind[:-1]} repo", **answer)
        repo = Repo(kind, id, private=body.get("visibility") == "private", sdk=body.get("sdk"))
        repo.add_commit("main", "initial commit", "", {".gitattributes": File(len(GITATTRIBUTES), GITATTRIBUTES)})
        self.repos[key] = repo
        return as_json(answer)

    def _delete_repo(self, request: Request) -> Reply:
        body = request.json()
        kind = body.get("type", "model") + "s"
        id = f"{body.get('organization') or self._name(request)}/{body['name']}"
        repo = self._repo(request, kind, id, write=True)
        del self.repos[id if repo.kind == "models" else f"{kind}/{id}"]
        return as_json({})

    def _settings(self, request: Request, kind: str, id: str) -> Reply:
        repo, body = self._repo(request, kind, id, write=True), request.json()
        repo.private = body.get("visibility", "private" if repo.private else "public") == "private"
        repo.gated = bool(body.get("gated", repo.gated))
        return as_json({})

    def _auth_check(self, request: Request, kind: str, id: str, write: str | None) -> Reply:
        self._repo(request, kind, id, write=write is not None, content=True)
        return as_json({})

    def _list_repos(self, request: Request, kind: str) -> Reply:
        name, query = self._name(request), request.query
        author, words = query.get("author", [""])[0], query.get("search", [""])[0].lower()
        found = [
            self._describe(repo, repo.at("main"), blobs=False)
            for repo in self.repos.values()
            if repo.kind == kind
            and (not repo.private or self._owns(name, repo.id.split("/")[0]))
            and (not author or repo.id.split("/")[0] == author)
            and words in repo.id.lower()
        ]
        return self._page(request, found)

    def _repo_info(self, request: Request, kind: str, id: str, revision: str | None) -> Reply:
        repo = self._repo(request, kind, id)
        return as_json(self._describe(repo, repo.at(revision or "main"), blobs="blobs" in request.query))

    def _describe(self, repo: Repo, commit: Commit, blobs: bool) -> dict:
        siblings = []
        for path, file in sorted(commit.files.items()):
            more = {"size": file.size, "blobId": file.blob_id} if blobs else {}
            if blobs and file.sha256:
                more["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
            siblings.append({"rfilename": path, **more})
        readme = commit.files.get("README.md")
        card = (front_matter(readme.data.decode()) if readme and readme.data else None) or {}
        tags = card.get("tags") or []
        created = next(iter(repo.commits.values())).date
        info = {"_id": repo.id, "id": repo.id, "author": repo.id.split("/")[0], "sha": commit.id, "createdAt": created}
        info |= {"lastModified": commit.date, "private": repo.private, "gated": "auto" if repo.gated else False}
        info |= {"disabled": False, "downloads": 0, "likes": 0, "siblings": siblings, "cardData": card}
        info["tags"] = [tags] if isinstance(tags, str) else tags
        if repo.kind == "models":
            library = "transformers" if "config.json" in commit.files else None  # what the Hub infers without a card
            info |= {"library_name": library, **{n: card[n] for n in ("pipeline_tag", "library_name") if n in card}}
            info["model-index"] = card.get("model-index")
        if repo.kind == "spaces":
            info["sdk"] = card.get("sdk") or repo.sdk
        return info

    # Reading a revision

    def _page(self, request: Request, items: list) -> Reply:
        """One page of a list, and in the Link header the next."""
        start = int(request.query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.page_size < len(items):
            query = {**request.query, "cursor": [start + self.page_size]}
            address = f"{self.url}{urlsplit(request.target).path}?{urlencode(query, doseq=True)}"
            headers["Link"] = f'<{address}>; rel="next"'
        return as_json(items[start : start + self.page_size], headers=headers)

    @staticmethod
    def _entry(repo: Repo, commit: Commit, path: str, expand: bool) -> dict | None:
        """A file or folder as tree and paths-info state it; None: there is no such path."""
        file = commit.files.get(path)
        if file is not None:
            entry = {"type": "file", "path": path, "size": file.size, "oid": file.blob_id}
            if file.sha256:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
        else:
            below = sorted((p, f.blob_id) for p, f in commit.files.items() if p.startswith(f"{path}/"))
            if not below:
                return None
            oid = hashlib.sha1(repr(below).encode()).hexdigest()
            entry = {"type": "directory", "path": path, "size": 0, "oid": oid}
        if expand:
            entry["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
        return entry

    def _tree(self, request: Request, kind: str, id: str, revision: str, path: str | None) -> Reply:
        repo = self._repo(request, kind, id)
        commit = repo.at(revision)
        recursive, expand = (request.query.get(name) == ["true"] for name in ("recursive", "expand"))
        prefix = f"{path}/" if path else ""
        names = set()
        for name in commit.files:
            if name.startswith(prefix):
                parts = name.removeprefix(prefix).split("/")
                depths = range(1, len(parts) + 1) if recursive else [1]
                names |= {prefix + "/".join(parts[:depth]) for depth in depths}
        if path and not names:
            raise Refusal(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        return self._page(request, [self._entry(repo, commit, name, expand) for name in sorted(names)])

    def _paths_info(self, request: Request, kind: str, id: str, revision: str) -> Reply:
        repo = self._repo(request, kind, id)
        commit = repo.at(revision)
        form = parse_qs(request.body.decode())
        expand = form.get("expand") == ["true"]
        entries = [self._entry(repo, commit, path.rstrip("/"), expand) for path in form.get("paths", [])]
        return as_json([entry for entry in entries if entry])

    def _refs(self, request: Request, kind: str, id: str) -> Reply:
        repo = self._repo(request, kind, id)
        answer = {"converts": [], "pullRequests": []}
        for key, folder, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags)):
            answer[key] = [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": sha} for n, sha in refs.items()]
        return as_json(answer)

    def _commits(self, request: Request, kind: str, id: str, revision: str) -> Reply:
        repo = self._repo(request, kind, id)
        commit, listed = repo.at(revision), []
        while commit is not None:
            authors = [{"user": self.user}]
            listed.append({"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date})
            listed[-1]["authors"] = authors
            commit = repo.commits.get(commit.parent)
        return self._page(request, listed)

    def _resolve(self, request: Request, kind: str | None, id: str, revision: str, path: str) -> Reply:
        repo = self._repo(request, kind, id, content=True)
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{quote(Path(path).name)}"
        if file.sha256 is None:
            return Reply(file.data, headers={"ETag": f'"{file.blob_id}"', **headers}, ranged=True)
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        headers["Location"] = self.storage_url + self._signed("GET", f"/objects/{file.sha256}")
        return Reply(b"", 302, headers)

    # Writing

    def _preupload(self, request: Request, kind: str, id: str, revision: str) -> Reply:
        files = self._repo(request, kind, id, write=True).at(revision).files
        attributes = files[".gitattributes"].data.decode() if ".gitattributes" in files else ""
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        answer = []
        for wanted in request.json()["files"]:
            path, there = wanted["path"], files.get(wanted["path"])
            binary = b"\0" in base64.b64decode(wanted.get("sample", ""))
            large = binary or wanted["size"] > self.lfs_threshold
            large = large or any(fnmatch.fnmatch(Path(path).name, p) or fnmatch.fnmatch(path, p) for p in patterns)
            answer.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if there is not None:
                answer[-1]["oid"] = there.sha256 or there.blob_id
        return as_json({"files": answer})

    def _lfs_batch(self, request: Request, kind: str | None, id: str) -> Reply:
        self._repo(request, kind, id, write=True)
        body, transfer, objects = request.json(), "basic", []
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size, "authenticated": True})
            if oid in self.objects and sha256_of(self.objects[oid]) == oid:
                continue  # no actions: the client need not send it
            if size > self.multipart_threshold and "multipart" in body["transfers"]:
                transfer, count = "multipart", -(-size // self.chunk_size)
                href = self.url + self._signed("POST", f"/api/complete-multipart/{oid}")
                parts = [self.storage_url + self._signed("PUT", f"/uploads/{oid}/{n + 1}") for n in range(count)]
                header = {str(n): address for n, address in enumerate(parts, 1)}
                upload = {"href": href, "header": {"chunk_size": str(self.chunk_size), **header}}
            else:
                upload = {"href": self.storage_url + self._signed("PUT", f"/uploads/{oid}/0")}
            verify = f"{self.url}/{f'{kind}/' if kind else ''}{id}.git/info/lfs/objects/verify"
            objects[-1]["actions"] = {"upload": upload, "verify": {"href": verify}}
        return as_json({"transfer": transfer, "objects": objects})

    def _store(self, request: Request, oid: str, part: str) -> Reply:
        self._check_signature(request)
        if part == "0":
            self.objects[oid] = request.body
        else:
            self._parts[oid, int(part)] = request.body
        return Reply(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def _complete_multipart(self, request: Request, oid: str) -> Reply:
        self._check_signature(request)
        parts = []
        for part in sorted(request.json()["parts"], key=lambda part: part["partNumber"]):
            data = self._parts.pop((oid, part["partNumber"]), b"")
            if part["etag"].strip('"') != hashlib.md5(data).hexdigest():
                raise Refusal(400, f"Part {part['partNumber']} is not the one that was sent")
            parts.append(data)
        self.objects[oid] = b"".join(parts)
        return as_json({})

    def _lfs_verify(self, request: Request, kind: str | None, id: str) -> Reply:
        self._repo(request, kind, id, write=True)
        body = request.json()
        stored = self.objects.get(body["oid"])
        if stored is None or len(stored) != body["size"]:
            has = "nothing" if stored is None else f"{len(stored)} bytes"
            raise Refusal(422, f"Object {body['oid']} should have {body['size']} bytes, the storage has {has}")
        return as_json({})

    def _commit(self, request: Request, kind: str, id: str, revision: str) -> Reply:
        repo = self._repo(request, kind, id, write=True)
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = repo.at(revision)
        if revision not in repo.branches or "create_pr" in request.query:
            raise Refusal(400, "This server commits to branches only")
        if not head.id.startswith(header.get("parentCommit", head.id)):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            self._apply(line["key"], line["value"], files)
        commit = repo.add_commit(revision, header["summary"], header.get("description", ""), files)
        address = f"{self.url}/{f'{kind}/' if kind != 'models' else ''}{id}/commit/{commit.id}"
        return as_json({"success": True, "commitOid": commit.id, "commitUrl": address})

    def _apply(self, key: str, value: dict, files: dict[str, File]) -> None:
        """One line of a commit on a copy of the tree, which a refusal leaves behind unused."""
        path = value.get("path", "")
        if key == "file":
            data = base64.b64decode(value["content"])
            files[path] = File(len(data), data)
            if path == "README.md":
                try:
                    front_matter(data.decode())
                except ValueError as error:
                    raise Refusal(400, f"Invalid metadata in README.md: {error}") from error
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise Refusal(400, f"LFS pointer of {path} points to a file that was not uploaded")
            files[path] = File(len(self.objects[value["oid"]]), sha256=value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
            if not gone or (key == "deletedFile" and path not in files):
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]

    def _create_tag(self, request: Request, kind: str, id: str, name: str) -> Reply:
        repo = self._repo(request, kind, id, write=True)
        sha, tag = repo.at(name).id, request.json()["tag"]
        if not is_ref_name(tag):
            raise Refusal(400, f"Invalid tag name: {tag}")
        if tag in repo.tags:
            raise Refusal(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = sha
        return as_json({})

    def _delete_tag(self, request: Request, kind: str, id: str, name: str) -> Reply:
        repo = self._repo(request, kind, id, write=True)
        if repo.tags.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return as_json({})

    def _create_branch(self, request: Request, kind: str, id: str, name: str) -> Reply:
        repo = self._repo(request, kind, id, write=True)
        if not is_ref_name(name):
            raise Refusal(400, f"Invalid branch name: {name}")
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.at(request.json().get("startingPoint", "main")).id
        return as_json({})

    def _delete_branch(self, request: Request, kind: str, id: str, name: str) -> Reply:
        repo = self._repo(request, kind, id, write=True)
        if name == "main":
            raise Refusal(403, "The main branch cannot be deleted")
        if repo.branches.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return as_json({})

    # Storage

    def _fetch(self, request: Request, oid: str) -> Reply:
        self._check_signature(request)
        if oid not in self.objects:
            raise Refusal(404, "NoSuchKey")
        return Reply(self.objects[oid], headers={"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, ranged=True)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 on one connection: reads a request, lets the Hub answer it, and commits the faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 20  # an idle connection's thread ends by itself

    def log_message(self, *args) -> None:
        """`Hub.requests` is the log."""

    def _serve(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = parse_qs(urlsplit(self.path).query)
        request = Request(self.command, self.path, headers, query, self.server.storage)
        hub.requests.append(request)
        fault = hub.fault_for(request)
        kind, options = (fault.kind, fault.options) if fault else (None, {})
        try:
            if kind == "cut_upload":
                self._read_body(options.get("after", 0))
                raise Dropped
            request.body = self._read_body()
            if request.method == "PUT" and kind in ("truncate", "corrupt"):
                request.body = self._spoilt(request.body, kind, options)
            reply = self._refusal(**options) if kind == "status" else hub.answer(request)
            if kind == "drop_response":
                raise Dropped
            request.status = reply.status
            self._send(request, reply, kind, options)
        except (Dropped, ConnectionError, TimeoutError):
            self.close_connection = True
            self._drop()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self, limit: int | None = None) -> bytes:
        """The body, or its first `limit` bytes, with a length or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length if limit is None else min(limit, length))
            if limit is None and len(body) < length:
                raise Dropped  # the client is gone: nothing of a part counts
            return body
        body = b""
        while limit is None or len(body) < limit:
            size = self.rfile.readline()
            if not size.strip():
                raise Dropped
            length = int(size.split(b";")[0], 16)
            body += self.rfile.read(length)
            self.rfile.readline()
            if length == 0:
                break
        return body

    @staticmethod
    def _spoilt(body: bytes, kind: str, options: dict) -> bytes:
        return body[: options.get("after", len(body) // 2)] if kind == "truncate" else flipped(body, **options)

    @staticmethod
    def _refusal(status=500, message=None, error_code=None, retry_after=None, headers=None) -> Reply:
        defaults = {401: "Invalid credentials in Authorization header", 429: "Too many requests", 409: "Conflict"}
        headers = dict(headers or {}) | ({} if retry_after is None else {"Retry-After": str(retry_after)})
        return Refusal(status, message or defaults.get(status, f"Injected error {status}"), error_code, headers).reply

    def _send(self, request: Request, reply: Reply, kind: str | None, options: dict) -> None:
        body, headers, status = reply.body, dict(reply.headers), reply.status
        if kind == "wrong_sha":
            body = SHA256.sub(lambda m: sha256_of(m[0].encode()), body.decode()).encode() if not reply.ranged else body
            for name in {"ETag", "X-Linked-Etag"} & set(headers):
                headers[name] = SHA256.sub(lambda m: sha256_of(m[0].encode()), headers[name])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")) if reply.ranged else None
        if wanted and status == 200:
            first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            status = 206 if first <= last else 416
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}" if status == 206 else f"bytes */{len(body)}"
            body = body[first : last + 1] if status == 206 else b""
        if request.method == "GET" and kind in ("truncate", "corrupt"):
            body = self._spoilt(body, kind, options)
        request.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Request-Id": secrets.token_hex(8), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method == "HEAD":
            return
        if kind == "cut_download":
            self.wfile.write(body[: options.get("after", len(body) // 2)])
            if options.get("reset"):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())  # close() would wait for the files made of the socket
            raise Dropped
        self.wfile.write(body)

    def _drop(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was faster


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A listener; not http.server's own, whose start asks a name server for this machine's name."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, hub: Hub, storage: bool):
        self.hub, self.storage = hub, storage
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no news; anything else belongs in the test's output."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """An empty Hub that this process's `huggingface_hub` talks to, with its owner's token; retries do not sleep."""
    from huggingface_hub import HfFileSystem, close_session, constants, file_download, hf_api
    from huggingface_hub.utils import _http

    server = Hub(tmp_path_factory.mktemp("hf_home"))
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(server.home / "hub"),
        "HF_TOKEN_PATH": str(server.home / "token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, server.env()[name])
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # behind the functions, such as huggingface_hub.model_info
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=server.waits.append))
    HfFileSystem.clear_instance_cache()
    close_session()
    yield server
    close_session()
    server.close()
    unused = [f"{fault.kind} on {fault.match.pattern}" for fault in server.faults if not fault.fired]
    assert not unused, f"faults that met no request: {unused}"


@pytest.fixture
def hub_datasets(hub, monkeypatch):
    """The same Hub for the `datasets` library too, which keeps settings of its own."""
    config = pytest.importorskip("datasets").config
    cache = hub.home / "datasets"
    settings = {
        "HF_ENDPOINT": hub.url,
        "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_OFFLINE": False,
        "HF_DATASETS_CACHE": cache,
        "DOWNLOADED_DATASETS_PATH": cache / "downloads",
        "EXTRACTED_DATASETS_PATH": cache / "downloads" / "extracted",
        "HF_MODULES_CACHE": hub.home / "modules",
    }
    for name, value in settings.items():
        assert hasattr(config, name), f"datasets.config has no {name} any more"
        monkeypatch.setattr(config, name, value)
    return hub
