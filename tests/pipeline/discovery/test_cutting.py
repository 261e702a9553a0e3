"""Masks by each way of `--masks`, and the range that maps share."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from datasets.reading.transforms import PairTransform
from pipeline.discovery.cutting import Scale, cutter_of, scale_of
from pipeline.discovery.maps import MapsOfFolder
from utils.discovery.levels import Levels

SIZE = 96


@dataclass
class Batch:
    maps: list


@dataclass
class Looked:
    """What cutting reads of the images that are looked at."""

    maps_of_images: list
    levels: Levels | None = None
    paths: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    transform: PairTransform = field(
        default_factory=lambda: PairTransform(SIZE, None, "opencv_square")
    )
    maps: MapsOfFolder = field(default_factory=lambda: MapsOfFolder.__new__(MapsOfFolder))

    def batches(self):
        return [Batch([one]) for one in self.maps_of_images]


def blob(peak, background=0.1, top=30):
    values = np.full((SIZE, SIZE), background, dtype=np.float32)
    y, x = np.mgrid[:SIZE, :SIZE]
    bump = peak * np.exp(-((y - top) ** 2 + (x - 40) ** 2) / 128)
    return np.maximum(values, bump.astype(np.float32))


def masks_of(looked, how):
    scale = scale_of(looked, guarded=how != "mebin_released")
    cut = cutter_of(how, 5, looked, scale)
    size = (SIZE, SIZE)
    return [cut(i, one, float(one.max()), size) for i, one in enumerate(looked.maps_of_images)]


def test_the_range_is_shared_by_all_maps():
    scale = scale_of(Looked([blob(1.0), blob(0.5), blob(0.2)]), guarded=False)
    assert (scale.low, scale.high) == pytest.approx((0.1, 1.0))
    assert scale.floor == int((0.2 - 0.1) / 0.9 * 255)
    assert scale.top == 255
    scores = scale.scores(blob(0.2))
    assert scores.max() == 0
    assert scale.scores(blob(1.0)).max() == 1


def test_eight_bit_maps_keep_their_values():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert Scale(50, 60, 0, 255).eight_bits(values) is values


def test_the_least_anomalous_image_has_a_mask_where_it_exceeds_normal_ones():
    maps = [blob(1.0), blob(0.6)]  # no good image among them
    released = masks_of(Looked(maps), "mebin_released")
    assert [cut.mask.any() for cut in released] == [True, False]
    levels = Levels(threshold=0.3, floor=0.2, lowest_peak=0.2)
    guarded = masks_of(Looked(maps, levels), "mebin")
    assert [cut.mask.any() for cut in guarded] == [True, True]


@pytest.mark.parametrize("maps", [[blob(1.0)], [blob(1.0), blob(1.0, top=60)]])
def test_one_image_and_equal_peaks_have_masks_where_guarded(maps):
    assert not any(cut.mask.any() for cut in masks_of(Looked(maps), "mebin_released"))
    assert all(cut.mask.any() for cut in masks_of(Looked(maps), "mebin"))


def test_released_keeps_a_region_more_than_it_counts():
    maps = [blob(1.0), blob(0.2)]
    assert [cut.most for cut in masks_of(Looked(maps), "mebin_released")] == [2, 1]
    assert [cut.most for cut in masks_of(Looked(maps), "mebin")] == [1, 1]


def test_normal_masks_are_weighted_and_given_ones_are_read(tmp_path):
    levels = Levels(threshold=0.3, floor=0.2, lowest_peak=0.15)
    (cut,) = masks_of(Looked([blob(1.0)], levels), "normal")
    assert np.array_equal(cut.mask, cut.weights > 0)
    assert cut.weights.argmax() == 30 * SIZE + 40

    image, mask = tmp_path / "a.png", tmp_path / "m.png"
    Image.new("RGB", (SIZE, SIZE)).save(image)
    inside = np.zeros((SIZE, SIZE), dtype=np.uint8)
    inside[3:7, 5:9] = 255
    Image.fromarray(inside).save(mask)
    looked = Looked([blob(1.0)] * 2, paths=[image] * 2, masks=[mask, None])
    given, good = masks_of(looked, "true")
    assert np.array_equal(given.mask, inside > 0)
    assert not good.mask.any()
