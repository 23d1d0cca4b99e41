"""hf: a folder of a repository of data on a Hugging Face hub.

Reading takes plain requests, of one commit, which is looked up first. Pushing takes the hub's own package: files are sent first
and named by commits whose parent is the commit that was looked at; of two who push at once one is refused by the hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import responses
from threading import Lock
from typing import Any
from urllib.parse import quote

from softcache.cache.schema import MANIFEST
from softcache.errors import RemoteError, note_once, require_extra
from softcache.remote.claim import PUSHING, refuse_others
from softcache.remote.fetch import read_small
from softcache.remote.places import Place
from softcache.remote.scrub import scrubbed
from softcache.remote.transport import NotThereError, Sending
from softcache.remote.web import Access, Web
from softcache.version import __version__

HUB = "https://huggingface.co"
IN_ONE_COMMIT = 500  # files of data
WAIT_S = 120.0  # for an answer while something is pushed; the package waits for ever
ITS_OWN = (".gitattributes",)  # what a hub puts into every repository
ANSWER = 1 << 24  # bytes of an answer of the hub's


class Hub:
    """A folder of one repository, at one commit, as a transport."""

    at_once = 32

    def __init__(self, place: Place) -> None:
        self.url = place.url
        org, name, *folders = place.rest.split("/")
        self._repo, self._folder = f"{org}/{name}", "/".join(folders)
        self._hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
        self._lock = Lock()
        self._commit: str | None = None
        self._files: Web | None = None
        self._there: dict[str, Any] = {}
        self._sent: list[Any] = []

    def read(self, path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        try:
            files = self._at_commit()
        except NotThereError as exc:  # more than a file is missing
            raise RemoteError(exc.message, tip=_access().tip) from None
        return files.read(path, start, stop)

    def _at_commit(self) -> Web:
        """The files of the commit that was the newest at the first look: what is pushed meanwhile is not mixed in."""
        with self._lock:
            if self._files is None:
                access = _access()
                api = Web(Place(f"{self._hub}/api", "https"), access)
                try:
                    told = json.loads(read_small(api, f"datasets/{self._repo}/revision/main", ANSWER))
                    commit, repo = told["sha"], told["id"]
                except (ValueError, KeyError, TypeError):
                    raise RemoteError(f"{self.url}: {self._hub} does not answer as a hub does") from None
                except NotThereError:
                    raise NotThereError(f"{self.url}: there is no such repository of data") from None
                if not re.fullmatch("[0-9a-f]{40,64}", str(commit)) or not re.fullmatch(
                    r"(?!\.)[\w.-]+/(?!\.)[\w.-]+", str(repo)
                ):
                    raise RemoteError(f"{self.url}: {self._hub} does not answer as a hub does")
                self._commit, self._repo = commit, repo  # it may have been renamed
                root = f"{self._hub}/datasets/{repo}/resolve/{commit}"
                self._files = Web(Place(f"{root}/{quote(self._folder)}".rstrip("/"), "https"), access)
            return self._files

    @contextmanager
    def claim(self, id: str) -> Iterator[None]:
        self._api = _package(self._hub)
        try:
            self._at_commit()
        except NotThereError:
            with self._told():
                self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)
            note_once(f"{self.url}: made on {self._hub}, open to you and your team alone; its settings there open it")
            self._at_commit()
        self._there = self._listed()
        if MANIFEST not in self._there:
            there = [path for path in self._there if path not in ITS_OWN]
            started = b"".join(self.read(PUSHING)) if PUSHING in self._there else None
            refuse_others(self.url, there, started, id)
        self._id = id
        yield

    def _listed(self) -> dict[str, Any]:
        """path -> what the hub tells of each file of the folder."""
        from huggingface_hub.errors import EntryNotFoundError

        with self._told():
            try:
                found = self._api.list_repo_tree(
                    self._repo, self._folder or None, recursive=True, revision=self._commit, repo_type="dataset"
                )
                files = [one for one in found if hasattr(one, "blob_id")]
            except EntryNotFoundError:
                return {}
        start = len(self._folder) + 1 if self._folder else 0
        return {one.path[start:]: one for one in files}

    def require_room(self, nbytes: int) -> None:
        pass  # a hub says so itself

    def size(self, path: str) -> int | None:
        return self._there[path].size if path in self._there else None

    def digest(self, path: str) -> str | None:
        large = self._there[path].lfs if path in self._there else None
        return None if large is None else large.sha256

    def put(self, files: Sequence[Sending], note: Callable[[int], None]) -> None:
        adding = [self._adding(one.path, str(one.source)) for one in files]
        self._send(adding)
        with self._lock:
            self._sent += adding
        note(sum(one.upload_info.size for one in adding))

    def _adding(self, path: str, what: str | bytes) -> Any:
        from huggingface_hub import CommitOperationAdd

        return CommitOperationAdd(f"{self._folder}/{path}".lstrip("/"), what)

    def _send(self, adding: list[Any]) -> None:
        """What is large; a .gitignore that lies there leaves nothing out."""
        with self._told():
            self._api.preupload_lfs_files(
                self._repo, adding, repo_type="dataset", free_memory=False, gitignore_content=""
            )

    def publish(self, create: Mapping[str, bytes], replace: Mapping[str, bytes], was: bytes | None) -> bool:
        """All that was sent, in one commit as a rule, and whatever is shown in the last one."""
        from huggingface_hub import CommitOperationDelete

        begun = PUSHING in self._there
        while len(self._sent) > IN_ONE_COMMIT:
            first, self._sent = self._sent[:IN_ONE_COMMIT], self._sent[IN_ONE_COMMIT:]
            if MANIFEST not in self._there and not begun:
                first.append(self._adding(PUSHING, json.dumps({"id": self._id}).encode()))
                begun = True
            if not self._committed(f"Files of {self._id[:12]}", first):
                return False
        last = [*self._sent, *(self._adding(path, data) for path, data in {**create, **replace}.items())]
        if begun:
            last.append(CommitOperationDelete(f"{self._folder}/{PUSHING}".lstrip("/")))
        return self._committed(f"Cache {self._id[:12]}", last)

    def _committed(self, message: str, operations: list[Any]) -> bool:
        """False where something else was committed since the look at it."""
        from huggingface_hub.errors import HfHubHTTPError

        self._send([one for one in operations if hasattr(one, "upload_info")])
        with self._told():
            try:
                done = self._api.create_commit(
                    self._repo, operations, commit_message=message, repo_type="dataset", parent_commit=self._commit
                )
            except HfHubHTTPError as exc:
                if exc.response.status_code in (409, 412):
                    return False
                raise
        self._commit = done.oid
        return True

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever the package raises, in a line without anything that was sent or that a server wrote."""
        try:
            yield
        except Exception as exc:
            status = _status(exc)
            if status in (401, 403, 404):
                raise RemoteError(f"{self.url}: is not open to you ({status})", tip=_access().tip) from None
            what = f"{status} {responses.get(status, '')}" if status else scrubbed(exc)
            raise RemoteError(
                f"{self.url}: {self._hub} did not take it ({what})",
                tip="run the same command again: what has been sent is not sent again",
            ) from None


def _status(exc: BaseException | None) -> int | None:
    """Of the answer that a fault, or what caused it, came from."""
    while exc is not None:
        if (answer := getattr(exc, "response", None)) is not None:
            return int(answer.status_code)
        exc = exc.__cause__ or exc.__context__
    return None


def _access() -> Access:
    """The token that the hub's own package finds, where it is installed."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return Access(None, "is the name right? what is private needs pip install 'softcache[hub]' and `hf auth login`")
    token = get_token()
    if token is None:
        return Access(None, "is the name right? what is private needs `hf auth login`, or HF_TOKEN in the environment")
    return Access(
        f"Bearer {token}", "is the name right, and may your token (`hf auth whoami`) read it, or write to it?"
    )


def _package(hub: str) -> Any:
    """The hub's package, which waits for ever unless it is told not to."""
    require_extra("huggingface_hub", "hub", "pushing to a hub")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, get_session

    disable_progress_bars()
    get_session().timeout = WAIT_S
    return HfApi(hub, library_name="softcache", library_version=__version__)
