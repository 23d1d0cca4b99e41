"""What a reader can do with a cache: one command, a loop, plain HDF5."""

from __future__ import annotations

from softcache.cache.card.front_matter import item_kind, quoted
from softcache.cache.card.teachers import codec_text
from softcache.cache.manifest import Manifest
from softcache.cache.plan import CLASS_OUTPUTS, Plan

LOSS_OF_OTHERS = {"embedding": "cosine", "values": "mse", "features": "hint"}


def suggested_loss(plan: Plan) -> str | None:
    """A loss that such a cache serves, as `--loss` takes it; None where `train` has no student: words without classes, tokens."""
    member = plan.members[0]
    if any(index.kind == "tokens" for index in plan.indexes):
        return None
    if member.index is not None:
        of_words = [one for one in plan.members if one.index is not None and one.output in CLASS_OUTPUTS]
        if not of_words:
            return None
        member = of_words[0]
    of_classes = f"kd_lower_bound:temperature={_partial_at(plan)}" if _is_partial(plan) else "kd:temperature=4"
    of_classes = "bce" if plan.samples.multi_label else of_classes
    return LOSS_OF_OTHERS.get(member.output or "features", of_classes)


def _is_partial(plan: Plan) -> bool:
    """Whether some member's codec keeps some classes only."""
    return any(codec_text(member.codec).startswith(("topk", "topset")) for member in plan.members)


def _partial_at(plan: Plan) -> int:
    """The temperature of what is suggested of some classes: of a vocabulary 1, since few of its classes hold little at others."""
    return 1 if any(codec_text(member.codec).startswith("topset") for member in plan.members) else 4


def how_to_use(manifest: Manifest) -> str:
    """Fetching, one command, a loop, and the files without softcache."""
    plan = manifest.plan
    suggested = suggested_loss(plan)
    own = "a training loop of your own, with a map-style data set that knows the names of its samples"
    if suggested is None:
        ways = "`softcache train` learns of words their classes alone, and here are none.\n"
        if item_kind(plan) == "tokens":
            ways = "`softcache train` has no student of tokens yet.\n"
        ways += f"In {own}:"
    else:
        command = f"softcache train --cache . --data DATA --student MODEL --loss {suggested} --out runs/student"
        ways = f"In one command, or in {own}:\n\n    {command}"
    return f"""## How to use it

Where this folder is on another machine, `URL` being its address there (`hf:ORG/NAME` on Hugging Face):

    softcache pull URL@{manifest.id[:16]} caches/here

or leave it there: `URL@{manifest.id[:16]}` stands for the folder, below too.

{ways}

```python
{_loop_over_positions(plan) if plan.members[0].index is not None else _loop(plan)}
```

Without softcache: the files are plain HDF5, for example `h5py.File("members/{plan.members[0].name}/part-00000.h5")`;
rows stand in the order of `samples.h5`. FORMAT.md, which comes with softcache, says what every byte means and how the
codecs decode."""


def _loop(plan: Plan) -> str:
    """A training loop over samples with an answer each."""
    mixed = bool(plan.views.steps) and plan.views.steps[-1]["name"] in ("mixup", "cutmix")
    items = {"images": "images", "texts": "texts"}.get(item_kind(plan) or "", "items")
    batch = f"({items}, labels), records" + (", partners, shares" if mixed else "")
    first = plan.members[0]
    if first.output not in CLASS_OUTPUTS:
        function = LOSS_OF_OTHERS[first.output or "features"]
        feature = quoted(first.features[0].name) if first.features else ""
        what = f'feature({feature}, "{first.name}")' if first.output is None else f'{first.output}("{first.name}")'
        read = f", features=[{feature}]" if first.output is None else ""
        asked, loss = f"answers = joined.gather(records{read}).{what}", f"{function}(student({items}), answers)"
    elif _is_partial(plan):
        function = ""
        asked = f'log_probs = joined.gather(records).log_probs("{plan.members[0].name}", 4.0)'
        loss = f'16 * kl_div(log_softmax(student({items}) / 4, 1), log_probs, reduction="batchmean", log_target=True)'
    else:
        asked = f"logits = joined.gather(records).{_combined(plan)}"
        function = "bce" if plan.samples.multi_label else "kd"
        loss = f"{function}(student({items}), logits, temperature=4)"
    lines = [*_imports(function), "", 'cache = softcache.open("path/to/this/folder")', "for epoch in range(20):"]
    lines += ["    joined = cache.join(data_set).for_view(epoch % cache.num_views)"]
    lines += [f"    for {batch} in DataLoader(joined, batch_size=128, shuffle=True):", f"        {asked}"]
    return "\n".join([*lines, f"        loss = {loss}"])


