"""Texts as sequences of tokens, `text:PATH`: files, folders and JSON lines, cut into samples by a tokenizer."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from softcache.data.chat import Template, read_template
from softcache.data.position_labels import PositionLabels, check_some_word
from softcache.data.rendering import NONE, Rendering, Vocabulary, make_rendering
from softcache.data.sources import PACKINGS, Source, StringTable, read_unpacked
from softcache.errors import ConfigError, DataError, first_offenders, nearest, utf8_tip, warn_once
from softcache.tokens import Tokens

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
TEXT_ENDINGS = (".txt", ".text", ".md")


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        key: names it.
        text: all of it, prompts included.
        answers: which letters carry loss, from and up to; None: all.
    """

    key: str
    text: str
    answers: Sequence[tuple[int, int]] | None = None


@dataclass(frozen=True)
class TokenReader:
    """Items that are tokens, held in memory.

    Attributes:
        ids, trains: (P,) int32 and bool, of all samples, one after the other.
        offsets: (N + 1,) int64, where each sample begins.
    """

    ids: np.ndarray
    trains: np.ndarray
    offsets: np.ndarray
    digest_kind = "item"

    def read(self, row: int) -> tuple[Tokens, None]:
        place = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return Tokens(self.ids[place].copy(), self.trains[place].copy()), None


def text(
    path: Path,
    tokenizer: str = "",
    document: Literal["", "file", "line"] = "",
    key: str = "",
    bos: str = "",
    eos: str = "",
    max_tokens: int = 0,
    window: int = 0,
    stride: int = 0,
) -> Source:
    """Texts as tokens: a text file, a folder of them, or JSON lines with `text`, `messages`, or `prompt` and `completion`.

    Each text is one context. Keys are the file's name below the folder, with `document=line` and of JSON lines also the number
    of the line; of a text in several windows `KEY#w0`, `KEY#w1`, ...

    Args:
        path: a folder holds *.txt, *.text and *.md, at any depth.
        tokenizer: of the teacher: a tokenizer.json, or a folder that holds one.
        document: "line": each line that is not blank is a text. Empty: each file is one. JSON lines are always one each.
        key: of JSON lines, the field that names a text.
        bos, eos: the token before each sample, and behind each text that is not cut; "none". Empty: what the tokenizer puts
            there by itself, and of EOS else what tokenizer_config.json beside it names.
        max_tokens: texts are cut behind so many tokens.
        window: longer texts become several samples of so many tokens.
        stride: how far a window is from the one before it; what it repeats is context alone. 0: each repeats one token.

    Raises:
        DataError: no such file, no tokenizer, or texts that cannot be read.
        ConfigError: parameters that do not go together.
    """
    if not tokenizer:
        raise ConfigError(
            f"text:{path}: without tokenizer=",
            tip="texts as tokens, for language models: tokenizer=FOLDER names the teacher's; texts with classes: "
            f"table:{path}?text=NAME&label=NAME",
        )
    is_json = _unpacked_name(path).endswith(JSON_ENDINGS)
    template = read_template(tokenizer) if is_json and tokenizer and _has_messages(path) else None
    if template is not None:  # which writes what stands around a conversation itself
        bos, eos = bos or NONE, eos or NONE
    more = {} if template is None else template.facts()
    rendered = make_rendering(
        tokenizer, bos=bos, eos=eos, max_tokens=max_tokens, window=window, stride=stride, more=more
    )
    if is_json and document:
        raise ConfigError(f"{path}: document={document} is of text files", tip="leave it out: each line is a text")
    if key and not is_json:
        raise ConfigError(f"{path}: key={key} is of JSON lines", tip="leave it out: keys are the names of the files")
    documents = _json_lines(path, key, template) if is_json else _text_files(path, document == "line")
    return _source(path, documents, rendered, of_template=template is not None)


def _unpacked_name(path: Path) -> str:
    return path.name.removesuffix(path.suffix if path.suffix in PACKINGS else "")


