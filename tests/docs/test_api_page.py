"""docs/API.md is what the tool makes of the source, has every public name, and says of each what the reader needs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import softcache
from softcache import config, dump, errors, losses, targets, train
from softcache.spec import load_user_file

TOOL = Path(__file__).parents[2] / "tools" / "docs" / "make_api_page.py"
PAGE = Path(softcache.__file__).parent / "docs" / "API.md"
PUBLIC = {"softcache": softcache, "softcache.targets": targets, "softcache.dump": dump, "softcache.train": train}
CLASSES = (softcache.Cache, softcache.Joined, softcache.Targets)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_user_file(TOOL)


def loss_functions() -> dict[str, Any]:
    """The public losses: functions, and modules with a forward."""
    found = {name: getattr(losses, name) for name in losses.__all__}
    return {
        n: one
        for n, one in found.items()
        if (n.islower() and n not in ("head_term", "make_term")) or hasattr(one, "forward")
    }


def public_members(kind: type) -> list[str]:
    return [
        name
        for name, one in vars(kind).items()
        if not name.startswith("_") and (callable(one) or hasattr(one, "__get__"))
    ]


def test_the_page_is_what_the_tool_makes(tool: ModuleType) -> None:
    assert tool.page() == PAGE.read_text(encoding="utf-8"), "python tools/docs/make_api_page.py"


def test_the_tool_reads_text_alone() -> None:
    """So the page is the same on every Python, and needs nothing installed."""
    imported = re.findall(r"^(?:import|from) (\w+)", TOOL.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(imported) == {"__future__", "ast", "collections", "dataclasses", "docs", "functools", "pathlib", "sys"}
    assert not re.search(r"ast\.(unparse|dump|get_docstring)|__import__", TOOL.read_text(encoding="utf-8"))


def test_every_public_name_is_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    headings = set(re.findall(r"^### ([\w.]+)$", page, re.MULTILINE))
    for prefix, module in PUBLIC.items():
        for name in module.__all__:
            here = f"softcache.{name}" if prefix == "softcache.targets" else f"{prefix}.{name}"
            assert here in headings or name == "__version__", here
    told = set(re.findall(r"^(?:class )?([\w.]+)[(:]", page, re.MULTILINE))
    assert {f"{kind.__name__}.{name}" for kind in CLASSES for name in public_members(kind)} <= told
    assert {*loss_functions(), "head_term", "make_term"} <= told and len(loss_functions()) >= 35
    kinds = {n for n, one in vars(config).items() if inspect.isclass(one) and n.endswith(("Config", "Options"))}
    assert {f"softcache.config.{name}" for name in kinds} <= headings and len(kinds) > 5
    for kind in kinds:
        for field in vars(getattr(config, kind)).get("__annotations__", {}):
            assert f"\n- `{field}: " in page, f"{kind}.{field}"


def test_every_loss_of_the_list_is_public() -> None:
    assert {loss.function.__name__ for loss in losses.LOSSES.values()} <= loss_functions().keys()


def test_every_error_is_there_with_its_exit_code() -> None:
    lines = re.findall(r"^- `softcache\.errors\.(\w+)\((\w+)\)`, exit code (\d+): ", PAGE.read_text(), re.MULTILINE)
    kinds = [one for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, errors.SoftcacheError)]
    assert lines == [(kind.__name__, kind.__bases__[0].__name__, str(kind.exit_code)) for kind in kinds]


@pytest.mark.parametrize(("name", "loss"), loss_functions().items(), ids=loss_functions())
def test_a_loss_says_shapes_types_errors_and_paper(name: str, loss: Any) -> None:
    text = inspect.getdoc(loss) or ""
    if inspect.isclass(loss):
        text += inspect.getdoc(loss.forward) or ""
    refers = re.search(r"Args: as `(\w+)`", text)
    whole = text + (inspect.getdoc(getattr(losses, refers[1])) or "" if refers else "")
    assert re.search(r"\([BP],|lists of \(B", whole) or "as `kd`" in whole, "shapes"
    assert re.search(r"float dtype|half types|as `kd`", whole), "number types"
    assert re.search(r"\nReturns:|gives a scalar", text) and "\nRaises:" in text, "what comes back, what is raised"
    assert re.search(r"\nSource: .", text), "the paper"


@pytest.mark.parametrize("kind", CLASSES)
def test_every_public_member_has_a_docstring(kind: type) -> None:
    bare = [name for name in public_members(kind) if not (inspect.getdoc(inspect.getattr_static(kind, name)) or "")]
    assert bare == []


def test_a_signature_is_built_from_the_sources_own_text(tool: ModuleType) -> None:
    source = (
        "def f(a, b: 'int'  =  0x10, /, c: dict[\n    str, int\n] = {}, *rest: int, d, e: float = 1e-3, **more: str)->None: ...\n"
        "class K:\n    @property\n    def p(self) -> list[int]: ...\n    def m(self, x=(1,\n 2)): ...\n"
    )
    tree = tool.ast.parse(source).body
    module = tool.Module(source, {}, {})
    assert tool.signature_of(module, "f", tree[0]) == (
        "f(a, b: 'int' = 0x10, /, c: dict[ str, int ] = {}, *rest: int, d, e: float = 1e-3, **more: str) -> None"
    )
    prop, method = tree[1].body
    assert tool.signature_of(module, "K.p", prop, method=True) == "K.p: list[int]"
    assert tool.signature_of(module, "K.m", method, method=True) == "K.m(x=(1, 2))"


def test_a_docstring_is_told_without_its_indentation(tool: ModuleType) -> None:
    source = 'def f():\n    """One.\n\n    Two:\n        three  \n\n    Source: four,\n        five.\n    """\n'
    (node,) = tool.ast.parse(source).body
    assert tool.docstring_of(node) == "One.\n\nTwo:\n    three\n\nSource: four,\n    five."
    assert (tool.summary_of(node), tool.source_of(node)) == ("One.", "Source: four,\n    five.")
