"""Stage `compress`: what its versions are, how they are scored, and that it can be interrupted and switched off."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import REPOSITORY, content, encode
from onnx.numpy_helper import to_array
from PIL import Image
from refit_workspace import BATCH, CLASSES, CNN, TRAINING, drawn, encoded_images, folds, make, write_folds
from refit_workspace import settings as refit_settings
from ruamel.yaml import YAML
from sklearn.metrics import f1_score

from pipeline_steps import compress, package, prepare, refit, register
from pipeline_steps.complexity.compress import fewer_filters, scoring, techniques
from pipeline_steps.complexity.compress import refitted as refitted_module
from pipeline_steps.complexity.compress.refitted import NotPossibleError, Refitted
from pipeline_steps.complexity.compress.training import inputs_of
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_json, write_json
from pipeline_steps.params import Params
from pipeline_steps.params_compress import FewerFilters
from pipeline_steps.params_models import FrozenModel
from pipeline_steps.serving.classifier import Classifier
from pipeline_steps.serving.images import decode, resize_crop

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = CNN | {"blocks": [{"filters": 16, "kernel": 3, "pool": 2}, {"filters": 32, "kernel": 3, "pool": 2}]}
STUDENT = CNN | {"input_size": 16}
TECHNIQUES: dict[str, Any] = {
    "int8": {"kind": "int8", "calibration_images": 16},
    "shared": {"kind": "shared_weights", "clusters": 12},
    "shared_int8": {"kind": "int8", "of": "shared", "calibration_images": 16},
    "small": {"kind": "smaller_input", "input_size": 20},
    "narrow": {"kind": "fewer_filters", "width": 0.25},
    "pruned": {"kind": "pruned", "share": 0.5, "epochs": 2, "batch_size": 8},
    "pruned_int8": {"kind": "int8", "of": "pruned"},
    "taught": {"kind": "distilled", "student": "student", "soft_share": 0.5},
    "larger": {"kind": "smaller_input", "input_size": 64},
    "larger_int8": {"kind": "int8", "of": "larger"},
}


def params(candidate: str | None = None, chosen: list[str] | None = None) -> Params:
    listed = {name: settings for name, settings in TECHNIQUES.items() if chosen is None or name in chosen}
    return refit_settings(
        **{
            "models": {"chosen": WIDE, "student": STUDENT},
            "training": {"chosen": TRAINING, "student": TRAINING | {"max_epochs": 2}},
            "compress": {"techniques": listed, "candidate": candidate},
            "promotion.floors": {"f1_weighted": 0.0, "f1_macro": 0.0},
            "split.holdout.fraction": 0.25,
        }
    )


@pytest.fixture(scope="module")
def refitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after `refit`."""
    root = make(tmp_path_factory.mktemp("refitted"), params(), drawn())
    refit.run(params(), root)
    return root


