"""The params.yaml that comes of Airflow's trigger form."""

import json
import math
from pathlib import Path

import pytest
from conftest import REPOSITORY
from trigger_projects import OWN, read, refused, settings_of, yaml_1_1

from pipeline_steps import recipes, trigger_form
from pipeline_steps.errors import PleatError

pytest_plugins = ["trigger_projects"]


def test_by_default_a_run_uses_params_yaml(project: Path) -> None:
    own = (REPOSITORY / "params.yaml").read_text()
    (project / "params.yaml").write_text(own)
    text = trigger_form.document(project, {})
    assert read(text) == read(own)
    assert json.dumps(read(text)) == json.dumps(read(own))  # the keys' order and 1 against 1.0 too
    assert text == trigger_form.document(
        project,
        {
            "recipe": "params.yaml",
            "models": None,
            "folds": None,
            "epochs": None,
            "batches": ["sample"],
            "promote": "as in the recipe",
            "overrides": None,
        },
    )


def test_a_recipe_keeps_its_name_and_takes_the_batches_of_the_checkout(project: Path) -> None:
    expected = read((project / "recipes" / "clothing.yaml").read_text())
    expected["experiment"]["batches"] = ["sample"]
    assert settings_of(project, {"recipe": "clothing"}) == expected
    assert expected["experiment"]["recipe"] == "clothing"


def test_a_document_by_hand(tangled: Path) -> None:
    conf = {
        "recipe": "other",
        "models": ["half", "on"],
        "folds": 3.0,
        "epochs": 7,
        "batches": ["new"],
        "promote": "dry_run",
        "overrides": {
            "promotion.min_gain": 0.25,
            "models.on.input_size": 12,
            "training.on.learning_rate": 1e-7,
            "training.net.v2.weight_decay": 1e22,
            "training.half.max_epochs": 2,
        },
    }
    assert trigger_form.document(tangled, conf) == (
        """\
experiment:
  recipe: other
  seed: 2
  batches: [new]
  models: [half, "on"]
  folds: [0, 1, 2]
ingest:
  format: class_folders
  min_side_px: 1
  max_pixels: 1000
targets:
  "on":
    kind: multiclass
  tags:
    kind: multilabel
    of: ["on", colour]
labels:
  drop: []
  merge: {}
  top_classes: 10
split:
  given: false
  group_by: sender_id
  near_copy_max_distance: 0
  holdout:
    fraction: 0.5
    salt: other
models:
  half:
    kind: custom_cnn
    input_size: 8
    blocks: [{filters: 8, kernel: 3, pool: 1}]
  net.v2:
    kind: frozen
    backbone: resnet18
    weights: null
  many:
    kind: frozen
    backbone: resnet18
    weights: null
  "on":
    kind: custom_cnn
    input_size: 12
    blocks: [{filters: 8, kernel: 3, pool: 2}]
training:
  half:
    head:
      hidden: 0
      dropout: 0.2
    max_epochs: 2
    patience: 1
    inner_fraction: 0.5
    batch_size: 1
    learning_rate: 1
    weight_decay: 0
    loss:
      kind: cross_entropy
    label_smoothing: 0
    class_weights: balanced
    weight_average: 0
    mirror: false
  net.v2:
    head:
      hidden: 0
      dropout: 0.2
    max_epochs: 60
    patience: 1
    inner_fraction: 0.5
    batch_size: 1
    learning_rate: 1
    weight_decay: 1.0e+22
    loss:
      kind: focal
      gamma: 2.0
    label_smoothing: 0
    class_weights: balanced
    weight_average: 0
    mirror: false
  many:
    head:
      hidden: 0
      dropout: 0.2
    max_epochs: 1
    patience: 1
    inner_fraction: 0.5
    batch_size: 1
    learning_rate: 1
    weight_decay: 0
    loss:
      kind: asymmetric
      gamma_positive: 0.0
      gamma_negative: 2.0
      margin: 0.05
    label_smoothing: 0
    class_weights: balanced
    weight_average: 0
    mirror: false
  "on":
    head:
      hidden: 0
      dropout: 0.2
    max_epochs: 7
    patience: 8
    inner_fraction: 0.15
    batch_size: 32
    learning_rate: 1.0e-07
    weight_decay: 0.01
    loss:
      kind: cross_entropy
    label_smoothing: 0.0
    class_weights: none
    weight_average: 0.0
    mirror: true
profile:
  latency: false
  images: 0
compress:
  techniques: {}
  candidate: null
promotion:
  model: other
  mode: dry_run
  floors:
    f1_weighted: 0
    f1_macro: 1
  min_gain: 0.25
  confidence: 0.5
  max_class_drop: 0
  max_cost:
    latency: 1
    memory: 1
    size: 1
inbox:
  source: "s3://bucket/on"
  every_minutes: 1
  settle_s: 0
  max_drift:
    label_shares: 1
    image_statistics: 0
    new_labels: true
"""
    )


def test_a_recipe_keeps_its_targets_and_the_split_of_its_data_set(project: Path) -> None:
    settings = settings_of(project, {"recipe": "attributes", "folds": 5, "models": ["cnn_tiny"]})
    assert list(settings["targets"]) == [f"category{number}" for number in range(1, 7)]
    assert settings["split"]["given"] is True
    assert settings["experiment"]["folds"] == [0], "the data set's own val list is the one fold"


