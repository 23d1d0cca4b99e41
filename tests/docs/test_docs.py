"""README and the pages of softcache/docs: every block of code runs on small data, every link leads somewhere, every verb is told.

A block is run page by page, in order, in one folder for each page, so that it may use what an earlier block made. What is not
run says why: ```sh illustration: needs a GPU. A `python` or `toml` block that begins with `# name.py` or `# name.toml` is a file,
which a later block uses.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import softcache
from softcache.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "softcache" / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]

README_BYTES = 12_000
RUN = ("sh", "python", "toml")
ILLUSTRATION = "illustration:"
MOST_ILLUSTRATIONS = 0.2
QUICK_START = "quick start"  # .ci/run runs this block as it stands
SLOW = ("CODECS", "FEATURES", "LOSSES", "START", "TRAINING", "VIEWS")  # pages that take more than a few seconds

# what a reader has and the tests have not, and what takes long: (pattern, what stands in its place)
SUBSTITUTIONS = (
    (r"torchvision:MNIST\?root=data", "synthetic:images?size=28"),
    (r"&train=true\b", "&split=train&channels=1&count=64"),
    (r"&train=false\b", "&split=test&channels=1&count=64"),
    (r"tsv:\$D/(train|test)\.tsv\.gz\?header=true", r"synthetic:texts?count=80&split=\1"),
    (r"digits\?split=test(?!&)", "digits?split=test&rows=0-49"),
    (r"(?<![\w/.:-])digits(?![\w?/.-])", "digits?rows=0-59"),
    (r"--epochs \d+", "--epochs 1"),
    (r"\bepochs( ?)=( ?)\d+", r"epochs\1=\g<2>1"),
    (r"hidden=1200,1200", "hidden=16,16"),
    (r"hidden=800,800", "hidden=8,8"),
    (r"softcache:cnn(?!\?)", "softcache:cnn?width=4"),
    (r"softcache:resnet8\b", "softcache:cnn?width=2"),
    (r"num_workers=\d+", "num_workers=0"),
)
TEACHER_AND_CACHE = """
softcache train --data digits --student 'softcache:mlp?hidden=8' --loss ce --epochs 1 --out runs/teacher --quiet
softcache dump --data digits --teacher runs/teacher --out caches/a --quiet
"""
# what a page takes as given, in its own folder: (language, text), before its first block
BEFORE: Mapping[str, Sequence[tuple[str, str]]] = {
    "README": (
        ("sh", TEACHER_AND_CACHE),
        (
            "python",
            """
from torch.utils.data import DataLoader
from softcache.data.transfer_set import open_transfer_set
train_set = open_transfer_set("digits")
student = lambda images: images.flatten(1).float()[:, :10].requires_grad_()
""",
        ),
    ),
    "FAQ": (("sh", TEACHER_AND_CACHE),),
}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        where: page and line of its fence.
        language: the first word behind the fence; "" for plain output.
        note: the other words.
        text: what stands between the fences.
    """

    where: str
    language: str
    note: str
    text: str

    @property
    def counts(self) -> bool:
        return self.language in RUN

    @property
    def is_run(self) -> bool:
        return self.counts and not self.note.startswith(ILLUSTRATION) and self.note != QUICK_START

    @property
    def file(self) -> str | None:
        """The name of the file that it shows."""
        found = re.match(r"# ([\w.-]+\.(py|toml))$", self.text.split("\n")[0])
        return found[1] if found else None


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order; ValueError for a fence that is not closed."""
    opened: tuple[int, str] | None = None
    held: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if opened is None and line.startswith("```"):
            opened, held = (number, line.removeprefix("```")), []
        elif opened is not None and line == "```":
            language, _, note = opened[1].partition(" ")
            yield Block(f"{page}, line {opened[0]}", language, note.strip(), "\n".join(held))
            opened = None
        else:
            held.append(line)
    if opened is not None:
        raise ValueError(f"{page}, line {opened[0]}: the block is not closed")


def prose_of(text: str) -> str:
    """A page without its fenced blocks and code spans: a link in them is none."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "``", outside)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- blocks


def substituted(text: str) -> str:
    for pattern, replacement in SUBSTITUTIONS:
        text = re.sub(pattern, replacement, text)
    return text


def shell_lines(text: str) -> list[str]:
    """The commands of a block: lines that go on are joined, comments and empty lines are left out."""
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.split("\n") if line.strip() and not line.strip().startswith("#")]


