"""Which networks can be made smaller by which method? Every method on every network, a table, and no traceback.

    python tools/smaller                               # the networks below whose packages are installed
    python tools/smaller --model timm:vit_tiny_patch16_224 --method lowrank:rank=0.25      # repeat either
    python tools/smaller --quick                       # two small ones

Each network has random weights and four classes, each method runs as `softcache shrink` on a few made-up samples, and what it
wrote is opened again. A cell is the share of the parameters that is left (of int8 and of unstructured pruning that of the
compressed bytes), or `refused:` with the message. Exit code 1 where anything was raised that is no message of softcache's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from importlib.util import find_spec
from pathlib import Path

import torch

from softcache.config import ShrinkConfig
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import SoftcacheError
from softcache.models import MODELS, Model, load_model, save_student
from softcache.students import cost, shrink

METHODS = (
    "carve:depth=0.5",
    "carve:width=0.5",
    "prune:structured,amount=0.5",
    "prune:structured,amount=0.5,importance=taylor",
    "prune:unstructured,amount=0.5",
    "lowrank:rank=0.25",
    "quantise:int8",
)
BYTES = ("prune:unstructured", "quantise")  # what leaves as many parameters is told by its bytes
TORCHVISION = (
    "resnet18",
    "mobilenet_v3_small",
    "squeezenet1_1",
    "shufflenet_v2_x1_0",
    "swin_t",
    "vit_b_16?image_size=32",
)
TIMM = (
    "resnet18",
    "mobilenetv3_small_050",
    "regnety_002",
    "vit_tiny_patch16_224?img_size=32",
    "swin_tiny_patch4_window7_224?img_size=56",
    "convnext_atto",
)
TRANSFORMERS = ("Bert", "Roberta", "DistilBert", "Electra", "GPT2", "Llama")  # small ones, made here
SIZES = {"swin_tiny": 56, "vit": 32}  # of images; the others see 64 x 64, ours 32 x 32
QUICK = ("softcache:mlp?hidden=32,32", "softcache:cnn?width=16")
NAMES = ("ant", "bee", "cat", "dog")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh")


def networks() -> list[str]:
    """All whose packages are here."""
    found = [f"softcache:{name}" for name in MODELS if name != "wrn"]  # whose depth and width are to be given
    found += [f"torchvision:{name}" for name in TORCHVISION]
    found += [f"timm:{name}" for name in TIMM] if find_spec("timm") else []
    found += [f"hf:{name}" for name in TRANSFORMERS] if find_spec("transformers") else []
    return found


def made(spec: str, folder: Path) -> tuple[Model, str]:
    """The network with random weights, and data that it takes."""
    torch.manual_seed(0)
    kind, _, name = spec.partition(":")
    if kind == "hf" or name.startswith(("textcnn", "encoder")):
        texts = folder / "texts.tsv"
        texts.write_text(
            "".join(f"{' '.join(WORDS[5 + (i + j) % 8] for j in range(6))}\t{NAMES[i % 4]}\n" for i in range(16))
        )
        data = f"tsv:{texts}"
        if kind == "hf":
            return load_model(f"hf:{_transformer(name, folder / 'hf')}", num_classes=4, class_names=NAMES), data
        return load_model(spec, num_classes=4, class_names=NAMES, vocabulary=WORDS), data
    size = next((size for part, size in SIZES.items() if name.startswith(part)), 32 if kind == "softcache" else 64)
    data = f"synthetic:images?classes=4&size={size}&channels=3&count=16"
    names = open_transfer_set(data).class_names
    return load_model(spec, num_classes=4, class_names=names, input_shape=(size, size, 3)), data


def _transformer(name: str, folder: Path) -> Path:
    """A classifier of four layers, saved with a tokenizer of single letters."""
    import transformers

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    if name == "DistilBert":
        sizes = {"dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64}
    if name == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 2}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(WORDS), max_position_embeddings=32, num_labels=4, pad_token_id=0, **sizes
    )
    getattr(transformers, f"{name}ForSequenceClassification")(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def one(spec: str, method: str, run: Path, data: str, out: Path) -> str:
    """A cell of the table."""
    config = ShrinkConfig(str(run), (method,), str(out), data=data, batch_size=4, threads=1, device="cpu")
    try:
        done = shrink.run(config, quiet=True)
        again = load_model(str(out), num_classes=4, class_names=NAMES, device="cpu")
        assert sum(p.numel() for p in again.parameters()) == done.after.parameters
    except SoftcacheError as exc:
        return f"refused: {exc.message.removeprefix(f'{run}: ').replace(str(run), spec)}"
    except Exception:
        return f"TRACEBACK: {traceback.format_exc().strip().splitlines()[-1]}"
    before, after = done.before, done.after
    if method.startswith(BYTES):
        return f"{after.compressed / before.compressed:.2f}"
    return f"{after.parameters / before.parameters:.2f}"


def row(spec: str, methods: list[str]) -> list[str]:
    """Of one network."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            model, data = made(spec, folder)
            (folder / "run").mkdir()
            model.untrained = ()
            save_student(model, folder / "run/student.safetensors", metadata={})
        except SoftcacheError as exc:
            return [f"not built: {exc.message}"] * len(methods)
        return [one(spec, method, folder / "run", data, folder / f"out{i}") for i, method in enumerate(methods)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a network; repeat (default: all)")
    parser.add_argument("--method", action="append", help="as of softcache shrink --by; repeat (default: all)")
    parser.add_argument("--quick", action="store_true", help="two small networks")
    given = parser.parse_args()
    cost.SECONDS, cost.RUNS = 0.0, 1  # how fast they are is not asked
    methods: list[str] = given.method or list(METHODS)
    print("| network | " + " | ".join(f"`{method}`" for method in methods) + " |")
    print("|---" * (len(methods) + 1) + "|")
    faults = 0
    for spec in given.model or (QUICK if given.quick else networks()):
        cells = row(spec, methods)
        faults += sum(cell.startswith("TRACEBACK") for cell in cells)
        print(f"| `{spec}` | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", flush=True)
    print(f"\n{faults} tracebacks", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
