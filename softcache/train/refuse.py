"""What a run is refused for before its first step, as far as its settings tell; and a loss that is no number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softcache.config import TrainConfig
from softcache.config.unused import refuse_unused
from softcache.data.transfer_set import TransferSet
from softcache.errors import ConfigError, SoftcacheError, TrainingError, first_offenders
from softcache.machine import pick_device
from softcache.train.ranks import Ranks
from softcache.train.run_folder import RUN
from softcache.train.stages import parse_stages, unused_settings
from softcache.train.tensorboard import summary_writer


def check(config: TrainConfig) -> None:
    """Refuse numbers and combinations that cannot be, of the run and of each stage."""
    for name in ("batch_size", "accumulate", "views_per_visit", "eval_every"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    if config.more_epochs is not None and config.more_epochs < 1:
        raise ConfigError(f"--more-epochs {config.more_epochs}: must be at least 1")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"--seed {config.seed}: must be between 0 and 4294967295")
    if config.checkpoint_every is not None and config.checkpoint_every < 1:
        raise ConfigError(f"--checkpoint-every {config.checkpoint_every}: must be at least 1")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise ConfigError(f"--clip-norm {config.clip_norm}: must be > 0")
    if config.ema is not None and not 0 < config.ema < 1:
        raise ConfigError(f"--ema {config.ema}: must be between 0 and 1", tip="0.999 averages about a thousand steps")
    if config.cache is not None and config.policy:
        raise ConfigError(
            "--policy and --cache cannot be given together",
            tip="the student sees the cache's own views; leave --policy out",
        )
    if config.augment and config.size is not None:
        raise ConfigError("--size and --augment cannot be given together", tip="--augment sets its own size")
    if config.view is not None and config.views_per_visit > 1:
        raise ConfigError("--view and --views-per-visit cannot be given together")
    if config.tensorboard:
        summary_writer()
    if config.sync_bn and (device := pick_device(config.device)).type != "cuda":
        raise ConfigError(f"--sync-bn works on GPUs, this is {device.type}", tip="leave it out")
    stages = parse_stages(config)
    if not Path(config.out, RUN).is_file():  # what an older version began, it may go on with
        refuse_unused(unused_settings(config, stages))


def check_last_batch(count: int, batch_size: int, ranks: Ranks) -> None:
    """Each process must get at least one sample of the last batch."""
    last = count % batch_size or batch_size
    if last < ranks.size:
        better = larger_batch(count, batch_size, ranks, 1, least=1)
        raise ConfigError(
            f"the last of {count} samples in batches of {batch_size} are {last}, fewer than the {ranks.size} processes",
            tip=f"choose another --batch-size, such as {better}" if better else "start fewer processes",
        )


def smallest_piece(count: int, batch_size: int, ranks: Ranks, accumulate: int) -> int:
    """Samples of the smallest piece in which a process computes any batch of an epoch; 0 = some process gets none."""
    least = batch_size
    for batch in {min(batch_size, count), count % batch_size or batch_size}:
        shares = ranks.shares(batch)
        pieces = max(1, min(accumulate, *shares))
        least = min(least, *(share // pieces for share in shares))
    return least


def larger_batch(count: int, batch_size: int, ranks: Ranks, accumulate: int, *, least: int) -> int | None:
    """The next larger batch size, no piece of which has fewer samples than that; None: there is none."""
    sizes = range(batch_size + 1, count + 1)
    return next((size for size in sizes if smallest_piece(count, size, ranks, accumulate) >= least), None)


@contextmanager
def lone_sample_explained(config: TrainConfig, count: int, ranks: Ranks) -> Iterator[None]:
    """Around one sample as it is trained with: BatchNorm, which then has nothing to normalise over, becomes a ConfigError."""
    try:
        yield
    except (ValueError, SoftcacheError) as exc:
        if "more than 1 value per channel" not in str(exc):
            raise
        better = larger_batch(count, config.batch_size, ranks, config.accumulate, least=2)
        pieces = f" in {config.accumulate} pieces" if config.accumulate > 1 else ""
        processes = f" on {ranks.size} processes" if ranks.size > 1 else ""
        raise ConfigError(
            f"of {count} samples in batches of {config.batch_size}{pieces}{processes}, one is computed alone, and the student "
            "has a BatchNorm that needs two",
            tip=f"choose another --batch-size, such as {better}"
            if better
            else "use fewer pieces or processes, or more samples",
        ) from exc


def check_finite(loss: Tensor, epoch: int, step: int, transfer_set: TransferSet) -> None:
    """TrainingError, with the place, for a loss that has become infinite or no number; it names samples that are the cause."""
    if bool(loss.isfinite()):
        return
    what, odd = f"the loss is not finite in epoch {epoch}, step {step}", _not_finite(transfer_set)
    if odd:
        raise TrainingError(
            f"{what}: {len(odd)} of {len(transfer_set)} samples hold NaN or infinite numbers: {first_offenders(odd, len(odd))}",
            tip="mend them, or leave them out: their keys in a file, one a line, and --without FILE",
        )
    raise TrainingError(
        what, tip="lower --lr, add --clip-norm 1, warm up (--schedule 'warmup(5, cosine)'), or use bf16 instead of fp16"
    )


def _not_finite(transfer_set: TransferSet) -> list[str]:
    """The keys of samples that hold NaN or infinite numbers; pictures of whole numbers and texts are not looked through."""
    odd = []
    for row in range(len(transfer_set)):
        item = transfer_set[row][0]
        if not isinstance(item, np.ndarray | Tensor) or not (values := torch.as_tensor(item)).is_floating_point():
            break
        if not bool(values.isfinite().all()):
            odd.append(transfer_set.keys[row])
    return odd
