"""Data sets that are not ours, joined with a cache of words: as many words, under the same labels, whoever holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from columns import HuggingFace
from torch.utils.data import ConcatDataset, Subset
from words_cache import COUNT, NAMES, sentences, write_cache

import softcache
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import ClassMismatchError, ContentMismatchError, JoinError, LabelMismatchError
from softcache.targets import Cache


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TransferSet:
    return open_transfer_set(sentences(tmp_path_factory.mktemp("sentences") / "s.jsonl", count=COUNT))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("words")
    return softcache.open(write_cache(path / "one", sentences(path / "s.jsonl", count=COUNT)), quiet=True)


class Dicts:
    """The same sentences in somebody's own class."""

    def __init__(self, data: TransferSet, named: bool = False) -> None:
        self.sample_keys = list(data.keys)
        self.samples: list[Any] = []
        for words, tags in (data[i] for i in range(len(data))):
            numbers = [-100 if tag < 0 else int(tag) for tag in tags]
            self.samples.append((list(words), [None if n < 0 else NAMES[n] for n in numbers] if named else numbers))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Any:
        words, tags = self.samples[row]
        return {"words": words, "tags": tags}


class Arrays(Dicts):
    def __getitem__(self, row: int) -> Any:
        words, tags = self.samples[row]
        return {"tokens": np.array(words, object), "ner_tags": np.array(tags)}


class Pairs(Dicts):
    def __getitem__(self, row: int) -> Any:
        return self.samples[row]


def table(data: TransferSet) -> HuggingFace:
    own = Dicts(data, named=True)
    words, tags = zip(*own.samples, strict=True)
    return HuggingFace({}, {"w": list(words), "t": list(tags), "k": own.sample_keys})


def wrong(data: TransferSet, what: str) -> Dicts:
    found = Dicts(data, named=what == "class")
    words, tags = found.samples[7]
    tags = [*tags]
    if what == "count":
        found.samples[7] = ([*words, "more"], [*tags, tags[-1]])
    elif what == "label":
        place = next(i for i, tag in enumerate(tags) if tag >= 0)
        found.samples[7] = (words, [(tag + 1) % 5 if i == place else tag for i, tag in enumerate(tags)])
    elif what == "tags":
        found.samples[7] = (words, tags[1:])
    else:
        found.samples[7] = (words, ["nobody" for _ in tags])
    return found


@pytest.mark.parametrize("made", [Dicts, lambda data: Dicts(data, named=True), Arrays, Pairs, lambda data: data])
@pytest.mark.parametrize("part", ["whole", "some", "both", "mixed"])
def test_words_that_are_right_are_joined_and_looked_at_without_a_word(
    cache: Cache, data: TransferSet, made: Any, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = made(data)
    some, others = Subset(own, [9, 7, 4]), Subset(data, [1, 2])
    given = {
        "whole": own,
        "some": some,
        "both": Subset(ConcatDataset([some, own]), [3, 1, 40, 2]),
        "mixed": ConcatDataset([some, others]),
    }
    joined = cache.join(given[part], check_content="full")
    assert joined.labels_changed == 0 and capsys.readouterr().err == ""


def test_as_many_words_as_classes_are_no_row_of_yes_and_no(cache: Cache, data: TransferSet) -> None:
    own = Pairs(data)
    own.samples = [(words, np.array(tags)) for words, tags in own.samples]
    chosen = [i for i, (words, _) in enumerate(own.samples) if len(words) == len(NAMES)]
    assert chosen and len(cache.join(Subset(own, chosen))) == len(chosen)


def test_a_table_of_words_is_joined_by_its_columns(cache: Cache, data: TransferSet) -> None:
    assert len(cache.join(table(data), key="k", item="w", label="t", check_content="full")) == COUNT


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        ("count", ContentMismatchError, r"1 of \d+ samples have another number of words .*000007 \("),
        ("label", LabelMismatchError, r"1 labels differ from the cache's: .*000007, position"),
        ("tags", ContentMismatchError, r"sample 7: \d+ tags for \d+ words"),
        ("class", ClassMismatchError, r"tag 'nobody' is not"),
    ],
)
def test_other_words_and_labels_are_refused_in_whatever_holds_them(
    cache: Cache, data: TransferSet, what: str, error: type[JoinError], match: str
) -> None:
    own = wrong(data, what)
    for given in (own, Subset(own, [3, 7]), ConcatDataset([Subset(data, [1]), own])):
        with pytest.raises(error, match=match):
            cache.join(given, check_content="none")
    if what == "label":
        assert cache.join(own, check_content="none", labels="dataset").labels_changed == 1


def test_a_selection_of_a_set_of_ours_is_compared_too(tmp_path: Path, cache: Cache, data: TransferSet) -> None:
    lines = "".join(
        f'{{"words": {["x", *words]}, "tags": {["O"] * (len(words) + 1)}}}\n'.replace("'", '"')
        for words, _ in map(data.__getitem__, range(COUNT))
    )
    (tmp_path / "s.jsonl").write_text(lines)
    other = open_transfer_set(f"table:{tmp_path}/s.jsonl?words=words&tags=tags&classes={','.join(NAMES)}")
    for given in (Subset(other, [5, 3]), ConcatDataset([other, data])):
        with pytest.raises(ContentMismatchError, match="another number of words"):
            cache.join(given, check_content="none")


def test_what_cannot_be_told_to_be_words_is_joined_with_a_warning(
    cache: Cache, data: TransferSet, capsys: pytest.CaptureFixture[str]
) -> None:
    class Numbers(Dicts):
        def __getitem__(self, row: int) -> Any:
            return {"input_ids": np.arange(3)}

    cache.join(Numbers(data), check_content="none")
    assert "whether Numbers has the same ones is not known" in capsys.readouterr().err
