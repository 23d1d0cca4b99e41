"""Chat messages as texts: rendered by the user's own template, whose answers carry loss."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.errors import ConfigError, DataError, require_extra

ROLE = "assistant"  # whose messages carry loss
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer's folder.

    Attributes:
        tokenizer: transformers' own, which renders it.
        text: the template, which is code: Jinja's, run in transformers' sandbox.
    """

    tokenizer: Any
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    def facts(self) -> dict[str, str]:
        """What the manifest says."""
        return {"template": self.sha256, "loss": ROLE}

    def rendered(self, messages: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and which letters are answers: those that the template marks, else whole turns.

        Raises:
            DataError: no messages, or a template that renders the beginning of a conversation otherwise when more follows.
        """
        _check(messages, where)
        try:
            return self._marked(messages) if _MARKS.search(self.text) else self._by_prefixes(messages, where)
        except DataError:
            raise
        except Exception as exc:  # of somebody's template
            raise DataError(
                f"{where}: the chat template cannot render it: {type(exc).__name__}: {str(exc)[:200]}",
                tip="look at the roles and their order; or write prompt and completion",
            ) from None

    def _text(self, messages: Sequence[Any], *, asks: bool = False) -> str:
        """`asks`: it ends where the next answer begins."""
        found: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        return found

    def _marked(self, messages: Sequence[Any]) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        named = self.tokenizer.special_tokens_map
        made: Any = render_jinja_template(
            [list(messages)], chat_template=self.text, return_assistant_tokens_mask=True, **named
        )
        texts, spans = made
        return texts[0], [(int(start), int(stop)) for start, stop in spans[0]]

    def _by_prefixes(self, messages: Sequence[Any], where: str) -> tuple[str, list[tuple[int, int]]]:
        whole, spans = self._text(messages), []
        for number, one in enumerate(messages):
            if one["role"] != ROLE:
                continue
            before, behind = self._text(messages[:number], asks=True), self._text(messages[: number + 1])
            if not (behind.startswith(before) and whole.startswith(behind)):
                raise DataError(
                    f"{where}: the chat template writes the messages before answer {number} otherwise when more follows, so "
                    "which tokens are the answer is not known",
                    tip="mark the answers in the template, {% generation %} ... {% endgeneration %}, or write prompt and "
                    "completion",
                )
            spans.append((len(before), len(behind)))
        return whole, spans


def _check(messages: Any, where: str) -> None:
    """DataError unless these are messages, with an answer among them."""
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: its messages are no list of any", tip='write [{"role": "user", "content": "..."}, ...]'
        )
    for number, one in enumerate(messages):
        if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
            raise DataError(f"{where}: message {number} has no role", tip='write {"role": "user", "content": "..."}')
    if not any(one["role"] == ROLE for one in messages):
        raise DataError(f"{where}: none of its messages is the {ROLE}'s, so nothing carries loss", tip="leave it out")


def read_template(tokenizer: str) -> Template:
    """The chat template of `tokenizer=FOLDER`.

    Raises:
        ConfigError: no folder, or none that has one.
        MissingExtraError: transformers is not installed.
    """
    require_extra("transformers", "text", "a chat template")
    from transformers import AutoTokenizer

    folder = Path(tokenizer.removeprefix("hf:")).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"tokenizer={tokenizer}: messages need a chat template, and a tokenizer.json has none",
            tip="give the folder that holds it beside the tokenizer: tokenizer=FOLDER",
        )
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as exc:  # of many kinds, and from several libraries
        raise ConfigError(
            f"tokenizer={tokenizer}: transformers cannot read it: {str(exc)[:200]}",
            tip="give a folder that save_pretrained wrote",
        ) from None
    many = "several" if found.chat_template else "no"
    if not isinstance(found.chat_template, str) or not found.chat_template:
        raise ConfigError(
            f"tokenizer={tokenizer}: the data are messages, and it has {many} chat templates",
            tip="give the folder of a model that chats, with one template; or write prompt and completion",
        )
    return Template(found, found.chat_template)
