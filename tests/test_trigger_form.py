"""Airflow's trigger form: what it offers, what it refuses, and the params.yaml that comes of it."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError
from ruamel.yaml import YAML

from pipeline_steps import params, recipes, trigger_form
from pipeline_steps.errors import PleatError

Form = dict[str, dict[str, Any]]

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
]
SHARED_KEYS = [
    "experiment.seed",
    "ingest.format",
    "ingest.min_side_px",
    "ingest.max_pixels",
    "split.group_by",
    "split.near_copy_max_distance",
    "split.holdout.fraction",
]

# Two files that disagree as far as valid files can: `net.v2` is another kind of model in each, `on` pools otherwise,
# `half` has no training in one of them. Folds are a number, blocks are shared by aliases, words look like other types.
OWN = """\
split: &split
  holdout: {salt: "1e3", fraction: 0.0}
  near_copy_max_distance: 4
  group_by: null
experiment: {recipe: mine, seed: 1, batches: [there], models: ["on", net.v2], folds: 3}
ingest: {format: auto, min_side_px: 16, max_pixels: 50_000_000}
labels: {drop: ["Off", "12:30"], merge: {"0x1F": "no", "a\\tb": "é"}}
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
    label_smoothing: 0.0
    class_weights: none
    weight_average: 0.0
    mirror: true
  net.v2: *training
"""
OTHER = """\
experiment: {recipe: other, seed: 2, batches: [elsewhere], models: [half], folds: [0, 1]}
ingest: {format: class_folders, min_side_px: 1, max_pixels: 1000}
labels: {drop: [], merge: {}}
split: {group_by: sender_id, near_copy_max_distance: 0, holdout: {fraction: 0.5, salt: other}}
models:
  half: {kind: custom_cnn, input_size: 8, blocks: [{filters: 8, kernel: 3, pool: 1}]}
  net.v2: {kind: frozen, backbone: resnet18, weights: null}
  "on": {kind: custom_cnn, input_size: 9, blocks: [{filters: 8, kernel: 3, pool: 3}, {filters: 8, kernel: 3, pool: 3}]}
training:
  half: &training {head: {hidden: 0, dropout: 0.2}, max_epochs: 1, patience: 1, inner_fraction: 0.5, batch_size: 1,
    learning_rate: 1, weight_decay: 0, label_smoothing: 0, class_weights: balanced, weight_average: 0, mirror: false}
  net.v2: {<<: *training, max_epochs: 60}
"""


def checkout(root: Path) -> Path:
    """This checkout's settings and recipes, with a second batch of which only the .dvc file is there."""
    shutil.copytree(REPOSITORY / "recipes", root / "recipes")
    shutil.copy(REPOSITORY / "recipes" / "sample.yaml", root / "params.yaml")
    (root / "data" / "raw" / "sample").mkdir(parents=True)
    (root / "data" / "raw" / "clothing.dvc").touch()
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return checkout(tmp_path)


@pytest.fixture(scope="module")
def tangled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tangled")
    for name, text in (("params.yaml", OWN), ("recipes/other.yaml", OTHER), ("data/raw/new.dvc", "")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "data/raw/there").mkdir()
    return folder


