import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.drawing.textures import Textures
from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.memseg import drawing
from models.methods.memseg.drawing import disordered, draw_training_image, find_foreground
from models.methods.memseg.memory import squared_differences
from models.methods.memseg.memseg import Memseg, MemsegOptions
from models.methods.memseg.networks import CoordinateAttention, Fusion
from models.training.focal import focal_loss
from tests.models.banks import Bank, draw_images, seeded, told
from tests.models.methods.spotted import auroc, draw_spotted, image_scores
from tests.models.methods.striped import draw_striped

OPTIONS = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 4, "memory_images": 3}
MILD = ("turn_at_random", "change_brightness", "change_colour")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(3)
    return FrozenExtractor("test_resnet", (0, 1, 2, 3), weights="random")


def memseg(backbone, **options):
    torch.manual_seed(0)
    shape = FeatureShape((), backbone)
    return Memseg(shape, MemsegOptions(**{**OPTIONS, **options}))


def fitted(backbone, bank, **options):
    detector = memseg(backbone, **options)
    detector.fit(bank, generator=seeded())
    return detector


def rng(seed=0):
    return np.random.default_rng(seed)


# The memory


def test_the_nearest_image_is_that_of_least_mean_difference_over_all_stages():
    levels = [torch.randn(5, c, s, s, generator=seeded(c)) for c, s in ((3, 4), (7, 2))]
    stored = [torch.randn(6, c, s, s, generator=seeded(c + 1)) for c, s in ((3, 4), (7, 2))]
    memories = [one.permute(0, 2, 3, 1).flatten(1) for one in stored]
    found = squared_differences(levels, memories)
    rows = []
    for image in range(5):
        distances = []
        for row in range(6):
            each = [
                ((level[image] - one[row]) ** 2).mean()
                for level, one in zip(levels, stored, strict=True)
            ]
            distances.append(sum(each))
        row = int(torch.stack(distances).argmin())
        rows.append(row)
        for level, one, part in zip(levels, stored, found, strict=True):
            torch.testing.assert_close(part[image], (level[image] - one[row]) ** 2)
    assert len(set(rows)) > 2


def test_what_is_remembered_are_pretrained_features_of_some_images(backbone):
    bank = Bank(draw_striped(8))
    detector = fitted(backbone, bank)
    assert int(detector.remembered) == 3
    rows = torch.randperm(8, generator=_after_weights(detector))[:3]
    with torch.no_grad():
        maps = backbone.net(backbone.pixels(bank.features[rows]))[1:-1]
    levels = [level.contiguous() / level.std() for level in maps]
    for name, level in zip(detector.sized_by_fit, levels, strict=True):
        stored = detector.get_buffer(name)
        torch.testing.assert_close(
            stored, level.permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-3, atol=1e-3
        )
    # Where an image is its own memory there is no difference.
    for difference in squared_differences(levels, detector._memories()):
        assert difference.abs().max() < 1e-4
    plain = fitted(backbone, bank, scale_stages=False)
    assert torch.equal(plain.scales, torch.ones(4))
    stored = plain.get_buffer(plain.sized_by_fit[0])
    torch.testing.assert_close(stored, maps[0].permute(0, 2, 3, 1).flatten(0, 2))


def test_a_backbone_of_larger_features_gives_the_same_maps(backbone):
    """Its stages' maps are a hundred times as large; the decoder sees nothing of it."""
    larger = copy.deepcopy(backbone)
    detector, images = memseg(backbone, memory_images=4), draw_spotted(2)[0]
    other = memseg(larger, memory_images=4)
    for head, factor in ((detector, 1.0), (other, 100.0)):
        maps = head.encoder.forward
        head.encoder.forward = lambda pixels, maps=maps, factor=factor: [
            factor * one for one in maps(pixels)
        ]
        head.fit(Bank(draw_striped(4)), generator=seeded())
    torch.testing.assert_close(100 * detector.scales, other.scales)
    torch.testing.assert_close(detector(images), other(images), rtol=0.02, atol=1e-3)


def _after_weights(detector):
    """A generator that has drawn the weights of a fit."""
    generator = seeded()
    with torch.no_grad():
        from models.training.convolutions import initialise

        initialise(detector.fusion, generator)
        state = {name: value.clone() for name, value in detector.decoder.state_dict().items()}
        initialise(detector.decoder, generator)
        detector.decoder.load_state_dict(state)
    return generator


def test_fewer_images_are_all_remembered_and_that_is_said(backbone):
    detector = fitted(backbone, Bank(draw_striped(5)), memory_images=9, batch_size=5)
    assert int(detector.remembered) == 5
    assert any("all 5 images are remembered" in remark for remark in detector.remarks)
    assert "48 images" in detector.remarks[0]
    with pytest.raises(ModelError, match="as large as those that MemSeg remembers"):
        detector(draw_images(1, side=64))
    with pytest.raises(ModelError, match="no remembered images"):
        memseg(backbone)(draw_striped(1))


# The networks