def simple_words(line: str, variables: Mapping[str, str]) -> list[str] | None:
    """The words of a line that is one `softcache` command, or one assignment; None where it needs a shell."""
    expanded = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
    lexer = shlex.shlex(expanded, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in lexer:
        if word.startswith("#"):
            break
        if set(word) <= set("();<>|&"):
            return None
        words.append(word)
    is_assignment = len(words) == 1 and re.match(r"[A-Z]\w*=", words[0])
    return words if words[0] == "softcache" or is_assignment else None


class Page:
    """Runs blocks in the current folder: what they say to Python, and to the shell, goes on from one to the next."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "docs"}
        self.variables: dict[str, str] = {}

    def run(self, block: Block) -> None:
        """AssertionError, or the block's own error, where it does not run to its end."""
        text = substituted(block.text)
        if block.file is not None:
            Path(block.file).write_text(text + "\n", encoding="utf-8")
        elif block.language == "python":
            exec(compile(text, block.where, "exec"), self.names)
        else:
            assert block.language == "sh", f"{block.where}: a toml block is a file, its first line is # name.toml"
            self._shell(text, block.where)

    def _shell(self, text: str, where: str) -> None:
        lines = shell_lines(text)
        if any(simple_words(line, {}) is None for line in lines):
            self._bash(text, where)
            return
        for line in lines:
            words = simple_words(line, self.variables)
            assert words is not None, f"{where}: quote what the shell would take apart: {line}"
            if words[0] == "softcache":
                code = main(words[1:])
                assert code == 0, f"{where}: exit code {code}: {line}"
            else:
                name, _, value = words[0].partition("=")
                self.variables[name] = value

    def _bash(self, text: str, where: str) -> None:
        """In a shell of its own, for pipes, loops and other programs; slow, for each command is a process."""
        bin = Path("bin").absolute()
        bin.mkdir(exist_ok=True)
        for name, arguments in (
            ("softcache", "-m softcache"),
            ("python", ""),
            ("torchrun", "-m torch.distributed.run"),
        ):
            shim = bin / name
            shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
            shim.chmod(0o755)
        paths = [str(Path(softcache.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | self.variables
        environment |= {"PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def run_page(name: str, blocks: Sequence[Block]) -> int:
    """Run a page's blocks in the current folder; how many that were."""
    page = Page()
    for number, (language, text) in enumerate(BEFORE.get(name, ())):
        page.run(Block(f"BEFORE[{name!r}][{number}]", language, "", text))
    chosen = [block for block in blocks if block.is_run]
    for block in chosen:
        page.run(block)
    return len(chosen)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run blocks in, as from a Python prompt; modules and torch's threads are put back afterwards."""
    threads, modules = torch.get_num_threads(), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem in SLOW else ()) for p in PAGES],
)
def test_the_blocks_of_a_page_run(page: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = list(blocks_of(page.name, read(page)))
    assert run_page(page.stem, blocks) == sum(block.is_run for block in blocks)
    capsys.readouterr()


def test_few_blocks_are_illustrations_and_each_says_why() -> None:
    counted = [block for page in PAGES for block in blocks_of(page.name, read(page)) if block.counts]
    shown = [block for block in counted if block.note.startswith(ILLUSTRATION)]
    for block in counted:
        assert block.note in ("", QUICK_START) or block in shown, f"{block.where}: what does {block.note!r} mean?"
    for block in shown:
        reason = block.note.removeprefix(ILLUSTRATION).split()
        assert len(reason) >= 2, f"{block.where}: say why it cannot be run"
    assert len(counted) > 40
    assert len(shown) <= MOST_ILLUSTRATIONS * len(counted), [block.where for block in shown]


def test_a_block_is_code_that_is_run_or_plain_output() -> None:
    for page in PAGES:
        blocks = list(blocks_of(page.name, read(page)))
        for place, block in enumerate(blocks):
            assert block.language in ("", "text", *RUN), f"{block.where}: a block of {block.language}"
            if not block.counts:
                commands = [line for line in block.text.split("\n") if re.match(r"(\$ )?softcache [a-z]", line)]
                assert not commands, f"{block.where}: commands belong into a block of sh: {commands}"
            if block.is_run:
                assert "..." not in block.text, f"{block.where}: what stands for the three dots?"
            if block.is_run and block.file is not None:
                later = "\n".join(other.text for other in blocks[place + 1 :] if other.is_run)
                assert block.file in later or Path(block.file).stem in later, f"{block.where}: no later block uses it"


def test_the_quick_start_is_what_ci_runs() -> None:
    (block,) = [b for page in PAGES for b in blocks_of(page.name, read(page)) if b.note == QUICK_START]
    assert block.language == "sh" and len(block.text.split("\n")) == 2 and block.where.startswith("README.md")
    assert f"```sh {QUICK_START}$" in (ROOT / ".ci" / "run").read_text()
    assert block.text.endswith(".venv/bin/pytest -n auto --dist worksteal")


# --------------------------------------------------------------------------------------------------------------- links


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M):
        bare = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", bare.lower()).replace(" ", "-")
        number, unique = 0, name
        while unique in found:
            number += 1
            unique = f"{name}-{number}"
        found.add(unique)
    return found


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere: no such file, or no such heading in it."""
    broken = []
    for target in re.findall(r"]\(([^)\s]+)\)", prose_of(read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(read(file))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_tool_that_is_named_is_there(page: Path) -> None:
    named = set(re.findall(r"(?<![\w/])(?:tools|tests)/[\w./-]*\w", read(page)))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_readme_links_every_page() -> None:
    linked = {Path(target).name for target in re.findall(r"]\((softcache/docs/[\w.]+)", read(README))}
    assert {page.name for page in DOCS.glob("*.md")} <= linked


# --------------------------------------------------------------------------------------------------------------- README


def test_readme_is_short() -> None:
    assert README.stat().st_size <= README_BYTES


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_begins_with_what_it_answers(page: Path) -> None:
    heading, empty, first = read(page).split("\n")[:3]
    assert heading.startswith("# ") and not empty and re.match(r"[A-Z`*]", first)


def verbs_of_the_parser() -> list[str]:
    done = subprocess.run([sys.executable, "-m", "softcache", "--help"], capture_output=True, text=True, check=True)
    return re.findall(r"^ {4}([a-z]+)(?: {2,}|$)", done.stdout, re.MULTILINE)


def verbs_of_readme(text: str) -> list[str]:
    _, _, section = text.partition("\n## Verbs\n")
    return re.findall(r"^\| `([a-z]+)` \|", section.partition("\n## ")[0], re.MULTILINE)


def test_readme_has_every_verb_of_the_parser_and_no_other() -> None:
    told, there = verbs_of_readme(read(README)), verbs_of_the_parser()
    assert len(there) > 10 and len(told) == len(set(told))
    assert sorted(told) == sorted(there)


# ------------------------------------------------------------------------------------------------------------------ FAQ


@cache
def strings_of_the_package() -> str:
    """Every string constant of the code, those that Python joins joined; what is filled in as a gap."""
    found = []
    for file in sorted(Path(softcache.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def fragments(message: str) -> list[str]:
    """The fixed parts of a message, which is written with CAPITALS or numbers where a message fills something in."""
    words = " ".join(message.split())
    parts = re.split(r"'?\b[A-Z][A-Z0-9_.]+\b'?|'[^']*'|\b\d[\d.,]*\b|\(", words.partition(": ")[2])
    return [part.strip(" :;,.()") for part in parts if len(part.split()) >= 4]


def test_the_messages_of_the_faq_are_those_of_the_code() -> None:
    messages = [b for b in blocks_of("FAQ.md", read(DOCS / "FAQ.md")) if b.text.startswith("softcache: error:")]
    assert len(messages) >= 15
    for block in messages:
        parts = fragments(block.text.removeprefix("softcache: "))
        assert parts, block.where
        for part in parts:
            assert part in strings_of_the_package(), f"{block.where}: no message says {part!r}"


# ---------------------------------------------------------------------------------------------------- do the tests tell?


def planted(tmp_path: Path, text: str) -> tuple[Path, list[Block]]:
    page = tmp_path / "PLANTED.md"
    page.write_text(text, encoding="utf-8")
    return page, list(blocks_of(page.name, text))


def test_a_planted_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "THERE.md").write_text("# There\n\n## Two words: `x`, y\n")
    good = "# Planted\n\n[a](THERE.md) [b](THERE.md#two-words-x-y) [c](#planted) [d](https://host/x) `[e](code)`\n"
    page, _ = planted(tmp_path, good)
    assert broken_links(page) == []
    for target in ("GONE.md", "THERE.md#three-words", "#gone", "../GONE.md"):
        page, _ = planted(tmp_path, f"{good}[f]({target})\n")
        assert broken_links(page) == [target]


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```python\nassert 1 + 1 == 3\n```", AssertionError),
        ("```python\nsoftcache.gone\n```", NameError),
        ("```sh\nsoftcache losses --no-such-flag\n```", AssertionError),
        ("```sh\nsoftcache nosuchverb\n```", AssertionError),
        ("```sh\nsoftcache inspect caches/none\n```", AssertionError),
        ("```sh\nfalse | true\n```", AssertionError),
        ("```toml\nepochs = 3\n```", AssertionError),
    ],
    ids=["assert", "name", "flag", "verb", "folder", "shell", "toml"],
)
def test_a_planted_failing_block_is_found(own_folder: Path, block: str, error: type[Exception]) -> None:
    _, before = planted(own_folder, "```python\ntwo = 2\n```\n")
    _, blocks = planted(own_folder, f"```python\nassert two == 2\n```\n{block}\n")
    with pytest.raises(error):
        run_page("PLANTED", [*before, *blocks])
    assert run_page("PLANTED", [*before, *blocks[:1]]) == 2


def test_blocks_hand_on_files_names_and_variables(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """\
```sh
NAME=dkd
softcache losses \\
    $NAME  # one
```
```toml
# a.toml
epochs = 60
```
```python
from pathlib import Path
assert Path("a.toml").read_text() == "# a.toml\\nepochs = 1\\n"
```
```sh
test -f a.toml && test $NAME = dkd
```
```sh illustration: needs a GPU
softcache nosuchverb
```
```
softcache: error: not run
```
"""
    _, blocks = planted(own_folder, text)
    assert run_page("PLANTED", blocks) == 4
    assert "decoupled" in capsys.readouterr().out
    assert [b.where for b in blocks if b.note] == ["PLANTED.md, line 17"]


def test_every_substitution_has_a_page_that_needs_it() -> None:
    code = "\n".join(b.text for page in PAGES for b in blocks_of(page.name, read(page)) if b.is_run)
    code += "\n".join(text for pieces in BEFORE.values() for _, text in pieces)
    for pattern, _ in SUBSTITUTIONS:
        assert re.search(pattern, code), f"no block has {pattern!r}"