@pytest.fixture(scope="module", params=["checkout", "tangled"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "checkout":
        return checkout(tmp_path_factory.mktemp("checkout"))
    return request.getfixturevalue("tangled")


@pytest.fixture(scope="module")
def form(either: Path) -> Form:
    return trigger_form.fields(either)


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


# What the form offers


def test_the_fields_of_this_checkout(root: Path) -> None:
    form = trigger_form.fields(root)
    models = ["cnn_small", "cnn_tiny", "mobilenetv2_100", "convnext_tiny", "custom_cnn"]
    assert {name: field["default"] for name, field in form.items()} == {
        "recipe": "params.yaml",
        "models": [],
        "folds": None,
        "epochs": None,
        "batches": ["sample"],
        "promote": "dry_run",
        "overrides": {},
    }
    assert form["recipe"]["enum"] == ["params.yaml", "clothing", "sample"]
    assert form["models"]["examples"] == form["models"]["items"]["enum"] == models
    assert form["batches"]["examples"] == form["batches"]["items"]["enum"] == ["clothing", "sample"]
    assert set(form["overrides"]["properties"]) == {
        *SHARED_KEYS,
        *(f"training.{model}.{key}" for model in models for key in TRAINING_KEYS),
        *(f"models.{model}.input_size" for model in ("cnn_small", "cnn_tiny", "custom_cnn")),
    }
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
        ("models.cnn_small.input_size", [32, 64.0], [31, 8]),
        ("models.cnn_tiny.input_size", [16], [15]),
        ("training.cnn_tiny.learning_rate", [5e-324, 1e308, 10**308], [0, -0.0, math.nan, math.inf, 10**400, True]),
        ("training.cnn_tiny.inner_fraction", [0.5, 1e-300], [0, 0.51, math.nan]),
        ("training.cnn_tiny.class_weights", ["none", "balanced"], [None, "None", ["none"]]),
        ("training.cnn_tiny.mirror", [True, False], [1, 0, "true", None]),
    ],
)
def test_each_override_takes_what_params_yaml_takes(key: str, fits: list, does_not: list, root: Path) -> None:
    form = trigger_form.fields(root)
    for value in fits:
        assert not refusal(form, {"overrides": {key: value}})
        *above, last = key.split(".")
        block = settings_of(root, {"overrides": {key: value}})
        for part in above:
            block = block[part]
        assert block[last] == value
        assert type(block[last]) is type(value) or value in (3.0, 64.0)
    for value in does_not:
        assert f"['{key}']" in refusal(form, {"overrides": {key: value}})


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("recipe", "sampel", "'sampel' is not one of ['params.yaml', 'clothing', 'sample']"),
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
        ("promote", "champion", "'champion' is not one of ['dry_run']"),
        ("overrides", {"experiment.sed": 1}, "On instance['experiment.sed']"),
        ("overrides", {"experiment.models": ["cnn_tiny"]}, "On instance['experiment.models']"),
        ("overrides", {"experiment.recipe": "mine"}, "On instance['experiment.recipe']"),
        ("overrides", {"labels.drop": []}, "On instance['labels.drop']"),
        ("overrides", {"split.holdout.salt": "x"}, "On instance['split.holdout.salt']"),
        ("overrides", {"models.mobilenetv2_100.weights": "/tmp/x"}, "On instance['models.mobilenetv2_100.weights']"),
        ("overrides", {"models.cnn_tiny.blocks.0.pool": 64}, "On instance['models.cnn_tiny.blocks.0.pool']"),
        ("overrides", {"models.cnn_tiny.kind": "frozen"}, "On instance['models.cnn_tiny.kind']"),
        ("overrides", {"training.cnn_tiny.head": {}}, "On instance['training.cnn_tiny.head']"),
        ("overrides", [], "[] is not of type 'object', 'null'"),
    ],
)
def test_bad_values_are_refused_and_named(field: str, value: Any, named: str, root: Path) -> None:
    message = refusal(trigger_form.fields(root), {field: value})
    assert named in message
    # Whoever calls `document` without the schemas gets a sentence as well; most of these it cannot use either.
    assert refused(root, {field: value})


def test_what_two_recipes_mean_by_one_name_is_changed_only_as_far_as_both_allow(tangled: Path) -> None:
    form = trigger_form.fields(tangled)
    assert form["models"]["examples"] == ["on", "net.v2", "half"]
    assert form["batches"]["examples"] == ["new", "there"]
    of_models = {key: value for key, value in form["overrides"]["properties"].items() if key.startswith("models.")}
    assert {key: value["minimum"] for key, value in of_models.items()} == {
        "models.on.input_size": 9,  # pools of 3 · 3 in the other file, 2 here
        "models.half.input_size": 16,  # 4 · 4 here, though nothing trains it here
    }


