import cv2
import numpy as np
import pytest

from datasets.drawing import textures
from datasets.drawing.textures import (
    TextureError,
    Textures,
    find_textures,
    own_textures,
    paste,
    paste_texture,
)
from datasets.samples import DataError


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_own_set_is_always_the_same_and_no_two_images_are_equal():
    first = own_textures()
    own_textures.cache_clear()
    again = own_textures()
    assert "48 images" in first.words
    assert len(first.images) == len(again.images) == 48
    assert all(map(np.array_equal, first.images, again.images))
    small = {cv2.resize(image, (16, 16)).tobytes() for image in first.images}
    assert len(small) == 48
    assert all(image.dtype == np.uint8 and image.std() > 6 for image in first.images)
    grey = [np.ptp(image.astype(int), axis=2).max() <= 1 for image in first.images]
    assert 10 < sum(grey) < 40


def test_each_image_of_a_folder_is_drawn_at_the_size_that_is_asked_for(tmp_path):
    (tmp_path / "below").mkdir()
    for index, size in enumerate([(9, 12), (50, 50), (31, 40)]):
        image = np.full((*size, 3), 60 * index, np.uint8)
        cv2.imwrite(str(tmp_path / "below" / f"{index}.png"), image)
    found = find_textures(str(tmp_path))
    assert found.words == f"the 3 images below {tmp_path}"
    drawn = [found.draw(24, rng(seed)) for seed in range(30)]
    assert all(image.shape == (24, 24, 3) and image.dtype == np.uint8 for image in drawn)
    assert {int(image.max()) for image in drawn} == {0, 60, 120}


def test_a_folder_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(TextureError, match="nowhere is not a folder"):
        find_textures(str(tmp_path / "nowhere"))
    with pytest.raises(TextureError, match="no image in this folder"):
        find_textures(str(tmp_path))


def test_a_damaged_file_is_named_when_it_is_drawn(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"broken\.png"):
        find_textures(str(tmp_path)).draw(8, rng())


def test_what_is_pasted_is_blended_within_the_mask_alone():
    image, texture = (rng(s).integers(0, 256, (20, 20, 3)).astype(np.uint8) for s in (1, 2))
    mask = rng(3).random((20, 20)) < 0.3
    before = image.copy()
    found = paste(image, texture, mask, 0.25)
    assert np.array_equal(image, before)
    assert np.array_equal(found[~mask], image[~mask])
    wanted = 0.25 * texture[mask] + 0.75 * image[mask]
    assert np.abs(found[mask] - wanted).max() <= 0.5 + 1e-6


def test_an_anomaly_is_where_its_mask_is_and_follows_from_the_seed(monkeypatch):
    source = Textures([np.full((8, 8, 3), 250, np.uint8)], "one")
    image = np.full((64, 64, 3), 20, np.uint8)
    opacities = []
    monkeypatch.setattr(textures, "augment", lambda texture, _: texture)
    for seed in range(40):
        found, mask = paste_texture(image, source, rng(seed))
        assert np.array_equal(found, paste_texture(image, source, rng(seed))[0])
        assert (found[~mask] == 20).all()
        if mask.any():
            (level,) = np.unique(found[mask])
            opacities.append((level - 20) / 230)
    assert min(opacities) >= 0.19
    assert max(opacities) <= 1
    assert np.ptp(opacities) > 0.5
