import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.cutpaste.cutpaste import CutPaste, CutpasteOptions, grad_cam, unit
from models.methods.cutpaste.density import Gaussians
from models.methods.cutpaste.network import Network
from models.methods.cutpaste.views import Views, translated
from models.methods.cutpaste.windows import spread, starts, windows
from tests.models.banks import Bank, draw_images, monitoring, seeded

SIDE = 48
SQUARE = 12
PERIOD = 8
QUICK = {"width": 8, "head_layers": 0, "epochs": 1, "steps_per_epoch": 2, "batch_size": 4}
PATCHES = {"representation": "patch", "crop": 24, "window": 16, "stride": 8}


def build(**options):
    return CutPaste(FeatureShape(()), CutpasteOptions(**{**QUICK, **options}))


def fitted(bank, seed=0, **options):
    detector = build(**options)
    detector.fit(bank, generator=seeded(seed))
    return detector


def stripes(count, seed):
    """Noisy stripes of any phase, (N, 3, SIDE, SIDE), uint8."""
    drawn = seeded(seed)
    phases = 2 * torch.pi * torch.rand(count, 1, 1, 1, generator=drawn)
    wave = torch.sin(torch.arange(SIDE) * (2 * torch.pi / PERIOD) + phases)  # (N, 1, 1, SIDE)
    images = (128 + 60 * wave).expand(-1, 3, SIDE, -1)
    return (images + 18 * torch.randn(images.shape, generator=drawn)).clamp(0, 255).byte()


def broken(count, seed):
    """The same, a square of which is half a period off; and where, bool (N, SIDE, SIDE)."""
    images = stripes(count, seed)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    half = PERIOD // 2
    places = torch.randint(SIDE - SQUARE - half, (count, 2), generator=seeded(seed + 1)).tolist()
    whole = images.clone()
    for image, before, mask, (y, x) in zip(images, whole, masks, places, strict=True):
        rows, columns = slice(y, y + SQUARE), slice(x, x + SQUARE)
        image[:, rows, columns] = before[:, rows, x + half : x + half + SQUARE]
        mask[rows, columns] = True
    return images, masks


# Views


@pytest.mark.parametrize("classes", ["patch", "scar", "three_way"])
def test_the_first_view_has_nothing_pasted_and_the_others_one_thing_each(classes):
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    views = Views(classes, shift=0.0, jitter=0.0, crop=None)
    areas = []
    for seed in range(20):
        first, *others = views.draw(image, np.random.default_rng(seed))
        assert np.array_equal(first, image)
        assert 1 + len(others) == views.count == (3 if classes == "three_way" else 2)
        areas.append([(other != image).any(axis=2).mean() for other in others])
    smallest, largest = np.min(areas, axis=0), np.max(areas, axis=0)
    if classes != "scar":
        assert smallest[0] > 0.015
        assert largest[0] > 0.08
    if classes != "patch":
        assert smallest[-1] > 0
        assert largest[-1] < 0.012


def test_all_views_are_of_one_moved_and_jittered_image():
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    views = Views("three_way", shift=0.2, jitter=0.1, crop=None)
    first, patch, scar = views.draw(image, np.random.default_rng(3))
    assert not np.array_equal(first, image)
    assert (first != scar).any(axis=2).mean() < 0.02
    assert (first != patch).any(axis=2).mean() < 0.2


def test_a_move_is_by_whole_pixels_and_mirrors_the_border():
    image = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    reached = set()
    for seed in range(200):
        moved = translated(image, 0.1, np.random.default_rng(seed))
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(padded[y : y + 20, x : x + 20], moved)
        ]
        assert len(found) == 1
        reached |= set(found)
    assert len(reached) == 25


def test_crops_are_of_the_image():
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    views = Views("patch", shift=0.5, jitter=0.0, crop=12)
    corners = set()
    for seed in range(30):
        first, _ = views.draw(image, np.random.default_rng(seed))
        assert first.shape == (12, 12, 3)
        places = np.lib.stride_tricks.sliding_window_view(image, first.shape)[:, :, 0]
        ((y, x),) = np.argwhere((places == first).all(axis=(2, 3, 4)))
        corners.add((int(y), int(x)))
    assert len(corners) > 20


