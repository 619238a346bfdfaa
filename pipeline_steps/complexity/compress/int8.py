"""Post-training quantization to 8 bits with ONNX Runtime's own quantizer: the graph that is served runs in integers."""

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnx import ModelProto


def quantize(graph: Path, pixels: npt.NDArray[np.uint8]) -> bytes:
    """The graph with 8-bit weights, a scale for each output channel, and 8-bit activations (static QDQ).

    Ranges of activations are the smallest and largest values that `pixels` bring about. Unsigned activations and signed
    weights are what ONNX Runtime runs fastest on x86 with VNNI; there 8-bit products are summed without overflow.

    Args:
        graph: an ONNX file with the input `pixels`.
        pixels: uint8 (n, 3, size, size), images that it was trained on.

    Returns:
        An ONNX file that holds its weights.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = iter(pixels)

        def get_next(self) -> Any:
            image = next(self.images, None)
            return None if image is None else {"pixels": image[None]}

    with _without_warnings(), tempfile.TemporaryDirectory(prefix="pleat-int8-") as folder:
        whole, fused, quantized = (Path(folder) / f"{name}.onnx" for name in ("whole", "fused", "int8"))
        # With its weights inside and as a path: of a model in memory it puts every tensor into another file, also those
        # that shapes are computed from, which onnx then cannot check.
        onnx.save(onnx.load(graph), whole)
        # Batch norms are folded into convolutions. Symbolic shapes are left out: nothing here needs more than onnx's.
        quant_pre_process(str(whole), str(fused), skip_symbolic_shape=True)
        model = onnx.load(fused)
        share_equal(model)
        quantize_static(
            model,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(quantized)
    share_equal(model)
    return bytes(model.SerializeToString())


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The quantizer warns on the root logger of what is done here already."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def share_equal(model: "ModelProto") -> int:
    """Keeps one of tensors that are equal, and returns how many went.

    A model that averages over mirrored views has every layer twice in its graph, on one set of weights; folding a batch
    norm makes a copy for each of the two.
    """
    from onnx.numpy_helper import to_array

    kept: dict[tuple[Any, ...], str] = {}
    instead: dict[str, str] = {}
    for item in list(model.graph.initializer):
        key = (tuple(item.dims), item.data_type, hashlib.sha256(to_array(item).tobytes()).digest())
        if key in kept:
            instead[item.name] = kept[key]
            model.graph.initializer.remove(item)
        else:
            kept[key] = item.name
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = instead.get(name, name)
    return len(instead)
