"""params.yaml as frozen, strict models: an unknown key or a wrong type is an error with the key's full path."""

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline_steps.errors import PleatError
from pipeline_steps.params_compress import Compress, Distilled
from pipeline_steps.params_errors import sentence, shown
from pipeline_steps.params_models import NAME as NAME
from pipeline_steps.params_models import Augment, Fraction, Model, Strict, Training
from pipeline_steps.params_models import Name as Name

Share = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]
Format = Literal["auto", "clothing_csv", "class_folders", "attribute_lists", "colour_garment"]
MAX_FOLDS = 1000
FOLDS_EXPECTED = (
    f"must be the list 0, 1, 2, ... with at least two folds (only 0 with split.given: true) and at most {MAX_FOLDS}"
)
# Columns of the manifest and of later tables; a target of such a name would hide them.
TAKEN = {
    "sample_id", "batch", "source_path", "sender_id", "given", "width", "height", "n_bytes", "phash", "group", "side",
    "fold", "reason", "detail", "error", "path", "aspect_ratio", "model_version", "pixels",
}  # fmt: skip
TAKEN_ENDS = ("_probability", "_top_k")  # of the columns that a served model answers beside each target


class Experiment(Strict):
    """What runs: the three lists are the matrix of dvc.yaml."""

    recipe: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    batches: Annotated[list[Name], Field(min_length=1)]
    models: Annotated[list[Name], Field(min_length=1)]
    folds: list[int]

    @field_validator("batches", "models")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"names '{name}' more than once; every entry may appear only once")
        return names

    @field_validator("folds", mode="before")
    @classmethod
    def _count_to_list(cls, folds: Any) -> Any:
        # Capped, so that a slip of the keyboard does not fill the memory before it is refused below.
        return list(range(min(folds, MAX_FOLDS + 1))) if type(folds) is int else folds

    @field_validator("folds")
    @classmethod
    def _consecutive(cls, folds: list[int]) -> list[int]:
        if not 1 <= len(folds) <= MAX_FOLDS or folds != list(range(len(folds))):
            raise ValueError(FOLDS_EXPECTED)
        return folds


class Multiclass(Strict):
    """A target of which each sample has exactly one class: the label column of the target's name."""

    kind: Literal["multiclass"]

    def columns(self, name: str) -> list[str]:
        """The label columns that it is read from."""
        return [name]


class Multilabel(Strict):
    """A target of which each sample may have several classes: the labels of all the columns `of`."""

    kind: Literal["multilabel"]
    of: Annotated[list[Name], Field(min_length=1)]

    def columns(self, _name: str) -> list[str]:
        """The label columns that it is read from."""
        return self.of


Target = Annotated[Multiclass | Multilabel, Discriminator("kind")]


class Ingest(Strict):
    """What an image must be to enter the manifest."""

    format: Format
    min_side_px: Annotated[int, Field(ge=1)]
    max_pixels: Annotated[int, Field(ge=1)]


class Labels(Strict):
    """Which labels stay, and under which names; `top_classes: null` keeps every class."""

    drop: list[str]
    merge: dict[str, str]
    top_classes: Annotated[int, Field(ge=2)] | None

    @model_validator(mode="after")
    def _drop_or_merge(self) -> "Labels":
        dropped = {plain_label(label) for label in self.drop}
        for label in (*self.merge, *self.merge.values()):
            if plain_label(label) in dropped:
                raise ValueError(f"names '{label}' under both `drop` and `merge`; a label is either dropped or merged")
        return self


class Holdout(Strict):
    """The part that is set aside for ever; `fraction: 0` switches it off."""

    fraction: Fraction
    salt: str


class Split(Strict):
    """How samples are divided into holdout and folds; `given`: by the data set's own train and val lists."""

    given: bool
    group_by: Literal["sender_id"] | None
    near_copy_max_distance: Annotated[int, Field(ge=0, le=16)]
    holdout: Holdout


class Floors(Strict):
    """What every promoted model must reach on the holdout."""

    f1_weighted: Share
    f1_macro: Share


class Costs(Strict):
    """How many times the champion's cost a candidate's may be."""

    latency: Ratio
    memory: Ratio
    size: Ratio


class Promotion(Strict):
    """When a trained model takes the champion's place in MLflow's registry."""

    model: Name
    mode: Literal["auto", "approve", "dry_run"]
    floors: Floors
    min_gain: Share
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    max_class_drop: Share
    max_cost: Costs


class Drift(Strict):
    """How far a delivery may lie from the training data, and whether it may bring new labels."""

    label_shares: Share
    image_statistics: Share
    new_labels: bool


class Inbox(Strict):
    """Where new data arrives and when it is taken."""

    source: str
    every_minutes: Annotated[int, Field(ge=1)]
    settle_s: Annotated[int, Field(ge=0)]
    max_drift: Drift


class Profile(Strict):
    """What the stage `profile` measures beside what it counts.

    Attributes:
        latency: time the whole network and each layer on this machine.
        images: of the training data, on which the effective receptive field is measured; 0: it is not.
    """

    latency: bool
    images: Annotated[int, Field(ge=0, le=1000)]


