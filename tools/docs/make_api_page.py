"""Writes softcache/docs/API.md from the signatures and docstrings of the public names: python tools/docs/make_api_page.py

It reads the source text alone, so that every Python makes the same page and nothing has to be installed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from docs.made import write_or_compare

PACKAGE = Path(__file__).resolve().parents[2] / "softcache"
PAGE = PACKAGE / "docs" / "API.md"
WIDTH = 120  # of a signature on one line

BEGINNING = """# API

Every public name, with its signature and docstring. This page is made from the source by `python tools/docs/make_api_page.py`.

What is not here is internal and may move in any version. In the examples `data` is a data set whose samples have names, `cache`
is `softcache.open("caches/a")`, `joined` is `cache.join(data)`, and torch, NumPy as `np` and `DataLoader` are imported. Axes: B
batch, C classes, D width, H W space, N samples, P positions.
"""
LOSSES_BEGINNING = """\
Plain functions of tensors, or modules where something is learned or remembered; all are names of `softcache.losses`. Each
gives one scalar in its authors' own reduction. `softcache losses NAME` explains a loss in full; [LOSSES](LOSSES.md) has
conventions, factors and values.
"""
CONFIG_BEGINNING = """\
Frozen dataclasses, taken by keyword. A field is a flag of the same name on the command line, with `-` for `_`
([CLI](CLI.md)); `...` stands for a value that must be given.
"""
ERRORS_BEGINNING = """\
All are children of `SoftcacheError`. `error.message` says what is wrong, `error.tip` what to do about it; the command line
prints both and ends with the error's `exit_code`.
"""

# file of the package -> the prefix that its names have in public, and the names; a class is told with its public members
CLASSES = (
    ("## Reading a cache\n", "softcache", "targets/cache.py", ("open", "Cache", "Joined")),
    ("", "softcache", "targets/batch.py", ("Targets",)),
    ("## Dumping and training\n", "softcache.dump", "dump/flow.py", ("run", "DumpResult")),
    ("", "softcache.train", "train/flow.py", ("run",)),
    ("", "softcache.train", "train/session.py", ("TrainResult",)),
)
NO_LOSSES = ("Loss", "LossTerm", "head_term", "make_term")  # public in softcache.losses: what makes a term of a loss
OF_HEAD = ("head_loss", "HeadTerm", "HeadLoss")  # likewise: losses over a vocabulary


@dataclass(frozen=True)
class Module:
    """The source of a module, and what it defines at its top."""

    source: str
    defined: dict[str, ast.FunctionDef | ast.ClassDef]
    constants: dict[str, ast.expr]

    def text(self, node: ast.AST) -> str:
        """As it is written, on one line."""
        return " ".join((ast.get_source_segment(self.source, node) or "").split())


@cache
def read(path: str) -> Module:
    source = (PACKAGE / path).read_text(encoding="utf-8")
    body = ast.parse(source).body
    assigned = [(n.targets[0], n.value) for n in body if isinstance(n, ast.Assign)]
    return Module(
        source,
        {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)},
        {target.id: value for target, value in assigned if isinstance(target, ast.Name)},
    )


def docstring_of(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Without its indentation; "" where there is none."""
    first = node.body[0]
    if not (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    ):
        return ""
    head, *rest = first.value.value.split("\n")
    indents = [len(line) - len(line.lstrip()) for line in rest if line.strip()]
    indent = min(indents, default=0)
    return "\n".join([head.strip(), *(line[indent:].rstrip() for line in rest)]).strip()


def summary_of(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(docstring_of(node).partition("\n\n")[0].split())


def source_of(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The paper that a docstring names, as `Source: ...`."""
    _, found, rest = docstring_of(node).partition("\nSource: ")
    return "Source: " + rest.split("\n\n")[0] if found else ""


def is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(one, ast.Name) and one.id in ("property", "cached_property") for one in node.decorator_list)


def parameters_of(module: Module, node: ast.FunctionDef, *, method: bool) -> list[str]:
    """What stands between the brackets, commas left out."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    shown = [_parameter(module, one, default) for one, default in zip(positional, defaults, strict=True)]
    if given.posonlyargs:
        shown.insert(len(given.posonlyargs), "/")
    if method:
        shown = shown[1:]
    if given.vararg is not None:
        shown.append(f"*{_parameter(module, given.vararg, None)}")
    elif given.kwonlyargs:
        shown.append("*")
    shown += [_parameter(module, one, d) for one, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        shown.append(f"**{_parameter(module, given.kwarg, None)}")
    return shown


def _parameter(module: Module, one: ast.arg, default: ast.expr | None) -> str:
    text = one.arg if one.annotation is None else f"{one.arg}: {module.text(one.annotation)}"
    if default is None:
        return text
    return f"{text} = {module.text(default)}" if one.annotation is not None else f"{text}={module.text(default)}"


def signature_of(module: Module, name: str, node: ast.FunctionDef, *, method: bool = False) -> str:
    """`name(a: int, *, b: str = "c") -> float`; of a property `name: float`."""
    returns = "" if node.returns is None else module.text(node.returns)
    if is_property(node):
        return f"{name}: {returns}"
    return called(name, parameters_of(module, node, method=method), f" -> {returns}" if returns else "")


def called(name: str, parameters: Sequence[str], end: str = "") -> str:
    """`name(...)`, a parameter on each line where one line would be too long."""
    line = f"{name}({', '.join(parameters)}){end}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {one}," for one in parameters), f"){end}"])


