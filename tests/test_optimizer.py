"""Optimizers, learning rates and layer scales against torch's own, timm's own and tables by hand."""

import io
import math
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from pipeline_steps.errors import PleatError
from pipeline_steps.vision.networks import CustomCnn, Head
from pipeline_steps.vision.optimizer import (
    CosineDecay,
    Decay,
    OneCycle,
    Optimization,
    StepDecay,
    build,
    check_optimizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DECAYS = [OneCycle(), StepDecay(2, 0.8), CosineDecay(1)]
NOT_HERE = ("fused", "bnb", "adahessian", "kron", "kronc", "kronw")  # other packages, second derivatives
USABLE = [name for name in timm.optim.list_optimizers() if not name.startswith(NOT_HERE)]


class FineTuned(nn.Module):
    """A timm network with a head, as it is trained on."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = timm.create_model(name, num_classes=0)
        self.head = Head(self.body.num_features, 3, hidden=4, dropout=0.0)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


def cnn() -> CustomCnn:
    torch.manual_seed(1)
    return CustomCnn([(4, 3, 2), (4, 3, 2)], 3, hidden=0, dropout=0.0)


def how(optimizer: str = "adamw", decay: Decay = OneCycle(), layer_decay: float = 1.0, max_epochs: int = 6):  # noqa: B008
    return Optimization(optimizer, 0.01, 0.05, layer_decay, decay, max_epochs)


def train(network: nn.Module, optimizer, schedule, n_steps: int) -> None:
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 8, 8), generator=noise).float()
    for _ in range(n_steps):
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(network(pixels), torch.arange(6) % 3).backward()
        optimizer.step()
        schedule.step()


def rates(decay: Decay, max_epochs: int, steps_an_epoch: int, **more) -> list[list[float]]:
    """Of each group, at each step."""
    network = more.pop("network", None) or cnn()
    optimizer, schedule = build(network, how(decay=decay, max_epochs=max_epochs, **more), steps_an_epoch)
    seen = []
    for _ in range(max_epochs * steps_an_epoch):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return [list(group) for group in zip(*seen, strict=True)]


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_adamw_with_one_cycle_takes_the_very_steps_of_torch() -> None:
    ours, theirs = cnn(), cnn()
    train(ours, *build(ours, how(), 4), 24)
    optimizer = torch.optim.AdamW(theirs.parameters(), 0.01, weight_decay=0.05, fused=True)
    train(theirs, optimizer, OneCycleLR(optimizer, 0.01, total_steps=24, pct_start=0.2), 24)
    assert_equal_weights(ours, theirs)
    assert not torch.equal(ours.body[0].weight, cnn().body[0].weight)


@pytest.mark.parametrize("name", ["adam", "sgd", "momentum", "radamw", "lamb", "lion"])
def test_the_updates_are_those_of_the_optimizer_itself(name: str) -> None:
    own = {
        "adam": lambda weights: torch.optim.Adam(weights, 0.01, weight_decay=0.05, fused=True),
        "sgd": lambda weights: torch.optim.SGD(weights, 0.01, momentum=0.9, weight_decay=0.05, nesterov=True),
        "momentum": lambda weights: torch.optim.SGD(weights, 0.01, momentum=0.9, weight_decay=0.05),
        "radamw": lambda weights: torch.optim.RAdam(weights, 0.01, weight_decay=0.05, decoupled_weight_decay=True),
        "lamb": lambda weights: timm.optim.Lamb(weights, 0.01, weight_decay=0.05),
        "lion": lambda weights: timm.optim.Lion(weights, 0.01, weight_decay=0.05),
    }[name]
    ours, theirs = cnn(), cnn()
    train(ours, *build(ours, how(name, StepDecay(2, 0.8)), 3), 18)
    optimizer = own(theirs.parameters())
    train(theirs, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.8), 18)
    assert_equal_weights(ours, theirs)


def test_one_cycle_moves_the_momentum_of_other_optimizers_too() -> None:
    ours, theirs = cnn(), cnn()
    train(ours, *build(ours, how("sgd"), 4), 24)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.01, momentum=0.9, weight_decay=0.05, nesterov=True)
    train(theirs, optimizer, OneCycleLR(optimizer, 0.01, total_steps=24, pct_start=0.2), 24)
    assert_equal_weights(ours, theirs)


@pytest.mark.parametrize("n_steps", [1, 2, 4, 5, 6, 25])
def test_one_cycle_rises_and_falls_within_however_few_steps(n_steps: int) -> None:
    """Five steps are where torch divides by zero: a fifth of them ends on the first."""
    (found,) = rates(OneCycle(), n_steps, 1)
    if n_steps >= 5:
        assert found[0] == pytest.approx(0.01 / 25)
        assert found[-1] == pytest.approx(0.01 / 25e4)
        assert max(found) > 0.8 * 0.01
    assert len(found) == n_steps


def test_step_decay_against_a_table() -> None:
    """Rate 0.01, times 0.8 every 2 epochs of 3 steps."""
    (found,) = rates(StepDecay(2, 0.8), 7, 3)
    assert found == pytest.approx([0.01] * 6 + [0.008] * 6 + [0.0064] * 6 + [0.00512] * 3)


def test_cosine_decay_against_its_formula() -> None:
    (found,) = rates(CosineDecay(2), 6, 4)
    rising = [0.01 * step / 8 for step in range(8)]
    falling = [0.01 * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(16)]
    assert found == pytest.approx(rising + falling)


@pytest.mark.parametrize("decay", [StepDecay(3, 0.5), CosineDecay(0), CosineDecay(2), CosineDecay(5), CosineDecay(9)])
@pytest.mark.parametrize("steps", [1, 7])
def test_decays_against_those_of_timm(decay: Decay, steps: int) -> None:
    optimizer = torch.optim.SGD(cnn().parameters(), 0.01)
    if isinstance(decay, StepDecay):
        theirs = StepLRScheduler(optimizer, decay.every_epochs * steps, decay.rate, t_in_epochs=False)
    else:
        warm, falling = decay.warmup_epochs * steps, max(5 - decay.warmup_epochs, 1) * steps
        theirs = CosineLRScheduler(optimizer, falling, warmup_t=warm, warmup_prefix=True, t_in_epochs=False)
    expected = []
    for step in range(5 * steps):
        theirs.step_update(step)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(decay, 5, steps) == [pytest.approx(expected)]


@pytest.mark.parametrize("decay", DECAYS, ids=lambda decay: type(decay).__name__)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_group_follows_the_decay_at_its_own_scale(decay: Decay, optimizer: str) -> None:
    (whole,) = rates(decay, 4, 5)
    groups = rates(decay, 4, 5, network=FineTuned("test_resnet"), layer_decay=0.5, optimizer=optimizer)
    scales = Counter(round(max(group) / max(whole), 6) for group in groups)
    # Head, four stages of one block, stem: each once with weight decay and once without.
    assert scales == dict.fromkeys([1, 0.5, 0.25, 0.125, 0.0625, 0.03125], 2)
    for group in groups:
        assert group == pytest.approx([rate * max(group) / max(whole) for rate in whole])


def scales_and_decays(network: nn.Module, layer_decay: float) -> dict[str, tuple[float, float]]:
    """Of each parameter; fails where one is in no group or in two."""
    optimizer, _ = build(network, how(decay=StepDecay(1, 1.0), layer_decay=layer_decay), 5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = [
        (names[id(parameter)], (group["lr"] / 0.01, group["weight_decay"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


def test_layers_of_a_resnet_counted_by_hand() -> None:
    network = FineTuned("resnet18")
    network.body.requires_grad_(False)  # as in the first epochs; nothing may be lost
    for name, (scale, decay) in scales_and_decays(network, 0.5).items():
        place = name.split(".")
        if place[0] == "head":
            layers_below_the_head = 0
        elif place[1].startswith("layer"):  # of layer1.0 to layer4.1, two blocks each
            layers_below_the_head = 8 - (2 * (int(place[1][5:]) - 1) + int(place[2]))
        else:
            layers_below_the_head = 9
        assert scale == pytest.approx(0.5**layers_below_the_head), name
        norm_or_bias = place[-1] == "bias" or "bn" in name or "downsample.1" in name
        assert decay == (0.0 if norm_or_bias else 0.05), name


# Vision transformers have no decay on positions, ConvNeXt and EfficientNet have a last layer beside the classifier, and
# poolformer has no patterns for its layers.
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_resnet", "poolformer_s12"])
@pytest.mark.parametrize("layer_decay", [0.7, 1.0])
def test_the_body_learns_as_timm_lets_it_learn_below_its_own_classifier(name: str, layer_decay: float) -> None:
    with torch.device("meta"):
        whole, network = timm.create_model(name, num_classes=3), FineTuned(name)
    exempt = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()
    groups = timm.optim.param_groups_layer_decay(whole, 0.05, exempt, layer_decay=layer_decay)
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    expected = {
        names[id(parameter)]: pytest.approx((group["lr_scale"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    }
    found = scales_and_decays(network, layer_decay)
    for name in found:
        if name.startswith("body."):
            assert found[name] == expected[name.removeprefix("body.")], name
        else:
            assert found[name] == (1, 0.05 if name.endswith("weight") else 0), name


def test_other_networks_decay_everywhere_and_know_no_layers() -> None:
    network = cnn()
    network.body.requires_grad_(False)
    assert set(scales_and_decays(network, 1.0).values()) == {(1, 0.05)}
    with pytest.raises(ValueError, match="timm network"):
        build(cnn(), how(layer_decay=0.5), 5)


@pytest.mark.parametrize("name", USABLE)
def test_every_optimizer_resumes_exactly_and_takes_up_layers_late(name: str) -> None:
    """The first layers require no gradient in the first steps, and the state goes through a file of weights only."""
    decay = DECAYS[USABLE.index(name) % 3]
    undisturbed, resumed = cnn(), cnn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, schedule = build(undisturbed, how(name, decay), 2)
        undisturbed.body.requires_grad_(False)
        train(undisturbed, optimizer, schedule, 3)
        assert torch.equal(undisturbed.body[0].weight, cnn().body[0].weight)
        undisturbed.body.requires_grad_(True)
        train(undisturbed, optimizer, schedule, 2)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (undisturbed, optimizer, schedule)], file)
        train(undisturbed, optimizer, schedule, 3)
        assert not torch.equal(undisturbed.body[0].weight, cnn().body[0].weight)

        file.seek(0)
        parts = (resumed, *build(resumed, how(name, decay), 2))
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        train(*parts, 3)
    assert_equal_weights(undisturbed, resumed)


@pytest.mark.parametrize("decay", DECAYS, ids=lambda decay: type(decay).__name__)
def test_layer_rates_are_resumed_exactly(decay: Decay) -> None:
    network = FineTuned("test_resnet")
    optimizer, schedule = build(network, how(decay=decay, layer_decay=0.5), 2)
    train(network, optimizer, schedule, 5)
    states = [optimizer.state_dict(), schedule.state_dict()]
    again, schedule_again = build(FineTuned("test_resnet"), how(decay=decay, layer_decay=0.5), 2)
    again.load_state_dict(states[0])
    schedule_again.load_state_dict(states[1])
    for _ in range(6):
        for one, other in zip(optimizer.param_groups, again.param_groups, strict=True):
            assert (one["lr"], one["betas"], one["weight_decay"]) == (
                other["lr"],
                other["betas"],
                other["weight_decay"],
            )
        for part in (optimizer, schedule, again, schedule_again):
            part.step()


def test_a_wrong_name_is_answered_with_near_ones() -> None:
    for name in ("adamw", "lamb", "nesterov", *USABLE):
        check_optimizer(name)
    for wrong, near in {"adamm": "adam", "AdamW": "adamw", "sdg": "sgd", "my_adam": "adam"}.items():
        with pytest.raises(PleatError, match=rf"named '{wrong}'; near names: .*\b{near}\b"):
            check_optimizer(wrong)
    with pytest.raises(PleatError, match="near names: none"):
        build(cnn(), how("xyzxyz"), 5)


@pytest.mark.parametrize(
    ("name", "needs"),
    [("bnbadam8bit", "bitsandbytes"), ("fusedlamb", "apex"), ("kron", "opt_einsum"), ("adahessian", "second")],
)
def test_what_needs_more_than_is_here_is_refused_at_once(name: str, needs: str) -> None:
    with pytest.raises(PleatError, match=needs):
        check_optimizer(name)


def test_adamw_imports_neither_timm_nor_the_compiler() -> None:
    code = """
import sys, torch
from pipeline_steps.vision import optimizer as o
from pipeline_steps.vision.networks import Head
o.check_optimizer("adamw")
for decay in (o.OneCycle(), o.StepDecay(1, 0.5), o.CosineDecay(1)):
    head = Head(4, 2, hidden=0, dropout=0.0)
    optimizer, schedule = o.build(head, o.Optimization("adamw", 0.01, 0.01, 1.0, decay, 3), 2)
    head(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    schedule.step()
assert not {"timm", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=Path(__file__).parents[1], check=True)