def _combined(plan: Plan) -> str:
    """The call that gives the logits of all members that answer each sample with classes."""
    names = [member.name for member in plan.members if member.output in CLASS_OUTPUTS and member.index is None]
    if len(names) == len(plan.members):
        return "logits()" if len(names) == 1 else "combined()"
    shares = ", ".join(f'"{name}": 1.0' for name in names)
    return f'logits("{names[0]}")' if len(names) == 1 else f"combined(weights={{{shares}}})"


def _loop_over_positions(plan: Plan) -> str:
    """A training loop over samples of unlike lengths, with an answer for each word, cell or frame."""
    of_classes = [one for one in plan.members if one.index is not None and one.output in CLASS_OUTPUTS]
    member = (of_classes or plan.members)[0]
    items = {"words": "sentences", "tokens": "tokens"}.get(item_kind(plan) or "", "items")
    read, what = "", f'flat("{member.name}")'
    if member.output is None and member.features:
        feature = quoted(member.features[0].name)
        read, what = f", features=[{feature}]", f'flat("{member.name}", {feature})'
    partial = member.output in CLASS_OUTPUTS and codec_text(member.codec).startswith(("topk", "topset"))
    function = "kd" if member.output in CLASS_OUTPUTS else LOSS_OF_OTHERS[member.output or "features"]
    # of many ids a higher temperature leaves little to the largest ones
    t = 1 if items == "tokens" else _partial_at(plan) if partial else 4
    loss = f"{function}(student_rows, targets.{what}{f', temperature={t}' if function == 'kd' else ''})"
    if partial:
        softened = "16 * kl_div(log_softmax(student_rows / 4, 1)" if t == 4 else "kl_div(log_softmax(student_rows, 1)"
        loss = f'{softened}, log_probs, reduction="batchmean", log_target=True)'
    lines = ["import torch", *_imports("" if partial else function), "", "def collate(samples):  # of unlike lengths"]
    lines += [f"    {items} = [item for (item, labels), record in samples]"]
    lines += [f"    return {items}, torch.tensor([record for _, record in samples])", ""]
    lines += ['cache = softcache.open("path/to/this/folder")', "for epoch in range(20):"]
    lines += ["    joined = cache.join(data_set).for_view(epoch % cache.num_views)"]
    lines += [f"    for {items}, records in DataLoader(joined, batch_size=16, shuffle=True, collate_fn=collate):"]
    lines += [f"        targets = joined.gather(records{read})"]
    if items == "tokens":
        lines += ["        listed = [torch.from_numpy(one.listed) for one in tokens]  # row i is for token i + 1"]
        lines += ["        logits = student([torch.from_numpy(one.ids) for one in tokens])  # padded behind: (B, L, C)"]
        lines += [
            "        student_rows = torch.cat([rows[at] for rows, at in zip(logits, listed)])  # (P, C), as the targets"
        ]
    else:
        lines += [
            f'        mask = targets.at("{member.name}").mask()  # (B, L): where a sample has something to answer'
        ]
        lines += [
            f"        student_rows = student({items})[mask]  # (B, L, C) -> (P, C): row by row, as the targets are"
        ]
    if partial:
        lines += [f'        log_probs = targets.per_position("{member.index}").log_probs("{member.name}", {t}.0)']
    return "\n".join([*lines, f"        loss = {loss}"])


def _imports(function: str) -> list[str]:
    """What a loop needs; `function` is the loss, "" where torch's own is used."""
    own = f"softcache.losses import {function}" if function else "torch.nn.functional import kl_div, log_softmax"
    return ["import softcache", f"from {own}", "from torch.utils.data import DataLoader"]
