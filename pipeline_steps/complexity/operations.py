"""What torch's basic operations cost: multiply-accumulates, other operations, values read and written.

A convolution or matrix product takes as many multiply-accumulates as it has outputs, times the inputs that each output
sums over. Other layers count as in fvcore: batch norm with stored statistics 2 operations a value, other normalisations
5. An activation counts as 1 whatever its formula, softmax as 5 (maximum, difference, exponential, sum, quotient),
pooling and interpolation as the values that they look at.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

N_BYTES = 4  # a value, in float32
# The groups under which other operations are counted, in the order of the tables.
GROUPS = ("normalisation", "activation", "pooling", "elementwise")
PRODUCTS = {"convolution", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_convolution"}
NORMALISATION = {
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "native_layer_norm",
    "native_group_norm",
}  # fmt: skip
ACTIVATIONS = {
    "relu", "relu6", "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "leaky_relu", "elu",
    "celu", "selu", "mish", "softplus", "_prelu_kernel", "log_sigmoid_forward", "glu", "hardshrink", "softshrink",
}  # fmt: skip
SOFTMAX = {"_softmax": 5, "_safe_softmax": 5, "_log_softmax": 5}
INTERPOLATION = {
    "upsample_bilinear2d": 4, "_upsample_bilinear2d_aa": 4, "upsample_bicubic2d": 16, "_upsample_bicubic2d_aa": 16,
}  # fmt: skip
WINDOWS = {"max_pool2d_with_indices", "max_pool2d", "avg_pool2d"}
REDUCTIONS = {
    "mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean", "std_mean", "prod",
    "linalg_vector_norm", "norm", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "logsumexp", "cumsum", "topk", "sort",
}  # fmt: skip
# Elementwise, though torch does not tag them so.
ELEMENTWISE = {"add", "sub", "mul", "div", "rsub", "addcmul", "addcdiv", "lerp", "where", "masked_fill", "bernoulli"}
VIEWS = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze",
    "select", "slice", "split", "split_with_sizes", "unbind", "alias", "detach", "as_strided", "lift_fresh", "unfold",
    "diagonal", "real", "imag", "view_as_real", "view_as_complex", "unsafe_split", "unsafe_chunk",
    "_local_scalar_dense",
}  # fmt: skip
COPIES = {
    "clone", "cat", "stack", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "roll", "index", "gather",
    "index_select", "flip", "_to_copy", "copy", "repeat", "im2col", "col2im", "upsample_nearest2d", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "rot90", "embedding", "expand_copy", "index_put", "fill", "zero", "scatter",
}  # fmt: skip
# Memory for what is written later, which counts there.
ALLOCATIONS = {
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "new_empty_strided",
}  # fmt: skip


def base_name(operation: Any) -> str:
    """`aten.relu_.default` as `relu`."""
    name = str(operation.overloadpacket.__name__)
    return name if name.startswith("__") else name.rstrip("_")


def group_of(operation: Any) -> str | None:
    """`product`, one of `GROUPS`, `view`, `copy` or `allocation`; None where its cost is not known."""
    name = base_name(operation)
    if name in PRODUCTS:
        return "product"
    if name in NORMALISATION:
        return "normalisation"
    if name in ACTIVATIONS or name in SOFTMAX:
        return "activation"
    if name in WINDOWS or name in REDUCTIONS or name in INTERPOLATION:
        return "pooling"
    if name in VIEWS:
        return "view"
    if name in COPIES:
        return "copy"
    if name in ALLOCATIONS:
        return "allocation"
    if name in ELEMENTWISE or torch.Tag.pointwise in operation.tags:
        return "elementwise"
    return None


def macs(name: str, arguments: tuple[Any, ...], output: Tensor) -> int:
    """Multiply-accumulates of one of `PRODUCTS` by the shapes of what goes in and comes out."""
    if name in ("convolution", "_convolution"):
        values, weight, transposed = arguments[0], arguments[1], arguments[6]
        # Weights have shape (out, in / groups, *kernel); of a transposed convolution (in, out / groups, *kernel).
        return int((values if transposed else output).numel() * prod(weight.shape[1:]))
    if name in ("addmm", "baddbmm", "addmv"):
        arguments = arguments[1:]  # the first is only added
    return int(output.numel() * arguments[0].shape[-1])


def torch_macs(operation: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> int:
    """Multiply-accumulates by the formulas of torch's FlopCounterMode, which counts two operations for each."""
    formula = flop_registry.get(operation.overloadpacket)
    return int(formula(*arguments, **named, out_val=output)) // 2 if formula else 0


def attention_macs(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of softmax(query key') value, shapes (..., positions, channels): both matrix products, heads together."""
    scores = query.shape[:-1].numel() * key.shape[-2]
    return int(scores * (query.shape[-1] + value.shape[-1]))


def other_operations(name: str, arguments: tuple[Any, ...], output: Tensor) -> int:
    """Operations that are no multiply-accumulates, of an operation in one of `GROUPS`."""
    if name in NORMALISATION:
        return (2 if has_stored_statistics(name, arguments) else 5) * output.numel()
    if name in SOFTMAX:
        return SOFTMAX[name] * output.numel()
    if name in INTERPOLATION:
        return INTERPOLATION[name] * output.numel()
    if name in WINDOWS:
        kernel = pair(arguments[1])
        return output.numel() * kernel[0] * kernel[1]
    if name in REDUCTIONS:
        return int(arguments[0].numel())
    return output.numel()


def has_stored_statistics(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether one of `NORMALISATION` takes mean and variance from training, not from the values themselves."""
    if name == "_native_batch_norm_legit" and len(arguments) < 8:  # the one that was given none
        return False
    return name.endswith("no_training") or ("batch_norm" in name and not arguments[5])


def pair(value: Any) -> tuple[int, int]:
    """Arguments for two axes: 3, [3] or [3, 3]."""
    values = [value] if isinstance(value, int) else list(value)
    return int(values[0]), int(values[-1])


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors of nested arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
