import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from models.detector import FeatureShape
from models.errors import ModelError
from models.features.coreset import draw_projection, greedy_k_centre
from models.methods.patchcore import PatchCore, PatchCoreOptions
from tests.models.banks import Bank, draw_bank, seeded


def made(channels, **options):
    return PatchCore(FeatureShape((channels,)), PatchCoreOptions(**options))


def fitted(bank, seed=0, **options):
    detector = made(bank.channels, **options)
    detector.fit(bank, generator=seeded(seed))
    return detector


def as_positions(features):
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


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


def test_hand_worked():
    """Memory 0, 1, 3; the farthest position, 5, is 2 from 3, whose neighbours are 3 and 1."""
    bank = Bank(torch.tensor([0.0, 1, 3]).reshape(3, 1, 1, 1))
    features = torch.tensor([0.5, 5.0, 2.0]).reshape(1, 1, 1, 3)
    maps, scores = fitted(bank, coreset_ratio=1.0, num_neighbors=2).score(features)
    torch.testing.assert_close(maps, torch.tensor([[[0.5, 2.0, 1.0]]]))
    weight = 1 - np.exp(2) / (np.exp(2) + np.exp(4))
    assert scores.tolist() == [pytest.approx(2 * weight, rel=1e-6)]


@pytest.mark.parametrize("neighbours", [2, 3, 9, 50])
@pytest.mark.parametrize("side", [1, 4])
def test_image_scores_are_those_of_the_equations(neighbours, side):
    """Also where the memory has fewer features than neighbours are asked for."""
    bank = draw_bank(count=12, channels=5, side=side)
    features = 1.5 * draw_bank(count=6, channels=5, side=side, seed=2).features
    detector = fitted(bank, coreset_ratio=0.5, num_neighbors=neighbours)
    _, scores = detector.score(features)
    np.testing.assert_allclose(
        scores, reference_scores(detector.memory, features, neighbours), rtol=2e-5
    )


def test_large_distances_do_not_overflow():
    bank = draw_bank(count=12, channels=5)
    detector = fitted(bank, coreset_ratio=0.5)
    features = draw_bank(count=3, channels=5, seed=2).features + 1e4
    maps, scores = detector.score(features)
    assert torch.isfinite(scores).all()
    assert (scores <= maps.flatten(1).amax(dim=1)).all()


def test_one_neighbour_leaves_the_weight_out():
    detector = fitted(draw_bank(), num_neighbors=1)
    maps, scores = detector.score(draw_bank(seed=2).features)
    assert torch.equal(scores, maps.flatten(1).amax(dim=1))


def test_a_memory_of_one_leaves_the_weight_out():
    """It would be 1 - 1, and every image would score 0."""
    detector = fitted(draw_bank(count=2, side=1))
    assert len(detector.memory) == 1
    maps, scores = detector.score(draw_bank(side=1, seed=2).features)
    assert torch.equal(scores, maps.flatten())
    assert scores.min() > 0


def test_maps_are_distances_to_the_nearest():
    detector = fitted(draw_bank())
    features = draw_bank(count=3, seed=2).features
    distances = torch.cdist(as_positions(features), detector.memory).amin(dim=1)
    torch.testing.assert_close(detector(features), distances.reshape(3, 5, 5))
    assert torch.equal(detector(features), detector.score(features)[0])


def test_memory_is_the_coreset_of_projected_positions():
    bank = draw_bank(count=9, channels=40)
    detector = fitted(bank, coreset_ratio=0.1, projection_dim=3)
    positions, generator = as_positions(bank.features), seeded()
    projected = positions @ draw_projection(40, 3, generator)
    chosen = greedy_k_centre(projected, 22, generator=generator)
    assert torch.equal(detector.memory, positions[chosen])
    other = greedy_k_centre(positions, 22, generator=seeded())
    assert set(chosen.tolist()) != set(other.tolist())


def test_ratio_of_one_keeps_everything():
    bank = draw_bank()
    assert torch.equal(fitted(bank, coreset_ratio=1.0).memory, as_positions(bank.features))


def test_same_seed_same_memory():
    bank = draw_bank()
    first = fitted(bank).memory
    assert torch.equal(first, fitted(bank).memory)
    assert not torch.equal(first, fitted(bank, seed=1).memory)


def test_copies_are_not_kept_and_remarked():
    bank = Bank(torch.randn(1, 6, 2, 2, generator=seeded()).repeat(20, 1, 1, 1))
    detector = fitted(bank, coreset_ratio=0.5)
    assert len(detector.memory) == 4
    (remark,) = detector.remarks
    assert "4 features instead of 40" in remark


def test_finds_a_position_that_lies_apart():
    bank = draw_bank(count=10, channels=20)
    normal = draw_bank(count=30, channels=20, seed=2).features
    anomalous = normal.clone()
    anomalous[:, :, 2, 3] += 2
    maps, scores = fitted(bank).score(torch.cat([normal, anomalous]))
    assert roc_auc_score([0] * 30 + [1] * 30, scores) > 0.95
    assert (maps[30:].flatten(1).argmax(dim=1) == 2 * 5 + 3).float().mean() > 0.9


def test_stored_head_scores_the_same(tmp_path):
    bank, queries = draw_bank(), draw_bank(seed=2).features
    detector = fitted(bank)
    save_file(detector.state_dict(), tmp_path / "head.safetensors")
    other = made(bank.channels)
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    for ours, theirs in zip(other.score(queries), detector.score(queries), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="size mismatch"):
        made(bank.channels + 1).load_state_dict(detector.state_dict())


def test_monitor_is_called_once():
    calls = []
    detector = made(6)
    detector.fit(draw_bank(), generator=seeded(), monitor=lambda *call: calls.append(call))
    assert calls == [(1, {"memory": 20})]
    assert detector.stopped_at(1) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coreset_ratio": 0.0}, "--method.coreset-ratio 0.0 must be above 0 and at most 1"),
        ({"coreset_ratio": 1.5}, "--method.coreset-ratio 1.5 must be above 0 and at most 1"),
        ({"num_neighbors": 0}, "--method.num-neighbors 0 must be above 0"),
        ({"projection_dim": 0}, "--method.projection-dim 0 must be above 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PatchCoreOptions(**options)


def test_unfitted_detector_is_an_error():
    with pytest.raises(ModelError, match="memory holds 0"):
        made(6).score(draw_bank().features)


@pytest.mark.parametrize("neighbours", [1, 9])
@pytest.mark.parametrize("side", [1, 6])
def test_scores_agree_with_anomalibs(neighbours, side):
    """The same memory and features. Its distances come from expanded squares."""
    model = anomalib_model(neighbours)
    detector = fitted(draw_bank(count=200, channels=12, side=side), num_neighbors=neighbours)
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
