"""Mistaken settings of `softcache train`: each is refused before the first step, says what is missing and how to mend it.

Every row is a command line. No row may reach an optimiser, and none may leave anything behind in --out.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS

from softcache import cli, dump
from softcache.config import DumpConfig
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ConfigError, TrainingError
from softcache.train.ranks import Ranks
from softcache.train.refuse import check_finite, check_last_batch, smallest_piece


class World:
    """pieces.py, and caches made with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shutil.copy(WORLDS / "two_maps.py", path / "pieces.py")
        self.dump("plain")
        self.dump("vectors", features=("stage2:pool",))
        self.dump("maps", features=("stage1:map", "stage2:map"))
        self.dump("fsp", features=("stage1+stage2:fsp",))
        self.dump("sign", features=("stage2:sign",))
        self.dump("flat", features=("stage2:flatten",))
        self.dump("two", teachers=("seed=1&name=a", "seed=2&name=b"), features=("stage2:pool",))
        self.dump("scaled", teachers=("end=scaled",), features=("stage2:pool",))
        self.dump("log_probs", teachers=("end=log_probs",))
        self.dump("topk", codec="topk:k=2")
        self.dump("views", policy=("shift:pixels=1",), views=2)
        self.dump("mixed", policy=("mixup",), features=("stage2:pool",))
        self.dump("unlabelled", labels="none")
        self.dump("many", labels="many")
        self.dump("ants", labels="ants", features=("stage2:pool",))

    def spec(self, name: str) -> str:
        return f"{self.path}/pieces.py:{name}"

    def dump(self, out: str, teachers: tuple[str, ...] = ("seed=1",), labels: str = "all", **settings: Any) -> None:
        config = DumpConfig(
            data=self.spec(f"images?labels={labels}"),
            teacher=tuple(self.spec(f"teacher?{parameters}") for parameters in teachers),
            out=str(self.path / out),
            threads=1,
            device="cpu",
            **{"codec": "float32", **settings},
        )
        dump.run(config, quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("refusals"))


Refused = Callable[[str], str]


@pytest.fixture
def refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """refused(flags) -> what the command printed; it must end with code 2, before any step, and leave nothing."""

    def run(flags: str) -> str:
        def made(*_: Any) -> Any:
            raise AssertionError("it went on to train")

        monkeypatch.setattr(torch.optim.Optimizer, "__init__", made)
        out = tmp_path / "run"
        words = shlex.split(flags.format(path=world.path, pieces=f"{world.path}/pieces.py"))
        argv = ["train", "--out", str(out), "--threads", "1", "--device", "cpu", "--quiet", *words]
        for flag, value in (("--data", "images"), ("--student", "student")):
            argv += [] if flag in words else [flag, world.spec(value)]
        assert cli.main(argv) == 2
        assert not out.exists()
        said = capsys.readouterr()
        assert not said.out
        return said.err

    return run


