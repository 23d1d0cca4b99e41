"""Metrics for TensorBoard, an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softcache.errors import MissingExtraError
from softcache.files.durable import make_folder
from softcache.train.run_folder import TENSORBOARD


class Board:
    """Where TensorBoard finds a run's metrics.

    Args:
        out: the run folder.
        epochs: how many are there already; what was written of later ones is taken back.
    """

    def __init__(self, out: Path, epochs: int) -> None:
        writer = summary_writer()
        make_folder(out / TENSORBOARD)  # each file in it has a name that was never there
        self._writer = writer(str(out / TENSORBOARD), purge_step=epochs)

    def note(self, row: dict[str, Any]) -> None:
        """The numbers of an epoch's row of metrics."""
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def summary_writer() -> Any:
    """TensorBoard's writer; MissingExtraError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError(
            "--tensorboard needs the package tensorboard", tip="pip install 'softcache[tensorboard]'"
        ) from None
    return SummaryWriter
