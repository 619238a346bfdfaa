"""params.yaml: what is refused, and in which words."""

from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, document

from pipeline_steps import params
from pipeline_steps.errors import PleatError

JARGON = (
    "Input should",
    "instance of",
    "tag",
    "valid dictionary",
    "pattern",
    "Field required",
    "Error",
    "pydantic",
    "None",
)
NAMES = "letters, digits, '_' and '.', beginning with a letter or digit,"
BOTH = {"kind": "multilabel", "of": ["colour", "garment"]}
ASYMMETRIC = {"kind": "asymmetric", "gamma_positive": 0.0, "gamma_negative": 4.0, "margin": 0.05}
CNN = {"kind": "custom_cnn", "input_size": 32, "blocks": [{"filters": 8, "kernel": 3, "pool": 2}]}


def refused(settings: Any) -> str:
    with pytest.raises(PleatError) as caught:
        params.check(settings, "params.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    "path", [REPOSITORY / "params.yaml", *sorted((REPOSITORY / "recipes").glob("*.yaml"))], ids=str
)
def test_the_files_of_the_repository_load(path: Path) -> None:
    loaded = params.load(path)
    assert loaded.experiment.folds == list(range(len(loaded.experiment.folds)))
    assert set(loaded.experiment.models) <= set(loaded.models)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        # unknown keys, at every level
        ("extra", 1, "unknown key `extra`; remove it or correct its name."),
        ("experiment.sed", 1, "unknown key `experiment.sed`; remove it or correct its name."),
        ("split.holdout.fractoin", 0.1, "unknown key `split.holdout.fractoin`; remove it or correct its name."),
        ("models.cnn_small.filtres", 1, "unknown key `models.cnn_small.filtres`; remove it or correct its name."),
        (
            "models.cnn_small.blocks.1.filtres",
            1,
            "unknown key `models.cnn_small.blocks.1.filtres`; remove it or correct its name.",
        ),
        (
            "training.cnn_tiny.head.hiden",
            1,
            "unknown key `training.cnn_tiny.head.hiden`; remove it or correct its name.",
        ),
        ("targets.label.of", ["colour"], "unknown key `targets.label.of`; remove it or correct its name."),
        ("targets.both", BOTH | {"from": 1}, "unknown key `targets.both.from`; remove it or correct its name."),
        # wrong types
        ("targets", ["label"], "`targets` must be a block of keys, but got ['label']."),
        ("targets.label", "multiclass", "`targets.label` must be a block of keys, but got 'multiclass'."),
        ("targets.both", BOTH | {"of": "colour"}, "`targets.both.of` must be a list, but got 'colour'."),
        ("labels.top_classes", "ten", "`labels.top_classes` must be a whole number or null, but got 'ten'."),
        ("labels.top_classes", 10.0, "`labels.top_classes` must be a whole number or null, but got 10.0."),
        ("experiment", None, "`experiment` must be a block of keys, but got null."),
        ("models", [1], "`models` must be a block of keys, but got [1]."),
        ("models.cnn_small", 3, "`models.cnn_small` must be a block of keys, but got 3."),
        ("training.cnn_tiny", "x", "`training.cnn_tiny` must be a block of keys, but got 'x'."),
        ("experiment.seed", "lucky", "`experiment.seed` must be a whole number, but got 'lucky'."),
        ("experiment.seed", 1.0, "`experiment.seed` must be a whole number, but got 1.0."),
        ("experiment.seed", True, "`experiment.seed` must be a whole number, but got true."),
        ("experiment.batches", "clothing", "`experiment.batches` must be a list, but got 'clothing'."),
        ("labels.drop", None, "`labels.drop` must be a list, but got null."),
        ("labels.drop", [7], "`labels.drop.0` must be text (put it in quotes), but got 7."),
        ("labels.merge", {"Top": 1}, "`labels.merge.Top` must be text (put it in quotes), but got 1."),
        ("training.cnn_tiny.mirror", "yes", "`training.cnn_tiny.mirror` must be true or false, but got 'yes'."),
        (
            "training.cnn_tiny.learning_rate",
            "1e-3",
            "`training.cnn_tiny.learning_rate` must be a number, but got '1e-3'.",
        ),
        # wrong values
        ("experiment.seed", -1, "`experiment.seed` must be at least 0, but got -1."),
        ("experiment.seed", 2**32, "`experiment.seed` must be less than 4294967296, but got 4294967296."),
        ("split.holdout.fraction", 1, "`split.holdout.fraction` must be less than 1, but got 1."),
        ("split.holdout.fraction", float("nan"), "`split.holdout.fraction` must be a finite number, but got nan."),
        ("split.near_copy_max_distance", 17, "`split.near_copy_max_distance` must be at most 16, but got 17."),
        (
            "training.cnn_tiny.weight_decay",
            float("inf"),
            "`training.cnn_tiny.weight_decay` must be a finite number, but got inf.",
        ),
        ("training.cnn_tiny.learning_rate", 0, "`training.cnn_tiny.learning_rate` must be more than 0, but got 0."),
        (
            "training.cnn_tiny.inner_fraction",
            0.6,
            "`training.cnn_tiny.inner_fraction` must be at most 0.5, but got 0.6.",
        ),
        (
            "training.cnn_tiny.loss",
            {"kind": "focal", "gamma": -1},
            "`training.cnn_tiny.loss.gamma` must be at least 0, but got -1.",
        ),
        ("training.cnn_tiny.loss", {"kind": "focal"}, "`training.cnn_tiny.loss.gamma` is missing."),
        (
            "training.cnn_tiny.loss",
            {"kind": "cross_entropy", "gamma": 2.0},
            "unknown key `training.cnn_tiny.loss.gamma`; remove it or correct its name.",
        ),
        (
            "training.cnn_tiny.loss.kind",
            "hinge",
            "`training.cnn_tiny.loss.kind` must be 'cross_entropy', 'focal' or 'asymmetric', but got 'hinge'.",
        ),
        (
            "training.cnn_tiny.class_weights",
            "sqrt",
            "`training.cnn_tiny.class_weights` must be 'none', 'balanced' or 'inverse', but got 'sqrt'.",
        ),
        (
            "ingest.format",
            "coco",
            "`ingest.format` must be 'auto', 'clothing_csv', 'class_folders', 'attribute_lists' or 'colour_garment', "
            "but got 'coco'.",
        ),
        ("labels.top_classes", 1, "`labels.top_classes` must be at least 2 or null, but got 1."),
        (
            "targets.label.kind",
            "regression",
            "`targets.label.kind` must be 'multiclass' or 'multilabel', but got 'regression'.",
        ),
        ("targets.label", {}, "`targets.label.kind` must be 'multiclass' or 'multilabel', but is missing."),
        ("targets.label", {"kind": "multilabel"}, "`targets.label.of` is missing."),
        ("targets.multilabel", {"kind": "multilabel"}, "`targets.multilabel.of` is missing."),
        ("targets.both", BOTH | {"of": []}, "`targets.both.of` must be a list of at least 1, but got []."),
        ("split.group_by", "sender", "`split.group_by` must be 'sender_id' or null, but got 'sender'."),
        (
            "models.cnn_small.kind",
            "resnet",
            "`models.cnn_small.kind` must be 'frozen' or 'custom_cnn', but got 'resnet'.",
        ),
        ("models.cnn_small.kind", None, "`models.cnn_small.kind` must be 'frozen' or 'custom_cnn', but got null."),
        ("models.cnn_small.blocks", [], "`models.cnn_small.blocks` must be a list of at least 1, but got []."),
        (
            "models.cnn_small.input_size",
            8,
            "`models.cnn_small` shrinks an input of 8 pixels down to nothing; "
            "use input_size 32 or more, or fewer or smaller pools.",
        ),
        # names
        (
            "targets.side",
            {"kind": "multiclass"},
            "`targets` names 'side', which is a column that the pipeline fills itself; use another name.",
        ),
        (
            "targets.side_top_k",
            {"kind": "multiclass"},
            "`targets` names 'side_top_k', which is a column that the pipeline fills itself; use another name.",
        ),
        (
            "targets.both",
            BOTH | {"of": ["colour", "given"]},
            "`targets` names 'given', which is a column that the pipeline fills itself; use another name.",
        ),
        ("targets.my label", BOTH, f"every name in `targets` must be {NAMES} but one is 'my label'."),
        ("targets.both", BOTH | {"of": ["a/b"]}, f"`targets.both.of.0` must be {NAMES} but got 'a/b'."),
        (
            "experiment.batches",
            ["spring-2"],
            f"`experiment.batches.0` must be {NAMES} but got 'spring-2'.",
        ),
        (
            "experiment.batches",
            ["a" * 81],
            f"`experiment.batches.0` must be at most 80 characters long, but got '{'a' * 79}....",
        ),
        (
            "models.my net",
            CNN,
            f"every name in `models` must be {NAMES} but one is 'my net'.",
        ),
        ("labels.merge", {1: "Shirt"}, "every name in `labels.merge` must be text (put it in quotes), but one is 1."),
        # lists
        ("experiment.models", [], "`experiment.models` must be a list of at least 1, but got []."),
        (
            "experiment.batches",
            ["a", "b", "a"],
            "`experiment.batches` names 'a' more than once; every entry may appear only once.",
        ),
        (
            "experiment.models",
            ["cnn_tiny", "cnn_tiny"],
            "`experiment.models` names 'cnn_tiny' more than once; every entry may appear only once.",
        ),
        ("experiment.folds.1", "1", "`experiment.folds.1` must be a whole number, but got '1'."),
        # what contradicts itself
        (
            "experiment.models",
            ["resnet"],
            "`experiment.models` names 'resnet', but `models` defines cnn_small, cnn_tiny.",
        ),
        ("training", {}, "`experiment.models` names 'cnn_small', but `training` defines none."),
        (
            "labels.merge",
            {"Blouse": " OTHER"},
            "`labels` names ' OTHER' under both `drop` and `merge`; a label is either dropped or merged.",
        ),
        (
            "training.cnn_tiny.loss",
            ASYMMETRIC,
            "`training.cnn_tiny.loss.kind` is 'asymmetric', which is for multilabel targets only, but 'label' is "
            "multiclass; use 'cross_entropy' or 'focal'.",
        ),
    ],
)
def test_a_wrong_value_is_exactly_one_sentence(key: str, value: Any, sentence: str) -> None:
    message = refused(document({key: value}))
    assert message == f"params.yaml: {sentence}"
    assert not [word for word in JARGON if word in message]


