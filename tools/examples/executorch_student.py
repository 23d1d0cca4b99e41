"""A student on a phone's runtime: a torch program that softcache exported, as a .pte file of ExecuTorch, run once.

    softcache export runs/int8 --to program --data 'digits?split=test' --out student.pt2
    python -m venv other && other/bin/pip install softcache executorch
    other/bin/python tools/examples/executorch_student.py student.pt2 student.pte

ExecuTorch wants versions of its own of many packages: give it an environment of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def convert(program_path: str, pte_path: str) -> float:
    """Write the .pte file, run it and the program on three random batches, and give back their largest difference."""
    from executorch.exir import to_edge  # type: ignore[import-not-found]
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    program = torch.export.load(program_path)
    Path(pte_path).write_bytes(to_edge(program).to_executorch().buffer)
    method = Runtime.get().load_program(pte_path).load_method("forward")
    (example,), _ = program.example_inputs
    module, largest = program.module(), 0.0
    for _ in range(3):
        batch = torch.randint(0, 256, example.shape).to(example.dtype)
        with torch.no_grad():
            difference = (torch.as_tensor(method.execute([batch])[0]) - module(batch)).abs().max()
        largest = max(largest, float(difference))
    return largest


if __name__ == "__main__":
    print(f"{sys.argv[2]}: largest difference of a logit {convert(*sys.argv[1:]):.3g}")
