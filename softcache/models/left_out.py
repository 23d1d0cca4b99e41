"""How much of its texts a model does not read: those that are longer than it takes, and tokens that it does not know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from softcache.models.from_transformers import TokenizerInput
from softcache.models.inputs import Input, TextInput

LOOKED_AT = 4096  # texts, of a larger set
TOLD_UNKNOWN = 0.1  # of the tokens that are read: rare words are unknown to every small vocabulary


@dataclass(frozen=True)
class LeftOut:
    """What a model leaves out of some texts.

    Attributes:
        texts: how many were looked at.
        cut: those of them that are longer than `most` tokens.
        tokens: of all texts together; `lost` of them lie behind the cuts.
        unknown: of the tokens that are read, those that the model does not tell apart.
        most: tokens that are read of a text, special ones included; None: all.
    """

    texts: int
    cut: int
    tokens: int
    lost: int
    unknown: int
    most: int | None

    @property
    def is_worth_telling(self) -> bool:
        return self.cut > 0 or self.unknown > TOLD_UNKNOWN * max(1, self.tokens - self.lost)

    def text(self) -> str:
        """For people: a clause."""
        said = []
        if self.cut:
            longer, lost = _percent(self.cut, self.texts), _percent(self.lost, self.tokens)
            said.append(
                f"{self.cut:,} of {self.texts:,} texts ({longer}) are longer than its {self.most} tokens, and {lost} of all "
                "tokens are left out"
            )
        if self.unknown:
            read = self.tokens - self.lost
            said.append(f"{_percent(self.unknown, read)} of the tokens that it reads are unknown to it")
        return "; ".join(said) or f"nothing of {self.texts:,} texts is left out"

    def to_json(self) -> dict[str, int | None]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: Any) -> LeftOut | None:
        """What `to_json` gave; None for anything else, as somebody else's provenance may hold."""
        names = [field.name for field in fields(cls)]
        if (
            not isinstance(told, dict)
            or sorted(told) != sorted(names)
            or not all(type(told[n]) is int for n in names[:-1])
        ):
            return None
        return cls(**told) if told["most"] is None or type(told["most"]) is int else None


def left_out(taken: Input, texts: Iterable[Any]) -> LeftOut | None:
    """Counted over some texts; None for an input of another kind, of which nothing is cut, or nobody can tell."""
    if not isinstance(taken, TextInput | TokenizerInput):
        return None
    counted = [(count, min(count, taken.max_tokens or count), unknown) for count, unknown in map(taken.count, texts)]
    return LeftOut(
        texts=len(counted),
        cut=sum(read < count for count, read, _ in counted),
        tokens=sum(count for count, _, _ in counted),
        lost=sum(count - read for count, read, _ in counted),
        unknown=sum(unknown for _, _, unknown in counted),
        most=taken.max_tokens,
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"