@pytest.mark.parametrize("folds", [[0, 2], [1, 2], [0], [], [0, 0, 1], 1, 0, -3, 1001, 10**15])
def test_folds_must_be_consecutive(folds: Any) -> None:
    expected = (
        "params.yaml: `experiment.folds` must be the list 0, 1, 2, ... with at least two folds (only 0 with "
        "split.given: true) and at most 1000."
    )
    assert refused(document({"experiment.folds": folds})) == expected


@pytest.mark.parametrize("folds", [[0], 1])
def test_the_lists_of_the_data_set_make_exactly_one_fold(folds: Any) -> None:
    given = {"split.given": True}
    assert params.check(document({**given, "experiment.folds": folds}), "params.yaml").experiment.folds == [0]
    for wrong in ([0, 1], 5):
        assert refused(document({**given, "experiment.folds": wrong})) == (
            "params.yaml: `experiment.folds` must be [0] with split.given: true, since the val list is the one fold to "
            f"score; but it lists {2 if wrong == [0, 1] else 5} folds."
        )
    assert "must be the list 0, 1, 2, ..." in refused(document({**given, "experiment.folds": [1]}))


def test_a_number_of_folds_is_taken_for_the_list() -> None:
    assert params.check(document({"experiment.folds": 3}), "params.yaml").experiment.folds == [0, 1, 2]


