import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.mahalanobis import Mahalanobis, MahalanobisOptions
from tests.models.banks import Bank, as_positions, seeded, told


def correlated(count=30, channels=7, side=2, *, scale=1.0, offset=0.0, seed=0):
    """Features (N, C, H, W), float64, of unequal variances and a mean that is not zero."""
    mixing = torch.randn(channels, channels, generator=seeded(9), dtype=torch.float64)
    mixing *= torch.logspace(0, -1, channels, dtype=torch.float64)
    draw = torch.randn(count, side, side, channels, generator=seeded(seed), dtype=torch.float64)
    return (scale * (draw @ mixing.T) + offset).permute(0, 3, 1, 2)


def made(channels, **options):
    return Mahalanobis(FeatureShape((channels,)), MahalanobisOptions(**options))


def fitted(features, **options):
    """A detector of the features' type, so that only the mathematics is compared."""
    detector = made(features.shape[1], **options).to(features.dtype)
    (values,) = told(detector, Bank(features))
    return detector, values["shrinkage"]


@pytest.mark.parametrize("count", [4, 30, 400])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (10.0, 1e3)])
def test_equals_scikit_learns_ledoit_wolf(count, scale, offset):
    """Also with fewer features (16) than channels (20)."""
    features = correlated(count, channels=20, scale=scale, offset=offset)
    detector, shrinkage = fitted(features)
    expected = LedoitWolf().fit(as_positions(features).numpy())
    assert 0 < shrinkage < 1
    assert shrinkage == pytest.approx(expected.shrinkage_, rel=1e-8)
    covariance = torch.linalg.inv(detector.whitening.T @ detector.whitening)
    np.testing.assert_allclose(
        covariance, expected.covariance_, rtol=1e-8, atol=1e-8 * covariance.abs().max()
    )
    probes = correlated(5, channels=20, scale=3 * scale, offset=offset, seed=5)
    squares = expected.mahalanobis(as_positions(probes).numpy())
    np.testing.assert_allclose(detector(probes).flatten(), np.sqrt(squares), rtol=1e-8)


def test_first_images_that_lie_apart_cost_no_digits():
    """Sums are about the mean of the first images, wherever the others are."""
    features = correlated(400, channels=20)
    features[:4] += 1e3
    detector, shrinkage = fitted(features)
    expected = LedoitWolf().fit(as_positions(features).numpy())
    assert shrinkage == pytest.approx(expected.shrinkage_, rel=1e-8)
    squares = expected.mahalanobis(as_positions(features).numpy())
    np.testing.assert_allclose(detector(features).flatten(), np.sqrt(squares), rtol=1e-8)


def test_bank_is_read_once():
    bank = Bank(correlated().float())
    made(7).fit(bank, generator=seeded())
    assert bank.passes == 1


def test_float32_scores_keep_five_digits():
    features = correlated(channels=20, offset=10.0)
    detector, _ = fitted(features.float())
    exact, _ = fitted(features)
    probes = correlated(5, channels=20, offset=10.0, seed=5)
    np.testing.assert_allclose(detector(probes.float()), exact(probes), rtol=1e-5)


def test_hand_worked_with_a_fixed_shrinkage():
    """Variances 4 and 1 about (1, 2), their mean 2.5: a fifth of the way they are 3.7 and 1.3."""
    positions = torch.tensor([[-1.0, 1], [3, 1], [-1, 3], [3, 3]])
    detector, shrinkage = fitted(positions[:, :, None, None], shrinkage=0.2)
    assert shrinkage == 0.2
    probes = torch.tensor([[1.0, 2], [2, 2], [1, 4], [2, 4]])[:, :, None, None]
    expected = [0, 1 / 3.7, 4 / 1.3, 1 / 3.7 + 4 / 1.3]
    torch.testing.assert_close(detector(probes).flatten(), torch.tensor(expected).sqrt())


@pytest.mark.parametrize(("count", "shrinkage"), [(1, None), (1, 0.5), (5, 0.0)])
def test_singular_covariance_is_an_error(count, shrinkage):
    """One feature has no variance; five span less than seven channels."""
    message = f"covariance of {count} normal features in 7 channels"
    with pytest.raises(ModelError, match=message) as caught:
        fitted(correlated(count, side=1), shrinkage=shrinkage)
    assert caught.value.change == {"shrinkage": "none or larger"}
