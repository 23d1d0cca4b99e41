"""The counter-based generator behind views: Philox4x64-10 words, and our own arithmetic from words to numbers.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (2011). FORMAT.md has test vectors.
"""

from __future__ import annotations

import hashlib

MASK = 2**64 - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four uint64 words, a function of counter and key alone."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high = _MULTIPLIERS[0] * c0
        low = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (low >> 64) ^ c1 ^ k0, low & MASK, (high >> 64) ^ c3 ^ k1, high & MASK
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1, c2, c3


def step_key(name: str, occurrence: int) -> int:
    """The key word of a policy step: BLAKE2b-64 of `name#occurrence`. Adding a step never shifts another step's draws."""
    return int.from_bytes(hashlib.blake2b(f"{name}#{occurrence}".encode(), digest_size=8).digest(), "little")


class Draws:
    """The numbers that one step may draw for one (sample, view): words in order, four to a block.

    Args:
        root_seed: uint64 of the policy.
        key: from `step_key`.
        sample_id, view: what the numbers belong to.
    """

    def __init__(self, root_seed: int, key: int, sample_id: int, view: int) -> None:
        self._key, self._sample, self._view = (root_seed & MASK, key), sample_id, view
        self._block, self._words = 0, ()  # type: int, tuple[int, ...]

    def word(self) -> int:
        """The next uint64."""
        if not self._words:
            self._words = philox((self._sample, self._view, self._block, 0), self._key)
            self._block += 1
        first, *rest = self._words
        self._words = tuple(rest)
        return first

    def uniform(self) -> float:
        """In [0, 1): the upper 53 bits of a word times 2**-53."""
        return (self.word() >> 11) * 2.0**-53

    def integer(self, low: int, high: int) -> int:
        """In [low, high], both ends included: low + (word * span >> 64)."""
        return low + (self.word() * (high - low + 1) >> 64)
