"""Settings and spec strings: who wins, where a value came from, and a message for every way to get one wrong."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from softcache.config import (
    DumpConfig,
    EvalConfig,
    PlanConfig,
    TrainConfig,
    parse_part,
    parse_settings,
    resolve,
    to_toml,
)
from softcache.errors import ConfigError, MissingExtraError
from softcache.spec import Spec, call_factory, convert, load_factory, load_user_file, parse_spec, split_term, user_files

KINDS = (PlanConfig, DumpConfig, TrainConfig, EvalConfig)
NEEDED: dict[type[Any], dict[str, Any]] = {
    PlanConfig: {"data": "digits", "teacher": ["runs/t"]},
    DumpConfig: {"data": "digits", "teacher": ["runs/t"], "out": "c"},
    TrainConfig: {"data": "digits", "student": "softcache:mlp", "out": "r"},
    EvalConfig: {"data": "digits"},
}
over_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def toml(folder: Path, text: str) -> str:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def train(*, file: str | None = None, sets: tuple[str, ...] = (), **flags: Any) -> TrainConfig:
    return resolve(TrainConfig, file=file, sets=sets, flags=NEEDED[TrainConfig] | flags).config


# ------------------------------------------------------------------------------------------------------------- precedence


def test_defaults_then_file_then_set_then_flags(tmp_path: Path) -> None:
    file = toml(tmp_path, 'epochs = 1\nlr = 0.5\nseed = 7\nout = "from-file"\nstudent = "m"\ndata = "digits"\n')
    sets = ["lr=0.25", "epochs=2"]
    resolved = resolve(TrainConfig, file=file, sets=sets, flags={"epochs": "3", "out": "from-flag"})
    config = resolved.config
    assert (config.epochs, config.lr, config.seed, config.batch_size) == (3, 0.25, 7, 128)
    assert (config.out, config.student) == ("from-flag", "m")
    origins = {name: resolved.origins[name] for name in ("epochs", "lr", "seed", "batch_size", "out", "student")}
    assert origins == {
        "epochs": "flag",
        "lr": "--set",
        "seed": file,
        "batch_size": "default",
        "out": "flag",
        "student": file,
    }


def test_every_setting_has_an_origin_and_the_last_set_wins() -> None:
    resolved = resolve(TrainConfig, sets=["lr=1", "lr=2"], flags=NEEDED[TrainConfig])
    assert resolved.config.lr == 2.0
    assert list(resolved.origins) == [field.name for field in dataclasses.fields(TrainConfig)]
    assert [name for name, origin in resolved.origins.items() if origin == "flag"] == ["data", "student", "out"]


@over_kinds
def test_defaults_are_those_of_the_dataclass(kind: type[Any]) -> None:
    config = resolve(kind, flags=NEEDED[kind]).config
    for field in dataclasses.fields(kind):
        if field.name not in NEEDED[kind]:
            assert getattr(config, field.name) == field.default
        assert field.metadata["help"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data = "other"


# ----------------------------------------------------------------------------------------------------------------- values


def test_each_type_from_a_string_and_from_toml(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        'workers = 2\nlr = 1\nnesterov = true\nkeep-labels = [7, "cat"]\nview_seed = 5\n'
        'eval-data = "digits?split=test"\n',
    )
    config = train(file=file)
    assert (config.workers, config.lr, config.nesterov, config.view_seed) == (2, 1.0, True, 5)
    assert config.keep_labels == ("7", "cat")
    assert config.eval_data == "digits?split=test"
    sets = ("workers=2", "lr=1", "nesterov=yes", "keep-labels=7,cat", "view=none")
    other = train(sets=sets, view_seed="5", eval_data="digits?split=test")
    assert other == config and isinstance(other.lr, float)


def test_a_name_with_a_comma_stands_in_quotes() -> None:
    wanted = ("tench, Tinca tinca", "goldfish", "a:b")
    for text in ('"tench, Tinca tinca",goldfish,"a:b"', 'goldfish,"tench, Tinca tinca", "a:b"'):
        assert sorted(train(sets=(f"keep-labels={text}",)).keep_labels) == sorted(wanted)
        assert sorted(train(keep_labels=text).keep_labels) == sorted(wanted)
    assert train(keep_labels='5" pipe,cat').keep_labels == ('5" pipe', "cat")  # inside a name it is a letter
    assert train(stage=['epochs=1 loss="ce"']).stage == ('epochs=1 loss="ce"',)


@over_kinds
def test_every_choice_of_a_setting_can_be_given(kind: type[Any]) -> None:
    """One called "none" too, which in an optional setting would be no value at all."""
    for field in dataclasses.fields(kind):
        for choice in field.metadata["choices"] or ():
            assert getattr(resolve(kind, flags=NEEDED[kind] | {field.name: choice}).config, field.name) == choice


def test_terms_keep_their_commas() -> None:
    """A `name:key=value,...` string is one term; names without parameters may be listed."""
    kd, ce = "kd:temperature=4,weight=0.9", "ce:weight=0.1"
    assert train(loss=[kd, ce]).loss == (kd, ce)
    assert train(sets=(f"loss={kd}",)).loss == (kd,)
    assert train(sets=("loss=kd,ce",)).loss == ("kd", "ce")
    teacher = "softcache:mlp?hidden=1200,1200@runs/t"
    config = resolve(DumpConfig, sets=[f"teacher={teacher}"], flags={"data": "digits", "out": "c"}).config
    assert config.teacher == (teacher,)
    assert train(members=["a=0.7,b=0.3"]).members == ("a=0.7,b=0.3",)
    assert train(members="a=0.7,b=0.3").members == ("a=0.7", "b=0.3")


def test_tables_are_terms(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        '[[loss]]\nname = "kd"\nweight = 0.9\ntemperature = 4\n\n[[loss]]\nname = "ce"\n\n'
        '[[policy]]\nname = "shift"\npixels = 3\n',
    )
    config = train(file=file)
    assert config.loss == ("kd:weight=0.9,temperature=4", "ce") and config.policy == ("shift:pixels=3",)
    assert split_term(config.loss[0], "--loss") == ("kd", {"weight": "0.9", "temperature": "4"})


def variety(kind: type[Any]) -> dict[str, Any]:
    """A value other than the default for every setting of a config."""
    odd = 'a "quoted" back\\slash, ünïcode\tand a line\nend'
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint, choices = str(field.type), field.metadata["choices"]
        if choices:
            values[field.name] = choices[-1]
        elif hint.startswith("tuple[float"):
            values[field.name] = (1.0, 2.5, 1e-7, 1e22)
        elif hint.startswith("tuple"):
            values[field.name] = ("kd:temperature=4,weight=0.9", odd, "7")
        elif hint == "bool":
            values[field.name] = True
        elif hint.startswith("int"):
            values[field.name] = 12345678901
        elif hint.startswith("float"):
            values[field.name] = 1.0 / 3e7
        else:
            values[field.name] = odd
    return values


@over_kinds
def test_to_toml_is_read_back_as_it_was(kind: type[Any], tmp_path: Path) -> None:
    for number, config in enumerate((kind(**variety(kind)), resolve(kind, flags=NEEDED[kind]).config)):
        path = tmp_path / f"{number}.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        resolved = resolve(kind, file=str(path))
        assert resolved.config == config
        for field in dataclasses.fields(kind):
            assert type(getattr(resolved.config, field.name)) is type(getattr(config, field.name))
        unset = {name for name, origin in resolved.origins.items() if origin == "default"}
        assert unset == {field.name for field in dataclasses.fields(kind) if getattr(config, field.name) is None}


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sets", "flags", "message"),
    [
        (["epoch=3"], {}, r"--set: unknown setting 'epoch'\n.*did you mean 'epochs'"),
        (["batch-sise=3"], {}, r"--set: unknown setting 'batch-sise'\n.*did you mean 'batch_size'"),
        (["a.b=3"], {}, r"--set: unknown setting 'a.b'"),
        ([], {"temperature": "4"}, r"flag: unknown setting 'temperature'"),
        (["epochs"], {}, "--set 'epochs' is not key=value"),
        (["epochs=ten"], {}, "--set: epochs: 'ten' is not a whole number"),
        (["epochs=2.5"], {}, "--set: epochs: '2.5' is not a whole number"),
        (["lr=fast"], {}, "--set: lr: 'fast' is not a number"),
        (["nesterov=maybe"], {}, "--set: nesterov: 'maybe' is not true or false"),
        (["workers=many"], {}, "--set: workers: 'many' is not a whole number"),
        ([], {"lr": "x"}, "--lr: 'x' is not a number"),
        ([], {"optimizer": "sdg"}, r"--optimizer cannot be 'sdg'\n.*did you mean 'sgd'"),
        (["keep=bets"], {}, r"--set: keep cannot be 'bets'\n.*did you mean 'best'"),
        (["autocast=int4"], {}, r"--set: autocast cannot be 'int4'\n.*known: bf16, fp16, none"),
        ([], {"student": ""}, r"--student is missing\n.*--student MODEL: MODEL or MODEL@WEIGHTS"),
        ([], {"data": ""}, r"--data is missing\n.*--data DATA: transfer set"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_makes_no_sense_is_refused(sets: list[str], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, sets=sets, flags=NEEDED[TrainConfig] | flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", r"settings.toml: unknown setting 'epoch'\n.*did you mean 'epochs'"),
        ("epochs = 'three'", "settings.toml: epochs: 'three' is not a whole number"),
        ("epochs = true", "settings.toml: epochs: 'True' is not a whole number"),
        ("epochs = 2.5", "settings.toml: epochs: '2.5' is not a whole number"),
        ("epochs = [1, 2]", r"settings.toml: epochs: \[1, 2\] is a list, not one value"),
        ("view = [1]", r"settings.toml: view: \[1\] is a list, not one value"),
        ("data = ['digits']", r"settings.toml: data: \['digits'\] is a list, not one value"),
        ("ema = 'x'", "settings.toml: ema: 'x' is not a number"),
        ("[epochs]\nx = 1", "settings.toml: epochs: is a table, not a value"),
        ("[[epochs]]\nname = 'x'", "settings.toml: epochs: .*is a list, not one value"),
        ("[[loss]]\nweight = 1", r"settings.toml: loss: a table needs a name\n.*name = \"kd\""),
        ("keep = 'bets'", r"settings.toml: keep cannot be 'bets'\n.*did you mean 'best'"),
        ("epochs = ", "settings.toml: not TOML: "),
        ("epochs = 1\nepochs = 2", "settings.toml: not TOML: "),
    ],
    ids=lambda value: value if "settings" not in value else "",
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, file=toml(tmp_path, text), flags=NEEDED[TrainConfig])


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: No such file"):
        resolve(TrainConfig, file=str(tmp_path / "no.toml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        resolve(TrainConfig, file=str(tmp_path))
    (tmp_path / "latin").write_bytes(b'out = "\xe9"')
    with pytest.raises(ConfigError, match="latin: not TOML: "):
        resolve(TrainConfig, file=str(tmp_path / "latin"))


@over_kinds
def test_every_required_setting_is_asked_for(kind: type[Any]) -> None:
    required = [field.name for field in dataclasses.fields(kind) if field.metadata["required"]]
    assert sorted(required) == sorted(NEEDED[kind])
    for name in required:
        flags = {key: value for key, value in NEEDED[kind].items() if key != name}
        with pytest.raises(ConfigError, match=f"^--{name} is missing"):
            resolve(kind, flags=flags)


# --------------------------------------------------------------------------------------------------------- terms and parts


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("kd", ("kd", {})),
        ("kd:", ("kd", {})),
        ("kd:temperature=4", ("kd", {"temperature": "4"})),
        ("kd:temperature=4,weight=0.9", ("kd", {"temperature": "4", "weight": "0.9"})),
        (" kd : temperature = 4 , weight = 1 ", ("kd", {"temperature": "4", "weight": "1"})),
        ("x:a=b=c,", ("x", {"a": "b=c"})),
        ("x:a=", ("x", {"a": ""})),
    ],
    ids=str,
)
def test_split_term(text: str, wanted: tuple[str, dict[str, str]]) -> None:
    assert split_term(text, "--loss") == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kd:4", r"--loss 'kd:4': '4' is not key=value\n.*write kd:key=value"),
        ("kd:=4", "--loss 'kd:=4': '=4' is not key=value"),
        ("kd:weight=1,2", "'2' is not key=value"),
        ("kd:weight=1, weight=2", "--loss 'kd:weight=1, weight=2': 'weight' is given twice"),
    ],
    ids=lambda value: value if value.startswith("kd") else "",
)
def test_a_term_that_cannot_be_split_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_term(text, "--loss")


@pytest.mark.parametrize(
    ("text", "wanted"), [(None, (1, 1)), ("1/1", (1, 1)), ("1/3", (1, 3)), ("3/3", (3, 3)), ("12/40", (12, 40))]
)
def test_parse_part(text: str | None, wanted: tuple[int, int]) -> None:
    assert parse_part(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "1", "/", "1/", "/3", "0/3", "4/3", "-1/3", "a/b", "1/3/3", "1.0/3", "²/3", " /3"]
)
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--part '{text}' is not i/n\n.*write 1/3, 2/3 and 3/3"):
        parse_part(text)


# ----------------------------------------------------------------------------------------------------------- spec strings


@pytest.mark.parametrize(
    ("text", "scheme", "name", "parameters"),
    [
        ("digits", "", "digits", {}),
        ("digits?split=test", "", "digits", {"split": "test"}),
        ("softcache:mlp?hidden=800,800", "softcache", "mlp", {"hidden": "800,800"}),
        ("softcache:mlp?hidden=8&dropout=0.5", "softcache", "mlp", {"hidden": "8", "dropout": "0.5"}),
        ("imagefolder:/data/a b", "imagefolder", "/data/a b", {}),
        ("tsv:x.tsv?text=0&label=1&header=true", "tsv", "x.tsv", {"text": "0", "label": "1", "header": "true"}),
        ("torchvision:MNIST?root=/a:b", "torchvision", "MNIST", {"root": "/a:b"}),
        ("package.module:make?x=1", "package.module", "make", {"x": "1"}),
        ("a/b/file.py:make", "a/b/file.py", "make", {}),
        ("a:odd/file.py:make?x=a=b", "a:odd/file.py", "make", {"x": "a=b"}),
        ("file.py:make?x=", "file.py", "make", {"x": ""}),
        ("softcache:cnn?", "softcache", "cnn", {}),
        ("softcache:cnn?&a=1&", "softcache", "cnn", {"a": "1"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parse_spec(text: str, scheme: str, name: str, parameters: dict[str, str]) -> None:
    assert parse_spec(text) == Spec(text, scheme, name, parameters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"'' names nothing\n.*write scheme:name"),
        ("softcache:", "'softcache:' names nothing"),
        ("?a=1", "names nothing"),
        ("file.py:", "'file.py:' names nothing"),
        ("softcache:mlp?hidden", r"parameter 'hidden' is not key=value\n.*separate parameters with '&'"),
        ("softcache:mlp?=3", "parameter '=3' is not key=value"),
        ("softcache:mlp?a=1&a=2", r"parameter 'a' is given twice\n.*keep one"),
    ],
    ids=lambda value: value if len(value) < 24 else "",
)
def test_a_spec_that_cannot_be_parsed_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(text)


def test_what_a_spec_knows_of_itself() -> None:
    factories = ("a.b:f", "file.py:f", "a/b/file.py:f")
    assert [parse_spec(text).is_factory for text in factories] == [True, True, True]
    assert not any(parse_spec(text).is_factory for text in ("digits", "softcache:mlp", "torchvision:MNIST?root=a/b.c"))
    spec = parse_spec("softcache:mlp?hidden=8&dropout=0.5&x=1")
    assert spec.without("hidden", "x") == Spec("softcache:mlp?dropout=0.5", "softcache", "mlp", {"dropout": "0.5"})
    assert spec.without(*spec.parameters).text == "softcache:mlp"
    assert parse_spec("digits?split=test").without("split").text == "digits"


def test_a_portable_spec_names_no_folder_and_has_one_order() -> None:
    assert parse_spec("/home/me/file.py:make?b=2&a=1&root=/data").portable() == "file.py:make?a=1&b=2"
    assert parse_spec("softcache:textcnn?vocabulary=a\\b&width=3").portable() == "softcache:textcnn?width=3"
    assert parse_spec("digits").portable() == "digits"


# ---------------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize(
    ("text", "hint", "wanted"),
    [
        ("a", str, "a"),
        ("a", None, "a"),
        ("a", Any, "a"),
        ("-3", int, -3),
        ("3", float, 3.0),
        ("1e-3", float, 0.001),
        ("True", bool, True),
        ("1", bool, True),
        ("YES", bool, True),
        ("false", bool, False),
        ("0", bool, False),
        ("no", bool, False),
        ("None", int | None, None),
        ("", int | None, None),
        ("4", int | None, 4),
        ("4", int | float, 4),
        ("4.5", int | float, 4.5),
        ("x", int | str, "x"),
        ("1,2", tuple[int, ...], (1, 2)),
        ("1,2", list[int], [1, 2]),
        ("1", tuple[int, ...], (1,)),
        ("", tuple[int, ...], ()),
        ("1,2,", tuple[float, ...], (1.0, 2.0)),
        ("a,b", tuple, ("a", "b")),
        ("a,b", list, ["a", "b"]),
        ("yes,no", tuple[bool, ...], (True, False)),
        ("b", Literal["a", "b"], "b"),
        ("2", Literal[1, 2], 2),
        ("none", Literal["a"] | None, None),
    ],
    ids=str,
)
def test_convert(text: str, hint: Any, wanted: Any) -> None:
    made = convert(text, hint, "here")
    assert made == wanted and type(made) is type(wanted)


@pytest.mark.parametrize(
    ("text", "hint", "message"),
    [
        ("x", int, "here: 'x' is not a whole number"),
        ("1.5", int, "here: '1.5' is not a whole number"),
        ("", int, "here: '' is not a whole number"),
        ("x", float, "here: 'x' is not a number"),
        ("maybe", bool, "here: 'maybe' is not true or false"),
        ("2", bool, "here: '2' is not true or false"),
        ("x", int | float, "here: 'x' is not a whole number or a number"),
        ("x", int | None, "here: 'x' is not a whole number$"),
        ("50%", float | None, "here: '50%' is not a number\n.*a share is written as a number: 0.5$"),
        ("12.5 %", float, "here: '12.5 %' is not a number\n.*: 0.125$"),
        ("0,5", float | None, "here: '0,5' is not a number\n.*numbers are written with a point: 0.5$"),
        ("1,x", tuple[int, ...], "here: 'x' is not a whole number"),
        ("sgdd", Literal["sgd", "adam"], r"here: unknown value 'sgdd'\n.*did you mean 'sgd'"),
        ("x", type(None), "here: takes no value"),
    ],
    ids=str,
)
def test_a_text_of_another_type_is_refused(text: str, hint: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(text, hint, "here")


# -------------------------------------------------------------------------------------------------------------- factories


def build(num_classes: int, width: int = 8, *, rate: float = 0.5, hidden=(8, 8), flag=False, names=("a",), free=None):
    """Some parameters annotated, some known by their default alone."""
    return dict(locals())


class Built:
    """A class is a factory as well: its __init__ decides."""

    kind: str = "not a parameter"

    def __init__(self, width: int, scale: float | None = None) -> None:
        self.width, self.scale = width, scale


def catch_all(width: int, **rest):
    return {"width": width, **rest}


def test_parameters_follow_annotations_then_defaults() -> None:
    given = {"width": "3", "rate": "1", "hidden": "4,5,6", "flag": "yes", "names": "x,y", "free": "7"}
    made = call_factory(build, given, "w", num_classes=10, input_shape=(8, 8))
    assert made == {
        "num_classes": 10,
        "width": 3,
        "rate": 1.0,
        "hidden": (4, 5, 6),
        "flag": True,
        "names": ("x", "y"),
        "free": "7",
    }
    assert isinstance(made["rate"], float)


def test_a_class_is_called_by_its_own_signature() -> None:
    built = call_factory(Built, {"width": "3", "scale": "none"}, "w", num_classes=10)
    assert (built.width, built.scale) == (3, None)
    assert call_factory(Built, {"width": "3", "scale": "2"}, "w").scale == 2.0


def test_the_spec_wins_over_what_is_offered_and_a_catch_all_takes_strings() -> None:
    assert call_factory(build, {"num_classes": "3"}, "w", num_classes=10)["num_classes"] == 3
    made = call_factory(catch_all, {"width": "1", "depth": "2"}, "w", num_classes=10)
    assert made == {"width": 1, "depth": "2"}


def test_a_factory_whose_annotations_cannot_be_resolved_still_works() -> None:
    def odd(width: NotDefinedAnywhere = 3, name: NotDefinedAnywhere = "x"):  # type: ignore[name-defined]  # noqa: F821
        return width, name

    assert call_factory(odd, {"width": "4"}, "w") == (4, "x")


@pytest.mark.parametrize(
    ("factory", "parameters", "message"),
    [
        (build, {"num_classes": "3", "widht": "1"}, r"'w': unknown parameter 'widht'\n.*did you mean 'width'"),
        (build, {}, r"'w': parameter 'num_classes' is missing\n.*add num_classes="),
        (build, {"num_classes": "ten"}, "'w': parameter 'num_classes': 'ten' is not a whole number"),
        (build, {"num_classes": "1", "hidden": "8,x"}, "'w': parameter 'hidden': 'x' is not a whole number"),
        (build, {"num_classes": "1", "flag": "x"}, "'w': parameter 'flag': 'x' is not true or false"),
        (Built, {"width": "wide"}, "'w': parameter 'width': 'wide' is not a whole number"),
        (Built, {"width": "1", "kind": "x"}, "'w': unknown parameter 'kind'"),
        (catch_all, {"depth": "2"}, "'w': parameter 'width' is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_call_that_does_not_fit_is_refused(factory: Any, parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call_factory(factory, parameters, "w")


def test_an_error_inside_a_factory_is_its_own() -> None:
    def broken(width: int):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        call_factory(broken, {"width": "1"}, "w")


def test_a_factory_from_a_module_and_from_a_file(tmp_path: Path) -> None:
    assert load_factory(parse_spec("collections.abc:Mapping")) is __import__("collections.abc").abc.Mapping
    path = tmp_path / "mine.py"
    path.write_text("COUNT = []\nCOUNT.append(1)\n\ndef make(width: int = 3):\n    return width, len(COUNT)\n")
    spec = parse_spec(f"{path}:make?width=5")
    make = load_factory(spec)
    assert load_factory(spec) is make  # imported once
    assert call_factory(make, spec.parameters, spec.text) == (5, 1)
    assert str(path) in user_files() and inspect.getmodule(make) is load_user_file(path)


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.py").write_text(f"def make():\n    return {name!r}\n")
    assert [load_factory(parse_spec(f"{tmp_path}/{name}/same.py:make"))() for name in "ab"] == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "spec", "fault", "message"),
    [
        ("", "none.py:make", ConfigError, r"there is no file .*none.py\n.*current folder"),
        ("def make():\n    pass", "named.py:mack", ConfigError, r"has no factory 'mack'\n.*did you mean 'make'"),
        ("make = 3", "number.py:make", ConfigError, "has no factory 'make'"),
        ("import torch_of_nowhere", "needs.py:make", MissingExtraError, "torch_of_nowhere.*beside"),
        ("1 / 0", "divides.py:make", ConfigError, r"ZeroDivisionError: .*\(divides.py, line 1\)"),
        ("def make(:", "torn.py:make", ConfigError, r"SyntaxError: .*torn.py, line 1"),
    ],
    ids=["no file", "no such name", "not callable", "its own import", "its own error", "its own grammar"],
)
def test_a_file_without_the_factory_is_refused(
    tmp_path: Path, source: str, spec: str, fault: type[Exception], message: str
) -> None:
    file = spec.partition(":")[
        0
    ]  # another in each case: what was imported is not read again, and folders are used again
    if source:
        (tmp_path / file).write_text(source)
    for _ in range(2):  # a broken import is not remembered as a good one
        with pytest.raises(fault, match=f"(?s){message}"):
            load_factory(parse_spec(f"{tmp_path}/{spec}"))


def test_a_module_that_is_not_there_is_told_from_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more_than_there_is.py").write_text("import package_of_nowhere\n")
    (tmp_path / "folder_of_mine").mkdir()
    (tmp_path / "folder_of_mine" / "inner.py").write_text("import package_of_nowhere.deeper\n")
    with pytest.raises(ConfigError, match=r"no module named 'nowhere'\n.*install the package"):
        load_factory(Spec("nowhere.at_all:f", "nowhere.at_all", "f"))
    with pytest.raises(ConfigError, match=r"no module named 'folder_of_mine.other'"):
        load_factory(parse_spec("folder_of_mine.other:f"))
    for scheme in ("needs_more_than_there_is", "folder_of_mine.inner"):
        with pytest.raises(MissingExtraError, match=r"needs the package 'package_of_nowhere'.*\n.*pip install package"):
            load_factory(Spec(f"{scheme}:f", scheme, "f"))


def test_a_stage_may_hold_schedules_with_spaces() -> None:
    found = parse_settings(
        "loss=kd:temperature=linear(8, 2),weight=cosine( 1, 0 ) epochs=5 schedule=warmup(1, cosine)", "x"
    )
    assert found == {
        "loss": ["kd:temperature=linear(8, 2),weight=cosine( 1, 0 )"],
        "epochs": ["5"],
        "schedule": ["warmup(1, cosine)"],
    }
    with pytest.raises(ConfigError, match="x: 'two' is not key=value"):
        parse_settings("loss=kd two", "x")


def test_a_mistake_in_a_loss_of_a_stage_in_a_file_is_told_with_its_place(tmp_path: Path) -> None:
    file = toml(tmp_path, '[[stage]]\nepochs = 1\n[[stage.loss]]\nnam = "kd"\n')
    with pytest.raises(ConfigError, match=r"settings.toml: stage: loss: a table needs a name"):
        train(file=file)


# ---- the files beside a user's file --------------------------------------------------------------------------------------


def with_helper(folder: Path, name: str, value: str) -> str:
    """A factory whose file imports the one beside it when it is imported, and another one when it is called."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(
        f"from {name}_helper import VALUE\n\n\ndef make():\n    import {name}_late\n\n    return VALUE, {name}_late.VALUE\n"
    )
    for helper in (f"{name}_helper", f"{name}_late"):
        (folder / f"{helper}.py").write_text(f"VALUE = {value!r}\n\n\nclass Kept:\n    pass\n")
    return f"{folder}/{name}.py:make"


