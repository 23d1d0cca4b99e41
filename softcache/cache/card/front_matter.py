"""The YAML at the top of the card, which hubs read: by it a cache is found, and shown.

Written by hand: every text is in double quotes, as JSON writes it, and holds no control character, so that none ends its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from softcache.cache.card.text import plain, without_folders
from softcache.cache.plan import CLASS_OUTPUTS, Plan

TAGS = ("softcache", "knowledge-distillation", "soft-targets")
IMAGE_STEPS = ("to_rgb", "resize", "center_crop", "middle_crop", "shift", "crop_flip", "resized_crop_flip", "rotate")
COLOUR_STEPS = ("color_jitter", "randaugment", "erase")
IMAGE_SOURCES = ("digits", "torchvision", "imagefolder", "images", "synthetic:images")
TEXT_SOURCES = ("table", "tsv", "synthetic:texts")
OF_CLASSES = {"images": "image-classification", "texts": "text-classification", "words": "text-classification"}
OF_POSITIONS = {"words": "token-classification", "tokens": "text-generation", "grid": "image-segmentation"}
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def front_matter(plan: Plan, languages: Sequence[str] = (), preview: str | None = None) -> str:
    """The lines between two `---`.

    Args:
        languages: of the samples, as ISO 639 calls them; a plan does not know it, and nothing is guessed.
        preview: path of the table of samples that lies beside the card. Without one a hub's viewer is told to show nothing:
            it would try to read HDF5.
    """
    tasks, size = task_categories(plan), size_category(plan.samples.count)
    lines = [f"pretty_name: {quoted(f'Soft targets for {without_folders(plan.samples.source)}')}"]
    lines += [f"license: {quoted(license_identifier(plan.license))}"]
    lines += _list("language", languages) + _list("task_categories", tasks) + _list("size_categories", [size])
    lines += _list("tags", TAGS)
    if preview is None:
        lines += ["viewer: false"]
    else:
        lines += ["configs:", '- config_name: "preview"', "  data_files:", '  - split: "preview"']
        lines += [f"    path: {quoted(preview)}"]
    return "\n".join(["---", *lines, "---"])


def quoted(text: str) -> str:
    """One line in double quotes, which YAML reads as JSON does."""
    return json.dumps(plain(text), ensure_ascii=False)


def _list(name: str, values: Sequence[str]) -> list[str]:
    return [f"{name}:", *(f"- {quoted(value)}" for value in values)] if values else []


def license_identifier(license: str | None) -> str:
    """As hubs know it, in lower case; `other` for any other text, which stands in the card, and `unknown` where nobody said."""
    if license is None:
        return "unknown"
    return license.lower() if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}", license) else "other"


def size_category(count: int) -> str:
    """Of so many samples."""
    return next((name for number, name in enumerate(SIZES) if count < 10 ** (number + 3)), "10B<n<100B")


def item_kind(plan: Plan) -> str | None:
    """ "images", "texts", "words" or "tokens", where the plan tells; else None."""
    for kind in ("words", "tokens"):
        if any(index.kind == kind for index in plan.indexes):
            return kind
    source = plan.samples.source.partition("?")[0]
    name = source if source.startswith("synthetic:") else source.partition(":")[0]
    if name in IMAGE_SOURCES or any(step["name"] in (*IMAGE_STEPS, *COLOUR_STEPS) for step in plan.views.steps):
        return "images"
    return "texts" if name in TEXT_SOURCES else None


def task_categories(plan: Plan) -> list[str]:
    """What students of this cache learn, in a hub's words; empty where the plan does not tell it."""
    kind, found = item_kind(plan), []
    for member in plan.members:
        if member.output in CLASS_OUTPUTS:
            of = None if member.index is None else plan.index(member.index).kind
            found.append(OF_CLASSES.get(kind or "") if of is None else OF_POSITIONS.get(of))
        elif member.output != "values":  # named numbers are many things
            found.append("image-feature-extraction" if kind == "images" else "feature-extraction")
    return list(dict.fromkeys(one for one in found if one is not None))
