"""README.md of a cache: what it is, what made it, how to check and use it. Filled from the manifest alone.

It is read by people who have never seen softcache, on pages that render Markdown. Class names, model strings and the like come
from outside, so each is escaped: none can end a table, hide text or bring HTML along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from softcache.cache.manifest import Manifest
from softcache.cache.plan import CLASS_OUTPUTS, MemberInfo, Plan
from softcache.cache.schema import CRC_SUFFIX, FORMAT_VERSION, OUTPUT_PREFIX
from softcache.cache.statistics import MemberStatistics

SHOWN_CLASSES, SHOWN_CHARACTERS = 20, 200
SHOWN_TEMPERATURES = ("1", "4")

CODECS = {
    "float32": "every logit as a 32-bit float, exactly as the teacher gave it",
    "float16": "every logit as a 16-bit float",
    "int8": "every logit in 8 bits, with a scale per record",
    "headtail": "the largest logits in 16 bits, all others in few bits with a scale per record",
    "lowrank": "coordinates in a basis over classes; records that this would not hold well enough are kept in 16 bits",
    "topk": "the largest logits only, and how much probability all other classes have together",
    "topset": "the largest logits only, in a byte each, and how much probability all other classes have together",
    "linear_head": "the input of the teacher's final linear layer, and that layer once",
}
STEPS = {
    "to_rgb": "three colour channels",
    "resize": "resized",
    "center_crop": "cut to the middle",
    "middle_crop": "cut to the middle and resized",
    "shift": "shifted at random",
    "crop_flip": "padded, cropped and mirrored at random",
    "resized_crop_flip": "a random part of the image, resized and mirrored at random",
    "rotate": "rotated at random",
    "color_jitter": "brightness, contrast, saturation and hue changed at random",
    "randaugment": "random operations on colours and shape",
    "erase": "a random box erased",
    "seeded": "a transform of the maker's own",
    "mixup": "blended with another sample",
    "cutmix": "a box of another sample pasted in",
}
LOSS_OF_OTHERS = {"embedding": "cosine", "values": "mse", "features": "hint"}
OUTPUTS = {
    "logits": "logits",
    "log_probs": "log-probabilities",
    "probs": "probabilities (stored as logarithms)",
    "embedding": "an embedding",
    "values": "named numbers",
    None: "features alone",
}


def codec_text(codec: Mapping[str, Any] | None) -> str:
    """`name:key=value,...` of a member's codec; "none" of a member of features alone."""
    if codec is None:
        return "none"
    parameters = ",".join(f"{key}={value}" for key, value in sorted(codec["parameters"].items()))
    return f"{codec['name']}:{parameters}" if parameters else str(codec["name"])


def record_bytes(manifest: Manifest, member: str) -> float:
    """Of one record of a member on average: its arrays and rows kept dense, without checksums."""
    files = [*manifest.files_of("member", member), *manifest.files_of("dense", member)]
    stored = sum(a.nbytes for f in files for name, a in f.arrays.items() if not name.endswith(CRC_SUFFIX))
    return stored / max(1, manifest.statistics[member].records)


