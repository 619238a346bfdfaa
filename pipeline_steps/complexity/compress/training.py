"""What the trained techniques share: inputs, the engine on the training side, and the package of what came of it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline_steps import package, prepare, refit
from pipeline_steps.complexity.compress.refitted import Made, Refitted
from pipeline_steps.fitting import build_network, build_objective, fit_on, schedule
from pipeline_steps.params_models import Model, Training
from pipeline_steps.progress import say
from pipeline_steps.serving import TRAINED_ON
from pipeline_steps.train import codes_of, load_inputs
from pipeline_steps.versions import digest
from pipeline_steps.vision.engine import Epoch, Lesson
from pipeline_steps.vision.inputs import Inputs
from pipeline_steps.vision.lease import lease_several
from pipeline_steps.vision.networks import Head
from pipeline_steps.vision.objective import Objective

Goal = tuple[Objective, torch.Tensor]  # what is learned, and the codes (n, k) of the samples


def fit_anew(
    refitted: Refitted,
    name: str,
    settings: Model,
    training: Training,
    n_epochs: int,
    out: Path,
    told: str,
    change: Callable[[Goal], Goal] = lambda goal: goal,
) -> Made:
    """Trains a model of `settings` on the training side, from its own start, and writes its package into `out`.

    Args:
        change: from what `training` says is learned to what is learned instead.
    """
    inputs, version = inputs_of(refitted, settings)
    objective, codes = change(
        (build_objective(training, refitted.targets), codes_of(refitted.targets, refitted.samples))
    )
    torch.manual_seed(_seed(refitted))
    network = build_network(settings, training, inputs, objective.n_outputs, refitted.root)
    if isinstance(network, Head):
        network.standardise_by(inputs.values[_training_rows(refitted)])
    fit(refitted, name, settings, training, network, (objective, codes), inputs, version, n_epochs)
    whole, size, preprocessing = refit.whole_network(settings, network, refitted.root)
    return write(refitted, name, whole, size, {"preprocessing": preprocessing}, training.mirror, out, told)


def fit(
    refitted: Refitted,
    name: str,
    settings: Model,
    training: Training,
    network: torch.nn.Module,
    goal: Goal,
    inputs: Inputs,
    version: str,
    n_epochs: int,
) -> None:
    """Trains `network`, in place, with the pipeline's engine; an interrupted training goes on after its last epoch.

    Args:
        inputs: of all samples, in the order of `refitted.samples`.
        version: names the contents of the inputs.
    """
    objective, codes = goal
    n_threads = torch.get_num_threads()
    if isinstance(network, Head):
        torch.set_num_threads(1)  # as in `refit`

    def report(epoch: Epoch) -> None:
        say(f"compress: {name}: epoch {epoch.epoch}/{n_epochs} train loss {epoch.train_loss:.4f}")

    def go_on(done: list[Epoch]) -> None:
        say(f"compress: {name}: going on after epoch {len(done)} of the interrupted run")

    checkpoint = refitted.scratch / f"{name}-{refitted.about['package'][:16]}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with lease_several(f"compress {name}", training.devices) as devices:
        plan = schedule(settings, training, _seed(refitted), devices[0], n_epochs)
        rows = _training_rows(refitted)
        lesson = Lesson(objective, inputs, codes, rows, None, plan, checkpoint, version)
        fitted = fit_on(devices, network, lesson, report, go_on)
    network.cpu().to(memory_format=torch.contiguous_format)
    network.load_state_dict(fitted.state)
    torch.set_num_threads(n_threads)


def inputs_of(refitted: Refitted, settings: Model) -> tuple[Inputs, str]:
    """What a model of `settings` is trained on, in the order of `refitted.samples`, and a name of the contents.

    The pipeline's own where a model of these settings was prepared, else prepared here, for this stage alone.
    """
    params, root = refitted.settings_of_all, refitted.root
    batches = params.experiment.batches
    same = [name for name, other in params.models.items() if other == settings]
    for name in same:
        if all((root / "data" / "prepare" / name / batch / "inputs.json").is_file() for batch in batches):
            inputs, _, version = load_inputs(root, name, batches, refitted.samples)
            return inputs, version
    name = digest(json.dumps(settings.model_dump()))[:16]
    alone = params.model_copy(update={"models": {name: settings}})
    for batch in batches:
        if not (refitted.scratch / "data" / "prepare" / name / batch / "inputs.json").is_file():
            prepare.run(alone, name, batch, root, to=refitted.scratch)
    inputs, _, version = load_inputs(refitted.scratch, name, batches, refitted.samples)
    return inputs, version


def write(
    refitted: Refitted,
    name: str,
    whole: torch.nn.Module,
    size: int,
    travels: dict[str, object],
    mirror: bool,
    out: Path,
    told: str,
) -> Made:
    """Writes the package of a network on the CPU, from pixels to logits, and counts what an image costs.

    Args:
        size: of the input, pixels a side.
        travels: what of the refitted model's about.json is another.
    """
    about = refitted.travels | travels | {"compression": {"name": name, "told": told}}
    about.pop("classes")
    example = (refitted.package / "example.jpg").read_bytes()
    package.write(out, package.Answering(whole, refitted.targets, mirror), size, about, example)
    (out / TRAINED_ON).write_bytes((refitted.package / TRAINED_ON).read_bytes())
    return Made(sum(one.numel() for one in whole.parameters()), macs(whole, size), size, told)


def macs(network: torch.nn.Module, size: int) -> int:
    """Multiply-accumulates of one image: what FlopCounterMode counts, which is two operations for each."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    return int(counter.get_total_flops() // 2)


def _training_rows(refitted: Refitted) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(refitted.samples["side"] == "train"))


def _seed(refitted: Refitted) -> int:
    """That of `refit`."""
    experiment = refitted.settings_of_all.experiment
    return experiment.seed * 1000 + len(experiment.folds)
