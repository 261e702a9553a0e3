import pytest
import torch
import torch.nn.functional as F

from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.riad.riad import Riad, RiadOptions, draw_regions
from models.methods.riad.unet import UNet
from models.training.similarity import gms_map, multiscale_gms_map, ssim_map
from tests.models.banks import Bank, draw_images, seeded, told
from tests.models.methods.striped import SIDE, draw_striped, localisation, separation

QUICK = {
    **{"width": 4, "region_sizes": (4,), "scales": 2, "filter_size": 5, "batch_size": 8},
    **{"epochs": 6, "learning_rate": 1e-2},
}


def build(**options):
    torch.manual_seed(0)  # for what is looked at unfitted
    return Riad(FeatureShape(()), RiadOptions(**{**QUICK, **options}))


def fitted(bank, **options):
    detector = build(**options)
    detector.fit(bank, generator=seeded())
    return detector


# Network and regions


def test_parameters_are_those_of_the_network_in_full_width():
    def norm(width):
        return 2 * width

    def conv(side, inputs, outputs):
        return side * side * inputs * outputs + outputs

    expected = conv(3, 3, 64) + conv(3, 64, 64) + 2 * norm(64)
    for inputs, outputs in ((64, 128), (128, 256), (256, 512), (512, 512)):
        expected += conv(4, inputs, outputs) + conv(3, outputs, outputs) + 2 * norm(outputs)
    for inputs, outputs in ((512, 512), (512, 256), (256, 128), (128, 64)):
        expected += conv(4, inputs, outputs)
        expected += conv(3, 2 * outputs, outputs) + conv(3, outputs, outputs) + 2 * norm(outputs)
    expected += conv(3, 64, 3)
    assert sum(p.numel() for p in UNet(64).parameters()) == expected
    assert 28.5e6 < expected < 29e6


def test_network_fills_in_at_the_size_of_the_image():
    net = UNet(2).eval()
    images = torch.rand(2, 3, 32, 48, generator=seeded())
    filled = net(images)
    assert filled.shape == images.shape
    assert filled.abs().max() < 1


@pytest.mark.parametrize("copies", [2, 3, 5])
@pytest.mark.parametrize(("size", "region"), [(32, 2), (32, 8), (36, 8), (30, 7)])
def test_every_pixel_is_hidden_in_exactly_one_copy(size, region, copies):
    regions = draw_regions(size, region, copies, seeded())
    assert regions.shape == (size, size)
    hidden = torch.stack([regions == number for number in range(copies)])
    assert torch.equal(hidden.sum(dim=0), torch.ones(size, size, dtype=torch.long))
    cells = regions[::region, ::region]
    whole = cells.repeat_interleave(region, dim=0).repeat_interleave(region, dim=1)
    assert torch.equal(regions, whole[:size, :size])
    counts = torch.bincount(cells.flatten().long(), minlength=copies)
    assert counts.max() - counts.min() <= 1
    assert not torch.equal(regions, draw_regions(size, region, copies, seeded(1)))


def test_what_is_filled_in_comes_from_the_copy_where_it_was_hidden():
    detector = build()
    copies = []

    def net(images):
        copies.append(images)
        return torch.full_like(images, 0.1 * len(copies))

    detector.net.forward = net
    pixels = torch.rand(2, 3, 32, 32, generator=seeded()) + 0.5
    regions = draw_regions(32, 8, 3, seeded())
    filled = detector.fill_in(pixels, regions)
    assert len(copies) == 3
    for number, copy in enumerate(copies):
        hidden = regions == number
        assert torch.equal(copy == 0, hidden.expand_as(copy))
        assert torch.equal(copy[..., ~hidden], pixels[..., ~hidden])
        torch.testing.assert_close(
            filled[..., hidden], torch.full_like(filled[..., hidden], 0.1 * (number + 1))
        )


def test_a_hidden_pixel_does_not_reach_its_own_filling():
    detector = fitted(Bank(draw_striped(8)), epochs=1)
    pixels = torch.rand(1, 3, 32, 32, generator=seeded())
    (regions,) = detector.regions.view(-1, 32, 32)
    first = detector.fill_in(pixels, regions)
    changed = pixels.clone()
    inside = regions == regions[10, 20]
    changed[..., inside] = -pixels[..., inside]
    again = detector.fill_in(changed, regions)
    torch.testing.assert_close(again[..., inside], first[..., inside])
    assert not torch.allclose(again[..., ~inside], first[..., ~inside])


# Similarity of gradients, losses, maps


def test_gradient_similarity_by_a_slow_loop():
    one, other = torch.rand(2, 3, 6, 7, generator=seeded()).unbind()

    def magnitude(image, y, x):
        def at(dy, dx):
            return image[min(max(y + dy, 0), 5), min(max(x + dx, 0), 6)]

        across = sum(at(d, -1) - at(d, 1) for d in (-1, 0, 1)) / 3
        down = sum(at(-1, d) - at(1, d) for d in (-1, 0, 1)) / 3
        return (across**2 + down**2) ** 0.5

    expected = torch.zeros(6, 7)
    for y in range(6):
        for x in range(7):
            for channel in range(3):
                g, h = magnitude(one[channel], y, x), magnitude(other[channel], y, x)
                expected[y, x] += (2 * g * h + 0.0026) / (g**2 + h**2 + 0.0026) / 3
    torch.testing.assert_close(gms_map(one[None], other[None])[0], expected)
    torch.testing.assert_close(gms_map(one[None], one[None]), torch.ones(1, 6, 7))


