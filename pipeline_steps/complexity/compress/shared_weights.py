"""Weight sharing: the weights of a layer take few values, and the file holds a table of them and indices into it.

After Han, Mao & Dally 2016, "Deep Compression", section 3, without their training of the shared values and without
their Huffman coding. What is written is an ordinary ONNX graph that looks the weights up itself: ONNX Runtime does that
once, when it opens the file, so an answer takes as long as before.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

LEAST_WEIGHTS = 1024  # of a tensor: smaller ones save nothing worth a table
BINS = 4096
N_STARTS = 3
Values = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def shared(path: Path, clusters: int) -> tuple[bytes, int]:
    """`share` on a file: the new ONNX file, and how many tensors were replaced."""
    import onnx

    graph = onnx.load(path)
    n_shared = share(graph, clusters)
    return bytes(graph.SerializeToString()), n_shared


def share(graph: "ModelProto", clusters: int) -> int:
    """Replaces every large tensor of weights by its table and packed indices, in place.

    Depthwise convolutions stay as they are: they hold a fortieth of MobileNetV2's weights and most of the damage
    (docs/compression.md).

    Args:
        graph: with its weights inside, not in another file.
        clusters: at most that many values a tensor, 2 to 256; 64 take 6 bits a weight.

    Returns:
        How many tensors were replaced.
    """
    from onnx.numpy_helper import from_array, to_array

    tensors = [item for item in graph.graph.initializer if _is_shared(item)]
    lookups: list[NodeProto] = []
    for item in tensors:
        weights, name = to_array(item), item.name
        table, codes = cluster(weights.ravel(), clusters)
        graph.graph.initializer.remove(item)
        parts: dict[str, npt.NDArray[Any]] = {
            "table": table, "planes": pack(codes, len(table)), "shape": np.array(weights.shape),
            "n": np.array([codes.size]),
        }  # fmt: skip
        graph.graph.initializer.extend(from_array(value, f"{name}.{part}") for part, value in parts.items())
        lookups += _lookup(name)
    constants: dict[str, npt.NDArray[Any]] = {
        "within": np.arange(7, -1, -1, dtype=np.uint8), "one": np.array(1, dtype=np.uint8), "axis": np.array([0]),
        "places": np.arange(8, dtype=np.uint8).reshape(8, 1, 1), "last": np.array([-1]), "start": np.array([0]),
    }  # fmt: skip
    graph.graph.initializer.extend(from_array(value, f"shared.{part}") for part, value in constants.items())
    for place, node in enumerate(lookups):  # before whatever reads the weights
        graph.graph.node.insert(place, node)
    return len(tensors)


def _is_shared(item: "TensorProto") -> bool:
    from onnx import TensorProto

    depthwise = len(item.dims) == 4 and item.dims[1] == 1
    large = len(item.dims) > 1 and np.prod(item.dims) >= LEAST_WEIGHTS
    return bool(item.data_type == TensorProto.FLOAT and large and not depthwise)


def cluster(values: Values, clusters: int) -> tuple[Values, Bytes]:
    """k-means of numbers: the values that stand for all (k,), ascending, and which of them stands for each (n,).

    scikit-learn's, on a fine histogram in place of the values, so that a layer of a million weights takes a tenth of a
    second. Each weight then gets the nearest of the values found.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    exact = values.astype(np.float64)
    counts, edges = np.histogram(exact, BINS)
    sums, _ = np.histogram(exact, edges, weights=exact)
    filled = counts > 0
    means = (sums[filled] / counts[filled])[:, np.newaxis]
    with threadpool_limits(1):  # sums of several threads differ in their last digits from run to run
        found = KMeans(min(clusters, len(means)), n_init=N_STARTS, random_state=0).fit(
            means, sample_weight=counts[filled]
        )
    table = np.unique(found.cluster_centers_.astype(np.float32))
    borders = (table[1:].astype(np.float64) + table[:-1]) / 2
    return table, np.searchsorted(borders, exact).astype(np.uint8)


def pack(codes: Bytes, n_values: int) -> Bytes:
    """Indices below `n_values` (n,) as planes of bits (n_bits, ceil(n / 8)): plane p holds bit p of each index."""
    n_bits = max(1, (n_values - 1).bit_length())
    return np.stack([np.packbits(codes >> place & 1) for place in range(n_bits)])


def _lookup(name: str) -> "list[NodeProto]":
    """Nodes that make the tensor `name` from `name`.table, .planes, .shape and .n."""
    from onnx import TensorProto
    from onnx.helper import make_node

    def step(kind: str, inputs: list[str], output: str, **attributes: Any) -> "NodeProto":
        own = [one if one.startswith("shared.") else f"{name}.{one}" for one in inputs]
        return make_node(kind, own, [f"{name}.{output}" if output else name], **attributes)

    return [
        step("Unsqueeze", ["planes", "shared.last"], "bytes"),
        step("BitShift", ["bytes", "shared.within"], "shifted", direction="RIGHT"),
        step("BitwiseAnd", ["shifted", "shared.one"], "bits"),
        step("Shape", ["planes"], "n_planes", end=1),
        step("Slice", ["shared.places", "shared.start", "n_planes"], "their_places"),
        step("BitShift", ["bits", "their_places"], "worth", direction="LEFT"),
        step("Cast", ["worth"], "numbers", to=TensorProto.INT32),
        step("ReduceSum", ["numbers", "shared.axis"], "sums", keepdims=0),
        step("Reshape", ["sums", "shared.last"], "row"),
        step("Slice", ["row", "shared.start", "n"], "indices"),
        step("Gather", ["table", "indices"], "flat"),
        step("Reshape", ["flat", "shape"], ""),
    ]
