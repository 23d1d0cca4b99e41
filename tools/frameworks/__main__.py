"""Do the loops of other packages bring each sample its own target, and are data sets that do not fit refused?

    pip install datasets lightning accelerate          # beside softcache, in an environment of their own
    python tools/frameworks                            # {plain loop, Lightning, Accelerate, Trainer, timm} x every data set
    python tools/frameworks --loop timm                # one of them; repeat
    python tools/frameworks --quick                    # the plain loop alone; without `datasets` on a data set of our own

Every loop trains for four epochs on a cache of two views, with loader workers that stay alive. Each batch's targets are compared
with what the teacher says about the very pixels in it, and each epoch's view with 0, 1, 0, 1. What a loop needs of its owner is
the line that is marked with ONE LINE. Exit code 1 where a target was another sample's, a view stood still, or nothing was
refused that should have been. What is not installed is told and left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import softcache
from softcache import dump
from softcache.config import DumpConfig
from softcache.errors import SoftcacheError
from softcache.losses import kd
from softcache.report.tables import table

COUNT, SIDE, EPOCHS, BATCH, WORKERS = 48, 6, 4, 12, 2
NAMES = ("ant", "bee", "cat", "dog")
WEIGHT = torch.from_numpy(np.random.default_rng(7).integers(-8, 9, (len(NAMES), SIDE * SIDE * 3)) / 1024).float()


# --- the world: data, a teacher that needs no training, a cache ------------------------------------------------------


def answers(images: Tensor) -> Tensor:
    """(B, 4) what the teacher says about (B, H, W, 3) uint8: exact in float32."""
    return images.flatten(1).float() @ WEIGHT.T


class Teacher(nn.Module):
    def collate(self, items: Any) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(item)) for item in items])

    def forward(self, images: Tensor) -> Tensor:
        return answers(images)


def teacher() -> Teacher:
    """As a factory for `softcache dump`."""
    return Teacher()


class Pictures:
    """The transfer set, as a factory for `softcache dump`."""

    def __init__(self) -> None:
        draw = np.random.default_rng(3)
        self.images = draw.integers(0, 256, (COUNT, SIDE, SIDE, 3)).astype(np.uint8)
        self.labels = draw.integers(0, len(NAMES), COUNT)
        self.sample_keys = [f"picture/{i}" for i in range(COUNT)]
        self.class_names: tuple[str, ...] = NAMES

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def make_cache(path: Path) -> softcache.Cache:
    config = DumpConfig(
        data=f"{__file__}:Pictures",
        teacher=(f"{__file__}:teacher",),
        policy=("shift:pixels=1",),
        views=2,
        codec="float32",
        out=str(path),
        threads=1,
    )
    dump.run(config, quiet=True)
    return softcache.open(path)


# --- what is handed to each loop -------------------------------------------------------------------------------------


def as_table(images: np.ndarray, labels: np.ndarray, names: tuple[str, ...] = NAMES, image: str = "image") -> Any:
    """A Hugging Face data set."""
    import datasets

    features = datasets.Features(
        {"key": datasets.Value("string"), image: datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    columns = {
        "key": Pictures().sample_keys,
        image: [Image.fromarray(one) for one in images],
        "label": [int(label) for label in labels],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def as_plain(images: np.ndarray, labels: np.ndarray, names: tuple[str, ...] = NAMES) -> Any:
    """The same as a data set of our own."""
    made = Pictures()
    made.images, made.labels, made.class_names = images, labels, names
    return made


def cases(make: Callable[..., Any]) -> dict[str, tuple[Any, dict[str, str], str]]:
    """Case -> (data set, how it is joined, the error that it must end with; "" where it must go well)."""
    right = Pictures()
    images, labels = right.images, right.labels
    keyed = {"key": "key"} if make is as_table else {}
    found: dict[str, tuple[Any, dict[str, str], str]] = {
        "right": (make(images, labels), keyed, ""),
        "labels shifted": (make(images, (labels + 1) % len(NAMES)), keyed, "LabelMismatchError"),
        "classes reversed": (make(images, labels, NAMES[::-1]), keyed, "ClassMismatchError"),
        "contents changed": (make(255 - images, labels), keyed, "ContentMismatchError"),
        "iterable": (iter([1]), keyed, "JoinError"),
    }
    if make is as_table:
        found["column named otherwise"] = (make(images, labels, image="img"), keyed | {"item": "img"}, "")
        found["column not named"] = (make(images, labels), {"key": "kee"}, "JoinError")
        found["iterable"] = (make(images, labels).to_iterable_dataset(), keyed, "JoinError")
    return found


# --- the loops -------------------------------------------------------------------------------------------------------


class Watch:
    """What a loop's batches were: every target against the teacher, and the views in the order of their epochs."""

    def __init__(self, joined: softcache.Joined) -> None:
        self.joined, self.wrong, self.seen = joined, 0, 0
        self.views: list[int] = []

    def step(self, student: nn.Module, images: Tensor, records: Tensor) -> Tensor:
        """The loss of one batch."""
        targets = self.joined.gather(records)
        logits = targets.logits()
        self.wrong += int((logits != answers(images)).any(dim=1).sum())
        self.views += sorted(set(targets.views.tolist()))
        self.seen += len(records)
        loss: Tensor = kd(student(images.float().flatten(1) / 255), logits, temperature=2.0)
        return loss

    def by_epoch(self) -> list[list[int]]:
        each = len(self.views) // EPOCHS
        return [sorted(set(self.views[i * each : (i + 1) * each])) for i in range(EPOCHS)]

    @property
    def verdict(self) -> str:
        views = self.by_epoch()
        if self.seen != COUNT * EPOCHS:
            return f"WRONG: {self.seen} samples of {COUNT * EPOCHS}"
        if self.wrong:
            return f"WRONG: {self.wrong} targets are not of the pixels beside them"
        return "right" if views == [[0], [1], [0], [1]] else f"WRONG: views {views}"


