"""Rule x loss x codec x kind of label: each is refused before a step, or its value and its gradient are finite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.cache.statistics import MemberStatistics
from softcache.codecs import CODECS, make_codec
from softcache.errors import LossError
from softcache.losses import LOSSES, LossTerm, make_term
from softcache.losses.schedules import Moment
from softcache.targets.ensemble import COMBINE_RULES, combine
from softcache.train.fits import Stored, check_fit, check_kind, fit_warnings

B, C = 6, 5
ON_LOGITS = [name for name, loss in LOSSES.items() if not loss.has_features]
PAGE = Path(__file__).parents[2] / "softcache" / "docs" / "LOSSES.md"
QUICK = ("kd", "reverse_kl", "dkd", "mse_logits", "bce", "kd_lower_bound")
TERMS = [*ON_LOGITS, "kd:standardized", "dkd:standardized"]


def term_of(text: str) -> LossTerm:
    name, _, standardized = text.partition(":")
    return make_term(name, **({"standardized": "true"} if standardized else {}))


def rows(scale: float, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (B, C)).astype(np.float32))


def stored(codec: str, scale: float, seed: int) -> tuple[Stored, dict[str, Tensor]]:
    made = make_codec(codec, {"k": "2"} if codec.startswith("top") else {}, C)
    return Stored(f"m{seed}", made), dict(made.encode(rows(scale, seed), None))


PLAIN = [name for name in CODECS if name not in ("lowrank", "linear_head")]  # those are fitted; they keep every class


def refusal(term: LossTerm, rule: str, members: list[Stored], *, several: bool) -> str:
    """Why it is refused; empty where it works."""
    try:
        check_kind([term], multi_label=several, name="the set")
        check_fit(term, rule, members, multi_label=several)
    except LossError as exc:
        return f"{exc.message}; {exc.tip}"
    return ""


def value(
    term: LossTerm, rule: str, made: list[tuple[Stored, dict[str, Tensor]]], *, several: bool
) -> Iterator[Tensor]:
    """The loss, and its gradient, of a student's logits, as a run would compute it."""
    settings = term.settings_at(Moment())
    settings.pop("class_weights", None)  # which a run makes of its data
    logits = rows(3.0, 99).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, -1]) if not several else (rows(1.0, 7) > 0)
    temperature = settings.get("temperature", 1.0)
    given: dict[str, Tensor] = {"student_logits": logits, "labels": labels}
    if term.loss.needs("teacher_logits"):
        link = "sigmoid" if several or term.loss.link == "sigmoid" else "softmax"
        members = [one.codec.decode(arrays) for one, arrays in made]
        alone = len(members) == 1 and rule != "vote"
        draws = torch.linspace(0, 0.99, B, dtype=torch.float64)
        given["teacher_logits"] = (
            members[0] if alone else combine(members, rule, temperature=temperature, link=link, draws=draws)
        )
    if term.loss.needs("head_ids"):
        one, arrays = made[0]
        given["head_ids"], given["head_logits"] = one.codec.head(arrays)
        given["tail_logsumexp"] = one.codec.tail_logsumexp(arrays, temperature)
    inputs = {name: given[name] for name in term.loss.inputs}
    core = (
        term.loss.function
        if term.loss.module is None
        else term.loss.module(**{k: settings[k] for k in term.loss.fixed})
    )
    found = core(**inputs, **{key: one for key, one in settings.items() if key not in term.loss.fixed})
    yield found.detach()
    yield torch.autograd.grad(found, logits)[0]


