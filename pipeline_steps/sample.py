"""Draws the embedded sample: a few hundred small photographs of garments in the format of the clothing dataset.

It stands in for real photographs where there is no network: 17 classes as unbalanced as the real ones, senders that
each have their own floor and light, and a few of every fault that ingestion has to survive.
"""

import io
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFilter

from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder
from pipeline_steps.sample_shapes import GARMENTS, Rng, Shape

# fmt: off
LABEL_COUNTS = {  # of drawn images; copies and faulty files come on top
    "T-Shirt": 52, "Longsleeve": 36, "Pants": 36, "Shoes": 28, "Shirt": 26, "Dress": 26, "Outwear": 24, "Shorts": 24,
    "Hat": 20, "Skirt": 20, "Polo": 19, "Undershirt": 19, "Blazer": 18, "Hoodie": 18, "Body": 17, "Top": 16,
    "Blouse": 15, "Not sure": 14, "Other": 8, "Skip": 4,
}
# fmt: on
NO_CLASS = ("Not sure", "Other", "Skip")
N_SENDERS = 30
SPREAD_SENDERS = 8  # the first images of a label come from this many different senders
OVERSAMPLING = 2  # drawn this much larger, then averaged, for soft edges
FLOOR_ONLY = {"Pants", "Shoes", "Shorts", "Hat", "Skirt", "Other"}  # never on a hanger
PATTERNS = ["plain", "stripes", "check", "dots", "flowers"]
PATTERN_ODDS = {
    "Shirt": (0.4, 0.2, 0.35, 0.05, 0.0),
    **dict.fromkeys(("Blouse", "Dress", "Top", "Skirt"), (0.4, 0.05, 0.1, 0.15, 0.3)),
    **dict.fromkeys(("Pants", "Shoes", "Outwear", "Blazer", "Hoodie", "Hat"), (0.85, 0.02, 0.08, 0.02, 0.03)),
}

Floats = NDArray[np.float64]


class Row(NamedTuple):
    """One line of images.csv."""

    image: str
    sender_id: int
    label: str
    kids: bool


class Scene(NamedTuple):
    """What all photographs of one sender share."""

    ground: str  # wood, tile, sheet, carpet or hanger
    colours: Floats  # (2, 3), 0..255, of the ground
    texture: float  # its size in garment widths
    across: bool  # planks lie across
    landscape: float  # chance that the phone is turned
    light_angle: float  # radians
    light: float  # how much brighter the lit side is
    warmth: float
    noise: float  # standard deviation in grey levels
    zoom: float
    quality: int  # of the JPEG


def make_scene(rng: Rng) -> Scene:
    """Draws a sender's floor, light and phone."""
    ground = str(rng.choice(["wood", "tile", "sheet", "carpet", "hanger"], p=(0.28, 0.14, 0.28, 0.14, 0.16)))
    hue, saturation = float(rng.choice([0, 345, 30, 40, 210, 280])), float(rng.choice([0.08, 0.2, 0.35, 0.6]))
    if ground in ("wood", "tile", "hanger"):
        hue, saturation = 26.0, 0.45 if ground == "wood" else 0.14
    value = rng.uniform(0.55, 0.9)
    colours = np.stack([rgb(hue, saturation, value), rgb(hue + 12, saturation * 0.8, value * rng.uniform(0.7, 0.85))])
    return Scene(
        ground=ground,
        colours=colours,
        texture=rng.uniform(0.25, 0.5),
        across=bool(rng.random() < 0.4),
        landscape=float(rng.choice([0.03, 0.15, 0.6])),
        light_angle=rng.uniform(0, 2 * np.pi),
        light=rng.uniform(0.05, 0.4),
        warmth=rng.uniform(-0.06, 0.1),
        noise=rng.uniform(1.5, 5.0),
        zoom=rng.uniform(0.84, 0.95),
        quality=int(rng.integers(70, 84)),
    )