@pytest.mark.parametrize("name", ["frozen", "custom_cnn", "kind", "models"])
def test_a_model_named_like_a_kind_keeps_its_path(name: str) -> None:
    message = refused(document({f"models.{name}": CNN | {"blocks": [{"filters": 0, "kernel": 3, "pool": 2}]}}))
    assert message == f"params.yaml: `models.{name}.blocks.0.filters` must be at least 1, but got 0."
    message = refused(document({f"models.{name}": {"kind": "frozen", "backbone": "resnet18"}}))
    assert message == f"params.yaml: `models.{name}.weights` is missing."


def test_every_missing_key_is_named() -> None:
    def keys(block: Any, path: str) -> list[str]:
        inner = enumerate(block) if isinstance(block, list) else block.items() if isinstance(block, dict) else []
        return [key for name, value in inner for key in [f"{path}{name}", *keys(value, f"{path}{name}.")]]

    kinds = {
        "models": "'frozen' or 'custom_cnn'",
        "targets": "'multiclass' or 'multilabel'",
        "training": "'cross_entropy', 'focal' or 'asymmetric'",
    }
    # names of the user's own
    free = {"targets.label", "models.cnn_small", "models.cnn_tiny", "training.cnn_small", "training.cnn_tiny"}
    for key in keys(document(), ""):
        *parents, last = key.split(".")
        if last.isdigit() or key in free:
            continue
        settings = block = document()
        for part in parents:
            block = block[int(part) if part.isdigit() else part]
        del block[last]
        expected = f"`{key}` is missing." if last != "kind" else f"`{key}` must be {kinds[parents[0]]}, but is missing."
        assert refused(settings) == f"params.yaml: {expected}"


