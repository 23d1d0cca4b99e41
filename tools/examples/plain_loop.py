"""softcache in a plain PyTorch loop: join, gather, decode, and the losses.

    softcache train --data digits --student softcache:cnn --loss ce --epochs 10 --out runs/teacher
    softcache dump --data digits --teacher runs/teacher --for kd,hint --out caches/digits
    python tools/examples/plain_loop.py --cache caches/digits

The data set is your own: map-style, (item, label), with the `sample_keys` of the cache, in any order. `--data FOLDER
--eval-data FOLDER` takes images, one sub-folder per class, in place of scikit-learn's digits. `--quick` makes a cache of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import softcache
from softcache.losses import ce, hint, kd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.small_data import make_small_data


class Digits(Dataset[Any]):
    """scikit-learn's 1,797 digits: those that the cache does not hold are left for the evaluation."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        self.images, self.labels = np.rint(found.images * (255 / 16)).astype(np.uint8), found.target
        self.sample_keys = [f"digits/{i:06d}" for i in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


class Student(nn.Module):
    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255 - 0.5  # (B, H, W) or (B, H, W, 3), uint8
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
        return self.fc(self.pool(self.conv2(self.conv1(x))))  # (B, C)


def open_data(cache: softcache.Cache, folder: str | None, eval_folder: str | None) -> tuple[Dataset[Any], Dataset[Any]]:
    """What to train on and what to evaluate on."""
    if folder is None or eval_folder is None:
        digits = Digits()
        rows = cache.find(digits.sample_keys)  # -1: not in the cache
        return Subset(digits, np.flatnonzero(rows >= 0).tolist()), Subset(digits, np.flatnonzero(rows < 0).tolist())
    from torchvision.datasets import ImageFolder  # softcache knows what its samples are called

    return ImageFolder(folder, transform=np.array), ImageFolder(eval_folder, transform=np.array)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required="--quick" not in sys.argv, help="folder that softcache dump wrote")
    parser.add_argument("--data", help="folder of images to train on (default: digits)")
    parser.add_argument("--eval-data", help="folder of images to evaluate on")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="on a few small images that it makes, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        make_small_data(arguments)
    torch.manual_seed(0)

    cache = softcache.open(arguments.cache)
    train_set, eval_set = open_data(cache, arguments.data, arguments.eval_data)
    joined = cache.join(train_set)  # by sample id; refuses samples, labels or classes that do not fit
    (feature,) = cache.features[cache.members[0]]  # what --for hint stored: a vector

    (images, _), record = joined[0]
    student = Student(cache.num_classes, channels=images.shape[2] if images.ndim == 3 else 1)
    teacher_width = joined.gather(torch.tensor([record]), features=[feature]).feature(feature).shape[1]
    adapter = nn.Linear(32, teacher_width)  # learns along, and is thrown away
    seen: dict[str, Tensor] = {}
    student.pool.register_forward_hook(lambda module, inputs, output: seen.update(pool=output))

    parameters = [*student.parameters(), *adapter.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for epoch in range(arguments.epochs):
        # the pixels of each view are those that the teacher saw
        viewed = joined.for_view(epoch % cache.num_views)
        student.train()
        for (images, labels), records in DataLoader(viewed, batch_size=64, shuffle=True):
            targets = viewed.gather(records, features=[feature])
            student_logits = student(images)
            loss = (
                0.9 * kd(student_logits, targets.logits(), temperature=4.0)
                + 0.1 * ce(student_logits, labels)
                + 0.5 * hint(adapter(seen["pool"]), targets.feature(feature))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: last loss {loss.item():.4f}")

    student.eval()
    with torch.no_grad():
        hits = [student(images).argmax(1) == labels for images, labels in DataLoader(eval_set, batch_size=256)]
        agreed = [
            student(images).argmax(1) == joined.gather(records).logits().argmax(1)
            for (images, _), records in DataLoader(joined, batch_size=256)
        ]
    print(f"accuracy on {len(torch.cat(hits))} samples: {torch.cat(hits).float().mean():.4f}")
    print(f"agreement with the teacher on {len(joined)} training samples: {torch.cat(agreed).float().mean():.4f}")


if __name__ == "__main__":
    main()
