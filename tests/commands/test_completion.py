"""The completion scripts: up to date, whole, and at work in bash."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from softcache import cli
from softcache.commands import VERBS
from softcache.commands.completion import SCRIPTS, SHELLS
from softcache.commands.flags import SHARED, load_verb
from softcache.config import flag_of

TOOLS = Path(__file__).parents[2] / "tools" / "docs"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_what_the_tool_makes(shell: str) -> None:
    pytest.importorskip("shtab", reason="the extra softcache[completion]")
    made = tool("make_completion").script(shell)
    assert (SCRIPTS / f"softcache.{shell}").read_text(encoding="utf-8") == made, (
        "run python tools/docs/make_completion.py"
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_verb_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where shtab is not installed."""
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert cli.main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["script"].rstrip() == script.rstrip()
    for verb in VERBS:
        flags = [flag_of(f.name) for f in dataclasses.fields(load_verb(verb).config) if not f.metadata["positional"]]
        for flag in [*flags, *SHARED]:
            assert (f"-l {flag[2:]} " if shell == "fish" else flag) in script, (verb, flag)
        assert verb in script


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bsh"]) == 2
    assert "did you mean 'bash'" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ver"], ["verify"]),
        (["re"], ["reproduce", "repair"]),
        (["verify", "cache", "--rep"], ["--replay"]),
        (["train", "--optimizer", "ada"], ["adam", "adamw"]),
        (["export", "--to", "o"], ["onnx"]),
        (["completion", "z"], ["zsh"]),
        (["inspect", "cac"], ["caches"]),
        (["dump", "--samples", "key"], ["keys.txt"]),
    ],
    ids=" ".join,
)
def test_it_completes_in_bash(tmp_path: Path, words: list[str], wanted: list[str]) -> None:
    (tmp_path / "caches").mkdir()
    (tmp_path / "keys.txt").touch()
    script = f"""
        source {SCRIPTS / "softcache.bash"}
        complete -p softcache >&2
        COMP_WORDS=(softcache {" ".join(words)}); COMP_CWORD={len(words)}
        $(complete -p softcache | sed 's/.*-F \\([^ ]*\\).*/\\1/') softcache "{words[-1]}" softcache
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.startswith("complete ") and done.stderr.strip().endswith(" softcache")
    assert [word.strip().rstrip("/") for word in done.stdout.split()] == wanted


def test_the_page_of_the_command_line_is_what_the_tool_makes() -> None:
    module = tool("make_cli_page")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python tools/docs/make_cli_page.py"