def _text_files(path: Path, by_line: bool) -> Iterator[Document]:
    """The texts of a file, or of all text files below a folder in the order of their names."""
    files = _below(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: holds no text files", tip=f"give a folder of {', '.join(TEXT_ENDINGS)}, or a file")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        found = _read(file)
        if not by_line:
            yield Document(name, found)
            continue
        for number, line in enumerate(found.split("\n")):
            if line.strip():
                yield Document(f"{name}/{number:06d}", line.removesuffix("\r"))


def _below(folder: Path) -> list[Path]:
    files: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        shown = (one for one in names if not one.startswith(".") and _unpacked_name(Path(one)).endswith(TEXT_ENDINGS))
        files += [Path(place, one) for one in shown]
    return sorted(files, key=lambda one: one.relative_to(folder).as_posix())


def _read(file: Path) -> str:
    try:
        return read_unpacked(file).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as exc:
        raise DataError(f"{file}: is not UTF-8: {exc.reason} at byte {exc.start}", tip=utf8_tip("convert it")) from None


def _rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number of the line, its name for messages, object) of each line that is not blank."""
    for number, line in enumerate(_read(path).split("\n")):
        if not line.strip():
            continue
        where = f"{path}, line {number + 1}"
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise DataError(f"{where}: is no JSON: {exc}", tip="write one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: is no JSON object", tip='write {"text": "..."} a line')
        yield number, where, row


def _has_messages(path: Path) -> bool:
    """Whether the first line has."""
    return "messages" in next((row for *_, row in _rows(path)), {})


def _json_lines(path: Path, key: str, template: Template | None) -> Iterator[Document]:
    stem = _unpacked_name(path)
    for number, where, row in _rows(path):
        name = f"{stem}/{number:06d}"
        if key:
            if not isinstance(row.get(key), str | int):
                raise DataError(f"{where}: has no {key!r} that names it", tip=nearest(key, row))
            name = str(row[key])
        if ("messages" in row) != (template is not None):
            raise DataError(
                f"{where}: has {'no ' if template else ''}messages, and the first line has {'' if template else 'none'}".rstrip(),
                tip="make two files of them: messages are rendered by a template, and other texts are not",
            )
        if template is not None:
            yield Document(name, *template.rendered(row["messages"], where))
        else:
            yield _document(name, row, where)


def _document(name: str, row: Mapping[str, Any], where: str) -> Document:
    """What a line of JSON holds."""
    pair = [one for one in ("prompt", "completion") if one in row]
    if (len(pair), "text" in row) not in ((2, False), (0, True)):
        raise DataError(
            f"{where}: has the fields {', '.join(map(repr, row)) or 'of nothing'}",
            tip='give it "text", "messages", or "prompt" and "completion"',
        )
    for one in pair or ["text"]:
        if not isinstance(row[one], str):
            raise DataError(f"{where}: its {one} is {type(row[one]).__name__}, no string", tip="mend the line")
    if pair:
        whole = row["prompt"] + row["completion"]
        return Document(name, whole, [(len(row["prompt"]), len(whole))])
    return Document(name, row["text"])


def _tokens_of(vocabulary: Vocabulary, one: Document) -> tuple[list[int], list[bool]]:
    """Ids of a text, and which carry loss: all, or those that lie in an answer from their first letter to their last."""
    ids, places = vocabulary.pieces(one.text)
    if one.answers is None:
        return ids, [True] * len(ids)
    return ids, [any(first <= start and stop <= last for first, last in one.answers) for start, stop in places]


def _source(path: Path, documents: Iterator[Document], rendered: Rendering, *, of_template: bool) -> Source:
    """Of a template's texts special tokens are a part, and of others none is expected."""
    keys: list[str] = []
    ids, trains, counts, cut = array("i"), bytearray(), array("q"), array("q")
    special, spelt = rendered.vocabulary.special, list[tuple[str, str]]()
    for one in documents:
        tokens, carried = _tokens_of(rendered.vocabulary, one)
        if not of_template and (inside := special.keys() & set(tokens)):
            spelt.append((one.key, special[min(inside)]))
        found, lost = rendered.samples(tokens, carried)
        for number, (mine, carries) in enumerate(found):
            keys.append(one.key if len(found) == 1 else f"{one.key}#w{number}")
            ids.frombytes(mine.tobytes())
            trains += carries.tobytes()
            counts.append(len(mine))
            cut.append(lost if number == len(found) - 1 else 0)
    if not keys:
        raise DataError(f"{path}: holds no text", tip="give some")
    if spelt:
        named = first_offenders((key for key, _ in spelt), len(spelt))
        warn_once(
            f"{path}: {len(spelt):,} texts hold the letters of a special token, such as {spelt[0][1]!r}, and are read with that "
            f"token in their midst: {named}; take the letters out where they are only text"
        )
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.frombuffer(counts, np.int64))])
    reader = TokenReader(np.frombuffer(ids, np.int32), np.frombuffer(bytes(trains), bool), offsets)
    positions = positions_of_tokens(reader.ids, reader.trains, offsets)
    if rendered.max_tokens:
        positions = replace(positions, cut=np.frombuffer(cut, np.int64))
    check_some_word(positions, str(path))
    none = np.full(len(keys), -1, np.int32)
    return Source(reader, StringTable(keys), none, (), positions=positions, rendering=rendered)


def positions_of_tokens(ids: np.ndarray, trains: np.ndarray, offsets: np.ndarray) -> PositionLabels:
    """Which positions have a record, i where token i + 1 of the same sample carries loss, and that token as its label."""
    follows = trains.copy()
    follows[offsets[:-1][offsets[:-1] < len(ids)]] = False  # the first token of a sample is foretold by nobody
    at = np.flatnonzero(follows)  # of what is foretold
    sample = np.searchsorted(offsets, at, side="right") - 1
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(sample, minlength=len(offsets) - 1))])
    listed = (at - 1 - offsets[sample]).astype(np.int64)
    return PositionLabels("tokens", starts, ids[at].astype(np.int32), np.diff(offsets), listed)
