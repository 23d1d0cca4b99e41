"""Members that keep features alone: what the teacher gives is not stored, and may be anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump
from torch import Tensor

import softcache
from softcache import cli, dump
from softcache.config import DumpConfig, EvalConfig, PlanConfig, TrainConfig
from softcache.dump import forecast
from softcache.errors import CacheError, ConfigError, LossError, ModelError, SoftcacheError, TeacherError
from softcache.evaluate import measure
from softcache.models import load_model
from softcache.spec import load_user_file
from softcache.train import flow

WORLD = WORLDS / "numbers.py"
BACKBONE, DATA = f"{WORLD}:backbone?output=features", f"{WORLD}:images"
POOLED = ("pooled:flatten",)


def live() -> Tensor:
    """(60, 4) of the pictures, in their order."""
    world = load_user_file(WORLD)
    net, found = world.backbone().eval(), []
    net.pooled.register_forward_hook(lambda _m, _i, output: found.append(output.flatten(1)))
    with torch.no_grad():
        net(net.collate(list(world.images().images)))
    return found[0]


def test_features_are_stored_as_the_module_gave_them_and_nothing_else(quick_dump: QuickDump) -> None:
    cache = quick_dump(data=DATA, teacher=[BACKBONE], features=POOLED, codec=None)
    member = cache.member("backbone")
    assert (member.output, member.codec, member.width, member.promise) == (None, None, 0, None)
    assert cache.class_names == () and cache.codecs == {}
    targets = cache.gather(
        cache.find([f"n/0/{i:04d}" for i in range(60)]), np.zeros(60, np.int64), features=["pooled:flatten"]
    )
    torch.testing.assert_close(targets.feature("pooled:flatten"), live(), rtol=2e-3, atol=1e-6)
    arrays = {name for file in cache.manifest.files_of("member", "backbone") for name in file.arrays}
    assert {name for name in arrays if not name.endswith("_crc32")} == {"feature0", "feature0_error"}
    with pytest.raises(CacheError, match=r"it gave features alone\n.*feature\(name, member\)"):
        targets.output("backbone")


@pytest.mark.slow
def test_parts_of_a_dump_and_more_views_later_are_the_same_records(quick_dump: QuickDump, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": f"{DATA}?count=300", "teacher": [BACKBONE], "features": POOLED, "codec": None}
    settings |= {"policy": ("shift:pixels=1",), "shard_rows": 256}
    whole = quick_dump(out="whole", views=3, **settings)
    base = {**settings, "teacher": (BACKBONE,), "threads": 1, "workers": 0, "views": 3, "out": str(tmp_path / "parts")}
    for part in ("2/2", "1/2"):
        dump.run(DumpConfig(**base, part=part), quiet=True)
    assert softcache.open(tmp_path / "parts", quiet=True).id == whole.id
    quick_dump(out="grown", views=2, **settings)
    grown = quick_dump(
        out="grown",
        data=f"{DATA}?count=300",
        teacher=[BACKBONE],
        extend=True,
        views=3,
        codec=None,
        policy=(),
        shard_rows=256,
    )
    rows, views = np.repeat(np.arange(300), 3), np.tile(np.arange(3), 300)
    values = [one.stored("backbone", "feature0", rows, views) for one in (whole, grown)]
    assert np.array_equal(*values) and grown.num_views == 3


def test_a_member_of_features_alone_lies_beside_one_of_classes(quick_dump: QuickDump, tmp_path: Path) -> None:
    labelled = f"{DATA}?kind=classes"
    quick_dump(
        data=labelled, teacher=[f"{WORLD}:classifier", BACKBONE], features=("backbone=pooled:flatten",), codec="float16"
    )
    cache = str(tmp_path / "cache")
    config = TrainConfig(
        cache=cache, data=labelled, student="softcache:mlp?hidden=16", loss=("kd", "hint:member=backbone"), epochs=1,
        out=str(tmp_path / "run"), threads=1, workers=0, check_content="none",
    )  # fmt: skip
    assert {"kd", "hint"} <= flow.run(config, quiet=True).metrics[0].keys()
    assert load_model(str(tmp_path / "run"), num_classes=3).output == "logits"


@pytest.mark.parametrize("data", [DATA, f"{DATA}?kind=classes"], ids=["no labels", "labels"])
def test_a_student_gives_the_vector_and_is_measured_by_it(quick_dump: QuickDump, tmp_path: Path, data: str) -> None:
    """Whatever labels there are: no term is on classes, and a classifier would never learn."""
    quick_dump(data=data, teacher=[BACKBONE], features=POOLED, codec=None)
    cache = str(tmp_path / "cache")
    config = TrainConfig(
        cache=cache, data=data, eval_data=data, student="softcache:mlp?hidden=16", loss=("hint",), epochs=3,
        out=str(tmp_path / "run"), threads=1, workers=0, check_content="none", batch_size=10, lr=0.01,
    )  # fmt: skip
    rows = flow.run(config, quiet=True).metrics
    model = load_model(str(tmp_path / "run"), num_classes=3)
    assert (model.output, model.num_classes) == ("embedding", 4)
    assert rows[-1]["eval_cosine"] > 0.9
    evaluated = EvalConfig(data=data, cache=cache, threads=1, workers=0)
    found = measure.run(str(tmp_path / "run"), evaluated, quiet=True).numbers
    assert found["cosine"] == pytest.approx(rows[-1]["eval_cosine"], abs=1e-9)
    with torch.no_grad():
        own = torch.cat([model(model.input.collate([image])) for image in load_user_file(WORLD).images().images])
    wanted = torch.nn.functional.cosine_similarity(own.double(), live().double()).mean()
    assert found["cosine"] == pytest.approx(float(wanted), abs=1e-4)
    of_teacher = measure.run(cache, EvalConfig(data=data, threads=1, workers=0), quiet=True).numbers
    assert ("nearest_neighbour" in of_teacher) == ("classes" in data)


def test_beside_an_embedding_that_is_what_is_measured(quick_dump: QuickDump, tmp_path: Path) -> None:
    quick_dump(
        data=DATA, teacher=[f"{WORLD}:embedder?output=embedding", BACKBONE], features=("backbone=pooled:flatten",),
        codec="float16",
    )  # fmt: skip
    config = TrainConfig(
        cache=str(tmp_path / "cache"), data=DATA, eval_data=DATA, student="softcache:mlp?hidden=16", epochs=1,
        loss=("cosine:member=embedder", "hint:member=backbone,adapter=linear"), out=str(tmp_path / "run"), threads=1, workers=0,
        check_content="none",
    )  # fmt: skip
    row = flow.run(config, quiet=True).metrics[-1]
    assert {"cosine", "hint", "eval_cosine"} <= row.keys()
    assert load_model(str(tmp_path / "run"), num_classes=3).num_classes == 12
    asked = EvalConfig(data=DATA, cache=str(tmp_path / "cache"), threads=1, workers=0)
    assert measure.run(str(tmp_path / "run"), asked, quiet=True).numbers["cosine"] == pytest.approx(
        row["eval_cosine"], abs=1e-9
    )
    assert measure.run(str(tmp_path / "cache"), EvalConfig(data=DATA, threads=1, workers=0), quiet=True).samples == 60


@pytest.mark.slow
def test_plan_foresees_its_size(quick_dump: QuickDump) -> None:
    settings: dict[str, Any] = {"data": f"{DATA}?count=600", "teacher": (BACKBONE,), "features": ("stem:map",)}
    cache = quick_dump(**settings, codec=None)
    plan = PlanConfig(**settings, threads=1, workers=0)
    found = forecast.run(plan, quiet=True, trial_rows=(256, 256), trial_seconds=0.1)
    assert found.choice.nbytes == pytest.approx(cache.manifest.nbytes, rel=0.02)
    assert "> features alone" in found.text() and "feature stem:map" in found.text()


def test_what_is_said_of_it_and_taken_out_of_it(
    quick_dump: QuickDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_dump(data=f"{DATA}?kind=classes", teacher=[BACKBONE], features=(*POOLED, "stem:gram"), codec=None)
    path = str(tmp_path / "cache")
    assert cli.main(["inspect", path]) == 0 and "features alone" in capsys.readouterr().out
    assert cli.main(["inspect", path, "--sample", "n/0/0003"]) == 0
    assert cli.main(["subset", path, str(tmp_path / "less"), "--keep-labels", "cat"]) == 0
    assert cli.main(["verify", str(tmp_path / "less"), "--full"]) == 0
    assert "features alone" in (tmp_path / "less" / "README.md").read_text()


@pytest.mark.parametrize(
    ("teacher", "settings", "error", "match"),
    [
        (BACKBONE, {}, ConfigError, r"features alone are kept, and none is asked for\n.*--features LAYER:pool"),
        (BACKBONE, {"features": POOLED, "codec": "int8"}, ConfigError, "--codec int8: of these teachers features alone"),
        (BACKBONE, {"features": POOLED, "max_relative_error": 0.1}, ConfigError, "--max-relative-error promises nothing"),
        (BACKBONE, {"for_": ("kd",)}, LossError, "--for kd: it is on classes, and teacher 'backbone' gives features"),
        (BACKBONE, {"for_": ("mse",)}, LossError, "--for mse: it is of teachers that give an embedding or values"),
        (f"{WORLD}:backbone?shaky=true&output=features", {"features": POOLED}, TeacherError, "gave two outputs for one batch"),
        (f"{WORLD}:regression?output=features", {"features": POOLED}, ModelError, "is no torch module: it has no layers"),
        (f"{WORLD}:backbone?output=feature", {"features": POOLED}, ConfigError, "unknown output 'feature'"),
    ],
    ids=["none", "codec", "promise", "classes", "values", "shaky", "no module", "no word"],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    quick_dump: QuickDump, teacher: str, settings: dict, error: type[SoftcacheError], match: str
) -> None:
    with pytest.raises(error, match=match):
        quick_dump(data=f"{DATA}?kind=classes", teacher=[teacher], **({"codec": None} | settings))


def test_a_loss_on_classes_and_one_of_two_vectors_are_refused(quick_dump: QuickDump, tmp_path: Path) -> None:
    quick_dump(data=DATA, teacher=[BACKBONE], features=(*POOLED, "stem:flatten"), codec=None)
    made = {
        "cache": str(tmp_path / "cache"), "data": DATA, "student": "softcache:mlp?hidden=16", "epochs": 1,
        "out": str(tmp_path / "run"), "threads": 1, "workers": 0, "check_content": "none",
    }  # fmt: skip
    with pytest.raises(
        LossError, match="loss 'kd' is on classes, and no member gave any: 'backbone' gave features alone"
    ):
        flow.run(TrainConfig(**made, loss=("kd",)), quiet=True)
    with pytest.raises(CacheError, match=r"2 of them are vectors: pooled:flatten, stem:flatten\n.*one: dump it with"):
        flow.run(TrainConfig(**made, loss=("hint:layer=pooled",)), quiet=True)
