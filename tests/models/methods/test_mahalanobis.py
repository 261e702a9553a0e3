import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.mahalanobis import Mahalanobis, MahalanobisOptions
from tests.models.banks import Bank, draw_bank, seeded


def correlated(count=30, channels=7, side=2, *, scale=1.0, offset=0.0, seed=0):
    """Features (N, C, H, W), float64, of unequal variances and a mean that is not zero."""
    mixing = torch.randn(channels, channels, generator=seeded(9), dtype=torch.float64)
    mixing *= torch.logspace(0, -1, channels, dtype=torch.float64)
    draw = torch.randn(count, side, side, channels, generator=seeded(seed), dtype=torch.float64)
    return (scale * (draw @ mixing.T) + offset).permute(0, 3, 1, 2)


def as_positions(features):
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def made(channels, **options):
    return Mahalanobis(FeatureShape((channels,)), MahalanobisOptions(**options))


def fitted(features, **options):
    """A detector of the features' type, so that only the mathematics is compared."""
    detector = made(features.shape[1], **options).to(features.dtype)
    shrinkages = []
    detector.fit(
        Bank(features),
        generator=seeded(),
        monitor=lambda step, values: shrinkages.append((step, values["shrinkage"])),
    )
    ((step, shrinkage),) = shrinkages
    assert step == 1
    return detector, shrinkage


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
    readings = []

    class Counted(Bank):
        def batches(self, *arguments, **options):
            readings.append(arguments)
            return super().batches(*arguments, **options)

    made(7).fit(Counted(correlated().float()), generator=seeded())
    assert len(readings) == 1


def test_float32_scores_keep_five_digits():
    features = correlated(channels=20, offset=10.0)
    detector, _ = fitted(features.float())
    exact, _ = fitted(features)
    probes = correlated(5, channels=20, offset=10.0, seed=5)
    np.testing.assert_allclose(detector(probes.float()), exact(probes), rtol=1e-5)


def test_hand_worked_with_a_fixed_shrinkage():
    """Variances 4 and 1 about (1, 2), their mean 2.5: halfway they are 3.25 and 1.75."""
    positions = torch.tensor([[-1.0, 1], [3, 1], [-1, 3], [3, 3]])
    detector, shrinkage = fitted(positions[:, :, None, None], shrinkage=0.5)
    assert shrinkage == 0.5
    probes = torch.tensor([[1.0, 2], [2, 2], [1, 4], [2, 4]])[:, :, None, None]
    expected = [0, 1 / 3.25, 4 / 1.75, 1 / 3.25 + 4 / 1.75]
    torch.testing.assert_close(detector(probes).flatten(), torch.tensor(expected).sqrt())


def test_shrinkage_of_one_is_the_scaled_euclidean_distance():
    features = correlated()
    detector, _ = fitted(features, shrinkage=1.0)
    positions = as_positions(features)
    scale = positions.var(dim=0, correction=0).mean().sqrt()
    expected = (positions - positions.mean(dim=0)).norm(dim=1) / scale
    torch.testing.assert_close(as_positions(detector(features)[:, None])[:, 0], expected)


def test_finds_what_the_euclidean_distance_does_not():
    """The anomalies lie nearer to the mean, but off the one direction normal features vary in."""
    normal = 10 * torch.randn(2100, 1, generator=seeded(1)).expand(-1, 2)
    normal = normal + 0.1 * torch.randn(2100, 2, generator=seeded(2))
    detector, _ = fitted(normal[:2000, :, None, None])
    anomalous = torch.tensor([[1.0, -1.0]]).expand(100, 2)
    probes = torch.cat([normal[2000:], anomalous])
    labels = [0] * 100 + [1] * 100
    assert roc_auc_score(labels, detector(probes[:, :, None, None]).flatten()) > 0.95
    assert roc_auc_score(labels, probes.norm(dim=1)) < 0.2


def test_stored_head_scores_the_same(tmp_path):
    bank, queries = draw_bank(), draw_bank(seed=2).features
    detector, _ = fitted(bank.features)
    save_file(detector.state_dict(), tmp_path / "head.safetensors")
    other = made(bank.channels)
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(other(queries), detector(queries))
    assert other(queries).shape == (8, 5, 5)


@pytest.mark.parametrize(("count", "shrinkage"), [(1, None), (1, 0.5), (5, 0.0)])
def test_singular_covariance_is_an_error(count, shrinkage):
    """One feature has no variance; five span less than seven channels."""
    message = f"covariance of {count} normal features in 7 channels"
    with pytest.raises(ModelError, match=message) as caught:
        fitted(correlated(count, side=1), shrinkage=shrinkage)
    assert caught.value.change == {"shrinkage": "none or larger"}


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_bad_shrinkage_is_an_error(shrinkage):
    with pytest.raises(ValueError, match=f"--method.shrinkage {shrinkage} must be in 0 to 1"):
        MahalanobisOptions(shrinkage=shrinkage)