def draw_sample(folder: Path, seed: int = 7) -> None:
    """Writes `images.csv` and `images/UUID.jpg`; the same seed gives the same files.

    Args:
        folder: made by this call; may exist if it is empty.
        seed: decides every picture, name and fault.

    Raises:
        PleatError: the folder holds something already or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PleatError(f"{folder} is not an empty folder: name a new one for the sample, or remove it first.")
    rng = np.random.default_rng([seed, 0])
    senders = rng.choice(np.arange(2, 330), N_SENDERS, replace=False)
    scenes = {int(sender): make_scene(np.random.default_rng([seed, 1, int(sender)])) for sender in senders}
    rows = plan(rng, [int(sender) for sender in senders])
    files: dict[str, bytes] = {}
    for number, row in enumerate(rows):
        scene = scenes[row.sender_id]
        photo = draw_garment(row.label, np.random.default_rng([seed, 2, number]), scene=scene)
        files[row.image] = _jpeg(photo, scene.quality)
    add_faults(rng, rows, files)
    with atomic_folder(folder) as partial:
        (partial / "images").mkdir()
        for name, content in files.items():
            (partial / "images" / f"{name}.jpg").write_bytes(content)
        lines = [f"{row.image},{row.sender_id},{row.label},{row.kids}" for row in rows]
        shuffled = [lines[i] for i in rng.permutation(len(lines))]
        text = "\n".join(["image,sender_id,label,kids", *shuffled, ""])
        (partial / "images.csv").write_text(text, encoding="utf-8", newline="\n")


def plan(rng: Rng, senders: list[int]) -> list[Row]:
    """The rows of all drawn images: some senders send many, yet each label comes from several."""
    weights = 1 / (np.arange(len(senders)) + 2.0) ** 0.9
    weights[0] *= 1.6
    weights /= weights.sum()
    rows = []
    for label, count in LABEL_COUNTS.items():
        spread = rng.choice(senders, min(count, SPREAD_SENDERS), replace=False, p=weights)
        for sender in [*spread, *rng.choice(senders, count - len(spread), p=weights)]:
            kids = bool(rng.random() < (0.97 if label == "Body" else 0.08))
            rows.append(Row(_new_name(rng), int(sender), label, kids))
    return rows


def add_faults(rng: Rng, rows: list[Row], files: dict[str, bytes]) -> None:
    """Adds copies, unreadable and missing files to `rows` and `files`, and stores four images in unusual ways."""
    classes = [row for row in rows if row.label not in NO_CLASS]
    chosen = [classes[i] for i in rng.permutation(len(classes))]
    shirt = next(row for row in chosen if row.label == "T-Shirt")
    chosen.remove(shirt)

    def add(like: Row, content: bytes | None, **changes: Any) -> None:
        row = like._replace(image=_new_name(rng), **changes)
        rows.append(row)
        if content is not None:
            files[row.image] = content

    # readable, but stored as few cameras do
    for store in (as_turned, as_palette, as_grey, as_cmyk):
        row = chosen.pop()
        files[row.image] = store(_opened(files[row.image]))
    # the same bytes again, once under another label
    for _ in range(4):
        row = chosen.pop()
        add(row, files[row.image])
    add(shirt, files[shirt.image], label="Longsleeve")
    # nearly the same picture, three from another sender
    for change in (_recompressed, _smaller, _brighter) * 3:
        row = chosen.pop()
        sender = chosen.pop().sender_id if change is _recompressed else row.sender_id
        add(row, change(_opened(files[row.image])), sender_id=sender)
    # unreadable
    for _ in range(2):
        add(chosen.pop(), b"")
        row = chosen.pop()
        add(row, files[row.image][: len(files[row.image]) // 2])
    add(chosen.pop(), b"This is a note about a photograph, not a photograph.\n")
    add(chosen.pop(), _jpeg(Image.new("RGB", (1, 1), (120, 90, 60)), 75))
    # rows without a file and files without a row
    for _ in range(3):
        add(chosen.pop(), None, label="Skip")
    for _ in range(4):
        row = chosen.pop()
        files[_new_name(rng)] = _jpeg(draw_garment(row.label, rng), 75)


def _new_name(rng: Rng) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _jpeg(photo: Image.Image, quality: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality, optimize=True, **options)
    return buffer.getvalue()


def _opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def as_turned(photo: Image.Image) -> bytes:
    """Stored on its side; the EXIF tag says how to turn it back."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return _jpeg(photo.transpose(Image.Transpose.ROTATE_90), 78, exif=exif)


