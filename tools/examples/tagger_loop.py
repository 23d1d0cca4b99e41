"""An answer for each word: a tagger in a plain PyTorch loop, from a cache of a larger one's answers.

    softcache train --data conll:train.conll --student softcache:tagger --out runs/teacher
    softcache dump --data conll:train.conll --teacher runs/teacher --out caches/words
    python tools/examples/tagger_loop.py --cache caches/words --data conll:train.conll

The targets of a batch come flat: a row for each word, one sentence after the other, and `at()` says how many words each has.
Losses take these rows as they are; `padded()` lays them out as (B, L, C) with a mask, for networks that want them so. `--quick`
makes a cache of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import softcache
from softcache.data.transfer_set import open_transfer_set
from softcache.losses import ce, kd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.small_data import make_small_words


class Student(nn.Module):
    """A vector for each word by its hash, a GRU over the sentence, and a linear layer."""

    def __init__(self, num_classes: int, words: int = 4096, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, sentences: Sequence[Sequence[str]]) -> Tensor:
        longest = max(map(len, sentences))
        ids = torch.zeros(len(sentences), max(1, longest), dtype=torch.int64)
        for row, words in enumerate(sentences):
            ids[row, : len(words)] = torch.tensor([1 + number_of(word) for word in words], dtype=torch.int64)
        states, _ = self.gru(self.embedding(ids))  # (B, L, 2 D)
        return self.fc(states)  # (B, L, C)


def number_of(word: str) -> int:
    """0..4094, the same in every run: Python's own hash is not."""
    return int.from_bytes(word.lower().encode(), "little") % 4095


def collate(samples: Sequence[Any]) -> tuple[list[Sequence[str]], Tensor, Tensor]:
    """Sentences as they are, the labels of all words one after the other, and the records."""
    sentences = [words for (words, _), _ in samples]
    labels = torch.cat([torch.as_tensor(labels) for (_, labels), _ in samples]).long()
    return sentences, labels, torch.tensor([record for _, record in samples])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required="--quick" not in sys.argv, help="folder that softcache dump wrote")
    parser.add_argument("--data", help="the sentences that were dumped")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="on a few sentences that it makes, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        make_small_words(arguments)
    torch.manual_seed(0)

    cache = softcache.open(arguments.cache)
    joined = cache.join(open_transfer_set(arguments.data))  # refuses a text that is cut into other words
    student = Student(cache.num_classes)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    loader = DataLoader(joined, batch_size=16, shuffle=True, collate_fn=collate)
    for epoch in range(arguments.epochs):
        for sentences, labels, records in loader:
            targets = joined.gather(records)
            mask = targets.at().mask()  # (B, L): where a sentence has a word
            student_logits = student(sentences)[:, : mask.shape[1]][mask]  # (P, C): of words alone, as the targets are
            loss = 0.9 * kd(student_logits, targets.flat(), temperature=2.0) + 0.1 * ce(student_logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: last loss {loss.item():.4f}")

    right, agreed = [], []
    with torch.no_grad():
        for sentences, labels, records in DataLoader(joined, batch_size=64, collate_fn=collate):
            teacher, mask = joined.gather(records).padded()  # (B, L, C) and (B, L)
            said = student(sentences)[:, : mask.shape[1]].argmax(dim=2)
            agreed.append((said == teacher.argmax(dim=2))[mask])
            right.append((said[mask] == labels)[labels >= 0])
    print(f"accuracy on {len(torch.cat(right))} words: {torch.cat(right).float().mean():.4f}")
    print(f"agreement with the teacher on {len(torch.cat(agreed))} words: {torch.cat(agreed).float().mean():.4f}")


if __name__ == "__main__":
    main()