def test_folders_that_cannot_be_batches_are_not_offered(root: Path) -> None:
    raw = root / "data" / "raw"
    for name in (".adding-new", "with space", "-x", "x" * 81):
        (raw / name).mkdir()
    (raw / "README.md").touch()
    assert trigger_form.fields(root)["batches"]["examples"] == ["clothing", "sample"]


# What comes of it


def test_by_default_a_run_uses_params_yaml(root: Path) -> None:
    own = (REPOSITORY / "params.yaml").read_text()
    (root / "params.yaml").write_text(own)
    text = trigger_form.document(root, {})
    assert read(text) == read(own)
    assert json.dumps(read(text)) == json.dumps(read(own))  # the keys' order and 1 against 1.0 too
    assert text == trigger_form.document(
        root,
        {
            "recipe": "params.yaml",
            "models": None,
            "folds": None,
            "epochs": None,
            "batches": ["sample"],
            "promote": "dry_run",
            "overrides": None,
        },
    )


def test_a_recipe_keeps_its_name_and_takes_the_batches_of_the_checkout(root: Path) -> None:
    expected = read((root / "recipes" / "clothing.yaml").read_text())
    expected["experiment"]["batches"] = ["sample"]
    assert settings_of(root, {"recipe": "clothing"}) == expected
    assert expected["experiment"]["recipe"] == "clothing"


