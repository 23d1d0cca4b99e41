"""Spec strings: how a model or a data set is named on the command line, `scheme:name?key=value&key=value`.

`softcache:mlp?hidden=800,800`, `torchvision:MNIST?root=data`, `package.module:factory?arg=1`, `path/to/file.py:factory`.
A factory's parameters are converted by its own signature, so that a typing mistake is found before anything is built.

One rule of quoting, in specs and in lists, terms and members alike: a part that holds a sign which would end it stands in double
quotes, and a double quote in it is written twice, as in a CSV file: `imagefolder:"what?/a&b"`, `tsv:x.tsv?classes="a, b",c`. A
quote opens where a part begins, so that one in the middle of a name is a letter as any other.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softcache.errors import ConfigError, MissingExtraError, SoftcacheError, nearest

LONGEST = 2**16  # characters of a spec
_BEGINS = ":?&=,@("  # behind these a part begins, which may be quoted
_WOULD_OPEN = re.compile(f'(^|[{re.escape(_BEGINS)}]) *"')
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}  # of types, for messages
USER = "softcache_user_"  # begins the names of modules made of users' files
_NEIGHBOURS: dict[str, Path] = {}  # modules that lie beside users' files, by name, and the folder that gave them


@dataclass(frozen=True)
class Spec:
    """One parsed spec string.

    Attributes:
        text: as the user wrote it.
        scheme: before the first colon ("softcache", "torchvision", "imagefolder", a module or a .py file); "" if there is none.
        name: between the colon and the question mark. Both without quotes.
        parameters: key -> value, both still strings, and a value as it was written: `value` takes the quotes off.
    """

    text: str
    scheme: str
    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_factory(self) -> bool:
        """True for `package.module:factory` and `path/to/file.py:factory`."""
        return self.scheme.endswith(".py") or "." in self.scheme or "/" in self.scheme

    def value(self, key: str, default: str = "") -> str:
        """A parameter without quotes; `default` where it is not given."""
        return unquoted(self.parameters[key], self.text) if key in self.parameters else default

    def without(self, *keys: str) -> Spec:
        """The same spec with some parameters left out (its text is rebuilt)."""
        return make_spec(self.scheme, self.name, {k: v for k, v in self.parameters.items() if k not in keys})

    def having(self, **values: str) -> Spec:
        """The same spec with further parameters, quoted where they must be (its text is rebuilt)."""
        return make_spec(self.scheme, self.name, {**self.parameters, **{k: quoted(v) for k, v in values.items()}})

    def portable(self) -> str:
        """The spec without folders, for a manifest: `file.py:factory` keeps the file's name only, path parameters are dropped."""
        scheme = Path(self.scheme).name if self.scheme.endswith(".py") else self.scheme
        kept = {k: v for k, v in self.parameters.items() if "/" not in v and "\\" not in v}
        return make_spec(scheme, self.name, dict(sorted(kept.items()))).text


def make_spec(scheme: str, name: str, parameters: Mapping[str, str]) -> Spec:
    """The spec of these parts, whose text is read as them again."""
    if scheme.endswith(".py"):
        head = f"{quoted(scheme, '?')}:{quoted(name, '?', '.py:')}"
    elif scheme:
        head = f"{quoted(scheme, '?', ':')}:{quoted(name, '?', '.py:')}"
    else:
        head = quoted(name, "?", ":")
    query = "&".join(f"{key}={value}" for key, value in parameters.items())
    return Spec(f"{head}?{query}" if query else head, scheme, name, parameters)