def test_losses_are_those_of_the_filled_in_image():
    detector = build(gradient_weight=0.3, ssim_weight=2.0)
    pixels = torch.rand(2, 3, 32, 32, generator=seeded()) * 2 - 1
    regions = draw_regions(32, 4, 3, seeded())
    with torch.no_grad():
        losses = detector._losses((pixels, regions))
        filled = detector.fill_in(pixels, regions)
    zero_to_one = (pixels + 1) / 2, (filled + 1) / 2
    torch.testing.assert_close(losses["l2"], ((pixels - filled) ** 2).mean())
    gradient = (1 - multiscale_gms_map(*zero_to_one, scales=2)).mean()
    ssim = (1 - ssim_map(*zero_to_one)).mean()
    torch.testing.assert_close(losses["gradient"], gradient)
    torch.testing.assert_close(losses["ssim"], ssim)
    torch.testing.assert_close(losses["loss"], losses["l2"] + 0.3 * gradient + 2 * ssim)


def test_map_is_the_mean_over_sizes_of_regions_of_what_differs_around_a_pixel():
    detector = fitted(Bank(draw_striped(8)), epochs=1, region_sizes=(4, 8))
    assert detector.regions.shape == (2 * SIDE * SIDE,)
    images = draw_striped(2, seed=3)
    pixels = images.float() / 255 * 2 - 1
    expected, filled = torch.zeros(2, SIDE, SIDE), []
    with torch.no_grad():
        for regions in detector.regions.view(2, SIDE, SIDE):
            filled.append(detector.fill_in(pixels, regions))
            alike = multiscale_gms_map((pixels + 1) / 2, (filled[-1] + 1) / 2, scales=2)
            for y in range(SIDE):
                for x in range(SIDE):
                    around = alike[:, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
                    expected[:, y, x] += (1 - around.mean(dim=(1, 2))) / 2
        torch.testing.assert_close(detector(images), expected)
    mean = (torch.stack(filled).mean(dim=0) + 1) / 2 * 255
    assert (detector.reconstruct(images) - mean).abs().max() <= 0.5 + 1e-3
    scoring = build(image_score="mean")
    scoring.load_state_dict(fitted(Bank(draw_striped(8)), epochs=1).state_dict())
    maps, scores = scoring.score(images)
    torch.testing.assert_close(scores, maps.mean(dim=(1, 2)))


# Training


def test_a_visible_defect_is_found_by_what_was_learned():
    detector = build()
    values = told(detector, Bank(draw_striped(24)))
    assert set(values[0]) == {"loss", "l2", "gradient", "ssim"}
    assert values[-1]["loss"] < 0.3 * values[0]["loss"]
    assert separation(detector, "blank") > 0.95
    assert localisation(detector, "blank") > 0.95
    # Its gradients are weaker than those of stripes, which is all that random weights see.
    untrained = fitted(Bank(draw_striped(24)), epochs=1, learning_rate=1e-12)
    assert localisation(untrained, "blank") < 0.3


def test_sizes_of_regions_are_drawn_and_the_rate_drops_at_the_milestone(monkeypatch):
    rates, seen = [], []
    step = torch.optim.Adam.step

    def watched(self, *args, **options):
        rates.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    detector = build(epochs=4, milestone=3, region_sizes=(4, 8), learning_rate=1e-3)
    fill_in = detector.fill_in

    def spied(pixels, regions):
        cells = regions[::4, ::4].repeat_interleave(4, dim=0).repeat_interleave(4, dim=1)
        is_coarse = torch.equal(
            regions, regions[::8, ::8].repeat_interleave(8, 0).repeat_interleave(8, 1)
        )
        assert torch.equal(cells, regions)
        seen.append(8 if is_coarse else 4)
        return fill_in(pixels, regions)

    detector.fill_in = spied
    detector.fit(Bank(draw_striped(16)), generator=seeded())
    assert [rate for rate, _ in rates] == pytest.approx([1e-3] * 6 + [1e-4] * 2)
    assert {decay for _, decay in rates} == {1e-5}
    assert set(seen) == {4, 8}


# Refusals


def test_images_that_the_network_cannot_take_are_refused():
    images = F.interpolate(draw_images(4).float(), (40, 40)).byte()
    with pytest.raises(ModelError, match=r"multiples of 16, at least 32.* 40 x 40: --image-size"):
        fitted(Bank(images))
    with pytest.raises(ModelError, match=r"fewer regions of 32 than the 3 copies") as caught:
        fitted(Bank(draw_images(4)), region_sizes=(4, 32))
    assert caught.value.change == {"region_sizes": "smaller", "copies": "fewer"}
    with pytest.raises(ModelError, match="at least one size, each above 0"):
        build(region_sizes=())
    with pytest.raises(ModelError, match="at least one size, each above 0"):
        build(region_sizes=(4, 0))
    detector = fitted(Bank(draw_images(4)), epochs=1)
    with pytest.raises(ModelError, match=r"images of 32 pixels.* these have 48"):
        detector(draw_images(1, side=48))
    with pytest.raises(ValueError, match=r"--method\.copies 1 must be at least 2"):
        RiadOptions(copies=1)
