"""What is shown of a piece: files read, geometry that image and mask share, colours, seeds."""

import dataclasses
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms import v2

from models.discovery.anomalyncd import token_sources
from models.discovery.anomalyncd.token_sources import Sight
from models.discovery.anomalyncd.views import (
    Change,
    central_view,
    coloured,
    draw_change,
    resized,
    training_view,
)
from models.discovery.pieces import Piece, read_piece
from models.errors import ModelError
from tests.models.discovery.shapes import write_pieces
from tests.threads import torch_threads

NOTHING = Change(
    down=0.5,
    across=0.5,
    is_mirrored=False,
    is_upturned=False,
    turns=0,
    colours=(("contrast", 1.0), ("saturation", 1.0), ("brightness", 1.0)),
    sharpness=1.0,
    blur=(9, 1e-3),
    bits=8,
)


def pattern(height=40, width=40):
    """An image and a mask that are the same in all channels, and other ones at each pixel."""
    values = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.uint8)
    return Image.fromarray(np.stack([values] * 3, axis=2)), Image.fromarray(values)


def changed(**changes):
    return dataclasses.replace(NOTHING, **changes)


def test_no_change_is_the_central_view():
    image, mask = pattern()
    ours, centre = training_view(image, mask, 32, NOTHING), central_view(image, mask, 32)
    for one, other in zip(ours, centre, strict=True):
        assert torch.equal(one, other)
    assert ours[0].shape == (3, 32, 32)
    assert ours[1].dtype == torch.uint8
    assert torch.equal(centre[1][0], torch.from_numpy(np.asarray(mask)[4:36, 4:36].copy()))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"down": 0.0, "across": 0.999}, lambda a: a[0:32, 7:39]),
        ({"down": 0.26, "across": 0.0}, lambda a: a[2:34, 0:32]),
        ({"is_mirrored": True}, lambda a: a[4:36, 4:36][:, ::-1]),
        ({"is_upturned": True}, lambda a: a[4:36, 4:36][::-1]),
        ({"turns": 1}, lambda a: np.rot90(a[4:36, 4:36])),
        ({"turns": 3, "is_mirrored": True}, lambda a: np.rot90(a[4:36, 4:36][:, ::-1], 3)),
    ],
    ids=["right", "left", "mirrored", "upturned", "turned", "mirrored and turned"],
)
def test_image_and_mask_move_together(changes, expected):
    image, mask = pattern()
    view, mask_view = training_view(image, mask, 32, changed(**changes))
    wanted = torch.from_numpy(expected(np.asarray(mask)).copy())
    assert torch.equal(mask_view[0], wanted)
    assert torch.equal(view, mask_view.expand(3, -1, -1))


def test_colours_leave_the_mask():
    image, mask = pattern()
    colours = (("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.7))
    change = changed(colours=colours, blur=(9, 2.0), bits=5, sharpness=0.2)
    view, mask_view = training_view(image, mask, 32, change)
    assert torch.equal(mask_view, central_view(image, mask, 32)[1])
    assert not torch.equal(view, mask_view.expand(3, -1, -1))


def test_colours_by_hand():
    grey = Image.fromarray(np.full((4, 4, 3), (100, 50, 200), dtype=np.uint8))

    def first(**changes):
        return np.asarray(coloured(grey, changed(**changes)))[0, 0].tolist()

    assert first(colours=(("brightness", 0.6),)) == [60, 30, 120]
    grey_value = round(0.299 * 100 + 0.587 * 50 + 0.114 * 200)  # 82
    halved = [grey_value + 0.5 * (value - grey_value) for value in (100, 50, 200)]
    assert first(colours=(("saturation", 0.5),)) == pytest.approx(halved, abs=1)
    assert first(colours=(("contrast", 0.5),)) == pytest.approx(halved, abs=1)  # of one colour
    assert first(bits=5) == [96, 48, 200]
    brighter_first = first(colours=(("brightness", 1.4), ("saturation", 1.8)))
    assert brighter_first != first(colours=(("saturation", 1.8), ("brightness", 1.4)))


def test_sharpness_is_that_of_pillow():
    image, _ = pattern()
    for factor in (0.2, 1.9):
        ours = np.asarray(coloured(image, changed(sharpness=factor)))
        assert np.array_equal(ours, np.asarray(ImageEnhance.Sharpness(image).enhance(factor)))
        assert not np.array_equal(ours, np.asarray(image))


@pytest.mark.parametrize(("kernel", "sigma"), [(9, 0.1), (9, 2.0), (33, 1.3)])
def test_blur_is_that_of_torchvision(kernel, sigma):
    image, _ = pattern()
    ours = np.asarray(coloured(image, changed(blur=(kernel, sigma)))).astype(int)
    theirs = v2.functional.gaussian_blur(image, [kernel, kernel], [sigma, sigma])
    assert abs(ours - np.asarray(theirs)).max() <= 1


def test_changes_cover_the_published_ranges():
    found = [draw_change(seed) for seed in range(2000)]
    assert draw_change(7) == found[7]
    assert len(set(found)) == 2000
    for attribute, choices in (
        ("turns", {0, 1, 2, 3}),
        ("is_mirrored", {False, True}),
        ("is_upturned", {False, True}),
        ("bits", {5, 6, 7, 8}),
    ):
        counts = Counter(getattr(one, attribute) for one in found)
        assert set(counts) == choices
        assert min(counts.values()) > 0.8 * 2000 / len(choices)
    kernels = Counter(one.blur[0] for one in found)
    assert set(kernels) == {9, 13, 17, 21, 25, 29, 33}
    assert len({tuple(name for name, _ in one.colours) for one in found}) == 6
    ranges = {
        "down": (0, 1),
        "across": (0, 1),
        "sharpness": (0.2, 2),
        "sigma": (0.1, 2),
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.6, 1.8),
    }
    for name, (low, high) in ranges.items():
        values = np.array(
            [
                {**dict(one.colours), **vars(one), "sigma": one.blur[1]}[name]  # one of the three
                for one in found
            ]
        )
        assert low <= values.min() < low + 0.01 * (high - low), name
        assert high - 0.01 * (high - low) < values.max() < high, name
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low), name


