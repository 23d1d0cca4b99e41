"""Each estimator's natural form of output becomes one column per class; what it decides itself is known."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from softcache.errors import ModelError, TeacherError
from softcache.models.estimators import Callee, callee_of

pytest.importorskip("sklearn", reason="needs the extra softcache[demo]")

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(90, 5))
Y3, Y2 = X[:, :3].argmax(axis=1), (X[:, 0] > 0).astype(int)
MANY = (X[:, :3] > 0).astype(int)


def logistic(y: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression().fit(X, y)


def linear_svc(y: Any) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC().fit(X, y)


def svc(y: Any, shape: str = "ovo") -> Any:
    from sklearn.svm import SVC

    return SVC(decision_function_shape=shape, break_ties=shape == "ovr").fit(X, y)


def forest(y: Any) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(5, random_state=0).fit(X, y)


def piped(y: Any) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), svc(y)).fit(X, y)


def searched(y: Any) -> Any:
    from sklearn.model_selection import GridSearchCV

    return GridSearchCV(svc(y), {"C": [1.0]}, cv=2).fit(X, y)


def rest(y: Any) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    return OneVsRestClassifier(LogisticRegression()).fit(X, y)


def called(made: Any, *, output: str | None = None, multi_label: bool = False) -> Callee:
    return callee_of(made, "file.py:made", output=output, multi_label=multi_label)


FOUR = np.digitize(X[:, 0], [-0.7, 0.0, 0.7])


@pytest.mark.parametrize(
    ("made", "y", "kind"),
    [
        pytest.param(logistic, Y3, "probs", id="predict_proba"),
        pytest.param(logistic, Y3 + 1, "probs", id="integers from one"),
        pytest.param(logistic, np.array(["c", "a", "b"])[Y3], "probs", id="names"),
        pytest.param(logistic, Y2.astype(bool), "probs", id="truth values"),
        pytest.param(logistic, Y3 + 1.0, "probs", id="whole floats"),
        pytest.param(linear_svc, Y3, "logits", id="decision_function"),
        pytest.param(linear_svc, Y2, "logits", id="one number for two classes"),
        pytest.param(svc, FOUR, "logits", id="a column for each pair"),
        pytest.param(svc, Y3, "logits", id="three pairs of three classes"),
        pytest.param(piped, Y3, "logits", id="pairs in a pipeline"),
        pytest.param(searched, Y3, "logits", id="pairs in a search"),
        pytest.param(lambda y: svc(y, "ovr"), FOUR, "logits", id="one against the rest"),
        pytest.param(forest, Y3, "probs", id="a forest"),
        pytest.param(lambda y: logistic(y).predict_proba, Y3 + 1, "probs", id="the method alone"),
        pytest.param(lambda y: linear_svc(y).decision_function, Y2, "logits", id="the other method alone"),
    ],
)
def test_the_largest_column_is_what_the_estimator_decides(made: Callable[[Any], Any], y: np.ndarray, kind: str) -> None:
    """Its own predict is the oracle: by its values, which are the class names, and by the column."""
    one = called(fitted := made(y))
    columns = np.asarray(one.run(X))
    owner = getattr(fitted, "__self__", fitted)
    assert one.output == kind and one.classes == tuple(map(str, np.unique(y).tolist()))
    assert columns.shape == (len(X), len(one.classes))
    assert [one.classes[i] for i in columns.argmax(axis=1)] == [str(value) for value in owner.predict(X).tolist()]
    assert one.decide is not None
    np.testing.assert_array_equal(one.decide(X), columns.argmax(axis=1))


def test_pairs_are_joined_as_scikit_learn_joins_them() -> None:
    np.testing.assert_allclose(called(svc(FOUR)).run(X), svc(FOUR, "ovr").decision_function(X))


def test_two_classes_get_two_columns_with_the_same_difference() -> None:
    one = logistic(Y2)
    margin = one.decision_function(X)
    columns = called(one, output="logits").run(X)
    np.testing.assert_allclose(np.diff(columns, axis=1)[:, 0], margin)
    np.testing.assert_allclose(np.exp(columns)[:, 1] / np.exp(columns).sum(axis=1), one.predict_proba(X)[:, 1])
    np.testing.assert_allclose(called(one, output="log_probs").run(X), np.log(one.predict_proba(X)))
    flat = SimpleNamespace(classes_=np.arange(2), predict_proba=lambda x: x[:, :1])  # a network of one output
    np.testing.assert_allclose(called(flat).run(np.array([[0.25], [1.0]])), [[0.75, 0.25], [0.0, 1.0]])


@pytest.mark.parametrize("made", [forest, rest], ids=["a list of arrays", "one array"])
def test_several_labels_get_the_column_of_their_one(made: Callable[[Any], Any]) -> None:
    fitted = made(MANY)
    one = called(fitted, multi_label=True)
    columns = np.asarray(one.run(X))
    assert columns.shape == MANY.shape and one.output == "probs"
    np.testing.assert_array_equal(columns > 0.5, fitted.predict(X) > 0)
    assert one.decide is None


def test_a_label_that_nobody_had_is_never_there() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = called(forest(np.stack([Y2, np.zeros_like(Y2), np.ones_like(Y2)], axis=1)), multi_label=True)
    columns = np.asarray(one.run(X))
    assert columns[:, 1].max() == 0 and columns[:, 2].min() == 1


def test_what_gives_no_columns_is_refused() -> None:
    with pytest.raises(TeacherError, match="gives 3 answers to each sample"):
        called(forest(MANY)).run(X)
    with pytest.raises(ModelError, match="returned the `predict` of LogisticRegression"):
        called(logistic(Y3).predict)
    with pytest.raises(ModelError, match="neither is callable"):
        called(object())


def test_functions_are_taken_as_they_are() -> None:
    def plain(batch: np.ndarray) -> np.ndarray:
        return batch[:, :2]

    one = called(plain)
    assert (one.run, one.output, one.classes, one.decide) == (plain, "logits", None, None)
    assert called(plain, output="probs").output == "probs"
    own = SimpleNamespace(predict=lambda x: np.array([1, 0]), decision_function=lambda x: x)  # it counts its columns
    assert called(own).decide(X).tolist() == [1, 0]  # type: ignore[misc, union-attr]
    words = SimpleNamespace(predict=lambda x: np.array(["yes"]), decision_function=lambda x: x)
    assert called(words).decide(X) is None  # type: ignore[misc]