def test_coordinate_attention_weighs_rows_and_columns():
    torch.manual_seed(1)
    attention = CoordinateAttention(12).eval()
    maps = torch.randn(2, 12, 5, 7, generator=seeded())
    found = attention(maps)
    assert found.shape == maps.shape
    assert attention.joint[0].weight.shape == (8, 12, 1, 1)
    joint, norm = attention.joint[0], attention.joint[1]

    def squeezed(line):
        hidden = norm(joint(line[None, :, None, None]))
        return hidden * (hidden + 3).clamp(0, 6) / 6

    for y, x in ((0, 0), (4, 2), (3, 6)):
        by_row = attention.of_rows(squeezed(maps[1, :, y].mean(dim=1))).sigmoid()
        by_column = attention.of_columns(squeezed(maps[1, :, :, x].mean(dim=1))).sigmoid()
        wanted = maps[1, :, y, x] * by_row.flatten() * by_column.flatten()
        torch.testing.assert_close(found[1, :, y, x], wanted)


def test_fused_maps_are_weighed_by_the_differences_from_coarse_to_fine():
    torch.manual_seed(1)
    fusion = Fusion([2, 3, 4]).eval()
    sizes = ((2, 9), (3, 5), (4, 3))  # odd grids, each about half of the one before
    maps, differences = (
        [torch.rand(2, c, s, s, generator=seeded(c + shift)) for c, s in sizes] for shift in (0, 9)
    )
    found = fusion(maps, differences)
    assert [one.shape for one in found] == [one.shape for one in maps]

    def up(one, size):
        return F.interpolate(one, (size, size), mode="bilinear", align_corners=True)

    blocks = [
        block(torch.cat(pair, dim=1))
        for block, pair in zip(fusion.blocks, zip(maps, differences, strict=True), strict=True)
    ]
    third = blocks[2]
    second = blocks[1] + fusion.downs[1](up(third, 5))
    first = blocks[0] + fusion.downs[0](up(second, 9))
    means = [one.mean(dim=1, keepdim=True) for one in differences]
    weight = means[1] * up(means[2], 5)
    torch.testing.assert_close(found[2], third * means[2])
    torch.testing.assert_close(found[1], second * weight)
    torch.testing.assert_close(found[0], first * means[0] * up(weight, 9))
    # Without a difference nothing passes.
    none = [torch.zeros_like(one) for one in differences]
    assert all(one.abs().max() == 0 for one in fusion(maps, none))


def changed_parts(detector, backbone):
    """Names of the top modules of the encoder that a fit changed: weights, and statistics."""
    before = backbone.net.state_dict()
    names = [
        name
        for name, value in detector.encoder.net.state_dict().items()
        if not torch.equal(value, before[name])
    ]
    moved = {name.split(".")[0] for name in names if "running" in name}
    return {name.split(".")[0] for name in names} - moved, moved


def test_only_the_last_stage_trains_and_only_its_statistics_move(backbone):
    detector = fitted(backbone, Bank(draw_striped(8)))
    trained = {
        name.split(".")[0]
        for name, one in detector.encoder.net.named_parameters()
        if one.requires_grad
    }
    assert trained == {"layer3"}
    weights, moved = changed_parts(detector, backbone)
    assert weights | moved == {"layer3"}
    assert not detector.encoder.training


def test_released_the_stem_trains_too_and_all_statistics_move(backbone):
    detector = fitted(backbone, Bank(draw_striped(8)), released=True)
    trained = {
        name.split(".")[0]
        for name, one in detector.encoder.net.named_parameters()
        if one.requires_grad
    }
    assert trained == {"conv1", "bn1", "layer3"}
    _, moved = changed_parts(detector, backbone)
    assert moved >= {"bn1", "layer1", "layer2", "layer3"}


@pytest.mark.parametrize("layers", [(1, 3), (0, 2, 3), (0, 1, 2, 3, 4)])
def test_any_two_or_more_stages_do(layers):
    torch.manual_seed(3)
    frozen = FrozenExtractor("test_resnet", layers, weights="random")
    detector = fitted(frozen, Bank(draw_images(8, side=65)))
    assert detector.has_stem == (len(layers) > 2)
    assert len(detector.sized_by_fit) == max(1, len(layers) - 2)
    maps, scores = detector.score(draw_images(2, side=65))
    assert maps.shape == (2, 65, 65)
    assert scores.isfinite().all()


def test_a_single_stage_is_refused():
    torch.manual_seed(3)
    frozen = FrozenExtractor("test_resnet", (2,), weights="random")
    with pytest.raises(ModelError, match="set --layers to two or more"):
        memseg(frozen)


def test_a_step_on_a_single_position_is_refused(backbone):
    with pytest.raises(ModelError, match="single image of 16 pixels") as caught:
        fitted(backbone, Bank(draw_images(1, side=16)))
    assert caught.value.change == {"batch_size": "or choose another"}


# Drawing


