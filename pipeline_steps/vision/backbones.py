"""Frozen timm backbones and feature extraction."""

import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor, nn

from pipeline_steps.vision.timm_networks import HeadOn, Preprocessing, create, mean_std, n_features, preprocessing

GPU_BATCH = 256


class Backbone(nn.Module):
    """A timm network that takes raw uint8 pixels; never trained, so always in eval mode."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 (batch, 3, size, size) to features float32 (batch, n_features)."""
        features: Tensor = self.network((pixels.float() - self.mean) / self.std)
        return features


def load_backbone(
    name: str,
    weights: Path | None,
    head_on: HeadOn = "pooled",
    input_size: int | None = None,
    crop_pct: float | None = None,
) -> tuple[Backbone, Preprocessing]:
    """Builds a timm backbone with pre-trained weights, from a .safetensors file or from timm's hub.

    With `head_on` "logits" its features are the logits of the classes that it was trained on.

    Args:
        input_size: pixels a side; None: the network's own.
        crop_pct: as `timm_networks.preprocessing`.

    Raises:
        PleatError: as `timm_networks.create` and `timm_networks.n_features`.
    """
    if input_size:
        n_features(name, input_size, head_on)  # refuses a size that it cannot take
    network = create(name, weights, pretrained=True, input_size=input_size, head_on=head_on)
    return Backbone(network, *mean_std(name)), preprocessing(name, input_size, crop_pct)


def extract(
    backbone: Backbone, preprocessing: Preprocessing, images: Iterable[tuple[bytes, bool]]
) -> Iterator[np.ndarray]:
    """Features of each image and of its mirrored view.

    Args:
        images: encoded bytes and `plain_jpeg` of each image.

    Yields:
        float32 (2, n_features) an image, in order: plain, mirrored.
    """
    if torch.cuda.is_available():
        yield from _extract_on_gpu(backbone.cuda(), preprocessing, images)
    else:
        yield from _extract_on_cpu(backbone, preprocessing, images)


def onnx_bytes(backbone: Backbone, size: int) -> bytes:
    """The backbone as an ONNX file: input `pixels` uint8 (batch, 3, size, size), output `features`."""
    file = io.BytesIO()
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer exporter takes ten times as long for the same graph
        torch.onnx.export(
            backbone,
            (example,),
            file,  # type: ignore[arg-type]
            dynamo=False,
            input_names=["pixels"],
            output_names=["features"],
            dynamic_axes={"pixels": {0: "batch"}, "features": {0: "batch"}},
        )
    return file.getvalue()


def cpu_runner(backbone: Backbone, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 (batch, 3, size, size) to float32 (batch, n_features) on one core; may be called from many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Several calls side by side, each on one core, are faster than one call spread over all (benchmarks/features.py).
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_bytes(backbone, size), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


def _extract_on_cpu(
    backbone: Backbone, preprocessing: Preprocessing, images: Iterable[tuple[bytes, bool]]
) -> Iterator[np.ndarray]:
    run = cpu_runner(backbone, preprocessing.crop)
    torch.set_num_threads(1)  # each worker thread decodes and resizes on its own core

    def both_views(image: tuple[bytes, bool]) -> np.ndarray:
        pixels = preprocessing(image).numpy()
        return run(np.stack([pixels, pixels[:, :, ::-1]]))

    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: SimpleQueue = SimpleQueue()
        for image in images:
            waiting.put(pool.submit(both_views, image))
            if waiting.qsize() > 16 * n_threads:  # bounds the encoded images held in memory
                yield waiting.get().result()
        while not waiting.empty():
            yield waiting.get().result()


def _extract_on_gpu(
    backbone: Backbone, preprocessing: Preprocessing, images: Iterable[tuple[bytes, bool]]
) -> Iterator[np.ndarray]:
    def features(batch: list[Tensor]) -> np.ndarray:
        pixels = torch.stack(batch).cuda(non_blocking=True)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            views = [backbone(pixels), backbone(pixels.flip(-1))]
        return torch.stack(views, dim=1).float().cpu().numpy()

    images = iter(images)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(images, GPU_BATCH)):
            yield from features(list(pool.map(preprocessing, chunk)))
