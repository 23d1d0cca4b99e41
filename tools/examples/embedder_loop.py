"""An embedder in a plain PyTorch loop: a teacher's vectors from a cache, learned without a label.

    softcache dump --data imagefolder:train --teacher 'timm:resnet50?weights=true&num_classes=0' --codec int8:group=64 \
        --policy to_rgb --policy resized_crop_flip:size=128 --views 4 --out caches/vectors
    python tools/examples/embedder_loop.py --cache caches/vectors --data train --eval-data val

`--data` and `--eval-data` are folders of images, one sub-folder per class: the classes are asked for at the end alone, to see
whose nearest neighbour is of its own. `--quick` makes pictures, a teacher and its cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import softcache
from softcache.losses import cosine, relational_kl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.small_data import make_small_data


class Embedder(nn.Module):
    """(B, width) of (B, H, W, 3) uint8 images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = nn.Linear(64, width)

    def forward(self, images: Tensor) -> Tensor:
        vectors: Tensor = self.last(self.body(images.permute(0, 3, 1, 2).float() / 255 - 0.5))
        return vectors


def nearest_is_of_its_class(vectors: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: whether the nearest other one, by cosine, has the same label."""
    rows = F.normalize(vectors, dim=1)
    similarity = rows @ rows.T
    return labels[similarity.fill_diagonal_(-2).argmax(dim=1)] == labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    needed = "--quick" not in sys.argv
    parser.add_argument("--cache", required=needed, help="folder that softcache dump wrote")
    parser.add_argument("--data", required=needed, help="folder of images to train on")
    parser.add_argument(
        "--eval-data", required=needed, help="folder of images to evaluate on, as large as the cache's views"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="on a few small images that it makes, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        make_small_data(arguments, head="none")
    torch.manual_seed(0)

    cache = softcache.open(arguments.cache)
    joined = cache.join(ImageFolder(arguments.data, transform=np.array))  # by file name; labels are not looked at
    (member,) = cache.members
    student = Embedder(cache.member(member).width or 0)
    mean, factor = cache.output_scale(member, "each")  # measured at the dump: numbers of unlike size count alike
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for epoch in range(arguments.epochs):
        joined.set_epoch(epoch)  # renders the view that the teacher saw
        student.train()
        for (images, _), records in DataLoader(joined, batch_size=32, shuffle=True):
            given = joined.gather(records).embedding()  # (B, D), of the same samples and views
            vectors = student(images)
            loss = cosine((vectors - mean) * factor, (given - mean) * factor) + 0.1 * relational_kl(vectors, given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: last loss {loss.item():.4f}")

    student.eval()
    first = joined.for_view(0)
    with torch.no_grad():
        alike = [
            F.cosine_similarity(student(images) - mean, first.gather(records).embedding() - mean)
            for (images, _), records in DataLoader(first, batch_size=256)
        ]
        pairs = [
            (student(images), labels)
            for images, labels in DataLoader(ImageFolder(arguments.eval_data, transform=np.array), batch_size=256)
        ]
    right = nearest_is_of_its_class(*(torch.cat(one) for one in zip(*pairs, strict=True)))
    print(f"accuracy of the nearest neighbour on {len(right)} samples: {right.float().mean():.4f}")
    print(f"agreement by cosine with the teacher on {len(joined)} training samples: {torch.cat(alike).mean():.4f}")


if __name__ == "__main__":
    main()
