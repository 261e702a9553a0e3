import math

import pytest
import torch
import torch.nn.functional as F

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.mnad.memory import draw_items, read, two_nearest, updated
from models.methods.mnad.mnad import Mnad, MnadOptions
from models.methods.mnad.networks import build_decoder, build_encoder
from tests.models.banks import Bank, draw_images, monitoring, seeded, told
from tests.models.methods.striped import draw_striped, separation

QUICK = {"width": 4, "items": 4, "batch_size": 8, "epochs": 9, "learning_rate": 5e-3}


def build(**options):
    torch.manual_seed(0)  # for what is looked at unfitted
    return Mnad(FeatureShape(()), MnadOptions(**{**QUICK, **options}))


def fitted(bank, **options):
    detector = build(**options)
    detector.fit(bank, generator=seeded())
    return detector


def unit(count, channels, seed=0):
    return F.normalize(torch.randn(count, channels, generator=seeded(seed)), dim=1)


# Network and memory


def test_networks_halve_three_times_and_come_back():
    encoder, decoder = build_encoder(2).eval(), build_decoder(32, 2).eval()
    queries = encoder(torch.rand(2, 3, 32, 48, generator=seeded()))
    assert queries.shape == (2, 16, 4, 6)
    assert queries.min() < 0  # the last layer has no ReLU
    images = decoder(torch.cat([queries, queries], dim=1))
    assert images.shape == (2, 3, 32, 48)
    assert images.abs().max() < 1


def test_items_start_with_unit_length_and_no_negative_numbers():
    items = draw_items(10, 16, seeded())
    torch.testing.assert_close(items.norm(dim=1), torch.ones(10))
    assert items.min() >= 0
    assert torch.equal(items, F.normalize(torch.rand(10, 16, generator=seeded()), dim=1))


def test_reading_is_a_weighted_mean_without_a_gradient():
    queries, items = unit(7, 5).requires_grad_(), unit(3, 5, seed=1)
    found = read(queries, items)
    assert not found.requires_grad
    for query, answer in zip(queries.detach(), found, strict=True):
        weights = [math.exp(float(query @ item)) for item in items]
        expected = sum(w * item for w, item in zip(weights, items, strict=True)) / sum(weights)
        torch.testing.assert_close(answer, expected)


def test_items_follow_their_nearest_queries_as_a_slow_loop_does_it():
    """Equations 4 to 6 of the paper, with the released code's softmax over all queries."""
    queries, items = unit(40, 6), unit(5, 6, seed=1)
    items[4] = -F.normalize(queries.sum(dim=0), dim=0)  # nearest to none or few
    found = updated(items, queries)
    nearest = [max(range(5), key=lambda m, q=q: float(q @ items[m])) for q in queries]
    for m, item in enumerate(items):
        scores = [math.exp(float(query @ item)) for query in queries]
        shares = [score / sum(scores) for score in scores]
        moved = item.clone()
        for query, share, mine in zip(queries, shares, nearest, strict=True):
            if mine == m:
                moved += share / max(shares) * query
        torch.testing.assert_close(found[m], moved / moved.norm())
    assert len(set(nearest)) > 2


def test_an_item_that_no_query_is_near_stays():
    queries = F.normalize(torch.rand(9, 3, generator=seeded()), dim=1)
    items = torch.stack([queries[0], torch.tensor([-1.0, 0.0, 0.0])])
    found = updated(items, queries)
    torch.testing.assert_close(found[1], items[1])
    assert not torch.allclose(found[0], items[0])


def test_nearest_items_are_nearest_by_distance():
    queries, items = unit(20, 6), unit(5, 6, seed=1)
    first, second = two_nearest(queries, items)
    distances = torch.cdist(queries, items).sort(dim=1).values
    torch.testing.assert_close((queries - first).norm(dim=1), distances[:, 0])
    torch.testing.assert_close((queries - second).norm(dim=1), distances[:, 1])


# Losses, scores and maps


def test_losses_and_what_they_leave_in_the_memory():
    detector = build(compactness=0.3, separateness=0.2).train()
    detector.items.copy_(draw_items(*detector.items.shape, generator=seeded()))
    items = detector.items.clone()
    pixels = torch.rand(2, 3, 32, 32, generator=seeded()) * 2 - 1
    losses = detector._losses(pixels)
    rebuilt, rows = detector.rebuild(pixels)
    rows = rows.detach()
    distances = torch.cdist(rows, items).sort(dim=1).values
    compact = (distances[:, 0] ** 2).mean() / rows.shape[1]
    separate = (distances[:, 0] - distances[:, 1] + 1).clamp(min=0).mean()
    torch.testing.assert_close(losses["compactness"], compact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["separateness"], separate, rtol=1e-4, atol=1e-5)
    terms = losses["reconstruction"] + 0.3 * losses["compactness"] + 0.2 * losses["separateness"]
    torch.testing.assert_close(losses["loss"], terms)
    torch.testing.assert_close(detector.items, updated(items, rows))
    # What was read came from the memory before it moved.
    detector.items.copy_(items)
    again, _ = detector.rebuild(pixels)
    torch.testing.assert_close(losses["reconstruction"], F.mse_loss(again, pixels))
    assert not torch.equal(again, rebuilt)
    losses["compactness"].backward()
    assert all(p.grad is None for p in detector.decoder.parameters())
    assert all(p.grad is not None for p in detector.encoder.parameters())


