"""ImageNet's classes go by two kinds of names, WordNet ids and words: which of the 1,000 of ILSVRC-2012 a list means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

COUNT = 1000


@cache
def ilsvrc_ids() -> tuple[str, ...]:
    """The WordNet ids of ILSVRC-2012's 1,000 classes, in the order in which every model of them counts."""
    return tuple(Path(__file__).with_name("ilsvrc2012.txt").read_text(encoding="ascii").split())


@cache
def _words() -> tuple[str, ...]:
    """What torchvision calls these classes, one word each."""
    from torchvision.models import ResNet18_Weights  # a second to import: only who compares words with ids pays

    return tuple(_folded(word) for word in ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def wordnet_ids(names: Sequence[str]) -> tuple[str, ...] | None:
    """The ids of a list that is ILSVRC's 1,000 classes in their order, by words; None for every other list.

    A name may be a word or several (`tench, Tinca tinca`), of which the first counts.
    """
    if len(names) != COUNT or _first(names[0]) != "tench":  # looked at before torchvision is loaded
        return None
    same = all(_is_same(_first(name), word) for name, word in zip(names, _words(), strict=True))
    return ilsvrc_ids() if same else None


def ids_of_words(names: Sequence[str]) -> tuple[str, ...] | None:
    """The ids of some of the classes, by words of which each means one class alone; None where one does not."""
    words = _words()
    counts = Counter(words)
    longer = {word.partition(" ")[0] for word in words if " " in word and word.partition(" ")[0] in counts}
    clear = {word: id for word, id in zip(words, ilsvrc_ids(), strict=True) if counts[word] == 1 and word not in longer}
    found = [clear.get(_first(name)) for name in names]
    return None if None in found else tuple(id for id in found if id is not None)


def _first(name: str) -> str:
    """The first of a name's words, without the number that tells two of one name apart."""
    return _folded(re.sub(r" \([0-9]+\)$", "", name.partition(",")[0]))


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _is_same(name: str, word: str) -> bool:
    """`crane` is torchvision's `crane bird`, and the first word of `maillot, tank suit` its `maillot tank suit`."""
    return name == word or word.startswith(f"{name} ")
