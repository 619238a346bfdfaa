"""`pleat use`: recipes put in place as params.yaml."""

import difflib
import shutil
from pathlib import Path

import pytest
import yaml as pyyaml
from conftest import PROMOTION_AND_INBOX
from ruamel.yaml import YAML

from pipeline_steps import params, recipes
from pipeline_steps.errors import PleatError

RECIPES = Path(__file__).parent.parent / "recipes"
SHARED = (
    """\
experiment: {recipe: shared, seed: 1, batches: [sample], models: [a, b, c], folds: 3}   # a number of folds
targets:
  label: {kind: multiclass}
ingest: {format: auto, min_side_px: 16, max_pixels: 50_000_000}
labels: {drop: [], merge: {}, top_classes: null}
split:
  given: false
  group_by: null
  near_copy_max_distance: 4
  holdout: {fraction: 0.0, salt: 'it''s'}
models:
  a: &model
    kind: custom_cnn
    input_size: 64   # pixels
    blocks: &blocks
      - {filters: 8, kernel: 3, pool: 2}
  b: *model
  c: {kind: custom_cnn, input_size: 32, blocks: *blocks}
training:
  a: &training
    head: {hidden: 0, dropout: 0.2}
    max_epochs: 30   # at most
    patience: 8
    inner_fraction: 0.15
    batch_size: 32
    learning_rate: 0.003
    weight_decay: 0.01
    loss: {kind: cross_entropy}
    label_smoothing: 0.0
    class_weights: none
    weight_average: 0.0
    mirror: true
  b: *training
  c: {<<: *training, max_epochs: 60}
"""
    + PROMOTION_AND_INBOX
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(RECIPES, tmp_path / "recipes")
    (tmp_path / "recipes" / "shared.yaml").write_text(SHARED)
    return tmp_path


def read(root: Path) -> dict:
    return YAML(typ="safe").load(root / "params.yaml")


def changed_lines(recipe: str, root: Path) -> list[str]:
    before = (root / "recipes" / f"{recipe}.yaml").read_text().splitlines()
    after = (root / "params.yaml").read_text().splitlines()
    return [line[2:].strip() for line in difflib.ndiff(before, after) if line.startswith("+ ")]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_named_after_its_file_and_put_in_place_unchanged(path: Path, root: Path) -> None:
    assert params.load(path).experiment.recipe == path.stem
    recipes.use(path.stem, [], root)
    assert (root / "params.yaml").read_bytes() == path.read_bytes()
    # Changing one value must not touch any other line, comments included.
    recipes.use(path.stem, ["experiment.seed=99"], root)
    assert changed_lines(path.stem, root) == ["seed: 99"]


def test_the_default_in_git_is_the_sample_recipe() -> None:
    assert (RECIPES.parent / "params.yaml").read_bytes() == (RECIPES / "sample.yaml").read_bytes()


def test_overrides_of_every_kind_keep_comments(root: Path) -> None:
    overrides = [
        "experiment.batches=[clothing, autumn 2.1]".replace(" 2.1", "_2.1"),
        "experiment.folds=3",
        "split.group_by=sender_id",
        "labels.merge={Blouse: Shirt}",
        "training.custom_cnn.learning_rate=0.00001",
        "models.custom_cnn.blocks.1.filters=48",
    ]
    recipes.use("clothing", overrides, root)
    loaded = params.load(root / "params.yaml")
    assert loaded.experiment.batches == ["clothing", "autumn_2.1"]
    assert read(root)["experiment"]["folds"] == [0, 1, 2]
    assert loaded.split.group_by == "sender_id"
    assert loaded.labels.merge == {"Blouse": "Shirt"}
    assert loaded.training["custom_cnn"].learning_rate == 1e-5
    assert len(changed_lines("clothing", root)) == len(overrides)
    text = (root / "params.yaml").read_text()
    assert text.count("#") == (RECIPES / "clothing.yaml").read_text().count("#")
    assert "folds: [0, 1, 2]  " in text
    assert pyyaml.safe_load(text) == read(root), "a reader of YAML 1.1 takes 1e-05 for text"


def test_keys_that_a_recipe_leaves_out_can_be_set(root: Path) -> None:
    overrides = [
        "training.cnn_small.augment.min_crop=0.5",
        "training.cnn_small.augment.mixup=0.00001",
        "training.cnn_tiny.decay={kind: step, every_epochs: 2, rate: 0.8}",
        "models.cnn_tiny.batch_norm=false",
    ]
    recipes.use("sample", overrides, root)
    loaded, text = params.load(root / "params.yaml"), (root / "params.yaml").read_text()
    assert (loaded.training["cnn_small"].augment.min_crop, loaded.training["cnn_small"].augment.mixup) == (0.5, 1e-5)
    assert loaded.training["cnn_tiny"].decay.kind == "step"
    assert not loaded.models["cnn_tiny"].batch_norm
    before = (RECIPES / "sample.yaml").read_text()
    added = [line[2:] for line in difflib.ndiff(before.splitlines(), text.splitlines()) if line[:1] in "+-"]
    assert added == [
        "    batch_norm: false",
        "    augment: {mixup: 1.0e-05, min_crop: 0.5}",
        "    decay: {kind: step, every_epochs: 2, rate: 0.8}",
    ], "one line for each block, and no other line has changed"
    assert pyyaml.safe_load(text) == read(root)


def test_a_value_shared_by_alias_or_merge_changes_only_where_asked(root: Path) -> None:
    recipes.use(
        "shared",
        ["models.b.input_size=128", "training.a.max_epochs=5", "training.c.patience=2", "models.a.blocks.0.filters=99"],
        root,
    )
    now, before = read(root), YAML(typ="safe").load(SHARED)
    assert [now["models"][name]["input_size"] for name in "abc"] == [64, 128, 32]
    assert [now["models"][name]["blocks"][0]["filters"] for name in "abc"] == [99, 8, 8]
    assert [now["training"][name]["max_epochs"] for name in "abc"] == [5, 30, 60]
    assert [now["training"][name]["patience"] for name in "abc"] == [8, 8, 2]
    now["experiment"]["folds"] = 3
    now["models"]["b"]["input_size"], now["models"]["a"]["blocks"][0]["filters"] = 64, 8
    now["training"]["a"]["max_epochs"], now["training"]["c"]["patience"] = 30, 8
    assert now == before
    assert "input_size: 64   # pixels" in (root / "params.yaml").read_text()


def test_a_number_of_folds_becomes_the_list_that_the_matrix_needs(root: Path) -> None:
    recipes.use("shared", [], root)
    assert read(root)["experiment"]["folds"] == [0, 1, 2]
    assert "salt: 'it''s'" in (root / "params.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "sentences"),
    [
        ("experiment.seed", ["Expected --set KEY=VALUE, but got 'experiment.seed'"]),
        ("training.mobilenetv2_100.optimiser=sgd", ["the nearest are training.mobilenetv2_100.optimizer"]),
        ("training.mobilenetv2_100.augment.crop=0.5", ["has no key `training.mobilenetv2_100.augment.crop`"]),
        ("training.mobilenetv2_100.augment.min_crop=0.5", ["augment` changes pixels, but", "is frozen"]),
        ("experiment.sed=1", ["has no key `experiment.sed`", "the nearest are experiment.seed"]),
        ("min_side_px=1", ["has no key `min_side_px`", "ingest.min_side_px"]),
        ("zzz=1", ["has no key `zzz`; its blocks are experiment, targets, ingest, labels"]),
        ("models.new={kind: frozen}", ["has no key `models.new`"]),
        ("models.custom_cnn.blocks.7.filters=1", ["has no key `models.custom_cnn.blocks.7.filters`"]),
        ("experiment.batches=[a", ["--set experiment.batches: '[a' is not valid YAML"]),
        ("experiment.seed=lucky", ["`experiment.seed` must be", "got 'lucky'", "clothing.yaml with --set"]),
        ("experiment.folds=1", ["`experiment.folds`", "at least two folds"]),
        ("experiment.folds=1000000000000", ["at most 1000"]),
        ("experiment=3", ["`experiment` must be"]),
        ("experiment.models=[resnet]", ["'resnet'", "mobilenetv2_100"]),
        ("split.holdout.fraction=1.5", ["`split.holdout.fraction`"]),
        ("models.mobilenetv2_100.weights=no/such.safetensors", ["there is no file 'no/such.safetensors'", "or null"]),
        ("models.mobilenetv2_100.weights=.", ["there is no file '.'"]),
    ],
)
def test_a_wrong_override_is_a_sentence_and_leaves_params_alone(
    root: Path, override: str, sentences: list[str]
) -> None:
    (root / "params.yaml").write_text("mine: 1\n")
    with pytest.raises(PleatError) as caught:
        recipes.use("clothing", ["experiment.seed=3", override], root)
    for sentence in sentences:
        assert sentence in str(caught.value)
    assert (root / "params.yaml").read_text() == "mine: 1\n"
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("name", ["cats", "../clothing", "clothing.yaml", "", "/etc/passwd"])
def test_an_unknown_recipe_lists_those_there_are(root: Path, name: str) -> None:
    known = ", ".join(sorted([*(path.stem for path in RECIPES.glob("*.yaml")), "shared"]))
    with pytest.raises(PleatError, match=f"no recipe '{name}'; there are {known}"):
        recipes.use(name, [], root)


def test_no_recipes_folder(tmp_path: Path) -> None:
    with pytest.raises(PleatError, match="recipes holds none"):
        recipes.use("sample", [], tmp_path)


def test_weights_are_stored_relative_where_the_project_has_them_and_absolute_elsewhere(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "models.mobilenetv2_100.weights"
    (root / "weights").mkdir()
    (root / "weights" / "my net: #1.safetensors").touch()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "net.safetensors").touch()
    monkeypatch.chdir(elsewhere)
    for given, stored in [
        ("weights/my net: #1.safetensors", "weights/my net: #1.safetensors"),
        ("net.safetensors", str(elsewhere / "net.safetensors")),
        (str(elsewhere / "net.safetensors"), str(elsewhere / "net.safetensors")),
        ("null", None),
        ("", None),
    ]:
        recipes.use("clothing", [f"{key}={given}"], root)
        assert read(root)["models"]["mobilenetv2_100"]["weights"] == stored, given


def test_it_says_what_is_in_place_and_what_is_missing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "data" / "raw" / "here").mkdir(parents=True)
    (root / "data" / "raw" / "pulled.dvc").touch()
    recipes.use("clothing", ["experiment.batches=[here, pulled, absent]", "experiment.folds=2"], root)
    said = capsys.readouterr().out
    assert "the recipe 'clothing': experiment.batches=[here, pulled, absent], experiment.folds=2" in said
    assert "batches: here, pulled, absent" in said
    assert "models:  mobilenetv2_100" in said
    assert "folds:   2" in said
    assert "data/raw/absent does not exist yet; bring it with `pleat data add SOURCE --name absent`" in said
    assert "data/raw/pulled does not exist yet; `dvc pull` fetches it" in said
    assert "data/raw/here does" not in said


def test_params_cannot_be_written(root: Path) -> None:
    (root / "params.yaml").mkdir()
    with pytest.raises(PleatError, match=r"Could not write .*params\.yaml"):
        recipes.use("sample", [], root)
