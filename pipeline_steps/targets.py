"""What is learned: named targets, each with its classes, read from the label columns of the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline_steps import params
from pipeline_steps.errors import PleatError


@dataclass(frozen=True)
class Target:
    """One target of a data set.

    Attributes:
        name: as in params.yaml.
        multilabel: whether a sample has any number of its classes, instead of exactly one.
        columns: of the data, in which its labels stand.
        classes: sorted; a network's outputs are in this order.
    """

    name: str
    multilabel: bool
    columns: list[str]
    classes: list[str]

    def labels(self, rows: pd.DataFrame) -> pd.Series:
        """Of each row: its class, or the sorted list of its classes where there may be several."""
        if not self.multilabel:
            return rows[self.columns[0]]
        return pd.Series([sorted(set(labels)) for labels in rows[self.columns].to_numpy()], rows.index, dtype=object)

    def codes(self, rows: pd.DataFrame) -> npt.NDArray[np.int64]:
        """Class indices (n,), or whether each class applies (n, n_classes) as 0 and 1.

        Raises:
            PleatError: a row has a label that is none of the classes.
        """
        number = {name: code for code, name in enumerate(self.classes)}
        found = rows[self.columns].to_numpy(dtype=object)
        strange = sorted({label for label in found.ravel() if label not in number})
        if strange:
            raise PleatError(
                f"Target {self.name} has no class {', '.join(strange)}; its classes are {', '.join(self.classes)}."
            )
        codes = np.array([[number[label] for label in row] for row in found], dtype=np.int64).reshape(found.shape)
        if not self.multilabel:
            return codes[:, 0]
        applies = np.zeros((len(rows), len(self.classes)), dtype=np.int64)
        np.put_along_axis(applies, codes, 1, axis=1)
        return applies


def label_columns(targets: Mapping[str, params.Target]) -> list[str]:
    """The columns that hold labels of these targets, each once."""
    return list(dict.fromkeys(column for name, target in targets.items() for column in target.columns(name)))


def of(targets: Mapping[str, params.Target], rows: pd.DataFrame) -> list[Target]:
    """The targets of params.yaml with the classes that these rows have.

    Raises:
        PleatError: two columns of one multilabel target share a class, or it has one class alone.
    """
    found = []
    for name, target in targets.items():
        columns = target.columns(name)
        _check_distinct(name, columns, rows)
        classes = sorted(set(rows[columns].to_numpy(dtype=object).ravel()))
        if target.kind == "multilabel" and len(classes) < 2:
            raise PleatError(f"Target {name} has only the class {', '.join(classes)}; it needs at least two.")
        found.append(Target(name, target.kind == "multilabel", columns, classes))
    return found


def _check_distinct(name: str, columns: Sequence[str], rows: pd.DataFrame) -> None:
    seen: dict[str, str] = {}
    for column in columns:
        for label in rows[column].unique():
            if label in seen:
                raise PleatError(
                    f"Target {name} joins the columns {seen[label]} and {column}, but both have the class '{label}'; "
                    "make each column a target of its own."
                )
        seen |= dict.fromkeys(rows[column].unique(), column)
