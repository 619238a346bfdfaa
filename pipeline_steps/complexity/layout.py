"""Where rows and columns of the image are after an operation that only moves values: views, copies, padding, slices."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor

from pipeline_steps.complexity.field import Field, Reach, merge

SAME = {"clone", "alias", "detach", "_to_copy", "copy", "lift_fresh", "as_strided", "fill", "zero"}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}


def moved(
    name: str, arguments: tuple[Any, ...], field: Field, known: Sequence[Field], made: Sequence[Tensor]
) -> list[Field]:
    """The fields of the outputs `made` of a view or copy `name`; arguments as of `receptive_field.through`."""
    output = made[0]
    if name in ("cat", "stack"):
        return [_joined(name, arguments, known, output)]
    values = arguments[0]
    if field.rows is None or field.axes is None:
        return [field] * len(made)
    if name == "as_strided" and output.shape != values.shape:
        return [field.unknown(name)]
    if name in SAME or name == "expand":
        shift = output.dim() - values.dim()
        return [field.on((field.axes[0] + shift, field.axes[1] + shift))]
    if name in RESHAPES:
        return [_reshaped(field, tuple(values.shape), tuple(output.shape))]
    if name in ("permute", "transpose", "t"):
        return [_permuted(name, field, arguments, values.dim())]
    if name in ("unsqueeze", "squeeze", "select", "unbind"):
        return [_dimension_changed(name, field, arguments, output)] * len(made)
    if name in ("split", "split_with_sizes", "unsafe_split", "unsafe_chunk"):
        dim = int(arguments[2]) % values.dim() if len(arguments) > 2 else 0
        return [field.unknown(name) if dim in field.axes else field] * len(made)
    if name == "slice":
        return [_sliced(field, arguments, output)]
    if name in ("constant_pad_nd", "reflection_pad2d", "replication_pad2d"):
        return [_padded(field, list(arguments[1]), output)]
    return [field.unknown(name)] * len(made)


def _joined(name: str, arguments: tuple[Any, ...], known: Sequence[Field], output: Tensor) -> Field:
    joined = merge(known)
    if joined.axes is None:
        return joined
    dim = (int(arguments[1]) if len(arguments) > 1 else 0) % output.dim()
    if name == "stack":
        rows, columns = (axis + (axis >= dim) for axis in joined.axes)
        return joined.on((rows, columns))
    return joined.unknown("positions joined to others") if dim in joined.axes else joined


def _reshaped(field: Field, old: tuple[int, ...], new: tuple[int, ...]) -> Field:
    """Finds rows and columns again by their length and by how many values lie between two neighbours."""
    assert field.axes is not None
    assert field.rows is not None
    assert field.columns is not None
    lengths = field.rows.size, field.columns.size

    def find(length: int, inner: int, taken: int = -1) -> int | None:
        places = (at for at, size in enumerate(new) if size == length and prod(new[at + 1 :]) == inner and at != taken)
        return next(places, None)

    inner = [prod(old[axis + 1 :]) for axis in field.axes]
    flattened = field.axes[0] == field.axes[1]
    columns = find(lengths[1], inner[1])
    rows = None if columns is None else find(lengths[0], inner[1] * lengths[1] if flattened else inner[0], columns)
    if rows is not None and columns is not None:
        return field.on((rows, columns))
    neighbours = flattened or field.axes[1] == field.axes[0] + 1
    flat = find(lengths[0] * lengths[1], inner[1]) if neighbours else None
    if flat is not None and prod(lengths) > 1:
        return field.on((flat, flat))
    if max(new) == prod(new):
        return field.everywhere("flattened into one vector")
    return field.unknown("positions cut into groups")


def _permuted(name: str, field: Field, arguments: tuple[Any, ...], rank: int) -> Field:
    assert field.axes is not None
    order = list(range(rank))
    if name == "permute":
        order = [int(dim) % rank for dim in arguments[1]]
    else:
        one, two = (0, 1) if name == "t" else (int(arguments[1]) % rank, int(arguments[2]) % rank)
        if rank > 1:
            order[one], order[two] = order[two], order[one]
    return field.on((order.index(field.axes[0]), order.index(field.axes[1])))


def _dimension_changed(name: str, field: Field, arguments: tuple[Any, ...], output: Tensor) -> Field:
    assert field.axes is not None
    values = arguments[0]
    if name == "unsqueeze":
        dim = int(arguments[1]) % output.dim()
        return field.on((field.axes[0] + (field.axes[0] >= dim), field.axes[1] + (field.axes[1] >= dim)))
    asked: Any = arguments[1] if len(arguments) > 1 else (list(range(values.dim())) if name == "squeeze" else 0)
    gone = {int(dim) % values.dim() for dim in (asked if isinstance(asked, list | tuple) else [asked])}
    if name == "squeeze":
        gone = {dim for dim in gone if values.shape[dim] == 1}
    if gone & set(field.axes):
        return field.everywhere("flattened into one vector") if name == "squeeze" else field.unknown(name)
    return field.without(gone)


def _sliced(field: Field, arguments: tuple[Any, ...], output: Tensor) -> Field:
    values, dim, start, _, step = (*arguments, *(None,) * 5)[:5]
    dim = int(dim or 0) % values.dim()
    assert field.axes is not None
    if dim not in field.axes or output.shape[dim] == values.shape[dim]:
        return field
    if field.axes[0] == field.axes[1]:
        return field.unknown("slice")
    start, step = int(start or 0), int(step or 1)
    start += values.shape[dim] if start < 0 else 0
    return _along(field, dim, lambda reach: reach.window(1, step, -start, 1, output.shape[dim]))


def _padded(field: Field, amounts: list[int], output: Tensor) -> Field:
    """`amounts` are before and after the last dimension, then the one before it, and so on."""
    assert field.axes is not None
    if field.axes[0] == field.axes[1]:
        return field.unknown("padding")
    for place in range(0, len(amounts), 2):
        dim = output.dim() - 1 - place // 2
        before = int(amounts[place])
        if dim in field.axes:
            field = _along(
                field,
                dim,
                lambda reach, n=before, to=dim: reach.window(1, 1, n, 1, output.shape[to]),  # type: ignore[misc]
            )
    return field


def _along(field: Field, dim: int, change: Any) -> Field:
    assert field.axes is not None
    name = "rows" if field.axes[0] == dim else "columns"
    reach: Reach = getattr(field, name)
    return replace(field, **{name: change(reach)})
