"""A convolutional network for short texts, and the vocabulary it reads them with.

Source: Kim, "Convolutional Neural Networks for Sentence Classification" (2014), with embeddings learned from scratch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError, first_offenders
from softcache.models.inputs import PAD, SEPARATOR, UNKNOWN, TextInput, is_pair, tokenize
from softcache.models.model import Model
from softcache.words import Words


class TextCNN(nn.Module):
    """Embedding, one convolution per kernel width, maximum over time, dropout, linear.

    The maximum leaves out windows that exist only because a longer text shares the batch: logits depend on the text
    alone.
    """

    def __init__(
        self, tokens: int, embedding: int, width: int, kernels: tuple[int, ...], dropout: float, num_classes: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, embedding, padding_idx=PAD)
        self.convs = nn.ModuleList(nn.Conv1d(embedding, width, kernel) for kernel in kernels)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width * len(kernels), num_classes)
        self.kernels = kernels

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)  # (B, embedding, L)
        lengths = (ids != PAD).sum(1).clamp(min=max(self.kernels))  # (B,), what the text would have alone
        pooled = []
        for kernel, conv in zip(self.kernels, self.convs, strict=True):
            h = conv(x).relu()  # (B, width, L - kernel + 1)
            foreign = torch.arange(h.shape[2], device=h.device) > (lengths - kernel)[:, None]  # (B, L - kernel + 1)
            pooled.append(h.masked_fill(foreign[:, None], 0.0).amax(2))  # 0 is the least that ReLU leaves
        return self.fc(self.dropout(torch.cat(pooled, dim=1)))  # (B, C)


def textcnn(
    num_classes: int,
    vocabulary: str | Sequence[str] | None = None,
    width: int = 100,
    kernels: tuple[int, ...] = (3, 4, 5),
    embedding: int = 100,
    dropout: float = 0.5,
    max_tokens: int = 64,
) -> Model:
    """A TextCNN on strings, or on pairs of them.

    Args:
        num_classes: C.
        vocabulary: the tokens, or a file of them, one per line.
        width: channels per kernel.
        kernels: widths of the convolutions, in tokens.
        embedding: width of a token's vector.
        dropout: before the linear layer.
        max_tokens: longer texts are cut.

    Raises:
        ModelError: no vocabulary, or one that cannot be read.
        ConfigError: a number out of range.
    """
    if min(kernels, default=0) < 1 or min(width, embedding) < 1 or not 0 <= dropout < 1:
        raise ConfigError(
            f"softcache:textcnn: kernels={kernels}, width={width}, embedding={embedding}, dropout={dropout}",
            tip="kernels, width and embedding are at least 1, and 0 <= dropout < 1",
        )
    tokens = tokens_of(vocabulary, "softcache:textcnn")
    net = TextCNN(len(tokens) + UNKNOWN + 1, embedding, width, kernels, dropout, num_classes)
    return Model(net, TextInput(tokens, max_tokens, min_tokens=max(kernels)))


def tokens_of(vocabulary: str | Sequence[str] | None, model: str) -> tuple[str, ...]:
    """The distinct tokens of a text model's `vocabulary`; ModelError when there are none, or one comes twice."""
    if vocabulary is None:
        raise ModelError(
            f"{model} needs a vocabulary",
            tip="training on texts or words makes one; else add vocabulary=FILE (softcache.models.write_vocabulary makes one), "
            "or name a trained run; pictures and numbers need another model: softcache:cnn, softcache:mlp",
        )
    tokens = read_vocabulary(Path(vocabulary)) if isinstance(vocabulary, str) else tuple(vocabulary)
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise ModelError(f"the vocabulary repeats {len(repeated)} token(s): {first_offenders(repeated, len(repeated))}")
    return tokens


def build_vocabulary(texts: Iterable[Any], *, size: int = 20000, min_count: int = 2) -> list[str]:
    """At most `size` tokens seen at least `min_count` times, most frequent first, ties in alphabetical order.

    Args:
        texts: strings, or pairs of them: then SEPARATOR comes before all; or `Words`, each a token in lower case.
    """
    counts: Counter[str] = Counter()
    pairs = False
    for item in texts:
        if isinstance(item, Words):
            counts.update(word.lower() for word in item)
            continue
        pairs |= is_pair(item)
        for text in (item,) if isinstance(item, str) else item:
            counts.update(tokenize(text))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [SEPARATOR] * pairs + [token for token, count in ranked[:size] if count >= min_count]


def write_vocabulary(path: Path, tokens: Iterable[str]) -> None:
    """One token per line, UTF-8."""
    Path(path).write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8", newline="\n")


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """The tokens of a file that `write_vocabulary` wrote; ModelError when it is missing or empty."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelError(f"cannot read the vocabulary {path}: {exc}", tip="one token per line, UTF-8") from None
    tokens = tuple(line.strip() for line in lines if line.strip())
    if not tokens:
        raise ModelError(f"the vocabulary {path} is empty", tip="one token per line, UTF-8")
    return tokens