def student_of() -> nn.Module:
    return nn.Linear(SIDE * SIDE * 3, len(NAMES))


def loader_of(dataset: Any) -> DataLoader[Any]:
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)


def one_pass(watch: Watch, student: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for images, records in loader:
        loss = watch.step(student, images, records)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def plain_loop(joined: softcache.Joined) -> Watch:
    watch, student = Watch(joined), student_of()
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    loader = loader_of(joined.as_pair())
    for epoch in range(EPOCHS):
        joined.set_epoch(epoch)  # ONE LINE
        one_pass(watch, student, optimizer, loader)
    return watch


def lightning_loop(joined: softcache.Joined) -> Watch:
    import logging

    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    watch = Watch(joined)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = student_of()

        def on_train_epoch_start(self) -> None:
            joined.set_epoch(self.current_epoch)  # ONE LINE

        def training_step(self, batch: Any, _: int) -> Tensor:
            return watch.step(self.student, *batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, **quiet)
    trainer.fit(Module(), loader_of(joined.as_pair()))
    return watch


def accelerate_loop(joined: softcache.Joined) -> Watch:
    from accelerate import Accelerator

    watch, student = Watch(joined), student_of()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader_of(joined.as_pair()))
    for _ in range(EPOCHS):  # its loader calls set_epoch by itself
        for images, records in loader:
            loss = watch.step(student, images, records)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return watch


def trainer_loop(joined: softcache.Joined) -> Watch:
    from transformers import Trainer, TrainingArguments, default_data_collator

    watch = Watch(joined)

    class Distiller(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return watch.step(model, inputs[joined.item_column or "item"], inputs["record"])

    with tempfile.TemporaryDirectory(prefix="frameworks-") as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            dataloader_num_workers=WORKERS,
            dataloader_persistent_workers=True,
            remove_unused_columns=False,  # the model does not take the record: it is the loss's
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        data: Any = joined.as_dict()
        Distiller(student_of(), arguments, train_dataset=data, data_collator=default_data_collator).train()
    return watch


def timm_loop(joined: softcache.Joined) -> Watch:
    from timm.data import create_loader

    watch, student = Watch(joined), student_of()
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    dataset: Any = joined.as_pair()
    loader = create_loader(
        dataset,
        (3, SIDE, SIDE),
        BATCH,
        is_training=True,
        num_workers=WORKERS,
        persistent_workers=True,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )
    for epoch in range(EPOCHS):
        dataset.set_epoch(epoch)  # as timm's train.py does
        one_pass(watch, student, optimizer, loader)
    return watch


LOOPS: dict[str, tuple[Callable[[softcache.Joined], Watch], tuple[str, ...]]] = {
    "plain": (plain_loop, ()),
    "lightning": (lightning_loop, ("lightning",)),
    "accelerate": (accelerate_loop, ("accelerate",)),
    "trainer": (trainer_loop, ("transformers", "accelerate")),
    "timm": (timm_loop, ("timm",)),
}


def outcome(cache: softcache.Cache, loop: Callable[[softcache.Joined], Watch], data: Any, how: Any, error: str) -> str:
    """What came of one case: "right", "refused: ...", or a sentence that begins with WRONG."""
    try:
        joined = cache.join(data, **how)
        found = loop(joined).verdict
        return found if not error else f"WRONG: joined and trained ({found})"
    except SoftcacheError as exc:
        named = f"{type(exc).__name__}: {exc.message}"
        return f"refused: {named}" if type(exc).__name__ == error and exc.tip else f"WRONG: {named}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", action="append", choices=LOOPS, help="one of them; repeat")
    parser.add_argument("--quick", action="store_true", help="the plain loop alone, to see that it runs")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    make = as_table if find_spec("datasets") is not None else as_plain
    with tempfile.TemporaryDirectory(prefix="frameworks-") as folder:
        os.environ["SOFTCACHE_HOME"] = f"{folder}/home"
        cache = make_cache(Path(folder, "cache"))
        for name in arguments.loop or (["plain"] if arguments.quick else LOOPS):
            loop, needs = LOOPS[name]
            missing = [package for package in needs if find_spec(package) is None]
            if missing:
                rows.append([name, "-", f"left out: {', '.join(missing)} is not installed"])
                continue
            for case, (data, how, error) in cases(make).items():
                rows.append([name, case, outcome(cache, loop, data, how, error)])
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["loop", "data set", "came out"], [[one, two, three[:90]] for one, two, three in rows]))
    wrong = sum(row[2].startswith("WRONG") for row in rows)
    print(
        f"{len(rows)} cases, {wrong} wrong"
        + ("" if make is as_table else "; without `datasets`: on a data set of our own")
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