def card(manifest: Manifest, left_out: Mapping[str, str] = MappingProxyType({})) -> str:
    """The card, in Markdown.

    Args:
        left_out: member -> what it does not read of its texts, in words.
    """
    sections = [
        _front_matter(manifest.plan.license),
        _what_it_is(manifest),
        _licence(manifest.plan.license),
        _teachers(manifest, left_out),
        _transfer_set(manifest),
        _views(manifest.plan),
        _features(manifest),
        _origin(manifest.plan),
        _how_to_check(manifest),
        _how_to_use(manifest.plan),
        _limits(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# --------------------------------------------------------------------------------------------------------- text from outside


def _plain(text: str) -> str:
    """One line of what can be seen: no control characters, no marks that turn the direction of writing; long texts are cut."""
    seen = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return seen if len(seen) <= SHOWN_CHARACTERS else seen[: SHOWN_CHARACTERS - 1] + "…"


def _escaped(text: str) -> str:
    """Text that shows as it is, in a sentence or in a cell of a table."""
    marked = re.sub(r"([\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", _plain(text))
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;")):
        marked = marked.replace(character, entity)
    return marked or "(empty)"


def _code(text: str) -> str:
    """The same in a fixed font, where nothing in it would end that."""
    shown = _plain(text)
    return f"`{shown}`" if shown and not re.search(r"[`|]", shown) else _escaped(text)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _listed(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _without_folders(spec: str) -> str:
    """`file.py:factory?arg=1` without the maker's folders."""
    head, _, query = spec.partition("?")
    kept = [pair for pair in query.split("&") if pair and not re.search(r"[/\\]", pair)]
    return re.split(r"[/\\]", head)[-1] + ("?" + "&".join(kept) if kept else "")


# ------------------------------------------------------------------------------------------------------------------ sections


def _front_matter(license: str | None) -> str:
    """What hubs read: their licence identifiers are lower case; any other text is `other`, and stands in the card."""
    if license is None:
        return ""
    known = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}", license) is not None
    quoted = json.dumps(license.lower() if known else "other")
    return f"---\nlicense: {quoted}\ntags:\n- knowledge-distillation\n- softcache\n---"


def _what_it_is(manifest: Manifest) -> str:
    plan, samples, views = manifest.plan, manifest.plan.samples, manifest.plan.views
    teachers = "a trained model" if len(plan.members) == 1 else f"{len(plan.members)} trained models"
    role = "teacher" if len(plan.members) == 1 else "teachers"
    seen = "once" if views.count == 1 else f"{views.count:,} times, each time under another augmentation"
    inner = ", and what some of their inner layers computed" if any(m.features for m in plan.members) else ""
    at_any = " and at any temperature" if any(m.output in CLASS_OUTPUTS for m in plan.members) else ""
    size = f"{manifest.nbytes / 1e6:,.1f} MB in {len(manifest.files)} files"
    about = [["id", f"`{manifest.id}`"], ["size", size], ["format version", str(plan.format)]]
    return f"""# Soft targets for {_code(_without_folders(samples.source))}

This folder is a *softcache* cache: the answers of {teachers} (the {role}) to {samples.count:,} samples, each seen {seen}; \
{_gives(plan)}{inner}. A smaller model (the student) can be trained to imitate these answers (knowledge
distillation), as often as wanted{at_any}, without having or running the {role}.

{_table(["", ""], about)}"""


def _gives(plan: Plan) -> str:
    """What the answers are, in words."""
    kinds = {"of classes" if member.output in CLASS_OUTPUTS else member.output for member in plan.members}
    words = {
        "of classes": "raw\nscores of all classes (logits)",
        "embedding": "vectors (embeddings)",
        "values": "named numbers (scores, measures)",
    }
    return ", ".join(text for kind, text in words.items() if kind in kinds) or "features alone"


def _licence(license: str | None) -> str:
    if license is None:
        said = (
            "Not stated: whoever made this cache did not say what others may do with it. Ask before you pass it on or publish "
            "what was trained from it."
        )
    else:
        said = f"{_escaped(license)}, as stated by whoever made this cache."
    return f"## Licence\n\n{said} The terms of the transfer set and of the teachers hold beside it."


def _teachers(manifest: Manifest, left_out: Mapping[str, str]) -> str:
    header = ["member", "model", "gives", "codec", "a logit is off by at most"]
    header += [f"KL at T={' / '.join(SHOWN_TEMPERATURES)}, mean", "largest class kept", "bytes a record"]
    header += ["top-1 on labelled samples", "mean entropy"]
    of_classes = [member for member in manifest.plan.members if member.output in CLASS_OUTPUTS]
    rows = [_teacher_row(manifest, member) for member in of_classes]
    others = [_other_row(manifest, member) for member in manifest.plan.members if member.output not in CLASS_OUTPUTS]
    details = [_teacher_details(manifest, member, left_out.get(member.name)) for member in manifest.plan.members]
    if not rows:
        return f"## Teachers\n\n{_others(others)}\n\n{_listed(details)}\n\n{OTHERS_TOLD}"
    beside = f"\n\n{_others(others)}" if others else ""
    told = f"\n\n{OTHERS_TOLD}" if others else ""
    return f"""## Teachers

{_table(header, rows)}{beside}

{_listed(details)}{told}

*A logit is off by at most*: the largest difference between a stored logit and the one the teacher gave, over all records.
*KL*: how far the stored soft target is from the teacher's own, in nats; 0 is no difference. *Largest class kept*: how often the
stored answer has the same first class as the teacher's. *Bytes a record*: of one sample in one view, with its error bound and
features. *Top-1* and *entropy* are over all records here, that is over the samples as the views show them: not a test accuracy,
since a teacher may have been trained on these very samples."""


OTHERS_TOLD = """*A number is off by at most*: the largest difference between a stored number and the one the teacher gave, over
all records. *Relative error*: |stored - given| / |given| of a record, lengths as vectors, over the records that were measured."""


def _others(rows: Sequence[Sequence[str]]) -> str:
    header = ["member", "model", "gives", "numbers", "codec", "a number is off by at most"]
    return _table([*header, "relative error, mean / worst", "bytes a record"], rows)


def _other_row(manifest: Manifest, member: MemberInfo) -> list[str]:
    """Of a member without classes."""
    own, (measured, _) = manifest.statistics[member.name], _measured(manifest, member.name)
    gives = OUTPUTS[member.output]
    if member.value_names:
        gives += f": {', '.join(map(_escaped, member.value_names[:SHOWN_CLASSES]))}"
    error = measured.error
    return [
        member.name,
        _code(_without_folders(member.model)),
        gives,
        f"{member.width or 0:,}",
        _escaped(codec_text(member.codec)),
        "none" if member.codec is None else f"{own.max_eps:.3g}",
        "not measured"
        if error is None or not measured.measured
        else f"{error.sum / measured.measured:.2g} / {error.worst:.2g}",
        f"{record_bytes(manifest, member.name):,.1f}",
    ]


def _measured(manifest: Manifest, member: str) -> tuple[MemberStatistics, str]:
    """What was measured against the teacher itself, and a sentence that says on what."""
    own, parent = manifest.statistics[member], manifest.plan.parent
    before = parent.statistics.get(member) if parent is not None else None
    if own.measured or before is None or not before.measured:
        found, where = own, "here"
    else:
        found, where = before, "in the cache that this one was taken out of"
    what = "KL" if manifest.plan.member(member).output in CLASS_OUTPUTS else "the relative error"
    if not found.measured:
        return found, f"{what} was not measured"
    return found, f"{what} was measured on {found.measured:,} of {found.records:,} records {where}"


def _teacher_row(manifest: Manifest, member: MemberInfo) -> list[str]:
    own, (measured, _) = manifest.statistics[member.name], _measured(manifest, member.name)
    bounded = all("eps" in file.arrays for file in manifest.files_of("member", member.name))
    kl = [f"{measured.mean_kl(t):.2g}" for t in SHOWN_TEMPERATURES if t in measured.kl]
    return [
        member.name,
        _code(_without_folders(member.model)),
        OUTPUTS[member.output],
        _escaped(codec_text(member.codec)),
        f"{own.max_eps:.3g}" if bounded else "none",
        f"{' / '.join(kl)} nats" if kl else "not measured",
        "not measured" if measured.agreement is None else f"{100 * measured.agreement:.2f} %",
        f"{record_bytes(manifest, member.name):,.1f}",
        _right(manifest, own),
        "not measured" if manifest.plan.samples.multi_label else f"{own.entropy:.4f} nats",  # it is of a softmax
    ]


def _right(manifest: Manifest, own: MemberStatistics) -> str:
    """How often the first class is the label's; several labels were not counted."""
    if own.accuracy is not None:
        return f"{100 * own.accuracy:.2f} %"
    return "several labels: not counted" if manifest.plan.samples.multi_label else "no labels"


def _teacher_details(manifest: Manifest, member: MemberInfo, left_out: str | None) -> str:
    own, codec = manifest.statistics[member.name], member.codec
    how = "features alone" if codec is None else CODECS.get(codec["name"], _escaped(codec["name"]))
    if member.output not in CLASS_OUTPUTS:
        how = (
            how.replace("every logit", "every number").replace("logits", "numbers").replace("over classes", "over them")
        )
    said = [f"**{member.name}** is stored as {how}"]
    if own.dense:
        said.append(f"{own.dense:,} of {own.records:,} records are kept in 16 bits")
    if codec is not None:
        said.append(_measured(manifest, member.name)[1])
    if member.promise is not None:
        said.append(f"promised and checked of every record while it was written: {_promised(member.promise)}")
    if member.input:
        did = ", ".join(f"{_escaped(name)} {_escaped(value)}" for name, value in sorted(member.input.items()))
        said.append(f"of its own beside the network: {did}")
    beside = {name for file in manifest.files_of("constants", member.name) for name in file.arrays}
    if f"{OUTPUT_PREFIX}mean" in beside:
        more = ", and what whitens them" if f"{OUTPUT_PREFIX}whitening" in beside else ""
        said.append(
            f"the mean and deviation of its numbers{more} stand beside the records, which they were not applied to"
        )
    said.append(f"computed in {_escaped(member.compute_dtype)}")
    if member.class_order is not None:
        said.append("its classes were put into the order below")
    if left_out is not None:
        said.append(f"it did not read everything: {_escaped(left_out)}")
    return "; ".join(said) + f". Fingerprint of its weights: {_code(member.fingerprint)}"


def _promised(promise: Mapping[str, str]) -> str:
    if "max_relative_error" in promise:
        return f"its relative error is at most {promise['max_relative_error']}"
    return f"KL at T={promise['at_temperature']} is at most {promise['max_kl']} nats"


def _transfer_set(manifest: Manifest) -> str:
    plan, samples = manifest.plan, manifest.plan.samples
    of_classes = [member.name for member in plan.members if member.output in CLASS_OUTPUTS]
    labelled = manifest.statistics[of_classes[0]].labelled // plan.views.count if of_classes else 0
    if samples.multi_label:
        labels = "several classes per sample"
    elif not of_classes and plan.class_names:
        labels = "as the transfer set had them; no answer here is of a class"
    elif not labelled:
        labels = "none: the samples are unlabelled"
    else:
        labels = f"of {'all' if labelled == samples.count else f'{labelled:,} of {samples.count:,}'} samples"
    names = [_escaped(name) for name in plan.class_names[:SHOWN_CLASSES]]
    more = len(plan.class_names) - len(names)
    digested = "the bytes of its file" if samples.digest_kind == "file" else "its decoded item"
    return f"""## Transfer set

The samples themselves are not in here: bring your own copy of them.

{
        _listed(
            [
                f"Source, as the teachers were given it: {_code(_without_folders(samples.source))}, {samples.count:,} samples",
                (
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
                f"Fingerprint of names, labels and contents: {_code(samples.fingerprint)}",
            ]
        )
    }"""


def _views(plan: Plan) -> str:
    views = plan.views
    if not views.steps:
        return "## Views\n\nEvery teacher saw each sample as it is."
    steps = [f"{STEPS.get(s['name'], 'another step')} ({_code(_step_text(s))})" for s in views.steps]
    said = [f"{views.count:,} of each sample. In order: {'; '.join(steps)}."]
    if views.replay == "derived":
        said.append(
            "A view is not stored as pixels: its crop, angle and so on are computed from the sample's name, the number of the "
            f"view and the root seed {_escaped(views.root_seed)}, so that a student is shown what the teacher saw, bit for bit."
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
        return _without_folders(str(parameters.get("transform", "")))
    values = ",".join(f"{key}={value}" for key, value in sorted(parameters.items()))
    return f"{step['name']}:{values}" if values else str(step["name"])


def _features(manifest: Manifest) -> str:
    rows = [
        [
            member.name,
            _code(feature.name),
            _escaped(feature.stored),
            _escaped(feature.dtype),
            " + ".join(" x ".join(map(str, shape)) for shape in feature.shapes),
            f"{manifest.statistics[member.name].feature_errors.get(feature.name, 0.0):.2g}",
        ]
        for member in manifest.plan.members
        for feature in member.features
    ]
    header = ["member", "module and reduction", "stored as", "numbers", "output of the module", "worst relative error"]
    return f"## Features\n\n{_table(header, rows)}" if rows else ""


def _origin(plan: Plan) -> str:
    made = plan.made_with
    versions = ", ".join(
        f"{name} {_escaped(str(made[name]))}"
        for name in ("softcache", "torch", "torchvision", "numpy", "pillow", "hdf5")
    )
    how = f"on {_escaped(made['device'])}, {made['batch_size']} samples a call, CPU threads: {made['threads']}"
    said = f"{versions}; {how}; autocast: {_escaped(made['autocast'])}."
    if len(plan.rounds) > 1:
        said += f" Extended {len(plan.rounds) - 1} times since (`rounds` in `manifest.json`)."
    if plan.parent is not None:
        said += f"\n\nTaken out of the larger cache `{plan.parent.id}`: its records, copied as they are stored there."
    return f"## What made it\n\n{said}"


def _how_to_check(manifest: Manifest) -> str:
    return f"""## How to check it

    softcache verify . --full

says whether every byte is what was written. Whether it is the cache you were promised, its id says: it is the sha256 of
`manifest.json` (`sha256sum manifest.json`), which {_binding(manifest.plan)}. Compare it with an id that you got by
another way than this folder; here it is `{manifest.id}`. This page is not covered by it."""


def _binding(plan: Plan) -> str:
    """How the id reaches the files."""
    if plan.format == FORMAT_VERSION:
        return "holds the sha256 of every other file"
    return """holds the sha256 of the lists `files-*.json`, and
these that of every other file and of the checksums in it. In use a file is known by the latter, and each block by its CRC-32:
that tells damage, and another file in its place; blocks that somebody *made* to have a wanted CRC-32 are told by `verify --full`
alone"""


def suggested_loss(plan: Plan) -> str | None:
    """A loss that such a cache serves, as `--loss` takes it; None of words without classes, which `train` does not learn."""
    member = plan.members[0]
    if member.index is not None:
        of_words = [one for one in plan.members if one.index is not None and one.output in CLASS_OUTPUTS]
        if not of_words:
            return None
        member = of_words[0]
    of_vocabulary = any(
        codec_text(one.codec).startswith("topset") for one in plan.members
    )  # softer, little is kept of one
    partial = f"kd_lower_bound:temperature={1 if of_vocabulary else 4}"
    of_classes = partial if _is_partial(plan) else "kd:temperature=4"
    of_classes = "bce" if plan.samples.multi_label else of_classes
    return LOSS_OF_OTHERS.get(member.output or "features", of_classes)


def _is_partial(plan: Plan) -> bool:
    """Whether some member's codec keeps some classes only."""
    return any(codec_text(member.codec).startswith(("topk", "topset")) for member in plan.members)


def _how_to_use(plan: Plan) -> str:
    names = [member.name for member in plan.members]
    partial, suggested = _is_partial(plan), suggested_loss(plan)
    own = "a training loop of your own, with a map-style data set that knows the names of its samples"
    if suggested is None:
        ways = f"`softcache train` learns of words their classes alone, and here are none.\nIn {own}:"
    else:
        command = f"softcache train --cache . --data DATA --student MODEL --loss {suggested} --out runs/student"
        ways = f"In one command, or in {own}:\n\n    {command}"
    return f"""## How to use it

{ways}

```python
{_loop(plan, partial=partial)}
```

Without softcache: the files are plain HDF5, for example `h5py.File("members/{names[0]}/part-00000.h5")`; rows stand in the
order of `samples.h5`. FORMAT.md, which comes with softcache, says what every byte means and how the codecs decode."""


def _loop(plan: Plan, *, partial: bool) -> str:
    """A training loop; `partial`: the codec keeps some classes only, so that there are no rows of logits."""
    mixed = bool(plan.views.steps) and plan.views.steps[-1]["name"] in ("mixup", "cutmix")
    batch = "(images, labels), records" + (", partners, shares" if mixed else "")
    first = plan.members[0]
    if first.output not in CLASS_OUTPUTS:
        function = LOSS_OF_OTHERS[first.output or "features"]
        feature = first.features[0].name if first.features else ""
        what = f'feature("{feature}", "{first.name}")' if first.output is None else f'{first.output}("{first.name}")'
        read = f', features=["{feature}"]' if first.output is None else ""
        asked, loss = f"answers = joined.gather(records{read}).{what}", f"{function}(student(images), answers)"
    elif partial:
        asked = f'log_probs = joined.gather(records).log_probs("{plan.members[0].name}", 4.0)'
        loss = '16 * kl_div(log_softmax(student(images) / 4, 1), log_probs, reduction="batchmean", log_target=True)'
    else:
        asked = f"logits = joined.gather(records).{'logits()' if len(plan.members) == 1 else 'combined()'}"
        function = "bce" if plan.samples.multi_label else "kd"
        loss = f"{function}(student(images), logits, temperature=4)"
    lines = ["import softcache"] if partial else ["import softcache", f"from softcache.losses import {function}"]
    lines += ["", 'cache = softcache.open("path/to/this/folder")', "for epoch in range(20):"]
    lines += ["    joined = cache.join(data_set).for_view(epoch % cache.num_views)"]
    lines += [f"    for {batch} in DataLoader(joined, batch_size=128, shuffle=True):", f"        {asked}"]
    return "\n".join([*lines, f"        loss = {loss}"])


def _limits() -> str:
    return """## Limits

- A target belongs to one sample in one view. A student that is shown other crops or colours, or other samples of the same
  names, learns answers to something else; softcache compares names, contents and pixels, another program should too.
- Scores of classes stand in the order of the classes above. A data set that numbers them otherwise needs them put in order.
- Labels are the transfer set's, copied and not checked. The teachers' mistakes and biases are in their answers."""
