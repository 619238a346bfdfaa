"""The report on one network, or on two side by side: a table of layers, a page, and pictures of what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from pipeline_steps import pages
from pipeline_steps.complexity import effective, latency, layers, variations
from pipeline_steps.complexity.effective import Effective, NoEffectiveFieldError
from pipeline_steps.complexity.latency import Peak, Timing
from pipeline_steps.complexity.subject import Subject
from pipeline_steps.complexity.trace import Trace, trace
from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, write_csv, write_json
from pipeline_steps.units import with_unit

N_BIGGEST = 15
N_SLOWEST = 10
NO_IMAGES: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class Profile:
    """All that is known of one network.

    Attributes:
        table: one row a layer, see `layers.table`; with a column for each timing where it was timed.
        changes: what changes the receptive field, see `variations.table`.
    """

    subject: Subject
    trace: Trace
    table: pd.DataFrame
    changes: pd.DataFrame
    timings: list[Timing]
    peaks: dict[str, Peak]
    effective: Effective | None

    @property
    def name(self) -> str:
        """As people call it."""
        return self.subject.name

    @cached_property
    def totals(self) -> dict[str, int]:
        """See `layers.totals`."""
        return layers.totals(self.table)

    @property
    def summary(self) -> dict[str, float | None]:
        """The totals with the theoretical receptive field and the median times, for programs."""
        field = self.trace.feature_map[1] if self.trace.feature_map else None
        times = {column_of(timing): timing.median_ms for timing in self.timings}
        return {**self.totals, "receptive_field_px": field.pixels if field else None, **times}

    @cached_property
    def parts(self) -> pd.DataFrame:
        """See `layers.parts`."""
        return layers.parts(self.table)

    @cached_property
    def differences(self) -> pd.DataFrame:
        """See `layers.differences`."""
        return layers.differences(self.table)

    @property
    def biggest(self) -> pd.DataFrame:
        """The layers with most multiply-accumulates; none without any."""
        return self.table[self.table["macs"] > 0].nlargest(N_BIGGEST, "macs")

    def slowest(self, timing: Timing) -> pd.DataFrame:
        """The ten layers that took longest."""
        return self.table.nlargest(N_SLOWEST, column_of(timing))

    def sentences(self) -> list[str]:
        """What a reader must know beside the figures: both counts, what sees the whole image, what is missing."""
        told = []
        if self.differences.empty:
            told.append(
                "Both counts of multiply-accumulates, by the layers' settings and by torch, agree in every layer."
            )
        else:
            ours, torchs = with_unit(self.totals["macs"]), with_unit(self.totals["macs_torch"])
            told.append(
                f"The two counts differ: {ours} multiply-accumulates by the layers' settings, {torchs} by torch; "
                f"{len(self.differences)} layers do not agree (below)."
            )
        if self.trace.feature_map is not None:
            layer, sees = self.trace.feature_map
            last = (
                "the last map before global pooling" if self.trace.lost is None else "the last that could be followed"
            )
            told.append(f"The receptive field is that of {layer or 'the network'}, {last}.")
            if sees.pixels and sees.pixels > self.subject.input_size:
                told[-1] += f" It is larger than the image of {self.subject.input_size} pixels."
        if self.trace.whole is not None:
            layer, sees = self.trace.whole
            told.append(f"From {layer or 'the network'} on the whole image is seen ({sees.whole}).")
        if self.trace.lost is not None:
            layer, sees = self.trace.lost
            told.append(
                f"The receptive field could not be followed through {layer or 'the network'} ({sees.lost}); "
                "it is missing for all that depends on it."
            )
        return told + self.trace.notes


def make(
    subject: Subject, timed: bool = False, images: Mapping[str, bytes] = NO_IMAGES, weights: Path | None = None
) -> Profile:
    """Profiles one network.

    Args:
        timed: measure how long it takes, too.
        images: encoded, by name, for the effective receptive field; none: leave it out.
        weights: for that, a .safetensors file; None: the model's own where params.yaml names a file, else random ones.

    Raises:
        NoEffectiveFieldError: the network has none on these images.
        PleatError: the network cannot take images of this size, or images or weights cannot be used.
    """
    found = trace(subject.build, subject.shape)
    seen = _effective(subject, found, images, weights) if images else None
    table = layers.table(found)
    timings, peaks = latency.measure(subject.build, subject.shape) if timed else ([], {})
    names = table["layer"].where(table["layer"] != "(network)", "")
    for timing in timings:
        table[column_of(timing)] = names.map(timing.layers_ms).fillna(0.0)
    changes = variations.table(subject.build, subject.shape)
    return Profile(subject, found, table, changes, timings, peaks, seen)


def column_of(timing: Timing) -> str:
    """The column of a layer's milliseconds: latency_ms_cpu_1 is of batch 1."""
    return f"latency_ms_{'gpu' if timing.threads is None else 'cpu'}_{timing.batch}"


