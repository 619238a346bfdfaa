"""Distances, their p-values and the statistics of images, against scipy and by hand."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import draw, encode, load_params, write_batch
from PIL import Image
from scipy import stats

from pipeline_steps import drift, image_statistics, ingest
from pipeline_steps.drift import label_distance, statistic_distance, total_variation
from pipeline_steps.image_statistics import of_pixels, sample, statistics


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"a": 1, "b": 1}, {"a": 50, "b": 50}, 0.0),
        ({"a": 3}, {"b": 7}, 1.0),
        ({"a": 6, "b": 3, "c": 1}, {"a": 1, "b": 1, "d": 2}, 0.5),  # (.35 + .05 + .1 + .5) / 2
    ],
)
def test_total_variation_by_hand(first: dict[str, int], second: dict[str, int], expected: float) -> None:
    assert total_variation(first, second) == pytest.approx(expected)
    assert total_variation(second, first) == pytest.approx(expected)


def test_the_p_value_of_label_shares_is_that_of_every_division() -> None:
    """Ten images, four of them delivered: all 210 divisions can be gone through."""
    training, delivery = {"a": 5, "b": 1}, {"a": 1, "b": 3}
    labels = "a" * 6 + "b" * 4
    observed = total_variation(training, delivery)
    far = 0
    for chosen in itertools.combinations(range(10), 4):
        n_a = sum(labels[place] == "a" for place in chosen)
        far += abs(n_a / 4 - (6 - n_a) / 6) >= observed - 1e-12
    found = label_distance(training, delivery, 0.5)
    assert found.distance == pytest.approx(observed) == pytest.approx(7 / 12)
    assert found.p_value == pytest.approx(far / 210, abs=0.01)
    assert label_distance(training, delivery, 0.5) == found  # the same on every call


def test_kolmogorov_smirnov_by_hand_and_by_scipy() -> None:
    rng = np.random.default_rng(0)
    for n, m, shift in ((2000, 3, 0.0), (300, 200, 0.4), (50, 50, 3.0)):
        training, delivery = rng.normal(size=n), rng.normal(shift, size=m)
        everywhere = np.concatenate([training, delivery])
        gaps = [abs((training <= at).mean() - (delivery <= at).mean()) for at in everywhere]
        found = statistic_distance("brightness", training, delivery, 0.5)
        assert found.distance == pytest.approx(max(gaps))
        assert found.p_value == pytest.approx(stats.ks_2samp(training, delivery).pvalue)
        assert (found.training, found.delivery) == pytest.approx((training.mean(), delivery.mean()))
    with_ties = statistic_distance("shorter_side_px", np.full(100, 64.0), np.full(5, 64.0), 0.0)
    assert (with_ties.distance, with_ties.broken) == (0.0, False)


def test_a_small_delivery_is_not_refused_for_bad_luck() -> None:
    """Of 400 deliveries of three like the training data many lie over the limit, and chance explains every one."""
    rng = np.random.default_rng(1)
    training = rng.normal(size=1000)
    found = [statistic_distance("brightness", training, rng.normal(size=3), 0.5) for _ in range(400)]
    assert sum(one.distance > one.limit for one in found) > 50
    assert sum(one.broken for one in found) <= 2
    assert statistic_distance("brightness", training, np.array([9.0, 9.1, 9.2]), 0.5).broken
    shares = {"a": 500, "b": 500}
    assert label_distance(shares, {"a": 3}, 0.4).distance == pytest.approx(0.5)
    assert not label_distance(shares, {"a": 3}, 0.4).broken
    assert label_distance(shares, {"a": 30}, 0.4).broken
    assert not label_distance(shares, {"a": 30}, 0.6).broken


def test_statistics_of_one_image_by_hand() -> None:
    red = Image.new("RGB", (60, 40), (255, 0, 0))
    assert of_pixels(encode(red, "PNG")) == pytest.approx((0.299, 0.0, 1.0))
    halves = Image.new("RGB", (64, 64), "white")
    halves.paste((0, 0, 0), (0, 0, 32, 64))
    assert of_pixels(encode(halves, "PNG")) == pytest.approx((0.5, 0.5, 0.0))
    # Large and small copies of one picture look alike.
    large = draw(3, 1200, 1600)
    for mine, small in zip(of_pixels(encode(large)), of_pixels(encode(large.resize((120, 160)))), strict=True):
        assert mine == pytest.approx(small, abs=0.01)


def test_statistics_are_kept_by_content(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{seed}.jpg": encode(draw(seed, 40 + seed, 64)) for seed in range(6)}
    write_batch(root, "one", dict.fromkeys([str(seed) for seed in range(6)], "Hat"), files)
    ingest.run(load_params({"experiment.batches": ["one"]}), "one", root)
    folder, kept = root / "data" / "ingest" / "one", root / "kept.parquet"
    manifest = pd.read_parquet(folder / "manifest.parquet")
    packs = {"one": folder / "images.arrow"}
    first = statistics(manifest.head(4), packs, kept)
    decoded: list[bytes] = []
    true = image_statistics.of_pixels
    monkeypatch.setattr(image_statistics, "of_pixels", lambda encoded: decoded.append(encoded) or true(encoded))
    again = statistics(manifest, packs, kept)
    assert len(decoded) == 2
    pd.testing.assert_frame_equal(again.head(4), first)
    by_path = dict(zip(manifest["source_path"], again.to_dict("records"), strict=True))
    wide = by_path["images/5.jpg"]
    assert wide["aspect_ratio"] == pytest.approx(45 / 64)
    assert wide["shorter_side_px"] == 45
    assert wide["bytes_a_pixel"] == pytest.approx(len(files["5.jpg"]) / (45 * 64))
    monkeypatch.setattr(image_statistics, "MAX_IMAGES", 3)
    assert list(sample(manifest)["sample_id"]) == sorted(manifest["sample_id"])[:3]


def test_seven_comparisons_seldom_refuse_by_chance() -> None:
    assert 1 - (1 - drift.CHANCE) ** (1 + len(image_statistics.STATISTICS)) < 1 / 140
