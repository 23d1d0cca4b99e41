"""A network together with the preprocessing it was made for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from softcache.errors import ModelError, first_offenders
from softcache.models.inputs import Input
from softcache.models.projector import Graft
from softcache.models.shrunk import Shrunk

CLASS_OUTPUTS = ("logits", "log_probs", "probs")
OTHER_OUTPUTS = ("embedding", "values")  # numbers that are no classes
OUTPUTS = (*CLASS_OUTPUTS, *OTHER_OUTPUTS)
GIVES = ("sample", "words", "tokens")  # what a row of its output is of
FEATURES = "features"  # in place of an output, of a teacher: what it gives is not kept, and may be anything


class Model(nn.Module):
    """A network and its input; calling it maps a collated batch to logits (B, C), of words (P, C).

    Attributes:
        net: the bare network; its state dict is what is saved, without a prefix.
        input: collating (in workers) and normalising (on the device).
        spec: the spec string it is built from, without local folders and without weights.
        num_classes: C.
        class_names: in the order of the outputs, where the loaded weights declare them; else None.
        data_class_names: those of the data it was built for; what is saved with it.
        input_shape: shape of one rendered item that it was built for; None if unknown, or for text.
        graft: where it answers with its teacher's final linear layer, if it does; see `graft`.
        shrunk: what was left out of the network that the spec names; None: nothing.
        untrained: tensors that are random though it was built with weights, since these do not hold them; for a student
            to learn, and no teacher.
        weights_told: what was chosen of the file of its weights, or left out; empty where there was no choice.
        output: "logits", unless the network declares `output = "log_probs"`, "probs", "embedding" or "values".
        value_names: of the output "values".
        tokenizer: of a language model the tokenizer.json that lies beside its weights; None: there is none.
        told_input: what it alone does to its inputs, and to the outputs behind it: pooling, prompt, truncation.
    """

    def __init__(self, net: nn.Module, input: Input) -> None:
        super().__init__()
        self.net = net
        self.input = input
        self.spec = ""
        self.num_classes = 0
        self.class_names: tuple[str, ...] | None = None
        self.data_class_names: tuple[str, ...] = ()
        self.input_shape: tuple[int, ...] | None = None
        self.graft: Graft | None = None
        self.shrunk: Shrunk | None = None
        self.untrained: tuple[str, ...] = ()
        self.weights_told = ""
        declared = getattr(net, "output", "logits")
        self.output: str = declared if isinstance(declared, str) else "logits"  # a layer may be called `output`
        self.value_names: tuple[str, ...] = ()
        self.told_input: dict[str, str] = {}
        self.tokenizer: bytes | None = None
        if self.output not in OUTPUTS:
            raise ModelError(f"the module declares output={self.output!r}", tip=f"use one of {', '.join(OUTPUTS)}")
        if self.gives not in GIVES:
            raise ModelError(f"the module declares gives={self.gives!r}", tip=f"use one of {', '.join(GIVES)}")

    @property
    def gives(self) -> str:
        """What each row of its output is of: "sample", or "words" or "tokens": a row for each, sample after sample.

        So its input says; a network of a user's factory says `gives = "words"` or `gives = "tokens"` itself.
        """
        own = getattr(self.net, "gives", None)
        return own if isinstance(own, str) else getattr(self.input, "gives", "sample")

    @property
    def has_classes(self) -> bool:
        """Whether each of its outputs is of a class."""
        return self.output in CLASS_OUTPUTS

    @property
    def declared_classes(self) -> tuple[str, ...] | None:
        """Those of the weights, or those that the network itself names; None where neither does, or its outputs are none."""
        if not self.has_classes:
            return None
        return self.class_names or getattr(self.net, "class_names", None)

    def check_gives(self, wanted: str, name: str) -> None:
        """Raise ModelError where it answers for each sample and words have labels, or the other way round.

        Args:
            wanted: what the data has labels of, "sample", "words" or "tokens".
            name: of the data, for the message.
        """
        if self.gives == wanted:
            return
        if "tokens" in (wanted, self.gives):
            raise ModelError(
                f"{self.spec}: answers about {_each(self.gives)}, and {name} asks about {_each(wanted)}",
                tip="answers about tokens are dumped (`softcache dump`), and no student of `softcache train` gives them yet",
            )
        if wanted == "words":
            raise ModelError(
                f"{self.spec}: gives one answer for each sample, and in {name} each word has a label",
                tip="use a tagger: softcache:tagger, softcache:encoder_tagger or a token classifier of hf:; a network of your "
                "own that gives a row for each word says so: gives = 'words'",
            )
        raise ModelError(
            f"{self.spec}: gives an answer for each word, and the samples of {name} are no words with a label each",
            tip="use data of words (conll:, table: with words= and tags=), or a model that answers for each sample",
        )

    def check_trained(self, what: str) -> None:
        """Raise ModelError where some of its tensors are random; `what` it is called in the message."""
        if self.untrained:
            raise ModelError(
                f"{what}: its weights hold no {first_offenders(self.untrained, len(self.untrained))}, which "
                "would be random numbers, and its logits with them",
                tip="name a model that was trained to classify, or train this one as a student and name the run folder",
            )

    def forward(self, batch: Any) -> Tensor:
        """(B, C), of words (P, C), from what `input.collate` returned, already on the network's device."""
        logits = self.net(self.input.prepare(batch))
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"{self.spec}: the network returned {type(logits).__name__}, not one tensor (batch, classes)",
                tip="wrap it in a module that returns the logits only",
            )
        return logits


def _each(gives: str) -> str:
    return {"sample": "samples"}.get(gives, gives)


def final_linear(net: nn.Module, num_classes: int | None = None) -> nn.Linear | None:
    """The last nn.Linear in registration order (with `num_classes` outputs, if given); None if there is none."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear) and num_classes in (None, m.out_features)]
    return layers[-1] if layers else None
