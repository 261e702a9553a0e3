from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from models.detector import FeatureShape
from models.features import matmul as products
from models.features import multiscale as under_test
from models.features.matmul import FEW_ROWS
from models.features.multiscale import (
    add_outer,
    add_second_moment,
    adjoint_by_products,
    features_at,
    join_stages,
    parts_in_cache,
    position_sums,
    project,
    resize_adjoint,
    squared_lengths,
)
from models.methods.mahalanobis import Mahalanobis, MahalanobisOptions
from models.methods.noco import Noco, NocoOptions, _MeanExcess
from models.methods.noco_cf.noco_exact import NocoExact, NocoExactOptions
from tests.models.banks import Bank, StagedBank, seeded

SHAPES = {
    "two": [(3, 8, 8), (5, 4, 4)],
    "three, one of the largest size twice": [(2, 8, 8), (3, 4, 4), (4, 2, 2), (2, 8, 8)],
    "largest last, no whole ratio, not square": [(4, 3, 4), (2, 5, 9), (3, 7, 11)],
    "one": [(6, 5, 4)],
    "pooled": [(3, 1, 1), (4, 1, 1)],
    "a stage of one position": [(3, 6, 6), (4, 1, 1)],
}
shapes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)


def draw(shapes, *, count=5, dtype=torch.float64, seed=0):
    generator = seeded(seed)
    return [
        torch.randn(count, *shape, generator=generator, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        for shape in shapes
    ]


def joined(stages):
    """Features by the definition, in the precision of the stages: (P, C)."""
    size = max((m.shape[2:] for m in stages), key=lambda s: s[0] * s[1])
    resized = [F.interpolate(m, size, mode="bilinear") for m in stages]
    return rearrange(torch.cat(resized, dim=1), "b c h w -> (b h w) c")


@shapes
def test_projection_is_that_of_the_joined_features(shapes):
    stages = draw(shapes)
    features = joined(stages)
    weight = torch.randn(7, features.shape[1], generator=seeded(1), dtype=torch.float64)
    bias = torch.randn(7, generator=seeded(2), dtype=torch.float64)
    found = project(stages, weight, bias)
    assert found.is_contiguous()
    assert found.shape[:3] == (5, *join_stages(stages).shape[2:])
    expected = F.linear(features, weight, bias)
    torch.testing.assert_close(rearrange(found, "b h w r -> (b h w) r"), expected)
    without = project(stages, weight)
    torch.testing.assert_close(rearrange(without, "b h w r -> (b h w) r"), expected - bias)


def test_on_a_gpu_the_adjoint_of_a_resize_is_products():
    rows = draw([(3, 9, 11)])[0].permute(0, 2, 3, 1).contiguous()
    for size in ((4, 5), (9, 4), (1, 1)):
        found = adjoint_by_products(rows, size)
        assert found.is_contiguous()
        torch.testing.assert_close(found, resize_adjoint(rows, size))


@shapes
def test_outer_products_are_those_of_the_joined_features(shapes):
    stages = draw(shapes)
    features = joined(stages)
    B, _, H, W = join_stages(stages).shape
    rows = torch.randn(B, H, W, 7, generator=seeded(1), dtype=torch.float64)
    sums = torch.ones(7, features.shape[1], dtype=torch.float64)
    add_outer(sums, stages, rows)
    torch.testing.assert_close(sums, 1 + rearrange(rows, "b h w r -> r (b h w)") @ features)


@shapes
def test_second_moment_is_that_of_the_joined_features(shapes):
    stages = draw(shapes)
    extended = F.pad(joined(stages), (0, 1), value=1.0)
    C = extended.shape[1]
    sums = torch.ones(C, C, dtype=torch.float64)
    add_second_moment(sums, stages)
    torch.testing.assert_close(sums.triu(), (1 + extended.T @ extended).triu())


def test_second_moment_of_float32_stages_is_summed_in_float64():
    stages = [stage.float() for stage in draw(SHAPES["two"])]
    extended = F.pad(joined([stage.double() for stage in stages]), (0, 1), value=1.0)
    sums = torch.zeros(9, 9, dtype=torch.float64)
    add_second_moment(sums, stages)
    torch.testing.assert_close(sums.triu(), (extended.T @ extended).triu(), rtol=1e-12, atol=1e-12)


@shapes
def test_sums_and_lengths_are_those_of_the_joined_features(shapes):
    stages = draw(shapes)
    features = joined(stages)
    torch.testing.assert_close(position_sums(stages), features.sum(dim=0))
    lengths = features.square().sum(dim=1)
    torch.testing.assert_close(squared_lengths(stages).flatten(), lengths)


@shapes
def test_features_at_are_those_of_the_joined_features(shapes):
    stages = draw(shapes)
    B, _, H, W = join_stages(stages).shape
    features = rearrange(joined(stages), "(b p) c -> b p c", b=B)
    places = torch.randint(H * W, (B, 6), generator=seeded(3))
    expected = torch.stack([image[rows] for image, rows in zip(features, places, strict=True)])
    torch.testing.assert_close(features_at(stages, places), expected)


@pytest.mark.parametrize("images", [1, 2, 3, 100])
def test_parts_are_the_batch_in_order(monkeypatch, images):
    stages = draw(SHAPES["two"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: images)
    monkeypatch.setattr(under_test, "CACHE_BYTES", 8 * 8 * 7 * 8)
    parts = list(parts_in_cache(stages, 7))
    assert len(parts) == -(-5 // images)
    for i, stage in enumerate(stages):
        assert torch.equal(torch.cat([part[i] for part in parts]), stage)


def test_parts_have_at_least_one_image(monkeypatch):
    monkeypatch.setattr(under_test, "CACHE_BYTES", 1)
    assert [len(part[0]) for part in parts_in_cache(draw(SHAPES["two"]), 7)] == [1] * 5


@shapes
@pytest.mark.parametrize("squared", [False, True])
def test_gradient_of_the_mean_excess_is_autograds(monkeypatch, shapes, squared):
    stages = draw(shapes)
    features = joined(stages)
    C = features.shape[1]
    monkeypatch.setattr(under_test, "CACHE_BYTES", 1)  # parts of one image
    weight = torch.randn(6, C, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    offset = torch.randn(6, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    distance = torch.linalg.vector_norm(F.linear(features, weight, offset), dim=1)
    distance = distance.square() if squared else distance
    margin = distance.detach().mean().requires_grad_()  # about half of the positions count
    expected = F.relu(distance - margin).mean()
    found = _MeanExcess.apply(weight, offset, margin, squared, *stages)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(3 * expected, (weight, offset, margin))
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, (weight, offset, margin)), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_residual_of_zero_has_no_direction():
    features = torch.zeros(1, 2, 1, 1)
    weight, offset = torch.eye(2).requires_grad_(), torch.zeros(2, requires_grad=True)
    loss = _MeanExcess.apply(weight, offset, torch.tensor(0.0), False, features)
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()
    assert not offset.grad.any()


@shapes
@pytest.mark.parametrize("loss", ["distance", "squared"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Noco, NocoOptions(epochs=3, batch_size=2, learning_rate=1e-2)),
        (NocoExact, NocoExactOptions(time=(1.0, 30.0), prototypes=1)),
        (NocoExact, NocoExactOptions(time=(1.0, 30.0), prototypes=2)),
        (Mahalanobis, MahalanobisOptions()),
    ],
    ids=["trained", "closed form", "prototypes", "mahalanobis"],
)
@pytest.mark.parametrize("few_rows", [1, FEW_ROWS])
def test_a_head_fits_and_scores_stages_as_it_does_joined_features(
    monkeypatch, shapes, loss, kind, options, few_rows
):
    monkeypatch.setattr(products, "FEW_ROWS", few_rows)  # whether products are convolutions
    stages = draw(shapes, dtype=torch.float32)
    staged, plain = StagedBank(stages), Bank(join_stages(stages))
    if kind is not Mahalanobis:
        options = replace(options, loss=loss)
    shape = FeatureShape(tuple(stage.shape[1] for stage in stages))
    detectors = [kind(shape, options) for _ in range(2)]
    for detector, bank in zip(detectors, (staged, plain), strict=True):
        detector.fit(bank, generator=seeded())
    with torch.inference_mode():
        expected = detectors[1](plain.features)
        maps, own = detectors[0].score_stages(stages)
        assert own is None
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(maps, detectors[0](plain.features), rtol=1e-5, atol=1e-6)
        if kind is NocoExact:
            steps = detectors[0].score_steps(stages)
            torch.testing.assert_close(steps[-1], maps, rtol=1e-4, atol=1e-5)
        elif kind is Noco:
            for ours, theirs in zip(
                detectors[0].geometry(stages, maps),
                detectors[0].geometry([plain.features], maps),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs)


def test_images_are_the_only_stage_of_methods_that_take_them():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    assert join_stages([images]) is images
