"""Stage compare on made-up summaries, and once behind evaluate."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic_run as synthetic
from PIL import Image

from pipeline_steps import compare, evaluate, metrics
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
    targets: Mapping[str, float] = {"label": 0.0},
) -> None:
    """What evaluate and profile leave for one model; every headline score gets the same folds.

    A target's scores are shifted by the number beside its name.
    """
    of_target = {name: scores([fold + by for fold in folds], n_samples, len(classes)) for name, by in targets.items()}
    n_classes = len(classes) * len(targets)
    means = [fold + float(np.mean(list(targets.values()))) for fold in folds]
    summary = scores(means, n_samples, n_classes) | {"epochs": [3] * len(folds), "targets": of_target}
    write_json(root / "data" / "evaluate" / model / "metrics.json", summary)
    write_json(root / "data" / "profile" / f"{model}.json", {"params": 2_300_000, "macs": macs, "input_size": 224})
    folder = root / "reports" / "models" / model
    for name, found in of_target.items():
        table = pd.DataFrame({"class": classes, "support": range(10, 10 + len(classes))})
        place = folder / name if len(targets) > 1 else folder
        place.mkdir(parents=True)
        table.assign(f1_mean=found["f1_macro"]["mean"]).to_csv(place / "per_class.csv", index=False)


def scores(folds: list[float], n_samples: int, n_classes: int) -> dict[str, Any]:
    spread = metrics.spread(folds)
    score = {key: number_or_none(getattr(spread, key)) for key in ("mean", "std", "ci95_low", "ci95_high")}
    score |= {"pooled": score["mean"], "folds": folds}
    return {"n_samples": n_samples, "n_classes": n_classes, **dict.fromkeys(metrics.HEADLINES, score)}


def run(root: Path, *models: str, n_folds: int = 5, targets: Mapping[str, Any] = synthetic.ONE) -> pd.DataFrame:
    return compare.run(synthetic.params(models, n_folds, targets), root)


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


TWO = {"colour": 0.1, "garment": -0.1}


def test_several_targets_are_averaged_and_shown_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a", STEADY, targets=TWO)
    put(tmp_path, "b", shifted(-0.05), targets=TWO)
    board = run(tmp_path, "b", "a", targets=synthetic.TWO)
    np.testing.assert_allclose(board["f1_weighted"], [0.70, 0.65])
    table = pd.read_csv(tmp_path / "data" / "compare" / "targets.csv")
    assert list(table) == ["model", "target", "f1_weighted", "accuracy"]
    found = {(row.model, row.target): row.f1_weighted for row in table.itertuples()}
    assert found == pytest.approx(
        {("a", "colour"): 0.80, ("a", "garment"): 0.60, ("b", "colour"): 0.75, ("b", "garment"): 0.55}
    )
    reason = read_json(tmp_path / "data" / "compare" / "chosen.json")["reason"]
    assert reason.startswith("a has the highest mean weighted F1 of 2 models over 2 targets and 5 folds (0.700, 95%")
    shown = capsys.readouterr().out
    compare.show(tmp_path)
    assert capsys.readouterr().out == shown
    assert "Leaderboard: mean of 2 targets, mean over folds" in shown
    assert re.search(r"target +a +b *\n", shown)
    assert re.search(r"colour +0\.800 / 0\.800 +0\.750 / 0\.750", shown)
    assert re.search(r"garment +0\.600 / 0\.600 +0\.550 / 0\.550", shown)
    page = (tmp_path / "reports" / "index.html").read_text()
    assert "500 images of\n4 classes in 2 targets" in page
    assert "Scores are means of the 2 targets, fold by fold." in page
    heat = re.findall(r'scope="row">(\w+)</th><td style="[^"]*">(.*?)</td><td style="[^"]*">(.*?)</td>', page)
    assert heat == [("colour", "0.800", "0.750"), ("garment", "0.600", "0.550")] * 2  # weighted F1, accuracy


def test_classes_of_one_name_in_two_targets_stay_apart(tmp_path: Path) -> None:
    put(tmp_path, "a", STEADY, classes=("other", "red"), targets=TWO)
    run(tmp_path, "a", targets=synthetic.TWO)
    page = (tmp_path / "reports" / "index.html").read_text()
    row = r'<th class="name short">(\w+)</th><th class="name" scope="row">(\w+)</th><th>(\d+)</th><td [^>]*>(.*?)</td>'
    assert re.findall(row, page) == [
        ("colour", "red", "11", "0.80"),
        ("colour", "other", "10", "0.80"),
        ("garment", "red", "11", "0.60"),
        ("garment", "other", "10", "0.60"),
    ]


@pytest.mark.parametrize("models", [["a"], ["a", "b"]])
def test_one_fold_has_no_spread(tmp_path: Path, models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a", [0.7])
    put(tmp_path, "b", [0.6], macs=10**6)
    run(tmp_path, *models, n_folds=1)
    reason = read_json(tmp_path / "data" / "compare" / "chosen.json")["reason"]
    page = (tmp_path / "reports" / "index.html").read_text()
    if models == ["a"]:
        assert reason == "a is the only model that ran; its weighted F1 over one fold is 0.700."
    else:
        assert reason == (
            "a has the highest weighted F1 of 2 models over one fold (0.700). It leads b by 0.100. "
            "From one fold nobody can tell how sure that is. b needs only 1% of the MACs."
        )
        assert "a leads, though not clearly" in page
    shown = capsys.readouterr().out
    assert "Leaderboard: one fold" in shown
    for text in (shown, re.sub(r'"data:[^"]*"', "", page)):
        assert not re.search(r"\bnan\b|None", text)
    assert re.search(r'<td>\s*0\.700 <span class="soft">± —</span>\s*</td>\s*<td>\s*—\s*</td>', page)


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
    later = [f"{stage}/index.html" for stage in ("model_card", "compression", "registration")]
    assert re.findall(r'<a href="(.*?)"', page) == ["leaderboard.csv", *later]
    assert "<h2>Data</h2>" not in page
    for path in ("models/a/index.html", "validation/index.html", "split/balance.png"):
        (reports / path).parent.mkdir(parents=True, exist_ok=True)
        (reports / path).write_text("here")
    counts = {
        "labels": {"label": {"b": 11, "<script>": 10}},
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
        *later,
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
    put(tmp_path, "other_targets", STEADY, targets=TWO)
    with pytest.raises(
        PleatError, match=r"other_targets was scored on the targets colour, garment, but .* lists label;"
    ):
        run(tmp_path, "a", "other_targets")
    put(tmp_path, "c", STEADY[:4])
    with pytest.raises(PleatError, match=r"c was scored on 4 folds, but params\.yaml lists 5; run `dvc repro`"):
        run(tmp_path, "a", "c")


def test_two_targets_behind_evaluate(tmp_path: Path) -> None:
    folds = synthetic.make_data(tmp_path, synthetic.APPAREL)
    synthetic.make_model(tmp_path, "net", folds, synthetic.APPAREL, synthetic.TWO)
    summary = evaluate.run(synthetic.params(["net"], targets=synthetic.TWO), "net", tmp_path)
    board = run(tmp_path, "net", n_folds=3, targets=synthetic.TWO)
    assert board["accuracy"].tolist() == [summary["accuracy"]["mean"]]
    table = pd.read_csv(tmp_path / "data" / "compare" / "targets.csv", index_col="target")
    assert table["accuracy"].to_dict() == pytest.approx(
        {name: summary["targets"][name]["accuracy"]["mean"] for name in synthetic.TWO}, rel=1e-5
    )


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
