"""Airflow's trigger form: what it offers and what it refuses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jsonschema import Draft202012Validator
from trigger_projects import override_keys, refusal, refused, schema, settings_of

from pipeline_steps import trigger_form

pytest_plugins = ["trigger_projects"]

TRAINING_KEYS = [
    "head.hidden",
    "head.dropout",
    "max_epochs",
    "patience",
    "inner_fraction",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "label_smoothing",
    "class_weights",
    "weight_average",
    "mirror",
    "precision",
    "compile",
]
AUGMENT_KEYS = ["augment.min_crop", "augment.mixup", "augment.cutmix"]
SHARED_KEYS = [
    "experiment.seed",
    "ingest.format",
    "ingest.min_side_px",
    "ingest.max_pixels",
    "split.group_by",
    "split.near_copy_max_distance",
    "split.holdout.fraction",
    "profile.latency",
    "profile.images",
    "promotion.mode",
    "promotion.floors.f1_weighted",
    "promotion.floors.f1_macro",
    "promotion.min_gain",
    "promotion.confidence",
    "promotion.max_class_drop",
    "promotion.max_cost.latency",
    "promotion.max_cost.memory",
    "promotion.max_cost.size",
]


CNNS = ["cnn_small", "cnn_tiny", "custom_cnn", "custom_cnn_plain", "custom_cnn_224"]
FINETUNED = ["mobilenetv2_finetuned", "efficientnet_b0", "mobilenetv3_large_100", "regnety_004"]
# Frozen in every recipe, frozen in one and fine-tuned in another, trained from random weights.
FROZEN, EITHER, SCRATCH = (
    ["vgg16", "inception_v3", "convnext_large", "convnext_tiny", "convnext_base"],
    ["mobilenetv2_100", "resnet50"],
    ["resnet50_scratch"],
)
RECIPES = ["apparel", "attributes", "clothing", "clothing_light", "clothing_top10", "dogs", "sample"]


def test_the_fields_of_this_checkout(project: Path) -> None:
    form = trigger_form.fields(project)
    models = [
        "cnn_small", "cnn_tiny", "mobilenetv2_100", "resnet50", "vgg16", "inception_v3", "custom_cnn",
        "mobilenetv2_finetuned", "custom_cnn_plain", "convnext_large", "convnext_tiny", "resnet50_scratch",
        "custom_cnn_224", "efficientnet_b0", "mobilenetv3_large_100", "regnety_004", "convnext_base",
    ]  # fmt: skip
    assert sorted(models) == sorted([*CNNS, *FINETUNED, *FROZEN, *EITHER, *SCRATCH])
    assert {name: field["default"] for name, field in form.items()} == {
        "recipe": "params.yaml",
        "models": [],
        "folds": None,
        "epochs": None,
        "batches": ["sample"],
        "promote": "as in the recipe",
        "overrides": {},
    }
    assert form["recipe"]["enum"] == ["params.yaml", *RECIPES]
    assert form["models"]["examples"] == form["models"]["items"]["enum"] == models
    assert form["batches"]["examples"] == form["batches"]["items"]["enum"] == ["clothing", "sample"]
    assert set(override_keys(form)) == {
        *SHARED_KEYS,
        *(f"training.{model}.{key}" for model in models for key in TRAINING_KEYS),
        *(f"training.{model}.{key}" for model in (*CNNS, *FINETUNED, *SCRATCH) for key in AUGMENT_KEYS),
        *(f"models.{model}.{key}" for model in CNNS for key in ("input_size", "batch_norm")),
        *(f"models.{model}.head_on" for model in (*FROZEN, *EITHER, *FINETUNED)),
        *(f"models.{model}.{key}" for model in FINETUNED for key in ("head_epochs", "layer_decay")),
    } - {"training.convnext_large.label_smoothing"}  # which has the study's focal loss
    for field in form.values():
        Draft202012Validator.check_schema(schema(field))
        assert field["title"]
        assert not refusal({"it": field}, {"it": field["default"]})
        json.dumps(field, allow_nan=False)


@pytest.mark.parametrize(
    ("key", "fits", "does_not"),
    [
        ("experiment.seed", [0, 2**32 - 1, 3.0], [-1, 2**32, 0.5, True, "3", None]),
        ("ingest.format", ["auto", "class_folders"], ["zip", None, 1]),
        ("ingest.max_pixels", [1, 2**53 - 1], [0, 2**53, 10**400, 1e308, math.nan, math.inf]),
        ("split.group_by", [None, "sender_id"], ["sender", "null", False]),
        ("split.near_copy_max_distance", [0, 16], [-1, 17, 1e-9]),
        ("split.holdout.fraction", [0, 0.0, 0.999], [1, -1e-9, math.nan, math.inf, -math.inf, "0.1"]),
        ("promotion.mode", ["auto", "approve", "dry_run"], ["as in the recipe", None, ""]),
        ("promotion.max_cost.latency", [1e-9, 1e9], [0, -1, math.inf]),
        ("models.cnn_small.input_size", [32, 64.0], [31, 8]),
        ("models.cnn_tiny.input_size", [16], [15]),
        ("training.cnn_tiny.learning_rate", [5e-324, 1e308, 10**308], [0, -0.0, math.nan, math.inf, 10**400, True]),
        ("training.cnn_tiny.inner_fraction", [0.5, 1e-300], [0, 0.51, math.nan]),
        ("training.cnn_tiny.class_weights", ["none", "balanced", "inverse"], [None, "None", ["none"]]),
        ("training.cnn_tiny.mirror", [True, False], [1, 0, "true", None]),
    ],
)
def test_each_override_takes_what_params_yaml_takes(key: str, fits: list, does_not: list, project: Path) -> None:
    form = trigger_form.fields(project)
    for value in fits:
        assert not refusal(form, {"overrides": {key: value}})
        *above, last = key.split(".")
        block = settings_of(project, {"overrides": {key: value}})
        for part in above:
            block = block[part]
        assert block[last] == value
        assert type(block[last]) is type(value) or value in (3.0, 64.0)
    for value in does_not:
        assert f"['{key}']" in refusal(form, {"overrides": {key: value}})


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("recipe", "sampel", f"'sampel' is not one of {['params.yaml', *RECIPES]}"),
        ("recipe", None, "None is not of type 'string'"),
        ("models", ["cnn_small", "cnn_smal"], "'cnn_smal' is not one of"),
        ("models", ["cnn_small", "cnn_small"], "has non-unique elements"),
        ("models", "cnn_small", "'cnn_small' is not of type 'array', 'null'"),
        ("folds", 1, "1 is less than the minimum of 2"),
        ("folds", 101, "101 is greater than the maximum of 100"),
        ("folds", 2.5, "2.5 is not of type 'integer', 'null'"),
        ("folds", math.nan, "nan is not of type 'integer', 'null'"),
        ("folds", "3", "'3' is not of type 'integer', 'null'"),
        ("epochs", 0, "0 is less than the minimum of 1"),
        ("epochs", True, "True is not of type 'integer', 'null'"),
        ("epochs", 2**53, f"{2**53} is greater than the maximum"),
        ("batches", [], "[] should be non-empty"),
        ("batches", None, "None is not of type 'array'"),
        ("batches", ["sample", "sample"], "has non-unique elements"),
        ("batches", ["../raw/sample"], "'../raw/sample' is not one of ['clothing', 'sample']"),
        ("promote", "champion", "'champion' is not one of ['as in the recipe', 'auto', 'approve', 'dry_run']"),
        ("overrides", {"experiment.sed": 1}, "On instance['experiment.sed']"),
        ("overrides", {"experiment.models": ["cnn_tiny"]}, "On instance['experiment.models']"),
        ("overrides", {"experiment.recipe": "mine"}, "On instance['experiment.recipe']"),
        ("overrides", {"labels.drop": []}, "On instance['labels.drop']"),
        ("overrides", {"labels.top_classes": 5}, "On instance['labels.top_classes']"),
        ("overrides", {"targets.label.kind": "multilabel"}, "On instance['targets.label.kind']"),
        ("overrides", {"split.given": True}, "On instance['split.given']"),
        ("overrides", {"split.holdout.salt": "x"}, "On instance['split.holdout.salt']"),
        ("overrides", {"models.mobilenetv2_100.weights": "/tmp/x"}, "On instance['models.mobilenetv2_100.weights']"),
        ("overrides", {"models.cnn_tiny.blocks.0.pool": 64}, "On instance['models.cnn_tiny.blocks.0.pool']"),
        ("overrides", {"models.cnn_tiny.kind": "frozen"}, "On instance['models.cnn_tiny.kind']"),
        ("overrides", {"training.cnn_tiny.head": {}}, "On instance['training.cnn_tiny.head']"),
        ("overrides", [], "[] is not of type 'object', 'null'"),
    ],
)
def test_bad_values_are_refused_and_named(field: str, value: Any, named: str, project: Path) -> None:
    message = refusal(trigger_form.fields(project), {field: value})
    assert named in message
    # Whoever calls `document` without the schemas gets a sentence as well; most of these it cannot use either.
    assert refused(project, {field: value})


def test_what_two_recipes_mean_by_one_name_is_changed_only_as_far_as_both_allow(tangled: Path) -> None:
    form = trigger_form.fields(tangled)
    assert form["models"]["examples"] == ["on", "net.v2", "half"]
    assert form["batches"]["examples"] == ["new", "there"]
    keys = override_keys(form)
    assert {key: value["minimum"] for key, value in keys.items() if "input_size" in key} == {
        "models.on.input_size": 9,  # pools of 3 · 3 in the other file, 2 here
        "models.half.input_size": 16,  # 4 · 4 here, though nothing trains it here
    }
    of_net = [key for key in keys if key.startswith(("models.net.v2.", "training.net.v2.augment"))]
    assert not of_net, "frozen in one file, a CNN in the other"


def test_folders_that_cannot_be_batches_are_not_offered(project: Path) -> None:
    raw = project / "data" / "raw"
    for name in (".adding-new", "with space", "-x", "x" * 81):
        (raw / name).mkdir()
    (raw / "README.md").touch()
    assert trigger_form.fields(project)["batches"]["examples"] == ["clothing", "sample"]


# Airflow


def test_the_import_is_light() -> None:
    heavy = {"pandas", "numpy", "torch", "mlflow", "dvc", "airflow", "jsonschema", "great_expectations"}
    code = (
        "import sys; from pathlib import Path; from pipeline_steps import trigger_form; "
        f"trigger_form.fields(Path({str(REPOSITORY)!r})); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pydantic" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


# In a process of its own, so that Airflow's settings and log handlers stay out of the other tests. The first answer is
# that of the server when a run is triggered (`create_dagrun`), the second that of the task (`process_params`).
AIRFLOW = """
import copy, json, sys
from pathlib import Path
from airflow.sdk import DAG, Param
from airflow.serialization.serialized_objects import DagSerialization
from pipeline_steps import trigger_form

