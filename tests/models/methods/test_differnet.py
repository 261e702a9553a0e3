"""DifferNet: views of images, the flow on their pooled features, and its score."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.flows import differnet as module
from models.methods.flows.differnet import Differnet, DiffernetOptions
from models.methods.flows.views import rotated
from tests.models.banks import Bank, draw_images, seeded, told

SMALL = {
    **{"blocks": 2, "width": 16, "train_views": 4, "views_per_step": 2, "test_views": 4},
    **{"epochs": 2, "batch_size": 4},
}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(3)
    return FrozenExtractor("resnet10t", (1, 2), weights="random")


def differnet(backbone, **options):
    return Differnet(FeatureShape((), backbone), DiffernetOptions(**{**SMALL, **options}))


def fitted(backbone, bank, **options):
    detector = differnet(backbone, **options)
    detector.fit(bank, generator=seeded())
    return detector


def smooth(count, seed=0):
    """Smooth images of greys between 90 and 165, (N, 3, 48, 48), uint8."""
    coarse = torch.rand(count, 1, 6, 6, generator=seeded(seed))
    fine = F.interpolate(coarse, (48, 48), mode="bilinear")
    return (90 + 75 * fine).byte().expand(-1, 3, -1, -1).contiguous()


# Views


def test_right_angles_turn_every_pixel_exactly():
    images = draw_images(2).float()
    views = rotated(images, torch.tensor([[0.0, 90, 180, -90], [270.0, 0, 360, 90]]))
    turns = [[0, 1, 2, 3], [3, 0, 0, 1]]
    wanted = [images[i].rot90(k, (1, 2)) for i in (0, 1) for k in turns[i]]
    assert torch.equal(views, torch.stack(wanted))


@pytest.mark.parametrize("angle", [10.0, 45.0, -100.0])
def test_other_angles_are_pillows_with_black_corners(angle):
    (image,) = smooth(1)
    (view,) = rotated(image[None].float() + 1, torch.tensor([[angle]]))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy() + 1)
    theirs = np.asarray(picture.rotate(angle, Image.Resampling.NEAREST)).transpose(2, 0, 1)
    # A rounding apart, where a point lies in the middle of two pixels.
    assert (view.numpy() == theirs).mean() > 0.97
    assert view[:, 0, 0].tolist() == [0, 0, 0]
    assert (view == 0).any(dim=0).float().mean() == pytest.approx((theirs[0] == 0).mean(), abs=0.01)


def test_vectors_are_means_of_the_last_stage_at_three_scales(backbone, monkeypatch):
    monkeypatch.setattr(module, "VIEWS_AT_ONCE", 4)
    images = draw_images(3, side=48)
    angles = torch.tensor([[0.0, 90, 33], [180, 270, 44], [90, 90, 0]])
    vectors = differnet(backbone).embed(images, angles)
    C = backbone.stage_channels[-1]
    assert vectors.shape == (3, 3, 3 * C)
    pixels = backbone.pixels(images[1:2].rot90(2, (2, 3)))
    with torch.no_grad():
        for scale, side in enumerate((48, 24, 12)):
            # Nearest interpolation to half takes every second pixel.
            seen = pixels[:, :, :: 2**scale, :: 2**scale]
            assert seen.shape[-1] == side
            wanted = backbone.net(seen)[-1].mean(dim=(2, 3))[0]
            found = vectors[1, 0, scale * C : (scale + 1) * C]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_only_the_last_stage_counts(backbone):
    torch.manual_seed(3)
    alone = FrozenExtractor("resnet10t", (2,), weights="random")
    alone.net.load_state_dict(backbone.net.state_dict(), strict=False)
    images, angles = draw_images(2), torch.zeros(2, 1)
    found, wanted = (differnet(net).embed(images, angles) for net in (alone, backbone))
    torch.testing.assert_close(found, wanted)


def test_test_views_are_evenly_spaced_so_that_quarter_turns_change_no_score(backbone):
    detector = fitted(backbone, Bank(draw_images(6)))
    assert detector.angles.tolist() == [0, 90, 180, 270]
    images = draw_images(3, seed=2)
    scores = detector(images)
    torch.testing.assert_close(detector(images.rot90(1, (2, 3))), scores, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(detector(images.flip(3)), scores, rtol=1e-4)
    assert differnet(backbone, test_views=1).angles.tolist() == [0]


class Turned(nn.Module):
    def forward(self, images):
        angles = torch.tensor([[30.0, 90, 200]]).expand(images.shape[0], -1)
        return rotated(images.float(), angles)


def test_an_onnx_graph_turns_any_number_of_images():
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (requirements-export.txt)")
    import onnxruntime

    program = torch.onnx.export(
        Turned().eval(),
        (draw_images(2, side=8),),
        dynamo=True,
        verbose=False,
        opset_version=18,
        input_names=["images"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (1, 5):
        images = draw_images(batch, side=8, seed=batch).contiguous()
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_array_equal(found, Turned()(images).numpy())


# The fit


@pytest.fixture
def seen(monkeypatch):
    """What flows are given while they train, with the log-determinants."""
    given = []
    forward = module.Chain.forward

    def watched(self, x):
        y, log_det = forward(self, x)
        given.append((x, y.detach(), log_det.detach()))
        return y, log_det

    monkeypatch.setattr(module.Chain, "forward", watched)
    return given


def test_the_images_are_read_once_and_each_epoch_draws_of_their_views(backbone, seen):
    bank = Bank(draw_images(7))
    detector = differnet(backbone, train_views=5, epochs=3)
    detector.fit(bank, generator=seeded())
    assert bank.passes == 1
    assert [len(x) for x, *_ in seen] == [8, 6] * 3
    epochs = [torch.cat([seen[i][0], seen[i + 1][0]]) for i in (0, 2, 4)]
    vectors = [{tuple(row) for row in epoch.tolist()} for epoch in epochs]
    # No vector twice in an epoch; another choice in each; all of at most 7 x 5.
    assert [len(rows) for rows in vectors] == [14, 14, 14]
    assert vectors[0] != vectors[1] != vectors[2]
    assert 14 < len(set.union(*vectors)) <= 35
    # Two views of each image.
    detector = differnet(backbone, train_views=5, epochs=1)
    every = detector._embed_views(bank, after_weights(detector))
    owner = {tuple(row.tolist()): i for i in range(7) for row in every[i]}
    assert sorted(owner[row] for row in vectors[0]) == sorted(2 * list(range(7)))


def after_weights(detector):
    """The generator of a fit after it has drawn the flow."""
    generator = seeded()
    detector.flow.initialise(generator)
    return generator


def test_the_loss_is_the_papers(backbone, seen):
    (values, *_) = told(differnet(backbone, batch_size=9), Bank(draw_images(6)))
    (_, z, log_det), *_ = seen
    loss = sum(0.5 * float(z[i].square().sum()) - float(log_det[i]) for i in range(12)) / 12
    assert values["loss"] == pytest.approx(loss / z.shape[1], rel=1e-4)


def test_a_score_is_the_mean_of_squared_latents_without_the_determinant(backbone):
    detector = fitted(backbone, Bank(draw_images(6)))
    images = draw_images(3, seed=2)
    maps, scores = detector.score(images)
    vectors = detector.embed(images, detector.angles.expand(3, -1))
    for i in range(3):
        z = torch.stack([detector.flow(vectors[i, v][None])[0][0] for v in range(4)])
        torch.testing.assert_close(scores[i], z.square().mean())
    assert torch.equal(maps, scores[:, None, None])


def test_a_single_view_is_the_image_itself(backbone):
    detector = differnet(backbone, train_views=1, views_per_step=1)
    images = draw_images(3)
    found = detector._embed_views(Bank(images), seeded())
    assert torch.equal(found, detector.embed(images, torch.zeros(3, 1)))
    several = differnet(backbone)._embed_views(Bank(images), seeded())
    assert several.shape[1] == 4
    assert not torch.isclose(several, found).all(dim=2).any(dim=1).all()


def test_losses_fall_and_a_visible_defect_stands_out(backbone):
    options = {"epochs": 40, "train_views": 8, "learning_rate": 1e-3, "width": 32, "blocks": 3}
    detector = differnet(backbone, **options, batch_size=10)
    losses = [values["loss"] for values in told(detector, Bank(smooth(40)))]
    assert losses[-1] < losses[0] - 0.3
    good, bad = smooth(12, seed=20), smooth(12, seed=21)
    bad[:, :, 12:28, 12:28] = (255 * torch.rand(12, 3, 16, 16, generator=seeded(4))).byte()
    normal, anomalous = detector.score(good)[1], detector.score(bad)[1]
    assert (anomalous[:, None] > normal[None]).double().mean() > 0.9


def test_the_head_is_the_flow_alone(backbone):
    before = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    detector = fitted(backbone, Bank(draw_images(6)))
    assert all(name.startswith(("flow.", "angles")) for name in detector.state_dict())
    assert all(torch.equal(before[n], v) for n, v in backbone.net.state_dict().items())
    orders = [layer.order for layer in detector.flow if isinstance(layer, module.Permutation)]
    assert not torch.equal(*orders)


def test_the_papers_flow_has_172_million_parameters():
    """Of AlexNet's 256 channels at three scales."""
    alexnet = SimpleNamespace(stage_channels=(256,), layers=(4,), pooled=False)
    with torch.device("meta"):
        detector = Differnet(FeatureShape((), alexnet), DiffernetOptions())
    network = 384 * 2048 + 2048 + 2 * (2048 * 2048 + 2048) + 2048 * 768 + 768
    assert detector.num_trainable == 8 * 2 * network == 172_077_056


