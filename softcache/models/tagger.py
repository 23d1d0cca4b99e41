"""Taggers: networks that give each word of a text a label of its own.

Sources: Huang, Xu and Yu, "Bidirectional LSTM-CRF Models for Sequence Tagging" (2015), without the CRF, with words known by
their endings and case too; the encoder is that of `softcache:encoder`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError
from softcache.models.encoder import check_sizes
from softcache.models.inputs import PAD, UNKNOWN
from softcache.models.model import Model
from softcache.models.textcnn import tokens_of
from softcache.models.word_input import BUCKETS, CASES, WordInput


class WordEmbedding(nn.Module):
    """The sum of four vectors: of a word, its ending, its beginning and its case; 0 where there is no word."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        sizes = {"word": tokens, "ending": BUCKETS + 1, "beginning": BUCKETS + 1, "case": CASES + 1}
        self.tables = nn.ModuleDict({name: nn.Embedding(size, width, padding_idx=PAD) for name, size in sizes.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.5)  # type: ignore[arg-type]
            nn.init.zeros_(table.weight[PAD])  # type: ignore[index]

    def forward(self, numbers: Tensor) -> Tensor:
        """(B, L, D) of (B, L, 4)."""
        total = torch.zeros((), device=numbers.device)
        for place, table in enumerate(self.tables.values()):
            total = total + table(numbers[..., place])
        return total


class BiLSTM(nn.Module):
    """One layer of two LSTMs, one of which reads each text from its last word on: padding never comes before a word."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.onward = nn.LSTM(inputs, width, batch_first=True)
        self.back = nn.LSTM(inputs, width, batch_first=True)

    def forward(self, x: Tensor, turned: Tensor) -> Tensor:
        """(B, L, 2 D) of (B, L, inputs).

        Args:
            turned: (B, L) the place of each word, were the text read backwards.
        """
        onward, _ = self.onward(x)
        backward, _ = self.back(_at(x, turned))
        return torch.cat([onward, _at(backward, turned)], dim=2)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x[b, places[b, i]] as (B, L, D)."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))


class Tagger(nn.Module):
    """Embedding, BiLSTM layers, linear; a row of logits for each word. Logits depend on the text alone."""

    def __init__(self, tokens: int, embedding: int, width: int, layers: int, dropout: float, num_classes: int) -> None:
        super().__init__()
        self.embedding = WordEmbedding(tokens, embedding)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(BiLSTM(embedding if i == 0 else 2 * width, width) for i in range(layers))
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, numbers: Tensor) -> Tensor:
        """(P, C): of all words, sample after sample."""
        is_word = numbers[..., 0] != PAD  # (B, L)
        places = torch.arange(numbers.shape[1], device=numbers.device).expand_as(is_word)
        turned = torch.where(is_word, is_word.sum(1, keepdim=True) - 1 - places, places)
        x = self.dropout(self.embedding(numbers))
        for layer in self.layers:
            x = self.dropout(layer(x, turned))
        logits: Tensor = self.fc(x[is_word])
        return logits


class EncoderTagger(nn.Module):
    """Embedding plus position, transformer layers, LayerNorm, linear; a row of logits for each word, of its text alone."""

    def __init__(
        self,
        tokens: int,
        max_words: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.embedding = WordEmbedding(tokens, width)
        self.positions = nn.Embedding(max_words, width)
        self.dropout = nn.Dropout(dropout)
        # one by one: nn.TransformerEncoder would begin with equal layers
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, hidden, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)
        nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, numbers: Tensor) -> Tensor:
        """(P, C): of all words, sample after sample."""
        is_word = numbers[..., 0] != PAD  # (B, L)
        positions = torch.arange(numbers.shape[1], device=numbers.device)  # (L,)
        is_padding = positions >= is_word.sum(1, keepdim=True).clamp(min=1)  # without words, attention has no values
        x = self.dropout(self.embedding(numbers) + self.positions(positions))  # (B, L, D)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=is_padding)
        logits: Tensor = self.fc(self.norm(x[is_word]))
        return logits


def tagger(
    num_classes: int,
    vocabulary: str | Sequence[str] | None = None,
    width: int = 128,
    embedding: int = 128,
    layers: int = 1,
    dropout: float = 0.3,
) -> Model:
    """A Tagger on words, of any number.

    Args:
        num_classes: C.
        vocabulary: the words in lower case, or a file of them, one per line.
        width: of each of a layer's two LSTMs.
        embedding: width of a word's vector.
        layers: how many.
        dropout: of the embeddings and behind each layer.

    Raises:
        ModelError: no vocabulary, or one that cannot be read.
        ConfigError: a number out of range.
    """
    if min(width, embedding, layers) < 1 or not 0 <= dropout < 1:
        raise ConfigError(
            f"softcache:tagger: width={width}, embedding={embedding}, layers={layers}, dropout={dropout}",
            tip="width, embedding and layers are at least 1, and 0 <= dropout < 1",
        )
    words = tokens_of(vocabulary, "softcache:tagger")
    net = Tagger(len(words) + UNKNOWN + 1, embedding, width, layers, dropout, num_classes)
    return Model(net, WordInput(words))


def encoder_tagger(
    num_classes: int,
    vocabulary: str | Sequence[str] | None = None,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    hidden: int = 512,
    dropout: float = 0.1,
    max_words: int = 256,
) -> Model:
    """An EncoderTagger on words.

    Args:
        num_classes: C.
        vocabulary: the words in lower case, or a file of them, one per line.
        width: D, of a word's vector; a multiple of `heads`.
        layers: how many.
        heads: of each attention.
        hidden: width between the two linear layers behind each attention.
        dropout: of the embeddings and inside the layers.
        max_words: samples with more words are refused.

    Raises:
        ModelError: no vocabulary, or one that cannot be read.
        ConfigError: a number out of range.
    """
    check_sizes("softcache:encoder_tagger", width, layers, heads, hidden, dropout, max_words=max_words)
    words = tokens_of(vocabulary, "softcache:encoder_tagger")
    net = EncoderTagger(len(words) + UNKNOWN + 1, max_words, width, layers, heads, hidden, dropout, num_classes)
    return Model(net, WordInput(words, max_words))