@pytest.mark.parametrize("text", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in TERMS])
def test_what_is_not_refused_is_finite(text: str) -> None:
    term, counts = term_of(text), Counter[bool]()
    for codec in PLAIN:
        for scale in (2.0, 60.0) if codec == "float32" else (60.0,):
            made = [stored(codec, scale, seed) for seed in (1, 2)]
            for number in (1, 2):
                for rule in COMBINE_RULES:
                    for several in (False, True):
                        told = refusal(term, rule, [one for one, _ in made[:number]], several=several)
                        counts[bool(told)] += 1
                        if told:
                            continue
                        for tensor in value(term, rule, made[:number], several=several):
                            assert bool(tensor.isfinite().all()), (codec, scale, number, rule, several)
                            # 4,000 at the most: T**2 = 16 times a logit of 60 x 4
                            assert float(tensor.abs().max()) < 1e5, (codec, scale, number, rule, several)
    assert counts[False] and (text == "ce" or counts[True])


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("text", "rule", "message"),
    [
        ("reverse_kl", "vote", "divides by the teacher's probabilities, and those of a vote are zero"),
        ("dkd", "vote", "divides by the teacher's probabilities"),
        ("mse_logits", "vote", "needs logits, and a vote has none"),
        ("kd:standardized", "vote", "standardized=true needs logits"),
    ],
)
def test_votes_have_no_logits_and_no_other_class(text: str, rule: str, message: str, number: int) -> None:
    members = [stored("float32", 2.0, seed)[0] for seed in range(number)]
    with pytest.raises(LossError, match=message) as caught:
        check_fit(term_of(text), rule, members, multi_label=False)
    assert caught.value.tip.startswith("combine with mean_logits, mean_probs_at_t or draw")


def test_votes_teach_what_needs_no_logits() -> None:
    members = [stored("float32", 2.0, seed)[0] for seed in (1, 2)]
    for name in ("kd", "soft_ce", "hard", "jsd", "dist", "wsld", "shifted_kd", "ctkd"):
        check_fit(term_of(name), "vote", members, multi_label=False)
    check_fit(term_of("bce"), "vote", members, multi_label=True)


def test_one_teacher_that_keeps_some_classes_is_no_ballot() -> None:
    check_fit(term_of("kd_lower_bound"), "mean_logits", [stored("topk", 2.0, 1)[0]], multi_label=False)
    with pytest.raises(LossError, match="takes a teacher as it is stored"):
        check_fit(term_of("kd_lower_bound"), "vote", [stored("topk", 2.0, 1)[0]], multi_label=False)


def test_several_labels_want_a_loss_of_each_label() -> None:
    fit = [name for name in LOSSES if not refusal(make_term(name), "mean_logits", [], several=True)]
    assert [name for name in fit if name in ON_LOGITS] == ["mse_logits", "bce", "ce"]
    assert {"hint", "at", "rkd_distance"} <= set(fit) and not {"crd", "srrl"} & set(fit)
    with pytest.raises(
        LossError, match="loss 'kd' is defined by one class per sample, and the samples of x have"
    ) as caught:
        check_kind([make_term("ce"), make_term("kd")], multi_label=True, name="x")
    assert "--loss bce" in caught.value.tip
    check_kind([make_term(name) for name in LOSSES], multi_label=False, name="x")


def test_zeros_that_a_teacher_gave_are_told_where_a_loss_divides_by_them() -> None:
    member = Stored("forest", make_codec("float32", {}, C), "probs", floored=100, records=50)
    (told,) = fit_warnings([make_term("kd"), make_term("reverse_kl")], [member], C)
    assert "'reverse_kl'" in told and "40.0% of those of member 'forest'" in told
    assert not [*fit_warnings([make_term("kd")], [member], C)]
    assert not [*fit_warnings([make_term("reverse_kl")], [Stored("net", member.codec, records=50)], C)]