def test_a_file_imports_the_files_beside_it(tmp_path: Path) -> None:
    spec, before = parse_spec(with_helper(tmp_path / "a", "besides", "a")), [*sys.path]
    assert call_factory(load_factory(spec), {}, spec.text) == ("a", "a")
    assert sys.path == before


def test_two_files_do_not_get_one_anothers_neighbours(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for folder in (one, same):  # equal files are one module
        spec = parse_spec(with_helper(folder, "twins", "1"))
        assert call_factory(load_factory(spec), {}, spec.text) == ("1", "1")
    before = [*sys.path]
    with pytest.raises(ConfigError, match=r"two different modules are called 'twins_helper'[\s\S]*rename one"):
        load_factory(parse_spec(with_helper(other, "twins", "2")))
    assert sys.path == before and sys.modules["twins_helper"].VALUE == "1"


def test_an_error_in_a_neighbour_is_told_with_its_place(tmp_path: Path) -> None:
    spec = with_helper(tmp_path / "a", "broken", "a")
    (tmp_path / "a" / "broken_helper.py").write_text("\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"cannot be imported: ZeroDivisionError: .*\(broken_helper.py, line 2\)"):
        load_factory(parse_spec(spec))


UNPICKLED = """
import pickle, sys
from softcache.spec import load_user_file
load_user_file(sys.argv[1])
before = list(sys.path)
print(type(pickle.loads(bytes.fromhex(sys.argv[2]))).__module__)
"""


def test_a_worker_that_is_spawned_unpickles_what_a_neighbour_defines(tmp_path: Path) -> None:
    """As the loader's workers do it: the file is imported first."""
    spec = parse_spec(with_helper(tmp_path / "a", "spawned", "a"))
    load_factory(spec)
    kept = pickle.dumps(sys.modules["spawned_helper"].Kept()).hex()
    done = subprocess.run(
        [sys.executable, "-c", UNPICKLED, spec.scheme, kept], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "spawned_helper\n", done.stderr


@pytest.mark.parametrize("text", ["x" * 2**17, "a\0b", "softcache:mlp?hidden=" + "4," * 2**16])
def test_a_spec_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no name: it has [\d,]+ characters"):
        parse_spec(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = " + b"[" * 50_000, "nested too deeply"),
        (b"#" + b"x" * 2**24, "has more than 16,777,216 bytes"),
        (b"\xff", "not TOML"),
    ],
)
def test_a_settings_file_is_bounded(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "c.toml").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"c.toml: (is )?{message}"):
        train(file=str(tmp_path / "c.toml"))


def test_settings_of_a_stage_stand_apart_by_spaces() -> None:
    for text in ("epochs=3;lr=1", "epochs=3,lr=1", "loss=kd,epochs=2"):
        with pytest.raises(ConfigError, match=r"settings stand apart by spaces\n.*write 'epochs=5 lr=0.01 loss=kd'"):
            parse_settings(text, "--stage 1")
    assert parse_settings("loss=kd:temperature=4,weight=1 epochs=2", "") == {
        "loss": ["kd:temperature=4,weight=1"],
        "epochs": ["2"],
    }
