"""What an evaluation says, each number against its definition in float64; biases; a cache in the place of a model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, needs

from softcache import cli, dump
from softcache import open as open_cache
from softcache.config import DumpConfig, EvalConfig
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import CacheError, ClassMismatchError, ConfigError, DataError, ModelError
from softcache.evaluate import measure
from softcache.evaluate.evaluation import Evaluation
from softcache.spec import load_user_file


@pytest.fixture(scope="module")
def pieces() -> Path:
    return WORLDS / "points.py"


@pytest.fixture(scope="module")
def cache(pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three teachers over the points of seed 0, as float32."""
    out = tmp_path_factory.mktemp("evaluate") / "cache"
    teachers = tuple(f"{pieces}:net?seed={seed}&name=t{seed}" for seed in (1, 2, 3))
    made = DumpConfig(data=f"{pieces}:points", teacher=teachers, out=str(out), codec="float32", threads=1)
    dump.run(made, quiet=True)
    return out


def measured(model: str, data: str, **settings: Any) -> Evaluation:
    return measure.run(model, EvalConfig(data=data, threads=1, device="cpu", batch_size=32, **settings), quiet=True)


def logits_of(pieces: Path, data: TransferSet, **settings: Any) -> np.ndarray:
    """(N, C) float64, without the package's models and loaders."""
    made = load_user_file(pieces).net(7, **settings).double()
    x = torch.stack([data.load(i)[0] for i in range(len(data))]).double()
    return np.asarray(made(x).detach().numpy())


