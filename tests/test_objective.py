"""Losses, class weights and scores of one and several targets, against numpy, torch, timm and scikit-learn."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.metrics import accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from pipeline_steps.vision.losses import Asymmetric, CrossEntropy, Focal, Loss, class_weights, positive_weights
from pipeline_steps.vision.objective import Objective, Output

N, C = 40, 5
WEIGHTS = torch.tensor([0.5, 1.0, 3.0, 0.1, 7.0], dtype=torch.float64)


def logits(n_outputs: int = C) -> torch.Tensor:
    return 3 * torch.randn(N, n_outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def classes(n_classes: int = C) -> torch.Tensor:
    return torch.randint(n_classes, (N,), generator=torch.Generator().manual_seed(1))


def applies(n_classes: int = C) -> torch.Tensor:
    return torch.randint(2, (N, n_classes), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_focal_loss_agrees_with_numpy(gamma: float, weights: torch.Tensor | None) -> None:
    alpha = np.ones(C) if weights is None else weights.numpy()
    truth, p = classes().numpy(), softmax(logits().numpy(), axis=1)[range(N), classes().numpy()]
    expected = np.mean(-alpha[truth] * (1 - p) ** gamma * np.log(p))
    assert float(Focal(gamma).multiclass(logits(), classes(), weights)) == pytest.approx(expected, rel=1e-12)

    yes, p = applies().numpy() == 1, expit(logits().numpy())
    right = np.where(yes, p, 1 - p)
    expected = np.mean(-np.where(yes, alpha, 1) * (1 - right) ** gamma * np.log(right))
    assert float(Focal(gamma).multilabel(logits(), applies(), weights)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("settings", [(0.0, 4.0, 0.05), (1.0, 2.0, 0.2), (0.5, 0.5, 0.0)])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_asymmetric_loss_agrees_with_numpy(settings: tuple[float, float, float], weights: torch.Tensor | None) -> None:
    gamma_positive, gamma_negative, margin = settings
    p = expit(logits().numpy())
    shifted = np.maximum(p - margin, 0)
    positive = (1 - p) ** gamma_positive * np.log(p) * (1 if weights is None else weights.numpy())
    negative = shifted**gamma_negative * np.log(1 - shifted)
    expected = -np.mean(np.where(applies().numpy() == 1, positive, negative))
    assert float(Asymmetric(*settings).multilabel(logits(), applies(), weights)) == pytest.approx(expected, rel=1e-12)


def test_asymmetric_loss_agrees_with_timm() -> None:
    from timm.loss import AsymmetricLossMultiLabel

    theirs = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05)
    # Its versions differ in what they do over the batch, so one sample at a time.
    total = sum(float(theirs(*sample)) for sample in zip(logits().split(1), applies().split(1), strict=True))
    found = float(Asymmetric(1.0, 4.0, 0.05).multilabel(logits(), applies(), None))
    assert found == pytest.approx(total / (N * C), rel=1e-5)


def test_binary_focal_loss_agrees_with_torchvision() -> None:
    from torchvision.ops import sigmoid_focal_loss

    theirs = sigmoid_focal_loss(logits(), applies().double(), alpha=-1, gamma=2, reduction="mean")
    assert float(Focal(2.0).multilabel(logits(), applies(), None)) == pytest.approx(float(theirs))


def test_without_focus_and_margin_they_are_cross_entropies() -> None:
    expected = functional.cross_entropy(logits(), classes())
    torch.testing.assert_close(Focal(0.0).multiclass(logits(), classes(), None), expected)
    torch.testing.assert_close(CrossEntropy().multiclass(logits(), classes(), None), expected)
    for weights in (None, WEIGHTS):
        expected = functional.binary_cross_entropy_with_logits(logits(), applies().double(), pos_weight=weights)
        for loss in (CrossEntropy(), Focal(0.0), Asymmetric(0.0, 0.0, 0.0)):
            torch.testing.assert_close(loss.multilabel(logits(), applies(), weights), expected)


def test_smoothing_moves_yes_and_no_towards_a_half() -> None:
    yes, p = applies().numpy() == 1, expit(logits().numpy())
    wanted = np.where(yes, 0.95, 0.05)
    terms = -wanted * np.log(p) - (1 - wanted) * np.log(1 - p)
    assert float(CrossEntropy(0.1).multilabel(logits(), applies(), None)) == pytest.approx(terms.mean())
    expected = np.mean(np.where(yes, WEIGHTS.numpy(), 1) * terms)  # what is smoothed away from a no stays light
    assert float(CrossEntropy(0.1).multilabel(logits(), applies(), WEIGHTS)) == pytest.approx(expected)


@pytest.mark.parametrize("loss", [CrossEntropy(0.1), Focal(0.5), Focal(2.0), Asymmetric(1.0, 4.0, 0.05)], ids=repr)
def test_gradients_agree_with_finite_differences(loss: Loss) -> None:
    values = logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss.multilabel(x, applies(), WEIGHTS), values)
    if not isinstance(loss, Asymmetric):
        assert torch.autograd.gradcheck(lambda x: loss.multiclass(x, classes(), WEIGHTS), values)


@pytest.mark.parametrize("loss", [CrossEntropy(), Focal(0.5), Focal(2.0), Asymmetric(0.5, 0.5, 0.05)], ids=repr)
@pytest.mark.parametrize("size", [200.0, -200.0])
def test_certain_answers_right_or_wrong_have_finite_losses_and_gradients(loss: Loss, size: float) -> None:
    certain = (size * (2 * applies() - 1)).float().requires_grad_()
    loss.multilabel(certain, applies(), None).backward()
    assert torch.isfinite(certain.grad).all()
    if not isinstance(loss, Asymmetric):
        certain = (size * functional.one_hot(classes(), C)).float().requires_grad_()
        loss.multiclass(certain, classes(), None).backward()
        assert torch.isfinite(certain.grad).all()


def test_class_weights_agree_with_scikit_learn() -> None:
    codes = torch.tensor([0] * 7 + [1] * 2 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=codes.numpy())
    np.testing.assert_allclose(class_weights(codes, 3, "balanced"), expected, rtol=1e-6)
    np.testing.assert_allclose(class_weights(codes, 3, "inverse"), [10 / 7, 10 / 2, 10 / 1], rtol=1e-6)
    assert class_weights(codes, 3, "none") is None


def test_weights_of_positive_terms_agree_with_scikit_learn() -> None:
    for column, found in zip(applies().T.numpy(), positive_weights(applies(), "balanced"), strict=True):
        no, yes = compute_class_weight("balanced", classes=np.array([0, 1]), y=column)
        assert float(found) == pytest.approx(yes / no)
    np.testing.assert_allclose(positive_weights(applies(), "inverse"), N / applies().sum(0), rtol=1e-6)
    assert positive_weights(applies(), "none") is None


def test_weights_where_a_class_never_or_always_applies() -> None:
    assert class_weights(torch.tensor([0, 0, 2]), 4, "inverse").tolist() == [1.5, 0, 3, 0]
    always_and_never = torch.tensor([[1, 0], [1, 0], [1, 0], [1, 0]])
    assert positive_weights(always_and_never, "balanced").tolist() == [0.25, 4]
    assert positive_weights(always_and_never, "inverse").tolist() == [1, 4]


def three() -> tuple[Objective, torch.Tensor]:
    """A class of three, which of four apply, a class of two; and their codes."""
    objective = Objective((Output(False, 3), Output(True, 4), Output(False, 2)), Focal(2.0), "inverse")
    return objective, torch.cat([classes(3)[:, None], applies(4), classes(2)[:, None]], dim=1)


def test_several_targets_share_the_outputs_in_their_order() -> None:
    objective, codes = three()
    assert objective.n_outputs == 9
    values = logits(9)
    first, second, third = values[:, :3], values[:, 3:7], values[:, 7:]
    expected = np.hstack([softmax(first.numpy(), axis=1), expit(second.numpy()), softmax(third.numpy(), axis=1)])
    np.testing.assert_allclose(objective.probabilities(values), expected)

    weights = objective.weights(codes[:30])  # of the rows to learn from only
    counts = [np.bincount(codes[:30, 0]), codes[:30, 1:5].sum(0).numpy(), np.bincount(codes[:30, 5])]
    for found, count in zip(weights, counts, strict=True):
        np.testing.assert_allclose(found, 30 / count, rtol=1e-6)

    total = (
        Focal(2.0).multiclass(first, codes[:, 0], weights[0])
        + Focal(2.0).multilabel(second, codes[:, 1:5], weights[1])
        + Focal(2.0).multiclass(third, codes[:, 5], weights[2])
    )
    torch.testing.assert_close(objective.loss(values, codes, weights), total)


@pytest.mark.parametrize(
    ("score", "theirs"),
    [
        (Objective.accuracy, accuracy_score),
        (Objective.score, lambda *pair: f1_score(*pair, average="weighted", zero_division=0.0)),
    ],
    ids=["accuracy", "weighted F1"],
)
def test_scores_are_means_of_what_scikit_learn_gives_each_target(
    score: Callable[..., float], theirs: Callable[..., float]
) -> None:
    objective, codes = three()
    values = logits(9)
    values[torch.arange(N), codes[:, 0]] += 2  # better than chance
    values[:, 3:7] += 3 * (2 * codes[:, 1:5] - 1)
    pairs = [
        (codes[:, 0].numpy(), values[:, :3].argmax(1).numpy()),
        (codes[:, 1:5].numpy(), (values[:, 3:7] >= 0).numpy()),
        (codes[:, 5].numpy(), values[:, 7:].argmax(1).numpy()),
    ]
    expected = np.mean([theirs(*pair) for pair in pairs])
    assert 0.4 < expected < 0.95
    assert score(objective, objective.probabilities(values), codes) == pytest.approx(expected)


def test_logits_and_probabilities_lead_to_each_other() -> None:
    objective, _ = three()
    found = objective.probabilities(logits(9))
    torch.testing.assert_close(objective.probabilities(objective.logits(found)), found)
    certain = torch.eye(9)[:, :9]
    assert torch.isfinite(objective.logits(certain)).all()
