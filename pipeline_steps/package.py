"""A trained network as a folder that answers images by itself: weights, graph, preprocessing, code, requirements."""

import hashlib
import io
import json
import shutil
import struct
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline_steps import serving
from pipeline_steps.files import read_json, write_json
from pipeline_steps.targets import Target

SERVING = Path(__file__).parent / "serving"
EMBEDDED_BYTES = 1024  # smaller constants, which are no weights, stay in the graph


class Answering(nn.Module):
    """Pixels to probabilities, as the pipeline scores: with `mirror` the mean over the plain and the mirrored view.

    Args:
        network: uint8 (batch, 3, size, size) to logits (batch, n_outputs): the classes of all targets in their order.
        targets: at least one.
        mirror: whether the model was trained on mirrored views too.
    """

    def __init__(self, network: nn.Module, targets: Sequence[Target], mirror: bool) -> None:
        super().__init__()
        self.network, self.targets, self.mirror = network, targets, mirror
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Probabilities of each target, float32 (batch, n_classes): softmax, or the sigmoid of each class."""
        views = [pixels, pixels.flip(-1)] if self.mirror else [pixels]
        sizes = [len(target.classes) for target in self.targets]
        parts = zip(*(self.network(view).split(sizes, 1) for view in views), strict=True)
        return tuple(
            torch.stack([logits.sigmoid() if target.multilabel else logits.softmax(1) for logits in part]).mean(0)
            for target, part in zip(self.targets, parts, strict=True)
        )


def write(folder: Path, network: Answering, size: int, about: dict[str, Any], example: bytes) -> None:
    """Writes the package.

    - state.safetensors: the network's state_dict, and large constants of the graph;
    - network.onnx: the graph, whose weights lie in state.safetensors; input `pixels` uint8 (batch, 3, size, size), an
      output for each target under its name;
    - about.json: `about`, which must have preprocessing (arguments of `resize_crop`), max_pixels and, where there are
      multilabel targets, thresholds (by target, one a class), with classes (by target) and the names of multilabel
      targets as multilabel;
    - requirements.txt, example.jpg (an encoded image of any format), model.py and the code that it imports, in code/.

    Args:
        folder: exists and is empty.
        network: on the CPU.
        size: of the input, pixels a side.
        about: what travels with the model.
        example: an encoded image.
    """
    import onnx
    from safetensors.torch import save

    graph = onnx.load_from_string(_exported(network, size))
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    outside = {
        item.name: item
        for item in graph.graph.initializer
        if item.name in tensors or len(item.raw_data) >= EMBEDDED_BYTES
    }
    tensors |= {name: _tensor(item) for name, item in outside.items() if name not in tensors}
    (folder / "state.safetensors").write_bytes(save(tensors))
    places = _places(folder / "state.safetensors")
    for name, item in outside.items():
        if bytes(item.raw_data) != tensors[name].numpy().tobytes():
            raise RuntimeError(f"the graph holds other values than the network for {name}")
        _point(item, "state.safetensors", *places[name])
    (folder / "network.onnx").write_bytes(graph.SerializeToString())
    write_json(folder / "about.json", about | _answered(network.targets, about.get("thresholds", {})))
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements()))
    (folder / "example.jpg").write_bytes(example)
    _write_code(folder)


def write_other_graph(folder: Path, source: Path, graph: bytes, about: Mapping[str, Any]) -> None:
    """Writes the package `source` with another graph, which holds its own weights; there is no state.safetensors.

    Args:
        folder: exists and is empty.
        source: a package.
        graph: an ONNX file with the same input and outputs.
        about: added to the content of about.json.
    """
    for path in source.iterdir():
        if path.name not in ("about.json", "network.onnx", "state.safetensors", "README.md"):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, folder / path.name)
    (folder / "network.onnx").write_bytes(graph)
    write_json(folder / "about.json", read_json(source / "about.json") | dict(about))


def requirements() -> list[str]:
    """`name==version` of what a package needs: the versions that it is exported and checked with.

    Without local parts such as +cpu, which no index has.
    """
    return [f"{name}=={version(name).partition('+')[0]}" for name in sorted(serving.REQUIRES)]


def n_bytes(folder: Path) -> int:
    """Size of all files of a package."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def digest(folder: Path) -> str:
    """Names a package's contents: what it answers, and with which code."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _answered(targets: Sequence[Target], thresholds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    classes = {target.name: target.classes for target in targets}
    chosen = {target.name: thresholds[target.name] for target in targets if target.multilabel}
    return {"classes": classes} | ({"multilabel": list(chosen), "thresholds": chosen} if chosen else {})


def _exported(network: Answering, size: int) -> bytes:
    file, names = io.BytesIO(), [target.name for target in network.targets]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer exporter takes ten times as long for the same graph
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, size, size, dtype=torch.uint8),),
            file,  # type: ignore[arg-type]
            dynamo=False,
            input_names=["pixels"],
            output_names=names,
            dynamic_axes={name: {0: "batch"} for name in ("pixels", *names)},
            # Batch norms stay themselves, so that the graph's weights are the network's; the runtime folds them.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    return file.getvalue()


def _tensor(item: Any) -> Tensor:
    from onnx.numpy_helper import to_array

    return torch.from_numpy(to_array(item).copy())


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes lie in a .safetensors file: offset and length (its format is a header, then bytes)."""
    with path.open("rb") as file:
        (n_header,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(n_header))
    return {
        name: (8 + n_header + about["data_offsets"][0], about["data_offsets"][1] - about["data_offsets"][0])
        for name, about in header.items()
        if name != "__metadata__"
    }


def _point(item: Any, location: str, offset: int, length: int) -> None:
    from onnx import TensorProto

    item.ClearField("raw_data")
    item.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = item.external_data.add()
        entry.key, entry.value = key, value


def _write_code(folder: Path) -> None:
    """Code under a name of its own, so that two versions of it can be loaded side by side."""
    sources = sorted(SERVING.glob("*.py"))
    name = f"pleat_model_{hashlib.sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()[:8]}"
    (folder / "code" / name).mkdir(parents=True)
    for path in sources:
        shutil.copyfile(path, folder / "code" / name / path.name)
    imports = ["from mlflow.models import set_model", f"from {name}.pyfunc import ImageModel"]
    (folder / "model.py").write_text("\n".join([*imports, "", "set_model(ImageModel())", ""]))