def parse_spec(text: str) -> Spec:
    """Split `scheme:name?key=value&...`; ConfigError for an empty spec, a parameter without '=', quotes that do not close."""
    if len(text) > LONGEST or "\0" in text:
        raise ConfigError(
            f"{text[:60]!r}... is no name: it has {len(text):,} characters, of {LONGEST:,} at most, none of them a zero byte",
            tip="write scheme:name?key=value; what is longer belongs into a factory of your own",
        )
    signs = outside_quotes(text)
    query_at = next((place for place, letter in signs if letter == "?"), len(text))
    head, query = text[:query_at], text[query_at + 1 :]
    colons = [place for place, letter in signs if letter == ":" and place < query_at]
    # a file path may hold a colon of its own only before ".py:"; everything else splits at the first colon
    files = [place for place in colons if head[:place].endswith((".py", '.py"'))]
    cut = files[-1] if files else colons[0] if colons else -1
    scheme, name = unquoted(head[: max(cut, 0)], text), unquoted(head[cut + 1 :], text)
    if not name:
        raise ConfigError(
            f"{text!r} names nothing", tip="write scheme:name?key=value, for example softcache:mlp?hidden=800,800"
        )
    parameters: dict[str, str] = {}
    for pair in filter(None, split_outside(query, "&", brackets=False)):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            literal = f"{text[: cut + 1]}{quoted(text[cut + 1 :], '?')}"
            raise ConfigError(
                f"{text!r}: parameter {pair!r} is not key=value",
                tip=f"separate parameters with '&'; where '?' or '&' is part of a name, quote it: {literal!r}",
            )
        if key in parameters:
            raise ConfigError(f"{text!r}: parameter {key!r} is given twice", tip="keep one of them")
        parameters[key] = value
    return Spec(text, scheme, name, parameters)


def outside_quotes(text: str) -> list[tuple[int, str]]:
    """The letters of a text that stand outside double quotes, each with its place; ConfigError where quotes do not close."""
    found, place, begins = [], 0, True
    while place < len(text):
        if text[place] == '"' and begins:
            place, begins = _end_of_quotes(text, place), False
            continue
        found.append((place, text[place]))
        begins = text[place] in _BEGINS or (begins and text[place] == " ")
        place += 1
    return found


def _end_of_quotes(text: str, place: int) -> int:
    """The place behind the quotes that open at `place`."""
    end = place + 1
    while (end := text.find('"', end)) >= 0:
        if not text.startswith('""', end):
            return end + 1
        end += 2
    raise ConfigError(
        f"{text!r}: the double quote before {text[place + 1 : place + 21]!r} is never closed",
        tip='close it, or write a quote that belongs to the name as "" inside quotes',
    )


def unquoted(part: str, where: str = "") -> str:
    """A part without the double quotes that it stands in; as it is where it stands in none.

    Raises:
        ConfigError: something stands behind the closing quote; with `where`, the whole text.
    """
    bare = part.strip(" ")
    if not bare.startswith('"'):
        return part
    if not _is_quoted(part):
        raise ConfigError(
            f"{where or part!r}: {bare[_end_of_quotes(bare, 0) :]!r} stands behind a closing quote",
            tip='quotes go around the whole part, and a quote that belongs to it is written twice: "so ""called"""',
        )
    return bare[1:-1].replace('""', '"')


def quoted(part: str, *ends: str) -> str:
    """The part as it is written in a spec: in double quotes where it holds one of `ends`, or would be read otherwise.

    Args:
        ends: what would end it where it stands; without any, every sign that means something somewhere.
    """
    if any(sign in part for sign in ends or ("&", ",", "@", "#", "=")) or _WOULD_OPEN.search(part):
        return '"' + part.replace('"', '""') + '"'
    return part


def split_outside(text: str, separator: str, *, brackets: bool = True) -> list[str]:
    """The parts of a text between separators that stand outside all double quotes and round brackets; quotes stay.

    Args:
        brackets: whether round brackets count.
    """
    parts, begin, depth = [], 0, 0
    for place, letter in outside_quotes(text):
        if brackets:
            depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == separator and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]


def split_list(text: str) -> tuple[str, ...]:
    """What stands between commas, without empty parts: `"Paris, Texas",Rome`. The quotes of `"a,b"=0.5` stay for its reader."""
    parts = [part for part in split_outside(text, ",", brackets=False) if part]
    if not any(map(_is_quoted, parts)):
        return tuple(parts)
    return tuple(unquoted(part) if _is_quoted(part) else part.lstrip(" ") for part in parts)


def _is_quoted(part: str) -> bool:
    bare = part.strip(" ")
    return bare.startswith('"') and _end_of_quotes(bare, 0) == len(bare)


