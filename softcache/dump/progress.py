"""How far a dump is, on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator

from softcache.cache.write.writer import SpanTarget
from softcache.data.loading import LoadedBatch
from softcache.files.durable import free_bytes
from softcache.report.progress import Meter


class DumpProgress:
    """Meter on stderr: samples/s, MB/s, share of time spent waiting for data, ETA, GB left on the disk."""

    def __init__(self, writer: SpanTarget, total: int, *, quiet: bool) -> None:
        self._writer = writer
        self._shown = Meter(f"dump {writer.path}", total, unit="views", quiet=quiet)
        self._started, self._waited, self._noted = time.monotonic(), 0.0, 0.0

    def wait_for(self, loaded: Iterator[LoadedBatch]) -> LoadedBatch:
        begin = time.monotonic()
        batch = next(loaded)
        self._waited += time.monotonic() - begin
        return batch

    def count(self, records: int) -> None:
        now = time.monotonic()
        if self._shown.shown and now - self._noted > 0.5:
            self._noted = now
            left = free_bytes(self._writer.path) / 1e9
            self._shown.note(
                f"{self._writer.bytes_written / 1e6 / max(1e-9, now - self._started):.1f} MB/s, "
                f"waiting {100 * self.wait_share:.0f} %, {left:.0f} GB free"
            )
        self._shown.add(records)

    @property
    def wait_share(self) -> float:
        return self._waited / max(1e-9, time.monotonic() - self._started)

    @property
    def samples_per_s(self) -> float:
        return self._shown.done / max(1e-9, time.monotonic() - self._started)

    def close(self) -> None:
        self._shown.close()