def told(signature: str, docstring: str) -> str:
    """A block of a signature and what it does."""
    lines = [f"    {line}" if line else "" for line in docstring.split("\n")]
    return "\n".join(["```text", signature, *lines, "```", ""])


def members_of(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """The public methods and properties, in order; what sets a property is none of its own."""
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and not one.name.startswith("_") and not _sets(one):
            yield one


def _sets(node: ast.FunctionDef) -> bool:
    return any(isinstance(one, ast.Attribute) and one.attr == "setter" for one in node.decorator_list)


def section(prefix: str, path: str, names: tuple[str, ...]) -> Iterator[str]:
    module = read(path)
    for name in names:
        node, public = module.defined[name], f"{prefix}.{name}"
        yield f"### {public}\n"
        if isinstance(node, ast.FunctionDef):
            yield told(signature_of(module, public, node), docstring_of(node))
            continue
        yield told(f"class {public}", docstring_of(node))
        for one in members_of(node):
            yield told(signature_of(module, f"{name}.{one.name}", one, method=True), docstring_of(one))


# ------------------------------------------------------------------------------------------------------------------ losses


def loss_names() -> list[str]:
    """The losses among the public names of softcache.losses: those that are defined in its modules."""
    listed = ast.literal_eval(read("losses/__init__.py").constants["__all__"])
    return [name for name in listed if name not in (*NO_LOSSES, *OF_HEAD) and not name.isupper()]


def imported_from(name: str) -> str:
    """The file that a public name of softcache.losses is defined in."""
    for node in ast.parse(read("losses/__init__.py").source).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return str(node.module).removeprefix("softcache.").replace(".", "/") + ".py"
    raise ValueError(f"softcache.losses: where is {name} from?")


def losses() -> Iterator[str]:
    yield "## Losses\n"
    yield LOSSES_BEGINNING
    for name in loss_names():
        module = read(imported_from(name))
        node = module.defined[name]
        if isinstance(node, ast.FunctionDef):
            signature = signature_of(module, name, node)
        else:  # a module: what it is made of, and what it takes of a batch
            methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
            made, forward = methods["__init__"], methods["forward"]
            signature = (
                called(f"class {name}", parameters_of(module, made, method=True))
                + "\n"
                + signature_of(module, f"{name}.forward", forward, method=True)
            )
        yield told(signature, f"{summary_of(node)}\n\n{source_of(node)}")
    yield "Of a term, as `--loss` names it:\n"
    yield from in_full(read("losses/__init__.py"), sorted(NO_LOSSES))
    yield "Over a vocabulary, from hidden states and a head:\n"
    yield from in_full(read("losses/head_loss.py"), OF_HEAD)


def in_full(module: Module, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        node = module.defined[name]
        if isinstance(node, ast.FunctionDef):
            yield told(signature_of(module, name, node), docstring_of(node))
        else:
            yield told(f"class {name}", docstring_of(node))


# ------------------------------------------------------------------------------------------------------- settings, errors


def bases_of(node: ast.ClassDef) -> list[str]:
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


def settings() -> Iterator[str]:
    """The config classes, each with the fields of its own."""
    yield "## Settings\n"
    yield CONFIG_BEGINNING
    modules = [read("config/options.py"), read("config/verbs.py")]
    helps = {name: text for module in modules for name, text in module.constants.items()}
    for module in modules:
        for name, node in module.defined.items():
            if isinstance(node, ast.ClassDef):
                bases = [f"`{base}`" for base in reversed(bases_of(node)) if base != "Settings"]
                yield f"### softcache.config.{name}\n"
                yield summary_of(node) + (f" Also the fields of {' and '.join(bases)}." if bases else "") + "\n"
                fields = [_field(module, helps, one) for one in node.body if isinstance(one, ast.AnnAssign)]
                yield "\n".join([*fields, ""]) if fields else ""


def _field(module: Module, helps: Mapping[str, ast.expr], node: ast.AnnAssign) -> str:
    call = node.value
    assert isinstance(node.target, ast.Name) and isinstance(call, ast.Call)
    default, help = call.args
    text = helps[help.id] if isinstance(help, ast.Name) else help
    return f"- `{node.target.id}: {module.text(node.annotation)} = {module.text(default)}`: {ast.literal_eval(text)}"


def errors() -> Iterator[str]:
    """The error classes, each with its exit code."""
    yield "## Errors\n"
    yield ERRORS_BEGINNING
    codes: dict[str, int] = {}
    lines = []
    for name, node in read("errors.py").defined.items():
        if isinstance(node, ast.ClassDef):
            (base,) = bases_of(node)
            codes[name] = next(
                (_exit_code(one) for one in node.body if isinstance(one, ast.Assign)), codes.get(base, 0)
            )
            lines.append(f"- `softcache.errors.{name}({base})`, exit code {codes[name]}: {summary_of(node)}")
    yield "\n".join([*lines, ""])


def _exit_code(node: ast.Assign) -> int:
    target = node.targets[0]
    assert isinstance(target, ast.Name) and target.id == "exit_code"
    return int(ast.literal_eval(node.value))


def page() -> str:
    """The whole page."""
    parts = [BEGINNING]
    for heading, prefix, path, names in CLASSES:
        parts += [heading, *section(prefix, path, names)]
    parts += [*losses(), *settings(), *errors()]
    return "\n".join(part for part in parts if part)


def main() -> None:
    write_or_compare(__doc__, {PAGE: page()})


if __name__ == "__main__":
    main()
