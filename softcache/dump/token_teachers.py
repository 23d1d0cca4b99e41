"""What is asked of teachers of tokens alone: the data's vocabulary, and answers that depend on the text alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from softcache.data.classes import Match
from softcache.data.rendering import Rendering, Vocabulary
from softcache.data.same_tokens import check_same_vocabulary
from softcache.dump.teacher import Teacher
from softcache.errors import ModelError, RenderingError, TeacherError, warn_once
from softcache.models import Model
from softcache.models.language_model import check_head
from softcache.spec import Spec

FLOAT32_APART, HALF_APART = 1e-3, 2.0**-6  # of the largest logit: what another batch may change
ALONE = 4  # samples of the first batch that are asked about alone


def spec_of_tokens(spec: Spec) -> Spec:
    """A teacher's spec as one that is asked about tokens: of hf: its causal language model."""
    return spec.having(gives="tokens") if spec.scheme == "hf" else spec


def match_tokens(rendering: Rendering) -> Match:
    """Output i is of token i; a head may have more."""
    return Match(range(rendering.vocabulary.count), None, "by token id")


def check_vocabulary(network: Any, rendering: Rendering, text: str) -> None:
    """Raise ModelError where a teacher's own tokenizer has other ids than the data's; told where it has none to compare.

    Args:
        text: the teacher's spec, for messages.
    """
    own = network.tokenizer if isinstance(network, Model) else None
    if own is None:
        warn_once(
            f"teacher {text!r} brings no tokenizer.json: whether it was trained with {rendering.vocabulary.where} is not known"
        )
        return
    try:
        check_same_vocabulary(Vocabulary(own, f"the tokenizer of teacher {text!r}"), rendering.vocabulary)
    except RenderingError as exc:
        raise ModelError(exc.message, tip=exc.tip) from None


def check_alone(teacher: Teacher, items: Sequence[Any]) -> float:
    """Ask some samples of the first batch alone: the noise floor, how far its logits are apart, of the largest one.

    Call it after `check_first_batch`, with the same samples.

    Raises:
        TeacherError: further than rounding explains.
    """
    assert teacher.first_batch is not None, "check_first_batch comes first"
    together, start, worst = teacher.first_batch[1], 0, 0.0
    largest = float(together.abs().amax().clamp(min=1.0))
    half = teacher.compute_dtype in ("float16", "bfloat16") or teacher.autocast is not None
    bound = HALF_APART if half or teacher.device.type != "cpu" else FLOAT32_APART
    starts = []
    for item in items:
        starts.append(start)
        start += len(item.listed)
    asked = sorted(range(len(items)), key=lambda i: (len(items[i]), i))
    spread = sorted({asked[number * (len(asked) - 1) // max(1, ALONE - 1)] for number in range(ALONE)})
    for i in spread:
        rows = together[starts[i] : starts[i] + len(items[i].listed)]
        alone = teacher.answers(teacher.collated([items[i]]))
        teacher.check_rows(len(alone), len(rows))
        apart = float((alone - rows).abs().amax()) / largest if len(rows) else 0.0
        worst = max(worst, apart)
        if not apart <= bound:
            raise TeacherError(
                f"teacher {teacher.name!r} gives other logits for a text alone than beside others: sample {i} of the first batch "
                f"is {apart:.2g} of the largest logit apart, and rounding explains {bound:.2g}",
                tip="its answer must depend on the text alone: padding masked, positions counted from the text's first token, no "
                "values kept from other texts",
            )
    return worst


def surplus(teacher: Teacher, count: int) -> float | None:
    """The mean probability that a head gives to ids that are not in use, in the first batch; None where there are none.

    Raises:
        ModelError: the head has fewer rows than there are ids.
    """
    assert teacher.first_batch is not None, "check_first_batch comes first"
    with torch.inference_mode():
        output = teacher(teacher.first_batch[0])
    if output.whole is None:
        return None
    check_head(output.whole.shape[1], count, f"teacher {teacher.name!r}")
    if output.whole.shape[1] == count:
        return None
    return float(output.whole.double().softmax(1)[:, count:].sum(1).mean())


def token_lines(teachers: Sequence[Teacher]) -> Iterator[str]:
    """For people: what was seen of teachers of tokens."""
    for teacher in teachers:
        what, apart, unused = (
            f"teacher {teacher.name!r}",
            teacher.told.get("noise_floor"),
            teacher.told.get("unused_ids"),
        )
        if apart is not None:
            yield f"{what}: a text's logits alone and beside others are {apart:.1g} of the largest one apart"
        if unused is not None:
            yield f"{what}: gives {unused:.2g} of its probability to ids that are not in use, which is left out"
