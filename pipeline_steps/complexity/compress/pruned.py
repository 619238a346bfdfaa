"""Structured pruning with torch-pruning: channels go, with all that depends on them, and the rest is trained on."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline_steps.complexity.compress.refitted import Made, NotPossibleError, Refitted
from pipeline_steps.complexity.compress.training import Plan, fit, inputs_of, macs, write
from pipeline_steps.fitting import build_objective
from pipeline_steps.params_compress import Pruned
from pipeline_steps.params_models import CustomCnn, FinetunedModel, FrozenModel, Model, OneCycle, ScratchModel
from pipeline_steps.train import codes_of
from pipeline_steps.units import with_unit
from pipeline_steps.vision.networks import CustomCnn as CustomCnnNetwork
from pipeline_steps.vision.networks import Head


def make(refitted: Refitted, name: str, settings: Pruned, out: Path) -> Made:
    """Removes `share` of the channels of each layer and trains the whole network on.

    A frozen network is thawed for that: what is left after the channels are gone is another network.

    Raises:
        NotPossibleError: torch-pruning cannot follow the network, or nothing could be removed.
    """
    network, size = restored(refitted)
    before = macs(network, size)
    n_channels, n_left = prune(network, size, settings.share)
    if n_left == n_channels:
        raise NotPossibleError(
            f"no layer of {refitted.model} is wide enough to lose {settings.share:g} of its channels and keep one"
        )
    training = refitted.training.model_copy(
        update={
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "max_epochs": settings.epochs,
            "weight_average": 0.0,
            "decay": OneCycle(kind="one_cycle"),
            "devices": 1,
        }
    )
    plan = Plan(_as_a_whole(refitted.settings), training, settings.epochs)
    inputs, version = inputs_of(refitted, plan.settings)
    goal = build_objective(training, refitted.targets), codes_of(refitted.targets, refitted.samples)
    fit(refitted, name, plan, network, goal, inputs, version)
    removed = n_channels - n_left
    told = (
        f"{removed:,} of {n_channels:,} channels removed ({removed / n_channels:.1%}), {with_unit(before)} MACs became "
        f"{with_unit(macs(network, size))}; then trained as a whole for {settings.epochs} epochs"
    )
    return write(refitted, name, plan, network, size, {}, out, told)


def restored(refitted: Refitted) -> tuple[nn.Module, int]:
    """The refitted network, from pixels to logits, with its weights, ready to be trained; and its input size."""
    settings, head = refitted.settings, refitted.training.head
    n_outputs = sum(len(target.classes) for target in refitted.targets)
    state = load_file(refitted.package / "state.safetensors")
    state = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
    network: nn.Module
    if isinstance(settings, CustomCnn):
        network = CustomCnnNetwork(settings.plain_blocks, n_outputs, head.hidden, head.dropout, settings.batch_norm)
    else:
        from pipeline_steps.vision.timm_networks import load_network

        head_on = "pooled" if isinstance(settings, ScratchModel) else settings.head_on
        network = load_network(
            settings.backbone, None, False, settings.input_size, head_on, n_outputs, head.hidden, head.dropout
        )
        if isinstance(settings, FrozenModel):  # its package has the same layers under other names
            renamed = {"backbone.network.": "body.", "backbone.": "", "head.": "head."}
            state = {_renamed(key, renamed): value for key, value in state.items()}
    network.load_state_dict({key: value for key, value in state.items() if key in network.state_dict()})
    return network.requires_grad_(True), refitted.cost["input_size"]


def prune(network: nn.Module, size: int, share: float) -> tuple[int, int]:
    """Removes channels in place: in each group of layers that hang together those of the smallest weights (L2 norm).

    Args:
        network: with a `head` of the class `Head`, whose inputs are pruned with what they come from.
        size: of the input, pixels a side.
        share: of the channels of each layer, rounded up to whole channels; a layer that would lose all stays as it is.

    Returns:
        Channels of all layers but the last, before and after.

    Raises:
        NotPossibleError: torch-pruning cannot follow the network.
    """
    import torch_pruning as tp

    head = network.get_submodule("head")
    assert isinstance(head, Head)
    fold_standardisation(head)
    outputs = [layer for layer in head.layers if isinstance(layer, nn.Linear)][-1]
    example = torch.zeros(1, 3, size, size)
    before = _n_channels(network, outputs)
    network.eval()
    try:
        pruner = tp.pruner.BasePruner(
            network,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=[outputs],
        )
        pruner.step()
        first = next(layer for layer in head.layers if isinstance(layer, nn.Linear))
        head.mean, head.std = torch.zeros(first.in_features), torch.ones(first.in_features)
        with torch.no_grad():
            network(example)
    except Exception as error:  # it fails in many ways where a network does what it cannot follow
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise NotPossibleError(
            f"torch-pruning cannot follow this network ({type(error).__name__}: {reason})"
        ) from error
    return before, _n_channels(network, outputs)


def _n_channels(network: nn.Module, outputs: nn.Linear) -> int:
    """What convolutions and linear layers give, without the last one, whose outputs are the classes."""
    convolutions = sum(layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d))
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear) and layer is not outputs]
    return convolutions + sum(layer.out_features for layer in linear)


def fold_standardisation(head: Head) -> None:
    """Moves the head's mean and deviation into its first layer, so that its inputs are plain features; same answers."""
    first = next(layer for layer in head.layers if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight.div_(head.std)
        first.bias.sub_(first.weight @ head.mean)
    head.mean, head.std = torch.zeros_like(head.mean), torch.ones_like(head.std)


def _as_a_whole(settings: Model) -> Model:
    """The settings by which all layers learn from pixels, and alike."""
    if not isinstance(settings, FrozenModel | FinetunedModel):
        return settings
    return FinetunedModel(
        kind="finetuned", backbone=settings.backbone, weights=settings.weights, input_size=settings.input_size,
        crop_pct=settings.crop_pct, head_on=settings.head_on,
    )  # fmt: skip


def _renamed(key: str, prefixes: dict[str, str]) -> str:
    found = next(prefix for prefix in prefixes if key.startswith(prefix))
    return prefixes[found] + key.removeprefix(found)