# flags ({path}: folder of the caches; data and student are the usual ones unless said), message, tip
MISTAKES: dict[str, tuple[str, str, str]] = {
    # ---- what the cache does not hold
    "no features": (
        "--cache {path}/plain --loss hint",
        "loss 'hint' needs a feature of the teacher as LAYER:pool or .* LAYER:map; the cache holds none",
        "softcache dump --for hint .* --features LAYER:map",
    ),
    "other features": (
        "--cache {path}/vectors --loss at",
        "loss 'at' needs a feature of the teacher as LAYER:attention or LAYER:map; the cache holds stage2:pool",
        "softcache dump --for at",
    ),
    "features of another kind for simkd": (
        "--cache {path}/sign --loss simkd",
        "needs a feature .* LAYER:map or .*LAYER:pool.*; the cache holds stage2:sign",
        "softcache dump --for simkd",
    ),
    "no cache": ("--loss kd", "learns from a teacher, and there is no cache", "--cache DIR"),
    "no cache for features": ("--loss at", "'at' learns from a teacher, and there is no cache", "--cache DIR"),
    "no cache, in a stage": (
        "--stage 'loss=ce epochs=1' --stage 'loss=hint epochs=1'",
        "'hint' learns from a teacher, and there is no cache",
        "--cache DIR",
    ),
    "no classifier for srrl": (
        "--cache {path}/scaled --loss srrl",
        "does not keep the final linear layer of member 'teacher'",
        "nn.Linear",
    ),
    "no classifier for simkd": (
        "--cache {path}/scaled --loss simkd:student=head",
        "does not keep the final linear layer of member 'teacher'",
        "nn.Linear",
    ),
    "a classifier of another layer": (
        "--cache {path}/flat --loss srrl",
        r"stage2:flatten of the teacher is \(128,\), its classifier takes 8 numbers",
        "--codec linear_head",
    ),
    # ---- members and layers
    "several members have it": (
        "--cache {path}/two --loss hint",
        "compares with one teacher, and these have such features: a, b",
        "member=NAME",
    ),
    "a member that is not there": ("--cache {path}/two --loss hint:member=c", "no member 'c'", "known: a, b"),
    "a member that was left out": (
        "--cache {path}/two --members a --loss hint:member=b",
        "no member 'b'",
        "known: a",
    ),
    "simkd with two members": (
        "--cache {path}/two --loss simkd:member=a,student=head",
        "takes one teacher",
        "--members NAME",
    ),
    "several layers": (
        "--cache {path}/maps --loss hint",
        "compares one layer, and the cache holds stage1:map, stage2:map",
        "layer=stage2",
    ),
    "a layer of the teacher that is not stored": (
        "--cache {path}/vectors --loss hint:layer=stage1",
        "holds no layer 'stage1'",
        "stage2:pool",
    ),
    "a layer of the student that is not there": (
        "--cache {path}/vectors --loss hint:student=stage3",
        "the student has no module 'stage3'",
        "did you mean 'stage",
    ),
    "fewer layers of the student": (
        "--cache {path}/maps --loss at:student=stage1",
        "1 layers of the student for 2 of the teacher",
        "student=layer1/layer2",
    ),
    "layers that nothing joins": (
        "--cache {path}/maps --student {pieces}:small --loss at",
        "which layers of the student go with stage1:map, stage2:map",
        "student=LAYER; its maps end at body",
    ),
    "no final linear layer": (
        "--cache {path}/vectors --student {pieces}:student?end=scaled --loss hint",
        "no final nn.Linear",
        "student=LAYER",
    ),
    # ---- shapes
    "averaged fsp of one map": (
        "--cache {path}/maps --loss fsp_average:layer=stage2",
        "loss 'fsp_average' takes 2 maps or more, and is given stage2:map alone",
        "--for fsp_average",
    ),
    "a word that srrl does not know": (
        "--cache {path}/vectors --loss srrl:logits=mes",
        "loss 'srrl': logits: unknown value 'mes'",
        "did you mean 'mse'",
    ),
    "an adapter that is not there": (
        "--cache {path}/vectors --loss hint:adapter=liner",
        "unknown adapter 'liner'",
        "did you mean 'linear'",
    ),
    "widths that differ": (
        "--cache {path}/vectors --loss hint:adapter=identity",
        "the student's features are 6 wide and the teacher's 8",
        "adapter=linear",
    ),
    "fsp of other widths": (
        "--cache {path}/fsp --loss fsp",
        r"gives \(3, 6\), stage1\+stage2:fsp of the teacher \(4, 8\)",
        "",
    ),
    "a map smaller than what is stored of the teacher's": (
        "--cache {path}/sign --student {pieces}:small --loss ab:student=body",
        "2 x 2, smaller than the teacher's 4 x 4",
        "earlier layer of the student",
    ),
    "simkd from a map to a vector": (
        "--cache {path}/vectors --loss simkd",
        r"norm of the student gives \(6, 4, 4\), stage2:pool of the teacher \(8,\)",
        "student=head",
    ),
    "simkd at the wrong place": (
        "--cache {path}/maps --loss simkd:layer=stage1,student=stage1",
        "the student does not work with a projector behind 'stage1': .* 3 channels",
        "name a later one, or 'fc'",
    ),
    "simkd given twice": (
        "--cache {path}/maps --loss simkd:layer=stage1 --loss simkd:layer=stage2",
        "one teacher's classifier, and two terms ask for it",
        "",
    ),
    "a student of other classes": (
        "--cache {path}/plain --student {pieces}:narrow",
        r"narrow: gives \(2, 3\) for 2 samples of 4 classes",
        r"logits of shape \(B, 4\)",
    ),
    # ---- levels and temperatures
    "a level that log-probabilities do not have": (
        "--cache {path}/log_probs --loss mse_logits",
        "needs the level of the logits; member 'teacher' gave log_probs",
        "use kd or soft_ce",
    ),
    "a level that a rule does not keep": (
        "--cache {path}/two --loss mse_logits --combine mean_probs",
        "rule 'mean_probs' does not keep",
        "mean_logits",
    ),
    "classes that a codec does not keep": (
        "--cache {path}/topk --loss kd",
        "needs the logits of every class; codec 'topk' .* keeps some",
        "kd_lower_bound, or dump with --codec headtail",
    ),
    "a temperature that a codec does not serve": (
        "--cache {path}/topk --loss kd_lower_bound:temperature=20",
        "serves temperatures from 1 to 8, kd_lower_bound asks for 20",
        "--codec headtail",
    ),
    "a schedule that leaves what a codec serves": (
        "--cache {path}/topk --loss 'kd_lower_bound:temperature=linear(8, 0.5)'",
        "serves temperatures from 1 to 8, kd_lower_bound asks for 0.5",
        "--codec headtail",
    ),
    "kd_lower_bound of whole rows": ("--cache {path}/plain --loss kd_lower_bound", "has them all", "use kd"),
    "kd_lower_bound of some classes": (
        "--cache {path}/topk --loss kd_lower_bound --classes ant,bee",
        "takes every class",
        "leave --classes out",
    ),
    "a temperature of zero": ("--cache {path}/plain --loss kd:temperature=0", "temperature must be > 0, got 0", ""),
    "a schedule that reaches zero": (
        "--cache {path}/plain --loss 'kd:temperature=linear(4, 0)'",
        r"temperature must be > 0, got linear\(4, 0\)",
        "",
    ),
    "a learned temperature beside a given one": (
        "--cache {path}/two --loss ctkd --combine mean_probs_at_t",
        "finds its own temperature",
        "mean_logits",
    ),
    # ---- labels
    "one label on mixed views": ("--cache {path}/mixed --loss dkd", "these views are mixed", "use ce"),
    "no labels": (
        "--cache {path}/unlabelled --data {pieces}:images?labels=none --loss dkd",
        "needs labels, and no sample of .* has one",
        "soft targets need no labels: learn from a cache",
    ),
    "several labels": (
        "--cache {path}/many --data {pieces}:images?labels=many --loss wsld",
        "one class per sample, and the samples of .* have several labels",
        "--loss bce learns from the teacher, as kd does of one class; mse_logits, ce and losses on features fit too",
    ),
    "no negatives": (
        "--cache {path}/ants --data {pieces}:images?labels=ants --loss crd",
        "every sample is of one class",
        "rkd_distance",
    ),
    # ---- names and values
    "an unknown loss": ("--cache {path}/plain --loss kdd", "unknown loss 'kdd'", "did you mean 'kd'"),
    "an unknown setting of a loss": (
        "--cache {path}/plain --loss kd:temprature=4",
        "loss 'kd' has no setting 'temprature'",
        "did you mean 'temperature'",
    ),
    "a placement of a loss on logits": (
        "--cache {path}/plain --loss kd:layer=stage1",
        "loss 'kd' has no setting 'layer'",
        "known: ",
    ),
    "an unknown key": ("--set epoch=3", "unknown setting 'epoch'", "did you mean 'epochs'"),
    "an unknown flag": ("--epoch 3 --tempo 2", "--tempo", "did you mean '--epochs'.*softcache train --help"),
    "a value that is none": (
        "--cache {path}/plain --loss kd:weight=much",
        "weight: 'much' is neither a number",
        "linear",
    ),
    "a schedule that is none": ("--schedule 'cosin(1, 0)'", "'cosin.*' is neither a number nor a schedule", "cosine"),
    "a share out of its range": ("--cache {path}/plain --loss jsd:beta=1.5", "'jsd': beta must be in", ""),
    "a share that leaves its range": (
        "--cache {path}/plain --loss 'jsd:beta=linear(0.5, 2)'",
        "'jsd': beta must be",
        "",
    ),
    "a certainty out of its range": ("--loss tf_virtual:correct=2", "'tf_virtual': correct must be in", ""),
    "limits the wrong way round": ("--cache {path}/plain --loss ctkd:lowest=30", "limits 0 < lowest < highest", ""),
    "a memory of no negatives": (
        "--cache {path}/vectors --loss crd:negatives=0",
        "negatives=0.*needed are negatives",
        "",
    ),
    # ---- stages and frozen parts
    "an unknown setting of a stage": (
        "--stage 'epochs=1 loss=ce banana=4'",
        "--stage 1: 'banana' is no setting of a stage",
        "known: epochs",
    ),
    "a setting of the whole run in a stage": (
        "--stage 'epochs=1 loss=ce batch_size=4'",
        "'batch_size' belongs to the whole run",
        "--batch-size once",
    ),
    "an unknown loss in a second stage": ("--stage loss=ce --stage loss=cee", "unknown loss 'cee'", "'ce'"),
    "nothing is called that": (
        "--freeze stage9",
        "--freeze stage9: the student has no parameters there",
        "did you mean 'stage",
    ),
    "nothing is called that, in a second stage": (
        "--stage 'epochs=1 loss=ce' --stage 'epochs=1 loss=ce freeze=head'",
        "--freeze head: the student has no parameters there",
        "known: fc",
    ),
    "all is frozen": ("--freeze '*'", "every parameter is frozen", "freeze less"),
    "what the terms reach is frozen": (
        "--cache {path}/maps --loss at:layer=stage1,student=stage1 --freeze stage1",
        "no parameter that learns has a part in this stage's terms",
        "freeze less",
    ),
    "all is frozen in a second stage": (
        "--stage 'epochs=1 loss=ce' --stage 'epochs=1 loss=ce freeze=*'",
        "every parameter is frozen",
        "freeze less",
    ),
    # ---- flags that do not go together, or out of their range
    "a map without a start": ("--init-map stage1=stage1", "--init-map needs --init-from", ""),
    "a view and several views": (
        "--cache {path}/views --view 0 --views-per-visit 2",
        "--view and --views-per-visit cannot be given together",
        "",
    ),
    "more views than there are": (
        "--cache {path}/views --views-per-visit 3",
        "--views-per-visit 3: of each sample the cache has 2",
        "--extend --views",
    ),
    "the best of no evaluation": ("--keep best", "--keep best needs --eval-data", ""),
    "patience without an evaluation": ("--patience 3", "--patience 3 needs --eval-data", "add that, or leave it out"),
    "synchronised BatchNorm on a CPU": ("--sync-bn", "works on GPUs, this is cpu", "leave it out"),
    "no parts": ("--accumulate 0", "--accumulate 0: must be at least 1", ""),
    "no views": ("--views-per-visit 0", "--views-per-visit 0: must be at least 1", ""),
    "an average of more than all": ("--ema 1.5", "--ema 1.5: must be between 0 and 1", "0.999"),
    "no gradient": ("--clip-norm 0", "--clip-norm 0.0: must be > 0", ""),
    "a negative learning rate": ("--schedule 'linear(1, -1)'", "makes the learning rate negative", ""),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_refused(what: str, refused: Refused) -> None:
    flags, message, tip = MISTAKES[what]
    said = refused(flags)
    first, _, rest = said[said.index("softcache: error: ") :].partition("\n")  # after what is warned of
    assert re.search("error: .*" + message, first), said
    assert not tip or re.search("tip: .*" + tip, rest), said


def test_tensorboard_without_its_package(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    said = refused("--tensorboard")
    assert "--tensorboard needs the package tensorboard" in said
    assert "tip: pip install 'softcache[tensorboard]'" in said


@pytest.mark.parametrize(
    ("count", "batch_size", "ranks", "accumulate", "smallest"),
    [
        pytest.param(17, 16, 1, 1, 1, id="one is left"),
        pytest.param(18, 16, 1, 1, 2, id="two are left"),
        pytest.param(1, 16, 1, 1, 1, id="one in all"),
        pytest.param(32, 16, 1, 1, 16, id="none is left"),
        pytest.param(19, 16, 2, 1, 1, id="of three left one process has one"),
        pytest.param(17, 16, 2, 1, 0, id="a process has none"),
        pytest.param(32, 16, 1, 5, 3, id="pieces"),
        pytest.param(19, 16, 1, 3, 1, id="three are left for three pieces"),
        pytest.param(18, 16, 1, 3, 1, id="two are left for three pieces"),
        pytest.param(22, 16, 3, 2, 1, id="pieces of processes"),
    ],
)
def test_the_smallest_piece(count: int, batch_size: int, ranks: int, accumulate: int, smallest: int) -> None:
    assert smallest_piece(count, batch_size, Ranks(0, ranks), accumulate) == smallest
    pieces = []
    for first in range(0, count, batch_size):
        shares = Ranks(0, ranks).shares(min(batch_size, count - first))
        number = min(accumulate, *shares)
        pieces += [len(p) for share in shares for p in np.array_split(np.empty(share), max(1, number))]
    assert min(pieces) == smallest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "more", "tip"),
    [
        pytest.param("17", [], "such as 17", id="last"),
        pytest.param("35", ["--accumulate", "3"], "such as 18", id="pieces"),
        pytest.param("1", [], "more samples", id="one in all"),
    ],
)
def test_a_batchnorm_that_would_see_one_sample_is_refused_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, more: list[str], tip: str
) -> None:
    argv = [
        "train",
        "--data",
        f"digits?rows=0-{int(rows) - 1}",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--threads",
        "1",
    ]
    argv += ["--loss", "ce", "--device", "cpu", "--quiet"]
    out = ["--out", str(tmp_path / "run")]
    assert cli.main([*argv, *more, "--student", "softcache:vgg8", *out]) == 2
    said = capsys.readouterr().err
    assert f"error: of {rows} samples in batches of 16" in said
    assert "has a BatchNorm that needs two" in said
    assert said.rstrip().endswith(tip)
    assert not (tmp_path / "run").exists()
    # maps of several places have values enough, and views of a visit are further rows
    assert cli.main([*argv, *more, "--student", "softcache:resnet8x4", *out]) == 0


