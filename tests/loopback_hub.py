"""A Hub on the loopback interface: enough of its HTTP API to push, list, tag and download, with git-LFS transfers.

`huggingface_hub` reads its endpoint at import, so the code under test runs in a process of its own:

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "script.py"], env=os.environ | hub.environment(tmp_path), check=True)
    hub.files("me/name")  # what was pushed: {path: bytes}

Everything is kept in memory. Writing needs the token; reading needs it where a repository is private, and is refused to
everybody where it is gated and access was not given. `faults` breaks connections on purpose. Xet transfers are not
spoken: `environment` turns them off.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
USER = "me"
# As the Hub's default .gitattributes: these go through LFS whatever their size.
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".onnx", ".npy", ".npz", ".arrow", ".zip", ".tar")
REPO = r"(?P<owner>[^/]+)/(?P<name>[^/]+)"


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """git's object id: of the file, or of the pointer that stands for it."""
        data = self.data
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
            data = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def entry(self, path: str) -> dict:
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        return entry | ({"lfs": lfs} if self.lfs else {})


@dataclass
class Repository:
    kind: str  # "model", "dataset" or "space"
    name: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # commit id -> path -> file
    titles: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, Blob], title: str) -> str:
        parent = self.branches.get(branch, "")
        listing = sorted((path, blob.oid) for path, blob in tree.items())
        oid = hashlib.sha1(json.dumps([len(self.commits), parent, title, listing]).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        self.titles.append(title)
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit id of a branch, tag or commit."""
        oid = self.branches.get(revision) or self.tags.get(revision)
        return oid or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens to the next `times` requests of this method whose path the pattern is found in.

    "refuse": the connection is closed unanswered. "lose": it is closed after the work was done. "cut": half of the
    answer's body arrives. "busy": 503.
    """

    method: str
    pattern: str
    kind: str
    times: int = 1


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, ({"X-Error-Code": code} if code else {}) | headers


class LoopbackHub:
    """The server; a context manager. `requests` holds (method, path) of every request, `unknown` those not served."""

    def __init__(self, lfs_bytes: int = 10_000_000):
        self.lfs_bytes = lfs_bytes  # Files of this size and more are uploaded through LFS.
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}  # sha256 -> content
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.gated: set[str] = set()  # names of repositories that nobody has been given access to
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # a client that went away
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # Another host than the endpoint's, as on the Hub: clients follow redirects within the endpoint by themselves.
        self.storage = f"http://localhost:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: str | Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that send a process to this Hub, with caches of its own under `home`."""
        return ({} if token is None else {"HF_TOKEN": token}) | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        repository = self.repositories[kind, name]
        return {path: blob.data for path, blob in repository.commits[repository.resolve(revision)].items()}

    def state(self, name: str) -> tuple | None:
        """All that a push can change of a model's repository, to compare; None where there is none."""
        repository = self.repositories.get(("model", name))
        return repository and (self.files(name), dict(repository.tags), repository.private)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub
    disable_nagle_algorithm = True  # or each answer waits for the 40 ms of a delayed acknowledgement

    def log_message(self, *args):
        pass

    def handle_request(self):
        body = self._read_body()
        path = unquote(urlsplit(self.path).path) if "/resolve/" not in self.path else urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
            self.fault = self._next_fault()
            if self.fault == "refuse":
                return self._hang_up()
            try:
                if self.fault == "busy":
                    raise HubError(503, "The server is busy.")
                for method, pattern, action in ROUTES:
                    if self.command in method and (match := re.fullmatch(pattern, path)):
                        # whoami and the YAML check write nothing; the signed address of an upload carries no token.
                        if self.command not in ("GET", "HEAD") and not path.startswith("/lfs/"):
                            self._require_token()
                        return action(self, body, **match.groupdict())
                self.hub.unknown.append((self.command, self.path))
                raise HubError(404, f"{self.command} {path} is not served here")
            except HubError as error:
                self._send(error.status, {"error": str(error)}, {"X-Error-Message": str(error)} | error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def _next_fault(self) -> str | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.pattern, self.path):
                fault.times -= 1
                return fault.kind
        return None

    def _hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content=b"", headers: dict[str, str] | None = None, length: int | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.fault == "lose":
            return self._hang_up()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.fault == "cut" else data)
        if self.fault == "cut":
            self._hang_up()

    def _require_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid username or password.")

    def _repository(self, kind: str | None, owner: str, name: str) -> Repository:
        kind = (kind or "models").strip("/").removesuffix("s")
        repository = self.hub.repositories.get((kind, f"{owner}/{name}"))
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Repository not found", "RepoNotFound")  # a stranger is not told that it exists
        return repository

    def _commit_id(self, repository: Repository, revision: str) -> str:
        oid = repository.resolve(unquote(revision))
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # Account and repositories

    def whoami(self, body):
        self._require_token()
        access = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        self._send(200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": access})

    def validate_yaml(self, body):
        self._send(200, {"errors": [], "warnings": []})

    def create(self, body):
        wish = json.loads(body)
        kind, name = wish.get("type") or "model", f"{wish.get('organization') or USER}/{wish['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repositories:
            return self._send(409, {"error": "You already created this repo", "url": url})
        private = wish.get("visibility") == "private" or bool(
            wish.get("private")
        )  # the newer clients' word, the older ones'
        repository = Repository(kind, name, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repository.commit("main", {".gitattributes": Blob(attributes.encode(), lfs=False)}, "initial commit")
        self.hub.repositories[kind, name] = repository
        self._send(200, {"url": url, "name": name, "id": name})

    def delete(self, body):
        wish = json.loads(body)
        kind, owner = wish.get("type") or "model", wish.get("organization") or USER
        self._repository(f"{kind}s", owner, wish["name"])
        del self.hub.repositories[kind, f"{owner}/{wish['name']}"]
        self._send(200, {})

    def info(self, body, kind, owner, name, revision=None):
        repository = self._repository(kind, owner, name)
        oid = self._commit_id(repository, revision or "main")
        tree = repository.commits[oid]
        card = {}
        readme = tree["README.md"].data.decode() if "README.md" in tree else ""
        if readme.startswith("---\n"):
            card = yaml.safe_load(readme.split("---\n")[1]) or {}
        details = {
            "id": repository.name,
            "sha": oid,
            "private": repository.private,
            "gated": "manual" if repository.name in self.hub.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "cardData": card,
            "siblings": [{"rfilename": path, "size": len(blob.data)} for path, blob in sorted(tree.items())],
        }
        for key in ("pipeline_tag", "library_name"):
            details |= {key: card[key]} if key in card else {}
        self._send(200, details)

    def refs(self, body, kind, owner, name):
        repository = self._repository(kind, owner, name)

        def listed(refs, where):
            return [{"name": ref, "ref": f"refs/{where}/{ref}", "targetCommit": oid} for ref, oid in refs.items()]

        branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
        self._send(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def tag(self, body, kind, owner, name, revision):
        repository, wish = self._repository(kind, owner, name), json.loads(body)
        if wish["tag"] in repository.tags:
            raise HubError(409, "Tag already exists")
        repository.tags[wish["tag"]] = self._commit_id(repository, revision)
        self._send(200, {})

    def delete_tag(self, body, kind, owner, name, tag):
        del self._repository(kind, owner, name).tags[unquote(tag)]
        self._send(200, {})

    def branch(self, body, kind, owner, name, revision):
        repository, wish = self._repository(kind, owner, name), json.loads(body or b"{}")
        if revision in repository.branches:
            raise HubError(409, "Branch already exists")
        repository.branches[revision] = self._commit_id(repository, wish.get("startingPoint") or "main")
        self._send(200, {})

    # Uploading

    def preupload(self, body, kind, owner, name, revision):
        repository = self._repository(kind, owner, name)
        tree = repository.commits[self._commit_id(repository, revision)]
        answers = []
        for file in json.loads(body)["files"]:
            large = file["size"] >= self.hub.lfs_bytes or file["path"].endswith(LFS_SUFFIXES)
            present = tree.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": present and (present.sha256 if present.lfs else present.oid),
                }
            )
        self._send(200, {"files": answers})

    def lfs_batch(self, body, kind, owner, name):
        self._repository(kind, owner, name)
        objects = []
        for wish in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.storage}/lfs/objects/{wish['oid']}"}
            verify = {"href": f"{self.hub.endpoint}/lfs/verify"}
            stored = wish["oid"] in self.hub.large_files
            objects.append(wish if stored else wish | {"actions": {"upload": upload, "verify": verify}})
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "The content does not match its sha256.")
        self.hub.large_files[oid] = body
        self._send(200)

    def lfs_verify(self, body):
        wish = json.loads(body)
        if len(self.hub.large_files.get(wish["oid"], b"")) != wish["size"]:
            raise HubError(404, "The object was not uploaded.")
        self._send(200, {})

    def commit(self, body, kind, owner, name, revision):
        repository = self._repository(kind, owner, name)
        parent = self._commit_id(repository, revision)
        tree, title = dict(repository.commits[parent]), ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise HubError(400, f"{value['path']}: the LFS object was not uploaded.")
                tree[value["path"]] = Blob(self.hub.large_files[value["oid"]], lfs=True)
            elif key == "deletedFile":
                if value["path"] not in tree:
                    raise HubError(404, f"{value['path']} does not exist", "EntryNotFound")
                del tree[value["path"]]
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                tree = {path: blob for path, blob in tree.items() if not path.startswith(folder)}
            else:
                raise HubError(400, f"Unknown operation {key}")
        oid = repository.commit(revision, tree, title)
        url = f"{self.hub.endpoint}/{repository.name}/commit/{oid}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    # Downloading

    def tree(self, body, kind, owner, name, revision, folder=None):
        repository = self._repository(kind, owner, name)
        tree = repository.commits[self._commit_id(repository, revision)]
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, blob in sorted(tree.items()):
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    directory = prefix + "/".join(parts[:depth])
                    oid = hashlib.sha1(directory.encode()).hexdigest()
                    entries[directory] = {"type": "directory", "path": directory, "size": 0, "oid": oid}
                if recursive or len(parts) == 1:
                    entries[path] = blob.entry(path)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self._send(200, list(entries.values()))

    def paths_info(self, body, kind, owner, name, revision):
        repository = self._repository(kind, owner, name)
        tree = repository.commits[self._commit_id(repository, revision)]
        if "json" in (self.headers.get("Content-Type") or ""):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode()).get("paths", [])
        entries = [tree[path].entry(path) for path in paths if path in tree]
        for path in paths:
            if path not in tree and any(other.startswith(f"{path}/") for other in tree):
                oid = hashlib.sha1(path.encode()).hexdigest()
                entries.append({"type": "directory", "path": path, "size": 0, "oid": oid})
        self._send(200, entries)

    def resolve(self, body, kind, owner, name, revision, path):
        repository = self._repository(kind, owner, name)
        if repository.name in self.hub.gated:
            raise HubError(403, f"Access to model {repository.name} is restricted.", "GatedRepo")
        oid = self._commit_id(repository, revision)
        blob, headers = repository.commits[oid].get(unquote(path)), {"X-Repo-Commit": oid}
        if blob is None:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", **headers)
        if blob.lfs:
            headers |= {
                "Location": f"{self.hub.storage}/lfs/objects/{blob.sha256}",
                "X-Linked-Size": str(len(blob.data)),
                "X-Linked-Etag": f'"{blob.sha256}"',
            }
            return self._send(302, b"", headers)
        self._send_file(blob.data, headers | {"ETag": f'"{blob.oid}"'})

    def lfs_get(self, body, oid):
        if oid not in self.hub.large_files:
            raise HubError(404, "No such object")
        self._send_file(self.hub.large_files[oid], {"ETag": f'"{oid}"'})

    def _send_file(self, data: bytes, headers: dict[str, str]):
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first >= len(data):
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], headers)


API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"
FILE = rf"/(?P<kind>datasets/|spaces/)?{REPO}"
ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("DELETE",), r"/api/repos/delete", _Handler.delete),
    (("POST",), rf"{API}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"{API}/commit/(?P<revision>.+)", _Handler.commit),
    (("POST",), rf"{API}/tag/(?P<revision>.+)", _Handler.tag),
    (("DELETE",), rf"{API}/tag/(?P<tag>.+)", _Handler.delete_tag),
    (("POST",), rf"{API}/branch/(?P<revision>.+)", _Handler.branch),
    (("POST",), rf"{API}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    (("GET",), rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("GET",), rf"{API}/refs", _Handler.refs),
    (("GET",), rf"{API}(?:/revision/(?P<revision>.+))?", _Handler.info),
    (("POST",), rf"{FILE}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs/objects/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (("POST",), r"/lfs/verify", _Handler.lfs_verify),
    (("GET", "HEAD"), r"/lfs/objects/(?P<oid>[0-9a-f]{64})", _Handler.lfs_get),
    (("GET", "HEAD"), rf"{FILE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
