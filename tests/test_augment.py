"""Augmentation against torchvision, Pillow, SciPy and hand-made cases; what it draws comes from one generator alone."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import beta, ks_2samp, kstest
from torch.nn import functional
from torchvision.transforms import v2

from pipeline_steps.vision import augment
from pipeline_steps.vision.augment import Augmentation
from pipeline_steps.vision.losses import Asymmetric, CrossEntropy

SHAPES = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
ALL = Augmentation(min_crop=0.3, operations=2, magnitude=9, mixup=0.4, cutmix=1.0)


def images(n: int, size: int = 48) -> torch.Tensor:
    """Smooth noise over the whole range, so that a shift by part of a pixel shows but does not jump."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 1.4 - 0.2
    smooth = functional.interpolate(coarse, (size, size), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).to(torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def furthest(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def library(image: torch.Tensor, name: str, magnitude: int, sign: int) -> torch.Tensor:
    """What torchvision's own RandAugment makes of images for an operation."""
    transform = v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR, fill=augment.GREY)
    strengths, _ = transform._AUGMENTATION_SPACE[name]
    found = strengths(31, *image.shape[-2:])
    strength = 0.0 if found is None else sign * float(found[magnitude])
    return transform._apply_image_or_video_transform(image, name, strength, transform.interpolation, transform._fill)


def test_without_settings_nothing_is_drawn_and_the_pixels_are_the_same_object() -> None:
    pixels, random = images(3), generator()
    before = random.get_state()
    assert Augmentation().views(pixels, random) is pixels
    mixed, mixture = Augmentation().mixed(pixels, random)
    assert mixed is pixels
    assert mixture is None
    assert torch.equal(random.get_state(), before)


@pytest.mark.parametrize("n", [1, 7, 32])
def test_equal_states_give_equal_bits_and_torchs_and_numpys_own_draws_have_no_part(n: int) -> None:
    pixels = images(n)
    original = pixels.clone()
    results = []
    for seed in (1, 2):  # of the global generators
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        random, steps = generator(4), []
        for _ in range(6):
            mixed, mixture = ALL.mixed(ALL.views(pixels, random), random)
            assert mixed.shape == pixels.shape
            assert mixed.dtype == torch.uint8
            steps.append((mixed, mixture.partners, mixture.share))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        results.append(steps)
    assert torch.equal(pixels, original)
    for (one, partners, share), (other, others, same) in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(partners, others)
        assert share == same
    shares = {share for _, _, share in results[0]}
    assert len(shares) == 6  # the generator moves on


def test_a_generator_taken_up_again_goes_on_with_the_same_bits() -> None:
    pixels, random = images(5), generator()
    ALL.mixed(ALL.views(pixels, random), random)
    state = random.get_state()
    expected, _ = ALL.mixed(ALL.views(pixels, random), random)
    resumed = generator(99)
    resumed.set_state(state)
    assert torch.equal(ALL.mixed(ALL.views(pixels, resumed), resumed)[0], expected)


@pytest.mark.parametrize("crop", [augment.crop_one_by_one, augment.crop_at_once])
def test_a_crop_is_torchvisions_resized_crop(crop) -> None:
    boxes = [(0, 0, 48, 48), (0, 0, 20, 31), (28, 17, 20, 31), (5, 9, 1, 1), (47, 0, 1, 48), (11, 3, 33, 40)]
    pixels = images(len(boxes))
    found = crop(pixels, torch.tensor(boxes, dtype=torch.float64))
    for image, done, (left, top, width, height) in zip(pixels, found, boxes, strict=True):
        expected = v2.functional.resized_crop(image, top, left, height, width, [48, 48], antialias=False)
        assert furthest(done, expected) <= 1
    assert torch.equal(found[0], pixels[0])


@pytest.mark.parametrize("min_area", [0.08, 0.6, 0.95])
def test_boxes_are_drawn_as_torchvision_draws_them(min_area: float) -> None:
    left, top, width, height = augment.random_boxes(2000, 200, min_area, generator()).numpy().T
    assert (min(left.min(), top.min()), max((left + width).max(), (top + height).max())) == (0, 200)
    area, aspect = width * height / 200**2, width / height
    assert area.min() > min_area - 0.01  # sides are whole pixels
    assert aspect.min() > 3 / 4 - 0.03
    assert aspect.max() < 4 / 3 + 0.03
    torch.manual_seed(0)
    transform, image = v2.RandomResizedCrop(200, scale=(min_area, 1.0)), torch.empty(3, 200, 200)
    drawn = [transform.make_params([image]) for _ in range(2000)]
    theirs = {name: np.array([draw[name] for draw in drawn]) for name in ("left", "top", "width", "height")}
    for name, mine in {"left": left, "top": top, "width": width, "height": height}.items():
        assert ks_2samp(mine, theirs[name]).pvalue > 1e-3
    assert ks_2samp(area, theirs["width"] * theirs["height"] / 200**2).pvalue > 1e-3


def test_each_image_gets_its_own_crop() -> None:
    pixels = images(1).expand(16, -1, -1, -1).contiguous()
    views = Augmentation(min_crop=0.2).views(pixels, generator())
    assert len({view.numpy().tobytes() for view in views}) == 16


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_changes_of_shape_are_torchvisions(magnitude: int, sign: int) -> None:
    pixels = images(2)
    matrices = augment.matrices(48, magnitude).view(2, 5, 2, 3)[0 if sign == 1 else 1]
    for name, matrix in zip(SHAPES, matrices, strict=True):
        found = augment.warped(pixels, matrix.expand(2, 2, 3))
        # torchvision fades twice into the fill where a sample lies half outside: leave those edges to the next test.
        differs = (found.int() - library(pixels, name, magnitude, sign).int()).abs() > 1
        assert differs.float().mean() < 0.04, name
        if magnitude == 0:
            assert torch.equal(found, pixels)


def test_each_image_is_warped_by_its_own_matrix_and_what_is_left_empty_is_grey() -> None:
    pixels = images(10)
    found = augment.warped(pixels, augment.matrices(48, 30))
    shift = int(150 / 331 * 48)
    assert torch.equal(found[2, :, :, shift:], pixels[2, :, :, :-shift])
    assert (found[2, :, :, :shift] == augment.GREY).all()
    assert torch.equal(found[8, :, :-shift], pixels[8, :, shift:])
    assert (found[8, :, -shift:] == augment.GREY).all()
    level = 0.3  # shear as Pillow does it, with the same bilinear samples
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    expected = image.transform((48, 48), Image.Transform.AFFINE, (1, level, 0, 0, 1, 0), Image.Resampling.BILINEAR)
    inside = np.asarray(expected).min(2) > 0
    got = found[0].permute(1, 2, 0).numpy().astype(int)
    assert np.median(np.abs(got - np.asarray(expected))[inside]) <= 2


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_changes_of_colour_are_torchvisions(magnitude: int) -> None:
    pixels = images(3)
    fades = [(name, sign) for name in ("Brightness", "Color", "Contrast", "Sharpness") for sign in (1, -1)]
    rest = [(name, 1) for name in ("Posterize", "Solarize", "AutoContrast", "Equalize", "Identity")]
    for (name, sign), operation in zip(fades + rest, augment.colours(magnitude), strict=True):
        assert furthest(operation(pixels), library(pixels, name, magnitude, sign)) <= 1, name


def test_changes_of_colour_are_pillows() -> None:
    pixels = images(1)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    kinds = (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Sharpness)
    expected = [kind(image).enhance(factor) for kind in kinds for factor in (1.45, 0.55)]
    expected += [ImageOps.posterize(image, 6), ImageOps.solarize(image, 127.5), ImageOps.autocontrast(image)]
    expected += [ImageOps.equalize(image), image]
    for operation, oracle in zip(augment.colours(15), expected, strict=True):
        assert furthest(operation(pixels)[0], torch.from_numpy(np.array(oracle)).permute(2, 0, 1)) <= 1


def test_rand_augment_gives_each_image_one_of_the_operations_as_often_as_torchvision() -> None:
    pixels, n = images(1) // 2 + 40, 2800  # of no full range: autocontrast changes it
    found = augment.rand_augment(pixels.expand(n, -1, -1, -1), 17, generator())
    warped = augment.warped(pixels.expand(10, -1, -1, -1), augment.matrices(48, 17))
    outcomes = [*warped, *(operation(pixels)[0] for operation in augment.colours(17))]
    names = [outcome.numpy().tobytes() for outcome in outcomes]
    assert len(set(names)) == 23
    counts = np.bincount([names.index(image.numpy().tobytes()) for image in found], minlength=23)
    expected = n * np.array([1 / 28] * 18 + [1 / 14] * 5)  # one of 14, half of the time in each direction
    assert np.abs(counts - expected).max() < 4.5 * math.sqrt(n / 14)


def test_each_image_keeps_its_place() -> None:
    """Images of one colour each, told apart after any operation by which channel is the strongest."""
    pixels = torch.full((60, 3, 16, 16), 90, dtype=torch.uint8)
    strongest = torch.arange(60) % 3
    pixels[torch.arange(60), strongest, 4:, 4:] = 120
    found = Augmentation(min_crop=0.9, operations=1, magnitude=5).views(pixels, generator())
    seen = found.float().mean((2, 3))
    own = seen.gather(1, strongest[:, None])[:, 0]
    assert (own >= seen.max(1).values - 1e-3).all()


def test_mixup_blends_by_the_share() -> None:
    pixels, random = images(5), generator()
    shares = []
    for _ in range(300):
        mixed, mixture = Augmentation(mixup=0.4).mixed(pixels, random)
        expected = mixture.share * pixels.double() + (1 - mixture.share) * pixels[mixture.partners].double()
        assert (mixed.double() - expected).abs().max() < 0.501
        shares.append(mixture.share)
    assert mixture.partners.dtype == torch.int64
    assert sorted(mixture.partners.tolist()) == [0, 1, 2, 3, 4]
    assert all(mixture.partners != torch.arange(5))
    assert kstest(shares, beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_cutmix_cuts_one_box_and_gives_its_true_share() -> None:
    own = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 40, 40).contiguous()
    random, shares = generator(), []
    for _ in range(300):
        mixed, mixture = Augmentation(cutmix=1.0).mixed(own, random)
        cut = mixed != own
        assert torch.equal(mixed, torch.where(cut, own[mixture.partners], own))
        assert (cut == cut[0, 0]).all()
        rows, columns = cut[0, 0].any(1), cut[0, 0].any(0)
        box = rows[:, None] & columns
        assert torch.equal(box, cut[0, 0])  # all of the rows and columns that it touches ...
        assert all((side.int().diff() == 1).sum() <= 1 for side in (rows, columns))  # ... and these in one piece
        assert mixture.share == pytest.approx(1 - cut[0, 0].double().mean().item())
        shares.append(mixture.share)
    # The paper's box for a uniform share, cut off at the edges, by a second computation.
    draws = np.random.default_rng(0)
    side, centres = np.sqrt(1 - draws.random(20000)), draws.random((2, 20000))
    kept = np.clip(centres + side / 2, 0, 1) - np.clip(centres - side / 2, 0, 1)
    assert ks_2samp(shares, 1 - kept.prod(0)).pvalue > 1e-3


def test_with_both_a_batch_takes_one_of_them_by_chance() -> None:
    own = (torch.arange(2, dtype=torch.uint8) * 255).view(2, 1, 1, 1).expand(2, 3, 16, 16).contiguous()
    random = generator()
    cut = [bool(torch.isin(Augmentation(mixup=5.0, cutmix=1.0).mixed(own, random)[0], own).all()) for _ in range(300)]
    assert 110 < sum(cut) < 190


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mixtures_loss_is_that_of_mixed_targets(smoothing: float) -> None:
    random = generator(3)
    logits, codes = torch.randn(6, 4, generator=random), torch.tensor([0, 3, 1, 1, 2, 0])
    _, mixture = Augmentation(mixup=1.0).mixed(images(6), random)
    loss = CrossEntropy(smoothing).multiclass
    found = mixture.share * loss(logits, codes, None)
    found += (1 - mixture.share) * loss(logits, codes[mixture.partners], None)
    eye = torch.eye(4) * (1 - smoothing) + smoothing / 4  # as timm.data.mixup.mixup_target
    soft = mixture.share * eye[codes] + (1 - mixture.share) * eye[codes[mixture.partners]]
    assert found.item() == pytest.approx(-(soft * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_the_mixtures_loss_is_that_of_mixed_labels_where_several_apply() -> None:
    random = generator(3)
    logits = torch.randn(5, 3, generator=random)
    applies = torch.randint(2, (5, 3), generator=random)
    _, mixture = Augmentation(cutmix=1.0).mixed(images(5), random)
    loss = Asymmetric(0.0, 0.0, 0.0).multilabel
    found = mixture.share * loss(logits, applies, None)
    found += (1 - mixture.share) * loss(logits, applies[mixture.partners], None)
    soft = mixture.share * applies + (1 - mixture.share) * applies[mixture.partners]
    assert found.item() == pytest.approx(functional.binary_cross_entropy_with_logits(logits, soft).item(), rel=1e-5)


def test_lower_precision_around_it_does_not_reach_the_coordinates() -> None:
    pixels = images(8)
    expected = ALL.views(pixels, generator())
    at_once = augment.crop_at_once(pixels, augment.random_boxes(8, 48, 0.3, generator()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ALL.views(pixels, generator()), expected)
        again = augment.crop_at_once(pixels, augment.random_boxes(8, 48, 0.3, generator()))
    assert torch.equal(again, at_once)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_on_a_gpu_nothing_waits_for_it_and_the_pixels_are_those_of_the_cpu() -> None:
    pixels = images(64)
    on_gpu, random, same = pixels.cuda(), generator(), generator()
    ALL.mixed(ALL.views(on_gpu, random), random)  # loads kernels, which may wait
    same.set_state(random.get_state())
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, mixture = ALL.mixed(ALL.views(on_gpu, random), random)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, other = ALL.mixed(ALL.views(pixels, same), same)
    assert (found.cpu().int() - expected.int()).abs().float().mean() < 1
    assert mixture.share == other.share
    assert torch.equal(mixture.partners.cpu(), other.partners)