def log_softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    shifted = logits - logits.max(axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


def softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(np.exp(log_softmax(logits, axis)))


def expected_calibration_error(probs: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            total += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    return total


# ------------------------------------------------------------------------------------------------------------- every number


def test_single_label_numbers(pieces: Path) -> None:
    data = open_transfer_set(f"{pieces}:points")
    found = measured(f"{pieces}:net", f"{pieces}:points")
    logits, known = logits_of(pieces, data), data.labels >= 0
    kept, labels = logits[known], data.labels[known]
    assert (found.samples, found.labelled) == (103, int(known.sum())) and 0 < found.labelled < 103
    assert found.top1 == pytest.approx((kept.argmax(axis=1) == labels).mean())
    assert found.top5 == pytest.approx(np.mean([y in row.argsort()[-5:] for y, row in zip(labels, kept, strict=True)]))
    assert found.top5 is not None and found.top1 is not None and found.top1 < found.top5 < 1
    assert found.nll == pytest.approx(-log_softmax(kept, axis=1)[np.arange(len(kept)), labels].mean(), rel=1e-5)
    assert found.calibration_error == pytest.approx(expected_calibration_error(softmax(kept, axis=1), labels), rel=1e-4)
    wrong = kept.argmax(axis=1) != labels
    names = data.class_names
    assert found.class_errors == {
        name: (int(wrong[labels == c].sum()), int((labels == c).sum())) for c, name in enumerate(names)
    }
    assert found.errors == wrong.sum() == sum(errors for errors, _ in found.class_errors.values())
    assert (found.agreement, found.kl, found.bias) == (None, None, {})


def test_multi_label_numbers(pieces: Path) -> None:
    data = open_transfer_set(f"{pieces}:points?kind=multi")
    found = measured(f"{pieces}:net", f"{pieces}:points?kind=multi")
    logits, labels = logits_of(pieces, data), data.labels
    assert found.top1 == pytest.approx(((logits > 0) == labels).mean())
    per_class = np.logaddexp(0, logits) - logits * labels
    assert found.nll == pytest.approx(per_class.mean(), rel=1e-5)
    wrong = (logits > 0) != labels
    assert found.top5 is None and found.multi_label
    assert (found.errors, found.decisions, found.wrong_samples) == (wrong.sum(), wrong.size, wrong.any(axis=1).sum())
    assert found.class_errors == {name: (wrong[:, c].sum(), 103) for c, name in enumerate(data.class_names)}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("combine", ["mean_logits", "mean_probs"])
def test_closeness_to_a_cache(pieces: Path, cache: Path, combine: str, temperature: float) -> None:
    data = open_transfer_set(f"{pieces}:points")
    found = measured(f"{pieces}:net", f"{pieces}:points", cache=str(cache), combine=combine, temperature=temperature)
    own, members = logits_of(pieces, data), [logits_of(pieces, data, seed=seed) for seed in (1, 2, 3)]
    if combine == "mean_logits":
        together = np.mean(members, axis=0)
    else:
        together = np.log(np.mean([softmax(one, axis=1) for one in members], axis=0))
    target, log_q = softmax(together / temperature, axis=1), log_softmax(own / temperature, axis=1)
    kl = (target * (np.log(target) - log_q)).sum(axis=1).mean()
    assert found.kl == pytest.approx(kl, rel=1e-4) and found.temperature == temperature
    assert found.agreement == pytest.approx((own.argmax(axis=1) == together.argmax(axis=1)).mean())
    assert found.agreement is not None and 0 < found.agreement < 1


def test_a_models_classes_are_brought_into_the_datas_order(pieces: Path) -> None:
    data, fit = f"{pieces}:points", {"fit_bias": ("bee", "dog"), "bias_data": f"{pieces}:points?seed=9"}
    own, turned = (measured(f"{pieces}:{name}", data, bias=("cat=0.5",)) for name in ("net", "turned"))
    assert (turned.errors, turned.class_errors) == (own.errors, own.class_errors)
    assert turned.nll == pytest.approx(own.nll)
    fitted = [measured(f"{pieces}:{name}", data, **fit).bias["bee"] for name in ("net", "turned", "wider")]
    assert fitted[0] == pytest.approx(fitted[1]) == pytest.approx(fitted[2]) and fitted[0] != 0
    with pytest.raises(ModelError, match="knows other classes than the data has, for example 'hen'"):
        measured(f"{pieces}:turned?names=ant+bee+cat+dog+eel+fox+hen", data)


# -------------------------------------------------------------------------------------------------------------------- biases


def test_a_bias_is_added_before_anything_is_measured(pieces: Path) -> None:
    data = open_transfer_set(f"{pieces}:points")
    found = measured(f"{pieces}:net", f"{pieces}:points", bias=("cat=2.5", "0=-1"))
    logits, known = logits_of(pieces, data), data.labels >= 0
    logits[:, 2] += 2.5
    logits[:, 0] -= 1
    kept, labels = logits[known], data.labels[known]
    assert found.errors == (kept.argmax(axis=1) != labels).sum() != measured(f"{pieces}:net", f"{pieces}:points").errors
    assert found.nll == pytest.approx(-log_softmax(kept, axis=1)[np.arange(len(kept)), labels].mean(), rel=1e-5)
    assert found.bias == {"cat": 2.5, "ant": -1.0}


def test_a_fitted_bias_is_of_the_held_out_data_and_of_the_twin(pieces: Path) -> None:
    data, held_out = f"{pieces}:points", f"{pieces}:points?seed=9&count=400"
    held = open_transfer_set(held_out)
    model, twin = f"{pieces}:net?seed=4", f"{pieces}:net?seed=5"
    live = {seed: logits_of(pieces, held, seed=seed) for seed in (4, 5)}

    def errors(shift: float, seed: int) -> int:
        logits = live[seed].copy()
        logits[:, [1, 3]] += shift
        known = held.labels >= 0
        return int((logits.argmax(axis=1) != held.labels)[known].sum())

    found = {}
    for seed, given in ((4, {}), (5, {"bias_model": twin})):
        result = measured(model, data, fit_bias=("bee", "dog"), bias_data=held_out, **given)
        assert set(result.bias) == {"bee", "dog"} and len(set(result.bias.values())) == 1
        found[seed] = result.bias["bee"]
        assert errors(found[seed], seed) == min(errors(shift, seed) for shift in np.linspace(-8, 8, 801))
        said = (f"bee={found[seed]!r}", f"dog={found[seed]!r}")
        assert measured(model, data, bias=said).class_errors == result.class_errors
    assert found[4] != found[5]


def test_a_bias_fitted_for_several_labels_makes_fewest_wrong_decisions_of_those_labels(pieces: Path) -> None:
    data, held_out = f"{pieces}:points?kind=multi", f"{pieces}:points?kind=multi&seed=9&count=200"
    held = open_transfer_set(held_out)
    live = logits_of(pieces, held)

    def errors(shift: float, chosen: list[int]) -> int:
        logits = live.copy()
        logits[:, chosen] += shift
        return int(((logits > 0) != held.labels)[:, chosen].sum())

    for labels, chosen in ((("bee", "dog"), [1, 3]), (("0-6",), [*range(7)])):  # all of them: no class competes
        found = measured(f"{pieces}:net", data, fit_bias=labels, bias_data=held_out).bias
        (shift,) = set(found.values())
        assert set(found) == {held.class_names[i] for i in chosen}
        assert (
            errors(shift, chosen) == min(errors(one, chosen) for one in np.linspace(-8, 8, 801)) < errors(0.0, chosen)
        )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bias": ("cat",)}, ConfigError, r"--bias 'cat' is not CLASS=NUMBER"),
        ({"bias": ("cat=high",)}, ConfigError, r"--bias 'cat=high' is not CLASS=NUMBER"),
        ({"bias": ("cow=1",)}, DataError, r"cow"),
        ({"bias": ("cat=1", "2=3")}, ConfigError, r"--bias names class 'cat' twice"),
        ({"fit_bias": ("cat",)}, ConfigError, r"--fit-bias needs --bias-data"),
        ({"members": ("a",)}, ConfigError, r"--members needs a cache"),
        ({"bias_data": "digits"}, ConfigError, r"--bias-data and --bias-model need --fit-bias"),
        ({"fit_bias": ("0-6",), "bias_data": "{points}"}, ConfigError, r"same number for all classes changes nothing"),
        ({"fit_bias": ("cat",), "bias_data": "{points}", "bias": ("2=1",)}, ConfigError, r"both name class 'cat'"),
        pytest.param(
            {"fit_bias": ("cat",), "bias_data": "digits"},
            ClassMismatchError,
            r"the data set has 10 classes, .*points.py:points 7",
            marks=needs("sklearn", "demo"),
        ),
    ],
)
def test_biases_that_cannot_be(pieces: Path, settings: Any, error: type[Exception], message: str) -> None:
    if "bias_data" in settings:
        settings = settings | {"bias_data": settings["bias_data"].format(points=f"{pieces}:points")}
    with pytest.raises(error, match=message):
        measured(f"{pieces}:net", f"{pieces}:points", **settings)