def _effective(subject: Subject, found: Trace, encoded: Mapping[str, bytes], weights: Path | None) -> Effective:
    import torch

    if found.local_output is None:
        raise NoEffectiveFieldError(
            f"{subject.name} has no layer that gives a map of positions which belong to parts of the image, so it has "
            "no effective receptive field to measure."
        )
    images = []
    for name, image in encoded.items():
        try:
            images.append(subject.see(image))
        except Exception as error:  # decoders fail in their own ways
            raise PleatError(f"{name} cannot be read as an image; remove it, or give another folder.") from error
    network, words = subject.trained(weights)
    pixels = subject.normalise(torch.stack(images).float())
    return effective.measure(network.eval(), found.local_output, pixels, images, words)


def write(folder: Path, profiles: Sequence[Profile]) -> None:
    """Writes layers.csv, totals.json, index.html and the pictures of what was measured; the folder is replaced.

    Raises:
        PleatError: it cannot be written.
    """
    with atomic_folder(folder) as partial:
        frames = [one.table.assign(model=one.name) for one in profiles] if len(profiles) > 1 else [profiles[0].table]
        table = pd.concat(frames)
        first = ["model"] if "model" in table else []
        write_csv(partial / "layers.csv", table[[*first, *(name for name in table.columns if name != "model")]])
        write_json(partial / "totals.json", {one.name: one.summary for one in profiles})
        if any(one.timings or one.effective for one in profiles):
            from pipeline_steps.complexity import drawings  # late: matplotlib takes seconds

            drawings.draw(partial, profiles)
        page = pages.render(
            "profile.html.j2",
            profiles=profiles,
            rows=compared(profiles),
            picture=pages.pictures_of(partial),
            column_of=column_of,
        )
        (partial / "index.html").write_text(page, encoding="utf-8")


def compared(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """Rows of the table of totals: `what`, its `values` as texts, and how many `times` the first the second is."""
    rows = []

    def add(what: str, values: Sequence[float | None], form: Any = with_unit, unit: str = "") -> None:
        texts = ["—" if value is None else f"{form(value)}{unit}" for value in values]
        times = values[1] / values[0] if len(values) == 2 and values[0] and values[1] is not None else None
        rows.append({"what": what, "values": texts, "times": "" if times is None else f"{times:.2f}"})

    def total(name: str) -> list[float | None]:
        return [one.totals[name] for one in profiles]

    add("Input size", [one.subject.input_size for one in profiles], str, " px")
    add("Parameters", total("params"))
    add("MACs (multiply-accumulates)", total("macs"))
    add("FLOPs, two for each MAC", total("flops"))
    add("Operations of normalisation", total("normalisation_ops"))
    add("Operations of activations and softmax", total("activation_ops"))
    add("Operations of pooling and means", total("pooling_ops"))
    add("Other operations, value by value", total("elementwise_ops"))
    add("Bytes moved", total("bytes_moved"), unit="B")
    add(
        "FLOPs for each byte",
        [one.totals["flops"] / max(one.totals["bytes_moved"], 1) for one in profiles],
        "{:.1f}".format,
    )
    fields = [one.trace.feature_map[1] if one.trace.feature_map else None for one in profiles]
    add("Theoretical receptive field", [field.pixels if field else None for field in fields], str, " px")
    add(
        "Distance of neighbouring fields",
        [field.rows.jump if field and field.rows else None for field in fields],
        str,
        " px",
    )
    for share in effective.SHARES if any(one.effective for one in profiles) else ():
        sides = [one.effective.side_px[share] if one.effective else None for one in profiles]
        add(f"Square with {share:.0%} of the gradient's energy", sides, str, " px")
    for place, batch in dict.fromkeys((timing.place, timing.batch) for one in profiles for timing in one.timings):
        times = [
            next((timing.median_ms for timing in one.timings if (timing.place, timing.batch) == (place, batch)), None)
            for one in profiles
        ]
        add(f"Time of a batch of {batch} ({place})", times, "{:.1f}".format, " ms")
    return rows
