"""A few small images in folders by class, or made-up sentences; a teacher, and its cache: for the examples' --quick."""

from __future__ import annotations

import argparse
import atexit
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from softcache import dump, train
from softcache.config import DumpConfig, TrainConfig

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


class Colours(nn.Module):
    """How much there is of each colour."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(3, 3)
        with torch.no_grad():
            self.fc.weight.copy_(20 * torch.eye(3).flip(0))
            self.fc.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.mean(images))
        return logits


def colours() -> Colours:
    """The teacher, as a factory for `softcache dump`."""
    return Colours()


def make_small_data(arguments: argparse.Namespace, head: str = "") -> None:
    """Set cache, data, eval_data and epochs to something small in a temporary folder.

    Args:
        head: "none" of a cache of what the teacher's last layer takes, instead of its logits.
    """
    scratch = tempfile.TemporaryDirectory(prefix="softcache-example-")
    atexit.register(scratch.cleanup)
    root, draw = Path(scratch.name), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(draw.normal(colour, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    made = DumpConfig(
        data=f"imagefolder:{root / 'train'}",
        teacher=(f"{__file__}:colours" + (f"?head={head}" if head else ""),),
        policy=("to_rgb", "resized_crop_flip:size=32,scale_min=0.5"),
        views=2,
        for_=() if head else ("kd", "hint"),
        out=str(root / "cache"),
        threads=1,
        workers=0,
    )
    dump.run(made, quiet=True)
    arguments.cache, arguments.epochs = str(root / "cache"), 2
    arguments.data, arguments.eval_data = str(root / "train"), str(root / "val")


def make_small_words(arguments: argparse.Namespace) -> None:
    """Set cache, data and epochs to something small in a temporary folder: sentences, and what a small tagger says of them."""
    scratch = tempfile.TemporaryDirectory(prefix="softcache-example-")
    atexit.register(scratch.cleanup)
    root, data = Path(scratch.name), "synthetic:words?count=96"
    student = "softcache:tagger?width=16&embedding=16&dropout=0"
    train.run(
        TrainConfig(
            data=data, student=student, epochs=15, batch_size=16, lr=1e-2, out=str(root / "run"), threads=1, workers=0
        ),
        quiet=True,
    )
    dump.run(
        DumpConfig(data=data, teacher=(str(root / "run"),), out=str(root / "cache"), threads=1, workers=0), quiet=True
    )
    arguments.cache, arguments.data, arguments.epochs = str(root / "cache"), data, 10
