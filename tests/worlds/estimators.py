"""Teachers that are no modules: estimators with some of scikit-learn's methods, and functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

Function = Callable[[np.ndarray], np.ndarray]


class Estimator:
    def __init__(self, classes_: Any = None, **methods: Any) -> None:
        self.__dict__.update(methods)
        if classes_ is not None:
            self.classes_ = classes_


def proba() -> Estimator:
    return Estimator(classes_=np.arange(3), predict_proba=lambda x: np.full((len(x), 3), 1 / 3))


def decision() -> Estimator:
    return Estimator(decision_function=lambda x: x[:, :3])


def both() -> Estimator:
    return Estimator(predict_proba=lambda x: np.full((len(x), 3), 1 / 3), decision_function=lambda x: x[:, :3])


def plain() -> Function:
    return lambda x: x[:, :3]


def other_classes() -> Estimator:
    return Estimator(classes_=np.array([0, 1, 4]), predict_proba=lambda x: x)


def named() -> Estimator:
    return Estimator(classes_=np.array(["c", "a", "b"]), predict_proba=lambda x: x)


def unfit() -> object:
    return object()


def module(num_classes: int) -> nn.Linear:
    return nn.Linear(5, num_classes)
