"""What the techniques rest on, each against a second way to the same answer."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import document, load_params
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pipeline_steps import params
from pipeline_steps.complexity.compress import int8, shared_weights
from pipeline_steps.complexity.compress.distilled import Distillation
from pipeline_steps.complexity.compress.pruned import fold_standardisation, prune
from pipeline_steps.complexity.compress.refitted import NotPossibleError
from pipeline_steps.complexity.compress.training import macs
from pipeline_steps.errors import PleatError
from pipeline_steps.package import Answering, _exported
from pipeline_steps.targets import Target
from pipeline_steps.vision.losses import CrossEntropy
from pipeline_steps.vision.networks import CustomCnn, Head
from pipeline_steps.vision.objective import Objective, Output

WEIGHTS = st_numpy.arrays(np.float32, st.integers(2, 300), elements=st.floats(-4, 4, width=32, allow_subnormal=False))


def matrix_product(weights: np.ndarray) -> onnx.ModelProto:
    """A graph that multiplies its input `x` by the weights."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("x", "y")]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model


def product(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("k", [2, 16, 64])
def test_clusters_are_as_good_as_scikit_learns(k: int) -> None:
    values = np.random.default_rng(k).standard_t(4, 3000).astype(np.float32)
    table, codes = shared_weights.cluster(values, k)
    other = KMeans(k, n_init=3, random_state=0).fit(values[:, None].astype(np.float64))
    assert ((values - table[codes]) ** 2).sum() <= 1.03 * other.inertia_


@settings(deadline=None, max_examples=30)
@given(WEIGHTS, st.integers(2, 256))
def test_every_value_stands_for_its_nearest_and_equal_weights_stay_as_they_are(values: np.ndarray, k: int) -> None:
    table, codes = shared_weights.cluster(values, k)
    assert len(table) <= k
    assert (np.diff(table) >= 0).all()
    chosen = np.abs(values - table[codes])
    nearest = np.abs(values[:, None].astype(np.float64) - table).min(axis=1)
    np.testing.assert_allclose(chosen, nearest, atol=1e-6)
    same, _ = shared_weights.cluster(np.full(5, values[0]), k)
    np.testing.assert_allclose(same, values[:1], rtol=1e-6)


@given(st.integers(2, 256), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packed_indices_take_their_bits_and_no_more(n_values: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, n_values, n).astype(np.uint8)
    planes = shared_weights.pack(codes, n_values)
    assert planes.nbytes == math.ceil(math.log2(n_values)) * math.ceil(n / 8)
    by_hand = [
        sum(((int(plane[i // 8]) >> (7 - i % 8)) & 1) << place for place, plane in enumerate(planes)) for i in range(n)
    ]
    assert by_hand == codes.tolist()


@pytest.mark.parametrize(("k", "share_of_size"), [(2, 1 / 32), (5, 3 / 32), (16, 4 / 32), (200, 8 / 32)])
def test_a_graph_with_shared_weights_answers_as_with_the_values_put_in(k: int, share_of_size: float) -> None:
    draw = np.random.default_rng(k)
    weights, x = draw.normal(size=(151, 203)).astype(np.float32), draw.normal(size=(4, 151)).astype(np.float32)
    model = matrix_product(weights)
    before = len(model.SerializeToString())
    assert shared_weights.share(model, k) == 1
    table, codes = shared_weights.cluster(weights.ravel(), k)
    np.testing.assert_allclose(product(model, x), x @ table[codes].reshape(weights.shape), rtol=1e-4, atol=1e-4)
    assert len(model.SerializeToString()) < share_of_size * before + 4 * k + 1500


def test_small_tensors_and_depthwise_convolutions_are_left_alone() -> None:
    assert shared_weights.share(matrix_product(np.ones((8, 8), np.float32)), 4) == 0
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=400)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 400, None, None]) for name in ("x", "y")]
    depthwise = from_array(np.ones((400, 1, 3, 3), np.float32), "w")
    model = helper.make_model(helper.make_graph([node], "depthwise", ends[:1], ends[1:], [depthwise]))
    assert shared_weights.share(model, 4) == 0


def test_equal_tensors_are_kept_once() -> None:
    model = matrix_product(np.eye(3, dtype=np.float32))
    model.graph.initializer.append(from_array(np.eye(3, dtype=np.float32), "v"))
    model.graph.initializer.append(from_array(2 * np.eye(3, dtype=np.float32), "u"))
    model.graph.node[0].output[0] = "half"
    model.graph.node.extend(
        [helper.make_node("MatMul", ["half", "v"], ["z"]), helper.make_node("MatMul", ["z", "u"], ["y"])]
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert int8.share_equal(model) == 1
    assert [item.name for item in model.graph.initializer] == ["w", "u"]
    np.testing.assert_array_equal(product(model, x), 2 * x)


def distillation(
    outputs: Sequence[Output], teacher: torch.Tensor, soft_share: float, temperature: float
) -> Distillation:
    return Distillation(tuple(outputs), CrossEntropy(0.0), "none", temperature, soft_share, teacher)


def test_the_distilled_loss_is_hintons() -> None:
    torch.manual_seed(0)
    teacher, logits = torch.randn(6, 4), torch.randn(3, 4)
    codes = torch.tensor([[1, 5], [0, 2], [3, 0]])  # label, and the row of the teacher
    objective = distillation([Output(False, 4)], teacher, 0.25, 3.0)
    found = objective.loss(logits, codes, objective.weights(codes))
    q = np.exp(teacher[[5, 2, 0]].numpy() / 3) / np.exp(teacher[[5, 2, 0]].numpy() / 3).sum(1, keepdims=True)
    p = np.exp(logits.numpy() / 3) / np.exp(logits.numpy() / 3).sum(1, keepdims=True)
    divergence = (q * (np.log(q) - np.log(p))).sum(1).mean()
    hard = functional.cross_entropy(logits, codes[:, 0]).item()
    assert found.item() == pytest.approx(0.75 * hard + 0.25 * 9 * divergence, rel=1e-5)
    assert objective.accuracy(torch.eye(4)[[1, 0, 2]], codes) == pytest.approx(2 / 3)


def test_the_teachers_answers_go_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = distillation([Output(False, 4)], torch.randn(6, 4), 0.5, 2.0)
    logits, codes, copied, original = torch.randn(2, 4), torch.tensor([[1, 5], [0, 2]]), [], torch.Tensor.to

    def to(tensor: torch.Tensor, *where: object) -> torch.Tensor:
        copied.append(tensor is objective.teacher)
        return original(tensor, *where)

    monkeypatch.setattr(torch.Tensor, "to", to)
    losses = [objective.loss(logits, codes, objective.weights(codes)) for _ in range(3)]
    assert sum(copied) == 1
    assert losses[0] == losses[1] == losses[2]


def test_a_distilled_loss_is_lowest_where_the_student_answers_as_the_teacher_in_every_target() -> None:
    torch.manual_seed(1)
    outputs = [Output(False, 3), Output(True, 2)]
    teacher = torch.randn(4, 5)
    codes = torch.tensor([[0, 1, 0, 2], [2, 0, 1, 3]])  # class, two labels, row
    objective = distillation(outputs, teacher, 1.0, 2.0)
    same = teacher[[2, 3]].clone().requires_grad_(True)
    loss = objective.loss(same, codes, objective.weights(codes))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-6
    assert objective.loss(same.detach() + torch.eye(5)[:2], codes, objective.weights(codes)).item() > 0.01
    alone, plain = distillation(outputs, teacher, 0.0, 2.0), Objective(tuple(outputs), CrossEntropy(0.0), "none")
    assert alone.loss(same, codes, alone.weights(codes)) == plain.loss(
        same, codes[:, :-1], plain.weights(codes[:, :-1])
    )


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([0, 12]))
def test_pruning_takes_channels_that_do_nothing_and_keeps_the_answers(seed: int, batch_norm: bool, hidden: int) -> None:
    torch.manual_seed(seed)
    network = CustomCnn([(16, 3, 2), (32, 3, 1)], 5, hidden, 0.1, batch_norm).eval()
    network.head.mean, network.head.std = torch.rand(32), torch.rand(32) + 0.5
    idle = [torch.randperm(16)[:8], torch.randperm(32)[:16]]
    convolutions = [layer for layer in network.body if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in network.body if isinstance(layer, nn.BatchNorm2d)]
    with torch.no_grad():
        for layer, channels in zip(convolutions, idle, strict=True):
            layer.weight[channels] = 0
            if layer.bias is not None:
                layer.bias[channels] = 0
        convolutions[1].weight[:, idle[0]] = 0
        for norm, channels in zip(norms, idle, strict=False):
            norm.weight[channels] = norm.bias[channels] = 0
        first, *rest = [layer for layer in network.head.layers if isinstance(layer, nn.Linear)]
        for last in rest:
            units = torch.randperm(hidden)[: hidden // 2]
            first.weight[units] = first.bias[units] = 0
            last.weight[:, units] = 0
        # What is constant 0 counts only by the head's mean; let that be nothing too.
        network.head.mean[idle[1]] = 0
        first.weight[:, idle[1]] = 0
    pixels = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)
    with torch.no_grad():
        before = network(pixels)
    assert prune(network, 12, 0.5) == (48 + hidden, 24 + hidden // 2)
    with torch.no_grad():
        after = network(pixels)
    assert [layer.out_channels for layer in network.body if isinstance(layer, nn.Conv2d)] == [8, 16]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("filters", "share", "left"),
    [([12, 12], 0.5, [6, 6]), ([16, 32], 0.1, [14, 28]), ([20, 10], 0.25, [15, 7]), ([3, 20], 0.75, [3, 5])],
)
def test_pruning_removes_the_share_that_is_asked_for(filters: list[int], share: float, left: list[int]) -> None:
    """Rounded up to whole channels, to no multiple of anything; where none would stay, none goes."""
    torch.manual_seed(0)
    network = CustomCnn([(n, 3, 2) for n in filters], 3, 0, 0.0, True)
    assert prune(network, 12, share) == (sum(filters), sum(left))
    assert [layer.out_channels for layer in network.body if isinstance(layer, nn.Conv2d)] == left


def test_a_network_of_single_channels_loses_none() -> None:
    assert prune(CustomCnn([(1, 3, 2), (1, 3, 2)], 3, 0, 0.0, True), 12, 0.3) == (2, 2)


def test_a_network_costs_what_torchs_own_counter_says() -> None:
    network = CustomCnn([(5, 3, 2), (9, 3, 1)], 3, 7, 0.0, True).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 18, 18, dtype=torch.uint8))
    assert macs(network, 18) == counter.get_total_flops() // 2


def test_folding_the_heads_standardisation_changes_no_answer() -> None:
    head = Head(7, 3, 0, 0.0).eval()
    head.standardise_by(torch.randn(50, 7) * 3 + 2)
    features = torch.randn(4, 7)
    before = head(features)
    fold_standardisation(head)
    torch.testing.assert_close(head(features), before, atol=1e-5, rtol=1e-5)
    assert head.mean.abs().max() == 0


def test_a_network_that_cannot_be_followed_is_refused_in_a_sentence() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 16, 3), Head(16, 2, 0, 0.0)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(pixels.float()).view(len(pixels), 16, -1).mean(2))  # 16 stays when 8 are left

    with pytest.raises(NotPossibleError, match=r"^torch-pruning cannot follow this network"):
        prune(Odd(), 8, 0.5)