def table() -> str:
    """What the page says, out of the rules themselves."""
    lines = ["| loss | labels | rules, of several members | codecs |", "| --- | --- | --- | --- |"]
    for name in ON_LOGITS:
        term = make_term(name)
        kinds = [several for several in (False, True) if not refusal(term, "mean_logits", [], several=several)]
        labels = " or ".join("several" if several else "one class" for several in kinds)
        codec = "topk" if term.loss.needs("head_ids") else "float32"
        works = []
        for rule in COMBINE_RULES:
            members = [stored(codec, 2.0, seed)[0] for seed in (1, 2)]
            fits = [several for several in kinds if not refusal(term, rule, members, several=several)]
            if fits:
                works.append(rule if fits == kinds else f"{rule} ({'several' if fits[0] else 'one class'})")
        rules = "all" if len(works) == len(COMBINE_RULES) and works == [*COMBINE_RULES] else ", ".join(works)
        if not term.loss.has_teacher:
            lines.append(f"| `{name}` | {labels} | - | - |")
            continue
        some = [one for one in PLAIN if not CODECS[one].complete]
        fit = [one for one in some if not refusal(term, "mean_logits", [stored(one, 2.0, 1)[0]], several=False)]
        keeps = ", ".join(fit) or "every class"
        keeps += ", and the level" if term.loss.needs_level else ""
        lines.append(f"| `{name}` | {labels} | {rules or 'one member alone, no vote'} | {keeps} |")
    return "\n".join(lines)


def test_the_page_says_what_fits() -> None:
    said = PAGE.read_text().partition("<!-- fits: begin -->\n")[2].partition("\n<!-- fits: end -->")[0]
    assert said == table()


# mean share of the probability that the classes kept hold, by temperature, as a cache says it
KEPT = {1.0: 0.9, 2.0: 0.6, 4.0: 0.49, 8.0: 0.1}


@pytest.mark.parametrize(
    ("temperature", "kept", "refused_for"),
    [
        ("1", {1.0: 0.1}, None),
        ("2", KEPT, None),
        ("4", KEPT, "49.0% of the probability at T=4"),
        ("3", KEPT, None),  # between what is known: no more than at 2, which is enough
        ("5", KEPT, "49.0% of the probability at T=4"),
        ("1.5", {1.0: 0.4}, "40.0% of the probability at T=1"),
        ("linear(1, 4)", KEPT, "49.0% of the probability at T=4"),
        ("4", {}, None),  # not known, as of version 1
    ],
)
def test_where_the_classes_kept_hold_less_than_half_losses_on_them_are_refused_beyond_t_1(
    temperature: str, kept: dict[float, float], refused_for: str | None
) -> None:
    member = Stored("m", make_codec("topk", {"k": "2"}, 100), kept=kept)
    for name in ("kd_lower_bound", "reverse_kl_lower_bound"):
        found = refusal(make_term(name, temperature=temperature), "mean_logits", [member], several=False)
        assert (found == "") if refused_for is None else (refused_for in found and "allow_low_mass=true" in found)
        allowed = make_term(name, temperature=temperature, allow_low_mass="true")
        assert refusal(allowed, "mean_logits", [member], several=False) == ""
        assert allowed.describe()["allow_low_mass"] is True
        assert "allow_low_mass" not in make_term(name, temperature=temperature).describe()


def test_only_losses_on_the_classes_kept_can_be_told_to_take_little() -> None:
    with pytest.raises(LossError, match="'kd' has no setting 'allow_low_mass'"):
        make_term("kd", allow_low_mass="true")


def test_of_records_that_do_not_say_what_is_kept_the_whole_does_not_either() -> None:
    """As after more views of a cache that an earlier version wrote."""
    said, silent = MemberStatistics(records=4, kept={"1": 3.0, "2": 2.0}), MemberStatistics(records=4)
    assert (said + said).mean_kept == {1.0: 0.75, 2.0: 0.5}
    assert (said + silent).mean_kept == (silent + said).mean_kept == (silent + said + said).mean_kept == {}
    assert (MemberStatistics() + said).mean_kept == (said + MemberStatistics()).mean_kept == said.mean_kept
    assert MemberStatistics.from_json(said.to_json(2)) == said and "kept" not in said.to_json(1) | silent.to_json(2)
