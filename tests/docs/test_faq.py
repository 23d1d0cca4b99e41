"""The errors of docs/FAQ.md are met as a user meets them: each command ends with exit code 2 and prints what the page says."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import softcache
from softcache.cli import main

pytestmark = pytest.mark.slow  # every worker that takes some of them makes the world anew

FAQ = Path(softcache.__file__).parent / "docs" / "FAQ.md"
USER_FILE = '''
"""Teachers and data that meet an error each."""

import torch
from torch import nn

from softcache.data.transfer_set import open_transfer_set


class Teacher(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(64, 10), change

    def forward(self, images):
        return self.change(self.layer(images.flatten(1)))


def teacher(kind: str):
    return Teacher({
        "nan": lambda logits: logits * torch.nan,
        "large": lambda logits: logits * 1e7,
        "random": lambda logits: logits + torch.randn_like(logits),
        "probs": lambda logits: logits.softmax(1),
        "batch": lambda logits: logits - logits.mean(0),
    }[kind])


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Relabelled:
    def __init__(self, whole):
        self.whole, self.sample_keys, self.class_names = whole, list(whole.keys), whole.class_names
        self.labels = [(int(label) + 1) % 10 for label in whole.labels]

    def __len__(self):
        return len(self.whole)

    def __getitem__(self, index):
        return self.whole[index][0], self.labels[index]


def relabelled():
    return Relabelled(open_transfer_set("digits?rows=0-59"))


class Normalised(Relabelled):
    def __getitem__(self, index):
        return (torch.from_numpy(self.whole[index][0])[None] / 255 - 0.1) / 0.2, self.labels[index]


def normalised():
    return Normalised(open_transfer_set("digits?rows=0-59"))


def several():
    made = Relabelled(open_transfer_set("digits?rows=0-59"))
    made.labels = [[int(label == c) for c in range(10)] for label in made.labels]
    return made
'''
VIEWS_FILE = """
from pathlib import Path


def darker():
    return lambda image: image.clamp(max=int(Path("most.txt").read_text()))
