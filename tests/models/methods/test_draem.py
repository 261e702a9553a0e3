import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.drawing.textures import Textures
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.draem.draem import Draem, DraemOptions, draw_training_image
from models.training.focal import focal_loss
from models.training.similarity import ssim_map
from tests.models.banks import Bank, draw_images, seeded, told
from tests.models.methods.spotted import auroc, draw_spotted, image_scores
from tests.models.methods.striped import draw_striped

OPTIONS = {"epochs": 2, "width": 2, "discriminator_width": 2, "batch_size": 4}


def draem(**options):
    torch.manual_seed(0)
    return Draem(FeatureShape(()), DraemOptions(**{**OPTIONS, **options}))


def fitted(bank, **options):
    detector = draem(**options)
    detector.fit(bank, generator=seeded())
    return detector


def test_the_networks_are_as_large_as_published():
    """NoCo's table II prints 97.4 million parameters for DRAEM."""
    with torch.device("meta"):
        detector = Draem(FeatureShape(()), DraemOptions())
    assert detector.num_trainable == 97_422_725
    assert sum(p.numel() for p in detector.rebuilder.parameters()) == 69_048_579


def test_weights_are_drawn_as_released():
    detector = fitted(Bank(draw_striped(4)), epochs=1, width=16, learning_rate=1e-12)
    convolutions = [m for m in detector.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    weights = torch.cat([layer.weight.flatten() for layer in convolutions])
    scales = torch.cat([layer.weight for layer in norms])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert weights.mean().abs() < 1e-4
    assert scales.mean().item() == pytest.approx(1, abs=5e-3)
    assert scales.std().item() == pytest.approx(0.02, rel=0.1)


def test_losses_are_those_of_both_networks_together():
    detector = draem().train()
    clean, corrupted = draw_striped(3), draw_spotted(3)[0]
    masks = torch.rand(3, 32, 32, generator=seeded()) < 0.3
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    found = detector.losses(clean, corrupted, masks)
    detector.load_state_dict(state)  # the statistics moved
    pixels = corrupted.float() / 255
    rebuilt, _ = detector.rebuilder(pixels)
    logits, _ = detector.discriminator(torch.cat([rebuilt, pixels], dim=1))
    wanted = {
        "l2": (rebuilt - clean.float() / 255).square().mean(),
        "ssim": 1 - ssim_map(rebuilt, clean.float() / 255).mean(),
        "focal": focal_loss(logits, masks, gamma=2.0),
    }
    assert found.keys() == {"loss", *wanted}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(found["loss"], sum(wanted.values()))


def test_blocks_predict_the_penultimate_convolution_of_both_encoders():
    detector = draem(sspcab=True).train()
    networks = (detector.rebuilder, detector.discriminator)
    seen = []
    for network in networks:
        block = network.encoder.block
        assert block.corners[0].weight.shape[:2] == (16, 16)
        # The first convolution of the deepest pair is gone, with its norm.
        assert [type(layer).__name__ for layer in network.encoder.levels[-1]] == [
            "Conv2d",
            "BatchNorm2d",
            "ReLU",
        ]
        block.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    images = F.interpolate(draw_striped(3).float(), (64, 64)).byte()
    found = detector.losses(images, images, masks)
    assert [made.shape[-1] for _, made in seen] == [4, 2]
    wanted = sum(F.mse_loss(made, given) for given, made in seen)
    torch.testing.assert_close(found["sspcab"], 0.1 * wanted)
    torch.testing.assert_close(
        found["loss"], found["l2"] + found["ssim"] + found["focal"] + found["sspcab"]
    )
    assert all(network.encoder.block is None for network in (draem().rebuilder,))


def test_the_image_is_scored_by_the_filtered_map_and_pixels_by_the_plain_one():
    detector, images = fitted(Bank(draw_striped(8))), draw_spotted(2)[0]
    maps, scores = detector.score(images)
    padded = F.pad(maps, [10] * 4)
    for image in range(2):
        best = max(
            padded[image, y : y + 21, x : x + 21].mean().item()
            for y in range(32)
            for x in range(32)
        )
        assert scores[image].item() == pytest.approx(best, rel=1e-5)
    assert torch.equal(detector(images), maps)
    smooth = draem(smooth_maps=True)
    smooth.load_state_dict(detector.state_dict())
    again, same = smooth.score(images)
    assert torch.equal(same, scores)
    torch.testing.assert_close(again.amax(dim=(1, 2)), scores)
    assert not torch.allclose(again, maps)


def test_maps_come_of_the_rebuilt_image():
    detector, images = fitted(Bank(draw_striped(8))), draw_spotted(2)[0]
    rebuilt = detector.reconstruct(images)
    assert rebuilt.shape == images.shape
    assert rebuilt.dtype == torch.uint8
    exact, _ = detector.rebuilder(images.float() / 255)
    assert ((255 * exact).clamp(0, 255) - rebuilt).abs().max() <= 0.5 + 1e-3
    pixels = images.float() / 255
    logits, _ = detector.discriminator(torch.cat([exact, pixels], dim=1))
    torch.testing.assert_close(detector(images), logits.softmax(dim=1)[:, 1])


def test_training_images_are_turned_and_pasted_on_as_often_as_asked():
    image = np.full((40, 40, 3), 90, np.uint8)
    source = Textures([np.full((8, 8, 3), 250, np.uint8)], "one")
    drawn = [
        draw_training_image(image, source, np.random.default_rng(seed), turned=0.3, anomalous=0.5)
        for seed in range(300)
    ]
    turned = [not np.array_equal(clean, image) for clean, _, _ in drawn]
    pasted = [mask.any() for _, _, mask in drawn]
    assert 0.22 < np.mean(turned) < 0.38
    assert 0.3 < np.mean(pasted) < 0.55  # some masks are empty
    for clean, corrupted, mask in drawn:
        assert np.array_equal(clean[~mask], corrupted[~mask])
    assert (image == 90).all()


def test_a_visible_defect_stands_out_of_what_was_learned_alone():
    bank, good = Bank(draw_striped(16)), draw_striped(24, seed=11)
    bad, masks = draw_spotted(24, seed=12)
    options = {"epochs": 24, "width": 4, "discriminator_width": 4, "batch_size": 8}
    learned = fitted(bank, **options, learning_rate=4e-3)
    assert auroc(image_scores(learned, good), image_scores(learned, bad)) > 0.95
    maps = learned(bad)
    assert auroc(maps[~masks][::7], maps[masks][::29]) > 0.7
    unlearned = fitted(bank, **{**options, "epochs": 1}, learning_rate=1e-9)
    assert auroc(image_scores(unlearned, good), image_scores(unlearned, bad)) < 0.8


def test_the_table_says_which_textures_were_pasted(tmp_path):
    detector = fitted(Bank(draw_striped(4)), epochs=1)
    (remark,) = detector.remarks
    assert "the suite's own 48 images (brick, grass, gravel" in remark
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(tmp_path / "one.png")
    detector = draem(epochs=1, anomaly_source=str(tmp_path))
    detector.fit(Bank(draw_striped(4)), generator=seeded())
    (remark,) = detector.remarks
    assert f"the 1 images below {tmp_path}" in remark


def test_no_textures_are_refused_before_anything_is_trained(tmp_path):
    detector = draem(anomaly_source=str(tmp_path / "nowhere"))  # a stored head needs none
    with pytest.raises(ModelError, match="nowhere is not a folder") as caught:
        detector.fit(Bank(draw_striped(4)), generator=seeded())
    assert caught.value.change == {"anomaly_source": "name another with"}


def test_images_that_vanish_and_steps_without_statistics_are_refused():
    with pytest.raises(ModelError, match=r"images of 16 pixels vanish .* --image-size to 32"):
        fitted(Bank(draw_images(4, side=16)))
    with pytest.raises(ModelError, match="single image of 32 pixels") as caught:
        fitted(Bank(draw_striped(5)), batch_size=4)
    assert caught.value.change == {"batch_size": "or choose another"}
    detector = fitted(Bank(draw_images(5, side=65)), batch_size=4, epochs=1)
    assert detector(draw_images(1, side=65)).shape == (1, 65, 65)


def test_the_learning_rate_falls_by_the_schedule_that_is_named(monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def watched(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    fitted(Bank(draw_striped(4)), epochs=10, learning_rate=1.0e-3)
    assert rates == pytest.approx([1e-3] * 8 + [2e-4] + [4e-5])
    rates.clear()
    detector = fitted(Bank(draw_striped(4)), epochs=3, schedule_epochs=2, learning_rate=1.0e-3)
    assert rates == pytest.approx([1e-3, 1e-3, 4e-5])
    assert detector.stopped_at(1) == {"epochs": 1, "schedule_epochs": 2}


def test_each_term_is_told():
    (first, second) = told(draem(sspcab=True), Bank(draw_striped(8)))
    assert first.keys() == {"loss", "l2", "ssim", "focal", "sspcab"}
    total = sum(value for name, value in second.items() if name != "loss")
    assert second["loss"] == pytest.approx(total, rel=1e-5)
