"""What changes the receptive field: the same network with one kernel size, stride or depth changed."""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from pipeline_steps.complexity.field import Field
from pipeline_steps.complexity.layers import field_columns
from pipeline_steps.complexity.trace import Trace, trace
from pipeline_steps.errors import PleatError

Change = Callable[[nn.Module, dict[str, Any]], str | None]


def table(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> pd.DataFrame:
    """One row for the network as it is, and one for each change that it allows.

    Columns: change, params, macs, and of the layer that gives the last feature map: receptive_field_px, jump_px, map
    (its positions a side). Empty where the network has no local receptive field.
    """
    rows: list[dict[str, Any]] = []
    layer = ""  # the same one in all
    for change in (_as_it_is, _larger_kernels, _last_stride_less, _one_block_less, _one_block_more):
        told: list[str | None] = []

        def changed(change: Change = change, told: list[str | None] = told) -> nn.Module:
            network = build().eval()
            told.append(change(network, _shapes(network, shape)))
            return network

        try:
            found = trace(changed, shape)
        except PleatError:  # branches no longer fit together
            continue
        if found.feature_map is None:
            return pd.DataFrame()
        if told[0] is None:
            continue
        layer = layer or found.feature_map[0]
        sees = _field_of(layer, found) or found.feature_map[1]
        columns = field_columns(sees)
        rows.append(
            {
                "change": told[0],
                "params": sum(layer.params for layer in found.layers),
                "macs": sum(layer.macs for layer in found.layers),
                "receptive_field_px": columns["receptive_field_px"],
                "jump_px": columns["jump_px"],
                "map": sees.rows.size if sees.rows else None,
            }
        )
    return pd.DataFrame(rows)


def _field_of(layer: str, found: Trace) -> Field | None:
    """The local field of a layer as the report gives it, else that of its output; None: it has none."""
    if found.feature_map is not None and found.feature_map[0] == layer:
        return found.feature_map[1]
    given = (one.gives for one in reversed(found.layers) if one.name == layer and one.gives is not None)
    return next((gives for gives in given if gives.rows is not None), None)


def _shapes(network: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Shapes of what goes into and comes out of each module that is called once, by name."""
    seen: dict[str, Any] = {}

    def note(name: str, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        first = next(iter(inputs), None)  # none where all comes by keyword
        seen[name] = None if name in seen else (getattr(first, "shape", None), getattr(output, "shape", None))

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in network.named_modules()]
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    with torch.no_grad():
        network(torch.zeros(1, *shape, device=device))
    for hook in hooks:
        hook.remove()
    return {name: shapes for name, shapes in seen.items() if shapes and None not in shapes}


def _as_it_is(_network: nn.Module, _shapes: dict[str, Any]) -> str | None:
    return "as it is"


def _larger_kernels(network: nn.Module, _shapes: dict[str, Any]) -> str | None:
    """The most frequent square kernel of layers with stride 1 becomes larger by two, padding with it."""
    found = [
        module
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
        and module.stride == (1, 1)
        and module.kernel_size[0] == module.kernel_size[1] > 1
        and module.kernel_size[0] % 2
    ]
    if not found:
        return None
    side = Counter(module.kernel_size[0] for module in found).most_common(1)[0][0]
    for module in (module for module in found if module.kernel_size[0] == side):
        module.kernel_size = (side + 2, side + 2)
        rows, columns = module.dilation
        if not isinstance(module.padding, str):
            module.padding = (module.padding[0] + rows, module.padding[1] + columns)
        if module.padding != "valid":  # what modes other than zeros pad by, last dimension first
            steps = (columns, columns, rows, rows)
            module._reversed_padding_repeated_twice = [
                amount + step for amount, step in zip(module._reversed_padding_repeated_twice, steps, strict=True)
            ]
        weight = module.weight
        module.weight = nn.Parameter(weight.new_empty(*weight.shape[:2], side + 2, side + 2), requires_grad=False)
    return f"kernels of {side} x {side} made {side + 2} x {side + 2} (those with stride 1)"


def _last_stride_less(network: nn.Module, shapes: dict[str, Any]) -> str | None:
    """The last halving of the map is left out, in all branches of it."""
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    modules = dict(network.named_modules())
    strided = {
        name: module
        for name, module in modules.items()
        if isinstance(module, kinds)
        and name in shapes
        and module.stride in (2, (2, 2))
        and shapes[name][1][-1] > 1  # what leaves one position is the global pooling
    }
    if not strided:
        return None
    smallest = min(shapes[name][0][-1] for name in strided)
    last = [name for name in strided if shapes[name][0][-1] == smallest]
    for name in last:
        strided[name].stride = (1, 1)
    return f"stride 1 instead of 2 in {last[0] if len(last) == 1 else f'{last[0]} and beside it'}"


def _blocks(network: nn.Module, shapes: dict[str, Any]) -> tuple[nn.Module, str, str] | None:
    """The last of the blocks that keep their shape, in the stage that has most: its parent, key and full name."""
    stages = []
    for name, parent in network.named_modules():
        if not isinstance(parent, nn.Sequential | nn.ModuleList):
            continue
        stage: list[tuple[nn.Module, str, str]] = []
        for key, block in parent.named_children():
            full = f"{name}.{key}" if name else key
            same = full in shapes and shapes[full][0] == shapes[full][1]
            if same and any(isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1 for part in block.modules()):
                stage.append((parent, key, full))
        stages.append(stage)
    return max(stages, key=len)[-1] if any(stages) else None


def _one_block_less(network: nn.Module, shapes: dict[str, Any]) -> str | None:
    found = _blocks(network, shapes)
    if found is None:
        return None
    parent, key, name = found
    parent._modules[key] = nn.Identity()
    return f"{name} left out"


def _one_block_more(network: nn.Module, shapes: dict[str, Any]) -> str | None:
    found = _blocks(network, shapes)
    if found is None:
        return None
    parent, key, name = found
    block = parent._modules[key]
    assert block is not None
    parent._modules[key] = nn.Sequential(block, copy.deepcopy(block))
    return f"{name} twice, one after the other"
