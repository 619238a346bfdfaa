"""Optimizers and learning rates: torch's AdamW without torch's compiler, and whatever else timm has.

torch.optim imports torch._dynamo at the first use of an optimizer, only to exempt it from compilation. That takes 1 to
2 s in each fold's process, as long as training a head. Nothing here is compiled, so AdamW does without. All other
optimizers come from timm, whose import takes another 4 s.
"""

import inspect
import math
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from pipeline_steps.errors import PleatError

RateSchedule = LRScheduler  # step() after each step of the optimizer


@dataclass(frozen=True)
class OneCycle:
    """Up over the first fifth of the steps, then down along a cosine (Smith & Topin 2018); momentum goes the other way.

    Small networks trained from scratch on few images gain a lot from the warm-up (docs/decisions.md).
    """


@dataclass(frozen=True)
class StepDecay:
    """Times `rate` after every `every_epochs` epochs; timm's `step`."""

    every_epochs: int
    rate: float


@dataclass(frozen=True)
class CosineDecay:
    """Up in a line from 0 over `warmup_epochs`, then from there down along a cosine to 0 at the end of the last epoch.

    timm's `cosine` on updates, with `warmup_prefix`, without which the rate would jump down after the warm-up.
    """

    warmup_epochs: int


Decay = OneCycle | StepDecay | CosineDecay


@dataclass(frozen=True)
class Optimization:
    """How weights follow their gradients.

    Attributes:
        optimizer: a name that `check_optimizer` lets pass.
        layer_decay: factor of the learning rate from each layer to the one below it; 1: the same for all.
        max_epochs: what the decay is spread over, however many epochs are trained.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    layer_decay: float
    decay: Decay
    max_epochs: int


class EagerAdamW(AdamW):
    """torch.optim.AdamW, same arguments and same arithmetic; must not be used inside torch.compile."""

    # The function below the decorator that imports the compiler; all else that it does is to switch gradients off.
    step = torch.no_grad()(AdamW.step.__wrapped__)  # type: ignore[attr-defined]


for _method in vars(Optimizer).values():
    _plain = getattr(_method, "__wrapped__", None)
    if _plain is not None:
        # torch keeps here what it calls instead, once it has asked the compiler for an exempted version.
        _plain.__dynamo_disable = _plain


def check_optimizer(name: str) -> None:
    """Checks that `build` can make an optimizer of this name; imports timm for any other than adamw.

    Raises:
        PleatError: timm does not know it, or it needs what is not here.
    """
    if name == "adamw":
        return
    from timm.optim import get_optimizer_info, list_optimizers

    names = list_optimizers()
    if name not in names:  # timm itself would look only at what follows the last underscore
        near = get_close_matches(name.lower(), names, n=5)
        raise PleatError(f"timm knows no optimizer named '{name}'; near names: {', '.join(near) or 'none'}.")
    info = get_optimizer_info(name)
    if info.second_order:
        raise PleatError(f"The optimizer {name} needs second derivatives, which are not computed; choose another.")
    # timm names classes of other packages by a text. Its kron calls itself unusable without opt_einsum.
    package = (
        info.opt_class.split(".")[0] if isinstance(info.opt_class, str) else "opt_einsum" if "kron" in name else ""
    )
    if package:
        raise PleatError(f"The optimizer {name} needs {package}, which Pleat does not come with; choose another.")


def build(network: nn.Module, how: Optimization, steps_an_epoch: int) -> tuple[Optimizer, RateSchedule]:
    """The optimizer of all of a network's parameters, and what changes its learning rates.

    Parameters are taken whether they require gradients now or only in later epochs; without a gradient, a step leaves
    them as they are. Weight decay acts on all of them; in a network with a timm network as its `body`, as in timm, not
    on biases, norms and what the body names in `no_weight_decay`.

    To resume, load the state of both into what the same arguments build.

    Args:
        network: already on its device. With a timm `body`, all other parameters are counted as its classifier: the top
            layer, which learns at the full rate.
        steps_an_epoch: how often the optimizer steps in one epoch.

    Raises:
        PleatError: as `check_optimizer`.
        ValueError: a layer decay for a network without a timm body.
    """
    check_optimizer(how.optimizer)
    optimizer = _optimizer(_groups(network, how), how)
    if isinstance(how.decay, OneCycle):
        steps = how.max_epochs * steps_an_epoch
        return optimizer, OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=steps,
            pct_start=0.2 if steps != 5 else 0.21,  # a fifth of 5 steps ends on the first one: torch divides by 0
            cycle_momentum="betas" in optimizer.defaults or "momentum" in optimizer.defaults,
        )
    decay = how.decay
    return optimizer, LambdaLR(optimizer, lambda step: _share(decay, step / steps_an_epoch, how.max_epochs))


def _optimizer(groups: list[dict[str, Any]], how: Optimization) -> Optimizer:
    if how.optimizer == "adamw":
        return EagerAdamW(groups, how.learning_rate, weight_decay=how.weight_decay, fused=True)
    from timm.optim import create_optimizer_v2, get_optimizer_class

    kind = get_optimizer_class(how.optimizer, bind_defaults=False)
    # torch's fused SGD fails where some parameters get their first gradient later than others.
    fused = {"fused": True} if kind is not SGD and "fused" in inspect.signature(kind).parameters else {}
    return create_optimizer_v2(groups, how.optimizer, how.learning_rate, how.weight_decay, **fused)


def _groups(network: nn.Module, how: Optimization) -> list[dict[str, Any]]:
    """Parameters by their learning rate and weight decay.

    timm's param_groups_layer_decay of the body with its classifier gives the same, but leaves out parameters that do
    not require gradients at the time.
    """
    body: Any = getattr(network, "body", None)
    if not hasattr(body, "pretrained_cfg"):
        if how.layer_decay != 1:
            raise ValueError("layer_decay needs a network with a timm network as its body")
        return [{"params": list(network.parameters())}]
    from timm.models import group_parameters
    from timm.optim import auto_group_layers

    # timm finds layers by name, so whatever is not the body's is named like the classifier in whose place it is.
    classifier = body.pretrained_cfg.get("classifier") or "~"
    place = classifier if isinstance(classifier, str) else classifier[0]
    named = [
        (name.removeprefix("body.") if name.startswith("body.") else f"{place}.{name}", parameter)
        for name, parameter in network.named_parameters()
    ]
    whole: Any = SimpleNamespace(named_parameters=lambda: named, pretrained_cfg={"classifier": classifier})
    if hasattr(body, "group_matcher"):
        layers = group_parameters(whole, body.group_matcher(coarse=False), reverse=True)
    else:
        layers = auto_group_layers(whole)
    top = max(layers.values())
    exempt = body.no_weight_decay() if hasattr(body, "no_weight_decay") else ()
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in named:
        rate = how.learning_rate * how.layer_decay ** (top - layers.get(name, top))
        decays = parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in exempt)
        groups.setdefault((rate, how.weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _share(decay: StepDecay | CosineDecay, epochs: float, max_epochs: int) -> float:
    """Of the highest learning rate, after so many epochs."""
    if isinstance(decay, StepDecay):
        return decay.rate ** (epochs // decay.every_epochs)
    if epochs < decay.warmup_epochs:
        return epochs / decay.warmup_epochs
    falling = (epochs - decay.warmup_epochs) / max(max_epochs - decay.warmup_epochs, 1)
    return (1 + math.cos(math.pi * min(falling, 1.0))) / 2
