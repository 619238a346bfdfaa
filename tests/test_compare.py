"""Stage compare on made-up summaries, and once behind evaluate."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic_run as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.transforms import Bbox
from PIL import Image

from pipeline_steps import compare, evaluate, metrics, pages, plots_compare
from pipeline_steps.errors import PleatError
from pipeline_steps.evaluate import number_or_none
from pipeline_steps.files import read_json, write_json

STEADY = [0.70, 0.72, 0.68, 0.71, 0.69]


def put(
    root: Path,
    model: str,
    folds: list[float],
    macs: int = 10**8,
    n_samples: int = 500,
    classes: tuple[str, ...] = ("a", "b"),
) -> None:
    """What evaluate and profile leave for one model; every headline score gets the same folds."""
    spread = metrics.spread(folds)
    score = {key: number_or_none(getattr(spread, key)) for key in ("mean", "std", "ci95_low", "ci95_high")}
    score |= {"pooled": score["mean"], "folds": folds}
    summary: dict[str, Any] = {"n_samples": n_samples, "n_classes": len(classes), "epochs": [3] * len(folds)}
    write_json(root / "data" / "evaluate" / model / "metrics.json", summary | dict.fromkeys(metrics.HEADLINES, score))
    write_json(root / "data" / "profile" / f"{model}.json", {"params": 2_300_000, "macs": macs, "input_size": 224})
    table = pd.DataFrame({"class": classes, "support": range(10, 10 + len(classes)), "f1_mean": spread.mean})
    folder = root / "reports" / "models" / model
    folder.mkdir(parents=True)
    table.to_csv(folder / "per_class.csv", index=False)


def run(root: Path, *models: str, n_folds: int = 5) -> pd.DataFrame:
    return compare.run(synthetic.params(models, n_folds), root)


def shifted(by: float) -> list[float]:
    return [round(score + by, 6) for score in STEADY]


def test_leaderboard_is_best_first_and_ties_go_to_fewer_macs_then_name(tmp_path: Path) -> None:
    put(tmp_path, "good", shifted(0.02))
    put(tmp_path, "dear", STEADY, macs=4 * 10**9)
    put(tmp_path, "cheap_b", STEADY, macs=10**6)
    put(tmp_path, "cheap_a", STEADY, macs=10**6)
    put(tmp_path, "not_asked_for", shifted(0.2))
    board = run(tmp_path, "dear", "cheap_b", "good", "cheap_a")
    assert board["model"].tolist() == ["good", "cheap_a", "cheap_b", "dear"]
    written = pd.read_csv(tmp_path / "reports" / "leaderboard.csv")
    wanted = ["model", "f1_weighted", "f1_weighted_std", "f1_macro", "accuracy", "params", "macs"]
    assert set(wanted) <= set(written)
    assert written["model"].tolist() == board["model"].tolist()
    assert written["macs"].tolist() == [10**8, 10**6, 10**6, 4 * 10**9]
    np.testing.assert_allclose(written["f1_weighted_std"], np.std(STEADY, ddof=1), rtol=1e-5)
    numbers = read_json(tmp_path / "reports" / "leaderboard.json")
    assert list(numbers) == ["cheap_a", "cheap_b", "dear", "good"]
    assert numbers["good"]["f1_weighted"] == pytest.approx(0.72)
    assert read_json(tmp_path / "data" / "compare" / "chosen.json")["model"] == "good"


def test_a_steady_lead_is_clear_however_much_the_folds_differ(tmp_path: Path) -> None:
    """The folds range over 0.5, far more than the lead: only pairing shows it."""
    hard_and_easy = [0.3, 0.5, 0.8, 0.4, 0.6]
    put(tmp_path, "a", [score + 0.02 + 0.001 * fold for fold, score in enumerate(hard_and_easy)])
    put(tmp_path, "b", hard_and_easy)
    run(tmp_path, "a", "b")
    reason = read_json(tmp_path / "data" / "compare" / "chosen.json")["reason"]
    assert "It leads b by 0.022 and is ahead on 5 of the 5 folds" in reason
    assert "larger than the fold-to-fold spread" in reason
    page = (tmp_path / "reports" / "index.html").read_text()
    assert "<h1>a leads</h1>" in page


def test_a_lead_inside_the_spread_is_said_to_be_none(tmp_path: Path) -> None:
    put(tmp_path, "big", [0.71, 0.75, 0.66, 0.74, 0.68], macs=4 * 10**9)
    put(tmp_path, "small", STEADY, macs=4 * 10**8)
    run(tmp_path, "small", "big")
    chosen = read_json(tmp_path / "data" / "compare" / "chosen.json")
    assert chosen["model"] == "big"
    assert "inside the fold-to-fold spread: these folds do not show that big is the better one" in chosen["reason"]
    assert chosen["reason"].endswith("small needs only 10% of the MACs.")
    page = (tmp_path / "reports" / "index.html").read_text()
    assert "big leads, though not clearly" in page
    assert "inside the fold-to-fold spread" in page


def test_one_model_alone(tmp_path: Path) -> None:
    put(tmp_path, "only", STEADY)
    run(tmp_path, "only")
    assert "only model that ran" in read_json(tmp_path / "data" / "compare" / "chosen.json")["reason"]
    page = (tmp_path / "reports" / "index.html").read_text()
    assert "<h1>only</h1>" in page
    assert "1 model on 500 images" in page


def test_terminal_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a_model_with_quite_a_long_name", STEADY, macs=299_500_000)
    put(tmp_path, "b", shifted(-0.1), macs=4_460_000_000)
    run(tmp_path, "a_model_with_quite_a_long_name", "b")
    shown = capsys.readouterr().out
    assert re.search(r"a_model_with_quite_a_long_name +0\.700 ± 0\.016 +0\.700 +0\.700 +0\.700 +2\.3 M +300 M", shown)
    assert "4.46 G" in shown
    assert "larger than the fold-to-fold spread" in " ".join(shown.split())


def test_undefined_numbers_are_empty_not_zero(tmp_path: Path) -> None:
    put(tmp_path, "a", STEADY)
    path = tmp_path / "data" / "evaluate" / "a" / "metrics.json"
    summary = read_json(path)
    summary["roc_auc_macro"] |= {"mean": None, "std": None, "ci95_low": None, "ci95_high": None}
    path.write_text(json.dumps(summary))
    table = tmp_path / "reports" / "models" / "a" / "per_class.csv"
    table.write_text("class,support,f1_mean\nNA,12,0.5\nnull,3,\n")
    run(tmp_path, "a")
    assert pd.read_csv(tmp_path / "reports" / "leaderboard.csv")["roc_auc_macro"].isna().all()
    assert read_json(tmp_path / "reports" / "leaderboard.json")["a"]["roc_auc_macro"] is None
    page = (tmp_path / "reports" / "index.html").read_text()
    assert re.findall(r'scope="row">(\w+)</th><th>(\d+)</th><td style="[^"]*">(.*?)</td>', page) == [
        ("NA", "12", "0.50"),
        ("null", "3", "—"),
    ]


def test_page_links_only_to_what_exists_and_shows_the_counts(tmp_path: Path) -> None:
    put(tmp_path, "a", STEADY, classes=("<script>alert(1)</script>", "b"))
    put(tmp_path, "b", shifted(-0.1), classes=("<script>alert(1)</script>", "b"))
    reports = tmp_path / "reports"
    run(tmp_path, "a", "b")
    page = (reports / "index.html").read_text()
    assert re.findall(r'<a href="(.*?)"', page) == ["leaderboard.csv"]
    assert "<h2>Data</h2>" not in page
    for path in ("models/a/index.html", "validation/index.html", "split/balance.png"):
        (reports / path).parent.mkdir(parents=True, exist_ok=True)
        (reports / path).write_text("here")
    counts = {
        "labels": {"b": 11, "<script>": 10},
        "dropped": {"Not sure": {"samples": 220, "rows_without_image": 8}},
        "quarantine": {},
        "samples": 500,
    }
    write_json(tmp_path / "data" / "validate" / "counts.json", counts)
    run(tmp_path, "a", "b")
    page = (reports / "index.html").read_text()
    assert re.findall(r'<a href="(.*?)"', page) == [
        "models/a/index.html",
        "validation/index.html",
        "split/balance.png",
        "leaderboard.csv",
    ]
    assert re.search(r"Not sure</span>.*228", page, re.DOTALL)
    assert "Nothing is in the quarantine." in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert re.findall(r'src="(?!data:)[^"]*"', page) == []


@pytest.mark.parametrize(
    "lost", ["data/evaluate/b/metrics.json", "data/profile/b.json", "reports/models/b/per_class.csv"]
)
def test_a_model_that_did_not_run(tmp_path: Path, lost: str) -> None:
    put(tmp_path, "a", STEADY)
    put(tmp_path, "b", STEADY)
    (tmp_path / lost).unlink()
    with pytest.raises(PleatError, match=rf"{lost} is missing.*run `dvc repro`"):
        run(tmp_path, "a", "b")


def test_models_scored_on_different_data(tmp_path: Path) -> None:
    put(tmp_path, "a", STEADY)
    put(tmp_path, "b", STEADY, n_samples=400)
    with pytest.raises(PleatError, match=r"a was scored on 500 samples, but b on 400: .* Run `dvc repro`"):
        run(tmp_path, "a", "b")
    put(tmp_path, "c", STEADY[:4])
    with pytest.raises(PleatError, match=r"c was scored on 4 folds, but params\.yaml lists 5; run `dvc repro`"):
        run(tmp_path, "a", "c")


def test_behind_evaluate_and_twice_the_same_bytes(tmp_path: Path) -> None:
    folds = synthetic.make_data(tmp_path)
    for model, skill in (("weak", 1.0), ("strong", 3.0)):
        synthetic.make_model(tmp_path, model, folds, skill=skill)
        evaluate.run(synthetic.params([model]), model, tmp_path)
    names = ["leaderboard.csv", "leaderboard.json", "quality_against_macs.png", "f1_by_fold.png", "index.html"]
    files = [*(tmp_path / "reports" / name for name in names), tmp_path / "data" / "compare" / "chosen.json"]
    written = []
    for models in (("weak", "strong"), ("strong", "weak")):
        board = run(tmp_path, *models, n_folds=3)
        assert board["model"].tolist() == ["strong", "weak"]
        assert 'href="models/strong/index.html"' in (tmp_path / "reports" / "index.html").read_text()
        written.append([file.read_bytes() for file in files])
        for file in files:
            file.unlink()
    assert written[0] == written[1]
    assert not list(tmp_path.rglob(".partial*"))


def test_many_models_are_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"model_{number}" for number in range(20)]
    for number, name in enumerate(names):
        put(
            tmp_path,
            name,
            (0.5 + 0.02 * number + 0.01 * rng.normal(size=5)).tolist(),
            macs=int(10 ** rng.uniform(6, 10)),
        )
    run(tmp_path, *names)
    for name in ("quality_against_macs", "f1_by_fold"):
        with Image.open(tmp_path / "reports" / f"{name}.png") as image:
            assert image.width > 1000


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