"""
DIGITS = "digits?rows=0-59"
NORMALISED = "user.py:normalised"
NOISY = "synthetic:images?size=8&channels=1&count=300&noise="
MLP = "softcache:mlp?hidden=8"
FOUR = "synthetic:images?size=8&channels=1&classes=4"


def dump(data: str, teacher: str, out: str, *more: str) -> list[str]:
    return ["dump", "--data", data, "--teacher", teacher, "--out", out, "--quiet", *more]


def train(data: str, out: str, *more: str, student: str = MLP) -> list[str]:
    return ["train", "--data", data, "--student", student, "--out", out, "--epochs", "1", "--quiet", *more]


@dataclass(frozen=True)
class Case:
    """What meets the error of one heading: commands that go well, and the last one that does not; NEW is a folder of its own."""

    heading: str
    commands: tuple[list[str], ...]


FROM_CACHE = ("--cache", "caches/a")
CASES = (
    Case("Samples are not in the cache", (train("digits?split=test", "NEW", *FROM_CACHE),)),
    Case("Labels differ", (train("user.py:relabelled", "NEW", *FROM_CACHE),)),
    Case("Contents differ", (train(f"{NOISY}10", "NEW", "--cache", "caches/noisy"),)),
    Case(
        "Another class list",
        (train("synthetic:images?size=8&channels=1&classes=11", "NEW", *FROM_CACHE),),
    ),
    Case("The cache names code", (train(DIGITS, "NEW", "--cache", "caches/views"),)),
    Case(
        "The cache says what it was made with",
        (["views", "caches/a", "--sample", "digits/000001", "--out", "NEW.png"],),
    ),
    Case("A link inside a cache", (["verify", "caches/linked"],)),
    Case("The run is of a factory", (["eval", "runs/coded", "--data", DIGITS],)),
    Case("Drift", (train(DIGITS, "NEW", "--cache", "caches/views", "--allow-code"),)),
    Case("Logits that are not finite", (dump(DIGITS, "user.py:teacher?kind=nan", "NEW"),)),
    Case("Too large for float16", (dump(DIGITS, "user.py:teacher?kind=large", "NEW"),)),
    Case("Two outputs for one batch", (dump(DIGITS, "user.py:teacher?kind=random", "NEW"),)),
    Case("Other logits in another batch", (dump(DIGITS, "user.py:teacher?kind=batch", "NEW"),)),
    Case("Normalised twice", (train(NORMALISED, "NEW", student="softcache:cnn"),)),
    Case("Probabilities", (dump(DIGITS, "user.py:teacher?kind=probs", "NEW"),)),
    Case("No weights", (dump(DIGITS, MLP, "NEW"),)),
    Case("Weights that do not fit", (train(FOUR, "NEW", student=f"{MLP}@runs/t"),)),
    Case("The teacher knows other classes", (dump(FOUR, "runs/t", "NEW"),)),
    Case(
        "It is not finished",
        (dump(f"{NOISY}40", "runs/t", "NEW", "--shard-rows", "256", "--part", "1/2"), ["inspect", "NEW"]),
    ),
    Case("It is not a cache", (["inspect", "runs/t"],)),
    Case("Another plan", (dump(DIGITS, "runs/t", "caches/a", "--codec", "int8"),)),
    Case("Somebody else is writing", (dump(DIGITS, "runs/t", "caches/locked"),)),
    Case("A file has another size", (train(DIGITS, "NEW", "--cache", "caches/cut"),)),
    Case("No labels", (train("tsv:texts.tsv?label=none&classes=a,b", "NEW", student="softcache:textcnn?width=4"),)),
    Case("Several labels per sample", (train("user.py:several", "NEW", "--loss", "tf_virtual"),)),
    Case("The run belongs to other settings", (train(DIGITS, "runs/t", "--lr", "0.5"),)),
    Case("The cache holds no such feature", (train(DIGITS, "NEW", *FROM_CACHE, "--loss", "hint"),)),
    Case(
        "The loss is not finite",
        (train(DIGITS, "NEW", "--optimizer", "sgd", "--lr", "1e30", "--batch-size", "8", "--schedule", "constant"),),
    ),
    Case("Images of other channels or sizes", (train(DIGITS, "NEW", student="torchvision:resnet18"),)),
    Case("The cache is newer than softcache", (["inspect", "caches/newer"],)),
)


def messages() -> dict[str, list[str]]:
    """Heading -> the messages below it, as the page has them."""
    sections = re.split(r"^### ", FAQ.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = re.compile(r"^```text\nsoftcache: error: (.+?)\n```$", re.MULTILINE)
    return {section.split("\n")[0]: found.findall(section) for section in sections}


def fits(message: str, printed: str) -> bool:
    """Whether a message as it was printed begins as the page says; words in capitals and numbers may be anything."""
    pattern = re.sub(r"\\?'?\b[A-Z][A-Z0-9_.]+\b\\?'?|\d[\d.,e+]*", "\0", message)
    pattern = ".+?".join(re.escape(piece) for piece in pattern.split("\0"))
    return re.match(pattern, printed) is not None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run, caches, and what is wrong with them."""
    folder, threads = tmp_path_factory.mktemp("faq"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("user.py").write_text(USER_FILE)
        Path("texts.tsv").write_text("one text\tx\nanother text\tx\n" * 10)
        Path("views.py").write_text(VIEWS_FILE)
        Path("most.txt").write_text("200")
        policy = ("--policy", "views.py:darker")
        for command in (
            train(DIGITS, "runs/t"),
            train(DIGITS, "runs/coded", student="user.py:net"),
            dump(DIGITS, "runs/t", "caches/a"),
            dump(f"{NOISY}40", "runs/t", "caches/noisy"),
            dump(DIGITS, "runs/t", "caches/cut"),
            dump(DIGITS, "runs/t", "caches/newer"),
            dump(DIGITS, "runs/t", "caches/locked"),
            dump(DIGITS, "runs/t", "caches/views", *policy),
        ):
            assert main(command) == 0
        Path("caches/linked").mkdir()
        for file in Path("caches/a").iterdir():
            Path("caches/linked", file.name).symlink_to(file.absolute())
        part = Path("caches/cut/members/t/part-00000.h5")
        part.write_bytes(part.read_bytes()[:-100])
        manifest = Path("caches/newer/manifest.json")
        manifest.write_text(manifest.read_text().replace('"format":1', '"format":3'))
        yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.heading.replace(" ", "-"))
def test_an_error_is_met_as_the_page_prints_it(
    case: Case, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    if case.heading == "Drift":  # the transform changes, as a library may
        Path("most.txt").write_text("90")
    number = CASES.index(case)
    commands = [[word.replace("NEW", f"new/{number}") for word in command] for command in case.commands]
    with open(world / "caches/locked/dump/part-1-of-1.lock") as lock:
        if case.heading == "Somebody else is writing":
            fcntl.flock(lock, fcntl.LOCK_EX)
        for command in commands[:-1]:
            assert main(command) == 0
        capsys.readouterr()
        assert main(commands[-1]) == 2
    printed = capsys.readouterr().err.partition("softcache: error: ")[2]
    told = messages()[case.heading]
    assert any(fits(message, printed) for message in told), f"{told}\n{printed}"
    assert "\n  tip: " in printed


def test_most_headings_are_met() -> None:
    told = {heading for heading, found in messages().items() if found}
    assert {case.heading for case in CASES} <= told
    assert told - {case.heading for case in CASES} == {
        "Out of memory",  # of a device
        "The disk is full",
        "No locks",  # of a file system
        "A package is missing",
        "A loader process died",  # of too little memory
    }


def test_a_message_that_is_not_the_page_s_does_not_fit() -> None:
    message = "DIR: has 4096 bytes, the manifest says 65536"
    assert fits(message, "caches/a/x.h5: has 12 bytes, the manifest says 1,300\n  tip: copy")
    assert not fits(message, "caches/a/x.h5: has 12 bytes, the card says 1,300")
    assert not fits(message, "softcache: caches/a")
