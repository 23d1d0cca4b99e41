"""Sentences with a part of speech for each word, for the recipe `tagging`: one column of a table, tagged by a small model.

    pip install denckring-en-pos==0.6.0
    python tools/data/tag_sentences.py data/SST-2/train.tsv.gz data/SST-2-tagged/train.conll
    python tools/data/tag_sentences.py data/SST-2/test.tsv.gz data/SST-2-tagged/test.conll

The model is an averaged perceptron of 1 MB that was trained on the English Web Treebank of Universal Dependencies (Apache-2.0 and
CC-BY-SA-4.0); by its makers 92.7 % of the tags of unseen text are right. It goes by words, and was trained without punctuation:
what has neither letter nor digit is PUNCT here, and is not shown to it.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def sentences(path: Path, column: str) -> Iterator[list[str]]:
    """The words of each row, which stand apart by spaces."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        place = next(lines).rstrip("\n").split("\t").index(column)
        for line in lines:
            if words := line.rstrip("\n").split("\t")[place].split():
                yield words


def tagged(tagger: Any, words: Sequence[str]) -> list[str]:
    """A tag for each word: the universal part of speech, and of verbs behind a point their form."""
    told = [word for word in words if any(map(str.isalnum, word))]
    tags = iter(tagger.tag(told))
    found = [next(tags) if any(map(str.isalnum, word)) else "PUNCT|-" for word in words]
    return [tag.removesuffix("|-").replace("|", ".") for tag in found]


class ByLength:
    """In the model's place, to see how the file looks: long words are nouns."""

    def tag(self, words: Sequence[str]) -> list[str]:
        return ["NOUN|-" if len(word) > 4 else "DET|-" for word in words]


def written(words: Sequence[str], tags: Sequence[str]) -> str:
    """A sentence as a CoNLL file has it."""
    return "".join(f"{word}\t{tag}\n" for word, tag in zip(words, tags, strict=True)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    needed = None if "--quick" not in sys.argv else "?"
    parser.add_argument("table", type=Path, nargs=needed, help="tab-separated, with a header; .gz too")
    parser.add_argument("out", type=Path, nargs=needed, help="a CoNLL file: word, tab, tag")
    parser.add_argument("--column", default="sentence", help="of the sentences (default: sentence)")
    parser.add_argument("--quick", action="store_true", help="show a sentence, tagged by a rule in the model's place")
    arguments = parser.parse_args()
    if arguments.quick:
        words = ["a", "charming", "journey", ",", "and", "often", "affecting", "."]
        print(written(words, tagged(ByLength(), words)), end="")
        return
    try:
        model, count = importlib.import_module("denckring_en_pos").tagger(), 0
    except ImportError:
        parser.error("it takes a model that tags words: pip install denckring-en-pos==0.6.0")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.out, "w", encoding="utf-8", newline="\n") as out:
        for words in sentences(arguments.table, arguments.column):
            out.write(written(words, tagged(model, words)))
            count += 1
    print(f"{arguments.out}: {count:,} sentences")


if __name__ == "__main__":
    main()
