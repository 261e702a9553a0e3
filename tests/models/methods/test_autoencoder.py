"""The autoencoder, and what it shares with the VAE: network, crops, averaged windows."""

import pytest
import torch
import torch.nn.functional as F

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.autoencoders.autoencoder import Autoencoder, AutoencoderOptions
from models.methods.autoencoders.networks import build_decoder, build_encoder
from models.methods.autoencoders.windows import (
    averaged_over_windows,
    random_crops,
    window_starts,
)
from models.training.repeated import repeated_batches
from models.training.similarity import ssim_map
from tests.models.banks import Bank, draw_images, seeded, told
from tests.models.methods.striped import SIDE, draw_striped, separation

QUICK = {
    **{"network_size": SIDE, "width": 8, "code_dim": 8, "images_per_epoch": 48, "batch_size": 8},
    **{"epochs": 6, "learning_rate": 5e-3},
}


def build(**options):
    torch.manual_seed(0)  # for what is looked at unfitted
    return Autoencoder(FeatureShape(()), AutoencoderOptions(**{**QUICK, **options}))


def fitted(bank, **options):
    detector = build(**options)
    detector.fit(bank, generator=seeded())
    return detector


# Network


def test_parameters_are_those_of_the_papers_table():
    """Of 128 pixels in colour and a code of 100: weights and biases, counted by hand."""
    encoder = [
        *(4 * 4 * 3 * 32 + 32, 4 * 4 * 32 * 32 + 32, 3 * 3 * 32 * 32 + 32),
        *(4 * 4 * 32 * 64 + 64, 3 * 3 * 64 * 64 + 64, 4 * 4 * 64 * 128 + 128),
        *(3 * 3 * 128 * 64 + 64, 3 * 3 * 64 * 32 + 32, 8 * 8 * 32 * 100 + 100),
    ]
    decoder = [
        *(8 * 8 * 100 * 32 + 32, 3 * 3 * 32 * 64 + 64, 3 * 3 * 64 * 128 + 128),
        *(4 * 4 * 128 * 64 + 64, 3 * 3 * 64 * 64 + 64, 4 * 4 * 64 * 32 + 32),
        *(3 * 3 * 32 * 32 + 32, 4 * 4 * 32 * 32 + 32, 4 * 4 * 32 * 3 + 3),
    ]
    detector = Autoencoder(FeatureShape(()), AutoencoderOptions())
    assert detector.num_trainable == sum(encoder) + sum(decoder) == 1_050_599
    assert sum(p.numel() for p in detector.encoder.parameters()) == sum(encoder)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_eight_by_eight_positions_are_left_before_the_code(size):
    encoder, decoder = build_encoder(size, 2, 5), build_decoder(size, 2, 5)
    pixels = torch.rand(2, 3, size, size, generator=seeded())
    assert encoder[:-1](pixels).shape == (2, 2, 8, 8)
    code = encoder(pixels)
    assert code.shape == (2, 5, 1, 1)
    rebuilt = decoder(code)
    assert rebuilt.shape == pixels.shape
    assert 0 < rebuilt.min() < rebuilt.max() < 1
    halvings = [m for m in encoder if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert 8 * 2 ** len(halvings) == size


# Crops, windows, epochs


def test_a_crop_is_a_part_of_its_image_and_any_place_is_drawn():
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    which = torch.arange(300)[:, None, None]
    images = torch.stack([rows + 0 * which, columns + 0 * which, which + 0 * rows], dim=1)
    crops = random_crops(images, 8, seeded())
    assert crops.shape == (300, 3, 8, 8)
    first = crops[:, :, 0, 0]
    assert torch.equal(first[:, 2], which.flatten())
    along = torch.arange(8)
    assert torch.equal(crops[:, 0], (first[:, :1, None] + along[:, None]).expand(-1, 8, 8))
    assert torch.equal(crops[:, 1], (first[:, 1:2, None] + along).expand(-1, 8, 8))
    assert {tuple(place) for place in first[:, :2].tolist()} == {
        (y, x) for y in range(5) for x in range(5)
    }


def test_windows_cover_an_image_to_its_end():
    assert window_starts(256, 128, 30) == [0, 30, 60, 90, 120, 128]
    assert window_starts(188, 128, 30) == [0, 30, 60]
    assert window_starts(128, 128, 30) == [0]
    assert window_starts(20, 8, 30) == [0, 12]


def test_windows_are_averaged_as_a_slow_loop_does_it():
    pixels = torch.rand(2, 3, 13, 13, generator=seeded())

    def look(window):
        return window.sum(dim=1, keepdim=True) + torch.arange(64.0).view(8, 8)

    found = averaged_over_windows(pixels, 8, 3, look)
    for y in range(13):
        for x in range(13):
            held = [
                look(pixels[:, :, top : top + 8, left : left + 8])[:, :, y - top, x - left]
                for top in (0, 3, 5)
                for left in (0, 3, 5)
                if 0 <= y - top < 8 and 0 <= x - left < 8
            ]
            torch.testing.assert_close(found[:, :, y, x], torch.stack(held).mean(dim=0))


@pytest.mark.parametrize(("batch_size", "count"), [(4, 11), (3, 3), (16, 37), (7, 14)])
def test_an_epoch_has_as_many_images_as_it_is_given(batch_size, count):
    bank = Bank(torch.arange(7).view(7, 1, 1, 1))
    batches = list(repeated_batches(bank, batch_size, count, seeded()))
    sizes = [len(batch) for batch in batches]
    assert sum(sizes) == count
    assert all(size == batch_size for size in sizes[:-1])
    seen = torch.cat(batches).flatten().tolist()
    for start in range(0, count - 6, 7):
        assert sorted(seen[start : start + 7]) == list(range(7))
    if count > 14:
        assert seen[:7] != seen[7:14]


# Losses and maps


def test_an_image_is_all_like_itself_and_less_like_others():
    """Equation 4 of the paper, at one pixel far from the borders, by its definition."""
    one, other = torch.rand(2, 1, 3, 32, 32, generator=seeded()).unbind()
    torch.testing.assert_close(ssim_map(one, one), torch.ones(1, 32, 32))
    assert ssim_map(one, other).max() < 0.9
    along = torch.exp(-(torch.arange(-5.0, 6) ** 2) / (2 * 1.5**2))
    weights = along[:, None] * along / along.sum() ** 2
    values = []
    for channel in range(3):
        p, q = (image[0, channel, 10:21, 7:18] for image in (one, other))
        mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
        var_p = (weights * (p - mean_p) ** 2).sum()
        var_q = (weights * (q - mean_q) ** 2).sum()
        covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
        above = (2 * mean_p * mean_q + 0.01**2) * (2 * covariance + 0.03**2)
        values.append(above / ((mean_p**2 + mean_q**2 + 0.01**2) * (var_p + var_q + 0.03**2)))
    expected = torch.stack(values).mean()
    torch.testing.assert_close(ssim_map(one, other)[0, 15, 12], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["ssim", "l2"])
def test_the_map_is_what_is_minimised(loss):
    detector = build(loss=loss)
    images = draw_striped(3)
    pixels = images.float() / 255
    with torch.no_grad():
        rebuilt = detector.decoder(detector.encoder(pixels))
        maps = detector(images)
        found = detector.losses(pixels, seeded())["loss"]
    if loss == "l2":
        expected = ((pixels - rebuilt) ** 2).mean(dim=1)
    else:
        expected = 1 - ssim_map(pixels, rebuilt)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(found, maps.sum() / 3)
    assert torch.equal(detector.reconstruct(images), (255 * rebuilt).round().byte())


def test_a_mean_is_a_score_of_its_own():
    images = draw_striped(3)
    detector = build(image_score="mean")
    maps, scores = detector.score(images)
    torch.testing.assert_close(scores, maps.mean(dim=(1, 2)))
    assert build().score(images)[1] is None


def test_larger_images_are_seen_in_windows():
    detector = build(stride=5)
    images = draw_images(2, side=40)
    maps, rebuilt = detector(images), detector.reconstruct(images)
    assert maps.shape == (2, 40, 40)
    assert rebuilt.shape == images.shape
    assert rebuilt.dtype == torch.uint8
    corner = images[:, :, :SIDE, :SIDE]  # its first pixels are in no other window
    torch.testing.assert_close(maps[:, :5, :5], detector(corner)[:, :5, :5])
    assert torch.equal(rebuilt[:, :, :5, :5], detector.reconstruct(corner)[:, :, :5, :5])


# Training


@pytest.mark.parametrize("loss", ["ssim", "l2"])
def test_a_visible_defect_is_found_by_what_was_learned(loss):
    bank = Bank(draw_striped(24))
    detector = build(loss=loss)
    losses = [values["loss"] for values in told(detector, bank)]
    assert losses[-1] < 0.2 * losses[0]
    assert separation(detector, "blank") > 0.95
    assert separation(fitted(bank, loss=loss, epochs=1, learning_rate=1e-12), "blank") < 0.6


def test_training_sees_new_crops_in_every_epoch():
    along = torch.arange(40)
    image = torch.stack(
        [along[:, None].expand(40, 40), along.expand(40, 40), 0 * along[:, None] + along]
    )
    detector, seen = build(epochs=2, images_per_epoch=16, loss="l2"), []
    losses = detector.losses
    detector.losses = lambda pixels, noise: seen.append(pixels) or losses(pixels, noise)
    detector.fit(Bank(image.expand(5, -1, -1, -1).byte()), generator=seeded())
    assert [batch.shape for batch in seen] == [(8, 3, SIDE, SIDE)] * 4
    values = (255 * torch.cat(seen)).round()
    place = values[:, :, 0, 0]
    assert torch.equal(values[:, 0, -1, 0] - place[:, 0], torch.full((32,), SIDE - 1.0))
    assert 0 <= place.min() < place.max() <= 40 - SIDE
    assert not torch.equal(place[:16], place[16:])


def test_adam_decays_and_every_weight_moves(monkeypatch):
    made = []
    adam = torch.optim.Adam

    def watched(parameters, **options):
        made.append(options)
        return adam(parameters, **options)

    monkeypatch.setattr(torch.optim, "Adam", watched)
    detector = build(epochs=1, learning_rate=1e-12, weight_decay=0.5)
    bank = Bank(draw_striped(8))
    detector.fit(bank, generator=seeded())
    assert made == [{"lr": 1e-12, "weight_decay": 0.5}]
    first = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    moved = fitted(bank, epochs=1)
    for name, tensor in moved.state_dict().items():
        assert not torch.allclose(tensor, first[name], atol=1e-4), name


# Refusals


def test_images_of_another_size_are_refused():
    images = F.interpolate(draw_images(4).float(), (40, 40)).byte()
    with pytest.raises(ModelError, match=r"32 x 32 pixels.* 40 x 40: pass --image-size 32") as one:
        fitted(Bank(images), crops=False)
    assert "network_size" in one.value.change
    with pytest.raises(ModelError, match=r"24 x 24: pass --image-size 32"):
        fitted(Bank(draw_images(4, side=24)))
    with pytest.raises(ModelError, match="24 x 24"):
        build()(draw_images(1, side=24))
    with pytest.raises(ValueError, match=r"--method\.network-size 48 must be 32, 64, 128 or 256"):
        AutoencoderOptions(network_size=48)
