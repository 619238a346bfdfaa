"""The theoretical receptive field of every value in a network, followed from operation to operation.

Each output position i of a layer depends on the input pixels from jump * i + low to jump * i + high. A window of size
k, stride s, padding p and dilation d turns that into low - p * jump, high + (d * (k - 1) - p) * jump and jump * s, so
the size high - low + 1 is r0 = sum((k_l - 1) * product of the strides before l) + 1 (Araujo, Norris and Sim, "Computing
Receptive Fields of Convolutional Neural Networks", 2019). Where branches meet, the union counts.

What mixes all positions (global pooling, squeeze-and-excitation, attention, normalisation over positions, fully
connected layers) sees the whole image. That is noted beside the local field and does not change it; a value that comes
from such a layer alone has no local field.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor

from pipeline_steps.complexity.field import Field, merge
from pipeline_steps.complexity.layout import moved
from pipeline_steps.complexity.operations import (
    REDUCTIONS,
    SOFTMAX,
    WINDOWS,
    base_name,
    group_of,
    has_stored_statistics,
    pair,
    tensors,
)


def through(operation: Any, arguments: tuple[Any, ...], fields: Sequence[Field | None], outputs: Any) -> list[Field]:
    """The fields of an operation's outputs.

    Args:
        operation: torch's, such as aten.convolution.default.
        arguments: what it was called with, positional.
        fields: of all tensors among the arguments, in order; None for weights and other constants.
        outputs: what it gave: a tensor, or a list or tuple of them.
    """
    made = list(tensors(outputs))
    known = [field for field in fields if field is not None]
    if not known or not made:
        return []
    name, group = base_name(operation), group_of(operation)
    field = known[0]
    if len(known) == 1 and field.rows is None:
        return [field] * len(made)  # nothing local is left to follow
    if group == "product":
        return [_product(name, arguments, list(fields), made[0])]
    if name in WINDOWS:
        return [_window(field, _pooling(arguments), made[0], "global pooling")] * len(made)
    if name == "native_layer_norm":
        normalised = range(arguments[0].dim() - len(arguments[1]), arguments[0].dim())
        mixes = field.axes is not None and any(axis in normalised for axis in field.axes)
        return [field.everywhere("normalisation over positions", keep=True) if mixes else field] * len(made)
    if group == "normalisation":
        stored = has_stored_statistics(name, arguments)
        return [field if stored else field.everywhere("normalisation over positions", keep=True)] * len(made)
    if name in SOFTMAX:
        mixes = field.axes is not None and arguments[1] % arguments[0].dim() in field.axes
        return [field.everywhere("softmax over positions", keep=True) if mixes else field]
    if name in REDUCTIONS:
        return [_reduced(name, field, arguments, made[0])] * len(made)
    if group in ("activation", "elementwise"):
        rank = made[0].dim()
        return [merge([_aligned(one, rank, values) for one, values in _with_tensors(fields, arguments)])] * len(made)
    if name == "copy" and fields[1] is not None:  # what was there before is gone
        return [_aligned(fields[1], made[0].dim(), arguments[1])]
    return moved(name, arguments, field, known, made)


def _with_tensors(fields: Sequence[Field | None], arguments: tuple[Any, ...]) -> list[tuple[Field, Tensor]]:
    return [(one, values) for one, values in zip(fields, tensors(arguments), strict=False) if one is not None]


def _aligned(field: Field, rank: int, values: Tensor) -> Field:
    """Broadcasting puts dimensions in front."""
    shift = rank - values.dim()
    return field if field.axes is None or not shift else field.on((field.axes[0] + shift, field.axes[1] + shift))


def _product(name: str, arguments: tuple[Any, ...], fields: list[Field | None], output: Tensor) -> Field:
    known = [field for field in fields if field is not None]
    if name in ("convolution", "_convolution"):
        field, weight = known[0], arguments[1]
        if field.rows is None:
            return field
        if fields[0] is None or len(known) > 1 or arguments[6] or weight.dim() != 4 or field.axes != (2, 3):
            return merge(known).unknown(name)
        geometry = (weight.shape[2:], arguments[3], arguments[4], arguments[5])
        return _window(field, geometry, output, "a layer over the whole map")
    both = [field for field in fields[-2:] if field is not None]  # a first one of three is only added
    if len(both) == 2:
        return merge(both).everywhere("attention or another product of two maps")
    factor = both[0] if both else known[0]
    if factor.axes is None or factor.rows is None:
        return factor
    left = fields[-2] is not None
    summed = output.dim() - 1 if left else output.dim() - 2
    if summed in factor.axes:
        return factor.everywhere("a product over positions")
    return factor


def _pooling(arguments: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    kernel = pair(arguments[1])
    stride = pair(arguments[2]) if len(arguments) > 2 and arguments[2] else kernel
    padding = pair(arguments[3]) if len(arguments) > 3 else (0, 0)
    dilation = pair(arguments[4]) if len(arguments) > 4 and not isinstance(arguments[4], bool) else (1, 1)
    return kernel, stride, padding, dilation


def _window(field: Field, geometry: tuple[Any, Any, Any, Any], output: Tensor, whole: str) -> Field:
    if field.axes != (output.dim() - 2, output.dim() - 1) or field.rows is None or field.columns is None:
        return field.unknown("a window over flattened positions")
    kernel, stride, padding, dilation = (pair(part) for part in geometry)
    before, after = (field.rows.size, field.columns.size), tuple(output.shape[-2:])
    # A kernel as large as the map, which gives one position, is what others write as a fully connected layer.
    if kernel == before and after == (1, 1) and padding == (0, 0) and prod(kernel) > 1:
        return field.everywhere(whole)
    rows, columns = (
        reach.window(kernel[axis], stride[axis], padding[axis], dilation[axis], after[axis])
        for axis, reach in enumerate((field.rows, field.columns))
    )
    return replace(field, rows=rows, columns=columns)


def _reduced(name: str, field: Field, arguments: tuple[Any, ...], output: Tensor) -> Field:
    values = arguments[0]
    if field.rows is None or field.columns is None or field.axes is None:
        return field
    if name in ("_adaptive_avg_pool2d", "adaptive_max_pool2d"):
        before, after = (field.rows.size, field.columns.size), tuple(output.shape[-2:])
        if after == (1, 1):
            return field.everywhere("global pooling")
        if any(old % new for old, new in zip(before, after, strict=True)):
            return field.unknown("pooling of unequal windows")
        kernel = before[0] // after[0], before[1] // after[1]
        return _window(field, (kernel, kernel, (0, 0), (1, 1)), output, "global pooling")
    dims = next((part for part in arguments[1:] if isinstance(part, list | tuple)), None)
    if name == "topk":  # the first number is how many
        dims = [arguments[2] if len(arguments) > 2 else -1]
    elif dims is None and name not in ("linalg_vector_norm", "norm") and len(arguments) > 1:
        dims = [arguments[1]] if isinstance(arguments[1], int) and not isinstance(arguments[1], bool) else None
    if not dims:
        return field.everywhere("global pooling")
    gone = {dim % values.dim() for dim in dims}
    if gone & set(field.axes):
        return field.everywhere("global pooling")
    return field if output.dim() == values.dim() else field.without(gone)
