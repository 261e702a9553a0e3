import functools

import numpy as np
import pytest
import torch

from models.errors import ModelError
from models.methods import padim as module
from tests.models.banks import draw_bank, fitted

padim = functools.partial(fitted, "padim", dims=None)


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
@pytest.mark.parametrize(("offset", "regularization"), [(0.0, 0.01), (100.0, 0.01), (0.0, 0.3)])
def test_equals_a_loop_over_positions(monkeypatch, count, channels, side, offset, regularization):
    """More images than are read at once, and fewer than channels; chunks of two positions."""
    monkeypatch.setattr(module, "CHUNK", 2 * channels**2)
    bank = draw_bank(count, channels, side)
    bank.features += offset
    queries = 2 * draw_bank(3, channels, side, seed=2).features + offset
    expected = reference(bank.features, queries, regularization)
    maps = padim(bank, regularization=regularization)(queries)
    np.testing.assert_allclose(maps, expected, rtol=1e-4)


def test_channels_are_drawn_from_the_seed():
    bank, queries = draw_bank(channels=30), draw_bank(channels=30, seed=2).features
    detector = padim(bank, dims=7)
    kept = detector.kept.tolist()
    assert len(set(kept)) == 7
    assert kept == sorted(kept) != list(range(7))
    expected = reference(bank.features[:, kept], queries[:, kept])
    np.testing.assert_allclose(detector(queries), expected, rtol=1e-4)
    assert detector.remarks == []


def test_fewer_channels_than_asked_for_are_all_used_and_remarked():
    detector = padim(draw_bank(channels=6), dims=550)
    assert detector.kept.tolist() == list(range(6))
    (remark,) = detector.remarks
    assert "all 6 channels" in remark
    assert "--method.dims 550" in remark


def test_another_grid_is_an_error():
    with pytest.raises(ModelError, match="25 positions, the features have 4 x 4"):
        padim(draw_bank(side=5))(draw_bank(side=4).features)


def test_a_single_image_is_an_error():
    with pytest.raises(ModelError, match="at least 2 normal images"):
        padim(draw_bank(count=1))


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
        padim(bank, regularization=0.01001)(queries), theirs, rtol=1e-4, atol=0
    )
    # The paper's own 0.01 differs by half of 1e-5 / 0.01 at most.
    torch.testing.assert_close(padim(bank)(queries), theirs, rtol=6e-4, atol=0)
