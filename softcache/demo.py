"""softcache demo: the whole main job on scikit-learn's digits, with an honest table and a picture.

three convolutional teachers -> one dump -> small students, with and without the cache, over several seeds
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from softcache import dump, train
from softcache.config import DumpConfig, TrainConfig
from softcache.errors import require_extra
from softcache.files.durable import write_whole
from softcache.files.inside import refuse_linked_folders
from softcache.report.tables import table

TRAIN_DATA, TEST_DATA = "digits", "digits?split=test"
TEACHER = "softcache:cnn?width=32"
STUDENT = "softcache:mlp?hidden=64,64"
TEMPERATURES = (2, 4)
TEACHER_EPOCHS, STUDENT_EPOCHS = 20, 60


@dataclass(frozen=True)
class Arm:
    """One way to train the student, and its test errors in percent, one per seed."""

    name: str
    errors: list[float]


@dataclass(frozen=True)
class Demo:
    """A finished demo.

    Attributes:
        arms: hard labels first.
        teacher_errors: of the teachers, in percent of the test digits.
        teacher_parameters: of each.
        cache, nbytes: of the one dump.
        picture: of three digits and all students.
        seconds: that all of it took.
    """

    arms: Sequence[Arm]
    seeds: Sequence[int]
    teacher_errors: Sequence[float]
    teacher_parameters: int
    cache: Path
    nbytes: int
    picture: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "cache": str(self.cache), "picture": str(self.picture)}

    def text(self) -> str:
        """For people."""
        teachers = ", ".join(f"{error:.1f} %" for error in self.teacher_errors)
        parameters = f"{self.teacher_parameters:,} parameters each"
        lines = [
            f"teachers: {teachers} test error ({parameters}); one dump of {self.nbytes / 1e3:.0f} kB",
            "",
            table(
                ["student (64-64-10 MLP), test error in %", "mean", "s.d.", *(f"seed {s}" for s in self.seeds)],
                [
                    [a.name, f"{mean(a.errors):.2f}", f"{_spread(a.errors):.2f}", *(f"{e:.1f}" for e in a.errors)]
                    for a in self.arms
                ],
            ),
            "",
            *(f"{arm.name}: {_comparison(self.arms[0], arm)}" for arm in self.arms[1:]),
            "500 test digits: one more error is 0.2 %. The students at both temperatures learned from one and the same dump.",
            "",
            f"picture: {self.picture}",
            f"look:    softcache inspect {self.cache} --sample digits/000001",
            f"time:    {self.seconds:.0f} s",
        ]
        return "\n".join(lines)


def run(out: Path, *, seeds: Sequence[int], quiet: bool = False) -> Demo:
    """Run the demo in `out`; what is there already is reused."""
    require_extra("sklearn", "demo", "softcache demo")
    require_extra("matplotlib", "demo", "softcache demo's picture")
    started = time.monotonic()
    refuse_linked_folders(out, "demo")

    _say(f"1/3  training three teachers ({TEACHER}) on 1,297 digits", quiet)
    teachers = [_teacher(out, seed, quiet) for seed in range(3)]

    _say("2/3  running them once over the digits: softcache dump", quiet)
    cache = out / "cache"
    made = dump.run(
        DumpConfig(data=TRAIN_DATA, teacher=tuple(str(t.path) for t in teachers), out=str(cache)), quiet=quiet
    )
    assert made.manifest is not None

    _say(f"3/3  training students ({STUDENT}): hard labels, then the same cache at two temperatures", quiet)
    arms = [Arm("hard labels, no cache", [_student(out, "hard", seed, quiet) for seed in seeds])]
    for t in TEMPERATURES:
        loss = {"cache": str(cache), "loss": (f"kd:temperature={t}",), "combine": "mean_probs"}
        arms.append(Arm(f"from the cache, T={t}", [_student(out, f"kd-t{t}", seed, quiet, **loss) for seed in seeds]))

    picture = out / "demo.png"
    _draw(picture, cache, arms)
    return Demo(
        arms,
        seeds,
        [_error(teacher) for teacher in teachers],
        teachers[0].parameters,
        cache,
        made.manifest.nbytes,
        picture,
        time.monotonic() - started,
    )


def _teacher(out: Path, seed: int, quiet: bool) -> train.TrainResult:
    return train.run(
        TrainConfig(
            data=TRAIN_DATA,
            eval_data=TEST_DATA,
            student=TEACHER,
            out=str(out / f"runs/teacher-{seed}"),
            policy=("shift:pixels=1",),
            epochs=TEACHER_EPOCHS,
            batch_size=64,
            lr=3e-3,
            schedule="warmup(1, cosine)",
            seed=seed,
            threads=1,
        ),
        quiet=quiet,
    )


def _student(out: Path, name: str, seed: int, quiet: bool, **changes: Any) -> float:
    result = train.run(
        TrainConfig(
            data=TRAIN_DATA,
            eval_data=TEST_DATA,
            student=STUDENT,
            out=str(out / f"runs/student-{name}-{seed}"),
            epochs=STUDENT_EPOCHS,
            batch_size=64,
            lr=3e-3,
            seed=seed,
            threads=1,  # so small a network gains nothing from a second one
            **changes,
        ),
        quiet=quiet,
    )
    return _error(result)


def _error(result: train.TrainResult) -> float:
    """Test error in percent."""
    assert result.evaluation is not None
    assert result.evaluation.top1 is not None
    return 100 * (1 - result.evaluation.top1)


def _spread(errors: Sequence[float]) -> float:
    return stdev(errors) if len(errors) > 1 else 0.0


def _comparison(base: Arm, arm: Arm) -> str:
    """How many seeds gained, the ones without a gain included."""
    pairs = list(zip(base.errors, arm.errors, strict=True))
    better, worse = sum(b > a for b, a in pairs), sum(b < a for b, a in pairs)
    change = mean(arm.errors) - mean(base.errors)
    return f"{change:+.2f} points on average; better in {better} of {len(pairs)} seeds, worse in {worse}"


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _draw(path: Path, cache_path: Path, arms: Sequence[Arm]) -> None:
    """Left: what the cache knows beyond the labels, on the digits its teachers find hardest. Right: every student."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from softcache.data.transfer_set import open_transfer_set
    from softcache.targets.cache import open as open_cache

    cache, digits = open_cache(cache_path), open_transfer_set(TRAIN_DATA)
    joined = cache.join(digits)
    index = np.arange(len(digits))
    soft = joined.gather_samples(index, np.zeros_like(index)).combined("mean_probs").softmax(dim=1).numpy()
    hardest = np.argsort(soft[index, digits.labels])[:3]

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    left, right = panels
    left.suptitle("What a label does not say: three training digits and their soft targets (T=2)", fontsize=10)
    axes = left.subplots(3, 2, width_ratios=[1, 4])
    for (image, bars), i in zip(axes, hardest.tolist(), strict=True):
        image.imshow(digits.load(i)[0], cmap="gray_r", interpolation="nearest")
        image.set_title(f"label {digits.class_names[digits.labels[i]]}", fontsize=8)
        image.axis("off")
        tempered = np.sqrt(soft[i]) / np.sqrt(soft[i]).sum()
        bars.bar(range(10), tempered, color=["C1" if c == digits.labels[i] else "C0" for c in range(10)])
        bars.set(xticks=range(10), ylim=(0, 1), yticks=(0, 0.5, 1))
        bars.tick_params(labelsize=7)
    plot = right.subplots()
    for place, arm in enumerate(arms):
        plot.plot([place] * len(arm.errors), arm.errors, "o", color=f"C{place}", alpha=0.6)
        plot.plot([place - 0.2, place + 0.2], [mean(arm.errors)] * 2, color=f"C{place}", linewidth=2)
    plot.set_xticks(range(len(arms)), [arm.name.replace(", ", ",\n") for arm in arms], fontsize=8)
    plot.set(ylabel="test error in %", xlim=(-0.5, len(arms) - 0.5), ylim=(0, None))
    plot.set_title("Students: every seed, and the mean", fontsize=10)
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=110)
    write_whole(path, made.getvalue())
