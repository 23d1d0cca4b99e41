"""README.md of a cache: what it is, what made it, how to check and use it. Filled from the manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softcache.cache.manifest import Manifest
from softcache.cache.statistics import MemberStatistics


def codec_text(codec: Mapping[str, Any]) -> str:
    """`name:key=value,...` of a member's codec."""
    parameters = ",".join(f"{key}={value}" for key, value in sorted(codec["parameters"].items()))
    return f"{codec['name']}:{parameters}" if parameters else str(codec["name"])


def _divergences(s: MemberStatistics) -> str:
    shown = [f"{s.mean_kl(t):.2g}" for t in ("1", "4") if t in s.kl]
    return f"{' / '.join(shown)} nats" if shown else "not measured"


def card(manifest: Manifest) -> str:
    """The card, in Markdown."""
    plan, samples, views = manifest.plan, manifest.plan.samples, manifest.plan.views
    steps = " | ".join(f"{s['name']}({', '.join(f'{k}={v}' for k, v in s['parameters'].items())})" for s in views.steps)
    names = list(plan.class_names)
    classes = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
    rows = [
        "| member | model | output | codec | worst error of a logit | KL to the teacher at T=1 / 4, mean | top-1 on labelled "
        "samples | mean entropy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for member in plan.members:
        s = manifest.statistics[member.name]
        accuracy = "no labels" if s.accuracy is None else f"{100 * s.accuracy:.2f} %"
        bounded = all("eps" in file.arrays for file in manifest.files_of("member", member.name))
        error = f"{s.max_eps:.3g}" if bounded else "none"
        rows.append(
            f"| {member.name} | `{member.model}` | {member.output} | {codec_text(member.codec)} | {error} "
            f"| {_divergences(s)} | {accuracy} | {s.entropy:.4f} nats |"
        )
    made = ", ".join(f"{key} {value}" for key, value in sorted(plan.made_with.items()) if value is not None)
    fingerprints = "\n".join(f"- {m.name}: `{m.fingerprint}`" for m in plan.members)
    return f"""# A softcache cache

Logits of {len(plan.members)} teacher(s) over {samples.count:,} samples x {views.count} view(s), {manifest.nbytes / 1e6:,.1f} MB.
Students of any kind can be trained from it at any temperature, without the teachers.

id: `{manifest.id}`

## What is in it

- Transfer set: `{samples.source}`, fingerprint `{samples.fingerprint}` (contents digested by {samples.digest_kind})
- Classes: {classes}
- Views: {views.count} of {steps or "the items as they are"} (root seed {views.root_seed}, replay {views.replay})

{chr(10).join(rows)}

Accuracy and entropy are over all records, that is over the views as rendered.

## What made it

{made}. Fingerprints of the teachers' weights:

{fingerprints}

## How to check it and use it

    softcache verify . --full
    softcache inspect .
    softcache train --cache . --data ... --student ... --loss kd:temperature=4 --out runs/student

The files are plain HDF5 (1.10 and later): `h5py` opens them. Format version {plan.format}.
"""
