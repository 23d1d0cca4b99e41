"""A student on a phone's runtime: a torch program that softcache exported, as a .pte file of ExecuTorch, run once.

    softcache export runs/int8 --to program --data 'digits?split=test' --out student.pt2
    python -m venv other && other/bin/pip install softcache executorch
    other/bin/python tools/examples/executorch_student.py student.pt2 student.pte

ExecuTorch wants versions of its own of many packages: give it an environment of its own.
"""

from __future__ import annotations

import argparse
import tempfile
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


def quick(folder: str) -> tuple[str, str]:
    """The two paths, of a small program of its own."""
    batch = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    class Small(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((2, 3))

    torch.export.save(torch.export.export(Small(), (batch,)), f"{folder}/small.pt2")
    return f"{folder}/small.pt2", f"{folder}/small.pte"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="the torch program, and the .pte file to write")
    parser.add_argument("--quick", action="store_true", help="a small program of its own, in a temporary folder")
    arguments = parser.parse_args()
    if len(arguments.paths) != (0 if arguments.quick else 2):
        parser.error("give two paths, or --quick")
    with tempfile.TemporaryDirectory() as folder:
        program, pte = quick(folder) if arguments.quick else arguments.paths
        print(f"{pte}: largest difference of a logit {convert(program, pte):.3g}")


if __name__ == "__main__":
    main()