def test_a_last_batch_smaller_than_the_processes() -> None:
    with pytest.raises(ConfigError, match="the last of 65 samples in batches of 32 are 1, fewer than the 2") as caught:
        check_last_batch(65, 32, Ranks(0, 2))
    assert caught.value.tip.endswith("such as 33")
    with pytest.raises(ConfigError) as caught:
        check_last_batch(21, 4, Ranks(1, 2))  # batches of 5 have one left as well
    assert caught.value.tip.endswith("such as 6")
    with pytest.raises(ConfigError) as caught:
        check_last_batch(3, 2, Ranks(0, 4))
    assert caught.value.tip == "start fewer processes"
    check_last_batch(66, 32, Ranks(0, 2))
    check_last_batch(65, 32, Ranks())


def test_a_loss_that_is_no_number_names_the_samples_that_are_the_cause(tmp_path: Path) -> None:
    file = tmp_path / "floats.py"
    file.write_text(
        "import numpy as np\n"
        "def floats(bad: str = ''):\n"
        "    items = np.zeros((5, 2), np.float32)\n"
        "    items[3] = float(bad or 0)\n"
        "    return list(zip(items, [0, 1, 0, 1, 0]))\n"
    )
    for bad in ("nan", "inf"):
        with pytest.raises(TrainingError, match=r"epoch 2, step 7: 1 of 5 samples hold NaN.*floats/000003") as caught:
            check_finite(torch.tensor(float("nan")), 2, 7, open_transfer_set(f"{file}:floats?bad={bad}"))
        assert "--without FILE" in caught.value.tip
    for spec in (f"{file}:floats", "synthetic:texts?count=4", "synthetic:images?count=4"):
        with pytest.raises(TrainingError, match=r"epoch 2, step 7$|epoch 2, step 7\n") as caught:
            check_finite(torch.tensor(float("inf")), 2, 7, open_transfer_set(spec))
        assert "--lr" in caught.value.tip
    check_finite(torch.tensor(1.0), 2, 7, open_transfer_set(f"{file}:floats?bad=nan"))