def test_a_bias_that_is_given_counts_when_another_is_fitted(pieces: Path) -> None:
    held_out = f"{pieces}:points?seed=9&count=400"
    held = open_transfer_set(held_out)
    result = measured(f"{pieces}:net", f"{pieces}:points", bias=("gnu=3",), fit_bias=("bee",), bias_data=held_out)
    live = logits_of(pieces, held)

    def errors(shift: float) -> int:
        logits = live.copy()
        logits[:, 6] += 3
        logits[:, 1] += shift
        return int((logits.argmax(axis=1) != held.labels)[held.labels >= 0].sum())

    assert result.bias["gnu"] == 3.0
    assert errors(result.bias["bee"]) == min(errors(shift) for shift in np.linspace(-8, 8, 801)) < errors(0.0)


def test_logits_that_are_not_finite_are_refused(pieces: Path) -> None:
    with pytest.raises(ModelError, match="logits are not finite for 32 of 32 samples"):
        measured(f"{pieces}:broken", f"{pieces}:points")


# -------------------------------------------------------------------------------------------------------------------- a cache


@pytest.mark.parametrize("combine", ["mean_logits", "mean_probs", "vote"])
def test_a_cache_in_the_place_of_a_model(pieces: Path, cache: Path, combine: str) -> None:
    data = open_transfer_set(f"{pieces}:points")
    found = measured(str(cache), f"{pieces}:points", combine=combine, bias=("cat=0.25",) if combine != "vote" else ())
    members = np.stack([logits_of(pieces, data, seed=seed) for seed in (1, 2, 3)])
    if combine == "vote":
        assert found.nll is None is found.calibration_error
        votes = np.stack([(members.argmax(axis=2) == c).sum(axis=0) for c in range(7)], axis=1)
        predicted = votes.argmax(axis=1)  # of equal ones the smaller class
    else:
        together = members.mean(axis=0) if combine == "mean_logits" else np.log(softmax(members, axis=2).mean(axis=0))
        together[:, 2] += 0.25
        predicted = together.argmax(axis=1)
        known = data.labels >= 0
        log_p = log_softmax(together[known], axis=1)[np.arange(known.sum()), data.labels[known]]
        assert found.nll == pytest.approx(-log_p.mean(), rel=1e-5)
    wrong = (predicted != data.labels)[data.labels >= 0]
    assert (found.errors, found.samples) == (wrong.sum(), 103)


