"""Spec strings: how a model or a data set is named on the command line, `scheme:name?key=value&key=value`.

`softcache:mlp?hidden=800,800`, `torchvision:MNIST?root=data`, `package.module:factory?arg=1`, `path/to/file.py:factory`.
A factory's parameters are converted by its own signature, so that a typing mistake is found before anything is built.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
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
USER = "softcache_user_"  # begins the names of modules made of users' files
_NEIGHBOURS: dict[str, Path] = {}  # modules that lie beside users' files, by name, and the folder that gave them


@dataclass(frozen=True)
class Spec:
    """One parsed spec string.

    Attributes:
        text: as the user wrote it.
        scheme: before the first colon ("softcache", "torchvision", "imagefolder", a module or a .py file); "" if there is none.
        name: between the colon and the question mark.
        parameters: key -> value, both still strings.
    """

    text: str
    scheme: str
    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_factory(self) -> bool:
        """True for `package.module:factory` and `path/to/file.py:factory`."""
        return self.scheme.endswith(".py") or "." in self.scheme or "/" in self.scheme

    def without(self, *keys: str) -> Spec:
        """The same spec with some parameters left out (its text is rebuilt)."""
        kept = {key: value for key, value in self.parameters.items() if key not in keys}
        head = f"{self.scheme}:{self.name}" if self.scheme else self.name
        query = "&".join(f"{key}={value}" for key, value in kept.items())
        return Spec(f"{head}?{query}" if query else head, self.scheme, self.name, kept)

    def portable(self) -> str:
        """The spec without folders, for a manifest: `file.py:factory` keeps the file's name only, path parameters are dropped."""
        scheme = Path(self.scheme).name if self.scheme.endswith(".py") else self.scheme
        kept = {k: v for k, v in self.parameters.items() if "/" not in v and "\\" not in v}
        head = f"{scheme}:{self.name}" if scheme else self.name
        query = "&".join(f"{key}={value}" for key, value in sorted(kept.items()))
        return f"{head}?{query}" if query else head


def parse_spec(text: str) -> Spec:
    """Split `scheme:name?key=value&...`; ConfigError for an empty spec or a parameter without '='."""
    if len(text) > LONGEST or "\0" in text:
        raise ConfigError(
            f"{text[:60]!r}... is no name: it has {len(text):,} characters, of {LONGEST:,} at most, none of them a zero byte",
            tip="write scheme:name?key=value; what is longer belongs into a factory of your own",
        )
    head, _, query = text.partition("?")
    # a file path may hold a colon of its own only before ".py:"; everything else splits at the first colon
    cut = head.rfind(".py:")
    if cut >= 0:
        scheme, name = head[: cut + 3], head[cut + 4 :]
    else:
        scheme, colon, name = head.partition(":")
        if not colon:
            scheme, name = "", head
    if not name:
        raise ConfigError(
            f"{text!r} names nothing", tip="write scheme:name?key=value, for example softcache:mlp?hidden=800,800"
        )
    parameters: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r}: parameter {pair!r} is not key=value", tip="separate parameters with '&'")
        if key in parameters:
            raise ConfigError(f"{text!r}: parameter {key!r} is given twice", tip="keep one of them")
        parameters[key] = value
    return Spec(text, scheme, name, parameters)


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
        arguments[name] = convert(text, hint, f"{where!r}: parameter {name!r}")
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


def _type_of(default: Any) -> Any:
    """The type that a default stands for; a tuple or list has elements like its first one."""
    kind: Any = type(default)
    return kind[type(default[0])] if kind in (tuple, list) and default else kind


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
        raise ConfigError(f"{where}: {text!r} is not {hint}")
    if origin in (tuple, list) or hint in (tuple, list):
        element = (typing.get_args(hint) or (str,))[0]
        values = [convert(part, element, where) for part in text.split(",") if part]
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
        raise ConfigError(f"{where}: {text!r} is not true or false")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ConfigError(f"{where}: {text!r} is not {kind}") from None
    if hint is type(None):
        raise ConfigError(f"{where}: takes no value")
    return text


def split_term(text: str, what: str) -> tuple[str, dict[str, str]]:
    """`name:key=value,key=value` -> (name, {key: value}); a value may hold commas inside its brackets."""
    name, _, rest = text.partition(":")
    values: dict[str, str] = {}
    for pair in filter(None, split_outside(rest, ",")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{what} {text!r}: {pair!r} is not key=value", tip=f"write {name}:key=value,key=value")
        if key.strip() in values:
            raise ConfigError(f"{what} {text!r}: {key.strip()!r} is given twice", tip="keep one of them")
        values[key.strip()] = value.strip()
    return name.strip(), values


def split_outside(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that stand outside all round brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
