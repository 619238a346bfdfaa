"""Records what a network does while it runs: each basic operation, with its cost, at the module in which it happens.

What happens outside of layers is attributed to the module in whose `forward` it happens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline_steps.complexity import operations
from pipeline_steps.complexity.field import Field, merge, of_image
from pipeline_steps.complexity.operations import GROUPS, base_name, group_of, tensors
from pipeline_steps.complexity.receptive_field import through
from pipeline_steps.errors import PleatError

Shape = tuple[int, ...]
ATTENTION = nn.functional.scaled_dot_product_attention


@dataclass
class Layer:
    """One call of a module: what it does itself, outside of the modules in it.

    Attributes:
        name: dotted, as in `named_modules`; empty for the network itself.
        input_shape, output_shape: of its first tensors, with the batch, which windows and heads may become part of.
        params: learnt values of its own; counted at its first call.
        macs: multiply-accumulates by `own_macs` where the layer's kind is known, else by the operations' shapes.
        torch_macs: the same by torch's formulas.
        gives: what its output depends on, where rows and columns of the image are as the next layer sees them.
        other: operations that are no multiply-accumulates, by group.
        n_weights, n_values: values read and written, weights and others.
        sees: what its last result depends on.
        uncounted: operations whose cost is not known.
        place: of its last operation among all; orders the layers as they finish.
    """

    name: str
    module: nn.Module
    input_shape: Shape = ()
    output_shape: Shape = ()
    params: int = 0
    macs: int = 0
    torch_macs: int = 0
    other: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GROUPS, 0))
    n_weights: int = 0
    n_values: int = 0
    sees: Field | None = None
    gives: Field | None = None
    uncounted: list[str] = field(default_factory=list)
    place: int = 0

    @property
    def kind(self) -> str:
        """Its class."""
        return type(self.module).__name__


def own_macs(module: nn.Module, input_shape: Shape, output_shape: Shape) -> int | None:
    """Multiply-accumulates by the settings of a convolution or linear layer.

    None for other kinds, and for a transposed convolution whose input came by keyword, so that its shape is not known.
    A convolution sums kernel x in_channels / groups products for each output, a linear layer in_features.
    """
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        products = prod(input_shape) * module.out_channels // module.groups * prod(module.kernel_size)
        return products if input_shape else None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return prod(output_shape) * module.in_channels // module.groups * prod(module.kernel_size)
    if isinstance(module, nn.Linear):
        return prod(output_shape) * module.in_features
    return None


class Recorder(TorchDispatchMode):
    """Sees every basic operation; knows in which module it happens."""

    def __init__(self, network: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.network = network
        self.names = {id(module): name for name, module in network.named_modules()}
        self.weights = {id(weight) for weight in network.parameters()} | {id(buffer) for buffer in network.buffers()}
        self.fields: dict[int, Field] = {id(image): of_image(image.shape[2], image.shape[3])}
        self.alive: list[Any] = [image]  # so that no two tensors have the same id
        self.layers: list[Layer] = []
        self.stack: list[Layer] = []
        self.seen: list[tuple[str, Field]] = []  # name of the layer and field of each operation's result, in order
        self.viewed: dict[int, Tensor] = {}  # what a view is one of
        self.place = 0
        self.quiet = 0  # inside of an operation that was counted as one

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and to skip the compiler torch would load it first, which takes a second."""
        return False

    @contextmanager
    def modules(self) -> Iterator[None]:
        """While this is open, calls of modules are followed."""

        def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            first = next(tensors(arguments), None)
            name = self.names.get(id(module))
            if name is None:  # made while the network ran: what it does belongs to the module around it
                self.stack.append(self.stack[-1])
                return
            layer = Layer(name, module, tuple(first.shape) if first is not None else (), place=self.place)
            self.layers.append(layer)
            self.stack.append(layer)

        def leave(module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
            first = next(tensors(output), None)
            layer = self.stack.pop()
            if layer.module is not module:
                return
            layer.output_shape = tuple(first.shape) if first is not None else ()
            layer.gives = self.fields.get(id(first))

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        output = operation(*arguments, **(named or {}))
        inputs = list(tensors(arguments))
        if self.stack and inputs:
            try:
                self.record(operation, arguments, named or {}, inputs, output)
            except Exception as error:  # else it would pass for an error of the network
                raise PleatError(
                    f"The count of {base_name(operation)} in {self.stack[-1].name or 'the network'} failed "
                    f"({type(error).__name__}: {error}); this is a defect of Pleat, so please report it."
                ) from error
        return output

    def record(
        self, operation: Any, arguments: tuple[Any, ...], named: dict[str, Any], inputs: list[Tensor], output: Any
    ) -> None:
        """Counts an operation that gave `output`; `inputs` are the tensors among its arguments."""
        self.stack[-1].torch_macs += operations.torch_macs(operation, arguments, named, output)
        group, layer = group_of(operation), self.stack[-1]
        if self.quiet or group == "allocation":
            return
        made = list(tensors(output))
        self.alive.append((made, inputs))
        fields = through(operation, arguments, [self.fields.get(id(values)) for values in inputs], output)
        if group is None:
            layer.uncounted.append(base_name(operation))
            fields = [one.unknown(base_name(operation)) for one in fields]
        elif group == "product":
            layer.macs += operations.macs(base_name(operation), arguments, made[0])
        elif group in GROUPS:
            layer.other[group] += operations.other_operations(base_name(operation), arguments, made[0])
        self.moved(layer, group, inputs, made, fields)

    def moved(
        self, layer: Layer, group: str | None, inputs: list[Tensor], made: list[Tensor], fields: list[Field]
    ) -> None:
        """Notes what an operation read and wrote, and what its outputs depend on."""
        sees = fields[0] if fields else None
        if group != "view" and sees and made[0] is inputs[0]:
            sees = self.written(inputs[0], sees)
        self.fields |= {id(values): one for values, one in zip(made, fields, strict=False)}
        if group == "view":
            self.weights |= {id(values) for values in made if id(inputs[0]) in self.weights}
            self.viewed |= {id(values): inputs[0] for values in made if values is not inputs[0]}
            return
        # Results that have no values, such as the indices of pooling, are not written when nobody learns.
        for values in [*inputs, *made[:1]]:
            if id(values) in self.weights:
                layer.n_weights += values.numel()
            else:
                layer.n_values += values.numel()
        self.place += 1
        layer.place = self.place
        if sees:
            layer.sees = sees
            self.seen.append((layer.name, sees))

    def attention(self, *arguments: Any, **named: Any) -> Tensor:
        """Scaled dot-product attention as one operation, as it runs fused: its scores are never written to memory."""
        if not self.stack or self.quiet:
            return ATTENTION(*arguments, **named)
        self.quiet += 1
        output = ATTENTION(*arguments, **named)
        self.quiet -= 1
        query, key, value = (*arguments, *(named[name] for name in ("query", "key", "value") if name in named))[:3]
        self.alive.append(output)
        layer = self.stack[-1]
        layer.macs += operations.attention_macs(query, key, value)
        layer.other["activation"] += operations.SOFTMAX["_softmax"] * query.shape[:-1].numel() * key.shape[-2]
        known = [self.fields[id(values)] for values in (query, key, value) if id(values) in self.fields]
        fields = [known[0].everywhere("attention")] if known else []
        self.moved(layer, "product", [query, key, value], [output], fields)
        return output

    def written(self, view: Tensor, sees: Field) -> Field:
        """Notes that what depends on `sees` was written into `view`, and so into what that is a part of.

        Returns:
            What all of it depends on.
        """
        if self.fields.get(id(view)) == sees:
            return sees
        while id(view) in self.viewed:
            around = self.viewed[id(view)]
            lost = merge([self.fields.get(id(around), sees), sees]).unknown("written into in part")
            self.fields[id(around)] = lost
            sees = lost if around.numel() > view.numel() else sees
            view = around
        return sees

    def finish(self) -> list[Layer]:
        """The layers that compute or hold something, with their parameters."""
        called = {layer.name: layer for layer in reversed(self.layers)}
        counted: set[int] = set()  # weights that two modules share count at the first
        for name, module in self.network.named_modules():
            weights = {id(weight): weight.numel() for weight in module.parameters(recurse=False)}
            own = sum(n for weight, n in weights.items() if weight not in counted)
            counted |= weights.keys()
            while name not in called:  # used by the module around it, without being called
                name = name.rpartition(".")[0]
            called[name].params += own
        for layer in self.layers:
            formula = own_macs(layer.module, layer.input_shape, layer.output_shape)
            layer.macs = formula if formula is not None and layer.macs else layer.macs
        used = [layer for layer in self.layers if layer.sees or layer.n_values or layer.params or layer.uncounted]
        return sorted(used, key=lambda layer: layer.place) or self.layers[:1]  # a network that does nothing is one row


class Functions(TorchFunctionMode):
    """Sees scaled dot-product attention before torch takes it apart."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        called = self.recorder.attention if function is ATTENTION else function
        return called(*arguments, **(named or {}))
