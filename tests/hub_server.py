"""The smallest Hub: what huggingface_hub 2.4 asks of one to make, fill and read model repositories, over real HTTP.

Everything is a regular file (no LFS, no Xet), and it holds everything in memory. What the real Hub also does and this
does not: it validates a card's metadata by its own schema, which nobody else has.
"""

import base64
import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by their ids, each the whole of its files; what branches and other refs point at; the commits' titles."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, changed: Files, title: str) -> str:
        files = {**self.files(ref), **changed}
        tree = "".join(f"{name} {blob_id(content)}\n" for name, content in sorted(files.items()))
        sha = hashlib.sha1(f"{self.refs.get(ref)}\n{title}\n{tree}".encode()).hexdigest()
        self.commits[sha], self.refs[ref], self.titles[sha] = files, sha, title
        return sha

    def files(self, revision: str = "main") -> Files:
        return self.commits.get(self.refs.get(revision, revision), {})


def blob_id(content: bytes) -> str:
    """Git's."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """A Hub on a free port.

    Attributes:
        owners: whose token is whose.
        repositories: by `owner/name`.
        failing: the status that a step answers with in place of doing it: "create", "branch", "preupload", "commit".
        requests: method and path of each.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.owners = {"hf_of_me": "me", "hf_of_you": "you"}
        self.repositories: dict[str, Repository] = {}
        self.failing: dict[str, int] = {}
        self.requests: list[str] = []


@contextmanager
def running_hub():
    hub = Hub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Refused(Exception):
    """A status, and the Hub's code and words for it."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        """Nothing at the terminal."""

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        try:
            self.route(parts)
        except Refused as refused:
            headers = {"X-Error-Message": str(refused), **({"X-Error-Code": refused.code} if refused.code else {})}
            self.reply({"error": str(refused)}, refused.status, headers)

    def reply(self, body, status=200, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who may do what

    def asks(self) -> str | None:
        """Who; None is nobody."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.owners:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.owners.get(token)

    def repository(self, name: str) -> Repository:
        """One that whoever asks may see; of others nobody learns whether they exist."""
        asks, found = self.asks(), self.server.repositories.get(name)
        if found is None or (found.private and asks != name.split("/", 1)[0]):
            raise Refused(404 if asks else 401, "Repository not found", "RepoNotFound")
        return found

    def writes(self, step: str, owner: str) -> None:
        if step in self.server.failing:
            raise Refused(
                self.server.failing[step], "Internal Error - We're working hard to fix this as soon as possible!"
            )
        asks = self.asks()
        if asks is None:
            raise Refused(401, "Invalid username or password.")
        if asks != owner:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')

    def at(self, repository: Repository, revision: str) -> str:
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # What is asked

    def route(self, parts: list[str]) -> None:
        match (self.command, *parts):
            case ("GET", "api", "whoami-v2"):
                asks = self.asks()
                if asks is None:
                    raise Refused(401, "Invalid username or password.")
                self.reply({"type": "user", "name": asks, "orgs": []})
            case ("POST", "api", "repos", "create"):
                self.create(json.loads(self.content))
            case ("POST", "api", "validate-yaml"):
                card = json.loads(self.content)["content"]
                yaml.safe_load(card.split("---\n")[1])
                self.reply({"errors": [], "warnings": []})
            case ("POST", "api", "models", owner, name, "branch", branch):
                self.writes("branch", owner)
                repository = self.repository(f"{owner}/{name}")
                if branch in repository.refs:
                    raise Refused(409, f"Reference already exists: {branch}")
                repository.refs[branch] = repository.refs["main"]
                self.reply({})
            case ("POST", "api", "models", owner, name, "preupload", _):
                self.writes("preupload", owner)
                asked = json.loads(self.content)["files"]
                answers = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
                self.reply({"files": answers})
            case ("POST", "api", "models", owner, name, "commit", revision):
                self.writes("commit", owner)
                self.commit(f"{owner}/{name}", revision)
            case ("GET", "api", "models", owner, name, *at) if not at or at[0] == "revision":
                repository = self.repository(f"{owner}/{name}")
                sha = self.at(repository, at[1] if at else "main")
                names = [{"rfilename": file} for file in repository.commits[sha]]
                found = {"id": f"{owner}/{name}", "sha": sha, "private": repository.private, "siblings": names}
                self.reply({**found, "tags": [], "downloads": 0, "likes": 0})
            case ("GET", "api", "models", owner, name, "tree", revision):
                repository = self.repository(f"{owner}/{name}")
                files = repository.commits[self.at(repository, revision)]
                self.reply([
                    {"type": "file", "path": file, "size": len(content), "oid": blob_id(content)}
                    for file, content in files.items()
                ])  # fmt: skip
            case ("GET" | "HEAD", owner, name, "resolve", revision, *file):
                repository = self.repository(f"{owner}/{name}")
                sha = self.at(repository, revision)
                content = repository.commits[sha].get("/".join(file))
                if content is None:
                    raise Refused(404, "Entry not found", "EntryNotFound")
                self.reply(content, headers={"X-Repo-Commit": sha, "ETag": f'"{blob_id(content)}"'})
            case _:
                raise Refused(404, f"no such endpoint: {self.command} {self.path}")

    def create(self, asked: dict) -> None:
        owner = asked["organization"] or self.asks() or ""
        self.writes("create", owner)
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            self.reply({"error": "You already created this model repo", **url}, 409)
            return
        repository = self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b""}, "initial commit")
        self.reply(url)

    def commit(self, name: str, revision: str) -> None:
        header, *lines = (json.loads(line) for line in self.content.splitlines())
        repository = self.repository(name)
        self.at(repository, revision)
        assert {line["key"] for line in lines} == {"file"}
        added = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines}
        sha = repository.commit(revision, added, header["value"]["summary"])
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""})
