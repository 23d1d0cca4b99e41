"""The command line: finds the verb, runs it; the only place that prints errors and sets exit codes.

Nothing here imports torch before a verb runs, so that --help is instant.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from softcache import signals
from softcache.commands.flags import STARTS_AGAIN, parse
from softcache.errors import ConfigError, SoftcacheError, UntrustedError, utf8_tip
from softcache.report.screen import on_screen

EXIT_USER, EXIT_INTERRUPT, EXIT_TERMINATED = 2, 130, 143


class _Terminated(BaseException):
    """SIGTERM, raised where the main thread is, so that everything is left as after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's fault, 130 and 143 for a stop, or a verb's own."""
    after_stop = STARTS_AGAIN
    words = sys.argv[1:] if argv is None else argv
    with on_screen(), signals.raised({signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: _Terminated}):
        try:
            _refuse_undecoded(words)
            command = parse(words)
            after_stop = command.verb.after_stop
            code = command.run()
            sys.stdout.flush()
            return code
        except SoftcacheError as exc:
            _print_error(exc.message, getattr(exc, "__notes__", []), exc.tip)
            if isinstance(exc, UntrustedError):
                again = shlex.join(["softcache", *words, "--allow-code"])
                print(f"  or, if you trust whoever made it: {again}", file=sys.stderr)
            return exc.exit_code
        except (KeyboardInterrupt, _Terminated) as exc:
            terminated = isinstance(exc, _Terminated)
            told = (*getattr(exc, "__notes__", ()), after_stop)[0]  # a verb may know better what there is to go on with
            print(f"\nsoftcache: {'terminated' if terminated else 'interrupted'}; {told}", file=sys.stderr)
            return EXIT_TERMINATED if terminated else EXIT_INTERRUPT
        except BrokenPipeError:  # the reader of our output has gone: nothing to say, nobody to say it to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_USER
        except (MemoryError, RuntimeError) as exc:
            if not isinstance(exc, MemoryError) and "can't allocate memory" not in str(exc):
                raise
            reason = (str(exc).splitlines() or [""])[0]
            _print_error(f"out of memory: {reason[:200]}", tip="ask for less: smaller widths, sizes, counts or batches")
            return EXIT_USER
        except (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as exc:
            _print_error(f"{exc.filename}: {exc.strerror}")
            return EXIT_USER
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                tip = "let it open more: `ulimit -n 4096` before the same command; --read mmap holds no file open"
                _print_error(f"{exc.filename or 'opening a file'}: {exc.strerror}", tip=tip)
                return EXIT_USER
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            tip = "free some space and run the same command again"
            _print_error(f"{exc.filename or 'writing'}: {exc.strerror}", tip=tip)
            return EXIT_USER


def _refuse_undecoded(words: Sequence[str]) -> None:
    """Raise ConfigError for a word that is not UTF-8: it could not be written down."""
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{word!r} is not UTF-8", tip=utf8_tip("rename what it names")) from None


def _print_error(message: str, notes: Sequence[str] = (), tip: str = "") -> None:
    print(f"softcache: error: {message}", file=sys.stderr)
    for note in notes:
        print(f"  {note}", file=sys.stderr)
    if tip:
        print(f"  tip: {tip}", file=sys.stderr)


def _open_standard_streams() -> None:
    """Let what was closed before Python began be /dev/null: what is told would be written into the file opened in its place."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def run_and_exit() -> NoReturn:
    """The command of this process, and its end.

    One of several processes that compute together ends without Python's own teardown, when all is written: a thread of torch's
    gloo group, which DistributedDataParallel keeps alive, may let go of a tensor meanwhile, and to ask for Python's lock then
    aborts the process ("terminate called without an active exception").
    """
    _open_standard_streams()
    os.umask(os.umask(0o077) | 0o002)  # what libraries write into a run folder is not for everyone to change either
    try:
        code = main()
    except Exception:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        traceback.print_exc()
        code = 1
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_and_exit()