def test_some_samples_of_a_cache_in_another_order(pieces: Path, cache: Path) -> None:
    few = open_transfer_set(f"{pieces}:points").select(np.array([33, 2, 17, 99, 64]))
    found = measure.evaluate_cache(open_cache(cache).join(few), few)
    together = np.mean([logits_of(pieces, few, seed=seed) for seed in (1, 2, 3)], axis=0)
    known = few.labels >= 0
    assert found.errors == (together.argmax(axis=1) != few.labels)[known].sum() and found.labelled == known.sum() > 2


def test_members_of_a_cache_at_weights(pieces: Path, cache: Path) -> None:
    data, known = open_transfer_set(f"{pieces}:points"), open_transfer_set(f"{pieces}:points").labels >= 0
    members = {seed: logits_of(pieces, data, seed=seed) for seed in (1, 2, 3)}
    for given, together in (
        (("t2",), members[2]),
        (("t3=1", "t1=3"), 0.25 * members[3] + 0.75 * members[1]),
    ):
        found = measured(str(cache), f"{pieces}:points", members=given)
        assert found.errors == (together.argmax(axis=1) != data.labels)[known].sum()
        beside = measured(f"{pieces}:net", f"{pieces}:points", cache=str(cache), members=given, temperature=4.0)
        log_p, log_q = log_softmax(together / 4, axis=1), log_softmax(logits_of(pieces, data) / 4, axis=1)
        assert beside.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean(), rel=1e-5)


def test_the_table_of_several_labels_says_what_it_counts(pieces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", f"{pieces}:net", "--data", f"{pieces}:points?kind=multi", "--threads", "1", "--per-class"]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    found = measured(f"{pieces}:net", f"{pieces}:points?kind=multi")
    assert f"({found.errors} errors in 721, in {found.wrong_samples} of 103 samples)" in text
    assert "right decisions" in text and "nats a decision" in text and "top-1" not in text
    errors, known = found.class_errors["cat"]
    missed, yes = found.yes_errors["cat"]
    assert re.search(rf"cat +{known} +{errors} .* {missed} of {yes} +{errors - missed} of {known - yes}\n", text)
    assert cli.main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["multi_label"], said["errors"], said["decisions"]) == (True, found.errors, 721)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--members", "t1,t2=0.5,t1"], r"--members names member 't1' twice"),
        (["--members", "t9"], r"no member 't9'"),
        (["--policy", "to_rgb"], r"--policy is of models; .* is a cache"),
        (["--fit-bias", "cat", "--bias-data", "digits"], r"--fit-bias is of models"),
        (["--combine", "vote", "--bias", "cat=1"], r"--bias is of models; votes have no logits"),
        (["--batch-size", "0"], r"--batch-size 0: must be at least 1"),
        pytest.param(["--data", "digits"], "class", marks=needs("sklearn", "demo"), id="other classes"),
    ],
)
def test_what_a_cache_cannot_be_asked(
    pieces: Path, cache: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", str(cache), "--data", f"{pieces}:points", "--threads", "1", *flags]
    assert cli.main(argv) == 2

    assert re.search(message, capsys.readouterr().err)


def test_a_cache_that_keeps_some_classes_is_told_before_anything_runs(pieces: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "cache")
    given = {"data": f"{pieces}:points?count=20", "threads": 1, "device": "cpu"}
    dump.run(DumpConfig(teacher=(f"{pieces}:net",), out=out, codec="topk:k=3", **given), quiet=True)
    for model, compared in ((out, None), (f"{pieces}:net", out)):
        with pytest.raises(CacheError, match="'topk', which keeps some classes only: it has no whole soft target"):
            measure.run(model, EvalConfig(cache=compared, **given), quiet=True)


def test_an_unfinished_dump_is_told_as_such(
    pieces: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(cache, broken)
    (broken / "manifest.json").unlink()
    (broken / "dump").mkdir(exist_ok=True)
    assert cli.main(["eval", str(broken), "--data", f"{pieces}:points"]) == 2
    message = capsys.readouterr().err
    assert "manifest" in message or "unfinished" in message
    assert "student.safetensors" not in message


def test_eval_of_a_cache_from_the_command_line(pieces: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", str(cache), "--data", f"{pieces}:points", "--threads", "1", "--per-class"]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "top-1" in text and "gnu" in text
    assert cli.main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["labelled"] == sum(samples for _, samples in said["class_errors"].values())
