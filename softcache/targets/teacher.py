"""A cache's members as the one teacher of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from softcache.cache.plan import CLASS_OUTPUTS
from softcache.data.transfer_set import TransferSet
from softcache.errors import CacheError, LossError
from softcache.targets.batch import Targets
from softcache.targets.cache import Cache


@dataclass(frozen=True)
class CachedTeacher:
    """A cache's members as the one teacher of a run.

    Attributes:
        cache: where they are.
        combine: the rule.
        weights: member -> weight; None for all equally.
        draw_seed: of the rule "draw".
        classes: indices of the classes that the student has; None for all.
        index: where samples have several answers, one for each position of this index; None: one each.
    """

    cache: Cache
    combine: str = "mean_logits"
    weights: Mapping[str, float] | None = None
    draw_seed: int = 0
    classes: tuple[int, ...] | None = None
    index: str | None = None

    @property
    def members(self) -> tuple[str, ...]:
        return self.cache.members if self.weights is None else tuple(self.weights)

    @property
    def class_members(self) -> tuple[str, ...]:
        """Those that gave classes, which combine; the others are learned from each by itself."""
        return tuple(member for member in self.members if self.cache.member(member).output in CLASS_OUTPUTS)

    def answering(self, transfer_set: TransferSet) -> CachedTeacher:
        """The same members, who answer about these samples; where these are words, word by word.

        Raises:
            CacheError: a member that answers about something else.
        """
        if transfer_set.positions is None:
            self.check_index()
            return self
        kind, plan = transfer_set.positions.kind, self.cache.manifest.plan
        kinds = {index.name: index.kind for index in plan.indexes}
        found = (self.cache.member(name).index for name in self.members)
        index = next((index for index in found if index is not None and kinds[index] == kind), None)
        if index is None:
            raise CacheError(
                f"the samples of {transfer_set.name} are {kind}, and no member of the cache answers for each of them",
                tip="learn from a cache of what a tagger answered, or take data whose samples have one answer each",
            )
        chosen = replace(self, index=index)
        chosen.check_index()
        return chosen

    def check_index(self) -> None:
        """Raise CacheError for a member that answers about something else than the others are asked, with its name."""
        of_member = {name: self.cache.member(name).index for name in self.members}
        same = ",".join(name for name, index in of_member.items() if index == self.index)
        for name, index in of_member.items():
            if index == self.index:
                continue
            if index is None:
                raise CacheError(
                    f"member {name!r} of the cache has one answer for each sample, and {same} one for each position of "
                    f"{self.index!r}: they cannot be learned from together",
                    tip=f"choose members over one index: --members {same}",
                )
            if self.index is None:
                raise CacheError(
                    f"member {name!r} of the cache has an answer for each position of the index {index!r}, and the samples of "
                    "this data have one answer each",
                    tip=f"choose members that have one: --members {same}"
                    if same
                    else "learn from it with the data that was dumped, whose items are words: conll:, or table: with words=",
                )
            raise CacheError(
                f"member {name!r} of the cache has an answer for each position of {index!r}, and {same} of {self.index!r}: these "
                "are other positions, and cannot be combined",
                tip=f"choose members over one index: --members {same}",
            )

    def logits(self, targets: Targets, temperature: float, link: str | None = None) -> Tensor:
        """(B, C) of the combined members with classes; of the student's classes only, where it has not all.

        Args:
            link: None: that of the cache's labels.
        """
        chosen, weights = self.class_members, self.weights
        if len(chosen) < len(self.members):
            weights = {member: (self.weights or {}).get(member, 1.0) for member in chosen}
        combined = targets.combined(
            self.combine, weights=weights, temperature=temperature, link=link, draw_seed=self.draw_seed
        )
        return combined if self.classes is None else combined[:, list(self.classes)]

    def classifier(self) -> tuple[Tensor, Tensor]:
        """(C, D) weight and (C,) bias of the only member's final linear layer.

        Raises:
            LossError: several members, or one whose layer is not in the cache.
        """
        if len(self.class_members) != 1:
            raise LossError(
                "a loss on the teacher's classifier takes one teacher", tip="choose one with --members NAME"
            )
        (member,) = self.class_members
        layer = self.cache.classifier(member)
        if layer is None:
            raise LossError(
                f"the cache does not keep the final linear layer of member {member!r}",
                tip="dump a teacher that ends with an nn.Linear which gives its logits",
            )
        weight, bias = layer
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        chosen = slice(None) if self.classes is None else list(self.classes)
        return weight[chosen], bias[chosen]