def test_parts_of_an_image_change_places_and_none_is_lost():
    image = np.arange(16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    found = disordered(image, (4, 8), rng())

    def parts(one):
        blocks = one.reshape(4, 4, 8, 2, 3).swapaxes(1, 2).reshape(32, -1)
        return sorted(map(tuple, blocks.tolist()))

    assert parts(found) == parts(image)
    assert not np.array_equal(found, image)
    assert disordered(image[:13, :13], (4, 8), rng()).shape == (13, 13, 3)


@pytest.mark.parametrize("bright", [True, False])
def test_the_foreground_is_what_the_border_is_not(bright):
    image = np.full((20, 20, 3), 40 if bright else 210, np.uint8)
    image[5:15, 6:14] = 200 if bright else 30
    mask = np.zeros((20, 20), bool)
    mask[5:15, 6:14] = True
    assert np.array_equal(find_foreground(image), mask)


@pytest.mark.parametrize("released", [False, True])
def test_half_of_the_anomalies_are_textures_and_the_others_the_image_itself(monkeypatch, released):
    image = np.full((64, 64, 3), 90, np.uint8)
    image[16:48, 16:48] = 120
    source = Textures([np.full((8, 8, 3), 250, np.uint8)], "one")
    monkeypatch.setattr(drawing, "augment", lambda one, _: one + 7)
    for name in MILD:
        monkeypatch.setattr(drawing, name, lambda one, _: one)
    monkeypatch.setattr(drawing, "OPACITY", (1.0, 1.0))
    kinds, masks = [], []
    for seed in range(200):
        found, mask = draw_training_image(
            image, source, rng(seed), anomalous=0.5, foreground="otsu", released=released
        )
        assert np.array_equal(found[~mask], image[~mask])
        assert not mask[:16].any()
        masks.append(mask.any())
        if mask.any():
            kinds.append(bool((found[mask] == 250).all()))
            levels = set(np.unique(found[mask]).tolist())
            assert levels <= ({250} if kinds[-1] else {97, 127} if released else {90, 120})
    assert 0.25 < np.mean(masks) < 0.55
    assert 0.35 < np.mean(kinds) < 0.65


# The detector


def test_losses_are_weighted_and_added(backbone):
    detector = fitted(backbone, Bank(draw_striped(8)))
    images, masks = draw_spotted(3)
    found = detector.losses(images, masks)
    logits = detector._logits(images, detector._memories())
    distance = (logits.softmax(dim=1)[:, 1] - masks.float()).abs().mean()
    torch.testing.assert_close(found["l1"], 0.6 * distance)
    torch.testing.assert_close(found["focal"], 0.4 * focal_loss(logits, masks, gamma=4.0))
    torch.testing.assert_close(found["loss"], found["l1"] + found["focal"])


def test_an_image_is_scored_by_its_highest_pixels(backbone):
    detector = fitted(backbone, Bank(draw_striped(8)), score_pixels=30)
    maps, scores = detector.score(draw_spotted(2)[0])
    wanted = maps.flatten(1).sort(dim=1, descending=True).values[:, :30].mean(dim=1)
    torch.testing.assert_close(scores, wanted)
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_the_end(
    backbone, monkeypatch
):
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fitted(backbone, Bank(draw_striped(4)), epochs=4, steps_per_epoch=5)
    assert len(rates) == 20
    assert rates[:2] == pytest.approx([1e-4 + 2.9e-3 / 2, 3e-3])
    assert rates[10] == pytest.approx(1e-4 + 2.9e-3 * 0.5)
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_epochs_have_the_steps_that_are_asked_for_whatever_the_bank(backbone):
    detector = memseg(backbone, epochs=2, steps_per_epoch=3, batch_size=4)
    count = []
    losses = detector.losses
    detector.losses = lambda *batch: count.append(len(batch[0])) or losses(*batch)
    values = told(detector, Bank(draw_striped(7)))
    assert count == [4, 3, 4] * 2
    assert values[0].keys() == {"loss", "l1", "focal"}
    assert detector.stopped_at(1) == {"epochs": 1, "schedule_epochs": 2}


def test_a_visible_defect_stands_out_of_what_was_learned_alone(backbone):
    bank, good = Bank(draw_striped(16)), draw_striped(24, seed=11)
    bad, masks = draw_spotted(24, seed=12)
    options = {"batch_size": 8, "memory_images": 6}
    learned = fitted(backbone, bank, **options, epochs=4, steps_per_epoch=15)
    assert auroc(image_scores(learned, good), image_scores(learned, bad)) > 0.9
    maps = learned(bad)
    assert auroc(maps[~masks][::7], maps[masks][::29]) > 0.55
    unlearned = fitted(backbone, bank, **options, learning_rate=1e-9, least_learning_rate=1e-9)
    assert auroc(image_scores(unlearned, good), image_scores(unlearned, bad)) < 0.8


def test_no_textures_are_refused(backbone, tmp_path):
    detector = memseg(backbone, anomaly_source=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="nowhere is not a folder"):
        detector.fit(Bank(draw_striped(4)), generator=seeded())
