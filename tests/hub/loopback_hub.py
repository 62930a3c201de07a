"""A Hub on 127.0.0.1: the endpoints that `huggingface_hub` uses to create, upload and download, and nothing else.

Files that git would keep in LFS (weights) are uploaded as the real Hub asks for it: a batch request, a PUT to the
address it answers, and a reference in the commit.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKENS = {"hf_writer": "write", "hf_reader": "read"}
LFS_SUFFIXES = (".safetensors", ".onnx", ".bin", ".data")


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves at `hub.url`.

    Attributes:
        repos: id to {"private": bool, "branches": {name: {path: content}}}.
        objects: sha256 to content of everything ever uploaded to LFS.
        requests: (method, path) of every request, in order.
        fail: a regular expression; the first request whose "METHOD path" it matches is answered with 500.
    """

    def __init__(self):
        self.repos, self.objects, self.requests, self.fail = {}, {}, [], None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        self.repos[repo_id] = {"private": private, "branches": {"main": dict(files)}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=None, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str):
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        if self.hub.fail and re.search(self.hub.fail, f"{self.command} {path}"):
            self.hub.fail = None
            return self.refuse(500, "Internal", "the loopback Hub was told to fail")
        rights = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        for method, pattern, needs, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                if needs == "write" and rights is None:
                    return self.refuse(401, "", "Invalid username or password.")
                if needs == "write" and rights != "write":
                    return self.refuse(403, "", "Forbidden: this token cannot write.")
                names = match.groupdict()
                if "repo" in names and not self.visible(names["repo"], rights):
                    return self.refuse(401 if rights is None else 404, "RepoNotFound", "Repository not found")
                return handle(self, body, **names)
        return self.refuse(404, "", f"no such endpoint: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def visible(self, repo: str, rights: str | None) -> bool:
        return repo in self.hub.repos and (rights is not None or not self.hub.repos[repo]["private"])

    def files(self, repo: str, revision: str):
        """The files of a branch, or of a commit by its hash; None after refusing."""
        branches = self.hub.repos[repo]["branches"]
        for name, files in branches.items():
            if revision in (name, _commit(files)):
                return files
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    # Endpoints.

    def create(self, body):
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.add(repo, {}, private)
        return self.answer(200, {"url": f"{self.hub.url}/{repo}"})

    def whoami(self, body):
        self.answer(200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate(self, body):
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, body, repo, branch):
        branches = self.hub.repos[repo]["branches"]
        if branch in branches:
            return self.answer(409, {"error": "exists"})
        branches[branch] = dict(branches["main"])
        return self.answer(200)

    def preupload(self, body, repo, revision):
        if self.files(repo, revision) is None:
            return
        files = json.loads(body)["files"]
        modes = ["lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular" for file in files]
        answers = [
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False} for file, mode in zip(files, modes)
        ]
        self.answer(200, {"files": answers})

    def batch(self, body, repo):
        objects = []
        for wanted in json.loads(body)["objects"]:
            known = wanted["oid"] in self.hub.objects
            upload = {} if known else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
            objects.append({**wanted, **upload})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "", "content and oid differ")
        self.hub.objects[oid] = body
        return self.answer(200)

    def commit(self, body, repo, revision):
        files = self.files(repo, revision)
        if files is None:
            return
        changed = dict(files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                changed[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.repos[repo]["branches"][revision] = changed
        commit = _commit(changed)
        self.answer(
            200,
            {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None},
        )

    def info(self, body, repo, revision="main"):
        files = self.files(repo, revision)
        if files is not None:
            siblings = [{"rfilename": path} for path in files]
            private = self.hub.repos[repo]["private"]
            self.answer(200, {"id": repo, "sha": _commit(files), "private": private, "siblings": siblings, "tags": []})

    def tree(self, body, repo, revision):
        files = self.files(repo, revision)
        if files is not None:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            self.answer(200, entries)

    def resolve(self, body, repo, revision, path):
        files = self.files(repo, revision)
        if files is None:
            return
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(200, content, {"ETag": etag, "X-Repo-Commit": _commit(files)})

    def discussions(self, body, repo):
        self.answer(200, {"discussions": [], "count": 0, "start": 0})


def _commit(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + b"\0" + hashlib.sha1(files[path]).digest())
    return digest.hexdigest()


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "write", _Handler.whoami),
    ("POST", r"/api/validate-yaml", None, _Handler.validate),
    ("POST", r"/api/repos/create", "write", _Handler.create),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)", "write", _Handler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", "write", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "write", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", None, _Handler.put),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", "write", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}", None, _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", None, _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}", None, _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/discussions", None, _Handler.discussions),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", None, _Handler.resolve),
    ("HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", None, _Handler.resolve),
]
