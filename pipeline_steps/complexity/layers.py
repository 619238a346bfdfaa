"""The table of a network's layers: shapes, parameters, multiply-accumulates, bytes moved, receptive field."""

from typing import Any

import pandas as pd
from torch import nn

from pipeline_steps.complexity.field import Field
from pipeline_steps.complexity.operations import GROUPS, N_BYTES
from pipeline_steps.complexity.recorder import Layer, Shape
from pipeline_steps.complexity.trace import Trace

MAX_PARTS = 24
WINDOWED = {  # by how many axes they slide over
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.AvgPool3d),
}
OTHER = [f"{group}_ops" for group in GROUPS]


def table(trace: Trace) -> pd.DataFrame:
    """One row a layer, in the order in which they finish; a module that is called several times is one row.

    Columns:
        layer, kind: name as in `named_modules`, and class.
        calls: of the module.
        input_shape, output_shape: such as 64x112x112, of one image, at the first call.
        kernel, stride, groups: of torch's convolutions and pooling; empty elsewhere.
        params: learnt values.
        macs: multiply-accumulates; `flops` is twice that.
        normalisation_ops, activation_ops, pooling_ops, elementwise_ops: other operations; see operations.py.
        weight_bytes, value_bytes: read and written in float32, each operation by itself; `bytes_moved` is their sum.
        flops_per_byte: arithmetic intensity.
        share: of all multiply-accumulates.
        receptive_field_px, jump_px: longer side of the region of the image that a position depends on, and distance
            between the regions of neighbours; empty where there is none.
        whole_image: why the layer sees the whole image; empty: it does not.
        macs_torch: by the formulas of torch's FlopCounterMode.
        not_counted: operations whose cost is not known.
    """
    by_name: dict[str, list[Layer]] = {}
    for layer in trace.layers:
        by_name.setdefault(layer.name, []).append(layer)
    rows = [_row(calls) for calls in by_name.values()]
    frame = pd.DataFrame(rows)
    frame.insert(list(frame.columns).index("macs") + 1, "flops", 2 * frame["macs"])
    frame["bytes_moved"] = frame["weight_bytes"] + frame["value_bytes"]
    frame["flops_per_byte"] = frame["flops"] / frame["bytes_moved"].clip(lower=1)
    frame["share"] = frame["macs"] / max(frame["macs"].sum(), 1)
    last = ["receptive_field_px", "jump_px", "whole_image", "macs_torch", "not_counted"]
    integers = dict.fromkeys(["receptive_field_px", "jump_px"], "Int64")
    return frame[[*(name for name in frame.columns if name not in last), *last]].astype(integers)


def _row(calls: list[Layer]) -> dict[str, Any]:
    first = calls[0]
    row: dict[str, Any] = {
        "layer": first.name or "(network)", "kind": first.kind, "calls": len(calls),
        "input_shape": _text(first.input_shape), "output_shape": _text(first.output_shape),
        **_window(first.module),
        "params": sum(layer.params for layer in calls), "macs": sum(layer.macs for layer in calls),
    }  # fmt: skip
    for group, name in zip(GROUPS, OTHER, strict=True):
        row[name] = sum(layer.other[group] for layer in calls)
    row["weight_bytes"] = N_BYTES * sum(layer.n_weights for layer in calls)
    row["value_bytes"] = N_BYTES * sum(layer.n_values for layer in calls)
    row |= field_columns(next((layer.sees for layer in reversed(calls) if layer.sees), None))
    uncounted = sorted({name for layer in calls for name in layer.uncounted})
    return row | {"macs_torch": sum(layer.torch_macs for layer in calls), "not_counted": " ".join(uncounted)}


def field_columns(sees: Field | None) -> dict[str, Any]:
    """`receptive_field_px`, `jump_px` and `whole_image` of a layer."""
    if sees is None:
        return {"receptive_field_px": None, "jump_px": None, "whole_image": ""}
    jump = max(sees.rows.jump, sees.columns.jump) if sees.rows and sees.columns else None
    return {"receptive_field_px": sees.pixels, "jump_px": jump, "whole_image": sees.whole or ""}


def totals(layers: pd.DataFrame) -> dict[str, int]:
    """`params`, `macs`, `flops`, the other operations, `bytes_moved` and `macs_torch` of all layers."""
    names = ["params", "macs", "flops", *OTHER, "bytes_moved", "macs_torch"]
    return {name: int(layers[name].sum()) for name in names}


def differences(layers: pd.DataFrame) -> pd.DataFrame:
    """Layers where the two counts of multiply-accumulates differ: `layer`, `kind`, `macs`, `macs_torch`."""
    return layers.loc[layers["macs"] != layers["macs_torch"], ["layer", "kind", "macs", "macs_torch"]]


def parts(layers: pd.DataFrame) -> pd.DataFrame:
    """The network by its parts (stem, stages, head), in order: the sums, and the field at the end of each.

    Parts are the network's own modules; one with more than half of the multiply-accumulates is divided into its own, as
    long as that makes no more than 24.
    """
    names = layers["layer"].where(layers["layer"] != "(network)", "")
    part = names.str.split(".").str[0]
    for depth in range(2, 6):
        shares = layers.groupby(part)["share"].sum()
        if shares.max() <= 0.5:
            break
        finer = part.where(part != shares.idxmax(), names.str.split(".").str[:depth].str.join("."))
        if finer.nunique() > MAX_PARTS:
            break
        part = finer
    part = part.mask(part == "", "(network)")
    sums = [
        "params",
        "macs",
        "flops",
        *OTHER,
        "bytes_moved",
        "share",
        *(name for name in layers.columns if name.startswith("latency_ms")),
    ]
    grouped = layers.assign(part=part).groupby("part", sort=False)
    frame = grouped[sums].sum().reset_index()
    for name in ("output_shape", "receptive_field_px", "jump_px", "whole_image"):
        frame[name] = list(grouped[name].apply(lambda column: column.iloc[-1]))
    frame.loc[frame["part"] == "(network)", "output_shape"] = ""  # that of the whole; its own operations are all over
    return frame.astype({"receptive_field_px": "Int64", "jump_px": "Int64"})


def _text(shape: Shape) -> str:
    """Without the batch of one."""
    return "x".join(map(str, shape[1:] if shape[:1] == (1,) else shape))


def _window(module: nn.Module) -> dict[str, str]:
    """`kernel`, `stride` and `groups`; other modules than torch's may mean something else by such names."""
    n_axes = next((n for n, kinds in WINDOWED.items() if isinstance(module, kinds)), None)
    if n_axes is None:
        return {"kernel": "", "stride": "", "groups": ""}
    kernel, stride = _sides(module.kernel_size, n_axes), _sides(module.stride, n_axes)
    return {"kernel": kernel, "stride": stride, "groups": str(getattr(module, "groups", ""))}


def _sides(value: Any, n_axes: int) -> str:
    """As 3x3; one number stands for all axes."""
    return "x".join(map(str, (value,) * n_axes if isinstance(value, int) else value))
