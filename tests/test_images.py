"""Every kind of image file: how it is decoded, and what is refused."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import draw, encode, load_params, write_batch
from PIL import Image

from pipeline_steps import ingest
from pipeline_steps.serving.images import decode, resize_crop
from pipeline_steps.serving.upright import is_plain_jpeg, open_image

ORIENTATION = 0x0112
# What is stored, as the picture that is meant, for each value of EXIF's orientation (TIFF 6.0, page 36).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],  # row 0 is the top, column 0 the right side
    3: lambda shown: shown[::-1, ::-1],  # bottom, right
    4: lambda shown: shown[::-1],  # bottom, left
    5: lambda shown: shown.swapaxes(0, 1),  # row 0 is the left side, column 0 the top
    6: lambda shown: shown[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda shown: shown[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda shown: shown[::-1].swapaxes(0, 1),  # left, bottom
}


def pixels(encoded: bytes) -> np.ndarray:
    """As `prepare` decodes it: (height, width, 3)."""
    with open_image(encoded) as image:
        plain_jpeg = is_plain_jpeg(image)
    decoded = decode(encoded, plain_jpeg)
    assert str(decoded.dtype) == "torch.uint8"
    return decoded.permute(1, 2, 0).numpy()


def ingested(root: Path, files: dict[str, bytes], min_side_px: int = 1) -> tuple[pd.DataFrame, dict[str, str]]:
    """Manifest by id and reasons by id of a batch with one row for each file, beside one good image."""
    rows = dict.fromkeys([*(Path(name).stem for name in files), "good"], "Hat")
    write_batch(root, "b", rows, files | {"good.png": encode(draw(999), "PNG")})
    ingest.run(load_params({"ingest.min_side_px": min_side_px}), "b", root)
    folder = root / "data" / "ingest" / "b"
    manifest = pd.read_parquet(folder / "manifest.parquet")
    quarantine = pd.read_parquet(folder / "quarantine.parquet")
    assert set(quarantine["label"]) <= {"Hat"}
    stem = manifest["source_path"].map(lambda path: Path(path).stem)
    reasons = {Path(row["source_path"]).stem: row["reason"] for _, row in quarantine.iterrows()}
    return manifest.set_index(stem), reasons


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def hand_made_png(rows: list[bytes], width: int, bits: int, colour_type: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PALETTE = png_chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
CLEAR_FIRST = png_chunk(b"tRNS", bytes([0]))
CLEAR_RED = png_chunk(b"tRNS", struct.pack(">3H", 255, 0, 0))
R, G, B, W = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


# name: rows of bytes, width, bits, colour type, further chunks; what it must look like
HAND_MADE = {
    "16-bit grey": (hand_made_png([struct.pack(">3H", 0, 32768, 65535)], 3, 16, 0), [[[0] * 3, [128] * 3, W]]),
    "16-bit RGB": (hand_made_png([struct.pack(">6H", 65535, 0, 0, 0, 32768, 65535)], 2, 16, 2), [[R, [0, 128, 255]]]),
    "grey": (hand_made_png([bytes([0, 200])], 2, 8, 0), [[[0] * 3, [200] * 3]]),
    "black and white": (hand_made_png([bytes([0b10100000])], 3, 1, 0), [[W, [0] * 3, W]]),
    "palette": (hand_made_png([bytes([0, 1, 2])], 3, 8, 3, PALETTE), [[R, G, B]]),
    "transparent palette": (hand_made_png([bytes([0, 1, 2])], 3, 8, 3, PALETTE, CLEAR_FIRST), [[W, G, B]]),
    "RGBA": (hand_made_png([bytes([*R, 255, *R, 0, *R, 51])], 3, 8, 6), [[R, W, [255, 204, 204]]]),
    "grey with alpha": (hand_made_png([bytes([0, 255, 0, 0])], 2, 8, 4), [[[0] * 3, W]]),
    "one transparent colour": (hand_made_png([bytes([*R, *B])], 2, 8, 2, CLEAR_RED), [[W, B]]),
    "one pixel": (hand_made_png([bytes([7, 8, 9])], 1, 8, 2), [[[7, 8, 9]]]),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made_png(name: str, tmp_path: Path) -> None:
    encoded, expected = HAND_MADE[name]
    np.testing.assert_array_equal(pixels(encoded), np.array(expected))
    manifest, reasons = ingested(tmp_path, {"x.png": encoded})
    assert reasons == {}
    assert list(manifest.loc["x", ["height", "width"]]) == [len(expected), len(expected[0])]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(image_format: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    encoded = encode(frames[0], image_format, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(pixels(encoded), np.broadcast_to(R, (30, 40, 3)))
    manifest, reasons = ingested(tmp_path, {f"x.{image_format.lower()}": encoded})
    assert reasons == {}
    assert list(manifest.loc["x", ["width", "height"]]) == [40, 30]


def test_cmyk_is_what_pillow_makes_of_it(tmp_path: Path) -> None:
    encoded = encode(draw(1).convert("CMYK"), quality=90)
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.mode == "CMYK"
        assert not is_plain_jpeg(image)
        np.testing.assert_array_equal(pixels(encoded), np.asarray(image.convert("RGB")))
    _, reasons = ingested(tmp_path, {"x.jpg": encoded})
    assert reasons == {}


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_honoured(image_format: str, tmp_path: Path) -> None:
    # Four colours, one in each quarter, so that no two orientations look the same; 32 by 48 pixels.
    shown = np.zeros((32, 48, 3), dtype=np.uint8)
    shown[:16, :24], shown[:16, 24:], shown[16:, :24], shown[16:, 24:] = R, G, B, [255, 255, 0]
    options = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "TIFF": {}}
    suffix = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "TIFF": "tif"}[image_format]
    files = {}
    for orientation, store in STORED.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        stored = Image.fromarray(np.ascontiguousarray(store(shown)))
        files[f"{orientation}.{suffix}"] = encode(stored, image_format, exif=exif, **options[image_format])
        difference = np.abs(pixels(files[f"{orientation}.{suffix}"]).astype(int) - shown)
        assert difference.max() <= (12 if image_format == "JPEG" else 0), orientation
    manifest, reasons = ingested(tmp_path, files)
    assert reasons == {}
    assert set(zip(manifest.drop("good")["width"], manifest.drop("good")["height"], strict=True)) == {(48, 32)}
    if image_format != "JPEG":
        assert manifest.drop("good")["phash"].nunique() == 1, "the same picture, however it was stored"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("content", [b"Exif\0\0garbage!!!", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"])
def test_a_broken_exif_block_does_not_matter(content: bytes, tmp_path: Path) -> None:
    whole = encode(draw(3))
    broken = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + whole[2:]
    np.testing.assert_array_equal(pixels(broken), pixels(whole))
    assert ingested(tmp_path, {"x.jpg": broken})[1] == {}


def test_the_fast_jpeg_path_agrees_with_pillow() -> None:
    for seed, options in enumerate([{}, {"quality": 40}, {"progressive": True}, {"subsampling": 0}, {"grey": True}]):
        image = draw(seed, 333, 250).convert("L" if options.pop("grey", False) else "RGB")
        encoded = encode(image, **options)
        with open_image(encoded) as opened:
            assert is_plain_jpeg(opened)
        fast, slow = decode(encoded, plain_jpeg=True), decode(encoded, plain_jpeg=False)
        assert fast.shape == slow.shape == (3, 250, 333)
        difference = (fast.int() - slow.int()).abs()
        assert difference.max() <= 3
        assert difference.float().mean() < 0.1


def test_resize_crop_takes_the_central_square() -> None:
    pixels = np.zeros((60, 120, 3), dtype=np.uint8)
    pixels[:, 30:90] = 255
    for shape in (pixels, pixels.swapaxes(0, 1)):
        cropped = resize_crop(decode(encode(Image.fromarray(np.ascontiguousarray(shape)), "PNG"), False), 30, 30)
        assert cropped.shape == (3, 30, 30)
        assert cropped.float().mean() > 250


def test_what_is_broken_is_refused_with_its_reason(tmp_path: Path) -> None:
    jpeg, png = encode(draw(1, 300, 400)), encode(draw(2, 300, 400), "PNG")
    crc = bytearray(png)
    crc[len(png) // 2] ^= 0xFF
    broken = {
        "zero.jpg": (b"", "undecodable"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "end.jpg": (jpeg[:-2], "truncated"),
        "header.jpg": (jpeg[:30], "truncated"),
        "half.progressive.jpg": (encode(draw(3, 300, 400), progressive=True)[:-2000], "truncated"),
        "half2.png": (png[: len(png) // 2], "truncated"),
        "magic.png": (png[:8], "undecodable"),
        "corrupt.png": (bytes(crc), "undecodable"),
        "half3.gif": (encode(draw(4), "GIF")[:-500], "truncated"),
        "half4.webp": (encode(draw(5), "WEBP")[:-50], "undecodable"),
        "text.jpg": (b"<html><body>404 Not Found</body></html>", "undecodable"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n%%EOF\n", "undecodable"),
        "pixmap.jpg": (encode(draw(8), "PPM"), "undecodable"),  # Pillow could, but no data set holds such
        "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>', "undecodable"),
        "random.png": (np.random.default_rng(0).bytes(5000), "undecodable"),
        "pixel.png": (encode(draw(6, 1, 1), "PNG"), "too small"),
        "thin.png": (encode(draw(7, 400, 15), "PNG"), "too small"),
    }
    manifest, reasons = ingested(tmp_path, {name: data for name, (data, _) in broken.items()}, min_side_px=16)
    assert reasons == {Path(name).stem: reason for name, (_, reason) in broken.items()}
    assert list(manifest.index) == ["good"]


def test_a_decompression_bomb_is_refused_before_its_pixels_are_made(tmp_path: Path) -> None:
    side = 30_000
    squeeze = zlib.compressobj(1)
    rows = b"\0" * (1 + side // 8)
    data = b"".join(squeeze.compress(rows * 1000) for _ in range(side // 1000)) + squeeze.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    assert len(bomb) < 600_000
    write_batch(tmp_path, "b", {"bomb": "Hat", "good": "Hat"}, {"bomb.png": bomb, "good.png": encode(draw(1), "PNG")})
    # In a process of its own, whose largest memory use is its own too; the pixels would take 900 MB and more.
    child = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import load_params
from pipeline_steps import ingest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ingest.run(load_params(), "b", Path({str(tmp_path)!r}))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // (1024 if sys.platform == "linux" else 2**20))
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 200, "megabytes"
    quarantine = pd.read_parquet(tmp_path / "data" / "ingest" / "b" / "quarantine.parquet")
    assert list(quarantine["reason"]) == ["too many pixels"]
    assert list(quarantine["detail"]) == ["30000x30000 is over ingest.max_pixels"]


def test_the_limits_are_those_of_params(tmp_path: Path) -> None:
    rows = dict.fromkeys(("at", "over", "small", "under"), "Hat")
    files = {
        "at.png": encode(draw(1, 40, 50), "PNG"),
        "over.png": encode(draw(2, 40, 51), "PNG"),
        "small.png": encode(draw(3, 30, 50), "PNG"),
        "under.png": encode(draw(4, 29, 50), "PNG"),
    }
    write_batch(tmp_path, "b", rows, files)
    ingest.run(load_params({"ingest.max_pixels": 2000, "ingest.min_side_px": 30}), "b", tmp_path)
    folder = tmp_path / "data" / "ingest" / "b"
    assert list(pd.read_parquet(folder / "manifest.parquet")["source_path"]) == ["images/at.png", "images/small.png"]
    assert list(pd.read_parquet(folder / "quarantine.parquet")["reason"]) == ["too many pixels", "too small"]
