"""Everything that can go wrong in a way the user can mend: one base class, a few named children.

A message says what is wrong with the value found; the tip says what to do about it.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class SoftcacheError(Exception):
    """A fault outside our code. The command line prints message and tip, without a traceback, and exits with `exit_code`."""

    exit_code = 2

    def __init__(self, message: str, *, tip: str = "") -> None:
        self.message, self.tip = printable(message), printable(tip)  # names of somebody else's are among them
        super().__init__(self.message)

    def add_note(self, note: str, /) -> None:
        super().add_note(printable(note))

    def __str__(self) -> str:
        return f"{self.message}\n  tip: {self.tip}" if self.tip else self.message


class ConfigError(SoftcacheError):
    """A flag, a TOML key or a spec string that cannot be understood."""


class MissingExtraError(SoftcacheError):
    """An optional dependency that is not installed."""


class DataError(SoftcacheError):
    """A transfer set that cannot be opened, read, or given sample ids."""


class ModelError(SoftcacheError):
    """A model that cannot be built, or weights that do not fit it."""


class TeacherError(SoftcacheError):
    """A teacher whose outputs cannot be trusted: not finite, not repeatable, wrong shape, not logits."""


class CodecRangeError(SoftcacheError):
    """Logits that the chosen codec cannot hold."""


class CodecFitError(SoftcacheError):
    """A codec does not suit this teacher, or cannot keep what was promised of it."""


class LossError(SoftcacheError):
    """A loss that is unknown, wrongly set, or cannot be served by this cache."""


class TrainingError(SoftcacheError):
    """A training run that cannot go on: a loss that is not finite, a run folder of another run."""


class ExportError(SoftcacheError):
    """A model that cannot be exported, or whose exported file does not answer as it does."""


class DumpError(SoftcacheError):
    """A dump that cannot start, resume or write."""


class PlanMismatchError(DumpError):
    """A resume or a part whose plan differs from the one the dump was started with."""


class LockedError(DumpError):
    """Another process is writing the same part of the same cache."""


class DiskSpaceError(DumpError):
    """Not enough room for what is to be written."""


class CacheError(SoftcacheError):
    """A folder that is not a cache, or a cache of a version this code cannot read."""


class UnfinishedCacheError(CacheError):
    """A dump that has not been committed yet."""


class DamagedCacheError(CacheError):
    """Bytes on disk that differ from what the manifest says."""


class LinkedCacheError(DamagedCacheError):
    """A symbolic link in the place of a file or folder of a cache: it is not followed."""


class RemoteError(SoftcacheError):
    """A place that cannot be reached, or that gives other bytes than the manifest names."""


class SignatureError(CacheError):
    """A cache that nobody of a list of allowed signers has signed."""


class UntrustedError(ConfigError):
    """Something that a cache, a run folder or a weights file names, and that is used only where its user says so.

    The command line prints the same command with --allow-code.
    """


class JoinError(SoftcacheError):
    """A data set that does not fit the cache. The children say how."""


class MissingSampleError(JoinError):
    """Samples of the data set that the cache does not hold."""


class DuplicateKeyError(JoinError):
    """Two samples with the same key, or two keys with the same id."""


class LabelMismatchError(JoinError):
    """Samples whose label differs from the one in the cache."""


class ContentMismatchError(JoinError):
    """Samples whose content differs from what the teacher saw."""


class ClassMismatchError(JoinError):
    """Another class list, another class order or another number of classes."""


class RenderingError(JoinError):
    """Tokens of another vocabulary than the cache's, or texts that were made into tokens otherwise."""


class DriftError(SoftcacheError):
    """A view that no longer renders to the pixels the teacher saw."""


@contextmanager
def faults_explained(kind: type[SoftcacheError], what: str, *, tip: str = "") -> Iterator[None]:
    """Around a call into somebody else's code: whatever goes wrong inside becomes an error of that kind, with its place."""
    try:
        yield
    except SoftcacheError:
        raise
    except Exception as exc:
        raise kind(f"{what} failed: {type(exc).__name__}: {exc} ({place_of(exc)})", tip=tip) from exc


def place_of(exc: BaseException) -> str:
    """`file.py, line 3`: the innermost line of a user's own file that an exception went through, else the innermost of all."""
    frames = traceback.extract_tb(exc.__traceback__)
    own = [frame for frame in frames if is_users_file(frame.filename)]
    last = (own or list(frames))[-1]
    return f"{Path(last.filename).name}, line {last.lineno}"


def is_users_file(filename: str) -> bool:
    """Whether code is neither softcache's, nor Python's own, nor of an installed package."""
    paths = sysconfig.get_paths()
    installed = (*(paths[name] for name in ("stdlib", "purelib", "platlib")), str(Path(__file__).parent))
    return not filename.startswith((*installed, "<"))


def require_extra(module: str, extra: str, why: str) -> None:
    """Raise MissingExtraError unless `module` can be imported."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(
            f"{why} needs the package {module!r}, which is not installed",
            tip=f"pip install 'softcache[{extra}]'",
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?' and the known names, for messages about a name that is not one of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return "known: " + ", ".join(names)


def printable(text: str) -> str:
    """The text without what a terminal would obey: control and direction characters as escapes, lines and tabs kept."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def utf8_tip(rename: str) -> str:
    """What helps where a name is not UTF-8 to Python: renaming, or telling Python that names are UTF-8."""
    encoding = sys.getfilesystemencoding()
    if encoding.lower().replace("-", "") == "utf8":
        return rename
    return f"this Python takes names for {encoding}, as the locale says: set LC_ALL=C.UTF-8 and no PYTHONUTF8=0"


_TOLD: set[str] = set()


def warn(message: str) -> None:
    """Say on stderr what may be wrong and is not refused, however quiet a verb is to be."""
    print(f"softcache: warning: {printable(message)}", file=sys.stderr)


def tell_once(text: str) -> None:
    """Say it on stderr; the same once in a process, and of several processes in the first alone."""
    if text not in _TOLD and os.environ.get("RANK", "0") == "0":
        _TOLD.add(text)
        print(printable(text), file=sys.stderr)


def warn_once(message: str) -> None:
    """As `warn`; the same once."""
    tell_once(f"softcache: warning: {message}")


def note_once(message: str) -> None:
    """Say on stderr what is worth knowing and is right; the same once."""
    tell_once(f"softcache: note: {message}")


def first_offenders(items: Iterable[str], total: int, limit: int = 5) -> str:
    """The first few names of a long list, and how many more there are."""
    shown = [str(item) for _, item in zip(range(limit), items, strict=False)]
    more = total - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
