"""Who the samples are, and how the teachers saw them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softcache.cache.card.phrases import POSITIONS, STEPS
from softcache.cache.card.text import code, escaped, listed, without_folders
from softcache.cache.manifest import Manifest
from softcache.cache.plan import CLASS_OUTPUTS, Plan

SHOWN_CLASSES = 20


def transfer_set(manifest: Manifest) -> str:
    """Who the samples are, what labels they have, and how a data set finds them."""
    plan, samples = manifest.plan, manifest.plan.samples
    labels = _labels(manifest)
    names = [escaped(name) for name in plan.class_names[:SHOWN_CLASSES]]
    more = len(plan.class_names) - len(names)
    digested = "the bytes of its file" if samples.digest_kind == "file" else "its decoded item"
    return f"""## Transfer set

The samples themselves are not in here: bring your own copy of them.

{
        listed(
            [
                f"Source, as the teachers were given it: {code(without_folders(samples.source))}, {samples.count:,} samples",
                _of_tokens(manifest)
                if plan.vocabulary is not None
                else (
                    f"Classes, in the order of the logits ({len(plan.class_names):,}): {', '.join(names)}"
                    if names
                    else "Classes: none"
                )
                + (f", and {more:,} more (`class_names` in `manifest.json`)" if more else ""),
                f"Labels: {labels}",
                "Names of the samples: "
                + (
                    "stored; a data set finds its targets by them"
                    if samples.has_keys
                    else "not stored, only their 64-bit hashes, by which a data set that has the names finds its targets "
                    "(who guesses a name can confirm it)"
                ),
                f"Contents: a 16-byte digest of each sample, over {digested}, tells whether yours are the same",
                f"Fingerprint of names, labels and contents: {code(samples.fingerprint)}",
            ]
        )
    }"""


def _of_tokens(manifest: Manifest) -> str:
    """Which tokens the classes are, how texts became tokens, and how many of these have an answer."""
    plan = manifest.plan
    assert plan.vocabulary is not None
    rendered = ", ".join(f"{escaped(name)} {code(value)}" for name, value in sorted((plan.rendering or {}).items()))
    members = [member.name for member in plan.members if member.index == "tokens"]
    kept = manifest.statistics[members[0]].records // plan.views.count if members else 0
    return (
        f"Classes: {plan.vocabulary['count']:,} ids of the tokenizer in `tokenizer.json`\n"
        f"- Rendering of the texts: {rendered}\n"
        f"- Tokens that carry loss, each with an answer about it: {kept:,}"
    )


def _labels(manifest: Manifest) -> str:
    """What has a label; of words the statistics count words."""
    plan, samples = manifest.plan, manifest.plan.samples
    of_classes = [member for member in plan.members if member.output in CLASS_OUTPUTS]
    alone = [member.name for member in of_classes if member.index is None]
    labelled = manifest.statistics[alone[0]].labelled // plan.views.count if alone else 0
    indexes = [index for index in plan.indexes if index.labels]
    if samples.multi_label:
        return "several classes per sample"
    if indexes:
        return f"of the {' and '.join(POSITIONS[index.kind][1] for index in indexes)} of the samples"
    if not of_classes and plan.class_names:
        return "as the transfer set had them; no answer here is of a class"
    if not labelled:
        return "none: the samples are unlabelled"
    return f"of {'all' if labelled == samples.count else f'{labelled:,} of {samples.count:,}'} samples"


def views_of(plan: Plan) -> str:
    """How the teachers saw the samples."""
    views = plan.views
    if not views.steps:
        return "## Views\n\nEvery teacher saw each sample as it is."
    steps = [f"{STEPS.get(s['name'], 'another step')} ({code(_step_text(s))})" for s in views.steps]
    said = [f"{views.count:,} of each sample. In order: {'; '.join(steps)}."]
    if views.replay == "derived":
        said.append(
            "A view is not stored as pixels: its crop, angle and so on are computed from the sample's name, the number of the "
            f"view and the root seed {escaped(views.root_seed)}, so that a student is shown what the teacher saw, bit for bit."
        )
    else:
        said.append(
            "A view is not stored as pixels but rendered again, with all random generators seeded as they were. That takes the "
            "maker's own transform, which is not in here: ask for it. Another version of it may render other pixels."
        )
    if views.first:
        said.append(f"View 0 of this cache is rendered as view {views.first:,} of that policy, and so on.")
    said.append("A digest of the pixels of every view is stored, and checked in training.")
    return "## Views\n\n" + " ".join(said)


def _step_text(step: Mapping[str, Any]) -> str:
    parameters = step["parameters"]
    if step["name"] == "seeded":
        return without_folders(str(parameters.get("transform", "")))
    values = ",".join(f"{key}={value}" for key, value in sorted(parameters.items()))
    return f"{step['name']}:{values}" if values else str(step["name"])
