"""A hub of our own, for repositories of data: what huggingface_hub asks for when it makes one, looks at it and commits to it.

Large files lie at another address, to which `resolve` leads; that address is served by the server that does wrong on purpose.
Nothing is checked that a hub would check, but for the token, the parent of a commit, and the hash of what is uploaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from faults.web_server import Handler, Server, running

TOKEN = "hf_" + "t" * 34
SIGNED = "X-Signature=" + "s" * 40  # what an address of a large file ends with


@dataclass
class Repository:
    """Its commits: (id, path -> sha256 of a large file, or the bytes of a small one), the newest last."""

    private: bool = False
    commits: list[tuple[str, dict[str, str | bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, str | bytes]) -> str:
        id = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((id, files))
        return id

    def at(self, revision: str) -> dict[str, str | bytes] | None:
        return self.commits[-1][1] if revision == "main" else dict(self.commits).get(revision)


class HubServer(Server):
    """The hub, in memory; what is asked of it, or of `files` for large ones, may go wrong by its path in the repository.

    Attributes:
        repositories: by name.
        large: sha256 -> bytes.
        files: the other address.
        uploads: paths that were sent there, one after the other.
        refused: statuses with which the next requests that write are answered.
        heard: (which server, Authorization) of every request.
        before_commit: called before a commit is looked at.
    """

    def __init__(self) -> None:
        super().__init__(Path(), _HubHandler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.names: dict[str, str] = {}
        self.files = Server(Path(), _FilesHandler)
        self.files.hub = self  # type: ignore[attr-defined]
        self.files.faults, self.files.always, self.files.changed = self.faults, self.always, self.changed
        self.files.asked, self.files.sent = self.asked, self.sent
        self.uploads: list[str] = []
        self.refused: list[int] = []
        self.heard: list[tuple[str, str | None]] = []
        self.before_commit: Any = lambda: None

    def lay(self, name: str, contents: Mapping[str, bytes]) -> None:
        """A repository of these files, open to everybody."""
        files: dict[str, str | bytes] = dict(contents)
        for path, data in contents.items():
            if path.endswith(".h5"):
                files[path] = hashlib.sha256(data).hexdigest()
                self.large[str(files[path])] = data
        self.repositories[name] = Repository()
        self.repositories[name].commit(files)

    def contents(self, name: str) -> dict[str, bytes]:
        """What its newest commit holds."""
        files = self.repositories[name].commits[-1][1]
        return {path: self.large[one] if isinstance(one, str) else one for path, one in files.items()}


@contextmanager
def hub() -> Iterator[HubServer]:
    """A hub without repositories, in threads."""
    server = HubServer()
    with running(server), running(server.files):
        yield server


class _FilesHandler(Handler):
    """Of large files: it is not to hear the token."""

    def do_GET(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        hub.heard.append(("files", self.headers.get("Authorization")))
        oid = urlsplit(self.path).path.strip("/")
        data = hub.large.get(oid) if SIGNED in self.path else None
        self.serve(hub.names.get(oid, oid), data)

    def do_PUT(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        hub.heard.append(("files", self.headers.get("Authorization")))
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = urlsplit(self.path).path.strip("/")
        if hashlib.sha256(data).hexdigest() != oid or hub.refused:
            self.send_error(hub.refused.pop(0) if hub.refused else 400)
            return
        hub.large[oid] = data
        hub.uploads.append(hub.names.get(oid, oid))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _HubHandler(Handler):
    server: HubServer

    def do_GET(self) -> None:
        route, name, rest = self._route()
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._known()):
            self._error(404 if self._known() else 401)
        elif route == "revision" and repository.at(rest[0]) is not None:
            sha = repository.commits[-1][0] if rest[0] == "main" else rest[0]
            self._json({"id": name, "sha": sha, "private": repository.private, "tags": [], "siblings": []})
        elif route == "tree":
            self._tree(repository.at(rest[0]) or {}, "/".join(rest[1:]))
        elif route == "resolve":
            self._resolve(repository.at(rest[0]) or {}, "/".join(rest[1:]))
        else:
            self._error(404)

    def _resolve(self, files: dict[str, str | bytes], path: str) -> None:
        found = files.get(path)
        if not isinstance(found, str):
            self.serve(path, found)
            return
        self.server.names[found] = path
        self.send_response(302)
        self.send_header("Location", f"{self.server.files.url}/{found}?{SIGNED}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _tree(self, files: dict[str, str | bytes], folder: str) -> None:
        found = []
        for path, one in sorted(files.items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            size = len(self.server.large[one]) if isinstance(one, str) else len(one)
            large = {"lfs": {"oid": one, "size": size, "pointerSize": 130}} if isinstance(one, str) else {}
            found.append({"type": "file", "path": path, "size": size, "oid": "0" * 40, **large})
        if folder and not found:
            self._error(404, "EntryNotFound")
        else:
            self._json(found)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        route, name, _ = self._route()
        if not self._known():
            self._error(401)
        elif self.server.refused:
            self._error(self.server.refused.pop(0))
        elif route == "create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            new = Repository(private=asked.get("visibility") == "private" or asked.get("private", False))
            new.commit({".gitattributes": b"*.h5 filter=lfs\n"})
            self.server.repositories[name] = new
            self._json({"url": f"{self.server.url}/datasets/{name}"})
        elif route == "validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif route == "preupload":
            asked = json.loads(body)["files"]
            modes = [("lfs" if one["path"].endswith(".h5") else "regular", one["path"]) for one in asked]
            self._json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for mode, path in modes]})
        elif route == "batch":
            self._json({"objects": [self._upload(one) for one in json.loads(body)["objects"]]})
        elif route == "commit":
            self._commit(name, [json.loads(line) for line in body.splitlines()])
        else:
            self._error(404)

    def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.server.large:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.server.files.url}/{asked['oid']}?{SIGNED}"}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        self.server.before_commit()
        repository, parent = self.server.repositories[name], lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repository.commits[-1][0]:
            self._error(412)
            return
        files = dict(repository.commits[-1][1])
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
        id = repository.commit(files)
        self._json({"commitUrl": f"{self.server.url}/datasets/{name}/commit/{id}", "commitOid": id})

    def _route(self) -> tuple[str, str, list[str]]:
        """What is asked for, of which repository, and what follows."""
        self.server.heard.append(("hub", self.headers.get("Authorization")))
        self.close_connection = True
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api" and parts[1] != "datasets":
            return parts[-1], "", []
        if parts[0] == "api" and len(parts) < 5:  # of the repository itself
            return "revision", "/".join(parts[2:4]), ["main"]
        if parts[0] == "api":
            return parts[4], "/".join(parts[2:4]), parts[5:]
        if parts[2].endswith(".git"):
            return parts[-1], f"{parts[1]}/{parts[2][:-4]}", []
        return parts[3], "/".join(parts[1:3]), parts[4:]

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str = "") -> None:
        """It says more than it should: what it heard."""
        body = json.dumps({"error": f"no: {self.headers.get('Authorization')}"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Error-Message", f"no: {self.headers.get('Authorization')}")
        if code or status == 404:
            self.send_header("X-Error-Code", code or "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)
