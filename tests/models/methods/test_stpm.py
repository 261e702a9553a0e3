import copy

import pytest
import torch
import torch.nn.functional as F

from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.stpm import Stpm, StpmOptions
from tests.models.banks import Bank, monitoring, seeded, told


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(3)
    return FrozenExtractor("resnet10t", (1, 2), weights="random")


def images(count, seed=0):
    """Smooth grey images (N, 3, 48, 48), uint8."""
    coarse = torch.rand(count, 1, 6, 6, generator=seeded(seed))
    fine = F.interpolate(coarse, (48, 48), mode="bilinear")
    return (255 * fine).byte().expand(-1, 3, -1, -1).contiguous()


OPTIONS = {"epochs": 3, "batch_size": 4, "learning_rate": 0.1}


def stpm(teacher, **options):
    return Stpm(FeatureShape((), teacher), StpmOptions(**options))


def fitted(teacher, bank, **options):
    detector = stpm(teacher, **{**OPTIONS, **options})
    detector.fit(bank, generator=seeded())
    return detector


def test_score_is_the_product_of_half_squared_distances_of_unit_features(teacher):
    """Equations 1 and 4 of the paper, at one pixel, step by step."""
    detector = fitted(teacher, Bank(images(8)), epochs=1)
    pictures = images(2, seed=5)
    maps = detector(pictures)
    assert maps.shape == (2, 48, 48)
    pixels = teacher.pixels(pictures)
    expected = torch.ones(2, 48, 48)
    with torch.no_grad():
        for taught, learned in zip(teacher.net(pixels), detector.student(pixels), strict=True):
            taught = taught / taught.norm(dim=1, keepdim=True)
            learned = learned / learned.norm(dim=1, keepdim=True)
            small = 0.5 * (taught - learned).norm(dim=1, keepdim=True) ** 2
            whole = F.interpolate(small, (48, 48), mode="bilinear")
            expected *= whole[:, 0]
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-9)
    # Of unit features half the squared distance is 1 - cosine: 0 when equal, 2 when opposite.
    for stage_map in detector.stage_maps(pictures):
        assert stage_map.min() >= 0
        assert stage_map.max() <= 2 + 1e-5


def test_a_student_that_is_the_teacher_finds_nothing(teacher):
    detector = stpm(teacher, **OPTIONS)
    detector.student.load_state_dict(teacher.net.state_dict())
    assert detector(images(2)).abs().max() < 1e-9


def test_only_the_student_learns(teacher):
    detector = stpm(teacher, **OPTIONS)
    drawn = torch.random.get_rng_state()
    detector._initialise(seeded())
    first = copy.deepcopy(detector.student.state_dict())
    detector.fit(Bank(images(8)), generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    changed = [n for n, v in detector.student.state_dict().items() if not torch.equal(v, first[n])]
    assert set(changed) == set(first)
    assert all(name.startswith("student.") for name in detector.state_dict())
    assert detector.num_trainable == sum(p.numel() for p in teacher.net.parameters())


def test_losses_fall_and_the_epoch_of_least_validation_loss_is_kept(teacher, monkeypatch):
    states, losses = {}, []
    detector = stpm(teacher, epochs=8, batch_size=4, learning_rate=0.2)
    validated = iter([4.0, 3.0, 2.0, 1.0, 0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(detector, "_validate", lambda _: torch.tensor(next(validated)))

    @monitoring
    def monitor(epoch, values):
        states[epoch] = copy.deepcopy(detector.student.state_dict())
        losses.append(values["loss"])
        assert values["validation_loss"] == abs(epoch - 5)

    detector.fit(Bank(images(20)), generator=seeded(), monitor=monitor)
    assert losses[-1] < 0.5 * losses[0]
    assert detector.diagnostics == {"kept_epoch": [5.0]}
    for name, value in detector.student.state_dict().items():
        assert torch.equal(value, states[5][name])
    assert not detector.student.training


def test_without_validation_the_last_epoch_is_kept(teacher):
    detector = stpm(teacher, **OPTIONS, validation_share=0.0)
    seen = told(detector, Bank(images(8)))
    assert detector.diagnostics == {"kept_epoch": [3.0]}
    assert all("validation_loss" not in values for values in seen)
    assert detector.stopped_at(2) == {"epochs": 2, "validation_share": 0.0}


def test_validation_loss_is_the_mean_over_images_of_uneven_batches(teacher):
    detector = fitted(teacher, Bank(images(8)), batch_size=3, epochs=1)
    held = Bank(images(7, seed=9))
    expected = torch.stack([detector._loss(held.features[i : i + 1]) for i in range(7)]).mean()
    assert detector._validate(held).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_visible_defect_stands_out(teacher):
    detector = fitted(teacher, Bank(images(40)), epochs=12, learning_rate=0.3)
    good, bad = images(8, seed=20), images(8, seed=21)
    bad[:, :, 12:28, 12:28] = (255 * torch.rand(8, 3, 16, 16, generator=seeded(4))).byte()
    normal, anomalous = detector(good).amax(dim=(1, 2)), detector(bad).amax(dim=(1, 2))
    ranked = (anomalous[:, None] > normal[None]).double().mean()
    assert ranked > 0.9
    maps = detector(bad)
    inside = maps[:, 12:28, 12:28].mean()
    maps[:, 8:32, 8:32] = 0
    assert inside > 2 * maps.sum() / (maps > 0).sum()


def test_a_split_that_leaves_no_image_is_refused(teacher):
    message = r"validation share 0\.9 leaves no image"
    with pytest.raises(ModelError, match=message) as caught:
        fitted(teacher, Bank(images(2)), validation_share=0.9)
    assert caught.value.change == {"validation_share": "lower"}


def test_a_backbone_with_channels_last_maps_is_compared_over_its_channels():
    teacher = FrozenExtractor("swin_tiny_patch4_window7_224", (0, 1), weights="random")
    detector = stpm(teacher)
    pictures = F.interpolate(images(1).float(), (224, 224)).byte()
    shapes = [tuple(stage_map.shape) for stage_map in detector.stage_maps(pictures)]
    assert shapes == [(1, 56, 56), (1, 28, 28)]