@pytest.mark.parametrize(
    ("techniques", "candidate", "sentence"),
    [
        ({"a": {"kind": "int8", "of": "b"}, "b": {"kind": "int8"}}, None, "a.of 'b', which must be a technique listed"),
        ({"a": {"kind": "int8"}, "b": {"kind": "int8", "of": "a"}}, None, "b.of 'a', which is in 8 bits already"),
        (
            {"a": {"kind": "int8"}, "b": {"kind": "shared_weights", "clusters": 4, "of": "a"},
             "c": {"kind": "int8", "of": "b"}}, None, "c.of 'b', which is in 8 bits already",
        ),
        ({"a": {"kind": "int4"}}, None, "`compress.techniques.a.kind` must be 'int8', .* but got 'int4'"),
        ({"a": {"kind": "int8", "bits": 8}}, None, "unknown key `compress.techniques.a.bits`"),
        ({"a": {"kind": "pruned", "epochs": 1}}, None, "`compress.techniques.a.share` is missing"),
        ({"a": {"kind": "pruned", "share": 1.0, "epochs": 1}}, None, "techniques.a.share` must be less than 1"),
        ({"a": {"kind": "shared_weights", "clusters": 257}}, None, "a.clusters` must be at most 256, but got 257"),
        ({"a": {"kind": "distilled", "student": "nobody"}}, None, "a.student` is 'nobody', but `models` defines"),
        ({"refitted": {"kind": "int8"}}, None, "names 'refitted', which is the model that all of them are made from"),
        ({"index.html": {"kind": "int8"}}, None, "names 'index.html', but .* so use a name without dots"),
        ({"a/b": {"kind": "int8"}}, None, "every name in `compress.techniques` must be letters"),
        ({"a": {"kind": "int8"}}, "b", "`compress` has candidate 'b', but its techniques are a"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_with_their_key(techniques: dict, candidate: str | None, sentence: str) -> None:
    with pytest.raises(PleatError, match=sentence):
        load_params({"compress": {"techniques": techniques, "candidate": candidate}})


@pytest.mark.parametrize(
    ("student", "training", "sentence"),
    [
        ({}, {"loss": {"kind": "asymmetric", "gamma_positive": 0.0, "gamma_negative": 4.0, "margin": 0.05},
              "label_smoothing": 0.0},
         "`training.student.loss.kind` is 'asymmetric', which is for multilabel targets only"),
        ({"kind": "frozen", "backbone": "test_vit", "weights": None}, {"augment": {"mixup": 0.2}},
         "`training.student.augment` changes pixels, but models.student is frozen"),
    ],
)  # fmt: skip
def test_students_are_checked_as_the_models_of_the_experiment(student: dict, training: dict, sentence: str) -> None:
    settings = document()
    model = settings["experiment"]["models"][0]
    settings["models"]["student"] = student or settings["models"][model]
    settings["training"]["student"] = settings["training"][model] | training
    params.check(settings, "params.yaml")  # what nothing trains is not judged
    settings["compress"] = {"techniques": {"taught": {"kind": "distilled", "student": "student"}}, "candidate": None}
    with pytest.raises(PleatError, match=sentence):
        params.check(settings, "params.yaml")


def test_the_exported_mobilenet_answers_real_photos_as_torch_does(real_data: Path) -> None:
    from pipeline_steps.vision.backbones import load_backbone

    torch.manual_seed(0)
    backbone, seen = load_backbone("mobilenetv2_100", real_data / "weights" / "mobilenetv2_100.safetensors")
    network = nn.Sequential(backbone, Head(1280, 17, 0, 0.0))
    answering = Answering(network, [Target("label", False, ["label"], [str(code) for code in range(17)])], mirror=True)
    paths = sorted((real_data / "data" / "clothing" / "images").iterdir())[:9]
    pixels = torch.stack([seen((path.read_bytes(), True)) for path in paths])
    with torch.no_grad():
        expected = answering(pixels)[0].numpy()
    session = onnxruntime.InferenceSession(_exported(answering, seen.crop), providers=["CPUExecutionProvider"])
    for size in (1, 4, 9):
        parts = [session.run(None, {"pixels": part.numpy()})[0] for part in pixels.split(size)]
        np.testing.assert_allclose(np.concatenate(parts), expected, atol=2e-5)
    assert expected.std(axis=0).max() > 1e-3, "answers differ from photo to photo"
