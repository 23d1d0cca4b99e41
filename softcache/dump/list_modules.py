"""What --features can name: the modules of every teacher, as a table."""

from __future__ import annotations

from softcache.config import StorageOptions
from softcache.data.loading import Partners, ViewedSet
from softcache.dump.choose_codec import Prober
from softcache.dump.job import new_job
from softcache.dump.open_teachers import open_teachers
from softcache.dump.row_batches import batch_tokens_of
from softcache.dump.samples import open_samples
from softcache.machine import pick_device
from softcache.report.tables import table


def list_modules(config: StorageOptions) -> str:
    """The modules of every teacher with their output shapes on one batch, as a table: what --features can name."""
    transfer_set, _ = open_samples(config)
    job = new_job(config, transfer_set)
    viewed = ViewedSet(transfer_set, job.policy, (), partners=Partners(transfer_set, job.order))
    prober = Prober(viewed, job.order, config.batch_size, batch_tokens=batch_tokens_of(config, transfer_set))
    texts = []
    for teacher in open_teachers(config, prober, transfer_set, pick_device(config.device)):
        modules = teacher.list_modules(prober.first_batch(teacher))
        rows = [
            [
                m.name,
                m.kind,
                " x ".join(map(str, m.shape[1:])) if m.shape else f"({m.gives})",
                "" if m.calls == 1 else m.calls,
            ]
            for m in modules
        ]
        texts.append(f"{teacher.name}\n" + table(["module", "type", "output of one sample", "calls, if not 1"], rows))
    return "\n\n".join(texts)
