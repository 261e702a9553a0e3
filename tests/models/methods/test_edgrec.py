import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab

from datasets.drawing.textures import Textures
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.edgrec import drawing
from models.methods.edgrec.colours import (
    as_bytes,
    box_mean,
    colour_map,
    wrapped_colour_map,
    wrapped_squares,
)
from models.methods.edgrec.drawing import draw_training_image, paste_piece
from models.methods.edgrec.edgrec import Edgrec, EdgrecOptions, edges
from models.training.similarity import gms_map, ssim_map
from tests.models.banks import Bank, draw_images, seeded, told
from tests.models.methods.spotted import auroc, draw_spotted, image_scores
from tests.models.methods.striped import draw_striped

OPTIONS = {"epochs": 2, "width": 2, "batch_size": 4}
RED, BLUE = (1.0, 0.4, 0.4), (0.4, 0.4, 1.0)


def edgrec(**options):
    torch.manual_seed(0)
    return Edgrec(FeatureShape(()), EdgrecOptions(**{**OPTIONS, **options}))


def fitted(bank, **options):
    detector = edgrec(**options)
    detector.fit(bank, generator=seeded())
    return detector


def rng(seed=0):
    return np.random.default_rng(seed)


def draw_coloured(count, *, seed=1, spoilt=False):
    """Fine stripes in red beside coarse ones in blue; if asked, a square of these is red too."""
    columns = torch.arange(32)
    fine, coarse = ((2 * torch.pi * columns / period).sin() for period in (4, 10))
    grey = (130 + 90 * torch.where(columns < 16, fine, coarse)).expand(count, 32, 32)
    is_red = (columns < 16).expand(count, 32, 32).clone()
    if spoilt:
        rows = torch.randint(20, (count,), generator=seeded(seed)).tolist()
        for one, top in zip(is_red, rows, strict=True):
            one[top : top + 12, 18:30] = True
    tint = torch.where(is_red[..., None], torch.tensor(RED), torch.tensor(BLUE))
    noise = torch.randint(-8, 9, (count, 32, 32, 1), generator=seeded(seed + 100))
    return (grey[..., None] * tint + noise).clamp(0, 255).byte().permute(0, 3, 1, 2)


def test_the_network_has_as_many_parameters_as_the_released_one():
    with torch.device("meta"):
        detector = Edgrec(FeatureShape(()), EdgrecOptions())
    assert detector.num_trainable == 69_046_275


def test_edges_are_the_largest_less_the_least_of_nine_grey_values():
    images = draw_images(2, side=9)
    found = edges(images)
    assert found.shape == (2, 1, 9, 9)
    kernel = np.ones((3, 3), np.uint8)
    for image, edge in zip(images, found, strict=True):
        pixels = image.permute(1, 2, 0).numpy().astype(np.float32) / 255
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        wanted = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, kernel)
        np.testing.assert_allclose(edge[0].numpy(), wanted, atol=1e-6)
    assert edges(torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)).abs().max() == 0


# Colours


def test_bytes_and_squares_wrap_as_released():
    """White is 180; 1.6 becomes 32 and -0.1 becomes 238; 16 and 32 count nothing, 10 counts 100."""
    cast = as_bytes(torch.tensor([0.0, 0.5, 1.0, 1.6, -0.1, 180.9 / 180]))
    assert cast.tolist() == [0, 90, 180, 32, 238, 180]
    squares = wrapped_squares(torch.tensor([0.0, 10, -10, 16, 32, -16, 20]))
    assert squares.tolist() == [0, 100, 100, 0, 0, 0, 400 - 256]


def test_wrapped_colours_are_those_of_eight_bits():
    images, others = draw_images(2, seed=1), draw_images(2, seed=2)
    pixels = [images.float() / 255 * 1.3, others.float() / 255 - 0.05]
    found = wrapped_colour_map(*pixels)
    for image in range(2):
        bytes_ = []
        for batch in pixels:
            cast = np.trunc(batch[image].permute(1, 2, 0).numpy() * 180).astype(int)
            cast = cast.astype(np.uint8)
            lab = (np.rint(rgb2lab(cast)[..., 1:]).astype(int) + 128).astype(np.uint8)
            bytes_.append(lab)
            # OpenCV has tables of its own for 8 bits.
            apart = np.abs(lab.astype(int) - cv2.cvtColor(cast, cv2.COLOR_RGB2LAB)[..., 1:])
            assert apart.max() <= 2
            assert (apart == 0).mean() > 0.85
        difference = bytes_[0] - bytes_[1]
        squares = difference * difference
        assert squares.dtype == np.uint8
        wanted = cv2.blur(squares[..., 0] + squares[..., 1], (11, 11)) * 0.001
        # A mean that ends in half a level, or a colour that does, may be rounded either way.
        apart = np.abs(found[image].numpy() - wanted)
        assert apart.max() < 3e-3
        assert (apart < 1e-6).mean() > 0.9


def test_colours_differ_by_their_squared_distance_in_lab_without_lightness():
    images, others = (draw_images(1, seed=s).float() / 255 for s in (1, 2))
    first, second = (rgb2lab(one[0].permute(1, 2, 0).numpy()) for one in (images, others))
    squares = ((first - second)[..., 1:].astype(np.float64) ** 2).sum(axis=2)
    wanted = 0.001 * cv2.blur(squares, (11, 11))
    np.testing.assert_allclose(colour_map(images, others)[0].numpy(), wanted, rtol=1e-5)
    grey = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    assert colour_map(grey, grey / 2).max() < 1e-5


