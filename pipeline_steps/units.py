"""Numbers as people read them."""


def with_unit(count: float) -> str:
    """1234567 as `1.2 M`: thousands, millions, billions with k, M, G."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size * 0.9995:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