def load_factory(spec: Spec) -> Callable[..., Any]:
    """The callable behind `package.module:factory` or `file.py:factory`.

    Raises:
        ConfigError: there is no such file, module or factory, or its own code fails while it is imported.
        MissingExtraError: it imports a package that is not installed.
    """
    is_file = spec.scheme.endswith(".py")
    if is_file and not os.path.isfile(spec.scheme):
        raise ConfigError(
            f"{spec.text!r}: there is no file {spec.scheme}", tip="give the path as seen from the current folder"
        )
    try:
        module = load_user_file(spec.scheme) if is_file else importlib.import_module(spec.scheme)
    except ModuleNotFoundError as exc:
        if exc.name and not is_file and (spec.scheme == exc.name or spec.scheme.startswith(exc.name + ".")):
            raise ConfigError(
                f"{spec.text!r}: no module named {exc.name!r}",
                tip="install the package, or name a file: path/to/file.py:factory",
            ) from None
        raise MissingExtraError(
            f"{spec.text!r} needs the package {exc.name!r}, which is not installed",
            tip=f"pip install {exc.name}" + (f", or put {exc.name}.py beside {spec.scheme}" if is_file else ""),
        ) from None
    except SoftcacheError:
        raise
    except Exception as exc:  # whatever somebody's code may raise
        raise ConfigError(
            f"{spec.text!r} cannot be imported: {type(exc).__name__}: {exc}{_where(exc)}",
            tip="it is imported as `import` would, with the files beside it; mend it, or name another file",
        ) from exc
    factory = getattr(module, spec.name, None)
    if not callable(factory):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(f"{spec.text!r}: {spec.scheme} has no factory {spec.name!r}", tip=nearest(spec.name, known))
    return typing.cast(Callable[..., Any], factory)


def _where(exc: Exception) -> str:
    """The last place in somebody's own file, for a message."""
    if isinstance(exc, SyntaxError):
        return ""  # which says it itself
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if not frame.filename.startswith("<frozen")]
    ours = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    return f" ({Path(ours[-1].filename).name}, line {ours[-1].lineno})" if ours else ""


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """While it is entered, `import helper` finds the files of a folder first, as it does for a script that is started there.

    `sys.path` is afterwards as it was.

    Raises:
        ConfigError: it imported a module that has the name of another one, beside another file.
    """
    others = {name: sys.modules[name] for name in _NEIGHBOURS if name in sys.modules and _NEIGHBOURS[name] != folder}
    for name in others:
        del sys.modules[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
        for name in sorted(set(sys.modules) - before):
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder) and not name.startswith(USER):
                _refuse_namesake(name, file, others)
                _NEIGHBOURS[name] = folder
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))
        sys.modules.update(others)


def _refuse_namesake(name: str, file: str, others: Mapping[str, types.ModuleType]) -> None:
    if name not in others:
        return
    other = str(others[name].__file__)
    if Path(file).read_bytes() != Path(other).read_bytes():
        raise ConfigError(
            f"two different modules are called {name!r}: {file} and {other}",
            tip="rename one of them: in one process a name stands for one module",
        )


def load_user_file(path: str | Path) -> types.ModuleType:
    """Import a user's file once, under a name of its own; worker processes call it before they unpickle its objects.

    It may import the files beside it.
    """
    resolved = Path(path).resolve()
    name = f"{USER}{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}_{resolved.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, resolved)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        with _beside(resolved.parent):
            found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def user_files() -> list[str]:
    """The user's files imported so far."""
    return [str(m.__file__) for name, m in sys.modules.items() if name.startswith(USER) and m.__file__]


def call_factory(factory: Callable[..., Any], parameters: Mapping[str, str], where: str, **offered: Any) -> Any:
    """Call a factory with string parameters converted by its annotations (or defaults) plus whatever it asks for of `offered`.

    Args:
        factory: any callable; its signature decides the names and types.
        parameters: from the spec string.
        where: the spec string, for messages.
        offered: values that are passed only when the signature has a parameter of that name (num_classes, ...).

    Raises:
        ConfigError: an unknown parameter, a value that does not convert, or a required parameter that is missing.
    """
    signature = inspect.signature(factory)
    known = signature.parameters
    catches_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    try:
        hints = typing.get_type_hints(factory.__init__ if isinstance(factory, type) else factory)  # type: ignore[misc]
    except Exception:  # an annotation that cannot be resolved is not the user's fault
        hints = {}
    arguments: dict[str, Any] = {name: value for name, value in offered.items() if name in known}
    for name, text in parameters.items():
        if name not in known and not catches_all:
            raise ConfigError(f"{where!r}: unknown parameter {name!r}", tip=nearest(name, known))
        parameter = known.get(name)
        hint = hints.get(name)
        if hint is None and parameter is not None and parameter.default not in (inspect.Parameter.empty, None):
            hint = _type_of(parameter.default)
        arguments[name] = convert(
            text if _is_list(hint) or _has_elements(text) else unquoted(text, where),
            hint,
            f"{where!r}: parameter {name!r}",
        )
    for name, parameter in known.items():
        if (
            parameter.default is inspect.Parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name not in arguments
        ):
            raise ConfigError(f"{where!r}: parameter {name!r} is missing", tip=f"add {name}=... to the spec")
    module = sys.modules.get(getattr(factory, "__module__", ""))
    file = getattr(module, "__file__", None)
    if module is not None and module.__name__.startswith(USER) and file:
        with _beside(Path(file).parent):  # what it imports when it is called
            return factory(**arguments)
    return factory(**arguments)


