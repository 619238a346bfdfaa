"""`pleat STEP ...`: one sub-command for each stage of dvc.yaml, and what people type themselves.

Stages are imported only when they run, so that `--help` is quick.
"""

import argparse
import gc
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import get_args

from pipeline_steps import params
from pipeline_steps.errors import FAILURE_FILE, PleatError
from pipeline_steps.params import Params
from pipeline_steps.progress import say

EXIT_INTERRUPTED = 130


def main() -> None:
    """Runs one sub-command; a user's error ends with one sentence on stderr and exit status 1."""
    # OpenMP threads that wait spin for long by default, and starve whatever else runs; read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    gc.set_threshold(50_000, 20, 100)  # else it looks again and again through the many objects that imports make
    signal.signal(signal.SIGTERM, _interrupt)
    arguments = build_parser().parse_args()
    try:
        arguments.run(arguments)
        gc.freeze()  # else the interpreter looks through all that was imported before it ends, which takes a second
    except PleatError as error:
        print(f"pleat: {error}", file=sys.stderr)
        _leave_failure(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("pleat: interrupted; nothing half-written was kept. Run the same command to go on.", file=sys.stderr)
        sys.stdout.flush()
        # Worker threads may be inside a decoder; they hold nothing that must be finished.
        os._exit(EXIT_INTERRUPTED)


def _leave_failure(error: PleatError) -> None:
    """Tells the Airflow task above, of which DVC knows nothing, what went wrong and whether a retry can help."""
    if FAILURE_FILE in os.environ:
        failure = {"message": str(error), "temporary": error.temporary}
        Path(os.environ[FAILURE_FILE]).write_text(json.dumps(failure), encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="pleat", description="Retrains image classifiers as a dependable routine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_people_commands(commands)
    for name, text in (
        ("ingest", "Read one batch: decode every image once; write manifest, quarantine and packed images."),
        ("validate", "Drop and merge labels, remove copies, check the manifest with Great Expectations."),
        ("split", "Set the permanent holdout aside and divide the rest into stratified folds."),
        ("prepare", "Compute what a model trains on, once for all folds: frozen features or uint8 pixels."),
        ("train", "Train one fold of one model; an interrupted fold goes on from its last epoch."),
        ("evaluate", "Score a model's out-of-fold predictions: metrics with spread, pictures, worst mistakes."),
        ("compare", "Write the leaderboard, the quality-against-cost plot and the report page."),
        ("refit", "Train the chosen model on everything but the holdout; score it there and package it."),
        ("compress", "Make the cheaper versions of the refitted model that params.yaml asks for; score and time them."),
        ("register", "Judge the refitted model against the champion; register and promote it in MLflow."),
    ):
        stage = commands.add_parser(
            name, help=text, description=text + " A stage of dvc.yaml; settings in params.yaml."
        )
        if name in ("prepare", "train", "evaluate"):
            stage.add_argument("model", help="a name of `models` in params.yaml")
        if name in ("ingest", "prepare"):
            stage.add_argument("batch", help="a folder of data/raw")
        if name == "train":
            stage.add_argument("fold", type=int, help="the fold that is scored, counted from 0")
        stage.set_defaults(run=globals()[f"_{name}"])
    return parser


def _add_people_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "Put recipes/RECIPE.yaml in place as params.yaml; values are checked before it is written."
    use = commands.add_parser("use", help=text, description=text)
    use.add_argument("recipe", help="a file of recipes/, without .yaml")
    use.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as experiment.seed=3; repeatable"
    )
    use.set_defaults(run=_use)

    data = commands.add_parser("data", help="Add a batch of images, or draw the sample.")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    text = "Copy SOURCE to data/raw/NAME, track it with DVC and list it in params.yaml; completely or not at all."
    add = actions.add_parser("add", help=text, description=text)
    add.add_argument("source", help="a folder, a .zip or .tar file, a git URL, or s3://bucket/prefix")
    add.add_argument("--name", required=True, help="the batch's name")
    add.add_argument("--format", default="auto", choices=get_args(params.Format))
    add.set_defaults(run=_data_add)
    text = "Draw the small set of garment images that data/raw/sample holds."
    sample = actions.add_parser("sample", help=text, description=text)
    sample.add_argument("folder", type=Path)
    sample.set_defaults(run=_data_sample)

    text = "Print the leaderboard of the last run."
    commands.add_parser("leaderboard", help=text, description=text).set_defaults(run=_leaderboard)
    text = "Start Airflow and MLflow for this project, on this machine only; Ctrl-C stops both."
    airflow = commands.add_parser("airflow", help=text, description=text)
    airflow.add_argument("--port", type=int, default=8080, help="of Airflow (default 8080)")
    airflow.add_argument("--mlflow-port", type=int, default=5000, help="of MLflow (default 5000)")
    airflow.set_defaults(run=_airflow)
    _add_profile(commands)
    _add_registry_commands(commands)
    _add_predict(commands)
    text = "Log to MLflow what could not be logged while it was away."
    commands.add_parser("sync", help=text, description=text).set_defaults(run=_sync)


def _add_profile(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "Say what a model costs, layer by layer: parameters, MACs, receptive field; two models side by side."
    profile = commands.add_parser("profile", help=text, description=text)
    profile.add_argument("names", nargs="+", metavar="NAME", help="a model of params.yaml, or any network of timm")
    profile.add_argument(
        "--stage", action="store_true", help="as the stage of dvc.yaml: into data/ and reports/complexity"
    )
    profile.add_argument("--input-size", type=int, metavar="PIXELS", help="a side, instead of the network's own")
    profile.add_argument("--latency", action="store_true", help="measure how long it takes, too")
    profile.add_argument("--images", type=Path, metavar="FOLDER", help="measure the effective receptive field on these")
    profile.add_argument(
        "--weights", type=Path, metavar="FILE", help="for that, a .safetensors file; else the model's own"
    )
    profile.set_defaults(run=_profile)


def _add_registry_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "Make a version champion that waits for approval, or decline it."
    approve = commands.add_parser("approve", help=text, description=text)
    approve.add_argument("version", nargs="?", help="default: the newest one that waits")
    approve.add_argument("--decline", action="store_true", help="leave the champion as it is")
    approve.add_argument("--comment", default="", help="for the history")
    approve.set_defaults(run=_approve)
    text = "Put the previous champion back."
    rollback = commands.add_parser("rollback", help=text, description=text)
    rollback.add_argument("--to", metavar="VERSION", help="another version than the previous champion")
    rollback.add_argument("--comment", default="", help="for the history")
    rollback.set_defaults(run=_rollback)
    text = "Make a batch of what arrived in the inbox, as Airflow does every inbox.every_minutes."
    commands.add_parser("inbox", help=text, description=text).set_defaults(run=_inbox)
    text = "Say what is champion, what lies in the inbox and what ran last."
    commands.add_parser("status", help=text, description=text).set_defaults(run=_status)
    text = "List every promotion, rejection, approval and rollback."
    commands.add_parser("history", help=text, description=text).set_defaults(run=_history)


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "Score any number of images with the champion; a row each, in one Parquet file."
    predict = commands.add_parser("predict", help=text, description=text)
    predict.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders or s3://bucket/prefix")
    predict.add_argument("--out", required=True, metavar="FILE", help="such as scores.parquet, or s3://bucket/key")
    predict.add_argument("--version", help="of the model, instead of the champion")
    predict.add_argument("--top-k", type=int, default=5, metavar="K", help="labels listed for an image (default 5)")
    predict.add_argument(
        "--list",
        metavar="LIST",
        help="such as split/test.txt: of the one folder IMAGES, in the format attribute_lists, the images that this "
        "file lists; FILE is then text, a line of class numbers for each image as in train_attr.txt",
    )
    predict.set_defaults(run=_predict)


def _use(arguments: argparse.Namespace) -> None:
    from pipeline_steps import recipes

    recipes.use(arguments.recipe, arguments.set)


def _data_add(arguments: argparse.Namespace) -> None:
    from pipeline_steps import data_add

    data_add.add(arguments.source, arguments.name, arguments.format)


def _data_sample(arguments: argparse.Namespace) -> None:
    from pipeline_steps import sample

    sample.draw_sample(arguments.folder)
    say(f"The sample was drawn in {arguments.folder}.")


def _leaderboard(_: argparse.Namespace) -> None:
    from pipeline_steps import compare

    compare.show()


def _airflow(arguments: argparse.Namespace) -> None:
    from pipeline_steps import standalone

    standalone.run(Path(), arguments.port, arguments.mlflow_port)


def _approve(arguments: argparse.Namespace) -> None:
    from pipeline_steps import promotion

    promotion.approve(params.load(), arguments.version, arguments.decline, arguments.comment)


def _rollback(arguments: argparse.Namespace) -> None:
    from pipeline_steps import promotion

    promotion.rollback(params.load(), arguments.to, arguments.comment)


def _inbox(_: argparse.Namespace) -> None:
    from pipeline_steps import inbox

    loaded = params.load()
    taken = inbox.take(loaded)
    inbox.acknowledge(taken)
    for one in taken:
        say(f"{one.delivery}: {one.outcome}{f' as {one.batch}' if one.batch else ''}. {' '.join(one.reasons)}".strip())
        if one.report:
            say(f"  {one.report}")
    if not taken:
        say(f"{loaded.inbox.source} holds nothing new.")
    if any(one.outcome == "added" for one in taken):
        say("Next: `dvc repro`")


def _status(_: argparse.Namespace) -> None:
    from pipeline_steps import status

    status.show(params.load())


def _history(_: argparse.Namespace) -> None:
    from pipeline_steps import promotion

    promotion.history(params.load())


def _predict(arguments: argparse.Namespace) -> None:
    from pipeline_steps import predict

    predict.predict(params.load(), arguments.images, arguments.out, arguments.version, arguments.top_k, arguments.list)


def _sync(_: argparse.Namespace) -> None:
    from pipeline_steps.tracking import Tracker, tolerant

    loaded = params.load()
    with tolerant():
        Tracker(loaded).sync()
        say("MLflow has every finished stage of this folder.")
        return
    sys.exit(1)


def _ingest(arguments: argparse.Namespace) -> None:
    from pipeline_steps import ingest

    loaded = params.load()
    chosen = [loaded.models[name] for name in loaded.experiment.models]
    for model in (model for model in chosen if model.kind in ("frozen", "finetuned")):
        from pipeline_steps.vision.weights import check_weights

        check_weights(model.backbone, Path(model.weights) if model.weights else None)  # before any long work
    for name in loaded.experiment.models:
        if loaded.training[name].optimizer != "adamw":
            from pipeline_steps.vision.optimizer import check_optimizer

            check_optimizer(loaded.training[name].optimizer)
    ingest.run(loaded, arguments.batch)


def _validate(_: argparse.Namespace) -> None:
    from pipeline_steps import validate

    validate.run(params.load())


def _split(_: argparse.Namespace) -> None:
    from pipeline_steps import split

    split.run(params.load())


def _prepare(arguments: argparse.Namespace) -> None:
    from pipeline_steps import prepare

    loaded = params.load()
    prepare.run(loaded, _defined(loaded, arguments.model), arguments.batch)


def _train(arguments: argparse.Namespace) -> None:
    from pipeline_steps import train
    from pipeline_steps.live import LiveLog

    loaded = params.load()
    model = _defined(loaded, arguments.model)
    train.run(loaded, model, arguments.fold, on_epoch=LiveLog(loaded, model, arguments.fold))


def _evaluate(arguments: argparse.Namespace) -> None:
    from pipeline_steps import evaluate
    from pipeline_steps.tracking import Tracker, tolerant

    loaded = params.load()
    evaluate.run(loaded, _defined(loaded, arguments.model))
    with tolerant():
        Tracker(loaded).model(arguments.model)


def _profile(arguments: argparse.Namespace) -> None:
    from pipeline_steps import profile

    if arguments.stage:
        loaded = params.load()
        for model in arguments.names:
            profile.run(loaded, _defined(loaded, model))
    else:
        known = params.load() if Path("params.yaml").exists() else None
        chosen = arguments.input_size, arguments.latency, arguments.images, arguments.weights
        profile.show(arguments.names, known, *chosen)
    # All is written. Where triton is installed, torch has loaded it, and it would list all that is left.
    sys.stdout.flush()
    os._exit(0)


def _compare(_: argparse.Namespace) -> None:
    from pipeline_steps import compare
    from pipeline_steps.tracking import Tracker, tolerant

    loaded = params.load()
    compare.run(loaded)
    with tolerant():
        Tracker(loaded).pipeline()


def _refit(_: argparse.Namespace) -> None:
    from pipeline_steps import refit

    refit.run(params.load())


def _compress(_: argparse.Namespace) -> None:
    from pipeline_steps import compress

    loaded = params.load()
    if compress.run(loaded) is not None:
        from pipeline_steps.tracking import Tracker, tolerant

        with tolerant():
            Tracker(loaded).compress()


def _register(_: argparse.Namespace) -> None:
    from pipeline_steps import register

    register.run(params.load())


def _defined(loaded: Params, model: str) -> str:
    if model not in loaded.models or model not in loaded.training:
        raise PleatError(f"params.yaml defines no model '{model}'; it has {', '.join(sorted(loaded.models))}.")
    return model


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
