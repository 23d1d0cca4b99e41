"""softcache with timm: its models, data sets, loaders, optimiser and schedule; the teacher's targets from the cache.

    softcache dump --data imagefolder:DATA/train --teacher torchvision:resnet50@IMAGENET1K_V2 \\
                   --policy to_rgb --policy resized_crop_flip:size=224 --views 8 --out caches/views
    python tools/examples/timm_loop.py --cache caches/views --data DATA/train --eval-data DATA/val --model resnet18

The student sees the cache's own views: timm's random transforms are not used for training, since the teacher did not see
what they would make. Its normalisation, which is the same for all views, is. `--quick` makes images and a cache of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TIMM_DATASET_MAX_RETRIES", "1")  # an image that cannot be read must not become its neighbour

import numpy as np
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.utils.data import Dataset

import softcache
from softcache.losses import ce, kd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.small_data import make_small_data


class Records(Dataset[Any]):
    """(image, record) for timm's loader: the record takes the target's place and brings logits and label out of the cache."""

    def __init__(self, joined: softcache.Joined) -> None:
        self.joined = joined

    def __len__(self) -> int:
        return len(self.joined)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        (image, _), record = self.joined[index]
        return np.asarray(image).transpose(2, 0, 1), record  # (3, H, W) uint8: a view as the teacher saw it


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    meter = AverageMeter()
    for images, labels in loader:
        meter.update(accuracy(model(images), labels)[0].item(), len(labels))
    return float(meter.avg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    needed = "--quick" not in sys.argv
    parser.add_argument("--cache", required=needed, help="folder that softcache dump wrote")
    parser.add_argument("--data", required=needed, help="folder of images to train on, one sub-folder per class")
    parser.add_argument("--eval-data", required=needed, help="folder of images to evaluate on")
    parser.add_argument("--model", default="resnet18", help="student: any classification model of timm")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="on a few small images that it makes, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.model, arguments.batch_size = "test_resnet", 8
        make_small_data(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    cache = softcache.open(arguments.cache)
    classes = {name: index for index, name in enumerate(cache.class_names)}  # timm's own order may be another one
    train_set = create_dataset("", root=arguments.data, class_map=classes)
    eval_set = create_dataset("", root=arguments.eval_data, class_map=classes)
    joined = cache.join(train_set, keys=train_set.filenames())  # relative paths, as `imagefolder:` has them

    model = timm.create_model(arguments.model, num_classes=cache.num_classes).to(device)
    data = resolve_model_data_config(model)
    size = Records(joined)[0][0].shape  # (3, H, W)
    loading: dict[str, Any] = {
        "input_size": size,
        "mean": data["mean"],
        "std": data["std"],
        "num_workers": arguments.workers,
        "device": device,
    }
    eval_loader = create_loader(eval_set, batch_size=256, **loading)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=arguments.lr, weight_decay=0.01)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=arguments.epochs, warmup_epochs=1, warmup_lr=1e-5)

    for epoch in range(epochs):
        viewed = joined.for_view(epoch % cache.num_views)
        views: Any = Records(viewed)
        loader = create_loader(views, batch_size=arguments.batch_size, is_training=True, **loading)
        model.train()
        losses, agreement = AverageMeter(), AverageMeter()
        for images, records in loader:
            targets = viewed.gather(records).to(device)
            student_logits: Tensor = model(images)
            teacher_logits, labels = targets.logits(), targets.labels.to(device)
            loss = 0.9 * kd(student_logits, teacher_logits, temperature=4.0) + 0.1 * ce(student_logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(images))
            agreement.update(accuracy(student_logits, teacher_logits.argmax(1))[0].item(), len(images))
        scheduler.step(epoch + 1)
        print(f"epoch {epoch}: loss {losses.avg:.4f}, agreement with the teacher {agreement.avg:.2f} %", flush=True)

    print(f"accuracy on {len(eval_set)} samples: {evaluate(model, eval_loader):.2f} %")


if __name__ == "__main__":
    main()
