"""A transformer encoder for texts.

Source: Vaswani et al., "Attention Is All You Need" (2017), the encoder, with LayerNorm before each part (Xiong et al., "On
Layer Normalization in the Transformer Architecture", 2020) and learned positions and GELU as in Devlin et al., "BERT"
(2019), from where the scale of the first embeddings is too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError
from softcache.models.inputs import PAD, UNKNOWN, TextInput
from softcache.models.model import Model
from softcache.models.textcnn import tokens_of


class MaskedMean(nn.Module):
    """The average of the vectors (B, L, D) where `is_padding` (B, L) is False, (B, D)."""

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        total = x.masked_fill(is_padding[:, :, None], 0.0).sum(1)  # (B, D)
        return total / (~is_padding).sum(1, keepdim=True)


class Encoder(nn.Module):
    """Embedding plus position, transformer layers, LayerNorm, average over the tokens of the text, linear.

    Logits, `pool` and position 0 of every layer (`layers.0:cls`) depend on the text alone. The average that
    `layers.0:mean_tokens` takes counts the padding too, of which there is as much as the batch's longest text needs.
    """

    def __init__(
        self,
        tokens: int,
        max_tokens: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width, padding_idx=PAD)
        self.positions = nn.Embedding(max_tokens, width)
        self.dropout = nn.Dropout(dropout)
        # one by one: nn.TransformerEncoder would begin with equal layers
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, hidden, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.pool = MaskedMean()
        self.fc = nn.Linear(width, num_classes)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.embedding.weight[PAD])

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids != PAD).sum(1, keepdim=True).clamp(min=1)  # (B, 1): without tokens, attention has no values
        positions = torch.arange(ids.shape[1], device=ids.device)  # (L,)
        is_padding = positions >= lengths  # (B, L)
        known = positions.clamp(max=self.positions.num_embeddings - 1)  # behind max_tokens there is only padding
        x = self.dropout(self.embedding(ids) + self.positions(known))  # (B, L, D)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=is_padding)
        return self.fc(self.pool(self.norm(x), is_padding))  # (B, C)


def check_sizes(what: str, width: int, layers: int, heads: int, hidden: int, dropout: float, **most: int) -> None:
    """Raise ConfigError for sizes of an encoder that are none.

    Args:
        what: the model, for the message.
        most: how many tokens or words it takes, by the setting's name.
    """
    if min(width, layers, heads, hidden, *most.values()) < 1 or width % heads or not 0 <= dropout < 1:
        longest = "".join(f", {name}={value}" for name, value in most.items())
        raise ConfigError(
            f"{what}: width={width}, layers={layers}, heads={heads}, hidden={hidden}, dropout={dropout}{longest}",
            tip="whole numbers are at least 1, width is a multiple of heads, and 0 <= dropout < 1",
        )


def encoder(
    num_classes: int,
    vocabulary: str | Sequence[str] | None = None,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    hidden: int = 512,
    dropout: float = 0.1,
    max_tokens: int = 64,
) -> Model:
    """An Encoder on strings, or on pairs of them.

    Args:
        num_classes: C.
        vocabulary: the tokens, or a file of them, one per line.
        width: D, of a token's vector; a multiple of `heads`.
        layers: how many.
        heads: of each attention.
        hidden: width between the two linear layers behind each attention.
        dropout: of the embeddings and inside the layers.
        max_tokens: longer texts are cut.

    Raises:
        ModelError: no vocabulary, or one that cannot be read.
        ConfigError: a number out of range.
    """
    check_sizes("softcache:encoder", width, layers, heads, hidden, dropout, max_tokens=max_tokens)
    tokens = tokens_of(vocabulary, "softcache:encoder")
    net = Encoder(len(tokens) + UNKNOWN + 1, max_tokens, width, layers, heads, hidden, dropout, num_classes)
    return Model(net, TextInput(tokens, max_tokens))
