"""A Hub on this machine, for tests: the routes of huggingface.co that the official client uses, in their own process.

It has repositories with commits, branches, tags, pull requests, private and gated ones, tokens, regular uploads, LFS in
one part and in many, Xet (`hub_xet`), ranges, the check of a card's metadata, and faults on demand. `Hub` starts it:

    with Hub() as hub:
        hub.add("me/digits", {"digits.popup.safetensors": data})
        subprocess.run(command, env=hub.environment(home, token="hf_me"))
        hub.fail("GET /me/digits/resolve/", status=503)

Where huggingface_hub runs in the test's own process, `hub.here(monkeypatch, home)` points it at this server.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from hub_xet import XetStore, Xorb

TOKENS = {  # token: user, and whether it may write
    "hf_me": ("me", True),
    "hf_reader": ("me", False),
    "hf_other": ("other", True),
}
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".npy", ".npz", ".zip", ".gz", ".tar", ".h5", ".onnx")
PIPELINES = (
    "image-classification",
    "image-feature-extraction",
    "image-segmentation",
    "object-detection",
    "text-classification",
    "zero-shot-image-classification",
    "other",
)
RELATIONS = ("adapter", "merge", "quantized", "finetune")
LICENSES = (
    *[
        "apache-2.0",
        "mit",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "gpl-3.0",
    ],
    *["agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail", "unlicense", "other", "unknown"],
)
REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def git_oid(data: bytes) -> str:
    """What git calls a blob of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file at a commit: `sha256` is set if it is stored as a large file."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    files: dict[str, Entry]
    author: str
    date: str


@dataclass
class Repo:
    kind: str
    name: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/…, refs/pr/1: commits
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    def commit_of(self, revision: str) -> Commit | None:
        """What a branch, a tag, a ref or a commit, in full or from its beginning, names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            return next((commit for sha, commit in self.commits.items() if sha.startswith(revision)), None)
        return None

    def add(self, ref: str, files: dict[str, Entry], title: str, message: str, author: str) -> Commit:
        parent = self.refs.get(ref)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        sha = hashlib.sha1(repr((self.name, ref, parent, title, date, sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, message, files, author, date)
        self.refs[ref] = sha
        return self.commits[sha]


@dataclass
class Fault:
    """What happens instead, to requests ("GET /path?query") that `match` is found in, `times` times (None: always)."""

    match: str
    times: int | None = None
    status: int | None = None  # answer this
    headers: dict[str, str] = field(default_factory=dict)  # beside the answer's own, or in their place
    text: str = ""  # the body of the answer `status`
    break_after: int | None = None  # cut the connection after so many bytes of the body
    delay: float = 0  # seconds before the answer
    content: str | None = None  # base64: serve these bytes in place of the file's
    endless: bool = False  # after the body send zeros, in chunks, until the client hangs up


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, error: str, code: str | None = None, body: dict[str, Any] | None = None) -> None:
        self.status, self.error, self.code, self.body = status, error, code, body


class State:
    """All that the server knows."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # regular files by git's name
        self.large: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet = XetStore()
        self.granted: set[tuple[str, str]] = set()  # (user, gated repository)
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []
        self.page = 1000  # entries of a listing that are sent at once
        self.multipart = 20_000_000  # from this size on, LFS uploads are in parts
        self.part = 5_000_000

    def data(self, entry: Entry) -> bytes:
        if entry.sha256 is None:
            return self.blobs[entry.oid]
        if entry.sha256 in self.large:
            return self.large[entry.sha256]
        name = self.xet.by_sha256(entry.sha256)
        assert name is not None, "a commit names only what was uploaded"
        return self.xet.content(name)

    def regular(self, data: bytes) -> Entry:
        self.blobs[git_oid(data)] = data
        return Entry(git_oid(data), len(data))

    def lfs(self, sha256: str, size: int | None = None) -> Entry:
        """The entry of an object that was uploaded before. Raises Refused if it was not."""
        if sha256 in self.large:
            actual = len(self.large[sha256])
        elif (name := self.xet.by_sha256(sha256)) is not None:
            actual = self.xet.files[name].size
        else:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        if size is not None and size != actual:
            raise Refused(400, f"object {sha256} has {actual} bytes, not {size}")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {actual}\n"
        return Entry(git_oid(pointer.encode()), actual, sha256)