@pytest.fixture(scope="module")
def done(refitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after `compress` with every technique; tests only read it."""
    root = copy(refitted, tmp_path_factory.mktemp("done"))
    compress.run(params("int8"), root)
    return root


def copy(prepared: Path, folder: Path) -> Path:
    return Path(shutil.copytree(prepared, folder / "workspace"))


@pytest.fixture
def fresh(refitted: Path, tmp_path: Path) -> Path:
    return copy(refitted, tmp_path)


@pytest.fixture(scope="module")
def table(done: Path) -> pd.DataFrame:
    return pd.read_csv(done / "reports" / "compression" / "table.csv").set_index("name")


def packaged(root: Path, name: str) -> Path:
    return (
        root / "data" / "refit" / "package" if name == "refitted" else root / "data/compress/models" / name / "package"
    )


def weights(root: Path, name: str) -> dict[str, np.ndarray]:
    graph = onnx.load(packaged(root, name) / "network.onnx")
    return {item.name: to_array(item) for item in graph.graph.initializer}


def convolutions(root: Path, name: str) -> list[tuple[int, ...]]:
    """Shapes of the weights of the convolutions, by the order in which they are read; the two views share them."""
    graph = onnx.load(packaged(root, name) / "network.onnx").graph
    shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    return list(dict.fromkeys(shapes[node.input[1]] for node in graph.node if node.op_type == "Conv"))


def holdout_probabilities(root: Path, name: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows of the holdout and what the graph answers, without the code that serves it."""
    rows = folds(root)
    rows = rows[rows["side"] == "holdout"]
    seen = read_json(packaged(root, name) / "about.json")["preprocessing"]
    pixels = [resize_crop(decode(image, True), **seen).numpy() for image in encoded_images(root, rows.index)]
    session = onnxruntime.InferenceSession(packaged(root, name) / "network.onnx", providers=["CPUExecutionProvider"])
    return rows, session.run(None, {"pixels": np.stack(pixels)})[0]


MADE = [name for name in TECHNIQUES if not name.startswith("larger")]


@pytest.mark.parametrize("name", ["refitted", *MADE])
def test_scores_are_of_the_same_holdout_and_sizes_of_the_files(name: str, done: Path, table: pd.DataFrame) -> None:
    rows, probability = holdout_probabilities(done, name)
    predicted = np.array(sorted(CLASSES))[probability.argmax(1)]
    expected = f1_score(rows["label"], predicted, average="weighted", zero_division=0.0)
    assert table["f1_weighted"][name] == pytest.approx(expected, abs=1e-5)
    change = table["f1_weighted"][name] - table["f1_weighted"]["refitted"]
    assert table["f1_change"][name] == pytest.approx(change, abs=1e-5)
    assert table["f1_change_low"][name] <= table["f1_change"][name] <= table["f1_change_high"][name]
    files = sum(path.stat().st_size for path in packaged(done, name).rglob("*") if path.is_file())
    assert table["size_bytes"][name] == files
    for batch in (1, 32):
        quickest, middle, slowest = (table[f"latency_{batch}_ms{end}"][name] for end in ("", "_median", "_slowest"))
        assert 0 < quickest <= middle <= slowest


@pytest.mark.parametrize("name", MADE)
def test_each_version_answers_images_and_says_what_it_is(name: str, done: Path) -> None:
    row = folds(done).index[:3]
    classifier = Classifier(packaged(done, name))
    answers = list(classifier.probabilities(encoded_images(done, row)))
    assert all(isinstance(answer, dict) and answer["label"].sum() == pytest.approx(1, abs=0.02) for answer in answers)
    assert classifier.about["compression"]["name"] == name
    card = (packaged(done, name) / "README.md").read_text()
    assert f"A cheaper version of that model, {name}: {classifier.about['compression']['told']}." in card
    about = read_json(done / "data/compress/models" / name / "metrics.json")
    assert about["package"] == package.digest(packaged(done, name))
    assert about["holdout"] == read_json(done / "data/refit/metrics.json")["holdout"]


def test_int8_runs_in_integers_and_answers_nearly_the_same(done: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "ran.onnx")
    onnxruntime.InferenceSession(packaged(done, "int8") / "network.onnx", options, providers=["CPUExecutionProvider"])
    ran = [node.op_type for node in onnx.load(tmp_path / "ran.onnx").graph.node]
    assert ran.count("QLinearConv") == 4, "two convolutions in each of the two views"
    assert "Conv" not in ran
    kinds = {values.dtype for values in weights(done, "int8").values() if values.size >= 200}
    assert kinds == {np.dtype(np.int8)}
    assert not (packaged(done, "int8") / "state.safetensors").exists()
    before, after = (holdout_probabilities(done, name)[1] for name in ("refitted", "int8"))
    assert 1e-6 < np.abs(before - after).max() < 0.08


def test_int8_of_shared_weights_starts_from_the_shared_values(done: Path) -> None:
    of_shared, of_refitted = (
        max((v for v in weights(done, name).values() if v.dtype == np.int8), key=np.size)
        for name in ("shared_int8", "int8")
    )
    assert of_shared.shape == of_refitted.shape == (32, 16, 3, 3)
    n_values = [len(np.unique(channel)) for channel in of_shared]
    assert max(n_values) <= TECHNIQUES["shared"]["clusters"] < max(len(np.unique(channel)) for channel in of_refitted)
    before, after = (holdout_probabilities(done, name)[1] for name in ("shared", "shared_int8"))
    assert 1e-6 < np.abs(before - after).max() < 0.08


def test_narrower_pruned_and_smaller_networks_have_the_shapes_and_macs_of_the_formula(
    done: Path, table: pd.DataFrame
) -> None:
    def macs(first: int, second: int, size: int) -> int:
        return 9 * 3 * first * size**2 + 9 * first * second * (size // 2) ** 2 + second * len(CLASSES)

    assert convolutions(done, "refitted") == [(16, 3, 3, 3), (32, 16, 3, 3)]
    assert table["macs"]["refitted"] == macs(16, 32, 32)
    assert convolutions(done, "narrow") == [(4, 3, 3, 3), (8, 4, 3, 3)]
    assert table["macs"]["narrow"] == macs(4, 8, 32)
    assert convolutions(done, "pruned") == [(8, 3, 3, 3), (16, 8, 3, 3)]
    assert table["macs"]["pruned"] == table["macs"]["pruned_int8"] == macs(8, 16, 32)
    assert convolutions(done, "small") == convolutions(done, "refitted")
    assert table["macs"]["small"] == macs(16, 32, 20)
    assert table["input_size"]["small"] == 20
    assert convolutions(done, "taught") == [(8, 3, 3, 3), (12, 8, 3, 3)]
    assert table["macs"]["taught"] == macs(8, 12, 16)


def test_what_is_not_possible_is_told_in_the_table_and_on_the_page(done: Path, table: pd.DataFrame) -> None:
    reason = "chosen sees images of 32 pixels a side, and 64 is no smaller"
    assert table["not_possible"]["larger"] == reason
    assert table["not_possible"]["larger_int8"] == "it starts from larger, which was not possible"
    assert table["f1_weighted"][["larger", "larger_int8"]].isna().all()
    page = (done / "reports" / "compression" / "index.html").read_text()
    assert f"Not possible: {reason}." in page
    assert all(f'href="{name}/index.html"' in page for name in MADE)
    assert (done / "reports/compression/quality_against_cost.png").stat().st_size > 10_000
    assert read_json(done / "data/compress/models/names.json") == MADE
    assert set(read_json(done / "data/compress/metrics.json")) == set(MADE)


def test_a_candidate_that_is_not_possible_ends_the_stage(fresh: Path) -> None:
    with pytest.raises(
        PleatError, match=r"`compress.candidate` is 'larger', which is not possible for chosen: .* null"
    ):
        compress.run(params("larger", ["larger"]), fresh)
    assert not (fresh / "data" / "compress").exists()


def test_an_interrupted_run_makes_only_what_is_missing(
    fresh: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, made, original = params(None, ["shared", "narrow", "int8"]), [], techniques.make

    def interrupted(refitted: Any, name: str, *rest: Any) -> Any:
        made.append(name)
        found = original(refitted, name, *rest)
        if made == ["int8", "shared"]:
            raise KeyboardInterrupt  # its package lies in a folder that does not count as finished
        return found

    monkeypatch.setattr(techniques, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress.run(settings, fresh)
    assert not (fresh / "data" / "compress").exists()
    compress.run(settings, fresh)
    assert made == ["int8", "shared", "shared", "narrow"]
    for name in ("int8", "shared", "narrow"):
        assert content(packaged(fresh, name)) == content(packaged(done, name))
    left = {path.name.rpartition("-")[0] for path in (fresh / ".pleat" / "compress").iterdir()}
    assert left == {"int8", "shared", "narrow"}, "neither inputs nor checkpoints stay"


def refitted_of(root: Path, settings: Params) -> Refitted:
    return Refitted(settings, root, root / ".pleat" / "compress")


def prepared_in_scratch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the inputs that this stage prepares from here on."""
    names: list[str] = []
    original = prepare.run

    def run(settings: Params, name: str, *rest: Any, **more: Any) -> None:
        names.append(name)
        original(settings, name, *rest, **more)

    monkeypatch.setattr(prepare, "run", run)
    return names


def test_nothing_of_the_holdout_reaches_a_version(fresh: Path, done: Path) -> None:
    """With other images and labels in the holdout every package stays as it was, but for the scores on its card."""
    held = set(folds(fresh).query("side == 'holdout'").index)
    assert len(held) >= 10
    pack = fresh / "data" / "ingest" / BATCH / "images.arrow"
    with pa.OSFile(str(pack)) as file:
        table = pa.ipc.open_file(file).read_all()
    rows = table.to_pylist()
    for row in rows:
        if row["sample_id"] in held:
            row["bytes"], row["plain_jpeg"] = encode(Image.new("RGB", (48, 64), "orange"), quality=90), True
    with pa.OSFile(str(pack), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=table.schema))
    folder = fresh / "data" / "prepare" / "chosen" / BATCH
    inputs = np.load(folder / "inputs.npy")
    inputs[[name in held for name in read_json(folder / "sample_ids.json")]] = 7
    np.save(folder / "inputs.npy", inputs)

    def relabelled(samples: pd.DataFrame) -> pd.DataFrame:
        other = dict(zip(CLASSES, CLASSES[1:] + CLASSES[:1], strict=True))
        samples["label"] = samples["label"].where(samples["side"] == "train", samples["label"].map(other))
        return samples

    write_folds(fresh, relabelled)
    compress.run(params("int8"), fresh)
    before, after = (pd.read_csv(root / "reports/compression/table.csv").set_index("name") for root in (done, fresh))
    assert after["f1_weighted"]["refitted"] != before["f1_weighted"]["refitted"], "the holdout is another one"
    for name in MADE:
        own, other = content(packaged(done, name)), content(packaged(fresh, name))
        assert own.pop("README.md") != other.pop("README.md")
        assert own == other


def test_inputs_that_a_former_student_left_are_not_taken(fresh: Path, done: Path) -> None:
    settings = params(None, ["taught"])
    stale = settings.model_copy(update={"models": {"student": settings.models["student"].model_copy(
        update={"input_size": 24})}})  # fmt: skip
    prepare.run(stale, "student", BATCH, fresh)
    compress.run(settings, fresh)
    assert content(packaged(fresh, "taught")) == content(packaged(done, "taught"))


def test_inputs_of_other_data_are_not_taken_up(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, names = params(), prepared_in_scratch(monkeypatch)
    student = settings.models["student"]
    path = fresh / "data" / "refit" / "metrics.json"
    about = read_json(path)
    for changed in ({}, {}, {"package": "other data of training"}, {"holdout": "another holdout"}):
        write_json(path, about | changed)
        inputs_of(refitted_of(fresh, settings), student)
    assert len(names) == len(set(names)) == 3, "the second time they lie there"


def test_weights_with_other_contents_have_another_name(tmp_path: Path) -> None:
    refitted = refitted_of(tmp_path, params())
    frozen = FrozenModel(kind="frozen", backbone="test_resnet", weights="weights.safetensors")
    with pytest.raises(PleatError, match=r"weights file .* of test_resnet does not exist"):
        refitted.weights_of(frozen)
    names = []
    for text in ("a", "b", "a"):
        (tmp_path / "weights.safetensors").write_text(text)
        names.append(refitted.weights_of(frozen))
    assert names[0] == names[2] != names[1]
    assert refitted.weights_of(params().models["chosen"]) == ""


def test_images_are_read_few_at_a_time_and_in_order(refitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = refitted_module.read_images

    def read_images(path: Path, sample_ids: list[str]) -> dict[str, bytes]:
        read.append(len(sample_ids))
        return original(path, sample_ids)

    monkeypatch.setattr(refitted_module, "read_images", read_images)
    monkeypatch.setattr(refitted_module, "IMAGES_A_CHUNK", 5)
    rows = folds(refitted).reset_index().sample(12, random_state=0)
    images = refitted_of(refitted, params()).encoded(rows)
    assert next(images) == encoded_images(refitted, rows["sample_id"][:1].tolist())[0]
    assert read == [5]
    assert list(images) == encoded_images(refitted, rows["sample_id"][1:].tolist())


def test_fewer_filters_and_pruning_see_the_pixels_that_are_there(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = prepared_in_scratch(monkeypatch)
    compress.run(params(None, ["narrow", "pruned"]), fresh)
    assert names == []


@pytest.mark.parametrize("name", ["small", "taught", "pruned", "narrow", "int8"])
def test_versions_leave_the_number_of_threads_as_it_was(name: str, fresh: Path, tmp_path: Path) -> None:
    settings = params()
    refitted = refitted_of(fresh, settings)
    (tmp_path / "out").mkdir()
    torch.set_num_threads(3)
    try:
        technique = settings.compress.techniques[name]
        techniques.make(refitted, name, technique, refitted.package, refitted.made, tmp_path / "out")
        assert torch.get_num_threads() == 3
        scoring.score(refitted, refitted.package)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_another_candidate_makes_nothing_anew_and_what_is_not_asked_for_goes(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress.run(params(None, ["shared", "narrow"]), fresh)
    before = {name: content(packaged(fresh, name)) for name in ("shared", "narrow")}
    with monkeypatch.context() as patch:
        patch.setattr(techniques, "make", lambda *_: pytest.fail("made again"))
        compress.run(params("narrow", ["shared", "narrow"]), fresh)
        assert {name: content(packaged(fresh, name)) for name in before} == before
        compress.run(params(None, ["narrow"]), fresh)
    assert [path.name.rpartition("-")[0] for path in (fresh / ".pleat" / "compress").iterdir()] == ["narrow"]
    compress.run(params(None, []), fresh)
    assert list((fresh / ".pleat" / "compress").iterdir()) == []


def test_a_candidate_and_what_it_starts_from_are_made_first(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(_: Any, name: str, *rest: Any) -> Any:
        made.append(name)
        raise NotPossibleError("it is a test")

    monkeypatch.setattr(techniques, "make", make)
    with pytest.raises(PleatError, match=r"`compress.candidate` is 'pruned_int8', .* it starts from pruned"):
        compress.run(params("pruned_int8"), fresh)
    assert made == ["pruned"]


def test_the_card_of_a_version_tells_of_its_own_training(done: Path) -> None:
    expected = {"small": 3, "narrow": 3, "pruned": 2, "taught": 2, "int8": 3, "pruned_int8": 2}
    for name, epochs in expected.items():
        assert read_json(done / "data/compress/models" / name / "metrics.json")["epochs"] == epochs
        card = (packaged(done, name) / "README.md").read_text()
        page = (done / "reports/compression" / name / "index.html").read_text()
        assert f"its last training took {epochs} epochs." in card
        assert f"its last training took {epochs} epochs." in page
        assert "as many as the folds chose" not in page
    cards = {name: (packaged(done, name) / "README.md").read_text() for name in expected}
    assert "model.input_size: 16" in cards["taught"]
    assert "training.max_epochs: 2" in cards["taught"]
    assert "model.input_size: 20" in cards["small"]
    assert "training.max_epochs: 8" in cards["small"]
    assert "training.learning_rate: 0.001" in cards["pruned"]
    assert "training.learning_rate: 0.001" in cards["pruned_int8"]
    assert "for 3 epochs" in (done / "data/refit/package/README.md").read_text()


def test_what_was_done_is_told_as_it_was(done: Path, table: pd.DataFrame) -> None:
    assert table["told"]["pruned"].startswith("24 of 48 channels removed (50.0%), 1.62 M MACs became 516 k; then")
    page = (done / "reports" / "compression" / "index.html").read_text()
    assert "student in place of chosen, trained for 2 epochs" in page
    assert "Student in place of" not in page


def test_filters_that_are_as_many_as_before_are_not_possible(fresh: Path) -> None:
    settings = params(None, [])
    technique = FewerFilters(kind="fewer_filters", width=0.99)
    with pytest.raises(NotPossibleError, match=r"^0.99 of the filters of chosen \(16, 32\), rounded, are as many as"):
        fewer_filters.make(refitted_of(fresh, settings), "same", technique, fresh)


def test_a_score_that_is_undefined_is_not_a_missing_holdout() -> None:
    told = {
        "weighted F1 0.5000 on the holdout": {"f1_weighted": 0.5},
        "weighted F1 is undefined on the holdout": {"f1_weighted": None},
        "no holdout to score it on": {},
    }
    for sentence, scores in told.items():
        assert compress._told_score(scoring.Scored([], scores, {})) == sentence


def test_errors_of_a_technique_are_not_told_as_a_full_disk(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> Any:
        raise ConnectionError("the hub is away")

    monkeypatch.setattr(techniques, "make", away)
    with pytest.raises(ConnectionError, match="the hub is away"):
        compress.run(params(None, ["narrow"]), fresh)


def imported(path: Path) -> set[str]:
    """Modules of pipeline_steps that a file imports, as paths below it without their suffix."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline_steps"):
            names |= {str(node.module)} | {f"{node.module}.{one.name}" for one in node.names}
    return {name.replace(".", "/").removeprefix("pipeline_steps/") for name in names}


def test_dvc_runs_the_stage_again_when_code_changes_that_versions_depend_on() -> None:
    stage = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]["compress"]
    code = REPOSITORY / "pipeline_steps"
    deps = {name.removeprefix("pipeline_steps/") for name in stage["deps"]}
    assert set(compress.CODE) <= deps
    assert {"data/prepare", "data/refit/package"} <= deps
    # Code that only checks, names or draws does not change a version.
    plain = {"errors", "files", "params", "params_compress", "params_models", "progress", "units", "versions"}
    used = [path for name in compress.CODE if name.startswith("complexity") for path in sorted(
        (code / name).glob("*.py") if (code / name).is_dir() else [code / name])]  # fmt: skip
    assert len(used) > 15
    for path in [*used, code / "compress.py", code / "compress_report.py"]:
        for name in imported(path):
            if (code / f"{name}.py").is_file() and name not in plain:
                covered = {f"{name}.py", *map(str, Path(name).parents)}
                assert covered & deps, f"{path.name} imports {name}"
                of_versions = path in used and path.name != "scoring.py" and name != "model_card"
                assert covered & set(compress.CODE) or not of_versions, f"{path.name} imports {name}"


def test_without_techniques_it_imports_nothing_heavy_and_changes_nothing(fresh: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from pipeline_steps import compress, params
        settings = params.load(Path({str(Path(__file__).parent.parent / "params.yaml")!r}))
        assert compress.run(settings, Path({str(fresh)!r})) is None
        print(*sorted({{"torch", "timm", "onnx", "onnxruntime", "matplotlib", "mlflow", "sklearn"}} & set(sys.modules)))
    """
    lines = [line.removeprefix("        ") for line in code.splitlines()]
    printed = subprocess.check_output([sys.executable, "-c", "\n".join(lines)], text=True)
    assert printed.splitlines()[-1] == ""
    assert read_json(fresh / "data/compress/models/names.json") == []
    assert "None was asked for" in (fresh / "reports/compression/index.html").read_text()
    assert compress.candidate(params(), fresh)[1] == fresh / "data/refit/package"


def test_the_candidate_is_what_is_registered(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(done)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{done / 'mlflow.db'}")
    outcome = register.run(params("int8"), done)
    assert outcome.event == "promoted"
    client = MlflowClient(f"sqlite:///{done / 'mlflow.db'}")
    version = client.get_model_version_by_alias("pleat", "champion")
    assert version.tags["pleat.compression"] == "int8"
    assert version.tags["pleat.package"] == package.digest(packaged(done, "int8"))
    assert "A cheaper version of chosen: weights and activations in 8 bits" in version.description
    run = client.get_run(version.run_id)
    assert run.data.tags["mlflow.runName"] == "chosen int8"
    about = read_json(done / "data/compress/models/int8/metrics.json")
    assert run.data.metrics["holdout_f1_weighted"] == pytest.approx(about["f1_weighted"])
    assert run.data.metrics["size_bytes"] == about["size_bytes"]