def test_memory_moves_in_training_and_never_when_images_are_scored():
    detector = fitted(Bank(draw_striped(8)), epochs=1)
    start = draw_items(*detector.items.shape, generator=seeded())
    assert not torch.allclose(detector.items, start)
    torch.testing.assert_close(detector.items.norm(dim=1), torch.ones(4))
    kept = detector.items.clone()
    with torch.no_grad():
        detector.score(draw_striped(4))
    assert torch.equal(detector.items, kept)
    assert "items" in detector.state_dict()
    assert all("items" not in name for name, _ in detector.named_parameters())


@pytest.mark.parametrize("memory", [True, False])
def test_error_and_distance_are_mixed_by_what_is_normal(memory):
    bank = Bank(draw_striped(9))
    detector = fitted(bank, epochs=1, memory=memory, mixing=0.6, batch_size=4)
    images = draw_striped(3, seed=5)
    with torch.no_grad():
        parts = detector.parts(bank.features)
        found = detector.parts(images)
        maps, scores = detector.score(images)
        pixels = images.float() / 127.5 - 1
        rebuilt, rows = detector.rebuild(pixels)
    assert parts.shape == (9, 2 if memory else 1, 32, 32)
    torch.testing.assert_close(found[:, 0], (rebuilt - pixels).square().mean(dim=1))
    shares = (0.6, 0.4) if memory else (1.0,)
    expected, own = torch.zeros(3, 32, 32), torch.zeros(3)
    for index, share in enumerate(shares):
        normal = parts[:, index]
        expected += share * (found[:, index] - normal.mean()) / normal.std(correction=0)
        means = normal.mean(dim=(1, 2))
        image = found[:, index].mean(dim=(1, 2))
        own += share * (image - means.mean()) / means.std(correction=0)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores, own, rtol=1e-2, atol=1e-2)
    if memory:
        distances = torch.cdist(rows, detector.items).amin(dim=1).view(3, 1, 4, 4)
        whole = F.interpolate(distances, (32, 32), mode="bilinear")
        torch.testing.assert_close(found[:, 1:], whole, rtol=1e-4, atol=1e-5)
    shown = (rebuilt + 1) * 127.5
    assert (detector.reconstruct(images) - shown).abs().max() <= 0.5 + 1e-3
    assert build(memory=memory, image_score="max").score(images)[1] is None


def test_a_part_that_does_not_vary_is_not_divided_by():
    detector = build(memory=False)
    detector.parts = lambda images: torch.full((len(images), 1, 8, 8), 0.25)
    detector._measure(Bank(draw_striped(4)))
    assert detector.pixel_mean.tolist() == [0.25]
    assert detector.pixel_std.tolist() == detector.image_std.tolist() == [1.0]


# Training


def test_a_visible_defect_is_found_by_what_was_learned():
    bank = Bank(draw_striped(24))
    detector = build()
    values = told(detector, bank)
    assert set(values[0]) == {"loss", "reconstruction", "compactness", "separateness"}
    assert values[-1]["loss"] < 0.2 * values[0]["loss"]
    assert separation(detector, "turned") > 0.95
    assert separation(fitted(bank, epochs=1, learning_rate=1e-12), "turned") < 0.65


def test_without_memory_there_is_an_error_alone():
    bank = Bank(draw_striped(16))
    detector = build(memory=False, epochs=2)
    assert detector.items.shape == (0, 32)
    assert detector.num_trainable < build().num_trainable
    assert [set(values) for values in told(detector, bank)] == [{"loss"}] * 2


def test_learning_rate_falls_along_a_cosine(monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def watched(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    bank = Bank(draw_striped(4))
    detector = fitted(bank, epochs=4, learning_rate=1e-3)
    expected = [1e-3 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx(expected)
    assert detector.stopped_at(2) == {"epochs": 2, "schedule_epochs": 4}
    rates.clear()
    fitted(bank, epochs=3, schedule_epochs=2, learning_rate=1e-3)
    assert rates == pytest.approx([1e-3, 5e-4, 0])


def test_normal_images_are_measured_when_a_monitor_scores_or_the_fit_ends():
    counts = []
    for scores_steps in (False, True):
        bank = Bank(draw_striped(8))
        monitor = monitoring(lambda *_: None, scores_steps=scores_steps)
        build(epochs=3).fit(bank, generator=seeded(), monitor=monitor)
        counts.append(bank.passes)
    assert counts == [3 + 1, 3 + 3]


# Refusals


def test_images_that_the_network_cannot_take_are_refused():
    with pytest.raises(ModelError, match=r"multiples of 8.* 36 x 36: --image-size 256"):
        fitted(Bank(draw_images(4, side=36)))
    with pytest.raises(ValueError, match=r"--method\.items 1 must be at least 2"):
        MnadOptions(items=1)
    with pytest.raises(ValueError, match=r"--method\.mixing 1\.1 must be in 0 to 1"):
        MnadOptions(mixing=1.1)
