"""Pictures of what was measured: the roofline, and the effective receptive field over an example image."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from pipeline_steps.complexity.effective import Effective
from pipeline_steps.complexity.latency import Peak, Timing
from pipeline_steps.plots import BLUE, GREEN, INK, PALE, PURPLE, VERMILLION, figure, log_ticks, short
from pipeline_steps.units import with_unit

if TYPE_CHECKING:
    from pipeline_steps.complexity.report import Profile

KINDS = {  # of layers with multiply-accumulates
    "convolution": ("o", BLUE),
    "grouped or depthwise convolution": ("^", VERMILLION),
    "linear": ("s", GREEN),
    "attention and other products": ("D", PURPLE),
}
SQUARES = {0.5: (VERMILLION, "-"), 0.9: (BLUE, "-")}


def draw(folder: Path, profiles: "Sequence[Profile]") -> None:
    """Writes roofline_N.png and effective_N.png for the Nth profile, as far as that was measured."""
    for number, profile in enumerate(profiles):
        if profile.timings:
            roofline(folder / f"roofline_{number}.png", profile.name, profile.table, profile.timings, profile.peaks)
        if profile.effective:
            effective(folder / f"effective_{number}.png", profile.name, profile.effective)


def roofline(path: Path, name: str, table: pd.DataFrame, timings: Sequence[Timing], peaks: dict[str, Peak]) -> None:
    """Speed of each layer over its arithmetic intensity, below what the machine could do (Williams et al. 2009).

    Args:
        path: the PNG to write.
        name: of the network.
        table: of layers, with a column for each timing.
        timings: a panel each.
        peaks: of each device, by its place in words.
    """
    from pipeline_steps.complexity.report import column_of  # late: it imports this file

    rows = (len(timings) + 1) // 2
    with figure(path, 10.2, 0.6 + 3.9 * rows) as drawing:
        for axes, timing in zip(drawing.subplots(rows, 2, squeeze=False).flat, timings, strict=True):
            _panel(axes, table.assign(ms=table[column_of(timing)]), timing, peaks[timing.place])
        drawing.suptitle(f"{name}: speed of each layer against the machine's roof", x=0.01, ha="left", weight="bold")
        there = set(table[table["macs"] > 0].apply(_kind, axis=1))
        handles = [
            Line2D([], [], marker=marker, color=colour, ls="", ms=6, label=kind)
            for kind, (marker, colour) in KINDS.items()
            if kind in there
        ]
        handles.append(Line2D([], [], color=INK, label="measured peak of memory and of arithmetic"))
        drawing.legend(handles=handles, loc="outside lower left", ncols=3)


def _panel(axes: Axes, table: pd.DataFrame, timing: Timing, peak: Peak) -> None:
    layers = table[(table["macs"] > 0) & (table["ms"] > 0)]
    flops = timing.batch * layers["flops"]
    intensity = flops / (layers["weight_bytes"] + timing.batch * layers["value_bytes"])
    speed = flops / (layers["ms"] / 1000)
    kinds = layers.apply(_kind, axis=1)
    for kind, (marker, colour) in KINDS.items():
        of_kind = kinds == kind
        size = 8 + 250 * layers["ms"][of_kind] / timing.median_ms
        axes.scatter(
            intensity[of_kind], speed[of_kind], marker=marker, color=colour, s=size, alpha=0.6, lw=0, zorder=3,
        )  # fmt: skip
    knee = peak.flops_per_s / peak.bytes_per_s
    low, high = min(intensity.min(), knee) / 2, max(intensity.max(), knee) * 3
    reach = np.geomspace(low, high, 100)
    roof = np.minimum(peak.flops_per_s, reach * peak.bytes_per_s)
    axes.plot(reach, roof, color=INK, lw=1.6)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(bottom=speed.min() / 2, top=peak.flops_per_s * 4)
    axes.text(high / 1.1, peak.flops_per_s * 1.15, f"{with_unit(peak.flops_per_s)}FLOP/s", ha="right", color=INK)
    axes.text(0.02, 0.97, f"memory: {with_unit(peak.bytes_per_s)}B/s", transform=axes.transAxes, va="top", color=INK)
    axes.set_xlabel("FLOPs for each byte moved")
    axes.set_ylabel("FLOP/s (larger: takes more of the time)")
    log_ticks(axes.yaxis, with_unit)
    log_ticks(axes.xaxis, lambda value: f"{value:g}")
    axes.set_title(f"Batch of {timing.batch}, {timing.place}", loc="left")


def _kind(layer: "pd.Series[Any]") -> str:
    if layer["kernel"]:
        return "convolution" if layer["groups"] in ("", "1") else "grouped or depthwise convolution"
    return "linear" if "Linear" in layer["kind"] else "attention and other products"


def effective(path: Path, name: str, found: Effective) -> None:
    """Left an example image under the energy of the gradient, right the share of it in a square around the middle.

    Args:
        path: the PNG to write.
        name: of the network.
        found: what was measured.
    """
    height, width = found.energy.shape
    with figure(path, 10.2, 5.3) as drawing:
        left, right = drawing.subplots(1, 2, width_ratios=[1, 1.1])
        grey = found.images[0].float().mean(0).numpy()
        left.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        # A few pixels hold so much that all others would vanish beside them.
        most = np.quantile(found.energy, 0.995) or found.energy.max()  # a small field leaves nearly all pixels at 0
        shown = np.sqrt(np.minimum(found.energy / most, 1))
        left.imshow(shown, cmap="inferno", alpha=np.clip(1.5 * shown, 0, 0.85), vmin=0, vmax=1)
        for share, (colour, style) in SQUARES.items():
            label = f"{share:.0%} of the energy: {found.side_px[share]} px a side"
            left.add_patch(_square(found.middle, found.side_px[share], colour, style, label))
        beyond = ", larger than the image" if found.theoretical_px > max(height, width) else ""
        theory = f"theoretical: {found.theoretical_px:,} px{beyond}"
        left.add_patch(_square(found.middle, found.theoretical_px, GREEN, "--", theory))
        left.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xlabel="pixels", ylabel="pixels")
        left.grid(visible=False)
        left.set_title(f"What the middle of {short(found.layer)} sees", loc="left")
        drawing.suptitle(f"{name}, {found.weights}", x=0.01, ha="left", weight="bold")
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=8.5)
        _shares(right, found)


def _square(middle: tuple[float, float], side: int, colour: str, style: str, label: str) -> Rectangle:
    row, column = middle
    corner = (column - side / 2, row - side / 2)
    return Rectangle(corner, side, side, fill=False, edgecolor=colour, linestyle=style, linewidth=1.8, label=label)


def _shares(axes: Axes, found: Effective) -> None:
    rows, columns = np.indices(found.energy.shape)
    side = 2 * np.maximum(np.abs(rows - found.middle[0]), np.abs(columns - found.middle[1])) + 1
    order = np.argsort(side, axis=None)
    axes.plot(side.ravel()[order], np.cumsum(found.energy.ravel()[order]), color=INK)
    for share, (colour, _) in SQUARES.items():
        axes.plot([0, found.side_px[share], found.side_px[share]], [share, share, 0], color=colour, lw=1.2)
    if found.theoretical_px <= side.max():
        axes.axvline(found.theoretical_px, color=GREEN, ls="--")
    axes.set(xlim=(0, side.max()), ylim=(0, 1.01))
    axes.set_xlabel("side of the square around the middle, pixels")
    axes.set_ylabel("share of the gradient's energy")
    n_images = len(found.images)
    axes.set_title(f"Mean of {n_images} image{'s' if n_images > 1 else ''}", loc="left")
    axes.spines["bottom"].set_color(PALE)
