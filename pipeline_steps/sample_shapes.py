"""Outlines of garments for the embedded sample (`sample.py` puts them on a floor and photographs them)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

TOP = -0.75  # height of the shoulders; garments are drawn in about -1..1, y downwards

Rng = np.random.Generator
Points = list[tuple[float, float]]


class Shape(NamedTuple):
    """One piece of a garment: a filled outline, or a line where `width` is above 0 (same unit as the points)."""

    points: Points
    paint: str = "cloth"  # cloth, trim (second colour), inside (shaded cloth) or seam
    tone: float = 1.0
    width: float = 0.0


def near(rng: Rng, value: float, spread: float = 0.09) -> float:
    """`value`, up to the share `spread` more or less."""
    return float(value * rng.uniform(1 - spread, 1 + spread))


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> Points:
    """Points on an ellipse; angles in degrees, 0 to the right, 90 downwards."""
    angles = np.radians(np.linspace(start, stop, 20))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def flip(points: Points) -> Points:
    """The mirror image, left to right, with the points in reverse order."""
    return [(-x, y) for x, y in reversed(points)]


def whole(half: Points, *style: Any) -> Shape:
    """A symmetrical shape from its right half, listed from the top down; `style` as in `Shape`."""
    return Shape(half + flip(half), *style)


def both(points: Points, *style: Any) -> list[Shape]:
    """A shape and its mirror image."""
    return [Shape(points, *style), Shape(flip(points), *style)]


def seam(*points: tuple[float, float], width: float = 0.02, paint: str = "seam") -> Shape:
    """A line through `points`, `width` wide in their unit."""
    return Shape(list(points), paint, 1.0, width)


def dots(x: float, start: float, stop: float, count: int, size: float = 0.028, paint: str = "trim") -> list[Shape]:
    """`count` discs of radius `size` below one another at `x`, evenly from `start` to `stop`."""
    return [Shape(arc(x, float(y), size, size), paint) for y in np.linspace(start, stop, count)]


def torso(
    rng: Rng,
    neck: float = 0.19,
    dip: float = 0.13,
    shoulder: float = 0.46,
    sleeve: float = 0.0,
    angle: float = 70,
    cuff: float = 0.2,
    chest: float = 0.45,
    tail: Points | None = None,
) -> list[Shape]:
    """The back of the neck, two sleeves where `sleeve` is above 0, and a body that ends in `tail` (its right half)."""
    shoulder, chest, sleeve, angle = near(rng, shoulder), near(rng, chest), near(rng, sleeve), near(rng, angle, 0.12)
    tail = tail or [(chest * near(rng, 0.97), 0), (near(rng, chest), 0.72), (0, 0.76)]
    lean = math.radians(angle)
    tip = (shoulder + sleeve * math.cos(lean), TOP + 0.08 + sleeve * math.sin(lean))
    edge = (tip[0] - cuff * math.sin(lean), tip[1] + cuff * math.cos(lean))
    armpit = (chest, TOP + 0.45)
    shapes = [Shape(arc(0, TOP, neck, dip, 0, 180), "inside")]
    if sleeve:
        shapes += both([(shoulder - 0.06, TOP + 0.05), (shoulder, TOP + 0.08), tip, edge, armpit], "cloth", 0.93)
        armhole = [(shoulder - 0.03, TOP + 0.25)]
    else:
        armhole = [(shoulder - 0.07, TOP + 0.2), (shoulder - 0.04, TOP + 0.34)]
    collar = arc(0, TOP, neck, dip, 90, 0)
    return [*shapes, whole([*collar, (shoulder, TOP + 0.08), *armhole, armpit, *tail])]


def neckband(neck: float = 0.19, dip: float = 0.13, paint: str = "seam") -> Shape:
    """A line just below a neckline of half width `neck` and depth `dip`."""
    return Shape(arc(0, TOP, neck + 0.02, dip + 0.03, 0, 180), paint, 1.0, 0.045)


def collar(paint: str = "cloth") -> list[Shape]:
    """A folded collar: a darker stand and two lighter leaves."""
    leaf = [(0.0, TOP + 0.13), (0.15, TOP - 0.07), (0.23, TOP + 0.02), (0.18, TOP + 0.2)]
    return [
        Shape([(-0.16, TOP - 0.07), (0.16, TOP - 0.07), (0.19, TOP), (-0.19, TOP)], paint, 0.8),
        *both(leaf, paint, 1.12),
    ]


def motif(rng: Rng, chance: float) -> list[Shape]:
    """A print on the chest."""
    if rng.random() > chance:
        return []
    x, y, rx, ry = rng.uniform(-0.05, 0.05), rng.uniform(-0.3, -0.05), rng.uniform(0.1, 0.24), rng.uniform(0.06, 0.22)
    blob = (
        arc(x, y, rx, ry)
        if rng.random() < 0.5
        else [(x - rx, y - ry), (x + rx, y - ry), (x + rx, y + ry), (x - rx, y + ry)]
    )
    return [Shape(blob, "trim"), Shape(arc(x, y, rx / 2, ry / 2), "cloth", 0.85)]


# Garments, each a list of shapes from back to front


def t_shirt(rng: Rng) -> list[Shape]:
    """Short sleeves, a neckband and often a print."""
    paint = "trim" if rng.random() < 0.3 else "seam"
    return [*torso(rng, sleeve=0.38, angle=48, cuff=0.27), neckband(paint=paint), *motif(rng, 0.6)]


def longsleeve(rng: Rng) -> list[Shape]:
    """Long sleeves, a neckband and at times a print."""
    paint = "trim" if rng.random() < 0.3 else "seam"
    return [*torso(rng, sleeve=1.1, angle=74, cuff=0.15), neckband(paint=paint), *motif(rng, 0.35)]


def polo(rng: Rng) -> list[Shape]:
    """Short sleeves, a collar and a placket with three buttons."""
    paint = "trim" if rng.random() < 0.4 else "cloth"
    placket = whole([(0.05, TOP + 0.1), (0.05, TOP + 0.5), (0, TOP + 0.5)], paint, 0.9)
    body = torso(rng, sleeve=0.38, angle=52, cuff=0.27)
    return [*body, placket, *collar(paint), *dots(0, TOP + 0.22, TOP + 0.42, 3, paint="seam")]


def shirt(rng: Rng) -> list[Shape]:
    """Long or short sleeves, a collar, seven buttons and often a breast pocket."""
    long = rng.random() < 0.75
    sleeve: dict[str, float] = (
        {"sleeve": 1.1, "angle": 74, "cuff": 0.16} if long else {"sleeve": 0.42, "angle": 52, "cuff": 0.28}
    )
    tail = [(0.43, 0), (0.46, 0.6), (0.3, 0.74), (0.12, 0.8), (0, 0.8)]
    shapes = [
        *torso(rng, **sleeve, tail=tail),
        seam((-0.05, TOP + 0.15), (-0.05, 0.78)),
        seam((0.05, TOP + 0.15), (0.05, 0.78)),
    ]
    if rng.random() < 0.6:
        shapes.append(Shape([(0.14, -0.38), (0.34, -0.38), (0.34, -0.18), (0.24, -0.13), (0.14, -0.18)], "cloth", 0.85))
    return [*shapes, *collar(), *dots(0, TOP + 0.25, 0.65, 7)]


def blouse(rng: Rng) -> list[Shape]:
    """A deep neckline and sleeves of one of three lengths; often a frilled waist or a bow."""
    frilled = rng.random() < 0.6
    wide = rng.uniform(0.5, 0.62) if frilled else 0.47
    tail = [(0.36 if frilled else 0.44, 0.1), (wide, 0.55), (wide / 2, 0.64), (0, 0.6)]
    sleeve, cuff = [(0.6, 0.36), (0.75, 0.34), (1.0, 0.22)][rng.integers(3)]
    shapes = torso(rng, neck=0.2, dip=0.36, sleeve=sleeve, angle=62, cuff=cuff, tail=tail)
    if frilled:
        shapes += both(arc(0.2, 0.16, 0.05, 0.42, 0, 80), "seam", 1.0, 0.015)
        shapes.append(seam((-0.37, 0.1), (0, 0.14), (0.37, 0.1), width=0.035))
    if rng.random() < 0.5:  # a bow
        shapes += both([(0, TOP + 0.38), (0.17, TOP + 0.28), (0.17, TOP + 0.48)], "trim")
        shapes += both([(0, TOP + 0.38), (0.1, TOP + 0.68)], "trim", 1.0, 0.04)
    return shapes


def undershirt(rng: Rng) -> list[Shape]:
    """No sleeves, a deep neckline with an edge and at times a print."""
    neck, dip = near(rng, 0.2), near(rng, 0.36)
    edge = neckband(neck, dip, "trim" if rng.random() < 0.4 else "seam")
    return [*torso(rng, neck=neck, dip=dip, shoulder=0.33, chest=0.43), edge, *motif(rng, 0.45)]


def top(rng: Rng) -> list[Shape]:
    """Two straps and a frill across the chest."""
    wide, low = near(rng, 0.36), rng.uniform(0.2, 0.42)
    cup = [(0, -0.3), (0.18, -0.44), (0.34, -0.36), (wide, -0.15), (wide * near(rng, 1.15), low), (0, low + 0.04)]
    straps = both([(0.2, -0.42), (near(rng, 0.17), -0.85)], "cloth", 0.9, rng.choice([0.04, 0.04, 0.1]))
    frill = seam(
        (-wide - 0.02, -0.12), (0, -0.06), (wide + 0.02, -0.12), paint="trim" if rng.random() < 0.6 else "seam"
    )
    return [*straps, whole(cup), frill]


def dress(rng: Rng) -> list[Shape]:
    """Short sleeves or none, a waistband and a long flared skirt with three seams."""
    waist, wide, low = near(rng, 0.3), rng.uniform(0.5, 0.72), rng.uniform(0.95, 1.15)
    tail = [(waist, 0), (wide, low), (wide / 2, low + 0.05), (0, low + 0.06)]
    sleeve = 0.3 if rng.random() < 0.5 else 0.0
    shapes = torso(
        rng, dip=rng.uniform(0.12, 0.3), shoulder=0.38, sleeve=sleeve, angle=50, cuff=0.24, chest=0.36, tail=tail
    )
    shapes += [seam((x * waist, 0.05), (x * wide, low), width=0.015) for x in (-0.5, 0, 0.5)]
    return [*shapes, seam((-waist, 0.0), (waist, 0.0), width=0.07, paint="trim" if rng.random() < 0.5 else "seam")]


def skirt(rng: Rng) -> list[Shape]:
    """A waistband and a flared skirt of varying length, often with five seams."""
    waist, wide, low = near(rng, 0.33), rng.uniform(0.42, 0.75), rng.uniform(0.25, 0.75)
    shapes = [
        whole(
            [
                (0, -0.5),
                (waist, -0.5),
                ((waist + wide) / 1.9, low / 3),
                (wide, low),
                (wide / 2, low + 0.05),
                (0, low + 0.06),
            ]
        )
    ]
    if rng.random() < 0.6:
        shapes += [seam((x * waist, -0.4), (x * wide, low), width=0.015) for x in (-0.7, -0.35, 0, 0.35, 0.7)]
    return [
        *shapes,
        whole([(0, -0.5), (waist, -0.5), (waist, -0.4), (0, -0.4)], "trim" if rng.random() < 0.4 else "cloth", 0.8),
    ]


def trousers(rng: Rng, low: float, flare: float) -> list[Shape]:
    """Two legs down to the height `low`, with pockets and hems; a hem is `flare` times half the hips wide."""
    waist, hip, apart = near(rng, 0.33), near(rng, 0.41), rng.uniform(0.0, 0.12)
    ankle = hip * flare
    leg = [(hip + apart, low), (hip + apart - ankle, low + 0.02), (0.02, -0.28), (0, -0.29)]
    shapes = [whole([(0, -0.9), (waist, -0.9), (hip, -0.45), *leg]), seam((0, -0.9), (0, -0.3))]
    shapes += both([(waist * 0.6, -0.8), (waist * 1.05, -0.6)], "seam", 1.0, 0.02)
    shapes += both([(hip + apart - 0.02, low - 0.05), (hip + apart - ankle + 0.02, low - 0.04)], "seam", 1.0, 0.025)
    return [
        *shapes,
        whole([(0, -0.9), (waist, -0.9), (waist, -0.81), (0, -0.81)], "trim" if rng.random() < 0.3 else "cloth", 0.8),
    ]


def pants(rng: Rng) -> list[Shape]:
    """Trousers whose long legs narrow downwards."""
    return trousers(rng, rng.uniform(0.8, 1.05), rng.uniform(0.45, 0.75))


def shorts(rng: Rng) -> list[Shape]:
    """Trousers whose short legs stay about as wide."""
    return trousers(rng, rng.uniform(-0.12, 0.12), rng.uniform(0.95, 1.1))


def shoes(rng: Rng) -> list[Shape]:
    """A pair from above, or from the side as low shoes or boots."""
    if rng.random() < 0.55:  # a pair from above
        shapes = []
        for x in (-0.3, 0.3):
            foot = [*arc(x, -0.35, 0.23, 0.32, 180, 360), *arc(x, 0.45, 0.19, 0.25, 0, 180)]
            shapes += [Shape([(x + (a - x) * 1.15, b * 1.07) for a, b in foot], "trim"), Shape(foot)]
            shapes.append(Shape(arc(x, 0.25, 0.12, 0.32), "inside"))
            shapes += [seam((x - 0.12, y), (x + 0.12, y), width=0.04, paint="trim") for y in (-0.3, -0.17, -0.04)]
        return shapes
    shaft = rng.choice([0.0, 0.05, 0.6])  # the pair from the side: low shoes or boots
    shapes = []
    for x, y in ((0.14, -0.26), (0.0, 0.0)):
        upper = [
            (-0.7, 0.25),
            (-0.72, -0.3 - shaft),
            (-0.25, -0.3 - shaft),
            (-0.12, -0.15),
            (0.3, 0.0),
            (0.62, 0.08),
            (0.72, 0.25),
        ]
        sole = [(-0.74, 0.22), (0.76, 0.22), (0.74, 0.36), (-0.72, 0.36)]
        shapes += [Shape([(a + x, b + y) for a, b in upper]), Shape([(a + x, b + y) for a, b in sole], "trim")]
        shapes.append(Shape(arc(x - 0.48, y - 0.3 - shaft, 0.22, 0.06), "inside"))
        shapes += [
            seam((x + a, y - 0.2 + a / 3), (x + a + 0.1, y + a / 3), paint="trim", width=0.03)
            for a in (-0.15, 0.0, 0.15)
        ]
    return shapes


def hat(rng: Rng) -> list[Shape]:
    """A cap, a beanie or a hat with a brim all round."""
    kind, high = rng.choice(["cap", "beanie", "brim"]), near(rng, 0.62)
    dome = Shape([*arc(0, 0.1, 0.52, high, 180, 360), (0.52, 0.25), (-0.52, 0.25)])
    ribs = [Shape(arc(0, 0.1, x, high, 180, 360), "seam", 1.0, 0.015) for x in (0.2, 0.38)]
    if kind == "beanie":
        band = Shape(
            [(-0.55, 0.1), (0.55, 0.1), (0.55, 0.36), (-0.55, 0.36)], "trim" if rng.random() < 0.5 else "cloth", 0.88
        )
        return [dome, *ribs, band, *([Shape(arc(0, 0.1 - high, 0.17, 0.16), "trim")] if rng.random() < 0.5 else [])]
    if kind == "cap":
        visor = Shape(arc(0, 0.22, 0.5, near(rng, 0.36), 0, 180), "trim" if rng.random() < 0.4 else "cloth", 0.8)
        return [dome, *ribs, visor, *dots(0, 0.1 - high, 0.1 - high, 1, 0.05), Shape(arc(0, -0.1, 0.16, 0.12), "trim")]
    brim = Shape(arc(0, 0.3, near(rng, 0.95), 0.26), "cloth", 0.85)
    return [brim, dome, Shape([(-0.52, 0.08), (0.52, 0.08), (0.52, 0.26), *arc(0, 0.26, 0.52, 0.08, 0, 180)], "trim")]


def outwear(rng: Rng) -> list[Shape]:
    """A jacket or coat with a stand collar and a zip, quilted or with pockets; a fifth have no sleeves."""
    low = rng.uniform(0.7, 1.1)
    wide = near(rng, 0.54)
    sleeve = 0.0 if rng.random() < 0.2 else 1.05
    tail = [(wide, 0), (wide * 1.04, low), (0, low + 0.02)]
    shapes = torso(rng, neck=0.2, dip=0.1, shoulder=0.5, sleeve=sleeve, angle=70, cuff=0.25, chest=wide, tail=tail)
    if rng.random() < 0.6:  # quilted
        shapes += [seam((-wide, float(y)), (wide, float(y)), width=0.03) for y in np.arange(-0.45, low - 0.05, 0.19)]
    else:
        shapes += both([(0.2, 0.2), (0.42, 0.1)], "seam", 1.0, 0.05)
        shapes.append(seam((-wide, 0.05), (wide, 0.05), width=0.08, paint="trim" if rng.random() < 0.5 else "seam"))
    stand = [(-0.24, TOP + 0.06), (-0.2, TOP - 0.14), (0.2, TOP - 0.14), (0.24, TOP + 0.06), (0, TOP + 0.14)]
    return [*shapes, Shape(stand, "cloth", 0.75), seam((0, TOP - 0.1), (0, low), width=0.045, paint="trim")]


def blazer(rng: Rng) -> list[Shape]:
    """Long sleeves, lapels round a deep opening, two pockets and two buttons."""
    button = rng.uniform(-0.05, 0.15)
    tail = [(0.4, 0.05), (0.5, 0.68), (0.2, 0.76), (0.02, 0.6), (0, 0.6)]
    shapes = torso(rng, shoulder=0.5, sleeve=1.1, angle=76, cuff=0.19, chest=0.46, tail=tail)
    shapes.append(
        Shape([(-0.18, TOP - 0.02), (0.18, TOP - 0.02), (0, button)], "trim" if rng.random() < 0.6 else "inside")
    )
    lapel = [
        (0.13, TOP - 0.05),
        (0.24, TOP + 0.02),
        (0.34, TOP + 0.28),
        (0.24, TOP + 0.32),
        (0.27, TOP + 0.4),
        (0, button),
    ]
    shapes += [
        *both(lapel, "cloth", 1.2),
        seam((0, button), (0, 0.6)),
        *both([(0.18, 0.3), (0.4, 0.28)], "seam", 1.0, 0.06),
    ]
    return [*shapes, *dots(0.06, button + 0.06, button + 0.24, 2, 0.03, "seam")]


def hoodie(rng: Rng) -> list[Shape]:
    """Long sleeves, a hood with cords and a front pocket; a zip, a print or neither."""
    high = near(rng, 0.36, 0.2)
    shapes = [Shape(arc(0, TOP + 0.02, near(rng, 0.32), high), "cloth", 0.85)]
    shapes += torso(rng, neck=0.24, dip=0.16, sleeve=1.08, angle=73, cuff=0.18, chest=0.49)
    shapes += [
        Shape(arc(0, TOP - 0.03, 0.2, high * 0.68), "inside"),
        *both([(0.06, TOP + 0.15), (0.08, TOP + 0.5)], "trim", 1.0, 0.03),
    ]
    shapes.append(whole([(0.17, 0.16), (0.32, 0.42), (0.32, 0.58), (0, 0.58)], "cloth", 0.82))
    shapes.append(seam((-0.46, 0.68), (0.46, 0.68), width=0.05))
    return [*shapes, *([seam((0, TOP + 0.16), (0, 0.75), width=0.035)] if rng.random() < 0.4 else motif(rng, 0.5))]


def body(rng: Rng) -> list[Shape]:
    """A baby's bodysuit with short or long sleeves and mostly a print; a quarter have legs and feet."""
    tail = [(0.44, 0.15), (0.45, 0.32), *arc(0.46, 0.66, 0.3, 0.32, 265, 150), (0.15, 0.84), (0, 0.85)]
    if rng.random() < 0.25:  # with legs and feet
        tail = [(0.46, 0.2), (0.5, 0.85), (0.4, 0.98), (0.22, 0.92), (0.06, 0.4), (0, 0.38)]
    long = rng.random() < 0.35
    shapes = torso(
        rng,
        neck=0.22,
        dip=0.16,
        sleeve=0.8 if long else 0.3,
        angle=58 if long else 45,
        cuff=0.2 if long else 0.28,
        tail=tail,
    )
    edge = Shape(tail[1:-2], "trim", 1.0, 0.05)
    return [*shapes, neckband(0.22, 0.16, "trim"), edge, edge._replace(points=flip(edge.points)), *motif(rng, 0.75)]


