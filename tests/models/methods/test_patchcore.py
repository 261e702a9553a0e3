import functools

import numpy as np
import pytest
import torch

from models.features.coreset import draw_projection, greedy_k_centre
from tests.models.banks import Bank, as_positions, draw_bank, fitted, seeded

patchcore = functools.partial(fitted, "patchcore")


def reference_scores(memory, features, num_neighbors):
    """Equations 6 and 7, image by image, float64."""
    memory = memory.double().numpy()
    scores = []
    for image in features.double().numpy():
        positions = image.reshape(image.shape[0], -1).T  # (H*W, C)
        distances = np.linalg.norm(positions[:, None] - memory[None], axis=2)  # (H*W, M)
        farthest = distances.min(axis=1).argmax()
        score = distances[farthest].min()
        nearest = memory[distances[farthest].argmin()]
        neighbours = np.linalg.norm(memory - nearest, axis=1).argsort()[:num_neighbors]
        weight = 1 - np.exp(score) / np.exp(distances[farthest][neighbours]).sum()
        scores.append(weight * score)
    return scores


@pytest.mark.parametrize("neighbours", [2, 3, 9, 50])
@pytest.mark.parametrize("side", [1, 4])
def test_image_scores_are_those_of_the_equations(neighbours, side):
    """Also where the memory has fewer features than neighbours are asked for."""
    bank = draw_bank(count=12, channels=5, side=side)
    features = 1.5 * draw_bank(count=6, channels=5, side=side, seed=2).features
    detector = patchcore(bank, coreset_ratio=0.5, num_neighbors=neighbours)
    _, scores = detector.score(features)
    np.testing.assert_allclose(
        scores, reference_scores(detector.memory, features, neighbours), rtol=2e-5
    )


def test_large_distances_do_not_overflow():
    bank = draw_bank(count=12, channels=5)
    detector = patchcore(bank, coreset_ratio=0.5)
    features = draw_bank(count=3, channels=5, seed=2).features + 1e4
    maps, scores = detector.score(features)
    assert torch.isfinite(scores).all()
    assert (scores <= maps.flatten(1).amax(dim=1)).all()


def test_one_neighbour_leaves_the_weight_out():
    maps, scores = patchcore(draw_bank(), num_neighbors=1).score(draw_bank(seed=2).features)
    assert torch.equal(scores, maps.flatten(1).amax(dim=1))


def test_a_memory_of_one_leaves_the_weight_out():
    """It would be 1 - 1, and every image would score 0."""
    detector = patchcore(draw_bank(count=2, side=1))
    assert len(detector.memory) == 1
    maps, scores = detector.score(draw_bank(side=1, seed=2).features)
    assert torch.equal(scores, maps.flatten())
    assert scores.min() > 0


def test_maps_are_distances_to_the_nearest():
    detector = patchcore(draw_bank())
    features = draw_bank(count=3, seed=2).features
    distances = torch.cdist(as_positions(features), detector.memory).amin(dim=1)
    torch.testing.assert_close(detector(features), distances.reshape(3, 5, 5))
    assert torch.equal(detector(features), detector.score(features)[0])


def test_memory_is_the_coreset_of_projected_positions():
    bank = draw_bank(count=9, channels=40)
    detector = patchcore(bank, coreset_ratio=0.1, projection_dim=3)
    positions, generator = as_positions(bank.features), seeded()
    projected = positions @ draw_projection(40, 3, generator)
    chosen = greedy_k_centre(projected, 22, generator=generator)
    assert torch.equal(detector.memory, positions[chosen])
    other = greedy_k_centre(positions, 22, generator=seeded())
    assert set(chosen.tolist()) != set(other.tolist())


def test_ratio_of_one_keeps_everything():
    bank = draw_bank()
    assert torch.equal(patchcore(bank, coreset_ratio=1.0).memory, as_positions(bank.features))


def test_copies_are_not_kept_and_remarked():
    bank = Bank(torch.randn(1, 6, 2, 2, generator=seeded()).repeat(20, 1, 1, 1))
    detector = patchcore(bank, coreset_ratio=0.5)
    assert len(detector.memory) == 4
    (remark,) = detector.remarks
    assert "4 features instead of 40" in remark


@pytest.mark.parametrize("neighbours", [1, 9])
@pytest.mark.parametrize("side", [1, 6])
def test_scores_agree_with_anomalibs(neighbours, side):
    """The same memory and features. Its distances come from expanded squares."""
    model = anomalib_model(neighbours)
    detector = patchcore(draw_bank(count=200, channels=12, side=side), num_neighbors=neighbours)
    features = 1.5 * draw_bank(count=5, channels=12, side=side, seed=2).features
    model.memory_bank = detector.memory
    positions = model.reshape_embedding(features)
    distances, rows = model.nearest_neighbors(positions, n_neighbors=1)
    distances, rows = distances.reshape(5, -1), rows.reshape(5, -1)
    theirs = model.compute_anomaly_score(distances, rows, positions)
    maps, scores = detector.score(features)
    torch.testing.assert_close(maps.flatten(1), distances, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, theirs, rtol=1e-5, atol=1e-5)


def anomalib_model(num_neighbors):
    module = pytest.importorskip(
        "anomalib.models.image.patchcore.torch_model", reason="anomalib is not installed"
    )
    return module.PatchcoreModel(["layer1"], "resnet18", False, num_neighbors)


def test_coreset_agrees_with_anomalibs(monkeypatch):
    """The same points and the same first one: it keeps that, we only measure from it."""
    module = pytest.importorskip(
        "anomalib.models.components.sampling.k_center_greedy", reason="anomalib is not installed"
    )
    points = torch.randn(700, 12, generator=seeded(1))
    start = torch.randperm(700, generator=seeded())[:1]
    monkeypatch.setattr(torch, "randint", lambda **_: start)
    # Three axes: it then takes the points as they are, without a projection of its own.
    sampler = module.KCenterGreedy(points.unsqueeze(2), sampling_ratio=0.1)
    theirs = sampler.select_coreset_idxs()
    ours = greedy_k_centre(points, 69, generator=seeded(), num_starts=1)
    assert theirs == [int(start), *ours.tolist()]
