"""Structured pruning with torch-pruning: channels go, with all that depends on them, and the rest is trained on."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline_steps.complexity.compress.refitted import Made, NotPossibleError, Refitted
from pipeline_steps.complexity.compress.training import fit, inputs_of, macs, write
from pipeline_steps.fitting import build_objective
from pipeline_steps.params_compress import Pruned
from pipeline_steps.params_models import CustomCnn, FinetunedModel, FrozenModel, Model, OneCycle, ScratchModel
from pipeline_steps.train import codes_of
from pipeline_steps.vision.networks import CustomCnn as CustomCnnNetwork
from pipeline_steps.vision.networks import Head

ROUND_TO = 8  # channels stay a multiple of it where they are many: what is odd runs slower than what is full


def make(refitted: Refitted, name: str, settings: Pruned, out: Path) -> Made:
    """Removes `share` of the channels of each layer and trains the whole network on.

    A frozen network is thawed for that: what is left after the channels are gone is another network.

    Raises:
        NotPossibleError: torch-pruning cannot follow the network, or nothing could be removed.
    """
    network, size = restored(refitted)
    before = macs(network, size)
    prune(network, size, settings.share)
    after = macs(network, size)
    if after >= before:
        raise NotPossibleError(f"{settings.share:g} of the channels of {refitted.model} are too few to remove any")
    training = refitted.training.model_copy(
        update={
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "max_epochs": settings.epochs,
            "patience": settings.epochs,
            "weight_average": 0.0,
            "decay": OneCycle(kind="one_cycle"),
            "devices": 1,
        }
    )
    pixels = _on_pixels(refitted.settings)
    inputs, version = inputs_of(refitted, pixels)
    goal = build_objective(training, refitted.targets), codes_of(refitted.targets, refitted.samples)
    # Every layer learns alike, so no settings of the model before apply.
    plain = FinetunedModel(kind="finetuned", backbone="", weights=None)
    fit(refitted, name, plain, training, network, goal, inputs, version, settings.epochs)
    told = (
        f"{settings.share:.0%} of the channels of each layer removed, {before / 1e6:,.0f} M MACs became "
        f"{after / 1e6:,.0f} M; then trained as a whole for {settings.epochs} epochs"
    )
    return write(refitted, name, network, size, {}, training.mirror, out, told)


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


def prune(network: nn.Module, size: int, share: float) -> None:
    """Removes channels in place: in each group of layers that hang together those of the smallest weights (L2 norm).

    Args:
        network: with a `head` of the class `Head`, whose inputs are pruned with what they come from.
        size: of the input, pixels a side.
        share: of the channels of each layer.

    Raises:
        NotPossibleError: torch-pruning cannot follow the network.
    """
    import torch_pruning as tp

    head = network.get_submodule("head")
    assert isinstance(head, Head)
    fold_standardisation(head)
    outputs = [layer for layer in head.layers if isinstance(layer, nn.Linear)][-1]
    example = torch.zeros(1, 3, size, size)
    network.eval()
    try:
        pruner = tp.pruner.BasePruner(
            network,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=[outputs],
            round_to=ROUND_TO,
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


def fold_standardisation(head: Head) -> None:
    """Moves the head's mean and deviation into its first layer, so that its inputs are plain features; same answers."""
    first = next(layer for layer in head.layers if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight.div_(head.std)
        first.bias.sub_(first.weight @ head.mean)
    head.mean, head.std = torch.zeros_like(head.mean), torch.ones_like(head.std)


def _on_pixels(settings: Model) -> Model:
    """Settings whose prepared inputs are pixels."""
    if not isinstance(settings, FrozenModel):
        return settings
    return FinetunedModel(
        kind="finetuned", backbone=settings.backbone, weights=settings.weights, input_size=settings.input_size,
        crop_pct=settings.crop_pct, head_on=settings.head_on,
    )  # fmt: skip


def _renamed(key: str, prefixes: dict[str, str]) -> str:
    found = next(prefix for prefix in prefixes if key.startswith(prefix))
    return prefixes[found] + key.removeprefix(found)
