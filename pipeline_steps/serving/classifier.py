"""A packaged model: images in, class probabilities out. The network is an ONNX graph whose weights are safetensors."""

import base64
import json
import os
import stat
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch

from .images import decode, resize_crop
from .upright import is_plain_jpeg, open_image

Image = bytes | Path | np.ndarray
Ranked = list[tuple[str, float]]  # labels with their probabilities, the most probable first


class Several(NamedTuple):
    """The answer of a multilabel target."""

    labels: list[tuple[str, float]]  # that apply, in the order of the classes: none, one or several
    ranked: Ranked


Best = dict[str, Ranked | Several]  # by target
AHEAD_A_THREAD = 8  # images under way, so that one slow file holds up nothing
LONGEST_PATH = 4096  # characters, on Linux


class UnreadableError(ValueError):
    """An image that cannot be classified; the message says why."""


class Classifier:
    """Answers images on the CPU, several at a time.

    Attributes:
        classes: of each target, in the order of the probabilities.
        thresholds: of each multilabel target, from which probability on each class applies.
        about: what else travels with the model: preprocessing, data version, limits.
    """

    def __init__(self, folder: Path) -> None:
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.classes: dict[str, list[str]] = self.about["classes"]
        self.thresholds: dict[str, list[float]] = self.about.get("thresholds", {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # calls side by side are faster than one spread over all cores
        self._session = onnxruntime.InferenceSession(folder / "network.onnx", options, ["CPUExecutionProvider"])
        self._n_threads = os.cpu_count() or 1
        torch.set_num_threads(1)

    def probabilities(self, images: Iterable[Image]) -> Iterator[dict[str, np.ndarray] | UnreadableError]:
        """Yields for each image, in order, its probabilities by target, float32 (n_classes,), or why there are none.

        Args:
            images: encoded bytes, the path of a file, or pixels: uint8 (height, width, 3) as RGB, or (height, width).
        """
        with ThreadPoolExecutor(self._n_threads) as pool:
            ahead: deque[Future[dict[str, np.ndarray] | UnreadableError]] = deque()
            for image in images:
                ahead.append(pool.submit(self._answer, image))
                if len(ahead) > AHEAD_A_THREAD * self._n_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def best(self, images: Iterable[Image], top_k: int) -> Iterator[Best | UnreadableError]:
        """Yields for each image, in order, the `top_k` most probable labels of each target, or why there are none.

        With those of a multilabel target come the labels that apply.

        Args:
            images: as for `probabilities`.
            top_k: at least 1; all of them where there are fewer.
        """
        for found in self.probabilities(images):
            if isinstance(found, UnreadableError):
                yield found
                continue
            yield {target: self._best(target, values, top_k) for target, values in found.items()}

    def _best(self, target: str, values: np.ndarray, top_k: int) -> Ranked | Several:
        ranked = self._named(target, values, (-values).argsort(kind="stable")[:top_k])
        if target not in self.thresholds:
            return ranked
        return Several(self._named(target, values, np.flatnonzero(values >= self.thresholds[target])), ranked)

    def _named(self, target: str, values: np.ndarray, codes: np.ndarray) -> list[tuple[str, float]]:
        return [(self.classes[target][code], float(values[code])) for code in codes]

    def _answer(self, image: Image) -> dict[str, np.ndarray] | UnreadableError:
        try:
            pixels = resize_crop(self._decoded(image), **self.about["preprocessing"])
        except UnreadableError as reason:
            return reason
        found = self._session.run(list(self.classes), {"pixels": pixels.numpy()[None]})
        return {target: values[0] for target, values in zip(self.classes, found, strict=True)}

    def _decoded(self, image: Image) -> torch.Tensor:
        """Pixels uint8 (3, height, width)."""
        if isinstance(image, np.ndarray):
            return _from_array(image)
        encoded = _read(image) if isinstance(image, Path) else image
        try:
            with warnings.catch_warnings(), open_image(encoded) as opened:
                warnings.simplefilter("ignore")  # what Pillow warns of is either decoded or refused below
                width, height = opened.size
                if width * height > self.about["max_pixels"]:
                    raise UnreadableError(f"{width}x{height} are more than {self.about['max_pixels']:,} pixels")
                plain_jpeg = is_plain_jpeg(opened)
            return decode(encoded, plain_jpeg)
        except (UnreadableError, MemoryError):
            raise
        except Exception as error:  # decoders raise many kinds for broken files
            raise UnreadableError(_reason(error, encoded)) from None


def image_of(value: Any) -> Image | UnreadableError:
    """What a cell of the column `image` means: bytes, base64, the path of a file, an array or lists of pixels."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, np.ndarray | list):
        try:
            return np.asarray(value)
        except ValueError:
            return UnreadableError("the rows of the pixels differ in length")
    return UnreadableError(f"expected bytes, base64, a path or an array of pixels, but got {type(value).__name__}")


def _of_text(text: str) -> Image | UnreadableError:
    """The bytes of base64 text that holds an image; else a path, which may look like base64 too."""
    try:
        encoded = base64.b64decode("".join(text.split()), validate=True)  # tools break it into lines
    except ValueError:
        return Path(text)
    with suppress(ValueError, OSError):
        open_image(encoded).close()
        return encoded
    if not encoded:
        return UnreadableError("the text is empty")
    return Path(text) if len(text) <= LONGEST_PATH else UnreadableError("the base64 holds no image of a known format")


def _read(path: Path) -> bytes:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        encoded = path.read_bytes() if regular else b""  # a device or a pipe may never end
    except OSError as error:
        raise UnreadableError(f"the file cannot be read: {error.strerror}") from None
    except ValueError as error:  # a zero byte in its name
        raise UnreadableError(f"the file cannot be read: {error}") from None
    if not regular:
        raise UnreadableError("the file cannot be read: it is no regular file")
    return encoded


def _from_array(values: np.ndarray) -> torch.Tensor:
    if values.ndim == 2:
        values = np.repeat(values[:, :, None], 3, axis=2)
    if values.ndim != 3 or values.shape[2] != 3 or 0 in values.shape:
        raise UnreadableError(f"expected pixels of shape (height, width, 3) or (height, width), but got {values.shape}")
    if values.dtype.kind not in "ui" or values.min() < 0 or values.max() > 255:
        raise UnreadableError(f"expected whole numbers from 0 to 255, but got {values.dtype} outside of them")
    return torch.from_numpy(np.ascontiguousarray(values.astype(np.uint8).transpose(2, 0, 1)))


def _reason(error: Exception, encoded: bytes) -> str:
    if not encoded:
        return "the image is empty"
    if type(error).__name__ == "UnidentifiedImageError":  # its own text names an address in memory
        return "it is no image of a known format"
    return f"it cannot be decoded: {' '.join(str(error).split())[:200]}"
