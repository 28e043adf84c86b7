"""A server on this machine that speaks the protocol of the Hugging Face hub, as far as huggingface_hub uses it for models.

Written after that client (2.4.0). Large files go the way of Git LFS, so a client needs HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "other")  # some of those that the hub accepts
INITIAL = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


class Repository:
    """branches: name -> commit. commits: commit -> path -> content."""

    def __init__(self, private: bool):
        self.private = private
        self.branches: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.commit("main", dict(INITIAL))

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        state = repr((len(self.commits), sorted((path, hashlib.sha1(data).digest()) for path, data in files.items())))
        sha = hashlib.sha1(state.encode()).hexdigest()
        self.branches[branch] = sha
        self.commits[sha] = files
        return sha


class Hub(ThreadingHTTPServer):
    """`accounts`: token -> (name, role of the token). `damaged`: paths of which one bit is flipped on the way.

    `refused`: paths of POST that fail.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.accounts = {"writer": ("org", "write"), "reader": ("org", "read"), "stranger": ("else", "write")}
        self.damaged: set[str] = set()
        self.refused: set[str] = set()
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, identity: str, branch: str = "main") -> dict[str, bytes]:
        """The content of a branch, without what the hub itself puts there."""
        repository = self.repositories[identity]
        files = repository.commits[repository.branches[branch]]
        return {path: data for path, data in files.items() if path not in INITIAL}

    def commit_of(self, identity: str, branch: str = "main") -> str:
        return self.repositories[identity].branches[branch]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def account(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.server.accounts.get(token)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def send(self, content: Any = b"", status: int = 200, **headers: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, code: str, message: str = "") -> None:
        self.send({"error": message or code}, status, X_Error_Code=code, X_Error_Message=message or code)

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        if path in self.server.refused and self.command == "POST":
            self.send({"error": "Internal Error"}, 500)
        elif path == "/api/whoami-v2":
            self.whoami()
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/(?:cdn|lfs)/(\w+)", path):
            self.large_file(match[1], body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body)["objects"])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+)(?:/(.*))?)?", path):
            self.model(match[1], match[2] or "revision", match[3] or "main", body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        else:
            self.fail(404, "NotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def whoami(self) -> None:
        account = self.account()
        if account is None:
            self.fail(401, "Unauthorized", "Invalid credentials in Authorization header")
            return
        name, role = account
        self.send({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def validate(self, content: str) -> None:
        """The parts of the hub's rules that a card of ours could break."""
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else {}
        errors = []
        if metadata.get("license", "other") not in LICENCES:
            errors.append({"message": f'"license" must be one of {LICENCES}'})
        self.send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self, wanted: dict[str, Any]) -> None:
        account = self.account()
        identity = f"{wanted['organization']}/{wanted['name']}"
        if account != (wanted["organization"], "write"):
            self.fail(403, "Forbidden", "You don't have the rights to create a model under this namespace")
        elif identity in self.server.repositories:
            self.send({"url": f"{self.server.address}/{identity}", "error": "You already created this model repo"}, 409)
        else:
            self.server.repositories[identity] = Repository(wanted.get("visibility") == "private")
            self.send({"url": f"{self.server.address}/{identity}"})

    def batch(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for wanted in objects:
            here = (
                {}
                if wanted["oid"] in self.server.large
                else {"upload": {"href": f"{self.server.address}/lfs/{wanted['oid']}"}}
            )
            answers.append({**wanted, "actions": here} if here else wanted)
        self.send({"transfer": "basic", "objects": answers})

    def large_file(self, sha: str, body: bytes) -> None:
        if self.command == "PUT":
            assert sha256(body) == sha
            self.server.large[sha] = body
            self.send()
            return
        data = bytearray(self.server.large[sha])
        if sha in self.server.damaged:
            data[-5] ^= 1
        self.send(bytes(data))

    def model(self, identity: str, action: str, revision: str, body: bytes) -> None:
        account = self.account()
        repository = self.server.repositories.get(identity)
        if repository is None or (repository.private and account is None):
            self.fail(404, "RepoNotFound", "Repository not found")
            return
        may_write = account == (identity.partition("/")[0], "write")
        if action == "auth-check":
            self.send({}) if may_write else self.fail(403, "Forbidden", "Forbidden: pass a token that may write")
            return
        if action == "branch":
            if revision in repository.branches:
                self.send({}, 409)
            else:
                repository.branches[revision] = repository.branches["main"]
                self.send({})
            return
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repository.commits[sha]
        if action == "revision":
            self.send(
                {
                    "id": identity,
                    "sha": sha,
                    "private": repository.private,
                    "siblings": [{"rfilename": name} for name in files],
                }
            )
        elif action == "tree":
            self.send([self.entry(path, data) for path, data in files.items()])
        elif action == "preupload":
            wanted = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if is_large(file["path"]) else "regular" for file in wanted}
            self.send(
                {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
            )
        elif action == "commit" and may_write:
            self.commit(identity, repository, revision, dict(files), [json.loads(line) for line in body.splitlines()])
        else:
            self.fail(403, "Forbidden")

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        large = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}}
        return {"type": "file", "path": path, "size": len(data), "oid": blob(data)} | (large if is_large(path) else {})

    def commit(
        self, identity: str, repository: Repository, branch: str, files: dict[str, bytes], lines: list[dict]
    ) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(branch, files)
        self.send({"commitUrl": f"{self.server.address}/{identity}/commit/{sha}", "commitOid": sha, "success": True})

    def resolve(self, identity: str, revision: str, path: str) -> None:
        repository = self.server.repositories[identity]
        sha = repository.branches.get(revision, revision)
        data = repository.commits[sha].get(path)
        if data is None:
            self.fail(404, "EntryNotFound")
        elif is_large(path):
            name = sha256(data)
            place = f"http://localhost:{self.server.server_port}/cdn/{name}"  # another host, as the real one
            linked = {"X_Linked_Etag": f'"{name}"', "X_Linked_Size": len(data), "X_Repo_Commit": sha}
            self.send(status=302, Location=place, **linked)
        else:
            self.send(data, ETag=f'"{blob(data)}"', X_Repo_Commit=sha)