def test_a_document_by_hand(tangled: Path) -> None:
    conf = {
        "recipe": "other",
        "models": ["half", "on"],
        "folds": 3.0,
        "epochs": 7,
        "batches": ["new"],
        "overrides": {
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
labels:
  drop: []
  merge: {}
split:
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
    label_smoothing: 0.0
    class_weights: none
    weight_average: 0.0
    mirror: true
"""
    )


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
def test_the_form_does_what_pleat_use_does(recipe: str, conf: dict, assignments: list[str], root: Path) -> None:
    batches = [] if "batches" in conf else ["experiment.batches=[sample]"]
    by_form = settings_of(root, {"recipe": recipe, **conf})
    recipes.use(recipe, [*batches, *assignments], root)
    assert by_form == read((root / "params.yaml").read_text())


def check_document(root: Path, form: Form, conf: Mapping[str, Any]) -> None:
    """Checks a run's params.yaml against what its configuration says, as far as that can be read off directly."""
    text = trigger_form.document(root, conf)
    found = read(text)
    assert yaml_1_1(text) == found
    loaded = params.check(found, "params.yaml")
    recipe = conf.get("recipe", "params.yaml")
    source = params.load(root / (recipe if recipe == "params.yaml" else f"recipes/{recipe}.yaml")).experiment
    chosen = loaded.experiment
    assert chosen.recipe == source.recipe
    assert chosen.models == (conf.get("models") or source.models)
    assert chosen.batches == conf.get("batches", form["batches"]["default"])
    assert chosen.folds == (list(range(int(conf["folds"]))) if conf.get("folds") else source.folds)
    overrides = conf.get("overrides") or {}
    for model in chosen.models:
        if conf.get("epochs"):
            expected = overrides.get(f"training.{model}.max_epochs", conf["epochs"])
            assert loaded.training[model].max_epochs == expected
    for key, value in overrides.items():
        block, *below = key.split(".")
        name = next((name for name in form["models"]["examples"] if key.startswith(f"{block}.{name}.")), None)
        node = found[block]
        if name:
            if name not in node:
                assert name not in chosen.models
                continue
            node, below = node[name], key.removeprefix(f"{block}.{name}.").split(".")
        for part in below:
            node = node[part]
        assert node == value


def fitting(rule: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema of the form accepts."""
    if "enum" in rule:
        return st.sampled_from(rule["enum"])
    kinds = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    least, most = rule.get("minimum"), rule.get("maximum")
    if "integer" in kinds:
        if "exclusiveMaximum" in rule:
            most = rule["exclusiveMaximum"] - 1
        whole = st.integers(least, most)
        values = whole | whole.map(float)
    elif "number" in kinds:
        values = st.floats(
            rule.get("exclusiveMinimum", least),
            rule.get("exclusiveMaximum", most),
            exclude_min="exclusiveMinimum" in rule,
            exclude_max="exclusiveMaximum" in rule,
            allow_nan=False,
            allow_infinity=False,
        )
    elif "boolean" in kinds:
        values = st.booleans()
    elif "array" in kinds:
        values = st.lists(fitting(rule["items"]), min_size=rule.get("minItems", 0), unique=True)
    else:
        keys = st.lists(st.sampled_from(sorted(rule["properties"])), unique=True, max_size=8)
        values = keys.flatmap(lambda chosen: st.fixed_dictionaries({k: fitting(rule["properties"][k]) for k in chosen}))
    return values | st.none() if "null" in kinds else values


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([2**32, 10**400, 1e308, 3.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_whatever_the_schemas_accept_gives_a_valid_params_yaml(either: Path, form: Form, data: st.DataObject) -> None:
    conf = data.draw(st.fixed_dictionaries({}, optional={name: fitting(field) for name, field in form.items()}))
    assert not refusal(form, conf)
    check_document(either, form, conf)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_values_from_anywhere_are_used_or_refused_in_a_sentence(either: Path, form: Form, data: st.DataObject) -> None:
    known = form["overrides"]["properties"]
    wild = {
        name: ANYTHING | st.lists(st.sampled_from(field.get("examples", form["recipe"]["enum"])), max_size=3)
        for name, field in form.items()
    }
    wild["overrides"] = ANYTHING | st.dictionaries(st.sampled_from(sorted(known)) | st.text(), ANYTHING, max_size=3)
    conf = data.draw(st.fixed_dictionaries({}, optional=wild))
    if refusal(form, conf):
        with suppress(PleatError):
            trigger_form.document(either, conf)
    else:
        check_document(either, form, conf)


# What is wrong is said in one sentence


@pytest.mark.parametrize(
    ("conf", "sentence"),
    [
        (
            {"epoch": 3},
            "there is no field 'epoch'; the fields are recipe, models, folds, epochs, batches, promote, overrides.",
        ),
        ({"recipe": "x"}, "`recipe` names 'x'; there are params.yaml, clothing, sample."),
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
def test_sentences(conf: dict, sentence: str, root: Path) -> None:
    assert refused(root, conf) == f"Trigger form: {sentence}"


def test_a_listed_batch_that_is_nowhere(root: Path) -> None:
    (root / "data" / "raw" / "sample").rmdir()
    sentence = (
        f"{root}/params.yaml lists the batch 'sample', but {root}/data/raw holds neither a folder sample nor "
        "sample.dvc; bring it with `pleat data add SOURCE --name sample`, or take it off the list."
    )
    with pytest.raises(PleatError) as caught:
        trigger_form.fields(root)
    assert str(caught.value) == sentence
    assert refused(root, {"batches": ["clothing"]}) == sentence


def test_a_recipe_that_is_wrong_is_named(root: Path) -> None:
    path = root / "recipes" / "sample.yaml"
    path.write_text(path.read_text().replace("seed: 17", "seed: lucky"))
    with pytest.raises(PleatError) as caught:
        trigger_form.fields(root)
    assert str(caught.value) == f"{path}: `experiment.seed` must be a whole number, but got 'lucky'."


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
fields = trigger_form.fields(Path(order["root"]))
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


def test_airflow_accepts_and_refuses_the_same(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    order = {"root": str(root), "confs": [*ACCEPTED, *(conf for conf, _, _ in REFUSED)]}
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
    form = trigger_form.fields(root)
    defaults = {name: field["default"] for name, field in form.items()}
    for conf, of_both in zip(ACCEPTED, answers, strict=False):
        assert not refusal(form, conf)
        for answer in of_both:
            assert answer == {"params": defaults | conf}
            assert trigger_form.document(root, answer["params"]) == trigger_form.document(root, conf)
    for (conf, field, words), of_both in zip(REFUSED, answers[len(ACCEPTED) :], strict=True):
        assert refusal(form, conf)
        for answer in of_both:
            assert answer["error"] == "ParamValidationError"
            assert f"Invalid input for param {field}: " in answer["refused"]
            assert words in answer["refused"]
