"""Which networks can be made smaller by which method? Every method on every network, a table, and no traceback.

    python tools/smaller                               # the networks below whose packages are installed
    python tools/smaller --model timm:vit_tiny_patch16_224 --method lowrank:rank=0.25      # repeat either
    python tools/smaller --write                       # each row into SMALLER.md as soon as it is known
    python tools/smaller --quick                       # two small ones

Each network has random weights and four classes, each method runs as `softcache shrink` on a few made-up samples (`train`: as
`softcache train` for two steps), and what it wrote is opened again. A cell is the share of the parameters that is left (of int8
and of unstructured pruning that of the compressed bytes), or `refused:` with a few words, which --full gives as they are.
Exit code 1 where anything was raised that is no message of softcache's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
import zlib
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch

from softcache.config import ShrinkConfig, TrainConfig
from softcache.data.loading import ViewedSet
from softcache.data.transfer_set import open_transfer_set
from softcache.data.views import Policy
from softcache.errors import SoftcacheError
from softcache.models import Model, load_model, save_student
from softcache.students import cost, shrink
from softcache.students.carve import find_stacks
from softcache.students.samples import Samples
from softcache.train import flow

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "softcache/docs/SMALLER.md"
BEGIN, END = "<!-- python tools/smaller --write -->\n", "<!-- of the tool until here -->\n"
HALF = "carve:keep=HALF"  # the first half of all blocks, by their names
METHODS = (
    "carve:depth=0.5",
    HALF,
    "carve:width=0.5",
    "prune:structured,amount=0.5",
    "prune:unstructured,amount=0.5",
    "lowrank:rank=0.25",
    "quantise:int8",
    "train --prune unstructured:amount=0.5",
    "train --quantise int8",
)
BYTES = ("prune:unstructured", "quantise", "train")  # what leaves as many parameters is told by its bytes
OURS = (
    "mlp",
    "cnn",
    "resnet8",
    "resnet20",
    "resnet50",
    "resnet8x4",
    "wrn16_2",
    "vgg8",
    "mobilenetv2",
    "shufflenetv1",
    "shufflenetv2",
    "textcnn",
    "encoder",
)
TORCHVISION = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "squeezenet1_1",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "densenet121",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
    "vgg11_bn",
)
TIMM = (
    "resnet18",
    "mobilenetv3_small_050",
    "ghostnet_050",
    "regnety_002",
    "vit_tiny_patch16_224?img_size=32",
    "swin_tiny_patch4_window7_224?img_size=56",
    "convnext_atto",
    # small ones that timm has for its own tests, of further families
    "test_resnet",
    "test_byobnet",
    "test_efficientnet_gn",
    "test_efficientnet_ln",
    "test_mambaout",
    "test_nfnet",
    "test_vit3?img_size=32",
)
TRANSFORMERS = ("Bert", "Roberta", "DistilBert", "Electra", "GPT2", "Llama")  # small ones, made here
SIZES = {"swin": 56, "vit_b_16": 224}  # of images; the others see 32 x 32
QUICK = ("softcache:mlp?hidden=32,32", "softcache:cnn?width=16")
SAID = {  # what a message says -> in a few words
    "has no repeated blocks": "no blocks",
    "cuts nothing": "one block in each stack",
    "every block of the repeated stacks": "one block alone",
    "no channels that can be left out": "no channels that go one by one",
    "does not work without these blocks": "counts on its blocks",
    "does not work with fewer channels": "counts on its channels",
    "channels and would be given": "a stack begins with what the one before it gives",
    "saves nothing in any": "two layers would be larger",
    "has no linear layer and no convolution": "no layer of a kind that it knows",
    "that could be quantised": "no layer of a kind that it knows",
}
NAMES = ("ant", "bee", "cat", "dog")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh")


def networks() -> list[str]:
    """All whose packages are here."""
    found = [f"softcache:{name}" for name in OURS]
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
    size = next((size for part, size in SIZES.items() if name.startswith(part)), 32)
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


def first_half(model: Model, data: str) -> str:
    """The names of the first half of its blocks; of a network that has none the name of any module."""
    example = ViewedSet(open_transfer_set(data), Policy.parse((), 0), ()).render(0, 0)
    samples = Samples.of(model, model.spec, example, 1, lambda _i: example, 1)
    blocks = list(chain(*(stack.blocks for stack in find_stacks(model.net, samples))))
    return ",".join(blocks[: (len(blocks) + 1) // 2]) or next(name for name, _ in model.net.named_modules() if name)


def one(spec: str, method: str, run: Path, data: str, out: Path) -> str:
    """A cell of the table; of what is refused the whole message."""
    try:
        if method.startswith("train "):
            return _trained(method, run, data, out)
        config = ShrinkConfig(str(run), (method,), str(out), data=data, batch_size=4, threads=1, device="cpu")
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


def _trained(method: str, run: Path, data: str, out: Path) -> str:
    _, flag, value = method.split(" ", 2)
    flow.run(
        TrainConfig(
            student=str(run), out=str(out), data=data, epochs=1, batch_size=8, device="cpu", threads=1, workers=0,
            **{flag.removeprefix("--"): value},  # type: ignore[arg-type]
        ),
        quiet=True,
    )  # fmt: skip
    load_model(str(out), num_classes=4, class_names=NAMES, device="cpu")
    before, after = (
        len(zlib.compress((folder / "student.safetensors").read_bytes()[: 2**25], 1)) for folder in (run, out)
    )
    return f"{after / before:.2f}"


def row(spec: str, methods: list[str]) -> list[str]:
    """Of one network."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            model, data = made(spec, folder)
            half = f"carve:keep={first_half(model, data)}" if HALF in methods else ""
            (folder / "run").mkdir()
            model.untrained = ()
            save_student(model, folder / "run/student.safetensors", metadata={})
        except SoftcacheError as exc:
            return [f"not built: {exc.message}"] * len(methods)
        return [
            one(spec, half if method == HALF else method, folder / "run", data, folder / f"out{i}")
            for i, method in enumerate(methods)
        ]


