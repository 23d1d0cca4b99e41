"""README.md of a cache: what it is, what made it, how to check and use it. Filled from the manifest alone.

It is read by people who have never seen softcache, on pages that render Markdown. Class names, model strings and the like come
from outside, so each is escaped: none can end a table, hide text or bring HTML along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from softcache.cache.card.front_matter import front_matter
from softcache.cache.card.phrases import POSITIONS
from softcache.cache.card.samples import transfer_set, views_of
from softcache.cache.card.teachers import features, teachers
from softcache.cache.card.text import code, escaped, table, without_folders
from softcache.cache.card.use import how_to_use
from softcache.cache.manifest import Manifest
from softcache.cache.plan import CLASS_OUTPUTS, Plan
from softcache.cache.schema import FORMAT_VERSION


def card(
    manifest: Manifest,
    left_out: Mapping[str, str] = MappingProxyType({}),
    *,
    languages: Sequence[str] = (),
    preview: str | None = None,
    pictures: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The card, in Markdown.

    Args:
        left_out: member -> what it does not read of its texts, in words.
        languages: of the samples, as ISO 639 calls them; known to nobody but the user.
        preview: path of the table of samples beside the card.
        pictures: path -> what is to be said of it: pictures of samples beside the card.
    """
    sections = [
        front_matter(manifest.plan, languages, preview),
        _what_it_is(manifest),
        _licence(manifest.plan.license),
        teachers(manifest, left_out),
        transfer_set(manifest),
        _shown(preview, pictures),
        views_of(manifest.plan),
        features(manifest),
        _origin(manifest.plan),
        _how_to_check(manifest),
        how_to_use(manifest),
        _limits(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _shown(preview: str | None, pictures: Mapping[str, str]) -> str:
    """Of some samples: where the table of them is, and their pictures."""
    said = []
    if preview is not None:
        said.append(
            f"`{preview}`: a table of some samples and what the teachers answered, to look at; no student learns from it."
        )
    if pictures:
        said.append("The pictures are the transfer set's own, as it was given for this page: its terms hold for them.")
    said += [f"![{escaped(about)}]({path})\n{escaped(about)}" for path, about in pictures.items()]
    return "## Some samples\n\n" + "\n\n".join(said) if said else ""


def _what_it_is(manifest: Manifest) -> str:
    plan, samples, views = manifest.plan, manifest.plan.samples, manifest.plan.views
    teachers = "a trained model" if len(plan.members) == 1 else f"{len(plan.members)} trained models"
    role = "teacher" if len(plan.members) == 1 else "teachers"
    kinds = dict.fromkeys(POSITIONS[plan.index(m.index).kind][1] for m in plan.members if m.index is not None)
    of_each = f", with an answer for each of its {' and '.join(kinds)}" if kinds else ""
    seen = "once" if views.count == 1 else f"{views.count:,} times, each time under another augmentation"
    inner = ", and what some of their inner layers computed" if any(m.features for m in plan.members) else ""
    at_any = " and at any temperature" if any(m.output in CLASS_OUTPUTS for m in plan.members) else ""
    size = f"{manifest.nbytes / 1e6:,.1f} MB in {len(manifest.files)} files"
    about = [["id", f"`{manifest.id}`"], ["size", size], ["format version", str(plan.format)]]
    return f"""# Soft targets for {code(without_folders(samples.source))}

This folder is a *softcache* cache: the answers of {teachers} (the {role}) to {samples.count:,} samples,
each seen {seen}{of_each}; {_gives(plan)}{inner}. A smaller model (the student) can be trained to imitate these answers (knowledge
distillation), as often as wanted{at_any}, without having or running the {role}.

{table(["", ""], about)}"""


def _gives(plan: Plan) -> str:
    """What the answers are, in words."""
    kinds = {"of classes" if member.output in CLASS_OUTPUTS else member.output for member in plan.members}
    words = {
        "of classes": "raw scores of all classes (logits)",
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
        said = f"{escaped(license)}, as stated by whoever made this cache."
    return f"## Licence\n\n{said} The terms of the transfer set and of the teachers hold beside it."


def _origin(plan: Plan) -> str:
    made = plan.made_with
    versions = ", ".join(
        f"{name} {escaped(str(made[name]))}"
        for name in ("softcache", "torch", "torchvision", "numpy", "pillow", "hdf5")
    )
    how = f"on {escaped(made['device'])}, {made['batch_size']} samples a call, CPU threads: {made['threads']}"
    said = f"{versions}; {how}; autocast: {escaped(made['autocast'])}."
    if len(plan.rounds) > 1:
        said += f" Extended {len(plan.rounds) - 1} times since (`rounds` in `manifest.json`)."
    ids = ", ".join(f"`{one.id}`" for one in plan.parents)
    if plan.parents and len(plan.rounds) > 1:
        said += (
            f"\n\nSome of its records, copied as they are stored there, are of {ids}; the others were added to them."
        )
    elif plan.parent is not None:
        said += f"\n\nTaken out of the larger cache {ids}: its records, copied as they are stored there."
    elif plan.parents:
        said += f"\n\nMerged of the caches {ids}: their records, as they are stored there."
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


def _limits() -> str:
    return """## Limits

- A target belongs to one sample in one view. A student that is shown other crops or colours, or other samples of the same
  names, learns answers to something else; softcache compares names, contents and pixels, another program should too.
- Scores of classes stand in the order of the classes above. A data set that numbers them otherwise needs them put in order.
- Labels are the transfer set's, copied and not checked. The teachers' mistakes and biases are in their answers."""