def front_matter(text: str) -> Any:
    """The YAML block at a card's beginning; None without one."""
    match = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|$)", text, re.DOTALL)
    return yaml.safe_load(match.group(1)) if match else None


def card_errors(data: Any) -> Iterator[str]:
    """What the Hub has against a model card's metadata, as huggingface.co/docs/hub/model-cards describes it."""
    if not isinstance(data, dict):
        yield "the metadata must be an object"
        return
    for key in ("license", "library_name", "pipeline_tag", "license_name", "license_link"):
        if key in data and not isinstance(data[key], str):
            yield f'"{key}" must be a string'
    for key in ("tags", "metrics"):
        if key in data and not (isinstance(data[key], list) and all(isinstance(tag, str) for tag in data[key])):
            yield f'"{key}" must be an array of strings'
    if isinstance(data.get("license"), str) and data["license"] not in LICENSES:
        yield f'"license" must be one of [{", ".join(LICENSES)}]'
    if isinstance(data.get("pipeline_tag"), str) and data["pipeline_tag"] not in PIPELINES:
        yield f'"pipeline_tag" must be one of [{", ".join(PIPELINES)}]'
    for key in ("datasets", "base_model"):
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not (isinstance(value, str) and REPO_ID.fullmatch(value) and "--" not in value and ".." not in value):
                yield f'"{key}" with value {json.dumps(value)} is not valid'
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]'
    index = data.get("model-index", [])
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            yield f'"{where}.name" is required'
            continue
        if not isinstance(model.get("results"), list) or not model["results"]:
            yield f'"{where}.results" is required'
            continue
        for j, result in enumerate(model["results"]):
            place = f"{where}.results[{j}]"
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance(result.get(part), dict) or not isinstance(result[part].get(key), str):
                    yield f'"{place}.{part}.{key}" is required'
            if isinstance(result.get("dataset"), dict) and not REPO_ID.fullmatch(str(result["dataset"].get("type"))):
                yield f'"{place}.dataset.type" is not valid'
            if not isinstance(result.get("metrics"), list) or not result["metrics"]:
                yield f'"{place}.metrics" is required'
                continue
            for n, metric in enumerate(result["metrics"]):
                for key in ("type", "value"):
                    if not isinstance(metric, dict) or metric.get(key) is None:
                        yield f'"{place}.metrics[{n}].{key}" is required'


