"""Stage evaluate on a small made-up run."""

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_run as synthetic
from evaluated_run import MODEL, check_spread, fold_file, multiclass_scores, out_of_fold, report, summary_of
from PIL import Image
from sklearn import metrics as oracle

from pipeline_steps import evaluate, mistakes, pages
from pipeline_steps.errors import PleatError


def wrong_ones(frame: pd.DataFrame) -> pd.DataFrame:
    """The mistakes with predicted class and its probability, worst first: the oracle of the gallery."""
    chances = frame[[column for column in frame if column.startswith("p:")]]
    frame = frame.assign(predicted=chances.idxmax(axis=1).str[2:], probability=chances.max(axis=1))
    wrong = frame[frame["predicted"] != frame["label"]]
    return wrong.sort_values(["probability", "sample_id"], ascending=[False, True], ignore_index=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run before `evaluate`; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("inputs")
    synthetic.make_model(root, MODEL, synthetic.make_data(root))
    return root


@pytest.fixture(scope="module")
def evaluated(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run after `evaluate`."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(inputs, root, dirs_exist_ok=True)
    evaluate.run(synthetic.params([MODEL]), MODEL, root)
    return root


@pytest.fixture
def root(inputs: Path, tmp_path: Path) -> Path:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_summary_agrees_with_scikit_learn(evaluated: Path) -> None:
    summary = summary_of(evaluated)
    frame = out_of_fold(evaluated)
    assert (summary["n_samples"], summary["n_classes"], summary["epochs"]) == (96, 6, [5, 5, 5])
    by_fold = [multiclass_scores(rows) for _, rows in frame.groupby("fold")]
    for name, pooled in multiclass_scores(frame).items():
        check_spread(summary[name], [fold[name] for fold in by_fold], pooled)
    own = summary["targets"].pop("label")
    assert not summary["targets"]
    assert own == {"kind": "multiclass"} | {key: summary[key] for key in own if key != "kind"}


def test_tables(evaluated: Path) -> None:
    out = report(evaluated)
    frame = out_of_fold(evaluated).sort_values(["fold", "sample_id"])
    classes = pd.read_csv(out / "per_class.csv")
    assert classes["class"].tolist() == sorted(synthetic.CLASSES)
    assert classes["support"].tolist() == frame["label"].value_counts().sort_index().tolist()
    chances = frame[[column for column in frame if column.startswith("p:")]]
    predicted = chances.idxmax(axis=1).str[2:]
    f1 = [
        oracle.f1_score(rows["label"], predicted[rows.index], labels=sorted(synthetic.CLASSES), average=None)
        for _, rows in frame.groupby("fold")
    ]
    np.testing.assert_allclose(classes["f1_mean"], np.mean(f1, axis=0), rtol=1e-5)
    np.testing.assert_allclose(classes["f1_std"], np.std(f1, axis=0, ddof=1), rtol=1e-5)
    confusion = pd.read_csv(evaluated / "data" / "evaluate" / MODEL / "confusion.csv")
    assert confusion["actual"].tolist() == frame["label"].tolist()
    assert confusion["predicted"].tolist() == predicted.tolist()
    folds = pd.read_csv(out / "folds.csv")
    assert folds["fold"].tolist() == [0, 1, 2]
    assert folds["n_samples"].sum() == 96
    for name in ("confusion", "per_class", "roc", "curves", "folds"):
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 400
            assert "Software" not in image.info


def test_curves_are_means_as_far_as_every_fold_was_trained(evaluated: Path) -> None:
    histories = [pd.read_csv(fold_file(evaluated, fold, "history.csv")).head(6) for fold in range(3)]
    assert len(pd.read_csv(fold_file(evaluated, 1, "history.csv"))) == 7  # one fold was trained for longer
    for part, columns in (("loss", evaluate.LOSS), ("accuracy", evaluate.ACCURACY)):
        curves = pd.read_csv(evaluated / "data" / "evaluate" / f"{part}-curves" / f"{MODEL}.csv")
        assert list(curves) == ["epoch", *columns]
        assert curves["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
        for column in columns:
            np.testing.assert_allclose(curves[column], np.mean([one[column] for one in histories], axis=0), rtol=1e-5)


def test_page_is_self_contained_and_shows_the_worst_mistakes_first(evaluated: Path) -> None:
    page = (report(evaluated) / "index.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    assert "<script" not in page
    summary = summary_of(evaluated)
    assert f'<div class="value">{summary["f1_weighted"]["mean"]:.3f}</div>' in page
    worst = wrong_ones(out_of_fold(evaluated))
    assert f"{len(worst)} images were predicted wrong" in page
    shown = re.findall(r'<figcaption>(.*?) → <span class="wrong">(.*?)</span> (.*?)%', page)
    worst = worst.head(mistakes.N_MISTAKES)
    assert shown == [
        (row.label, row.predicted, f"{100 * row.probability:.1f}") for row in worst.itertuples(index=False)
    ]
    manifests = pd.concat([pd.read_parquet(path) for path in sorted(evaluated.glob("data/ingest/*/manifest.parquet"))])
    wanted = worst.merge(manifests, on="sample_id", how="left")
    sources = re.findall(r'<div class="source">(.*?)</div>', page)
    assert sources == [f"{row.batch}/{row.source_path}" for row in wanted.itertuples(index=False)]


def test_a_second_run_writes_the_same_bytes_and_leaves_nothing_of_an_earlier_one(evaluated: Path, root: Path) -> None:
    report(root).mkdir(parents=True)
    (report(root) / "left_over.txt").write_text("of an earlier version")
    evaluate.run(synthetic.params([MODEL]), MODEL, root)
    for folder in ("data/evaluate", "reports"):
        files, expected = (
            sorted(path.relative_to(run) for path in (run / folder).rglob("*") if path.is_file())
            for run in (root, evaluated)
        )
        assert files == expected
        for file in files:
            assert (root / file).read_bytes() == (evaluated / file).read_bytes(), file


@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's own font has no Chinese letters; the page shows them
def test_hostile_labels_and_paths_are_only_text(tmp_path: Path) -> None:
    classes = ["<script>alert(1)</script>", "$x_1$ & {{ 7 * 7 }}", "_hidden", "衣服", 'a"b', "NA"]
    columns = {"label": classes}
    folds = synthetic.make_data(tmp_path, columns, n=60, source_path='"><img src=x onerror=alert({})>.jpg')
    synthetic.make_model(tmp_path, MODEL, folds, columns, skill=0.5)
    evaluate.run(synthetic.params([MODEL]), MODEL, tmp_path)
    page = (report(tmp_path) / "index.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "$x_1$ &amp; {{ 7 * 7 }}" in page
    table = pd.read_csv(report(tmp_path) / "per_class.csv", keep_default_na=False)
    assert table["class"].tolist() == sorted(classes)


def test_what_a_fold_cannot_define_stays_empty(root: Path) -> None:
    """Dress is moved out of fold 0, and Hat is relabelled away altogether."""
    folds = pd.read_parquet(root / "data" / "split" / "folds.parquet")
    folds.loc[folds["label"] == "Hat", "label"] = "Pants"
    folds.loc[(folds["label"] == "Dress") & (folds["fold"] == 0), "fold"] = 1
    folds.to_parquet(root / "data" / "split" / "folds.parquet")
    shutil.rmtree(root / "data" / "train")
    synthetic.make_model(root, MODEL, folds, skill=3.0)
    summary = evaluate.run(synthetic.params([MODEL]), MODEL, root)
    table = pd.read_csv(report(root) / "per_class.csv", index_col="class")
    hat = table.loc["Hat"]
    assert hat["support"] == 0
    assert hat[["recall_mean", "recall_std", "roc_auc_mean", "roc_auc_std"]].isna().all()
    frame = out_of_fold(root)
    areas = [
        oracle.roc_auc_score(rows["label"] == "Dress", rows["p:Dress"])
        for fold, rows in frame.groupby("fold")
        if fold != 0
    ]
    assert table.loc["Dress", "roc_auc_mean"] == pytest.approx(np.mean(areas), rel=1e-5)
    assert summary["n_classes"] == 6
    assert "—" in (report(root) / "index.html").read_text()


def test_a_perfect_model_has_no_gallery(tmp_path: Path) -> None:
    columns = {"label": ["no", "yes"]}
    folds = synthetic.make_data(tmp_path, columns, n=40, n_folds=2)
    synthetic.make_model(tmp_path, MODEL, folds, columns, skill=50)
    summary = evaluate.run(synthetic.params([MODEL], n_folds=2), MODEL, tmp_path)
    assert summary["accuracy"]["mean"] == 1
    assert "every image was predicted right" in (report(tmp_path) / "index.html").read_text()


def edit(root: Path, fold: int, change: str) -> None:
    path = fold_file(root, fold)
    frame = pd.read_parquet(path)
    chances = [column for column in frame if column.startswith("p:")]
    if change == "twice":
        frame = pd.concat([frame, frame.head(1)])
    elif change == "lost":
        frame = frame.iloc[2:]
    elif change == "label":
        frame.loc[0, "label"] = "Boots"
    elif change == "fold":
        frame["fold"] = 7
    elif change == "classes":
        frame = frame.rename(columns={"p:Hat": "p:Cap"})
    elif change == "nan":
        frame.loc[0, chances[0]] = np.nan
    elif change == "sum":
        frame[chances] *= 2
    frame.to_parquet(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("twice", r"net \(label\) predicts 1 sample\(s\) more than once, first [0-9a-f]{64}\. .* run `dvc repro`"),
        (
            "lost",
            r"2 sample\(s\) of data/split/folds\.parquet have no prediction by net \(label\), first .* run `dvc repro`",
        ),
        (
            "label",
            r"1 predictions of net \(label\) name another label than data/split/folds\.parquet, .* run `dvc repro`",
        ),
        ("fold", r"name another fold than data/split/folds\.parquet"),
        ("classes", r"Classes of net \(label\) differ between fold 0 and fold 1: p:Cap, p:Hat\. .* run `dvc repro`"),
        ("nan", r"Fold 1 of net \(label\) holds 1 rows whose probabilities .* Lower training\.net\.learning_rate"),
        ("sum", r"do not sum to 1: the training diverged"),
    ],
)
def test_rows_that_do_not_belong_together(root: Path, change: str, sentence: str) -> None:
    edit(root, 1, change)
    with pytest.raises(PleatError, match=sentence):
        evaluate.run(synthetic.params([MODEL]), MODEL, root)
    assert not (root / "reports").exists()


def test_prediction_of_a_sample_that_is_in_no_fold(root: Path) -> None:
    extra = pd.read_parquet(fold_file(root, 1)).head(1).assign(sample_id="f" * 64)
    pd.concat([pd.read_parquet(fold_file(root, 1)), extra]).to_parquet(fold_file(root, 1))
    with pytest.raises(
        PleatError, match=r"1 prediction\(s\) by net \(label\) are of samples outside the folds .*, first f{64}"
    ):
        evaluate.run(synthetic.params([MODEL]), MODEL, root)


@pytest.mark.parametrize("name", ["predictions/label.parquet", "history.csv", "metrics.json"])
def test_missing_fold(root: Path, name: str) -> None:
    fold_file(root, 2, name).unlink()
    with pytest.raises(PleatError, match=rf"fold_2/{name} is missing.*run `dvc repro`"):
        evaluate.run(synthetic.params([MODEL]), MODEL, root)


def test_missing_images(root: Path) -> None:
    (root / "data" / "ingest" / "second" / "images.arrow").unlink()
    with pytest.raises(PleatError, match=r"second/images\.arrow is missing"):
        evaluate.run(synthetic.params([MODEL]), MODEL, root)
    shutil.copy(*[root / "data" / "ingest" / batch / "images.arrow" for batch in synthetic.BATCHES])
    with pytest.raises(PleatError, match="data/ingest does not hold the sample"):
        evaluate.run(synthetic.params([MODEL]), MODEL, root)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def test_thumbnail_is_small_and_upright() -> None:
    picture = Image.new("RGB", (1200, 600), "red")
    picture.paste("blue", (0, 0, 600, 600))
    exif = Image.Exif()
    exif[synthetic.EXIF_ORIENTATION] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    uri = pages.thumbnail(encode(picture, "JPEG", exif=exif))
    assert uri is not None
    with decode(uri) as small:
        assert small.size == (80, 160)
        red, _, blue = small.getpixel((40, 20))
        assert blue > 200 > red  # what was left is now on top


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "I;16", "1"])
def test_thumbnail_of_every_mode(mode: str) -> None:
    form = "TIFF" if mode == "CMYK" else "PNG"
    image = Image.new(mode, (20, 30)) if mode == "I;16" else Image.new("RGBA", (20, 30), "green").convert(mode)
    assert str(pages.thumbnail(encode(image, form))).startswith("data:image/jpeg;base64,")


def test_thumbnail_of_what_is_no_image() -> None:
    assert pages.thumbnail(b"text that calls itself .jpg") is None
    assert pages.thumbnail(encode(Image.new("RGB", (90, 90)), "JPEG")[:300]) is None
