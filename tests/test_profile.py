"""Totals of parameters and multiply-accumulates against published and hand-counted figures."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import synthetic_run as synthetic
import torch
from conftest import PLEAT, REPOSITORY, load_params

from pipeline_steps import profile
from pipeline_steps.complexity import latency, subject
from pipeline_steps.complexity.totals import count
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_json
from pipeline_steps.packed import read_images
from pipeline_steps.params_models import Block, CustomCnn, FinetunedModel, FrozenModel, Head, ScratchModel

LINEAR = Head(hidden=0, dropout=0.0)


@pytest.mark.parametrize(
    ("backbone", "params", "giga_macs"),
    # Parameters as timm's own 1,000-class models; MACs as published by their authors.
    [("mobilenetv2_100", 3_504_872, 0.300), ("convnext_tiny", 28_589_128, 4.46), ("resnet50", 25_557_032, 4.09)],
)
def test_published_totals_with_the_original_classifier(backbone: str, params: int, giga_macs: float) -> None:
    totals = count(FrozenModel(kind="frozen", backbone=backbone, weights=None), LINEAR, n_outputs=1000)
    assert totals["params"] == params
    assert totals["macs"] / 1e9 == pytest.approx(giga_macs, rel=0.01)
    assert totals["input_size"] == 224


def test_the_study_counts_a_head_on_the_logits_of_convnext_large() -> None:
    """197,767,336 of timm's network with its 1,000 classes, and 1,000 x 26 + 26 of the head."""
    settings = FrozenModel(kind="frozen", backbone="convnext_large.fb_in22k_ft_in1k", weights=None, head_on="logits")
    assert count(settings, LINEAR, n_outputs=26)["params"] == 197_793_362


def test_whole_networks_count_as_timms_own_at_the_chosen_size() -> None:
    """With 1,000 classes timm's 3,504,872 parameters; the multiply-accumulates of convolutions follow the area."""
    finetuned = FinetunedModel(kind="finetuned", backbone="mobilenetv2_100", weights="not needed", input_size=448)
    own = count(ScratchModel(kind="scratch", backbone="mobilenetv2_100"), LINEAR, 1000)
    large = count(finetuned, LINEAR, 1000)
    assert own["params"] == large["params"] == 3_504_872
    assert (own["input_size"], large["input_size"]) == (224, 448)
    head = 1280 * 1000
    assert large["macs"] - head == 4 * (own["macs"] - head)
    on_logits = count(finetuned.model_copy(update={"head_on": "logits"}), LINEAR, 5)
    assert on_logits["params"] == 3_504_872 + 5 * 1000 + 5


def test_a_size_that_a_network_cannot_take_is_told_in_the_profile() -> None:
    with pytest.raises(PleatError, match=r"vgg11 cannot take images of 16 pixels .* Its own size is 224"):
        count(ScratchModel(kind="scratch", backbone="vgg11", input_size=16), LINEAR, 3)


def test_a_network_counted_by_hand() -> None:
    network = CustomCnn(
        kind="custom_cnn",
        input_size=20,
        blocks=[Block(filters=4, kernel=5, pool=2), Block(filters=6, kernel=3, pool=1)],
    )
    totals = count(network, Head(hidden=7, dropout=0.5), n_outputs=3)
    convolutions = 5 * 5 * 3 * 4, 3 * 3 * 4 * 6  # weights, without bias
    batch_norms = 2 * 4 + 2 * 6
    head = 6 * 7 + 7 + 7 * 3 + 3
    assert totals["params"] == sum(convolutions) + batch_norms + head
    assert totals["macs"] == convolutions[0] * 20 * 20 + convolutions[1] * 10 * 10 + 6 * 7 + 7 * 3

    valid = [Block(filters=4, kernel=5, pool=2, padding="valid"), *network.blocks[1:]]
    changed = network.model_copy(update={"blocks": valid, "batch_norm": False})
    totals = count(changed, Head(hidden=7, dropout=0.5), n_outputs=3)
    assert totals["params"] == sum(convolutions) + 4 + 6 + head
    assert totals["macs"] == convolutions[0] * 16 * 16 + convolutions[1] * 8 * 8 + 6 * 7 + 7 * 3


@pytest.mark.parametrize(
    ("columns", "targets", "n_outputs"),
    [
        (synthetic.LABEL, synthetic.ONE, 6),
        (synthetic.APPAREL, synthetic.TWO, 6 + 4),
        (synthetic.TAGS, synthetic.MANY, 4 + 3 + 2),
    ],
    ids=["one", "two", "multilabel"],
)
def test_the_head_has_an_output_for_each_class_of_each_target(
    tmp_path: Path, columns: dict, targets: dict, n_outputs: int
) -> None:
    synthetic.make_data(tmp_path, columns)
    params = load_params({"targets": targets})
    wanted = count(params.models["cnn_tiny"], params.training["cnn_tiny"].head, n_outputs)
    assert profile.run(params, "cnn_tiny", tmp_path) == wanted
    assert read_json(tmp_path / "data" / "profile" / "cnn_tiny.json") == wanted


