"""What the trained techniques share: inputs, the engine on the training side, and the package of what came of it."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline_steps import model_card, package, prepare, refit
from pipeline_steps.complexity import layers
from pipeline_steps.complexity.compress.refitted import Made, Refitted
from pipeline_steps.complexity.compress.threads import threads_restored
from pipeline_steps.complexity.trace import trace
from pipeline_steps.fitting import build_network, build_objective, fit_on, schedule
from pipeline_steps.params_models import CustomCnn, FrozenModel, Model, Training
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


@dataclass(frozen=True)
class Plan:
    """How a version is trained: a block of `models`, one of `training`, and for how many epochs."""

    settings: Model
    training: Training
    n_epochs: int


def fit_anew(
    refitted: Refitted, name: str, plan: Plan, out: Path, told: str, change: Callable[[Goal], Goal] = lambda goal: goal
) -> Made:
    """Trains a model on the training side, from its own start, and writes its package into `out`.

    Args:
        change: from what `plan.training` says is learned to what is learned instead.
    """
    settings, training = plan.settings, plan.training
    inputs, version = inputs_of(refitted, settings)
    objective, codes = change(
        (build_objective(training, refitted.targets), codes_of(refitted.targets, refitted.samples))
    )
    torch.manual_seed(refit.seed_of(refitted.settings_of_all))
    network = build_network(settings, training, inputs, objective.n_outputs, refitted.root)
    if isinstance(network, Head):
        network.standardise_by(inputs.values[_training_rows(refitted)])
    fit(refitted, name, plan, network, (objective, codes), inputs, version)
    whole, size, preprocessing = refit.whole_network(settings, network, refitted.root)
    return write(refitted, name, plan, whole, size, {"preprocessing": preprocessing}, out, told)


def fit(
    refitted: Refitted, name: str, plan: Plan, network: torch.nn.Module, goal: Goal, inputs: Inputs, version: str
) -> None:
    """Trains `network`, in place, with the pipeline's engine; an interrupted training goes on after its last epoch.

    Args:
        inputs: of all samples, in the order of `refitted.samples`.
        version: names the contents of the inputs.
    """
    objective, codes = goal

    def report(epoch: Epoch) -> None:
        say(f"compress: {name}: epoch {epoch.epoch}/{plan.n_epochs} train loss {epoch.train_loss:.4f}")

    def go_on(done: list[Epoch]) -> None:
        say(f"compress: {name}: going on after epoch {len(done)} of the interrupted run")

    checkpoint = refitted.scratch / f"{name}-{refitted.key}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with threads_restored(), lease_several(f"compress {name}", plan.training.devices) as devices:
        if isinstance(network, Head):
            torch.set_num_threads(1)  # as in `refit`
        seed = refit.seed_of(refitted.settings_of_all)
        settings = schedule(plan.settings, plan.training, seed, devices[0], plan.n_epochs)
        rows = _training_rows(refitted)
        lesson = Lesson(objective, inputs, codes, rows, None, settings, checkpoint, version)
        fitted = fit_on(devices, network, lesson, report, go_on)
    network.cpu().to(memory_format=torch.contiguous_format)
    network.load_state_dict(fitted.state)


def inputs_of(refitted: Refitted, settings: Model) -> tuple[Inputs, str]:
    """What a model of `settings` is trained on, in the order of `refitted.samples`, and a name of the contents.

    The pipeline's own where a model of `experiment.models` sees the same, else prepared here, for this stage alone.
    """
    params, root = refitted.settings_of_all, refitted.root
    batches, seen = params.experiment.batches, _seen(settings)
    # Other models' folders may lie there from former runs; DVC prepares only these anew when something has changed.
    name = next((name for name in params.experiment.models if _seen(params.models[name]) == seen), None)
    if name is None:
        name, root = _prepared(refitted, settings), refitted.scratch
    inputs, _, version = load_inputs(root, name, batches, refitted.samples)
    return inputs, version


def _seen(settings: Model) -> object:
    """What prepared inputs depend on: of pixels only how images become them."""
    if isinstance(settings, FrozenModel):
        return settings
    if isinstance(settings, CustomCnn):
        return settings.input_size
    from pipeline_steps.vision.timm_networks import preprocessing  # late: takes seconds

    return preprocessing(settings.backbone, settings.input_size, settings.crop_pct)


def _prepared(refitted: Refitted, settings: Model) -> str:
    """Prepares the inputs of `settings` in the scratch folder, where they are not there yet; returns their name."""
    name = digest(json.dumps(settings.model_dump()), refitted.key, refitted.weights_of(settings))[:16]
    alone = refitted.settings_of_all.model_copy(update={"models": {name: settings}})
    for batch in alone.experiment.batches:
        if not (refitted.scratch / "data" / "prepare" / name / batch / "inputs.json").is_file():
            with threads_restored():
                prepare.run(alone, name, batch, refitted.root, to=refitted.scratch)
    return name


def write(
    refitted: Refitted,
    name: str,
    plan: Plan,
    whole: torch.nn.Module,
    size: int,
    travels: dict[str, object],
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
    package.write(out, package.Answering(whole, refitted.targets, plan.training.mirror), size, about, example)
    (out / TRAINED_ON).write_bytes((refitted.package / TRAINED_ON).read_bytes())
    n_params = sum(one.numel() for one in whole.parameters())
    settings = model_card.settings_of(plan.settings, plan.training)
    return Made(n_params, macs(whole, size), size, told, plan.n_epochs, settings)


def macs(network: torch.nn.Module, size: int) -> int:
    """Multiply-accumulates of one image of `size` pixels a side, as the stage profile counts them."""
    found = trace(lambda: deepcopy(network).to(torch.get_default_device()), (3, size, size))
    return layers.totals(layers.table(found))["macs"]


def _training_rows(refitted: Refitted) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(refitted.samples["side"] == "train"))
