"""Projects for the tests of the trigger form, and how a form and a run's params.yaml are read."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from conftest import PROMOTION_AND_INBOX, REPOSITORY
from jsonschema import Draft202012Validator, ValidationError
from ruamel.yaml import YAML

from pipeline_steps import trigger_form
from pipeline_steps.errors import PleatError

Form = dict[str, dict[str, Any]]


# Two files that disagree as far as valid files can: `net.v2` is another kind of model in each, `on` pools otherwise,
# `half` has no training in one of them. Folds are a number, blocks are shared by aliases, words look like other types.
OWN = (
    """\
split: &split
  holdout: {salt: "1e3", fraction: 0.0}
  near_copy_max_distance: 4
  given: false
  group_by: null
experiment: {recipe: mine, seed: 1, batches: [there], models: ["on", net.v2], folds: 3}
ingest: {format: auto, min_side_px: 16, max_pixels: 50_000_000}
targets:
  label: {kind: multiclass}
labels: {drop: ["Off", "12:30"], merge: {"0x1F": "no", "a\\tb": "é"}, top_classes: null}
models:
  "on": {kind: custom_cnn, input_size: 64, blocks: &blocks [{filters: 8, kernel: 3, pool: 2}]}
  net.v2: {kind: custom_cnn, input_size: 64, blocks: *blocks}
  half: {kind: custom_cnn, input_size: 64, blocks: [{filters: 8, kernel: 3, pool: 4}, {filters: 8, kernel: 3, pool: 4}]}
training:
  "on": &training
    head: {hidden: 0, dropout: 0.2}
    max_epochs: 30
    patience: 8
    inner_fraction: 0.15
    batch_size: 32
    learning_rate: 1e-5
    weight_decay: 0.01
    loss: {kind: cross_entropy}
    label_smoothing: 0.0
    class_weights: none
    weight_average: 0.0
    mirror: true
  net.v2: *training
"""
    + PROMOTION_AND_INBOX
)
OTHER = """\
experiment: {recipe: other, seed: 2, batches: [elsewhere], models: [half], folds: [0, 1]}
ingest: {format: class_folders, min_side_px: 1, max_pixels: 1000}
targets: {"on": {kind: multiclass}, tags: {kind: multilabel, of: ["on", colour]}}
labels: {drop: [], merge: {}, top_classes: 10}
split: {given: false, group_by: sender_id, near_copy_max_distance: 0, holdout: {fraction: 0.5, salt: other}}
models:
  half: {kind: custom_cnn, input_size: 8, blocks: [{filters: 8, kernel: 3, pool: 1}]}
  net.v2: {kind: frozen, backbone: resnet18, weights: null}
  many: {kind: frozen, backbone: resnet18, weights: null}
  "on": {kind: custom_cnn, input_size: 9, blocks: [{filters: 8, kernel: 3, pool: 3}, {filters: 8, kernel: 3, pool: 3}]}
training:
  half: &training {head: {hidden: 0, dropout: 0.2}, max_epochs: 1, patience: 1, inner_fraction: 0.5, batch_size: 1,
    learning_rate: 1, weight_decay: 0, loss: {kind: cross_entropy}, label_smoothing: 0, class_weights: balanced,
    weight_average: 0, mirror: false}
  net.v2: {<<: *training, max_epochs: 60, loss: {kind: focal, gamma: 2.0}}
  many: {<<: *training, loss: {kind: asymmetric, gamma_positive: 0.0, gamma_negative: 2.0, margin: 0.05}}
profile: {latency: false, images: 0}
compress: {techniques: {}, candidate: null}
promotion: {model: other, mode: approve, floors: {f1_weighted: 0, f1_macro: 1}, min_gain: 1, confidence: 0.5,
  max_class_drop: 0, max_cost: {latency: 1, memory: 1, size: 1}}
inbox: {source: "s3://bucket/on", every_minutes: 1, settle_s: 0,
  max_drift: {label_shares: 1, image_statistics: 0, new_labels: true}}
"""


def checkout(root: Path) -> Path:
    """This checkout's settings and recipes, with a second batch of which only the .dvc file is there."""
    shutil.copytree(REPOSITORY / "recipes", root / "recipes")
    shutil.copy(REPOSITORY / "recipes" / "sample.yaml", root / "params.yaml")
    (root / "data" / "raw" / "sample").mkdir(parents=True)
    (root / "data" / "raw" / "clothing.dvc").touch()
    return root


def write_tangled(root: Path) -> Path:
    """A project of those two files."""
    for name, text in (("params.yaml", OWN), ("recipes/other.yaml", OTHER), ("data/raw/new.dvc", "")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "data/raw/there").mkdir()
    return root


def schema(field: Mapping[str, Any]) -> dict[str, Any]:
    """What of a field Airflow hands to jsonschema."""
    return {key: value for key, value in field.items() if key not in ("default", "description")}


def refusal(form: Form, conf: Mapping[str, Any]) -> str:
    """The message with which the schemas refuse a configuration; empty where they accept it."""
    for name, value in conf.items():
        try:
            Draft202012Validator(schema(form[name])).validate(value)
        except ValidationError as error:
            return str(error)
    return ""


def read(text: str) -> dict[str, Any]:
    return YAML(typ="safe").load(text)


def yaml_1_1(text: str) -> Any:
    return pyyaml.load(text, pyyaml.CSafeLoader)


def settings_of(root: Path, conf: Mapping[str, Any]) -> dict[str, Any]:
    return read(trigger_form.document(root, conf))


def refused(root: Path, conf: Mapping[str, Any]) -> str:
    with pytest.raises(PleatError) as caught:
        trigger_form.document(root, conf)
    return str(caught.value)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return checkout(tmp_path)


@pytest.fixture(scope="module")
def tangled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tangled(tmp_path_factory.mktemp("tangled"))


@pytest.fixture(scope="module", params=["checkout", "tangled"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "checkout":
        return checkout(tmp_path_factory.mktemp("checkout"))
    return request.getfixturevalue("tangled")


@pytest.fixture(scope="module")
def form(either: Path) -> Form:
    return trigger_form.fields(either)


def override_keys(form: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every key that the form's field `overrides` names, with the schema of its values; patterns are spelled out."""
    rules = form["overrides"]
    keys = dict(rules["properties"])
    for pattern, schema in rules["patternProperties"].items():
        block, models, setting = re.fullmatch(r"\^(\w+)\\\.\((.+)\)\\\.(.+)\$", pattern).groups()
        for model in models.split("|"):
            key = re.sub(r"\\(.)", r"\1", f"{block}.{model}.{setting}")
            assert key not in keys
            assert [other for other in rules["patternProperties"] if re.search(other, key)] == [pattern]
            keys[key] = schema
    return keys