def test_the_stage_leaves_the_same_report_each_time(tmp_path: Path) -> None:
    synthetic.make_data(tmp_path, synthetic.LABEL)
    params = load_params({"targets": synthetic.ONE})
    report = tmp_path / "reports" / "complexity" / "cnn_tiny"
    totals = profile.run(params, "cnn_tiny", tmp_path)
    first = {path.name: path.read_bytes() for path in report.iterdir()}
    profile.run(params, "cnn_tiny", tmp_path)
    assert {path.name: path.read_bytes() for path in report.iterdir()} == first
    assert set(first) == {"layers.csv", "totals.json", "index.html"}
    layers = pd.read_csv(report / "layers.csv")
    assert layers["macs"].sum() == totals["macs"]
    assert layers["params"].sum() == totals["params"]
    found = read_json(report / "totals.json")["cnn_tiny"]
    assert (found["flops"], found["macs_torch"]) == (2 * totals["macs"], totals["macs"])
    # 3 x 3 convolutions and pools of 2, four times: 1 + (2 + 1) (1 + 2 + 4 + 8)
    assert found["receptive_field_px"] == 46
    page = first["index.html"].decode()
    assert "agree in every layer" in page
    assert str(tmp_path) not in page


def test_the_stage_measures_what_params_ask_for_and_counts_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "BUDGET_S", 0.1)
    rows = synthetic.make_data(tmp_path, synthetic.LABEL)
    asked: list[str] = []
    monkeypatch.setattr(profile, "read_images", lambda file, ids: asked.extend(ids) or read_images(file, ids))
    params = {"targets": synthetic.ONE}
    counted = profile.run(load_params(params), "cnn_tiny", tmp_path)
    assert asked == []
    params |= {"profile": {"latency": True, "images": 5}}
    assert profile.run(load_params(params), "cnn_tiny", tmp_path) == counted
    assert len(set(asked)) == 5
    assert set(asked) <= set(rows.loc[rows["side"] == "train", "sample_id"])
    report = tmp_path / "reports" / "complexity" / "cnn_tiny"
    assert {"effective_0.png", "roofline_0.png"} < {path.name for path in report.iterdir()}
    assert "random weights, on 5 images" in (report / "index.html").read_text()
    totals, layers = read_json(report / "totals.json")["cnn_tiny"], pd.read_csv(report / "layers.csv")
    for batch in (1, 32):
        assert layers[f"latency_ms_cpu_{batch}"].sum() > 0
        assert totals[f"latency_ms_cpu_{batch}"] > 0


def test_a_network_without_an_effective_field_is_counted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic.make_data(tmp_path, synthetic.LABEL)
    params = load_params({"targets": synthetic.ONE, "profile": {"latency": False, "images": 2}})

    def trained(_: Path | None) -> tuple[torch.nn.Module, str]:
        network = usual("cnn_tiny", params.models["cnn_tiny"], LINEAR, 6).build()
        for weight in network.parameters():
            torch.nn.init.zeros_(weight)
        return network, "weights of zero"

    usual = subject.of_model
    monkeypatch.setattr(subject, "of_model", lambda *given: replace(usual(*given), trained=trained))
    assert profile.run(params, "cnn_tiny", tmp_path)["macs"] > 0
    assert "No gradient comes back" in capsys.readouterr().out
    report = tmp_path / "reports" / "complexity" / "cnn_tiny"
    assert {path.name for path in report.iterdir()} == {"layers.csv", "totals.json", "index.html"}


def test_people_profile_a_model_at_another_size_or_two_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = load_params({})
    folder = profile.show(["cnn_small", "cnn_tiny"], params, root=tmp_path)
    assert folder == tmp_path / "reports" / "profile" / "cnn_small-cnn_tiny"
    layers = pd.read_csv(folder / "layers.csv")
    assert list(layers["model"].unique()) == ["cnn_small", "cnn_tiny"]
    printed = capsys.readouterr().out
    assert "counted with 1,000 outputs" in printed
    cells = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["Parameters"])
    small, tiny = (one["params"] for one in read_json(folder / "totals.json").values())
    assert tiny < small
    assert cells[-1] == f"{tiny / small:.2f}"  # second / first
    larger = read_json(profile.show(["cnn_tiny"], params, input_size=64, root=tmp_path) / "totals.json")["cnn_tiny"]
    own = read_json(folder / "totals.json")["cnn_tiny"]
    head = 64 * 1000
    assert larger["macs"] - head == 4 * (own["macs"] - head)
    with pytest.raises(PleatError, match=r"cnn_tiny cannot take images of 8 pixels .* use 16 or more"):
        profile.show(["cnn_tiny"], params, input_size=8, root=tmp_path)
    with pytest.raises(PleatError, match=r"Expected --input-size to be at least 1, but got 0\."):
        profile.show(["cnn_tiny"], params, input_size=0, root=tmp_path)
    with pytest.raises(PleatError, match=r"two different models side by side, but both are cnn_tiny"):
        profile.show(["cnn_tiny", "cnn_tiny"], params, root=tmp_path)
    with pytest.raises(PleatError, match=r"has a model named 'cnn_tyny'; near names: cnn_tiny"):
        profile.show(["cnn_tyny"], params, root=tmp_path)


def test_layers_without_multiply_accumulates_are_none_of_the_biggest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = profile.show(["cnn_tiny"], load_params({}), root=tmp_path)
    printed = capsys.readouterr().out
    listed = printed.partition("layers with most MACs")[2].partition("Both counts")[0]
    rows = [line.split() for line in listed.splitlines() if line.strip()]
    kinds = pd.read_csv(folder / "layers.csv").set_index("layer")["kind"]
    names = [row[0] for row in rows if row[0] in kinds.index]
    assert len(names) > 2
    assert set(kinds[names]) == {"Conv2d", "Linear"}


def test_a_small_cnn_is_profiled_without_timm_or_pictures(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    command = [PLEAT[0], "-X", "importtime", *PLEAT[1:], "profile", "cnn_tiny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reports/profile/cnn_tiny/index.html" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in loaded
    assert not loaded & {"timm", "matplotlib", "sklearn", "mlflow"}
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())  # and nothing else on stderr
