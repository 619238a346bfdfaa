"""Helpers of the pictures and tables that set models side by side."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from pipeline_steps import pages, plots, plots_compare
from pipeline_steps.units import with_unit


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9))
def test_pareto_front_by_definition(models: list[tuple[int, int]]) -> None:
    front = plots_compare.pareto_front([macs for macs, _ in models], [score for _, score in models])
    beaten = {
        (macs, score)
        for macs, score in models
        if any(m <= macs and s >= score and (m, s) != (macs, score) for m, s in models)
    }
    assert {models[place] for place in front} == set(models) - beaten
    assert [models[place] for place in front] == sorted(models[place] for place in front)


@given(st.floats(-2, 11), st.floats(0.3, 6))
@settings(max_examples=10, deadline=None)
def test_a_log_axis_has_some_round_ticks_written_as_asked(start: float, decades: float) -> None:
    """Over less than a decade matplotlib itself labels the steps between, as formulas."""
    drawing = Figure()
    for axis in (drawing.subplots().xaxis, drawing.subplots().yaxis):
        axis.axes.set(xscale="log", yscale="log", xlim=(1, 10), ylim=(1, 10))
        axis.set_view_interval(10**start, 10 ** (start + decades), ignore=True)
        plots.log_ticks(axis, with_unit)
        drawing.draw_without_rendering()
        written = [label.get_text() for label in axis.get_ticklabels(which="both")]
        assert written == [with_unit(value) for value in axis.get_majorticklocs()]
        assert 1 <= len(written) <= 9
        mantissas = {
            float(f"{value / 10 ** np.floor(np.log10(value) + 1e-9):.6g}") for value in axis.get_majorticklocs()
        }
        assert mantissas <= {1, 2, 3, 5}


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_labels_cover_neither_each_other_nor_the_points(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform([250, 100], [1000, 600], (n, 2))
    sizes = np.column_stack([rng.uniform(60, 160, n), np.full(n, 20.0)])
    inside = Bbox([[0, 0], [1250, 700]])
    offsets = plots_compare.free_places(points, sizes, [], inside)
    centres = points + np.array(offsets)
    for one in range(n):
        assert (np.abs(centres[one] - [625, 350]) <= [625.1, 350.1] - sizes[one] / 2).all()
        for other in range(n):
            apart = np.abs(centres[one] - centres[other]) - (sizes[one] + sizes[other]) / 2
            assert one == other or apart.max() > -1e-6
            assert (np.abs(centres[one] - points[other]) - sizes[one] / 2).max() > 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_ladders_keep_their_order_and_distance(heights: list[float]) -> None:
    moved = plots_compare._apart(heights, gap=0.1)
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    assert (np.diff([moved[place] for place in order]) >= 0.1 - 1e-9).all()
    assert np.mean(moved) == pytest.approx(np.mean(heights))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (19_400_000, "19.4 M"), (999_900_000, "1 G"), (4.46e9, "4.46 G")],
)
def test_units(count: float, text: str) -> None:
    assert plots_compare.with_unit(count) == text


def test_heat_map_letters_stay_readable() -> None:
    """WCAG contrast of at least 3.5 between letters and cell, over the whole scale."""

    def luminance(colour: list[int]) -> float:
        linear = [value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for value in np.linspace(0, 1, 101):
        cell, letters = pages._heat(value).split("; color: ")
        cell_light = luminance([int(number) for number in re.findall(r"\d+", cell)])
        letter_light = luminance([255] * 3 if letters == "#fff" else [0x1F, 0x23, 0x28])
        light, dark = max(cell_light, letter_light), min(cell_light, letter_light)
        assert (light + 0.05) / (dark + 0.05) >= 3.5
