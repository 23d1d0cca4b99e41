"""Odd surroundings: streams that were closed, a locale that is not UTF-8, an umask that allows everything, few files open."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from softcache import cli
from softcache.commands.flags import Command
from softcache.files import durable, home


@pytest.fixture
def umask_000() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask_000")
def test_nothing_that_is_written_may_be_written_by_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTCACHE_HOME", str(tmp_path / "home/of/it"))
    assert home.remember("checked/one", {"a": 1})
    with home.one_at_a_time("locks/one"):
        pass
    durable.make_folder(tmp_path / "cache/members")
    durable.write_whole(tmp_path / "cache/manifest.json", b"{}")
    durable.append_line(tmp_path / "cache/journal", b"{}")
    durable.close(durable.open_or_create(tmp_path / "cache/lock"))
    with durable.written_by_path(tmp_path / "cache/export", tmp_path / "cache/export.tmp") as path:
        path.write_bytes(b"x")
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(modes) == 13
    assert not {name: oct(mode) for name, mode in modes.items() if mode & 0o002}
    assert not {name: oct(mode) for name, mode in modes.items() if name.startswith("home") and mode & 0o077}


def test_a_command_whose_streams_are_closed_ends_as_any_other() -> None:
    """What it opened first would have their numbers, and what is told would be written into it."""
    code = "import os, sys; from softcache import cli; sys.argv[1:] = ['losses', '--nope']\n"
    code += "null = lambda: all(os.path.samestat(os.fstat(n), os.stat('/dev/null')) for n in (0, 1, 2))\n"
    code += "main, cli.main = cli.main, lambda: main() + 40 * null()\n"
    code += "cli.run_and_exit()"
    shell = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(shell, timeout=60, check=False).returncode == 42


def test_a_word_that_is_not_utf8_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["inspect", os.fsdecode(b"caf\xe9")]
    assert cli.main(words) == 2
    assert "is not UTF-8\n  tip: rename what it names" in capsys.readouterr().err
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert cli.main(words) == 2
    assert "this Python takes names for ascii, as the locale says: set LC_ALL=C.UTF-8" in capsys.readouterr().err


def test_too_many_open_files_are_told_with_their_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: Command) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "cache/members/a/part-00250.h5")

    monkeypatch.setattr(Command, "run", run)
    assert cli.main(["losses"]) == 2
    told = capsys.readouterr().err
    assert "cache/members/a/part-00250.h5: Too many open files" in told
    assert "`ulimit -n 4096`" in told
    assert "--read mmap" in told
