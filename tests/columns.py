"""Stand-ins for tables of other packages, as far as a join can tell: Hugging Face's `datasets.Dataset`, and pandas' DataFrame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class ClassLabel:
    """The type of a column of class indices."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)


class Column(Sequence[Any]):
    """What `data_set["name"]` gives since version 4: read only where it is asked for."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return list(self._values[index]) if isinstance(index, slice) else self._values[index]


class HuggingFace:
    """A `datasets.Dataset`: columns with types, rows as dicts, a format that its rows go through."""

    def __init__(self, features: dict[str, Any], columns: dict[str, Sequence[Any]]) -> None:
        self.features, self._columns = features, columns
        self._transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self.read_at_once: list[int] = []  # how many rows each batched reading took

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return Column(self._columns[index])
        if isinstance(index, slice):
            return {name: list(values[index]) for name, values in self._columns.items()}
        row = {name: values[index] for name, values in self._columns.items()}
        return row if self._transform is None else self._transform(row)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.read_at_once.append(len(indices))
        return [self[index] for index in indices]

    def with_format(self, kind: str | None) -> HuggingFace:
        assert kind is None
        return HuggingFace(self.features, self._columns)

    def select_columns(self, names: list[str]) -> HuggingFace:
        return HuggingFace(self.features, {name: self._columns[name] for name in names})

    def set_transform(self, transform: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._transform = transform


class HuggingFaceStream:
    """A `datasets.IterableDataset`: it has columns too, and no length."""

    def __init__(self, of: HuggingFace) -> None:
        self.features, self.column_names, self._of = of.features, of.column_names, of

    def __getitem__(self, name: str) -> Any:
        return self._of[name]

    def __iter__(self) -> Any:
        return (self._of[i] for i in range(len(self._of)))


class Frame:
    """A DataFrame: `frame[name]` is a column, rows are at `iloc`."""

    class _Series:
        def __init__(self, values: dict[str, Any] | list[Any]) -> None:
            self._values, self.dtype = values, object

        def tolist(self) -> list[Any]:
            return list(self._values)

        def items(self) -> Any:
            assert isinstance(self._values, dict)
            return self._values.items()

    class _Rows:
        def __init__(self, columns: dict[str, list[Any]]) -> None:
            self._columns = columns

        def __getitem__(self, index: int) -> Frame._Series:
            return Frame._Series({name: values[index] for name, values in self._columns.items()})

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns, self.columns, self.iloc = columns, list(columns), Frame._Rows(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name: str) -> Frame._Series:
        return Frame._Series(self._columns[name])