@pytest.mark.parametrize("classes", ["scar", "three_way"])
def test_labels_say_which_view_it_is(classes, monkeypatch):
    detector = build(classes=classes)
    count = detector.views.count
    views = [torch.full((3, 3, 8, 8), 10 * index).byte() for index in range(count)]

    def told(images):
        """Logits that know the view by its grey level, with little doubt."""
        return 5 * F.one_hot((images[:, 0, 0, 0] // 10).long(), count).float()

    monkeypatch.setattr(detector.network, "forward", told)
    losses = detector._losses(views)
    doubt = math.log(1 + (count - 1) * math.exp(-5))
    assert losses["loss"].item() == pytest.approx(doubt, rel=1e-4)
    assert losses["accuracy"].item() == 1
    turned_round = detector._losses(views[::-1])["accuracy"].item()
    assert turned_round == pytest.approx((count == 3) / 3)


# Training


def test_narrow_networks_are_not_laid_out_channels_last():
    """Where oneDNN would write past its memory in their backward pass."""
    images = draw_images(2)
    for width, expected in ((8, True), (16, False)):
        network = Network(width=width, head_layers=1, head_width=8, classes=2)
        assert network.pixels(images).is_contiguous() == expected


def test_at_the_papers_width_the_network_is_resnet18():
    network = Network(width=64, head_layers=1, head_width=512, classes=3)
    assert sum(p.numel() for p in network.resnet.parameters()) == 11_176_512
    widths = [layer.out_features for layer in network.head if isinstance(layer, torch.nn.Linear)]
    assert (network.dims, widths) == (512, [512, 128, 3])


def test_an_epoch_has_its_updates_and_the_rate_falls_by_a_half_cosine(monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def recorded(optimizer, *given, **named):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *given, **named)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    fitted(Bank(draw_images(5)), epochs=2, steps_per_epoch=3, learning_rate=0.1)
    expected = [0.05 * (1 + math.cos(math.pi * passed / 6)) for passed in range(6)]
    assert rates == pytest.approx(expected)


def test_the_density_is_fitted_where_it_is_scored(monkeypatch):
    for scores_steps, expected in ((False, 1), (True, 3)):
        detector, calls = build(epochs=3), []
        monkeypatch.setattr(detector, "_measure", calls.append)
        monitor = monitoring(lambda *_: None, scores_steps=scores_steps)
        detector.fit(Bank(draw_images(5)), generator=seeded(), monitor=monitor)
        assert len(calls) == expected


# Density


def batches_of(vectors, size=3):
    return vectors.split(size)


def test_one_gaussian_is_scikit_learns():
    vectors = unit(torch.randn(60, 7, generator=seeded())).reshape(12, 5, 7)
    gaussians = Gaussians(7)
    gaussians.fit(batches_of(vectors, 5), per_position=False)
    rows = vectors.reshape(-1, 7).double().numpy()
    expected = LedoitWolf().fit(rows).mahalanobis(rows)
    found = gaussians.distances(vectors).flatten()
    np.testing.assert_allclose(found.numpy() ** 2, expected, rtol=1e-4)


def test_each_position_has_a_gaussian_of_its_own():
    vectors = torch.randn(40, 3, 6, generator=seeded()) * torch.tensor([1.0, 0.1, 5.0])[:, None]
    vectors = vectors + torch.tensor([3.0, -20.0, 0.0])[:, None]
    gaussians = Gaussians(6)
    gaussians.fit(batches_of(vectors, 7), per_position=True)
    found = gaussians.distances(vectors[:5])
    for position in range(3):
        rows = vectors[:, position].double().numpy()
        expected = LedoitWolf().fit(rows).mahalanobis(rows[:5])
        np.testing.assert_allclose(found[:, position].numpy() ** 2, expected, rtol=2e-3)
    loaded = Gaussians(6)
    loaded.load_state_dict(gaussians.state_dict())
    assert torch.equal(loaded.distances(vectors), gaussians.distances(vectors))
    with pytest.raises(ModelError, match="Gaussians for 3 positions, and 4 are to be scored"):
        gaussians.distances(torch.zeros(1, 4, 6))


@pytest.mark.parametrize("per_position", [False, True])
def test_slopes_are_the_gradient_of_half_the_squared_distance(per_position):
    gaussians = Gaussians(4)
    samples = torch.randn(30, 2, 4, generator=seeded())
    gaussians.fit([samples], per_position=per_position)
    vectors = torch.randn(3, 2, 4, generator=seeded(2)).requires_grad_()
    half = gaussians.distances(vectors).square().sum() / 2
    (expected,) = torch.autograd.grad(half, vectors)
    torch.testing.assert_close(gaussians.slopes(vectors.detach()), expected)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_for_a_density_are_refused(count):
    with pytest.raises(ModelError, match=r"needs more training images"):
        fitted(Bank(draw_images(count)))


# Maps of whole images


def test_the_map_is_the_positive_part_of_grad_cam_of_the_score():
    detector = fitted(Bank(draw_images(8, side=64)))
    seen = detector.seen(draw_images(2, seed=5, side=64)).detach()
    assert seen.shape == (2, 64, 2, 2)
    maps, scores = detector.judged(seen, 64)
    seen.requires_grad_()
    pooled = seen.mean(dim=(2, 3))
    distances = detector.gaussians.distances(unit(pooled)[:, None])
    (weights,) = torch.autograd.grad(distances.square().sum() / 2, pooled)
    expected = (weights[:, :, None, None] * seen.detach()).sum(dim=1)
    scale = float(expected.abs().max())
    torch.testing.assert_close(maps, expected.relu(), rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(scores, distances[:, 0])
    assert expected.sum(dim=(1, 2)).abs().max() < 1e-3 * scale


def test_weights_of_the_map_leave_out_what_only_changes_the_length():
    maps = torch.rand(2, 5, 3, 3, generator=seeded())
    vectors = unit(maps.mean(dim=(2, 3)))
    assert grad_cam(maps, vectors, 7 * vectors).abs().max() < 1e-4


def test_where_there_is_one_position_the_map_is_the_score():
    detector = fitted(Bank(draw_images(8)))
    maps, scores = detector.score(draw_images(3, seed=2))
    assert maps.shape == (3, 1, 1)
    assert torch.equal(maps[:, 0, 0], scores)


# Windows


@pytest.mark.parametrize(("size", "window", "stride"), [(256, 32, 4), (37, 16, 6), (16, 16, 5)])
def test_windows_reach_from_border_to_border(size, window, stride):
    first = starts(size, window, stride)
    assert (int(first[0]), int(first[-1])) == (0, size - window)
    gaps = first.diff()
    assert gaps.numel() == 0 or (gaps.max() <= stride and gaps.max() - gaps.min() <= 1)
    if size == 256:
        assert len(first) == 57  # paper


@pytest.mark.parametrize("rows", [1, 3, None])
def test_windows_are_slices_in_the_order_of_the_grid(rows):
    pixels = torch.rand(2, 3, 21, 21, generator=seeded())
    first = starts(21, 8, 4).tolist()
    G = len(first)
    parts = windows(pixels, 8, 4, rows=rows)
    grids = [part.unflatten(0, (2, R, G)) for part, R in parts]
    found = torch.cat(grids, dim=1)  # (B, G, G, 3, 8, 8)
    for b in range(2):
        for i, y in enumerate(first):
            for j, x in enumerate(first):
                assert torch.equal(found[b, i, j], pixels[b, :, y : y + 8, x : x + 8])


def test_a_score_goes_to_the_pixels_of_its_window():
    size, window, stride, deviation = 19, 8, 5, 3.0
    first = starts(size, window, stride).tolist()
    scores = torch.rand(2, len(first), len(first), generator=seeded())
    expected = torch.zeros(2, size, size)
    for y in range(size):
        for x in range(size):
            total = 0.0
            for i, top in enumerate(first):
                for j, left in enumerate(first):
                    if not (0 <= y - top < window and 0 <= x - left < window):
                        continue
                    away = (y - top - 3.5) ** 2 + (x - left - 3.5) ** 2
                    weight = math.exp(-away / (2 * deviation**2))
                    expected[:, y, x] += weight * scores[:, i, j]
                    total += weight
            expected[:, y, x] /= total
    found = spread(scores, size, window, stride, deviation)
    torch.testing.assert_close(found, expected)
    ones = spread(torch.ones_like(scores), size, window, stride, deviation)
    torch.testing.assert_close(ones, torch.ones_like(ones))


@pytest.mark.parametrize("side", [32, 37])
def test_windows_are_scored_as_if_each_were_an_image(side):
    detector = fitted(Bank(draw_images(6, side=side)), **PATCHES)
    images = draw_images(2, seed=3, side=side)
    first = starts(side, 16, 8).tolist()
    maps, scores = detector.score(images)
    assert maps.shape == (2, side, side)
    assert torch.equal(scores, maps.amax(dim=(1, 2)))
    seen = detector.seen(images)
    for i, y in enumerate(first):
        window = images[:, :, y : y + 16, first[-1] : first[-1] + 16]
        pooled = detector.network.maps(detector.network.pixels(window)).mean(dim=(2, 3))
        torch.testing.assert_close(seen[:, :, i, -1], unit(pooled), rtol=1e-4, atol=1e-5)
    few = functools.partial(detector.seen, rows=1)
    torch.testing.assert_close(few(images), seen, rtol=1e-4, atol=1e-5)


# All together


LEARNS = {
    **{"classes": "patch", "jitter": 0.0, "shift": 0.0, "learning_rate": 0.05},
    **{"width": 4, "epochs": 1, "steps_per_epoch": 90, "batch_size": 8},
}


def ranked(detector):
    bad, masks = broken(24, 7)
    with torch.inference_mode():
        _, good_scores = detector.score(stripes(24, 5))
        maps, bad_scores = detector.score(bad)
    scores = torch.cat([good_scores, bad_scores])
    of_images = roc_auc_score([0] * 24 + [1] * 24, scores)
    whole = F.interpolate(maps[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]
    return of_images, roc_auc_score(masks.flatten(), whole.flatten())


def test_a_visible_defect_is_found_and_not_without_training():
    bank, lazy = Bank(stripes(64, 1)), {"steps_per_epoch": 8, "learning_rate": 1e-9}
    trained, _ = ranked(fitted(bank, seed=1, **LEARNS))
    untrained, _ = ranked(fitted(bank, seed=1, **LEARNS | lazy))
    assert trained > 0.9
    assert untrained < 0.8


def test_windows_find_where_it_is():
    options = LEARNS | PATCHES | {"width": 8, "steps_per_epoch": 60}
    of_images, of_pixels = ranked(fitted(Bank(stripes(64, 1)), **options))
    assert of_images > 0.9
    assert of_pixels > 0.85


def test_what_cannot_be_is_refused():
    with pytest.raises(ModelError, match="windows of 4 pixels every 5 leave pixels") as caught:
        build(**PATCHES | {"window": 4, "stride": 5})
    assert set(caught.value.change) == {"window", "stride"}
    with pytest.raises(ModelError, match="rate is 0 after 2 of 3 epochs"):
        build(epochs=3, schedule_epochs=2)
    for name in ("crop", "window"):
        with pytest.raises(ModelError, match=f"images of 32 pixels have no {name} of 40") as caught:
            fitted(Bank(draw_images(6)), **PATCHES | {name: 40})
        assert caught.value.change == {name: "lower"}
    detector = fitted(Bank(draw_images(6)), **PATCHES, density="per_position")
    with pytest.raises(ModelError, match="fit and score at the same image size"):
        detector.score(draw_images(2, side=48))


def test_what_the_map_is_is_said():
    assert any("Grad-CAM" in remark for remark in build().remarks)
    assert build(**PATCHES).remarks == []