def _is_list(hint: Any) -> bool:
    """Whether a value of this type is a list, whose elements have quotes of their own."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(map(_is_list, typing.get_args(hint)))
    return origin in (tuple, list) or hint in (tuple, list)


def _has_elements(text: str) -> bool:
    """Whether commas divide a value: its reader takes it apart, and each element's quotes off."""
    return len(split_outside(text, ",", brackets=False)) > 1


def _type_of(default: Any) -> Any:
    """The type that a default stands for; a tuple or list has elements like its first one."""
    kind: Any = type(default)
    return kind[type(default[0])] if kind in (tuple, list) and default else kind


def _number_tip(text: str) -> str:
    """How a share or a number is written that was not written as Python does."""
    if share := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?%", text):
        return f"a share is written as a number: {float(share[1]) / 100:g}"
    if re.fullmatch(r"\d{1,9},\d{1,9}", text):
        return f"numbers are written with a point: {text.replace(',', '.')}"
    return ""


def convert(text: str, hint: Any, where: str) -> Any:
    """`text` as the type that `hint` asks for: int, float, bool, str, None, tuples and lists of them, unions in order."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in typing.get_args(hint):
            return None
        for option in typing.get_args(hint):
            if option is type(None):
                if not text:
                    return None
                continue
            try:
                return convert(text, option, where)
            except ConfigError:
                continue
        words = " or ".join(_WORDS.get(one, str(one)) for one in typing.get_args(hint) if one is not type(None))
        raise ConfigError(f"{where}: {text!r} is not {words}", tip=_number_tip(text))
    if origin in (tuple, list) or hint in (tuple, list):
        element = (typing.get_args(hint) or (str,))[0]
        values = [convert(part, element, where) for part in split_list(text)]
        return tuple(values) if (origin or hint) is tuple else values
    if origin is typing.Literal:
        for choice in typing.get_args(hint):
            if str(choice) == text:
                return choice
        raise ConfigError(f"{where}: unknown value {text!r}", tip=nearest(text, map(str, typing.get_args(hint))))
    if hint is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise ConfigError(f"{where}: {text!r} is not {_WORDS[bool]}")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ConfigError(f"{where}: {text!r} is not {_WORDS[hint]}", tip=_number_tip(text)) from None
    if hint is type(None):
        raise ConfigError(f"{where}: takes no value")
    return text


def split_term(text: str, what: str) -> tuple[str, dict[str, str]]:
    """`name:key=value,key=value` -> (name, {key: value}); a value may hold commas inside its brackets, or stand in quotes."""
    name, _, rest = text.partition(":")
    values: dict[str, str] = {}
    for pair in filter(None, split_outside(rest, ",")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{what} {text!r}: {pair!r} is not key=value", tip=f"write {name}:key=value,key=value")
        if key.strip() in values:
            raise ConfigError(f"{what} {text!r}: {key.strip()!r} is given twice", tip="keep one of them")
        values[key.strip()] = unquoted(value.strip(), text)
    return name.strip(), values


def split_lists(text: str, where: str, usage: str) -> dict[str, str]:
    """`key=value,key=value` -> {key: value}, where what is no key=value goes on with the list before it: `keep=a,b,amount=0.5`.

    Raises:
        ConfigError: a key that is given twice, or nothing that a word could go on with; `usage` is what to write.
    """
    values: dict[str, str] = {}
    last = ""
    for word in filter(None, (word.strip() for word in split_outside(text, ","))):
        key, equals, value = word.partition("=")
        if equals and key not in values:
            last, values[key] = key, value
        elif equals or not last:
            what = f"{key!r} is given twice" if equals else f"{word!r} is not key=value"
            raise ConfigError(f"{where}: {what}", tip=f"write {usage}")
        else:
            values[last] += f",{word}"
    return values