order = json.load(sys.stdin)
fields = trigger_form.fields(Path(order["project"]))
with DAG("form", schedule=None, params={name: Param(**field) for name, field in fields.items()}) as dag:
    pass
served = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag))))

def server(conf):
    return dict(served.params.deep_merge(conf).validate())

def task(conf):
    params = copy.deepcopy(dag.params)
    params.update(conf)
    return params.validate()

def answer(check, conf):
    try:
        return {"params": check(conf)}
    except Exception as error:
        return {"refused": str(error), "error": type(error).__name__}

print("ANSWERS", json.dumps([[answer(server, conf), answer(task, conf)] for conf in order["confs"]]))
"""

ACCEPTED = [
    {},
    {"recipe": "clothing", "models": ["cnn_tiny", "mobilenetv2_100"], "folds": 2, "epochs": 1},
    {"models": None, "overrides": None, "folds": None},
    {"folds": 3.0, "batches": ["clothing"], "overrides": {"experiment.seed": 5.0, "split.group_by": None}},
    {"overrides": {"training.cnn_small.learning_rate": 1e-12, "models.cnn_small.input_size": 32}},
]
REFUSED = [
    ({"recipe": "sampel"}, "recipe", "'sampel' is not one of"),
    ({"models": ["cnn_tiny", "cnn_tiny"]}, "models", "non-unique"),
    ({"folds": 101}, "folds", "101 is greater than the maximum of 100"),
    ({"epochs": 2.5}, "epochs", "2.5 is not of type 'integer', 'null'"),
    ({"batches": []}, "batches", "non-empty"),
    ({"overrides": {"experiment.folds": [0, 1]}}, "overrides", "On instance['experiment.folds']"),
    ({"overrides": {"split.holdout.fraction": math.nan}}, "overrides", "['split.holdout.fraction']"),
    ({"overrides": {"training.cnn_tiny.weight_decay": math.inf}}, "overrides", "['training.cnn_tiny.weight_decay']"),
]


def test_airflow_accepts_and_refuses_the_same(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    order = {"project": str(project), "confs": [*ACCEPTED, *(conf for conf, _, _ in REFUSED)]}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    done = subprocess.run(
        [sys.executable, "-c", AIRFLOW],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env=inherited | {"AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow"))},
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.rpartition("ANSWERS")[2])
    form = trigger_form.fields(project)
    defaults = {name: field["default"] for name, field in form.items()}
    for conf, of_both in zip(ACCEPTED, answers, strict=False):
        assert not refusal(form, conf)
        for answer in of_both:
            assert answer == {"params": defaults | conf}
            assert trigger_form.document(project, answer["params"]) == trigger_form.document(project, conf)
    for (conf, field, words), of_both in zip(REFUSED, answers[len(ACCEPTED) :], strict=True):
        assert refusal(form, conf)
        for answer in of_both:
            assert answer["error"] == "ParamValidationError"
            assert f"Invalid input for param {field}: " in answer["refused"]
            assert words in answer["refused"]
