"""Which rows are in one call of a teacher: so many samples, or of tokens so many that their logits have room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softcache.config import StorageOptions
from softcache.data.transfer_set import TransferSet
from softcache.errors import ConfigError

MOST_LOGITS = 2**28  # numbers of one call, by itself: 1 GiB of float32
MOST_TOKENS = 16384  # likewise


def batch_tokens_of(config: StorageOptions, transfer_set: TransferSet) -> int | None:
    """How many tokens a call has at most, as --batch-tokens says, else as the vocabulary allows; None where samples are none.

    Raises:
        ConfigError: it is no number of tokens, or samples have none.
    """
    asked = config.batch_tokens
    if transfer_set.rendering is None:
        if asked is not None:
            raise ConfigError(
                f"--batch-tokens {asked}: these samples are no tokens",
                tip="--batch-size says how many samples a call has",
            )
        return None
    if asked is not None and asked < 1:
        raise ConfigError(f"--batch-tokens {asked}: must be at least 1")
    return asked or max(1, min(MOST_TOKENS, MOST_LOGITS // transfer_set.num_classes))


def tokens_of(transfer_set: TransferSet, order: np.ndarray) -> np.ndarray | None:
    """(N,) how many tokens each row has; None where samples are none."""
    if transfer_set.rendering is None or transfer_set.positions is None:
        return None
    found: np.ndarray = transfer_set.positions.lengths[order]
    return found


def cut_rows(count: int, batch_size: int, tokens: np.ndarray | None, most: int | None) -> Sequence[range]:
    """`count` rows cut into batches: of `batch_size` each, or of at most `most` tokens, of one row at least.

    Args:
        tokens: (count,) of each row; padding is not counted.
    """
    if tokens is None or most is None:
        return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    made, start, held = [], 0, 0
    for row, own in enumerate(tokens.tolist()):
        if row > start and held + own > most:
            made.append(range(start, row))
            start, held = row, 0
        held += own
    return [*made, range(start, count)] if count else []