class Handler(BaseHTTPRequestHandler):
    """One connection. A route is a method whose docstring is its pattern: `METHOD /path`."""

    protocol_version = "HTTP/1.1"
    state: State
    fault: Fault | None = None

    def log_message(self, *_: object) -> None:
        pass

    # What comes in

    def handle_request_line(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.body = b""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.record: dict[str, Any] = {
            "method": self.command,
            "path": self.path,
            "range": self.headers.get("Range"),
            "token": self.headers.get("Authorization"),
            "agent": self.headers.get("User-Agent"),
            "received": len(self.body),
            "status": None,
            "sent": 0,
        }
        admin = parts.path.startswith("/_test/")
        self.fault = None if admin else self.find_fault()
        if not admin:
            self.state.log.append(self.record)
        try:
            if self.fault is not None:
                time.sleep(self.fault.delay)
                if self.fault.status is not None:
                    kind = {"Content-Type": "text/plain"}
                    self.answer(self.fault.text.encode(), self.fault.status, kind)
                    return
            for pattern, name in ROUTES:
                if match := pattern.fullmatch(f"{self.command.replace('HEAD', 'GET')} {parts.path}"):
                    values = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    if "kind" in values:  # "models", "datasets/" or nothing
                        values["kind"] = values["kind"].rstrip("/").removesuffix("s") or "model"
                    getattr(self, name)(**values)
                    return
            raise Refused(404, f"Sorry, we can't find the page you are looking for: {self.command} {self.path}")
        except Refused as error:
            body = error.body if error.body is not None else {"error": error.error}
            headers = {"Content-Type": "application/json", "X-Error-Message": error.error}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.answer(json.dumps(body).encode(), error.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request_line

    def find_fault(self) -> Fault | None:
        with self.state.lock:
            for fault in self.state.faults:
                if fault.times != 0 and re.search(fault.match, f"{self.command} {self.path}"):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    # What goes out

    def answer(self, body: bytes = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
        fault = self.fault
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        if fault is not None:
            headers |= fault.headers
            if fault.endless:
                headers.pop("Content-Length")
                headers["Transfer-Encoding"] = "chunked"
        self.record["status"] = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.endless:
            self.send_endless(body)
        elif fault is not None and fault.break_after is not None:
            self.wfile.write(body[: fault.break_after])
            self.wfile.flush()
            self.record["sent"] = fault.break_after
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            time.sleep(0.05)  # what was sent arrives first
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(body)
            self.record["sent"] = len(body)

    def send_endless(self, body: bytes) -> None:
        piece = body
        while True:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.record["sent"] += len(piece)
            piece = bytes(1 << 16)

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        """A file's bytes, or those that the request asks for."""
        if self.fault is not None and self.fault.content is not None:
            data = base64.b64decode(self.fault.content)
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.answer(data, 200, headers)
            return
        first, last = asked.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1 if last and first else len(data), len(data))
        if start >= end:
            self.answer(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
            return
        self.answer(data[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    # Who asks, and for what

    @property
    def port(self) -> int:
        address = self.server.server_address
        assert isinstance(address, tuple)
        return int(address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def far(self) -> str:
        """Where large files are: another host, so that a client that sends its token on would be seen."""
        return f"http://localhost:{self.port}"

    def user(self) -> tuple[str, bool] | None:
        """Who asks, and whether the token may write; None without a token. Raises Refused for an unknown token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def repo(self, kind: str, name: str) -> Repo:
        """A repository that the asking user may see. Raises Refused without telling what is private."""
        user = self.user()
        repo = self.state.repos.get((kind, name))
        if repo is None or (repo.private and (user is None or user[0] != repo.owner)):
            if user is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, kind: str, name: str, proposing: bool = False) -> Repo:
        """A repository that the asking user may change; `proposing`: by a pull request."""
        repo, user = self.repo(kind, name), self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if not user[1]:
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if user[0] != repo.owner and not proposing:
            raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.commit_of(revision or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def check_gate(self, repo: Repo) -> None:
        """Raises Refused if the repository is gated and the asking user was not let in."""
        user = self.user()
        if not repo.gated or (user is not None and user[0] == repo.owner):
            return
        if user is None:
            raise Refused(401, f"Access to model {repo.name} is restricted. Please log in.", "GatedRepo")
        if (user[0], repo.name) not in self.state.granted:
            raise Refused(403, f"Access to model {repo.name} is restricted; ask for access.", "GatedRepo")

    # Routes: people and repositories

    def whoami(self) -> None:
        """GET /api/whoami-v2"""
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        role = "write" if user[1] else "read"
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self.json({"type": "user", "id": user[0], "name": user[0], "fullname": user[0], "orgs": [], "auth": token})

    def create(self) -> None:
        """POST /api/repos/create"""
        asked = json.loads(self.body)
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        owner, kind = asked.get("organization") or user[0], asked.get("type") or "model"
        if not user[1] or owner != user[0]:
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        name = f"{owner}/{asked['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        url = {"url": f"{self.url}/{prefix}{name}", "name": name, "id": name}
        with self.state.lock:
            if (kind, name) in self.state.repos:
                error = f"You already created this {kind} repo: {name}"
                raise Refused(409, error, body={"error": error, **url})
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repo = self.state.repos[kind, name] = Repo(kind, name, private)
            start = {".gitattributes": self.state.regular(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
            repo.add("refs/heads/main", start, "initial commit", "", user[0])
        self.json(url)

    def delete(self) -> None:
        """DELETE /api/repos/delete"""
        asked = json.loads(self.body)
        user = self.user()
        name = f"{asked.get('organization') or (user and user[0])}/{asked['name']}"
        kind = asked.get("type") or "model"
        self.writable(kind, name)
        del self.state.repos[kind, name]
        self.json({})

    def settings(self, kind: str, name: str) -> None:
        """PUT /api/KIND/REPO/settings"""
        repo, asked = self.writable(kind, name), json.loads(self.body)
        if "visibility" in asked or "private" in asked:
            repo.private = asked.get("visibility") == "private" or asked.get("private") is True
        if "gated" in asked:
            repo.gated = bool(asked["gated"])
        self.json({})

    def auth_check(self, kind: str, name: str, write: str) -> None:
        """GET /api/KIND/REPO/auth-check(?P<write>/write)?"""
        repo = self.writable(kind, name) if write else self.repo(kind, name)
        self.check_gate(repo)
        self.json({})

    def info(self, kind: str, name: str, revision: str) -> None:
        """GET /api/KIND/REPO(?:/revision/(?P<revision>[^/]+))?"""
        repo = self.repo(kind, name)
        commit = self.commit_of(repo, revision)
        blobs = "blobs" in self.query
        card = commit.files.get("README.md")
        data = front_matter(self.state.data(card).decode()) if card is not None else None
        data = data if isinstance(data, dict) else {}
        siblings = []
        for path, entry in sorted(commit.files.items()):
            file: dict[str, Any] = {"rfilename": path}
            if blobs:
                file |= {"size": entry.size, "blobId": entry.oid}
                if entry.sha256 is not None:
                    file["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}
            siblings.append(file)
        tags = [*data.get("tags", []), *(f"dataset:{each}" for each in data.get("datasets", []))]
        if "license" in data:
            tags.append(f"license:{data['license']}")
        found = {
            "_id": commit.sha[:24],
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.owner,
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": next(iter(repo.commits.values())).date,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "cardData": data,
            "siblings": siblings,
            "usedStorage": sum(entry.size for entry in commit.files.values()),
        }
        found |= {key: data[key] for key in ("library_name", "pipeline_tag", "model-index") if key in data}
        if repo.kind == "model" and "config.json" in commit.files:
            found["config"] = json.loads(self.state.data(commit.files["config.json"]))
        self.json(found)

    def list_repos(self, kind: str) -> None:
        """GET /api/(?P<kind>models|datasets|spaces)"""
        user = self.user()
        author = self.query.get("author", [None])[0]
        search = self.query.get("search", [""])[0].lower()
        found = []
        for repo in self.state.repos.values():
            seen = not repo.private or (user is not None and user[0] == repo.owner)
            if seen and repo.kind == kind and author in (None, repo.owner) and search in repo.name.lower():
                found.append({"id": repo.name, "private": repo.private, "tags": [], "downloads": 0, "likes": 0})
        self.json(found)

    def validate(self) -> None:
        """POST /api/validate-yaml"""
        asked = json.loads(self.body)
        try:
            data = front_matter(asked["content"])
        except yaml.YAMLError as error:
            body = {"errors": [{"message": f"invalid YAML: {error}"}], "warnings": []}
            raise Refused(400, "Invalid metadata", body=body) from error
        if data is None:
            self.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
            return
        if errors := list(card_errors(data) if asked.get("repoType") in (None, "model") else ()):
            body = {"errors": [{"message": error} for error in errors], "warnings": []}
            raise Refused(400, "Invalid metadata", body=body)
        self.json({"errors": [], "warnings": []})

    # Routes: history

    def refs(self, kind: str, name: str) -> None:
        """GET /api/KIND/REPO/refs"""
        repo = self.repo(kind, name)
        found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        keys = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, sha in repo.refs.items():
            for prefix, key in keys.items():
                if ref.startswith(prefix):
                    found[key].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha})
        if "include_prs" not in self.query:
            del found["pullRequests"]
        self.json(found)

    def commits(self, kind: str, name: str, revision: str) -> None:
        """GET /api/KIND/REPO/commits/(?P<revision>[^/]+)"""
        repo = self.repo(kind, name)
        found, commit = [], self.commit_of(repo, revision)
        while True:
            found.append(
                {
                    "id": commit.sha,
                    "title": commit.title,
                    "message": commit.message,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
            )
            if commit.parent is None:
                break
            commit = repo.commits[commit.parent]
        self.json(found)

    def branch(self, kind: str, name: str, branch: str) -> None:
        """(POST|DELETE) /api/KIND/REPO/branch/(?P<branch>[^/]+)"""
        self.change_ref(self.writable(kind, name), f"refs/heads/{branch}", "startingPoint", "main")

    def tag(self, kind: str, name: str, revision: str) -> None:
        """(POST|DELETE) /api/KIND/REPO/tag/(?P<revision>[^/]+)"""
        repo = self.writable(kind, name)
        tag = json.loads(self.body)["tag"] if self.command == "POST" else revision
        self.change_ref(repo, f"refs/tags/{tag}", None, revision)

    def change_ref(self, repo: Repo, ref: str, key: str | None, start: str) -> None:
        if self.command == "DELETE":
            if repo.refs.pop(ref, None) is None:
                raise Refused(404, "Reference not found", "RevisionNotFound")
        else:
            if ref in repo.refs:
                raise Refused(409, "Reference already exists")
            asked = json.loads(self.body or b"{}")
            repo.refs[ref] = self.commit_of(repo, asked.get(key, start) if key else start).sha
        self.json({})

    # Routes: files, read

    def entry(self, path: str, entry: Entry, commit: Commit) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
        if entry.sha256 is not None:
            found["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
            if (name := self.state.xet.by_sha256(entry.sha256)) is not None:
                found["xetHash"] = name
        if self.query.get("expand", ["false"])[0].lower() == "true":
            found["lastCommit"] = {"id": commit.sha, "title": commit.title, "date": commit.date}
        return found

    def tree(self, kind: str, name: str, revision: str, path: str) -> None:
        """GET /api/KIND/REPO/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"""
        commit = self.commit_of(self.repo(kind, name), revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        inside = path.strip("/") + "/" if path else ""
        found: dict[str, dict[str, Any]] = {}
        for file, entry in sorted(commit.files.items()):
            if not file.startswith(inside):
                continue
            folders = file.removeprefix(inside).split("/")[:-1]
            for depth in range(len(folders)):
                folder = inside + "/".join(folders[: depth + 1])
                sha = hashlib.sha1(folder.encode()).hexdigest()
                if depth == 0 or recursive:
                    found.setdefault(folder, {"type": "directory", "path": folder, "oid": sha, "size": 0})
            if recursive or not folders:
                found[file] = self.entry(file, entry, commit)
        if path and not found:
            raise Refused(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        start = int(self.query.get("cursor", ["0"])[0])
        page = list(found.values())[start : start + self.state.page]
        headers = {"X-Repo-Commit": commit.sha}
        if start + self.state.page < len(found):
            query = "&".join(f"{key}={quote(value[0])}" for key, value in self.query.items() if key != "cursor")
            place = urlsplit(self.path).path
            headers["Link"] = f'<{self.url}{place}?{query}&cursor={start + self.state.page}>; rel="next"'
        self.json(page, headers=headers)

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        """POST /api/KIND/REPO/paths-info/(?P<revision>[^/]+)"""
        commit = self.commit_of(self.repo(kind, name), revision)
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(self.body)["paths"]
        else:
            asked = parse_qs(self.body.decode()).get("paths", [])
        found = []
        for path in asked:
            if path in commit.files:
                found.append(self.entry(path, commit.files[path], commit))
            elif any(file.startswith(f"{path}/") for file in commit.files):
                found.append({"type": "directory", "path": path, "oid": commit.sha, "size": 0})
        self.json(found)

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        """GET /(?P<kind>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)"""
        repo = self.repo(kind, name)
        self.check_gate(repo)
        commit = self.commit_of(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            body = {"error": f"{path} does not exist"}
            fixed = {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.json(body, 404, fixed)
            return
        entry = commit.files[path]
        if entry.sha256 is None:
            self.send_file(self.state.data(entry), {**headers, "ETag": f'"{entry.oid}"'})
            return
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"'}
        if (xet := self.state.xet.by_sha256(entry.sha256)) is not None:
            route = f"{self.url}/api/{repo.kind}s/{repo.name}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": xet, "Link": f'<{route}>; rel="xet-auth"'}
        headers["Location"] = f"{self.far}/_large/{entry.sha256}?signature={commit.sha[:12]}"
        self.answer(b"Found. Redirecting", 302, headers)

    def large(self, sha256: str) -> None:
        """GET /_large/(?P<sha256>[0-9a-f]{64})"""
        entry = self.state.lfs(sha256)
        self.send_file(self.state.data(entry), {"ETag": f'"{sha256}"'})

    # Routes: files, written

    def preupload(self, kind: str, name: str, revision: str) -> None:
        """POST /api/KIND/REPO/preupload/(?P<revision>[^/]+)"""
        repo = self.writable(kind, name, "create_pr" in self.query)
        commit = self.commit_of(repo, revision)
        found = []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            large = file["path"].endswith(LARGE) or binary or file["size"] > 10_000_000
            old = commit.files.get(file["path"])
            each = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if old is not None:
                each["oid"] = old.sha256 or old.oid
            found.append(each)
        self.json({"files": found, "commitOid": commit.sha})

    def batch(self, kind: str, name: str) -> None:
        """POST /(?P<kind>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)[.]git/info/lfs/objects/batch"""
        user = self.user()
        self.writable(kind, name, proposing=user is not None)
        found = []
        for asked in json.loads(self.body)["objects"]:
            each: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.state.large:
                place = f"{self.far}/_upload/{asked['oid']}"
                header: dict[str, str] = {}
                if asked["size"] >= self.state.multipart:
                    count = -(-asked["size"] // self.state.part)
                    header = {str(part + 1): f"{place}?part={part + 1}" for part in range(count)}
                    header["chunk_size"] = str(self.state.part)
                    place = f"{self.url}/_complete/{asked['oid']}"
                upload = {"href": place, "header": header}
                each["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/_verify", "header": {}}}
            found.append(each)
        self.json({"transfer": "basic", "objects": found})

    def upload(self, sha256: str) -> None:
        """PUT /_upload/(?P<sha256>[0-9a-f]{64})"""
        if "part" in self.query:
            part = int(self.query["part"][0])
            with self.state.lock:
                self.state.parts.setdefault(sha256, {})[part] = self.body
        else:
            self.keep(sha256, self.body)
        self.answer(headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, sha256: str) -> None:
        """POST /_complete/(?P<sha256>[0-9a-f]{64})"""
        parts = self.state.parts.get(sha256, {})
        for asked in json.loads(self.body)["parts"]:
            part = parts.get(asked["partNumber"])
            if part is None or hashlib.md5(part).hexdigest() != asked["etag"].strip('"'):
                raise Refused(400, f"part {asked['partNumber']} is not what was uploaded")
        self.keep(sha256, b"".join(parts[number] for number in sorted(parts)))
        self.json({"success": True})

    def keep(self, sha256: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refused(400, f"the uploaded bytes do not have the SHA-256 {sha256}")
        self.state.large[sha256] = data

    def verify(self) -> None:
        """POST /_verify"""
        asked = json.loads(self.body)
        if self.user() is None:
            raise Refused(401, "Invalid username or password.")
        self.state.lfs(asked["oid"], asked["size"])
        self.json({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        """POST /api/KIND/REPO/commit/(?P<revision>[^/]+)"""
        proposing = "create_pr" in self.query
        repo, user = self.writable(kind, name, proposing), self.user()
        assert user is not None
        with self.state.lock:
            base = self.commit_of(repo, revision)
            files = dict(base.files)
            header: dict[str, Any] = {}
            for line in self.body.splitlines():
                asked = json.loads(line)
                header = asked["value"] if asked["key"] == "header" else header
                self.change(files, asked["key"], asked["value"])
            if header.get("parentCommit") not in (None, base.sha):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            if proposing:
                number = 1 + sum(each.startswith("refs/pr/") for each in repo.refs)
                ref = f"refs/pr/{number}"
                repo.refs[ref] = base.sha
            elif ref not in repo.refs:
                raise Refused(400, f"{revision} is no branch")
            made = repo.add(ref, files, header.get("summary", ""), header.get("description", ""), user[0])
        answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{self.url}/{repo.name}/commit/{made.sha}"}
        if proposing:
            answer["pullRequestUrl"] = f"{self.url}/{repo.name}/discussions/{number}"
        self.json(answer)

    def change(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        """One line of a commit."""
        path = value.get("path", "")
        if key == "file":
            files[path] = self.state.regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = self.state.lfs(value["oid"], value.get("size"))
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for file in [file for file in files if file.startswith(f"{path.rstrip('/')}/")]:
                del files[file]
        elif key != "header":
            raise Refused(400, f"unknown line {key}")

    # Routes: Xet

    def xet_token(self, kind: str, name: str, access: str, revision: str) -> None:
        """GET /api/KIND/REPO/xet-(?P<access>read|write)-token/(?P<revision>[^/]+)"""
        if access == "write":
            self.writable(kind, name, "create_pr" in self.query)
        else:
            self.check_gate(self.repo(kind, name))
        until = int(time.time()) + 3600
        token = {"casUrl": f"{self.url}/_xet", "exp": until, "accessToken": f"xet-{access}"}
        headers = {
            "X-Xet-Cas-Url": f"{self.url}/_xet",
            "X-Xet-Access-Token": f"xet-{access}",
            "X-Xet-Token-Expiration": str(until),
        }
        self.json(token, headers=headers)

    def xet_user(self, *access: str) -> None:
        if self.headers.get("Authorization", "").removeprefix("Bearer ").removeprefix("xet-") not in access:
            raise Refused(401, "no access to the Xet store")

    def xorb(self, name: str) -> None:
        """POST /_xet/v1/xorbs/default/(?P<name>[0-9a-f]{64})"""
        self.xet_user("write")
        new = name not in self.state.xet.xorbs
        self.state.xet.xorbs[name] = Xorb(self.body)
        self.json({"was_inserted": new})

    def shard(self) -> None:
        """POST /_xet(?:/v1)?/shards"""
        self.xet_user("write")
        try:
            self.state.xet.add_shard(self.body)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        self.json({"result": 1})

    def reconstruction(self, name: str) -> None:
        """GET /_xet/v1/reconstructions/(?P<name>[0-9a-f]{64})"""
        self.xet_user("read", "write")
        if name not in self.state.xet.files:
            raise Refused(404, "no such file")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert asked is not None
        last = int(asked.group(2)) if asked.group(2) else None
        found = self.state.xet.reconstruction(name, int(asked.group(1)), last, f"{self.far}/_xorb")
        if found is None:
            raise Refused(416, "past the end of the file")
        self.json(found)

    def xorb_data(self, name: str) -> None:
        """GET /_xorb/(?P<name>[0-9a-f]{64})"""
        self.send_file(self.state.xet.xorbs[name].data, {})

    # Routes: what the tests say to the server

    def test_add(self) -> None:
        """POST /_test/add"""
        asked = json.loads(self.body)
        key = (asked["kind"], asked["name"])
        repo = self.state.repos.setdefault(key, Repo(*key))
        repo.private, repo.gated = asked["private"], asked["gated"]
        ref = asked["revision"]
        ref = ref if ref.startswith("refs/") else f"refs/heads/{ref}"
        main = repo.refs.get(ref) or repo.refs.get("refs/heads/main")
        files = dict(repo.commits[main].files) if main else {}
        for path, text in asked["files"].items():
            if text is None:
                del files[path]
                continue
            data = base64.b64decode(text)
            if path.endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                self.state.large[sha256] = data
                files[path] = self.state.lfs(sha256)
            else:
                files[path] = self.state.regular(data)
        self.json({"commit": repo.add(ref, files, "Add files", "", repo.owner).sha})

    def test_read(self) -> None:
        """POST /_test/read"""
        asked = json.loads(self.body)
        repo = self.state.repos[asked["kind"], asked["name"]]
        commit = self.commit_of(repo, asked["revision"])
        files = {path: base64.b64encode(self.state.data(entry)).decode() for path, entry in commit.files.items()}
        self.json({"files": files, "private": repo.private, "refs": repo.refs})

    def test_fault(self) -> None:
        """POST /_test/fault"""
        self.state.faults.append(Fault(**json.loads(self.body)))
        self.json({})

    def test_set(self) -> None:
        """POST /_test/set"""
        for key, value in json.loads(self.body).items():
            assert hasattr(self.state, key), key
            setattr(self.state, key, {tuple(each) for each in value} if key == "granted" else value)
        self.json({})

    def test_log(self) -> None:
        """(GET|DELETE) /_test/log"""
        log = list(self.state.log)
        if self.command == "DELETE":
            self.state.log.clear()
            self.state.faults.clear()
        self.json(log)


def routes() -> Iterator[tuple[re.Pattern[str], str]]:
    for name, method in vars(Handler).items():
        text = (getattr(method, "__doc__", None) or "").strip()
        if re.match(r"(GET|POST|PUT|DELETE|\(\w+\|\w+\)) /", text):
            text = text.replace("/KIND/", "/(?P<kind>models|datasets|spaces)/").replace("REPO", "(?P<name>[^/]+/[^/]+)")
            yield re.compile(text), name


ROUTES = list(routes())


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(port: int) -> None:
    """Serve until stdin closes, so that the server ends with the process that started it."""
    Handler.state = State()
    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


class Hub:
    """The server in a process of its own, and what a test says to it."""

    def __init__(self, port: int = 0) -> None:
        self.asked_port = port

    def __enter__(self) -> Self:
        command = [sys.executable, __file__, "--port", str(self.asked_port)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server did not start"
        self.port = int(line)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server: whoever asks now is refused the connection."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.wait(timeout=30)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def environment(self, home: Path, token: str | None = None, **others: str) -> dict[str, str]:
        """The variables of a process that shall use this Hub, with its cache, and nothing else of the user's.

        Transfers are by HTTP alone, unless HF_HUB_DISABLE_XET is "0".
        """
        others = {"HF_HUB_DISABLE_XET": "1"} | others
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        found = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1", **others}
        return found | ({"HF_TOKEN": token} if token is not None else {})

    def here(self, monkeypatch: Any, home: Path, token: str | None = None) -> None:
        """Point the huggingface_hub of this process at this Hub, without Xet, until the test ends.

        Its settings are read when it is imported, so the values themselves are replaced. hf_xet reads its own from the
        environment when its session begins: a cache that outlived a Hub would take the next on that port for it.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import _http, _xet

        for key in [key for key in os.environ if key.startswith(("HF_", "HUGGING"))]:
            monkeypatch.delenv(key)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("HF_XET_CACHE", str(home / "xet"))
        _xet.abort_xet_session()
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        for key, name in (
            ("HF_HUB_CACHE", "hub"),
            ("HF_XET_CACHE", "xet"),
            ("HF_TOKEN_PATH", "token"),
            ("HF_STORED_TOKENS_PATH", "stored_tokens"),
        ):
            monkeypatch.setattr(constants, key, str(home / name))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        if hasattr(_http, "_HUB_ORIGINS"):
            monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(self.url)}))

    def say(self, method: str, path: str, value: Any = None) -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, json.dumps(value))
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, (answer.status, body)
            return json.loads(body)
        finally:
            connection.close()

    def add(
        self,
        name: str,
        files: dict[str, bytes | None],
        *,
        private: bool = False,
        gated: bool = False,
        revision: str = "main",
        kind: str = "model",
    ) -> str:
        """Commit files (None: delete one) to a repository, which is made if it is not there. Returns the commit."""
        texts = {path: None if data is None else base64.b64encode(data).decode() for path, data in files.items()}
        asked = {"name": name, "kind": kind, "private": private, "gated": gated, "revision": revision, "files": texts}
        return str(self.say("POST", "/_test/add", asked)["commit"])

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a repository, whoever may see them."""
        found = self.say("POST", "/_test/read", {"name": name, "kind": kind, "revision": revision})["files"]
        return {path: base64.b64decode(text) for path, text in found.items()}

    def refs(self, name: str, kind: str = "model") -> dict[str, str]:
        """The branches, tags and pull requests of a repository, and their commits."""
        return dict(self.say("POST", "/_test/read", {"name": name, "kind": kind, "revision": "main"})["refs"])

    def fail(self, match: str, content: bytes | None = None, **fault: Any) -> None:
        """Let requests go wrong, see `Fault`; `match` is a regular expression in `METHOD /path`."""
        text = None if content is None else base64.b64encode(content).decode()
        self.say("POST", "/_test/fault", {"match": match, "content": text, **fault})

    def set(self, **values: Any) -> None:
        """Set `multipart`, `part`, `page` or `granted` of the server's `State`."""
        self.say("POST", "/_test/set", values)

    def log(self) -> list[dict[str, Any]]:
        """Every request so far: method, path, range, token, status, bytes received and sent (of bodies)."""
        return list(self.say("GET", "/_test/log"))

    def clear(self) -> None:
        """Forget the requests and the faults; the repositories stay."""
        self.say("DELETE", "/_test/log")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    serve(parser.parse_args().port)
