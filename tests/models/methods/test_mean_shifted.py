import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.methods.fine_tuned.mean_shifted import (
    MeanShifted,
    MeanShiftedOptions,
    angular_loss,
    mean_shifted_loss,
)
from models.training.augmentations import contrastive_augmentations, draw_views
from tests.models.banks import Bank, draw_images, seeded, told


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return FrozenExtractor("test_resnet", (4,), weights="random", pool="mean")


def bank_of_images(count=10, **options):
    return Bank(draw_images(count, **options))


def mean_shifted(backbone, **options):
    return MeanShifted(FeatureShape((), backbone), MeanShiftedOptions(**options))


def fitted(backbone, bank, seed=0, **options):
    options = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, **options}
    detector = mean_shifted(backbone, **options)
    detector.fit(bank, generator=seeded(seed))
    return detector


def unit_rows(count, dim, seed=0):
    rows = torch.randn(count, dim, generator=seeded(seed))
    return rows / rows.norm(dim=1, keepdim=True)


# Loss


def test_loss_on_hand_worked_numbers():
    """Two images whose views agree and are orthogonal: every row is -log(e / (e + 1 + 1))."""
    views = torch.eye(2).repeat(2, 1)
    expected = math.log(1 + 2 / math.e)
    assert mean_shifted_loss(views, torch.zeros(2), 1.0).item() == pytest.approx(expected)
    # Opposed as seen from their mean: the cosine of the other image falls from 0 to -1.
    expected = math.log(1 + 2 / math.e**2)
    center = torch.tensor([0.5, 0.5])
    assert mean_shifted_loss(views, center, 1.0).item() == pytest.approx(expected)
    # A quarter of the temperature makes the cosines four times as large.
    expected = math.log(1 + 2 / math.e**8)
    assert mean_shifted_loss(views, center, 0.25).item() == pytest.approx(expected, rel=1e-3)


def test_loss_matches_a_slow_loop():
    embeddings, center = unit_rows(6, 5), unit_rows(1, 5, seed=2)[0] / 2
    shifted = [[float(x) for x in row] for row in embeddings - center]
    shifted = [[x / math.hypot(*row) for x in row] for row in shifted]

    def similarity(i, j):
        return math.exp(sum(a * b for a, b in zip(shifted[i], shifted[j], strict=True)) / 0.25)

    terms = []
    for i in range(6):
        partner = (i + 3) % 6
        others = sum(similarity(i, j) for j in range(6) if j != i)
        terms.append(-math.log(similarity(i, partner) / others))
    expected = sum(terms) / 6
    assert mean_shifted_loss(embeddings, center, 0.25).item() == pytest.approx(expected, rel=1e-5)


def test_angular_loss_on_hand_worked_numbers():
    """|| e1 - e1 ||^2 = 0 and || e2 - e1 ||^2 = 2, the mean of which counts once per view."""
    center = torch.tensor([1.0, 0.0])
    assert angular_loss(torch.eye(2).repeat(2, 1), center).item() == pytest.approx(2.0)


def test_reported_loss_is_that_of_the_drawn_views(backbone):
    bank = bank_of_images()
    for angular in (False, True):
        detector = mean_shifted(backbone, epochs=1, batch_size=len(bank), angular=angular)
        (values,) = told(detector, bank)
        features = backbone(bank.features)[:, :, 0, 0]
        center = (features / features.norm(dim=1, keepdim=True)).mean(dim=0)
        if angular:
            center = center / center.norm()
        generator = seeded()
        order = torch.randperm(len(bank), generator=generator)
        views = draw_views(bank.features[order], contrastive_augmentations(32, 32), generator)
        embeddings = mean_shifted(backbone).embed((views - backbone.mean) / backbone.std)
        expected = mean_shifted_loss(embeddings, center, 0.25)
        if angular:
            expected = expected + angular_loss(embeddings, center)
        assert values["loss"] == pytest.approx(expected.item(), rel=1e-4)


# Views


def test_views_come_from_the_generator_alone():
    images, augment = draw_images(6), contrastive_augmentations(32, 32)
    torch.manual_seed(5)
    untouched = torch.random.get_rng_state()
    first = draw_views(images, augment, seeded())
    assert torch.equal(torch.random.get_rng_state(), untouched)
    torch.manual_seed(6)
    assert torch.equal(draw_views(images, augment, seeded()), first)
    generator = seeded()
    again = [draw_views(images, augment, generator) for _ in range(2)]
    assert torch.equal(again[0], first)
    assert not torch.equal(again[1], first)


def test_views_are_of_their_images_and_differ():
    """Flat images, so that a crop keeps the colour: jitter is weaker than the gap between them."""
    levels = torch.tensor([20, 240], dtype=torch.uint8)
    images = levels[:, None, None, None].expand(2, 3, 24, 40)
    views = draw_views(images, contrastive_augmentations(24, 40), seeded())
    assert views.shape == (4, 3, 24, 40)
    assert views.min() >= 0
    assert views.max() <= 1
    dark, bright = views[[0, 2]], views[[1, 3]]
    assert dark.max() < bright.min()
    noise = draw_views(draw_images(3), contrastive_augmentations(32, 32), seeded())
    assert all(not torch.equal(noise[i], noise[i + 3]) for i in range(3))


# Training


def test_training_lowers_the_loss(backbone):
    detector = mean_shifted(backbone, epochs=30, batch_size=8, learning_rate=1.0)
    losses = [values["loss"] for values in told(detector, bank_of_images(8))]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_score_is_cosine_distance_to_the_nearest_two(backbone):
    bank, tests = bank_of_images(), draw_images(5, seed=5)
    detector = fitted(backbone, bank)
    with torch.inference_mode():
        train, test = (detector.embed(backbone.pixels(i)) for i in (bank.features, tests))
        maps = detector(tests)
    torch.testing.assert_close(test.norm(dim=1), torch.ones(5))
    search = NearestNeighbors(n_neighbors=2, metric="cosine").fit(train)
    distances, _ = search.kneighbors(test)  # 1 - cos
    assert maps.shape == (5, 1, 1)
    expected = torch.from_numpy(2 * distances.sum(axis=1)).float()
    torch.testing.assert_close(maps[:, 0, 0], expected, rtol=1e-3, atol=1e-5)
