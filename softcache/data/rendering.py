"""From texts to tokens: the tokenizer, what is put around a text, and how a long one is cut into windows.

What is chosen here is the same for all members of a cache, and stands in its manifest as `rendering` and `vocabulary`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import ConfigError, DataError, nearest, require_extra

NONE = "none"
PROBE = "a"  # what a tokenizer puts around it, it puts around any text


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes:
        definition: the bytes of tokenizer.json, as they lay in the file.
        where: the file, for messages.
    """

    definition: bytes = field(repr=False)
    where: str = "tokenizer.json"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.definition).hexdigest()

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id."""
        found: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        return found

    @cached_property
    def count(self) -> int:
        """C = 1 + the largest id: ids that no token has stay holes."""
        return 1 + max(self.ids.values())

    @cached_property
    def special(self) -> dict[int, str]:
        """Id -> token, of those that stand for no text, such as the end of one."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.special}

    @cached_property
    def tokenizer(self) -> Any:
        """It tells where each token lies in the text, spaces counted in; it neither cuts nor pads.

        Raises:
            DataError: what it is made of is no tokenizer.json.
        """
        from tokenizers import Tokenizer

        try:
            told = json.loads(self.definition)
            _count_spaces_in(told)
            made = Tokenizer.from_str(json.dumps(told))
        except Exception as exc:  # the library raises plain exceptions
            raise DataError(
                f"{self.where}: is no tokenizer.json: {str(exc)[:200]}", tip="give the file that tokenizers wrote"
            ) from None
        made.no_truncation()
        made.no_padding()
        if not made.get_vocab_size():
            raise DataError(f"{self.where}: has no tokens", tip="give the file of a trained tokenizer")
        return made

    def id_of(self, token: str, what: str) -> int:
        """The id of a token that the user names.

        Raises:
            ConfigError: there is none.
        """
        if token not in self.ids:
            raise ConfigError(f"{what}={token}: {self.where} has no such token", tip=nearest(token, self.ids))
        return self.ids[token]

    def pieces(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, nothing put around it, and where each lies in it."""
        row = self.tokenizer.encode(text, add_special_tokens=False)
        return row.ids, row.offsets

    def around(self) -> tuple[list[str], list[str]]:
        """The tokens that it puts before and behind a text by itself."""
        whole = self.tokenizer.encode(PROBE).tokens
        bare = self.tokenizer.encode(PROBE, add_special_tokens=False).tokens
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []


def _count_spaces_in(told: Any) -> None:
    """Where a token lies shall be told with its spaces: else one across the border of prompt and completion is not seen."""
    if isinstance(told, dict):
        if "trim_offsets" in told:
            told["trim_offsets"] = False
        for one in told.values():
            _count_spaces_in(one)
    elif isinstance(told, list) and len(told) < 64:  # no vocabulary
        for one in told:
            _count_spaces_in(one)


def read_vocabulary(text: str) -> tuple[Vocabulary, Mapping[str, Any]]:
    """The tokenizer of `tokenizer=`: a tokenizer.json, or a folder that holds one; and what tokenizer_config.json beside it says.

    Raises:
        ConfigError: none is named.
        DataError: there is none.
        MissingExtraError: the package tokenizers is not installed.
    """
    if not text:
        raise ConfigError(
            "text: without tokenizer=", tip="name the teacher's: tokenizer=FOLDER, or the path of its tokenizer.json"
        )
    require_extra("tokenizers", "text", "a transfer set of tokens")
    path = Path(text.removeprefix("hf:")).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{path}: there is no tokenizer", tip="give a folder that holds a tokenizer.json, or the file")
    beside = path.with_name("tokenizer_config.json")
    config: Mapping[str, Any] = {}
    if beside.is_file():
        try:
            config = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise DataError(f"{beside}: cannot be read: {exc}", tip="save the tokenizer again") from None
    found = Vocabulary(path.read_bytes(), str(path))
    _ = found.tokenizer
    return found, config if isinstance(config, Mapping) else {}


@dataclass(frozen=True)
class Rendering:
    """How a text becomes tokens.

    Attributes:
        vocabulary: the tokens.
        bos, eos: the token before each sample, and behind each text that was not cut; "none".
        max_tokens: texts are cut behind so many tokens, BOS not counted; 0: they are not.
        window: of a longer text each sample has so many tokens, BOS counted in; 0: a text is one sample.
        stride: how far a window is from the one before it.
        more: what else is the same for all samples: which tokens carry loss, the template.
    """

    vocabulary: Vocabulary
    bos: str
    eos: str
    max_tokens: int = 0
    window: int = 0
    stride: int = 0
    more: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, str]:
        """What the manifest says."""
        numbers = {"max_tokens": self.max_tokens, "window": self.window, "stride": self.stride}
        return {"bos": self.bos, "eos": self.eos, **{n: str(v) for n, v in numbers.items() if v}, **self.more}

    @property
    def _before(self) -> list[int]:
        return [] if self.bos == NONE else [self.vocabulary.ids[self.bos]]

    def samples(self, ids: Sequence[int], trains: Sequence[bool]) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
        """The samples of one text, each (ids (L,) int32, trains (L,) bool), and how many of its tokens were cut off.

        EOS carries loss; BOS does not, nor what a window repeats.
        """
        cut = max(0, len(ids) - self.max_tokens) if self.max_tokens else 0
        kept = np.array(ids[: len(ids) - cut], np.int32)
        carries = np.array(trains[: len(ids) - cut], bool)
        if not cut and self.eos != NONE:
            kept = np.append(kept, np.int32(self.vocabulary.ids[self.eos]))
            carries = np.append(carries, True)
        before = np.array(self._before, np.int32)
        made = []
        for start, stop, again in self._cuts(len(kept)):
            mine = carries[start:stop].copy()
            mine[:again] = False
            made.append((np.concatenate([before, kept[start:stop]]), np.append(np.zeros(len(before), bool), mine)))
        return made, cut

    def _cuts(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, how many of these the window before it has too)."""
        room = self.window - len(self._before)
        if not self.window or count <= room:
            yield 0, count, 0
            return
        start, reached = 0, 0
        while reached < count:
            stop = min(start + room, count)
            yield start, stop, reached - start
            start, reached = start + self.stride, stop


def make_rendering(
    text: str, *, bos: str, eos: str, max_tokens: int, window: int, stride: int, more: Mapping[str, str]
) -> Rendering:
    """The rendering that the parameters of `text:` ask for; of BOS and EOS the tokenizer's own where nothing is said.

    Raises:
        ConfigError: tokens that are not there or not known, or numbers that leave no room.
    """
    vocabulary, config = read_vocabulary(text)
    before, behind = vocabulary.around()
    if not bos and len(before) > 1:
        raise ConfigError(
            f"{vocabulary.where}: puts {' '.join(before)} before a text, and one of them can be BOS",
            tip="say which: bos=TOKEN, or bos=none",
        )
    if not eos and len(behind) > 1:
        raise ConfigError(
            f"{vocabulary.where}: puts {' '.join(behind)} behind a text, and one of them can be EOS",
            tip="say which: eos=TOKEN, or eos=none",
        )
    bos = bos or (before[0] if before else NONE)
    eos = eos or (behind[0] if behind else _named(config.get("eos_token")))
    if not eos:
        raise ConfigError(
            f"{vocabulary.where}: does not say which token ends a text",
            tip="say so: eos=TOKEN; eos=none where the model was trained without one",
        )
    for what, token in (("bos", bos), ("eos", eos)):
        if token != NONE:
            vocabulary.id_of(token, what)
    for what, number in (("max_tokens", max_tokens), ("window", window), ("stride", stride)):
        if number < 0:
            raise ConfigError(f"{what}={number}: is below 0", tip="leave it out for none")
    room = window - (bos != NONE)
    if window and room < 2:
        raise ConfigError(f"window={window} leaves no room for a text", tip="give more tokens")
    if stride and not window:
        raise ConfigError(f"stride={stride} without window=", tip="window=N cuts long texts into samples of N tokens")
    if stride >= room > 0:
        raise ConfigError(
            f"stride={stride} of windows that hold {room} tokens of a text: the first token of each would be asked of nobody",
            tip=f"stride={room - 1} or less: a window begins with tokens of the one before it, as context",
        )
    if window and not stride:
        stride = room - 1
    return Rendering(vocabulary, bos, eos, max_tokens, window, stride, more)


def _named(token: Any) -> str:
    """A token as a tokenizer_config.json writes it; "" of none."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else ""
