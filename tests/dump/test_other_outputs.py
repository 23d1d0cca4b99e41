"""Teachers whose outputs are no classes: embeddings and values, of data with labels, without, and with numbers for labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump

import softcache
from softcache import cli, dump
from softcache.cache.card.teachers import record_bytes
from softcache.config import DumpConfig, PlanConfig
from softcache.data.transfer_set import open_transfer_set
from softcache.dump import forecast
from softcache.errors import CacheError, CodecFitError, ConfigError, DataError, ModelError, SoftcacheError, TeacherError
from softcache.spec import load_user_file

WORLD = WORLDS / "numbers.py"
EMBEDDER, WHOLE = f"{WORLD}:embedder?output=embedding", f"{WORLD}:whole?output=values&names=sum,bright"


def given(name: str, count: int = 60, **settings: object) -> torch.Tensor:
    """What a teacher of the world gives of its images, in their order: asked here, one after the other."""
    world = load_user_file(WORLD)
    images = world.images(count).images
    teacher = getattr(world, name)(**settings)
    with torch.no_grad():
        return torch.cat([teacher(teacher.collate([image])) for image in images])


@pytest.mark.parametrize("kind", ["none", "classes", "score"])
def test_an_embedding_is_stored_as_it_was_given_whatever_the_labels(quick_dump: QuickDump, kind: str) -> None:
    cache = quick_dump(data=f"{WORLD}:images?kind={kind}", teacher=[EMBEDDER])
    rows = cache.find([f"n/0/{i:04d}" for i in range(60)])
    targets = cache.gather(rows, np.zeros(60, np.int64))
    wanted = given("embedder", input_shape=(8, 8))
    torch.testing.assert_close(targets.embedding(), wanted, rtol=1e-5, atol=1e-6)
    assert cache.class_names == (("ant", "bee", "cat") if kind == "classes" else ())
    member = cache.manifest.plan.members[0]
    assert (cache.manifest.plan.format, member.output, member.width, list(member.value_names)) == (
        2,
        "embedding",
        12,
        [],
    )


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_each_record_is_within_its_bound_and_the_measured_error_is_that_of_numpy(
    quick_dump: QuickDump, codec: str
) -> None:
    cache = quick_dump(data=f"{WORLD}:images", teacher=[EMBEDDER], codec=codec)
    rows, views = np.arange(60), np.zeros(60, np.int64)
    stored = cache.gather(rows, views).embedding().double().numpy()
    wanted = given("embedder", input_shape=(8, 8)).double().numpy()[[int(cache.samples.key(r)[4:]) for r in rows]]
    eps = cache.eps("embedder", rows, views)
    assert (np.abs(stored - wanted).max(axis=1) <= eps + 1e-6).all()
    statistics = cache.manifest.statistics["embedder"]
    assert statistics.error is not None and statistics.measured == 32  # of a batch of 60, spread evenly
    errors = np.linalg.norm(stored - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    measured = errors[[i * 60 // 32 for i in range(32)]]
    assert statistics.error.sum == pytest.approx(measured.sum(), abs=1e-4)
    assert statistics.error.worst == pytest.approx(measured.max(), abs=1e-5)
    assert (statistics.labelled, statistics.agreed, dict(statistics.kl)) == (0, 0, {})


def test_values_have_their_names_and_one_number_a_sample_is_one_value(quick_dump: QuickDump) -> None:
    cache = quick_dump(
        data=f"{WORLD}:images", teacher=[WHOLE, f"{WORLD}:regression?output=values&name=r"], codec="float32"
    )
    assert [list(cache.member(name).value_names) for name in cache.members] == [["sum", "bright"], ["value"]]
    targets = cache.gather(cache.find(["n/0/0007"]), np.array([0]))
    image = load_user_file(WORLD).images().images[7]
    assert targets.values("whole").tolist() == [[float(image.sum()), float((image > 127).sum())]]
    assert targets.values("r").tolist() == [[pytest.approx(image.sum() / 1000, rel=1e-6)]]


def test_members_of_unlike_widths_and_with_classes_lie_beside_one_another(quick_dump: QuickDump) -> None:
    cache = quick_dump(
        data=f"{WORLD}:images?kind=classes",
        teacher=[f"{WORLD}:classifier", EMBEDDER, f"{EMBEDDER}&width=5&name=small"],
    )
    targets = cache.gather(np.arange(4), np.zeros(4, np.int64))
    assert targets.logits("classifier").shape == (4, 3) and targets.embedding("small").shape == (4, 5)
    with pytest.raises(
        CacheError, match=r"combine over classes, and these have none: 'embedder' \(embedding\), 'small'"
    ):
        targets.combined()
    with pytest.raises(
        CacheError, match=r"member 'small' holds no logits of classes: it gave embedding\n.*embedding\(m"
    ):
        targets.logits("small")
    with pytest.raises(CacheError, match=r"member 'classifier' holds no values: it gave logits"):
        targets.values("classifier")


def test_the_input_of_the_last_layer_is_an_embedding(quick_dump: QuickDump) -> None:
    cache = quick_dump(data=f"{WORLD}:images?kind=classes", teacher=[f"{WORLD}:classifier?head=none"])
    member = cache.manifest.plan.members[0]
    assert (member.width, dict(member.input)) == (6, {"head": "none"}) and "head=none" in member.model
    network = load_user_file(WORLD).classifier(3, (8, 8))[:3]
    image = torch.from_numpy(load_user_file(WORLD).images().images[:1]).float() / 255
    stored = cache.gather(cache.find(["n/0/0000"]), np.array([0])).embedding()
    torch.testing.assert_close(stored, network(image), rtol=1e-5, atol=1e-6)


def test_a_model_of_ours_and_of_torchvision_without_its_head(quick_dump: QuickDump, tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v3_small(num_classes=3)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    data = "synthetic:images?classes=3&count=8&size=32"
    cache = quick_dump(
        data=data, teacher=[f"torchvision:mobilenet_v3_small?head=none@{tmp_path / 'net.pth'}"], batch_size=8
    )
    assert cache.manifest.plan.members[0].width == 1024


@pytest.mark.parametrize(
    ("teacher", "settings", "error", "match"),
    [
        (f"{WORLD}:maps?output=embedding", {}, TeacherError, r"shape \(60, 4, 8, 8\); output=embedding takes \(batch, D\)"),
        (f"{WORLD}:whole?output=values&names=a", {}, TeacherError, r"takes \(batch, 1 \(a\)\)"),
        (f"{WORLD}:whole?output=values&names=a,a", {}, ConfigError, "has a name twice"),
        (f"{WORLD}:embedder?head=none", {}, ModelError, "does not end with an nn.Linear"),
        (f"{WORLD}:regression?head=none", {}, ConfigError, "head=none is of torch modules"),
        (f"{WORLD}:embedder?output=values&head=none", {}, ConfigError, "head=none gives an embedding"),
        (f"{WORLD}:embedder", {}, DataError, "has no classes, and no teacher names any\n.*output=embedding"),
        (EMBEDDER, {"codec": "topk:k=3"}, ConfigError, "--codec topk.* is of logits, and teacher 'embedder' gives embedding"),
        (EMBEDDER, {"max_kl": 1e-3}, ConfigError, "--max-kl promises nothing of embedding\n.*--max-relative-error"),
        (EMBEDDER, {"codec": "int8", "max_relative_error": 1e-5}, CodecFitError, "does not keep relative error <= 1e-05"),
        (EMBEDDER, {"max_relative_error": -1.0}, ConfigError, "must be a number > 0"),
    ],
    ids=[
        "a map", "too few names", "a name twice", "no last layer", "no module", "two outputs",
        "classes of no data", "codec of classes", "promise of classes", "broken promise", "no promise",
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    quick_dump: QuickDump, teacher: str, settings: dict, error: type[SoftcacheError], match: str
) -> None:
    with pytest.raises(error, match=match):
        quick_dump(data=f"{WORLD}:images", teacher=[teacher], **({"codec": None} | settings))


def test_a_cache_of_version_1_takes_no_embeddings(quick_dump: QuickDump) -> None:
    quick_dump(data=f"{WORLD}:images?kind=classes", teacher=[f"{WORLD}:classifier"])
    with pytest.raises(ModelError, match="gives embedding, and the cache is of format version 1"):
        quick_dump(
            data=f"{WORLD}:images?kind=classes", teacher=[f"{WORLD}:classifier", EMBEDDER], extend=True, codec=None
        )


def test_a_member_with_an_embedding_is_added_to_one_with_values(quick_dump: QuickDump) -> None:
    quick_dump(data=f"{WORLD}:images", teacher=[WHOLE])
    cache = quick_dump(data=f"{WORLD}:images", teacher=[WHOLE, EMBEDDER], extend=True, codec=None)
    assert [cache.member(name).output for name in cache.members] == ["values", "embedding"]
    targets = cache.gather(np.arange(3), np.zeros(3, np.int64))
    assert targets.values("whole").shape == (3, 2) and targets.embedding("embedder").shape == (3, 12)


def test_parts_and_one_process_make_one_id(quick_dump: QuickDump, tmp_path: Path) -> None:
    settings = {"data": f"{WORLD}:images?count=600", "teacher": [EMBEDDER, WHOLE], "shard_rows": 256, "codec": "int8"}
    whole = quick_dump(out="whole", **settings)
    base = DumpConfig(
        **{**settings, "teacher": tuple(settings["teacher"])}, out=str(tmp_path / "parts"), threads=1, workers=0
    )
    for part in ("2/2", "1/2"):
        dump.run(DumpConfig(**{**vars(base), "part": part}), quiet=True)
    assert softcache.open(tmp_path / "parts", quiet=True).id == whole.id


def test_a_promise_picks_the_smallest_codec_that_keeps_it_and_plan_foresees_its_size(
    quick_dump: QuickDump, tmp_path: Path
) -> None:
    settings = {"data": f"{WORLD}:images?count=600", "teacher": (f"{EMBEDDER}&width=64",), "threads": 1, "workers": 0}
    cache = quick_dump(**settings, codec=None, max_relative_error=0.02)
    assert cache.codecs["embedder"].text == "int8:group=64"
    assert dict(cache.member("embedder").promise or {}) == {"max_relative_error": "0.02"}
    found = forecast.run(
        PlanConfig(**settings, max_relative_error=0.02), quiet=True, trial_rows=(256, 256), trial_seconds=0.1
    )
    assert found.chosen == "int8:group=64"
    assert found.choice.nbytes == pytest.approx(cache.manifest.nbytes, rel=0.02)
    assert "relative error" in found.text() and "KL" not in found.text()


@pytest.mark.slow
def test_a_basis_over_the_numbers_keeps_its_promise_and_is_extended_and_foreseen(quick_dump: QuickDump) -> None:
    """64 pixels, of which 40 numbers are a smooth map; rows that the basis misses are dense."""
    settings = {
        "data": f"{WORLD}:images?count=600",
        "teacher": (f"{EMBEDDER}&width=200",),
        "policy": ("shift:pixels=1",),
    }
    cache = quick_dump(**settings, codec="lowrank:max_relative_error=0.05", views=2)
    assert cache.codecs["embedder"].parameters == {"max_relative_error": "0.05"}
    rows = cache.find([f"n/0/{i:04d}" for i in range(600)])
    plain = quick_dump(**settings, codec="float32", views=3, out="plain")
    given, stored = (one.gather(rows, np.zeros(600, np.int64)).embedding().double() for one in (plain, cache))
    assert float(((stored - given).norm(dim=1) / given.norm(dim=1)).max()) <= 0.05
    eps = cache.eps("embedder", rows, np.zeros(600, np.int64))
    assert bool(((stored - given).abs().amax(dim=1) <= torch.from_numpy(eps) + 1e-6).all())
    assert record_bytes(cache.manifest, "embedder") < 200  # of int8 208
    planned = PlanConfig(**settings, codec="lowrank:max_relative_error=0.05", views=2, threads=1, workers=0)
    found = forecast.run(planned, quiet=True, codecs=("int8",), trial_rows=(512, 512), trial_seconds=0.1)
    assert found.choice.nbytes == pytest.approx(cache.manifest.nbytes, rel=0.02)
    assert "variance kept" in found.text() and found.to_json()["codecs"][found.chosen]["explained"] > 0.99  # type: ignore[index]
    quick_dump(data=settings["data"], teacher=settings["teacher"], extend=True, views=3, codec=None, policy=())
    grown = softcache.open(cache.reader.path, quiet=True)
    third = grown.gather(rows, np.full(600, 2)).embedding().double()
    wanted = plain.gather(rows, np.full(600, 2)).embedding().double()
    assert float(((third - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) <= 0.05


def test_lowrank_takes_its_promise_from_the_flag_or_from_itself(quick_dump: QuickDump) -> None:
    data, wide = f"{WORLD}:images?count=300", f"{EMBEDDER}&width=200"
    cache = quick_dump(data=data, teacher=[wide], codec="lowrank", max_relative_error=0.1)
    assert cache.codecs["embedder"].text == "lowrank:max_relative_error=0.1"
    assert dict(cache.member("embedder").promise or {}) == {"max_relative_error": "0.1"}
    with pytest.raises(
        ConfigError, match=r"is of logits, and teacher 'embedder' gives embedding\n.*--max-relative-error"
    ):
        quick_dump(data=data, teacher=[wide], codec="lowrank", out="other")
    with pytest.raises(ConfigError, match="is of outputs without classes, and teacher 'classifier' gives logits"):
        quick_dump(
            data=f"{WORLD}:images?kind=classes", teacher=[f"{WORLD}:classifier"], out="third",
            codec="lowrank:max_relative_error=0.1",
        )  # fmt: skip


def test_labels_with_fractions_are_values_and_a_mistaken_one_among_classes_is_refused(tmp_path: Path) -> None:
    scored = open_transfer_set(f"{WORLD}:images?kind=score")
    assert scored.values is not None and scored.values.shape == (60, 1) and scored.labelled == 0
    np.testing.assert_allclose(scored.select(np.array([3])).values,
                               [[load_user_file(WORLD).images(kind="score").labels[3]]])  # fmt: skip
    lines = [f"text {i},{i / 7:.3f},{i}" for i in range(60)]
    (tmp_path / "scores.csv").write_text("text,score,other\n" + "\n".join(lines) + "\n")
    table = open_transfer_set(f"table:{tmp_path}/scores.csv?text=text&label=score,other&classes=none")
    np.testing.assert_allclose(table.values, [[round(i / 7, 3), i] for i in range(60)])
    with pytest.raises(DataError, match=r"numbers with fractions.*\n.*classes=none"):
        open_transfer_set(f"table:{tmp_path}/scores.csv?text=text&label=score")
    (tmp_path / "odd.csv").write_text("text,score\na,1.5\nb,much\n")
    with pytest.raises(DataError, match="line 3: 'much' is no number"):
        open_transfer_set(f"table:{tmp_path}/odd.csv?text=text&label=score&classes=none")


def test_what_is_said_of_such_a_cache(
    quick_dump: QuickDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its card, `inspect` and the picture of a sample; and what is taken out of it."""
    quick_dump(
        data=f"{WORLD}:images?kind=classes", teacher=[EMBEDDER, WHOLE], codec=None, max_relative_error=1e-3, views=None
    )
    path = str(tmp_path / "cache")
    card = (tmp_path / "cache" / "README.md").read_text()
    for said in ("an embedding", "named numbers: sum, bright", "its relative error is at most 0.001", "--loss cosine"):
        assert said in card
    assert "KL" not in card and "logits" not in card.partition("## Transfer set")[0]
    assert cli.main(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert "relative error, mean / worst" in out and "values sum, bright" in out and "entropy" not in out
    assert cli.main(["inspect", path, "--sample", "n/0/0003"]) == 0
    assert "12 numbers of length" in capsys.readouterr().out
    assert cli.main(["subset", path, str(tmp_path / "less"), "--members", "whole", "--keep-labels", "cat"]) == 0
    assert cli.main(["verify", str(tmp_path / "less"), "--full"]) == 0
    less = softcache.open(tmp_path / "less", quiet=True)
    row = less.find([less.samples.key(0)])
    wanted = softcache.open(path, quiet=True)
    here, there = (one.gather(one.find([less.samples.key(0)]), np.array([0])) for one in (less, wanted))
    assert less.members == ("whole",) and len(row) == 1
    assert torch.equal(here.values(), there.values("whole"))


def test_outlier_dimensions_cost_groups_half_the_error_and_few_bytes(quick_dump: QuickDump) -> None:
    """1,024 numbers, 1 % of them ten times as large: a scale for each 64 instead of one a row."""
    loud = f"{EMBEDDER}&width=1024&loud=true"
    wanted = given("embedder", input_shape=(8, 8), width=1024, loud=True).double().numpy()
    errors, sizes = {}, {}
    for codec in ("int8", "int8:group=64"):
        cache = quick_dump(data=f"{WORLD}:images", teacher=[loud], codec=codec, out=codec.replace(":", "-"))
        rows = cache.find([f"n/0/{i:04d}" for i in range(60)])
        stored = cache.gather(rows, np.zeros(60, np.int64)).embedding().double().numpy()
        errors[codec] = float((np.linalg.norm(stored - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).mean())
        sizes[codec] = record_bytes(cache.manifest, "embedder")
    assert sizes["int8:group=64"] <= 1100
    assert errors["int8:group=64"] <= errors["int8"] / 2
    print(errors, sizes)