def test_aliases_and_words_that_look_like_other_types(tangled: Path) -> None:
    text = trigger_form.document(tangled, {"overrides": {"training.on.patience": 3}})
    expected = read(OWN)
    expected["experiment"]["folds"] = [0, 1, 2]
    expected["training"]["on"] = {**expected["training"]["on"], "patience": 3}
    assert read(text) == expected  # net.v2, an alias of it in the file, keeps its patience
    assert read(text)["training"]["net.v2"]["patience"] == 8
    assert yaml_1_1(text) == expected


@pytest.mark.parametrize(
    ("recipe", "conf", "assignments"),
    [
        ("sample", {}, []),
        ("clothing", {"folds": 4}, ["experiment.folds=4"]),
        ("clothing", {"models": ["custom_cnn", "convnext_tiny"]}, ["experiment.models=[custom_cnn, convnext_tiny]"]),
        (
            "sample",
            {"epochs": 5, "batches": ["clothing", "sample"]},
            [
                "training.cnn_small.max_epochs=5",
                "training.cnn_tiny.max_epochs=5",
                "experiment.batches=[clothing, sample]",
            ],
        ),
        (
            "clothing",
            {"epochs": 3, "overrides": {"training.custom_cnn.max_epochs": 9, "split.holdout.fraction": 0}},
            [
                "training.mobilenetv2_100.max_epochs=3",
                "training.custom_cnn.max_epochs=9",
                "split.holdout.fraction=0",
            ],
        ),
        (
            "sample",
            {
                "overrides": {
                    "experiment.seed": 4294967295,
                    "split.group_by": "sender_id",
                    "models.cnn_tiny.input_size": 16,
                    "training.cnn_small.head.hidden": 8.0,
                    "training.cnn_small.learning_rate": 2.5e-4,
                    "training.cnn_tiny.mirror": False,
                    "training.cnn_tiny.class_weights": "balanced",
                }
            },
            [
                "experiment.seed=4294967295",
                "split.group_by=sender_id",
                "models.cnn_tiny.input_size=16",
                "training.cnn_small.head.hidden=8",
                "training.cnn_small.learning_rate=2.5e-4",
                "training.cnn_tiny.mirror=false",
                "training.cnn_tiny.class_weights=balanced",
            ],
        ),
    ],
)
def test_the_form_does_what_pleat_use_does(recipe: str, conf: dict, assignments: list[str], project: Path) -> None:
    batches = [] if "batches" in conf else ["experiment.batches=[sample]"]
    by_form = settings_of(project, {"recipe": recipe, **conf})
    recipes.use(recipe, [*batches, *assignments], project)
    assert by_form == read((project / "params.yaml").read_text())


# What is wrong is said in one sentence


@pytest.mark.parametrize(
    ("conf", "sentence"),
    [
        (
            {"epoch": 3},
            "there is no field 'epoch'; the fields are recipe, models, folds, epochs, batches, promote, overrides.",
        ),
        (
            {"recipe": "x"},
            "`recipe` names 'x'; there are params.yaml, apparel, attributes, clothing, clothing_light, clothing_top10, "
            "dogs, sample.",
        ),
        ({"batches": ["x"]}, "`batches` names 'x'; there are clothing, sample."),
        ({"models": "cnn_tiny"}, "`models` must be a list, but got 'cnn_tiny'."),
        ({"folds": 1}, "`folds` must be a whole number from 2 to 100, but got 1."),
        ({"folds": True}, "`folds` must be a whole number from 2 to 100, but got True."),
        ({"epochs": math.nan}, f"`epochs` must be a whole number from 1 to {2**53 - 1}, but got nan."),
        (
            {"overrides": {"experiment.sed": 1}},
            "`overrides` cannot change 'experiment.sed'; the nearest is `experiment.seed`.",
        ),
        ({"overrides": {"experiment.seed": -1}}, "`experiment.seed` must be at least 0, but got -1."),
        (
            {"overrides": {"training.cnn_tiny.weight_decay": math.nan}},
            "`training.cnn_tiny.weight_decay` must be a finite number, but got nan.",
        ),
        ({"batches": []}, "`experiment.batches` must be a list of at least 1, but got []."),
    ],
)
def test_sentences(conf: dict, sentence: str, project: Path) -> None:
    assert refused(project, conf) == f"Trigger form: {sentence}"


def test_a_listed_batch_that_is_nowhere(project: Path) -> None:
    (project / "data" / "raw" / "sample").rmdir()
    sentence = (
        f"{project}/params.yaml lists the batch 'sample', but {project}/data/raw holds neither a folder sample nor "
        "sample.dvc; bring it with `pleat data add SOURCE --name sample`, or take it off the list."
    )
    with pytest.raises(PleatError) as caught:
        trigger_form.fields(project)
    assert str(caught.value) == sentence
    assert refused(project, {"batches": ["clothing"]}) == sentence


def test_a_recipe_that_is_wrong_is_named(project: Path) -> None:
    path = project / "recipes" / "sample.yaml"
    path.write_text(path.read_text().replace("seed: 17", "seed: lucky"))
    with pytest.raises(PleatError) as caught:
        trigger_form.fields(project)
    assert str(caught.value) == f"{path}: `experiment.seed` must be a whole number, but got 'lucky'."
