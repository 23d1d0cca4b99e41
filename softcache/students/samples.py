"""Some samples for a network that is made smaller: to run it, to measure BatchNorm anew, to time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softcache.data.loading import to_device
from softcache.features.taps import classifier_of, eval_mode
from softcache.models import Model
from softcache.models.norms import BATCH_NORMS


@dataclass(frozen=True)
class Samples:
    """Rendered items, and the model that takes them.

    Attributes:
        model: whose network is made smaller in place; in eval mode.
        what: the model as the user named it.
        example: one item; made up where there is no data.
        count, item: of the data, how many there are to look at, and each of them.
        batch_size: so many at once.
        classifier: the layer that gives the logits, before anything was changed; None where there is none.
        answers: (count,) class of each sample, -1 = none, or (count, C) of 1, 0 and -1; None where nobody knows any.
    """

    model: Model
    what: str
    example: Any
    count: int
    item: Callable[[int], Any]
    batch_size: int
    classifier: nn.Module | None
    answers: Tensor | None = None

    @classmethod
    def of(
        cls, model: Model, what: str, example: Any, count: int, item: Callable[[int], Any], batch_size: int
    ) -> Samples:
        """With the classifier found."""
        one = to_device(model.input.collate([example, example]), _device(model))
        return cls(model, what, example, count, item, batch_size, classifier_of(model, one))

    @property
    def given(self) -> bool:
        """Whether there is data."""
        return self.count > 0

    def inputs(self, count: int) -> Any:
        """The example, so many times, collated and on the model's device."""
        return to_device(self.model.input.collate([self.example] * count), _device(self.model))

    def run(self, count: int) -> Tensor:
        """(count, C) logits of the example, so many times."""
        with torch.no_grad(), eval_mode(self.model):
            return self.model(self.inputs(count))

    def batches(self) -> Iterator[Any]:
        """The data, collated and on the model's device; of a batch of one sample BatchNorm could learn nothing."""
        for inputs, _ in self.answered_batches():
            yield inputs

    def answered_batches(self) -> Iterator[tuple[Any, Tensor | None]]:
        """Likewise, each with its answers."""
        for begin in range(0, self.count, self.batch_size):
            end = min(begin + self.batch_size, self.count)
            if end - begin > 1 or self.count == 1:
                inputs = self.model.input.collate([self.item(i) for i in range(begin, end)])
                answers = None if self.answers is None else self.answers[begin:end].to(_device(self.model))
                yield to_device(inputs, _device(self.model)), answers

    def run_all(self) -> None:
        """The network over the data, in eval mode without gradients."""
        with torch.no_grad(), eval_mode(self.model):
            for batch in self.batches():
                self.model(batch)

    def measure_batch_norm(self) -> int:
        """BatchNorm's statistics as averages over the data: of how many layers. The data must be there."""
        layers = [m for m in self.model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        if not layers or self.count < 2:
            return 0
        momenta: Sequence[float | None] = [layer.momentum for layer in layers]
        with torch.no_grad(), eval_mode(self.model):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the plain average over batches
                layer.train()
            for batch in self.batches():
                self.model(batch)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
        return len(layers)


def _device(model: Model) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