def test_the_box_is_that_of_opencv():
    maps = torch.rand(2, 13, 17, generator=seeded())
    wanted = np.stack([cv2.blur(one.numpy(), (11, 11)) for one in maps])
    np.testing.assert_allclose(box_mean(maps).numpy(), wanted, rtol=1e-5)


# Drawing


def test_a_turned_piece_is_pasted_with_black_about_it():
    image = np.full((50, 50, 3), 90, np.uint8)
    shares = []
    for seed in range(60):
        pasted = paste_piece(image, rng(seed))
        assert set(np.unique(pasted).tolist()) - set(range(91)) == set()
        changed = (pasted != image).any(axis=2)
        shares.append(changed.mean())
        rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
        if len(rows):
            assert np.ptp(rows) < 45
            assert np.ptp(columns) < 45
    assert (image == 90).all()
    assert max(shares) > 0.2
    assert np.mean(np.array(shares) == 0) > 0.03  # not turned at all, which can be drawn


def test_half_of_what_is_corrupted_gets_a_texture(monkeypatch):
    image = np.full((32, 32, 3), 90, np.uint8)
    source = Textures([image], "one")
    monkeypatch.setattr(drawing, "paste_texture", lambda one, *_: (one + 1, None))
    monkeypatch.setattr(drawing, "paste_piece", lambda one, _: one + 2)
    kinds = []
    for seed in range(600):
        clean, corrupted = draw_training_image(image, source, rng(seed), turned=0.3, corrupted=0.5)
        kinds.append((int((corrupted.astype(int) - clean).max()), not np.array_equal(clean, image)))
    counts = np.bincount([kind for kind, _ in kinds], minlength=3) / 600
    assert counts == pytest.approx([0.5, 0.25, 0.25], abs=0.06)
    assert np.mean([turned for _, turned in kinds]) == pytest.approx(0.3, abs=0.06)


# The detector


def test_losses_compare_what_is_made_of_corrupted_edges_with_the_clean_image():
    detector = edgrec()
    clean, corrupted = draw_striped(3), draw_spotted(3)[0]
    found = detector.losses(clean, corrupted)
    rebuilt, _ = detector.rebuilder(edges(corrupted))
    wanted = clean.float() / 255
    torch.testing.assert_close(found["l2"], F.mse_loss(rebuilt, wanted))
    torch.testing.assert_close(found["ssim"], 1 - ssim_map(rebuilt, wanted).mean())
    torch.testing.assert_close(found["loss"], found["l2"] + found["ssim"])


@pytest.mark.parametrize("released", [False, True])
def test_the_map_is_structure_and_colour_of_the_rebuilt_image(released):
    detector, images = fitted(Bank(draw_striped(8)), released=released), draw_spotted(2)[0]
    exact, _ = detector.rebuilder(edges(images))
    rebuilt, pixels = exact if released else exact.clamp(0, 1), images.float() / 255
    full = gms_map(rebuilt, pixels)
    half = gms_map(F.avg_pool2d(rebuilt, 2), F.avg_pool2d(pixels, 2))
    whole = F.interpolate(half[:, None], (32, 32), mode="bilinear")[:, 0]
    padded = F.pad(1 - (full + whole) / 2, [10] * 4)
    structure = padded.unfold(1, 21, 1).unfold(2, 21, 1).mean(dim=(3, 4))
    colour = (wrapped_colour_map if released else colour_map)(rebuilt, pixels)
    torch.testing.assert_close(detector(images), structure + colour, rtol=1e-4, atol=1e-5)
    made = detector.reconstruct(images)
    assert made.dtype == torch.uint8
    assert ((255 * exact).clamp(0, 255) - made).abs().max() <= 0.5 + 1e-3
    assert ("wrap" in " ".join(detector.remarks)) == released


def test_a_wrong_colour_stands_out_of_what_was_learned_alone():
    """Its edges are as they should be, and the colour is one that normal images have."""
    bank, good = Bank(draw_coloured(16)), draw_coloured(16, seed=11)
    bad = draw_coloured(16, seed=12, spoilt=True)
    options = {"width": 4, "batch_size": 8, "corrupted_share": 0.2, "turned_share": 0.0}
    learned = fitted(bank, **options, epochs=25, learning_rate=5e-3)
    assert auroc(image_scores(learned, good), image_scores(learned, bad)) > 0.95
    unlearned = fitted(bank, **options, epochs=1, learning_rate=1e-9)
    assert auroc(image_scores(unlearned, good), image_scores(unlearned, bad)) < 0.8


def test_textures_and_sizes_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ModelError, match="nowhere is not a folder") as caught:
        fitted(Bank(draw_striped(4)), anomaly_source=str(tmp_path / "nowhere"))
    assert caught.value.change == {"anomaly_source": "name another with"}
    with pytest.raises(ModelError, match=r"images of 8 pixels vanish .* --image-size to 16"):
        fitted(Bank(draw_images(4, side=8)))
    with pytest.raises(ModelError, match="single image of 16 pixels"):
        fitted(Bank(draw_images(5, side=16)))


def test_a_step_names_the_schedule_and_each_term_is_told():
    detector = edgrec(epochs=3)
    values = told(detector, Bank(draw_striped(4)))
    assert len(values) == 3
    assert values[0].keys() == {"loss", "l2", "ssim"}
    assert detector.stopped_at(2) == {"epochs": 2, "schedule_epochs": 3}
    assert "48 images" in detector.remarks[0]
