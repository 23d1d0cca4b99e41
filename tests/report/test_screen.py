"""Whatever a verb prints goes through one place, which lets nothing through that a terminal would obey."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from softcache.errors import DataError, printable
from softcache.report.progress import Meter
from softcache.report.screen import Screen, on_screen
from softcache.report.tables import table

EVIL = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp.exe\ud800\rfirst"


def obeyed(text: str) -> set[str]:
    return {letter for letter in text if letter in "\x1b\x07\x9b\u202e\ud800\r"}


def test_what_is_printed_is_shown_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    with on_screen():
        print(EVIL)
        print(EVIL, file=sys.stderr)
        sys.stdout.writelines([EVIL, "\tä\n"])
    said = capsys.readouterr()
    assert obeyed(said.out + said.err) == set()
    assert said.out.startswith(r"\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp.exe\ud800\rfirst") and "\tä\n" in said.out


def test_a_bar_may_return_to_the_beginning_of_its_line_and_nothing_else() -> None:
    under = io.StringIO()
    screen = Screen(under, bars=True)
    for text in ("\r 10 %", "\r      \r", "\x1b[A", "\r a\x1b[31m\rb"):
        screen.write(text)
    assert under.getvalue() == "\r 10 %" + "\r      \r" + "\x1b[A" + "\r a\\x1b[31m\\rb"


def test_letters_that_the_screen_does_not_have_end_in_no_error() -> None:
    under = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Screen(under).write("ä 1 %")
    under.flush()
    assert under.buffer.getvalue() == rb"\xe4 1 %"


def test_the_streams_are_as_before_also_after_an_error() -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), on_screen():
        raise KeyError
    assert (sys.stdout, sys.stderr) == before


def test_errors_tables_and_progress_are_harmless_wherever_they_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """In Python too, where nothing stands between them and the terminal."""
    error = DataError(f"no sample {EVIL}", tip=EVIL)
    error.add_note(EVIL)
    shown = table(["a\x1b", "b"], [[EVIL, "x\ny"]])
    with Meter(EVIL, 2, unit="views", after_s=0, every_s=0) as meter:
        meter.add()
    assert obeyed(str(error) + error.tip + "".join(error.__notes__) + shown + capsys.readouterr().err) == set()
    assert len(shown.splitlines()) == 3 and r"x\ny" in shown  # a name makes no line of its own


def test_plain_text_stays_as_it_is() -> None:
    plain = "ä €\tß\n漢字 العربية 🙂 a\u0301"
    assert printable(plain) == plain


def test_a_picture_takes_the_texts_of_a_recipe_as_texts() -> None:
    """matplotlib reads what stands between dollars as a formula, and fails where it is none."""
    pytest.importorskip("matplotlib")
    from softcache.report.chart import drawn_rows

    row = SimpleNamespace(label=f"$\\frac{{$ {EVIL}", metric="$\\nothing$", paper=1.0, values=[1.0, 2.0])
    assert drawn_rows("$\\title{$", [row]).startswith(b"\x89PNG")
