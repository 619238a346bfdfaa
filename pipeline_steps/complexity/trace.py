"""One image through a network on torch's meta device, which computes nothing: every operation with its cost and field.

A network is run, not read, so control flow, functional calls and attention need no special treatment.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline_steps.complexity.field import Field
from pipeline_steps.complexity.recorder import ATTENTION, Functions, Layer, Recorder
from pipeline_steps.errors import PleatError


@dataclass(frozen=True)
class Trace:
    """What one image costs.

    Attributes:
        layers: in the order in which they finish.
        feature_map: name of the last layer whose positions still belong to parts of the image, before global pooling,
            and what they depend on, as Araujo, Norris and Sim stop there; None: there is none.
        whole: name of the first layer that sees the whole image, and its field; None: none does.
        lost: name of the first layer through which the local field could not be followed, and its field; None: none.
        notes: what the figures leave out.
    """

    layers: list[Layer]
    feature_map: tuple[str, Field] | None
    whole: tuple[str, Field] | None
    lost: tuple[str, Field] | None
    notes: list[str]

    @property
    def local_output(self) -> tuple[str, Field] | None:
        """The last layer whose own output, in its last call, has a local field: its name and that field; None: none."""
        last: dict[str, Field | None] = {}
        for layer in reversed(self.layers):
            last.setdefault(layer.name, layer.gives)
        return next(
            ((name, gives) for name, gives in last.items() if gives is not None and gives.rows is not None), None
        )


def trace(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> Trace:
    """Runs the network that `build` makes on one image of `shape` (channels, height, width), float32.

    Where it cannot be made or run without values, it runs on the CPU with random pixels instead, and a note says so.

    Raises:
        PleatError: the network fails on images of this shape, or the count of an operation fails.
    """
    try:
        with torch.device("meta"):
            network = build().eval().requires_grad_(False)
        return _traced(_recorded(network, torch.zeros(1, *shape, device="meta")), [])
    except Exception as error:
        if not _needs_values(error):
            raise
        reason = _short(error)
    network = build().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    note = (
        f"The network cannot be counted without values ({reason}). Counted is what one image of random pixels runs "
        "through; where a network decides by its pixels, other images may take another path."
    )
    return _traced(_recorded(network, torch.rand(1, *shape, generator=generator)), [note])


def _needs_values(error: Exception) -> bool:
    """Whether something failed because the meta device holds no values."""
    of_meta = isinstance(error, NotImplementedError) or "meta" in str(error).lower()
    return of_meta and not isinstance(error, PleatError)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160].rstrip(". ") or type(error).__name__


def _recorded(network: nn.Module, image: Tensor) -> Recorder:
    recorder = Recorder(network, image)
    try:
        with torch.no_grad(), _exact_attention(recorder), recorder.modules(), Functions(recorder), recorder:
            network(image)
    except Exception as error:  # each network fails in its own way
        if isinstance(error, PleatError) or (image.is_meta and _needs_values(error)):
            raise
        raise PleatError(
            f"{type(network).__name__} cannot take images of {image.shape[2]} x {image.shape[3]} pixels "
            f"({_short(error)}); use another size."
        ) from error
    return recorder


def _traced(recorder: Recorder, notes: list[str]) -> Trace:
    layers = recorder.finish()
    unknown = sorted({f"{name} in {layer.name or 'the network'}" for layer in layers for name in layer.uncounted})
    seen = recorder.seen
    return Trace(
        layers,
        _feature_map(recorder, layers),
        next(((name, sees) for name, sees in seen if sees.whole), None),
        next(((name, sees) for name, sees in seen if sees.lost), None),
        notes + ([f"Not counted, as their cost is not known: {', '.join(unknown)}."] if unknown else []),
    )


def _feature_map(recorder: Recorder, layers: list[Layer]) -> tuple[str, Field] | None:
    found = next(((name, sees) for name, sees in reversed(recorder.seen) if sees.rows is not None), None)
    if found is None:
        return None
    gives = next((layer.gives for layer in reversed(layers) if layer.name == found[0]), None)
    return (found[0], gives) if gives is not None and gives.rows is not None else found


@contextmanager
def _exact_attention(recorder: Recorder) -> Iterator[None]:
    """Without the fused encoder, which hides what it computes, and with attention inside of torch's own layers seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # Torch calls its own functions without the mode `Functions`, so that alone would miss nn.MultiheadAttention.
    nn.functional.scaled_dot_product_attention = recorder.attention  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = ATTENTION
        torch.backends.mha.set_fastpath_enabled(before)
