"""Networks that are trained here: layers and gradients against torch's own, hand counts and finite steps."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pipeline_steps.vision.networks import CustomCnn, Head

STUDY = [(64, 5, 1, "valid"), (64, 5, 2, "same"), (64, 3, 2, "same"), (128, 3, 2, "valid")]


def pixels(n: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def macs_by_layer(network: nn.Module, size: int) -> list[int]:
    """Of each convolution of a CNN on the meta device."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size, device="meta"))
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    return [sum(counter.flop_counts[f"CustomCnn.{name}"].values()) // 2 for name in names]


def test_valid_padding_makes_the_second_convolution_of_the_study_as_large_as_published() -> None:
    """224 pixels less 4 are 220: 220 x 220 places, 5 x 5 x 64 weights for each of 64 filters."""
    with torch.device("meta"):
        network = CustomCnn(STUDY, 26, hidden=0, dropout=0.0, batch_norm=False)
    found = macs_by_layer(network, 224)
    assert found[1] == 4_956_160_000
    assert found == [
        220 * 220 * 5 * 5 * 3 * 64,
        220 * 220 * 5 * 5 * 64 * 64,
        110 * 110 * 3 * 3 * 64 * 64,
        53 * 53 * 3 * 3 * 64 * 128,
    ]


def test_blocks_are_those_of_torch_in_their_order() -> None:
    torch.manual_seed(0)
    network = CustomCnn([(4, 3, 1, "valid"), (6, 3, 2, "same")], 3, hidden=0, dropout=0.0, batch_norm=False)
    state = network.state_dict()
    x = (pixels(2, 12) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    x = functional.relu(functional.conv2d(x, state["body.0.weight"], state["body.0.bias"]))
    assert x.shape[-1] == 10
    x = functional.relu(functional.conv2d(x, state["body.2.weight"], state["body.2.bias"], padding=1))
    x = functional.max_pool2d(x, 2).mean((2, 3))
    expected = x @ state["head.layers.1.weight"].T + state["head.layers.1.bias"]
    torch.testing.assert_close(network(pixels(2, 12)), expected, rtol=1e-4, atol=1e-5)


def test_a_cnn_of_before_has_the_same_names_and_the_same_random_weights() -> None:
    """As it was built when padding and batch norm could not be chosen."""
    torch.manual_seed(5)
    before = nn.Sequential(
        nn.Conv2d(3, 4, 5, padding="same", bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    head = nn.Linear(6, 3)
    torch.manual_seed(5)
    network = CustomCnn([(4, 5, 2), (6, 3, 1)], 3, hidden=0, dropout=0.0)
    assert str(network.body) == str(before)
    found = network.state_dict()
    expected = {f"body.{name}": value for name, value in before.state_dict().items()}
    expected |= {f"head.layers.1.{name}": value for name, value in head.state_dict().items()}
    assert found.keys() - expected.keys() == {"pixel_mean", "pixel_std", "head.mean", "head.std"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_gradients_of_a_linear_head_are_those_of_softmax_regression() -> None:
    """(p - y) x / n for the weights, (p - y) / n for the biases (Bishop 2006, 4.109)."""
    torch.manual_seed(0)
    head, x, truth = Head(4, 3, hidden=0, dropout=0.0).double(), torch.randn(7, 4).double() * 3 + 1, torch.arange(7) % 3
    head.standardise_by(x)
    functional.cross_entropy(head(x), truth).backward()
    z = (x - x.mean(0)) / x.std(0)
    p = (z @ head.layers[1].weight.T + head.layers[1].bias).softmax(1)
    error = (p - functional.one_hot(truth, 3)) / len(x)
    torch.testing.assert_close(head.layers[1].weight.grad, error.T @ z)
    torch.testing.assert_close(head.layers[1].bias.grad, error.sum(0))


def test_the_gradients_of_a_hidden_layer_are_those_of_finite_steps() -> None:
    torch.manual_seed(0)
    head, x = Head(4, 3, hidden=5, dropout=0.5).double().eval(), torch.randn(6, 4, dtype=torch.float64)
    head.standardise_by(x)
    names = [name for name, _ in head.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in head.parameters()]
    assert len(values) == 4

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(head, dict(zip(names, weights, strict=True)), (x,))
        return functional.cross_entropy(logits, torch.arange(6) % 3)

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_convolutions_have_a_bias_only_without_batch_norm(batch_norm: bool) -> None:
    network = CustomCnn([(4, 3, 2)], 3, hidden=0, dropout=0.0, batch_norm=batch_norm)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()) == batch_norm
    assert (network.body[0].bias is None) == batch_norm
