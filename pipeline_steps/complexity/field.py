"""What a value in a network depends on: a part of the image, known exactly along both axes, or all of it."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reach:
    """Pixels along one axis that position i depends on: jump * i + low to jump * i + high; `size` positions."""

    low: int
    high: int
    jump: int
    size: int

    @property
    def pixels(self) -> int:
        """Length of the receptive field along this axis."""
        return self.high - self.low + 1

    def window(self, kernel: int, stride: int, padding: int, dilation: int, size: int) -> "Reach":
        """Through a window that slides over the positions."""
        low = self.low - padding * self.jump
        high = self.high + (dilation * (kernel - 1) - padding) * self.jump
        return Reach(low, high, self.jump * stride, size)


@dataclass(frozen=True)
class Field:
    """What a tensor depends on.

    Attributes:
        rows, columns: of the local field; None where no position belongs to a part of the image any more.
        axes: dimensions of the tensor that hold rows and columns; the same one twice where they are flattened.
        whole: what lets it see the whole image; None: nothing.
        lost: the operation from which on the local field could not be followed; None: it could.
    """

    rows: Reach | None
    columns: Reach | None
    axes: tuple[int, int] | None
    whole: str | None = None
    lost: str | None = None

    @property
    def pixels(self) -> int | None:
        """The longer side of the local field."""
        return max(self.rows.pixels, self.columns.pixels) if self.rows and self.columns else None

    def everywhere(self, cause: str, keep: bool = False) -> "Field":
        """Sees the whole image, because of `cause`; with `keep`, its positions keep their local field."""
        whole = self.whole or cause
        return replace(self, whole=whole) if keep else Field(None, None, None, whole, None)

    def unknown(self, cause: str) -> "Field":
        """Could not be followed through `cause`."""
        return self if self.rows is None else Field(None, None, None, self.whole, self.lost or cause)

    def on(self, axes: tuple[int, int] | None) -> "Field":
        """With rows and columns in other dimensions."""
        return replace(self, axes=axes)

    def without(self, dims: Set[int]) -> "Field":
        """After dimensions that hold neither rows nor columns are gone."""
        assert self.axes is not None
        rows, columns = (axis - sum(dim < axis for dim in dims) for axis in self.axes)
        return self.on((rows, columns))


def of_image(height: int, width: int) -> Field:
    """The field of an image of shape (1, channels, height, width)."""
    return Field(Reach(0, 0, 1, height), Reach(0, 0, 1, width), (2, 3))


def merge(fields: Sequence[Field]) -> Field:
    """Where branches meet: all that any of them depends on."""
    whole = next((field.whole for field in fields if field.whole), None)
    lost = next((field.lost for field in fields if field.lost), None)
    local = [field for field in fields if field.rows is not None]
    if not local or lost:
        return Field(None, None, None, whole, lost)
    rows, columns = (_union([getattr(field, axis) for field in local]) for axis in ("rows", "columns"))
    if rows is None or columns is None or len({field.axes for field in local}) > 1:
        return Field(None, None, None, whole, "branches of different strides")
    return Field(rows, columns, local[0].axes, whole)


def _union(reaches: list[Reach]) -> Reach | None:
    """The hull of all; None where their positions do not lie over each other."""
    if len({(reach.jump, reach.size) for reach in reaches}) > 1:
        return None
    first = reaches[0]
    low, high = min(reach.low for reach in reaches), max(reach.high for reach in reaches)
    return Reach(low, high, first.jump, first.size)
