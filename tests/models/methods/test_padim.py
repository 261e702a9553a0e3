import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods import padim as module
from models.methods.padim import Padim, PadimOptions
from tests.models.banks import Bank, draw_bank, seeded


def made(channels, **options):
    return Padim(FeatureShape((channels,)), PadimOptions(**{"dims": None} | options))


def fitted(bank, seed=0, **options):
    detector = made(bank.channels, **options)
    detector.fit(bank, generator=seeded(seed))
    return detector


def reference(normal, queries, regularization=0.01):
    """Maps (B, H, W) from NumPy's covariance and inverse at each position, float64."""
    normal, queries = normal.double().numpy(), queries.double().numpy()
    maps = np.empty((len(queries), *queries.shape[2:]))
    for h, w in np.ndindex(maps.shape[1:]):
        covariance = np.atleast_2d(np.cov(normal[:, :, h, w], rowvar=False))
        precision = np.linalg.inv(covariance + regularization * np.eye(len(covariance)))
        offsets = queries[:, :, h, w] - normal[:, :, h, w].mean(axis=0)
        maps[:, h, w] = np.sqrt(np.einsum("bi,ij,bj->b", offsets, precision, offsets))
    return maps


@pytest.mark.parametrize(
    ("count", "channels", "side"), [(40, 6, 3), (4, 9, 2), (30, 5, 1), (9, 1, 2)]
)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_equals_a_loop_over_positions(monkeypatch, count, channels, side, offset):
    """More images than are read at once, and fewer than channels; chunks of two positions."""
    monkeypatch.setattr(module, "CHUNK", 2 * channels**2)
    bank = draw_bank(count, channels, side)
    bank.features += offset
    queries = 2 * draw_bank(3, channels, side, seed=2).features + offset
    expected = reference(bank.features, queries)
    np.testing.assert_allclose(fitted(bank)(queries), expected, rtol=2e-4)


def test_regularization_counts():
    bank, queries = draw_bank(4, 9, 2), draw_bank(3, 9, 2, seed=2).features
    expected = reference(bank.features, queries, regularization=0.3)
    np.testing.assert_allclose(fitted(bank, regularization=0.3)(queries), expected, rtol=1e-4)


def test_channels_are_drawn_from_the_seed():
    bank, queries = draw_bank(channels=30), draw_bank(channels=30, seed=2).features
    detector = fitted(bank, dims=7)
    kept = detector.kept.tolist()
    assert len(set(kept)) == 7
    assert kept == sorted(kept) != list(range(7))
    assert fitted(bank, dims=7).kept.tolist() == kept
    assert fitted(bank, seed=1, dims=7).kept.tolist() != kept
    expected = reference(bank.features[:, kept], queries[:, kept])
    np.testing.assert_allclose(detector(queries), expected, rtol=1e-4)
    assert detector.remarks == []


def test_fewer_channels_than_asked_for_are_all_used_and_remarked():
    detector = fitted(draw_bank(channels=6), dims=550)
    assert detector.kept.tolist() == list(range(6))
    (remark,) = detector.remarks
    assert "all 6 channels" in remark
    assert "--method.dims 550" in remark


def test_positions_have_gaussians_of_their_own():
    """What is normal on the left is an anomaly on the right."""
    means = torch.tensor([[0.0, 10.0]]).expand(20, 4, 1, 2)
    bank = Bank(means + torch.randn(means.shape, generator=seeded()))
    normal = means + torch.randn(means.shape, generator=seeded(1))
    scores = fitted(bank)(torch.cat([normal, normal.flip(3)]))
    for column in range(2):
        assert roc_auc_score([0] * 20 + [1] * 20, scores[:, 0, column]) == 1.0


def test_stored_head_scores_the_same(tmp_path):
    bank, queries = draw_bank(channels=12), draw_bank(channels=12, seed=2).features
    detector = fitted(bank, dims=5)
    save_file(detector.state_dict(), tmp_path / "head.safetensors")
    other = made(bank.channels, dims=5)
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(other(queries), detector(queries))
    with pytest.raises(RuntimeError, match="size mismatch"):
        made(bank.channels, dims=6).load_state_dict(detector.state_dict())


def test_monitor_is_called_once():
    calls = []
    detector = made(6)
    detector.fit(draw_bank(), generator=seeded(), monitor=lambda *call: calls.append(call))
    assert calls == [(1, {})]
    assert detector.stopped_at(1) == {}


def test_another_grid_is_an_error():
    with pytest.raises(ModelError, match="25 positions, the features have 4 x 4"):
        fitted(draw_bank(side=5))(draw_bank(side=4).features)


def test_a_single_image_is_an_error():
    with pytest.raises(ModelError, match="at least 2 normal images"):
        fitted(draw_bank(count=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 0}, "--method.dims 0 must be above 0"),
        ({"regularization": 0.0}, "--method.regularization 0.0 must be above 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PadimOptions(**options)


@pytest.mark.parametrize("count", [4, 40])
def test_agrees_with_anomalib(count):
    """On the same features; anomalib adds 1e-5 to the diagonal beside the paper's 0.01."""
    anomalib = "anomalib.models.image.padim.anomaly_map"
    maps = pytest.importorskip(anomalib, reason="anomalib is not installed").AnomalyMapGenerator()
    from anomalib.models.components import MultiVariateGaussian

    bank, queries = draw_bank(count, 9, 4), draw_bank(5, 9, 4, seed=2).features
    statistics = MultiVariateGaussian().fit(bank.features)
    theirs = maps.compute_distance(queries, statistics)[:, 0]
    torch.testing.assert_close(
        fitted(bank, regularization=0.01001)(queries), theirs, rtol=1e-4, atol=0
    )
    # The paper's own 0.01 differs by half of 1e-5 / 0.01 at most.
    torch.testing.assert_close(fitted(bank)(queries), theirs, rtol=6e-4, atol=0)