def other(rng: Rng) -> list[Shape]:
    """A bag or dungarees, neither of them one of the classes."""
    if rng.random() < 0.5:  # a bag
        handle = Shape(arc(0, -0.2, 0.3, 0.5, 180, 360), "trim", 1.0, 0.07)
        return [
            handle,
            Shape([(-0.55, -0.2), (0.55, -0.2), (0.65, 0.6), (-0.65, 0.6)]),
            seam((-0.5, 0.05), (0.5, 0.05)),
        ]
    bib = [(-0.24, -1.3), (0.24, -1.3), (0.3, -0.85), (-0.3, -0.85)]
    return [*both([(0.2, -1.25), (0.24, -1.7)], "trim", 1.0, 0.07), *trousers(rng, 0.8, 0.6), Shape(bib)]


# fmt: off
GARMENTS: dict[str, Callable[[Rng], list[Shape]]] = {
    "T-Shirt": t_shirt, "Longsleeve": longsleeve, "Pants": pants, "Shoes": shoes, "Shirt": shirt, "Dress": dress,
    "Outwear": outwear, "Shorts": shorts, "Hat": hat, "Skirt": skirt, "Polo": polo, "Undershirt": undershirt,
    "Blazer": blazer, "Hoodie": hoodie, "Body": body, "Top": top, "Blouse": blouse, "Other": other,
}
# fmt: on
