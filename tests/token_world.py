"""Tiny language models with a tokenizer each, made here and never fetched; what they say is asked live, text by text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECES = ["the", " the", " cat", " dog", " sat", " on", " a", " mat", "in", "er", " r", "st"]
WIDE = {"vocab_size": 301}


def save_tokenizer(folder: Path, *, bos: bool = True, swap: bool = False, indent: int | None = None) -> Path:
    """Bytes, a dozen merges, <s> and </s>; three ids between them are holes. The path of its tokenizer.json.

    Args:
        bos: it puts <s> before each text by itself.
        swap: two tokens have one another's id.
        indent: how the JSON is laid out, which says nothing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: number for number, letter in enumerate(letters)}
    merges = []
    for piece in PIECES:
        word = piece.replace(" ", "Ġ")
        for end in range(2, len(word) + 1):
            if word[:end] not in ids:
                ids[word[:end]] = len(ids)
                merges.append((word[: end - 1], word[end - 1]))
    if swap:
        ids["x"], ids["y"] = ids["y"], ids["x"]
    ids |= {"<s>": len(ids) + 3, "</s>": len(ids) + 4}
    made = Tokenizer(models.BPE(vocab=ids, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])]))
    made.post_processor = processors.Sequence(steps)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(made.to_str()), ensure_ascii=False, indent=indent), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return path


CHATS = {
    "turns": "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}",
    "marked": "{% for m in messages %}<s>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '</s>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
    "forgetful": "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{% endfor %}",
}


def save_chat(folder: Path, template: str) -> Path:
    """A folder whose tokenizer has a chat template; as save_pretrained writes it."""
    from transformers import PreTrainedTokenizerFast

    path = save_tokenizer(folder)
    made = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def count_of(path: Path) -> int:
    """1 + the largest id."""
    from tokenizers import Tokenizer

    return 1 + max(Tokenizer.from_file(str(path)).get_vocab().values())


def save_model(folder: Path, kind: str = "gpt2", *, seed: int = 0, rows: int | None = None, **more: Any) -> Path:
    """A causal model with random weights beside a tokenizer, as save_pretrained writes it."""
    import transformers

    count = count_of(save_tokenizer(folder)) if rows is None else rows
    if rows is not None:
        save_tokenizer(folder)
    small = {"vocab_size": count, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    wide = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    own = {
        "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
        "llama": ("LlamaConfig", wide),
        "gemma2": ("Gemma2Config", {**wide, "final_logit_softcapping": 3.0, "sliding_window": 8}),
    }
    name, settings = own[kind]
    config = getattr(transformers, name)(**{**small, **settings, **more})
    torch.manual_seed(seed)
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else None
    net.save_pretrained(folder)
    return folder


def live(folder: Path, ids: list[int]) -> Tensor:
    """(L, H) float32 logits of one text alone."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = net(input_ids=torch.tensor([ids])).logits[0]
    return found


TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "in the rain er the dog sat on a cat",
    "",
    "x",
    "the dog sat. the cat ran on",
]


def write_texts(folder: Path) -> Path:
    """A folder of six short texts, one of them empty."""
    (folder / "deep").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        place = folder / "deep" if number % 2 else folder
        (place / f"t{number}.txt").write_text(text, encoding="utf-8")
    return folder