def test_what_a_block_of_targets_says() -> None:
    targets = {"colour": {"kind": "multiclass"}, "both": BOTH}
    loaded = params.check(document({"targets": targets, "labels.top_classes": 2}), "params.yaml")
    assert {name: target.columns(name) for name, target in loaded.targets.items()} == {
        "colour": ["colour"], "both": ["colour", "garment"]
    }  # fmt: skip
    assert loaded.labels.top_classes == 2


@pytest.mark.parametrize("loss", [{"kind": "focal", "gamma": 2.0}, ASYMMETRIC], ids=lambda loss: loss["kind"])
def test_only_cross_entropy_smooths_labels(loss: dict[str, Any]) -> None:
    chosen = {"targets": {"both": BOTH}, "training.cnn_tiny.loss": loss}
    assert params.check(document(chosen), "params.yaml").training["cnn_tiny"].loss.model_dump() == loss
    assert refused(document({**chosen, "training.cnn_tiny.label_smoothing": 0.1})) == (
        f"params.yaml: `training.cnn_tiny` has label_smoothing 0.1 with `loss.kind: {loss['kind']}`, but only "
        "cross_entropy can smooth labels; set label_smoothing to 0."
    )


def test_several_mistakes_are_all_named() -> None:
    message = refused(document({"experiment.seed": "x", "labels.dorp": []}))
    assert message == (
        "params.yaml: `experiment.seed` must be a whole number, but got 'x'. "
        "params.yaml: unknown key `labels.dorp`; remove it or correct its name."
    )


def test_a_long_value_is_shortened() -> None:
    assert len(refused(document({"ingest": list(range(10_000))}))) < 200


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty, but must hold blocks such as `experiment:`; `pleat use sample` writes them."),
        (b"# only a comment\n", "is empty, but must hold blocks"),
        (b"- a\n- b\n", "holds ['a', 'b'], but must hold blocks"),
        (b"just text", "holds 'just text', but must hold blocks"),
        (b"a: 1\nb: [1, 2\nc: 3\n", "is not valid YAML: line 3: "),
        (b"a: 1\n\tb: 2\n", "is not valid YAML: line 2: found a tab character that violates indentation."),
        (b"seed: 1\nseed: 2\n", 'is not valid YAML: line 2: found duplicate key "seed"'),
        (b"a: \x00\n", "is not valid YAML: "),
        (b"label: R\xf6cke\n", "is not UTF-8; save it as UTF-8, or put a recipe in place with `pleat use`."),
    ],
)
def test_a_file_that_is_no_params_yaml(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(PleatError) as caught:
        params.load(tmp_path / "params.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'params.yaml'} {sentence}")
    assert "\n" not in str(caught.value)


def test_an_absent_file_and_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(
        PleatError, match=r"does not exist here; run pleat in the project's folder, or `pleat use sample`"
    ):
        params.load(tmp_path / "params.yaml")
    with pytest.raises(PleatError, match=r"cannot be read: Is a directory\.$"):
        params.load(tmp_path)


def test_params_cannot_be_changed_after_loading() -> None:
    loaded = params.check(document(), "params.yaml")
    with pytest.raises(Exception, match="frozen"):
        loaded.experiment.seed = 3  # type: ignore[misc]
