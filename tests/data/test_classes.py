"""Whose classes are these? By name, value, number, WordNet id, or a declared map; and what is refused."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import needs
from torch.utils.data import ConcatDataset, Subset

from softcache.data.classes import (
    Match,
    check_classes,
    class_indices,
    dataset_classes,
    match_classes,
    read_classes_map,
    told_apart,
)
from softcache.data.imagenet import ilsvrc_ids
from softcache.data.transfer_set import open_transfer_set, under_classes
from softcache.errors import ClassMismatchError, DataError, ModelError, SoftcacheError

IDS = ilsvrc_ids()
IMAGENETTE = ("n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413")


def words() -> list[str]:
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def columns(own: Any, names: Any, classes_map: dict[str, str] | None = None) -> list[int] | None:
    found = match_classes("m", own, names, classes_map).columns
    return None if found is None else list(found)


# ---------------------------------------------------------------------------------------------------------- a model and its data


@pytest.mark.parametrize(
    ("own", "names", "wanted", "how"),
    [
        pytest.param(None, "abc", None, "by position: it names no classes", id="nothing to compare"),
        pytest.param("abc", "abc", None, "by name", id="the same"),
        pytest.param("cab", "abc", [1, 2, 0], "by name", id="another order"),
        pytest.param("xcyab", "abc", [3, 4, 1], "by name", id="some of them"),
        pytest.param("12345", "12345", None, "by name", id="stars"),
        pytest.param(["3.0", "1.0", "2.0"], "123", [1, 2, 0], "by value", id="whole floats"),
        pytest.param(["False", "True"], "10", [1, 0], "by value", id="truth values"),
        pytest.param(["1", "2", "10"], ["01", "02", "10"], None, "by value", id="padded"),
        pytest.param(["Bee", " ant"], ["ant", "bee"], [1, 0], "by name, but for case and spaces", id="case"),
        pytest.param(
            ["été", "hiver"], ["hiver", "e\u0301te\u0301"], [1, 0], "by name, but for case and spaces", id="NFC"
        ),
        pytest.param("012", "abc", None, "by number: one of the two lists only counts", id="a model that counts"),
        pytest.param("201", "abc", [1, 2, 0], "by number: one of the two lists only counts", id="it counts otherwise"),
        pytest.param("abc", "012", None, "by number: one of the two lists only counts", id="data that counts"),
        pytest.param("210", "012", [2, 1, 0], "by name", id="numbers are names where both have them"),
    ],
)
def test_how_lists_are_matched(own: Any, names: Any, wanted: list[int] | None, how: str) -> None:
    found = match_classes("m", own, list(names))
    assert (None if found.columns is None else list(found.columns), found.how) == (wanted, how)
    assert found.outputs == len(own or names)


@pytest.mark.parametrize(
    ("own", "names", "message"),
    [
        pytest.param("abd", "abc", "knows other classes than the data has, for example 'd'", id="other names"),
        pytest.param("abcdef", "abg", "knows 6 classes, and of the data's not 'g'", id="not among more"),
        pytest.param("ab", "abc", "2 classes where the data has 3: for example 'c'", id="fewer"),
        pytest.param("0123456789", "01234", "10 classes where the data has 5", id="numbers alone name nothing"),
        pytest.param("12345", "01234", "for example '5'", id="numbers that count from another number"),
        pytest.param(["a", "A"], ["a", "á"], "knows other classes", id="letters that differ by more than case"),
        pytest.param(["Bee", "bee", "ant"], ["BEE", "ant", "x"], "knows other classes", id="case that tells two apart"),
        pytest.param(
            ["tench", "chain saw"], ["n01440764", "n03000684"], "for example 'tench'", id="words of a few, ids"
        ),
        pytest.param(["n01440764", "n00000001"], ["tench", "x"], "knows other classes", id="ids, words of nobody"),
    ],
)
def test_lists_that_do_not_match_are_refused(own: Any, names: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        match_classes("m", list(own), list(names))
    assert "--classes-map" in caught.value.tip


def test_labels_that_count_from_one_are_suspected_where_class_0_has_no_column() -> None:
    with pytest.raises(ModelError, match="for example '0'") as caught:
        match_classes("m", list("12345"), list("012345"))
    assert "count from 1" in caught.value.tip


def test_the_choice_is_no_permutation_and_the_order_is_one() -> None:
    assert match_classes("m", list("cab"), list("abc")).permutation == [1, 2, 0]
    choice = match_classes("m", list("xcab"), list("abc"))
    assert (choice.permutation, choice.is_choice, choice.outputs) == (None, True, 4)
    first = match_classes("m", list("abcd"), list("abc"))  # the first columns are a choice too
    assert (first.permutation, first.is_choice, first.columns) == (None, True, (0, 1, 2))
    assert Match(None, 3, "").permutation is None


# ---------------------------------------------------------------------------------------------------------------------- ImageNet


def test_the_table_of_ids_is_ilsvrcs() -> None:
    assert len(IDS) == len(set(IDS)) == 1000 and list(IDS) == sorted(IDS)
    assert (IDS[0], IDS[134], IDS[517], IDS[999]) == ("n01440764", "n02012849", "n03126707", "n15075141")
    assert (files("softcache") / "data/ilsvrc2012.txt").is_file()


@pytest.mark.slow
@needs("timm", "timm")
def test_the_table_is_timms() -> None:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    assert tuple(info.label_names()) == IDS
    assert columns(words(), [info.index_to_description(i) for i in range(1000)]) is None  # words, in their long form
    assert columns(info.label_names(), words()) is None


def test_imagenets_words_are_exactly_ilsvrcs_ids() -> None:
    said = words()
    assert columns(said, IDS) is None is columns(IDS, said)
    assert match_classes("m", said, IDS).how == "by WordNet id"
    assert columns(said, IDS[::-1]) == list(range(1000))[::-1]
    assert columns(said, IMAGENETTE) == [IDS.index(one) for one in IMAGENETTE]  # data of some of them
    more = [*sorted({"n00001740", *IDS})]
    assert columns(more, said) == [more.index(one) for one in IDS]  # a teacher of more ids
    for wrong in (
        ["n00001740", *IDS[1:]],  # an id that is none of them
        [*IMAGENETTE, "n99999999"],
        ["tench", "cane"],  # a word that is none
        ["crane", "tench, Tinca tinca"],  # a bird, or a machine?
    ):
        with pytest.raises(ModelError, match="knows"):
            match_classes("m", said, wrong)
    with pytest.raises(ModelError, match="other classes"):
        match_classes("m", [*said[1:], said[0]], IDS)  # the words in another order than ILSVRC's are not its list
    with pytest.raises(ModelError, match="other classes"):
        match_classes("m", ["dog", "cat", "cow"], ["n02084071", "n02121620", "n01887787"])


def test_words_of_some_classes_may_name_synonyms() -> None:
    names = ["tench, Tinca tinca", "chain saw, chainsaw", "golf ball"]
    assert columns(words(), names) == [IDS.index("n01440764"), IDS.index("n03000684"), IDS.index("n03445777")]


def test_two_classes_called_crane_are_told_apart_on_both_sides() -> None:
    theirs = SimpleNamespace(
        classes=[("tench", "Tinca tinca"), ("crane",), ("crane",), ("maillot",), ("maillot", "tank suit")]
    )
    assert dataset_classes(theirs) == ("tench, Tinca tinca", "crane", "crane (2)", "maillot", "maillot, tank suit")
    assert told_apart(["crane", "crane", "x", "crane"]) == ("crane", "crane (2)", "x", "crane (3)")
    long = words()
    long[134], long[639] = "crane", "maillot, tank suit"  # as torchvision's data set has them
    assert columns(words(), told_apart(long)) is None
    assert columns(["crane", "crane", "x"], ["x", "crane (2)", "crane"]) == [2, 1, 0]


# ----------------------------------------------------------------------------------------------------------------- declared maps


def test_a_map_says_which_class_is_which(tmp_path: Path) -> None:
    path = tmp_path / "map.tsv"
    path.write_bytes("\ufeffgood\tpositive\r\nbad\tnegative\n\n".encode())
    found = read_classes_map(path)
    assert found == {"good": "positive", "bad": "negative"} and read_classes_map(None) == {}
    assert columns(["negative", "neutral", "positive"], ["bad", "good"], found) == [0, 2]
    match = match_classes("m", ["negative", "positive"], ["good", "bad"], found)
    assert (match.columns, match.permutation, match.declared, match.how) == ((1, 0), [1, 0], True, "by --classes-map")
    assert columns(["a", "b", "c"], ["b", "x", "c"], {"x": "a"}) == [1, 0, 2]  # the others keep their names
    assert columns(["a", "b"], ["a", "b"], {"a": "b", "b": "a"}) == [1, 0]  # a line wins over the name
    assert columns(None, ["x", "y"], {"x": "7", "y": "3"}) == [7, 3]  # a model that names no classes: its outputs
    assert match_classes("m", None, ["x", "y"], {"x": "7", "y": "3"}).outputs is None
    assert (
        columns(["bad", "good"], ["bad", "good"], {"good": "positive", "bad": "negative"}) is None
    )  # not about this one


@pytest.mark.parametrize(
    ("own", "classes_map", "error", "message"),
    [
        (["a", "b"], {"z": "a"}, DataError, "the data has no class 'z'"),
        (["a", "b", "q"], {"x": "a", "y": "c"}, ModelError, "has no class 'c': --classes-map calls it so"),
        (["a", "b"], {"x": "a"}, ModelError, "has no class 'y': and it has no line"),
        (["a", "b"], {"x": "a", "y": "a"}, ModelError, "gives class 'y' an output of m that another class has"),
        (["a", "b"], {"x": "0", "y": "2"}, ModelError, "has no class '2'"),
        (None, {"x": "0"}, ModelError, "no line for class 'y', and m names no classes"),
        (None, {"x": "a", "y": "b"}, ModelError, "has no class 'a'"),
    ],
)
def test_maps_that_fit_nobody(own: Any, classes_map: dict[str, str], error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error, match=message):
        match_classes("m", own, ["x", "y"], classes_map)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat dog\n", "line 1: is not one class, a tab, another class"),
        ("cat\tdog\tcow\n", "line 1: is not"),
        ("cat\t\n", "line 1: is not"),
        ("cat\tdog\ncat\tcow\n", "line 2: class 'cat' stands there twice"),
        ("\n", "holds no line"),
    ],
)
def test_maps_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes_map(tmp_path / "map.tsv")
    with pytest.raises(DataError, match="cannot be read as a map"):
        read_classes_map(tmp_path / "none.tsv")


# --------------------------------------------------------------------------------------------------------- two lists of one data


def named(*names: str, count: int = 2) -> Any:
    return SimpleNamespace(class_names=names, __len__=lambda: count)


def test_a_cache_that_only_counts_is_matched_by_number_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Set(list[int]):
        class_names = ("neg", "pos")

    check_classes(ConcatDataset([Subset(Set([1, 2]), [0]), Set([3])]), ("0", "1"))  # what 0.4.0 wrote of a nameless set
    assert capsys.readouterr().err.count("matched by number") == 1
    check_classes(named("0", "1"), ("neg", "pos"), "the run")
    check_classes(named("a", "b"), ("x", "y"), classes_map={"a": "x", "b": "y"})
    check_classes(named("a", "b"), ("a", "b"))
    assert capsys.readouterr().err.count("matched by number") == 1
    for names in (("1", "2"), ("1", "0"), ("0", "1", "2"), ("neg", "1")):
        with pytest.raises(ClassMismatchError):
            check_classes(named(*names), ("0", "1"))
    with pytest.raises(ClassMismatchError, match="another class list") as caught:
        check_classes(named("a", "b"), ("a", "c"))
    assert "--classes-map" in caught.value.tip


def test_data_that_lacks_classes_comes_under_the_whole_list(tmp_path: Path) -> None:
    (tmp_path / "few.tsv").write_text("a\tdog\nb\tant\nc\tdog\n")
    few = open_transfer_set(f"tsv:{tmp_path / 'few.tsv'}").select(np.array([2, 1]))
    whole = under_classes(few, ("ant", "bee", "dog", "elk"), "x")
    assert whole.labels.tolist() == [2, 0] and whole.class_names == ("ant", "bee", "dog", "elk")
    assert whole.whole.labels.tolist() == [2, 0, 2] and list(whole.keys) == list(few.keys)
    renamed = under_classes(few, ("Ameise", "Biene", "Hund"), "x", {"ant": "Ameise", "dog": "Hund"})
    assert renamed.labels.tolist() == [2, 0]
    assert under_classes(few, ("ant", "dog"), "x") is few
    for names in (("dog", "bee", "ant"), ("ant", "bee"), ("ant",)):
        with pytest.raises(ClassMismatchError):
            under_classes(few, names, "x")


# ---------------------------------------------------------------------------------------------------------------- chosen by name


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (["a", "b", "c", "d"], ["1-2"], [1, 2]),
        (["0", "1", "2", "3"], ["0-2"], [0, 1, 2]),
        (["1", "2", "3"], ["1-3"], [0, 1, 2]),  # places cannot be meant
        (["1", "2", "3"], ["2"], [1]),
        (["1", "2", "3"], ["0"], [0]),  # no name: the place
        (["0-2", "1", "2"], ["0-2"], [0]),
        (["tench, Tinca tinca", "x"], ["tench, Tinca tinca"], [0]),
        (["10", "20", "30"], ["15-35"], [1, 2]),
    ],
)
def test_classes_and_ranges_of_them(names: list[str], wanted: list[str], found: list[int]) -> None:
    assert class_indices(names, wanted) == found


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["0", "1", "10", "2"], "0-2", r"0, 1, 10, with these numbers 0, 1, 2"),  # folders, in alphabetical order
        (["1", "2", "3"], "0-2", r"stand 1, 2, 3, with these numbers 1, 2"),
        (["1", "2", "3"], "1-2", r"stand 2, 3, with these numbers 1, 2"),
        (["2020", "2021"], "0-1", r"with these numbers none"),
        (["1", "2", "3"], "7-9", "no class '7-9' among 3"),
        (["a", "b"], "0-2", "no class '0-2' among 2"),
        (["a", "b"], "1-0", "no class '1-0'"),
    ],
)
def test_ranges_that_may_count_names_or_places_are_refused(names: list[str], wanted: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_indices(names, [wanted])
