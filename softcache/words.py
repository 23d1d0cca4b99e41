"""An item that is the words of a text: what a tagger answers about, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from softcache.errors import DataError

_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # what ends a line or a string, and is no letter
MOST_SHOWN = 40  # letters of a word in a message


class Words(tuple[str, ...]):
    """The words of a sample, in order; maybe none. A tuple that is told from a pair of texts by its type."""

    __slots__ = ()


def as_words(found: Any, where: str) -> Words:
    """A list of words as the item that it is.

    Args:
        where: the sample, for the message.

    Raises:
        DataError: no list of strings; a word that is empty, only spaces, or holds a line break or another control character.
    """
    if hasattr(found, "tolist"):  # a NumPy array, as a column of a table may have it
        found = found.tolist()
    if isinstance(found, str) or not isinstance(found, Sequence):
        what = "nothing" if found is None else f"{type(found).__name__} {str(found)[:MOST_SHOWN]!r}"
        raise DataError(f"{where}: words are a list of strings, found {what}", tip='give a list: ["a", "word"]')
    for place, word in enumerate(found):
        if not isinstance(word, str):
            raise DataError(f"{where}: word {place} is {word!r}, which is no string", tip="words are strings")
        if not word or word.isspace():
            what = "empty" if not word else f"{word!r}, nothing but spaces"
            raise DataError(f"{where}: word {place} is {what}", tip="leave it out together with its tag")
        if unfit := _UNFIT.search(word):
            raise DataError(
                f"{where}: word {place}, {word[:MOST_SHOWN]!r}, holds {unfit[0]!r}, a control character",
                tip="a word is a piece of one line: take the character out, or cut the word in two",
            )
    return Words(found)
