"""Language models of a user's own factory: a module that takes token ids, and an engine that is a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Own(nn.Module):
    gives = "tokens"

    def __init__(self, net: nn.Module, fault: str) -> None:
        super().__init__()
        self.net, self.fault = net, fault

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.fault == "padded":  # it reads backwards, and so the padding first
            found: Tensor = self.net(input_ids=input_ids.flip(1)).logits.flip(1)
            return found
        logits: Tensor = self.net(input_ids=input_ids, attention_mask=attention_mask).logits
        if self.fault == "stale":  # of the text before it in the batch
            return logits + logits[:, :1].roll(1, 0).abs().mean() * (1 + len(input_ids))
        return logits


def read(folder: str) -> nn.Module:
    import transformers

    net: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return net


def module(folder: str, fault: str = "") -> nn.Module:
    return Own(read(folder), fault)


def engine(folder: str) -> Any:
    net = read(folder)

    def ask(texts: list[list[int]]) -> list[Any]:
        with torch.no_grad():
            return [net(input_ids=torch.tensor([ids])).logits[0].numpy()[:-1] for ids in texts]

    return ask