def test_squares_of_256_are_cut_as_published():
    image, mask = pattern(256, 256)
    values = np.asarray(mask)
    centre = central_view(image, mask, 224)[1][0].numpy()
    assert np.array_equal(centre, values[16:240, 16:240])
    corner = training_view(image, mask, 224, changed(down=31.99 / 32, across=0.0))[1][0].numpy()
    assert np.array_equal(corner, values[31:255, :224])


def test_wide_images_are_seen_in_their_middle():
    image, mask = resized(*pattern(20, 80), 40)
    assert image.size == mask.size == (160, 40)
    centre = central_view(image, mask, 32)[1][0].numpy()
    assert np.array_equal(centre, np.asarray(mask)[4:36, 64:96])
    end = training_view(image, mask, 32, changed(across=0.9999))[1][0].numpy()
    assert np.array_equal(end, np.asarray(mask)[4:36, 127:159])


def test_masks_are_resized_bilinearly():
    mask = Image.fromarray(np.array([[0, 255]] * 2, dtype=np.uint8))
    _, found = resized(mask.convert("RGB"), mask, 8)
    assert len(np.unique(np.asarray(found))) > 2


@pytest.mark.parametrize("count", [1, 4])
def test_views_do_not_depend_on_threads(tmp_path, count):
    pieces = write_pieces(tmp_path, "disc", 5)
    sight = Sight(40, 32)
    jobs = [[(p, (11 * i, 3)) for i, p in enumerate(pieces[:3])], [(p, (1, 2)) for p in pieces[3:]]]
    with torch_threads(count):
        found = list(sight.batches(jobs))
    assert [images.shape for images, _ in found] == [(6, 3, 32, 32), (4, 3, 32, 32)]
    for (images, masks), job in zip(found, jobs, strict=True):
        for i, (piece, seeds) in enumerate(job):
            for v, seed in enumerate(seeds):  # the first views of all come first
                both = resized(*read_piece(piece), 40)
                view, mask = training_view(*both, 32, draw_change(seed))
                assert torch.equal(images[v * len(job) + i], view)
                assert torch.equal(masks[v * len(job) + i], mask)


def test_no_more_than_two_batches_are_read_ahead(tmp_path, monkeypatch):
    pieces = write_pieces(tmp_path, "disc", 1)
    read = []
    monkeypatch.setattr(token_sources, "read_piece", lambda p: read.append(p) or read_piece(p))
    stream = Sight(40, 32).batches([[(pieces[0], ())] for _ in range(20)])
    next(stream)
    time.sleep(0.2)  # for what has been asked for
    stream.close()
    assert len(read) == 2


def test_masks_of_1_and_8_bits_are_read_alike(tmp_path):
    values = np.zeros((6, 8), dtype=bool)
    values[1:3, 2:5] = True
    files = {"1": Image.fromarray(values), "L": Image.fromarray(values.astype(np.uint8))}
    image = tmp_path / "image.png"
    Image.new("L", (8, 6), 7).save(image)
    for name, mask in files.items():
        mask.save(tmp_path / f"{name}.png")
        found, read = read_piece(Piece(image, tmp_path / f"{name}.png", 1.0, 6))
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(read), values * np.uint8(255))


def test_pieces_that_cannot_be_read_are_named(tmp_path):
    (piece,) = write_pieces(tmp_path, "disc", 1)
    other = dataclasses.replace(piece, image=tmp_path / "none.png")
    with pytest.raises(ModelError, match=r"none\.png"):
        read_piece(other)
    (tmp_path / "cut.png").write_bytes(piece.image.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"cut\.png"):
        read_piece(dataclasses.replace(piece, image=tmp_path / "cut.png"))
    Image.new("1", (3, 4)).save(tmp_path / "small.png")
    with pytest.raises(ModelError, match=r"small\.png is 3 x 4 pixels, its piece .* is 40 x 40"):
        read_piece(dataclasses.replace(piece, mask=tmp_path / "small.png"))
    for changes in ({"score": float("nan")}, {"score": 1.01}, {"area": -1}):
        with pytest.raises(ValueError, match=r"disc0"):
            dataclasses.replace(piece, **changes)