def short(cell: str) -> str:
    """A cell with few words instead of a message, where they are known."""
    return next((f"refused: {words}" for message, words in SAID.items() if message in cell), cell)


def with_row(page: str, spec: str, line: str) -> str:
    """The page with the line of a network in the tool's table: in the place of its own, or at the end.

    Raises:
        ValueError: a page without the tool's two marks.
    """
    before, begin, rest = page.partition(BEGIN)
    told, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} needs the lines {BEGIN.strip()} and {END.strip()}")
    lines = told.splitlines()
    place = next((i for i, other in enumerate(lines) if other.startswith(f"| `{spec}` |")), len(lines))
    lines[place : place + 1] = [line]
    return before + begin + "".join(f"{one}\n" for one in lines) + end + after


def not_installed(_name: str, _package: str | None = None) -> None:
    """In the place of `find_spec`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a network; repeat (default: all)")
    parser.add_argument("--method", action="append", help="as of softcache shrink --by; repeat (default: all)")
    parser.add_argument("--full", action="store_true", help="messages as they are")
    parser.add_argument("--write", action="store_true", help="into the page too; of all methods")
    parser.add_argument("--quick", action="store_true", help="two small networks")
    given = parser.parse_args()
    if given.write and (given.method or given.full or given.quick):
        parser.error("--write takes neither --method nor --full nor --quick: the page has short rows of all methods")
    cost.SECONDS, cost.RUNS = 0.0, 1  # how fast they are is not asked, and int8 not timed in onnxruntime
    shrink.find_spec = not_installed  # type: ignore[assignment]
    methods: list[str] = given.method or list(METHODS)
    print("| network | " + " | ".join(f"`{method}`" for method in methods) + " |")
    print("|---" * (len(methods) + 1) + "|")
    faults = 0
    for spec in given.model or (QUICK if given.quick else networks()):
        began = time.process_time()
        cells = row(spec, methods)
        faults += sum(cell.startswith("TRACEBACK") for cell in cells)
        cells = [(cell if given.full else short(cell)).replace("|", "\\|") for cell in cells]
        line = f"| `{spec}` | " + " | ".join(cells) + " |"
        print(line, flush=True)
        print(f"{spec}: {time.process_time() - began:.0f} s of one core", file=sys.stderr)
        if given.write:
            PAGE.write_text(with_row(PAGE.read_text(encoding="utf-8"), spec, line), encoding="utf-8")
    print(f"\n{faults} tracebacks", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