def test_a_graph_takes_views_in_parts(backbone, monkeypatch):
    monkeypatch.setattr(module, "VIEWS_IN_GRAPH", 2)
    detector = fitted(backbone, Bank(draw_images(6)), test_views=5)
    images = draw_images(3, seed=2)
    with torch.no_grad():
        found = detector.exported()(images)
        for ours, theirs in zip(found, detector.score(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# What it says, and what it refuses


def test_remarks_say_that_maps_are_flat_and_views_fixed(backbone):
    views, stage, flat = differnet(backbone).remarks
    assert "4 rotations of each image that were drawn once" in views
    assert "last stage alone: 2 of --layers" in stage
    assert "pixel metrics mean nothing" in flat
    assert differnet(backbone, train_views=1, views_per_step=1).remarks == [stage, flat]
    pooled = FrozenExtractor("resnet10t", (2,), weights="random", pool="mean")
    assert differnet(pooled, train_views=1, views_per_step=1).remarks == []


def test_more_views_in_a_step_than_there_are_is_refused(backbone):
    with pytest.raises(ModelError, match="cannot train on 5 of 4 views") as caught:
        differnet(backbone, views_per_step=5)
    assert caught.value.change == {"views_per_step": "lower", "train_views": "raise"}


def test_images_that_cannot_be_halved_are_refused(backbone):
    with pytest.raises(ModelError, match="32 pixels cannot be halved 6 times") as caught:
        fitted(backbone, Bank(draw_images(4)), scales=7)
    assert caught.value.change == {"scales": "lower"}


def test_a_backbone_that_takes_no_smaller_images_is_refused(backbone, monkeypatch):
    def require_size(size):
        if size < 32:
            raise ModelError(f"this takes no images of {size} pixels")

    monkeypatch.setattr(backbone, "require_size", require_size)
    message = "at a smaller scale, this takes no images of 16 pixels"
    with pytest.raises(ModelError, match=message) as caught:
        fitted(backbone, Bank(draw_images(4)))
    assert caught.value.change == {"scales": "1"}
    fitted(backbone, Bank(draw_images(4)), scales=1)