def as_grey(photo: Image.Image) -> bytes:
    """A JPEG with one channel."""
    return _jpeg(photo.convert("L"), 78)


def as_cmyk(photo: Image.Image) -> bytes:
    """A JPEG with the four channels of print."""
    return _jpeg(photo.convert("CMYK"), 78)


def as_palette(photo: Image.Image) -> bytes:
    """A PNG of 32 colours, whatever the name of the file says."""
    buffer = io.BytesIO()
    photo.quantize(32).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _recompressed(photo: Image.Image) -> bytes:
    return _jpeg(photo, 55)


def _smaller(photo: Image.Image) -> bytes:
    return _jpeg(photo.resize((photo.width * 9 // 10, photo.height * 9 // 10), Image.Resampling.BICUBIC), 80)


def _brighter(photo: Image.Image) -> bytes:
    return _jpeg(photo.point(lambda level: level * 1.08), 80)


def draw_garment(label: str, rng: Rng, side: int = 88, scene: Scene | None = None) -> Image.Image:
    """Draws one photograph of a garment.

    Args:
        label: one of `LABEL_COUNTS`.
        rng: decides everything about the garment; the same state gives the same picture.
        side: length of the shorter side in pixels; the other is a third longer.
        scene: the sender's floor, light and phone; a new one where None.

    Returns:
        An RGB image, portrait or landscape.
    """
    scene = scene or make_scene(rng)
    kind = str(rng.choice([*GARMENTS])) if label in ("Not sure", "Skip") else label
    zoom = scene.zoom * rng.uniform(0.93, 1.03) * (rng.uniform(1.5, 2.2) if label == "Not sure" else 1.0)
    size = (side, side * 4 // 3) if rng.random() > scene.landscape else (side * 4 // 3, side)
    large = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
    shapes = GARMENTS[kind](rng)
    placed, unit = place(shapes, rng, large, zoom)
    if scene.ground == "hanger" and kind in FLOOR_ONLY:
        scene = scene._replace(ground="wood")
    ground = draw_ground(scene, rng, large, unit)
    if scene.ground == "hanger":
        hang(ground, placed[0].points[0], unit)
    cloth = choose_colour(rng, scene.colours[0])
    trim = choose_colour(rng, cloth)
    layer, mask = paint(placed, fabric(kind, rng, large, unit, cloth, trim), trim, large)

    shadow = mask.filter(ImageFilter.GaussianBlur(unit * 0.05))
    offset = (int(-0.06 * unit * np.cos(scene.light_angle)), int(0.06 * unit))
    dark = Image.new("L", large)
    dark.paste(shadow, offset)
    photo = np.asarray(ground, float) * (1 - 0.45 * np.asarray(dark, float)[..., None] / 255)
    creases = 1 + 0.13 * cloud(rng, large, 9) + 0.06 * cloud(rng, large, 25)
    alpha = np.asarray(mask, float)[..., None] / 255
    photo = photo * (1 - alpha) + np.asarray(layer, float) * creases[..., None] * alpha

    x, y = np.meshgrid(np.linspace(-1, 1, large[0]), np.linspace(-1, 1, large[1]))
    light = 1 + scene.light * (np.cos(scene.light_angle) * x + np.sin(scene.light_angle) * y) * rng.uniform(0.6, 1.2)
    photo *= light[..., None] * (1 + scene.warmth * np.array([1, 0, -1.5])) * rng.uniform(0.88, 1.1)
    small = Image.fromarray(photo.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BOX)
    if label == "Skip":
        small = small.filter(ImageFilter.GaussianBlur(side / 20))
    noisy = np.asarray(small, float) + rng.normal(0, scene.noise, (size[1], size[0], 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def place(shapes: list[Shape], rng: Rng, size: tuple[int, int], zoom: float) -> tuple[list[Shape], float]:
    """Turns, bends and fits a garment into `size` pixels; returns it and the pixels in a unit of its outline."""
    points = np.concatenate([shape.points for shape in shapes])
    low, high = points.min(0), points.max(0)
    turn = np.radians(np.clip(rng.normal(0, 5), -12, 12))
    bend, wave, phase = rng.normal(0, 0.03, 2), rng.uniform(1.5, 4, 2), rng.uniform(0, 2 * np.pi, 2)
    unit = zoom * min(size[0] / (high[0] - low[0]), size[1] / (high[1] - low[1]))
    unit = float(unit * (1 - 0.6 * abs(np.sin(turn))))
    free = np.maximum(np.array(size) - unit * (high - low), 0)
    centre = np.array(size) / 2 + free * rng.uniform(-0.15, 0.15, 2)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])

    def pixels(outline: list[tuple[float, float]]) -> list[tuple[float, float]]:
        flat = np.array(outline) - (low + high) / 2
        flat = flat + bend * np.sin(wave * flat[:, ::-1] + phase)  # cloth never lies quite symmetrical
        return [(float(x), float(y)) for x, y in flat @ matrix * unit + centre]

    return [shape._replace(points=pixels(shape.points), width=shape.width * unit) for shape in shapes], unit


def paint(
    shapes: list[Shape], cloth: Image.Image, trim: Floats, size: tuple[int, int]
) -> tuple[Image.Image, Image.Image]:
    """Paints placed shapes back to front; returns the picture and the mask of where it is."""
    mean = np.asarray(cloth, float).mean((0, 1))
    line = mean * 0.6 if mean.mean() > 75 else mean + 45  # seams of black cloth show as lighter
    colours = {"trim": trim, "seam": line, "inside": mean * 0.5}
    layer, covered = Image.new("RGB", size), Image.new("L", size)
    for shape in shapes:
        mask = Image.new("L", size)
        pen = ImageDraw.Draw(mask)
        if shape.width:
            pen.line(shape.points, fill=255, width=max(2, round(shape.width)), joint="curve")
        else:
            pen.polygon(shape.points, fill=255)
        if shape.paint == "cloth":
            source = cloth.point(lambda level, tone=shape.tone: level * tone)
        else:
            source = Image.new("RGB", size, _colour(colours[shape.paint] * shape.tone))
        layer.paste(source, mask=mask)
        covered.paste(255, mask=mask)
        if not shape.width:
            ImageDraw.Draw(layer).line([*shape.points, shape.points[0]], fill=_colour(line), width=1)
    return layer, covered


def fabric(kind: str, rng: Rng, size: tuple[int, int], unit: float, cloth: Floats, trim: Floats) -> Image.Image:
    """A sheet of cloth with the pattern that suits the garment."""
    pattern = rng.choice(PATTERNS, p=PATTERN_ODDS.get(kind, (0.55, 0.25, 0.04, 0.06, 0.1)))
    x, y = np.meshgrid(np.arange(size[0]) / unit, np.arange(size[1]) / unit)
    turn, pitch = rng.uniform(-0.15, 0.15), rng.uniform(5, 9)
    if pattern == "stripes" and kind in ("Shirt", "Pants", "Blazer", "Skirt"):
        x, y = y, x
    u, v = (x * np.cos(turn) - y * np.sin(turn)) * pitch % 1, (x * np.sin(turn) + y * np.cos(turn)) * pitch % 1
    amount = {
        "plain": np.zeros_like(u),
        "stripes": (v < 0.4) * 1.0,
        "check": (u < 0.4) * 0.5 + (v < 0.4) * 0.5,
        "dots": (np.hypot(u - 0.5, v - 0.5) < 0.27) * 1.0,
        "flowers": (cloud(rng, size, 22) > 0.7) * 1.0,
    }[str(pattern)]
    return _picture(cloth + (trim - cloth) * 0.6 * amount[..., None])


def draw_ground(scene: Scene, rng: Rng, size: tuple[int, int], unit: float) -> Image.Image:
    """The floor, bed or wall of a scene, moved and creased anew for each photograph."""
    x, y = np.meshgrid(np.arange(size[0]) / unit, np.arange(size[1]) / unit)
    x, y = (x + rng.random(), y + rng.random()) if not scene.across else (y + rng.random(), x + rng.random())
    u, v = x / scene.texture, y / scene.texture
    if scene.ground == "wood":
        plank = np.floor(u)
        amount = 0.5 + 0.5 * np.sin(plank * 37.7) + 0.3 * cloud(rng, size, 14) + 1.0 * ((u - plank) < 0.05)
    elif scene.ground == "tile":
        amount = ((u / 2 % 1 < 0.04) | (v / 2 % 1 < 0.04)) * 1.5 + 0.15 * cloud(rng, size, 8)
    elif scene.ground == "sheet":
        amount = 0.5 * cloud(rng, size, 4) + 0.25 * cloud(rng, size, 10)
    elif scene.ground == "carpet":
        amount = 0.7 * (np.sin(u * 5) * np.sin(v * 5) + 0.3 * np.sin(u * 13) > 0.2) + 0.2 * cloud(rng, size, 60)
    else:
        amount = 0.2 * cloud(rng, size, 3) + 0 * u
    first, second = scene.colours
    return _picture(first + (second - first) * amount[..., None])


def hang(ground: Image.Image, neck: tuple[float, float], unit: float) -> None:
    """Draws a hanger that will show above the shoulders; `neck` is the right end of the neckline."""
    x, y = neck[0] - unit * 0.2, neck[1] - unit * 0.25
    pen = ImageDraw.Draw(ground)
    for end in ((x, 0.0), (x - unit * 0.55, y + unit * 0.45), (x + unit * 0.55, y + unit * 0.45)):
        pen.line([(x, y), end], fill=(40, 40, 45), width=max(2, int(unit * 0.05)))


def choose_colour(rng: Rng, beside: Floats) -> Floats:
    """A cloth's colour that can be told from the one beside it; half are white, grey, black or navy."""
    for _ in range(6):
        if rng.random() < 0.5:
            found = rgb(rng.uniform(200, 240), rng.uniform(0.02, 0.5), float(rng.choice([0.14, 0.25, 0.5, 0.75, 0.95])))
        else:
            found = rgb(rng.uniform(0, 360), rng.uniform(0.2, 0.8), rng.uniform(0.35, 0.9))
        if np.abs(found - beside).sum() > 150:
            break
    return found


def rgb(hue: float, saturation: float, value: float) -> Floats:
    """(3,) from 0 to 255; hue in degrees."""
    sector = (np.array([5, 3, 1]) + hue / 60) % 6
    return 255 * (value - value * saturation * np.minimum(sector, 4 - sector).clip(0, 1))


def _colour(levels: Floats) -> tuple[int, int, int]:
    red, green, blue = levels.clip(0, 255).astype(int).tolist()
    return red, green, blue


def _picture(levels: Floats) -> Image.Image:
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def cloud(rng: Rng, size: tuple[int, int], cells: int) -> Floats:
    """Smooth noise of unit variance, (height, width), with about `cells` bumps across."""
    coarse = Image.fromarray(rng.normal(0, 1, (cells * size[1] // size[0] + 2, cells)).astype(np.float32))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), float)