class Params(Strict):
    """The whole of params.yaml."""

    experiment: Experiment
    targets: Annotated[dict[Name, Target], Field(min_length=1)]
    ingest: Ingest
    labels: Labels
    split: Split
    models: dict[Name, Model]
    training: dict[Name, Training]
    profile: Profile
    compress: Compress
    promotion: Promotion
    inbox: Inbox

    @field_validator("targets")
    @classmethod
    def _names_are_free(cls, targets: dict[str, Any]) -> dict[str, Any]:
        columns = {column for name, target in targets.items() for column in target.columns(name)}
        taken_ends = {name for name in targets if name.endswith(TAKEN_ENDS)}
        for taken in sorted(TAKEN & {*targets, *columns} | taken_ends):
            raise ValueError(f"names '{taken}', which is a column that the pipeline fills itself; use another name")
        return targets

    @model_validator(mode="after")
    def _folds_fit_the_split(self) -> "Params":
        one_fold = len(self.experiment.folds) == 1
        if one_fold and not self.split.given:
            raise ValueError(f"`experiment.folds` {FOLDS_EXPECTED}")
        if self.split.given and not one_fold:
            raise ValueError(
                "`experiment.folds` must be [0] with split.given: true, since the val list is the one fold to score; "
                f"but it lists {len(self.experiment.folds)} folds"
            )
        return self

    @model_validator(mode="after")
    def _models_exist(self) -> "Params":
        for block, defined in (("models", self.models), ("training", self.training)):
            for name in self.experiment.models:
                if name not in defined:
                    known = ", ".join(sorted(defined)) or "none"
                    raise ValueError(f"`experiment.models` names '{name}', but `{block}` defines {known}")
        return self

    @model_validator(mode="after")
    def _students_exist(self) -> "Params":
        for technique, settings in self.compress.techniques.items():
            for block, defined in (("models", self.models), ("training", self.training)):
                if isinstance(settings, Distilled) and settings.student not in defined:
                    known = ", ".join(sorted(defined)) or "none"
                    key = f"compress.techniques.{technique}.student"
                    raise ValueError(f"`{key}` is '{settings.student}', but `{block}` defines {known}")
        return self

    @property
    def _trained(self) -> list[str]:
        """Names of the models that some stage trains: those of the experiment, and students."""
        students = [one.student for one in self.compress.techniques.values() if isinstance(one, Distilled)]
        return list(dict.fromkeys([*self.experiment.models, *students]))

    @model_validator(mode="after")
    def _augmented_models_see_pixels(self) -> "Params":
        for name in self._trained:
            if self.models[name].kind == "frozen" and self.training[name].augment != Augment():
                raise ValueError(
                    f"`training.{name}.augment` changes pixels, but models.{name} is frozen: its features are computed "
                    "once; leave `augment` out, or train the network with `kind: finetuned`"
                )
        return self

    @model_validator(mode="after")
    def _losses_fit_the_targets(self) -> "Params":
        multiclass = [name for name, target in self.targets.items() if target.kind == "multiclass"]
        for name in self._trained:
            if multiclass and self.training[name].loss.kind == "asymmetric":
                raise ValueError(
                    f"`training.{name}.loss.kind` is 'asymmetric', which is for multilabel targets only, but "
                    f"'{multiclass[0]}' is multiclass; use 'cross_entropy' or 'focal'"
                )
        return self


def flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(f"{prefix}.{key}", value) if isinstance(value, Mapping) else {f"{prefix}.{key}": value}
    return found


def plain_label(label: str) -> str:
    """What of a label counts when it is looked up in `labels.drop` or `labels.merge`: neither case nor outer space."""
    return unicodedata.normalize("NFC", label).strip().casefold()


def load(path: Path = Path("params.yaml")) -> Params:
    """Reads and checks a params.yaml.

    Raises:
        PleatError: the file is absent, is no YAML, or a key is unknown, missing or of the wrong type.
    """
    try:
        document = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PleatError(
            f"{path} does not exist here; run pleat in the project's folder, or `pleat use sample`."
        ) from None
    except OSError as error:
        raise PleatError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise PleatError(f"{path} is not UTF-8; save it as UTF-8, or put a recipe in place with `pleat use`.") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise PleatError(f"{path} is not valid YAML: {line}{error.problem}.") from None
    except YAMLError as error:
        raise PleatError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    return check(document, str(path))


def check(document: Any, where: str) -> Params:
    """Turns a mapping into `Params`.

    Raises:
        PleatError: with one sentence for each wrong key, naming its full path.
    """
    if not isinstance(document, Mapping):
        found = "is empty" if document is None else f"holds {shown(document)}"
        raise PleatError(
            f"{where} {found}, but must hold blocks such as `experiment:`; `pleat use sample` writes them."
        )
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise PleatError(" ".join(sentence(item, where) for item in error.errors())) from None
