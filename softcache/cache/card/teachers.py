"""Of each member: how it is stored, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softcache.cache.card.phrases import CODECS, OUTPUTS, POSITIONS
from softcache.cache.card.text import code, escaped, listed, table, without_folders
from softcache.cache.manifest import Manifest
from softcache.cache.plan import CLASS_OUTPUTS, MemberInfo
from softcache.cache.schema import CRC_SUFFIX, OUTPUT_PREFIX
from softcache.cache.statistics import MemberStatistics

SHOWN_TEMPERATURES = ("1", "4")
SHOWN_NAMES = 20


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


def teachers(manifest: Manifest, left_out: Mapping[str, str]) -> str:
    """Tables of the members with classes and of the others, and a line on each.

    Args:
        left_out: member -> what it does not read of its texts, in words.
    """
    header = ["member", "model", "gives", "codec", "a logit is off by at most"]
    header += [f"KL at T={' / '.join(SHOWN_TEMPERATURES)}, mean", "largest class kept", "bytes a record"]
    of_classes = [member for member in manifest.plan.members if member.output in CLASS_OUTPUTS]
    kinds = {manifest.plan.index(one.index).kind if one.index else None for one in of_classes}
    kind = kinds.pop() if len(kinds) == 1 else None
    header += [f"top-1 on labelled {POSITIONS[kind][1] if kind else 'samples'}", "mean entropy"]
    rows = [_teacher_row(manifest, member) for member in of_classes]
    others = [_other_row(manifest, member) for member in manifest.plan.members if member.output not in CLASS_OUTPUTS]
    details = [_teacher_details(manifest, member, left_out.get(member.name)) for member in manifest.plan.members]
    if not rows:
        return f"## Teachers\n\n{_others(others)}\n\n{listed(details)}\n\n{OTHERS_TOLD}"
    beside = f"\n\n{_others(others)}" if others else ""
    told = f"\n\n{OTHERS_TOLD}" if others else ""
    return f"""## Teachers

{table(header, rows)}{beside}

{listed(details)}{told}

*A logit is off by at most*: the largest difference between a stored logit and the one the teacher gave, over all records.
*KL*: how far the stored soft target is from the teacher's own, in nats; 0 is no difference. *Largest class kept*: how often the
stored answer has the same first class as the teacher's. *Bytes a record*: of
{_one_record(manifest)} in one view, with its error bound and features. *Top-1* and *entropy* are
over all records here, that is over the samples as the views show them: not a test accuracy, since a teacher may have been
trained on these very samples."""


OTHERS_TOLD = """*A number is off by at most*: the largest difference between a stored number and the one the teacher gave, over
all records. *Relative error*: |stored - given| / |given| of a record, lengths as vectors, over the records that were measured."""


def _one_record(manifest: Manifest) -> str:
    """What a member answers about."""
    kinds = {one.index and manifest.plan.index(one.index).kind for one in manifest.plan.members}
    return " or ".join("one sample" if kind is None else f"one {POSITIONS[kind][0]}" for kind in sorted(kinds, key=str))


def _others(rows: Sequence[Sequence[str]]) -> str:
    header = ["member", "model", "gives", "numbers", "codec", "a number is off by at most"]
    return table([*header, "relative error, mean / worst", "bytes a record"], rows)


def _other_row(manifest: Manifest, member: MemberInfo) -> list[str]:
    """Of a member without classes."""
    own, (measured, _) = manifest.statistics[member.name], _measured(manifest, member.name)
    gives = OUTPUTS[member.output]
    if member.value_names:
        gives += f": {', '.join(map(escaped, member.value_names[:SHOWN_NAMES]))}"
    error = measured.error
    return [
        member.name,
        code(without_folders(member.model)),
        gives,
        f"{member.width or 0:,}",
        escaped(codec_text(member.codec)),
        "none" if member.codec is None else f"{own.max_eps:.3g}",
        "not measured"
        if error is None or not measured.measured
        else f"{error.sum / measured.measured:.2g} / {error.worst:.2g}",
        f"{record_bytes(manifest, member.name):,.1f}",
    ]


def _measured(manifest: Manifest, member: str) -> tuple[MemberStatistics, str]:
    """What was measured against the teacher itself, and a sentence that says on what."""
    own, before = manifest.statistics[member], manifest.plan.measured_before(member)
    if own.measured or before is None or not before.measured:
        found, where = own, "here"
    else:
        merged = len(manifest.plan.parents) > 1
        found, where = before, f"in the cache{'s' * merged} that this one was {'merged' if merged else 'taken out'} of"
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
        code(without_folders(member.model)),
        OUTPUTS[member.output],
        escaped(codec_text(member.codec)),
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
    how = "features alone" if codec is None else CODECS.get(codec["name"], escaped(codec["name"]))
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
        did = ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in sorted(member.input.items()))
        said.append(f"of its own beside the network: {did}")
    beside = {name for file in manifest.files_of("constants", member.name) for name in file.arrays}
    if f"{OUTPUT_PREFIX}mean" in beside:
        more = ", and what whitens them" if f"{OUTPUT_PREFIX}whitening" in beside else ""
        said.append(
            f"the mean and deviation of its numbers{more} stand beside the records, which they were not applied to"
        )
    said.append(f"computed in {escaped(member.compute_dtype)}")
    if member.class_order is not None:
        said.append("its classes were put into the order below")
    if left_out is not None:
        said.append(f"it did not read everything: {escaped(left_out)}")
    return "; ".join(said) + f". Fingerprint of its weights: {code(member.fingerprint)}"


def _promised(promise: Mapping[str, str]) -> str:
    if "max_relative_error" in promise:
        return f"its relative error is at most {promise['max_relative_error']}"
    return f"KL at T={promise['at_temperature']} is at most {promise['max_kl']} nats"


def features(manifest: Manifest) -> str:
    """A table of the features that are stored; empty where there are none."""
    rows = [
        [
            member.name,
            code(feature.name),
            escaped(feature.stored),
            escaped(feature.dtype),
            " + ".join(" x ".join(map(str, shape)) for shape in feature.shapes),
            f"{manifest.statistics[member.name].feature_errors.get(feature.name, 0.0):.2g}",
        ]
        for member in manifest.plan.members
        for feature in member.features
    ]
    header = ["member", "module and reduction", "stored as", "numbers", "output of the module", "worst relative error"]
    return f"## Features\n\n{table(header, rows)}" if rows else ""
