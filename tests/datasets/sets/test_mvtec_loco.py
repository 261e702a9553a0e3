import json

import numpy as np
import pytest
import torch

from configs.options import DataOptions
from datasets.contents import Digests, contents_of
from datasets.reading.masks import read_masks, read_regions
from datasets.reading.mvtec_layout import read_saturations
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError, Saturation
from datasets.sets.folder import DATA_SET as FOLDERS
from datasets.sets.mvtec_loco import DATA_SET
from datasets.tasks.structured import in_whole_batches, structured_tasks
from tests.datasets.trees import draw_loco_category, draw_mvtec_category, save

WHOLE = PairTransform(64, None, "opencv_square")


@pytest.fixture
def task(tmp_path):
    draw_loco_category(tmp_path)
    (task,) = structured_tasks(DATA_SET, tmp_path, ["juice_bottle"], DataOptions())
    return task


def test_images_of_each_kind_and_the_validation_split(task):
    assert len(task.train) == 6
    assert len(task.validation) == 3
    assert all("validation/good" in path.as_posix() for path in task.validation.paths)
    assert task.kinds == ("good",) * 3 + ("logical_anomalies",) * 2 + ("structural_anomalies",) * 2
    assert task.test_labels.tolist() == [0] * 3 + [1] * 4
    assert task.groups == {
        "logical": ("logical_anomalies",), "structural": ("structural_anomalies",),
    }  # fmt: skip
    assert task.saturations == {255: Saturation(30.0, False), 254: Saturation(0.5, True)}
    assert [mask.name for mask in task.masks[3:]] == ["000", "001", "000", "001"]
    assert task.unused == ()


def test_masks_are_joined_and_regions_are_a_file_each(task):
    masks = read_masks(task.test.paths, task.masks, WHOLE)  # (N, 64, 64)
    regions = read_regions(task.masks, task.saturations, WHOLE)
    assert [region.image for region in regions] == [3, 3, 4, 4, 4, 5, 5, 6, 6]
    for image in range(3, 7):
        found = np.zeros(64 * 64, dtype=bool)
        for region in regions:
            if region.image == image:
                found[region.pixels] = True
        assert torch.equal(masks[image].flatten(), torch.from_numpy(found))
    # Images of 48 x 64 grow by a third: so does an area in pixels of the file.
    for square, scratch in (regions[:2], regions[2:4], regions[5:7], regions[7:9]):
        assert square.saturation == pytest.approx(40)
        assert scratch.saturation == pytest.approx(len(scratch.pixels) / 2)


def test_a_saturation_beyond_the_defect_is_the_defect(task):
    saturations = {255: Saturation(1e6, False), 254: Saturation(3.0, True)}
    for region in read_regions(task.masks, saturations, WHOLE):
        assert region.saturation == len(region.pixels)


def test_a_folder_of_own_images_may_be_laid_out_so(tmp_path):
    draw_loco_category(tmp_path, "cans")
    draw_mvtec_category(tmp_path, "cloth")
    folder = FOLDERS[0]
    own = structured_tasks(folder, tmp_path, ["cans"], folder.options)[0]
    assert own.saturations
    assert own.groups
    assert own.validation is not None
    plain = structured_tasks(folder, tmp_path, ["cloth"], folder.options)[0]
    assert not plain.saturations
    assert not plain.groups
    assert plain.validation is None


def test_the_validation_images_are_part_of_what_a_head_is_made_of(task, tmp_path):
    contents = contents_of(task, tmp_path, Digests())
    assert len(contents["validation/good"]) == 3
    assert len(contents["masks/logical_anomalies"]) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSONDecodeError"),
        ("3", "TypeError"),
        ("[{}]", "pixel_value"),
        ('[{"pixel_value": "a", "saturation_threshold": 1, "relative_saturation": true}]', "Value"),
        ('[{"pixel_value": 9, "saturation_threshold": 0, "relative_saturation": true}]', "above 0"),
    ],
)
def test_a_list_of_defects_that_is_none(tmp_path, text, said):
    path = tmp_path / "defects_config.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path.name}.*{said}"):
        read_saturations(path)
    assert read_saturations(tmp_path / "missing.json") == {}


def test_a_grey_value_that_no_defect_has(task):
    with pytest.raises(DataError, match=r"grey values \[254\].*it has 255"):
        read_regions(task.masks, {255: Saturation(1.0, True)}, WHOLE)
    mixed = task.masks[3] / "000.png"
    both = np.full((64, 48), 255, dtype=np.uint8)
    both[0] = 254
    save(mixed, both)
    with pytest.raises(DataError, match=r"grey values \[254, 255\]"):
        read_regions(task.masks, task.saturations, WHOLE)


def test_an_anomalous_image_whose_folder_of_masks_is_empty(tmp_path):
    category = draw_loco_category(tmp_path)
    for mask in (category / "ground_truth/logical_anomalies/001").iterdir():
        mask.unlink()
    with pytest.raises(DataError, match=r"logical_anomalies/001.png has no mask"):
        structured_tasks(DATA_SET, tmp_path, ["juice_bottle"], DataOptions())


def test_the_last_images_by_path_that_fill_no_batch(task):
    whole = in_whole_batches(task, 7)
    assert whole.test.paths == task.test.paths
    assert whole.kinds == task.kinds
    cut = in_whole_batches(task, 3)  # 7 images: structural 001 comes last
    assert cut.kinds == task.kinds[:-1]
    assert cut.test_labels.tolist() == task.test_labels[:-1].tolist()
    assert cut.masks == task.masks[:-1]
    with pytest.raises(DataError, match=r"7 test images, which fill no batch of 32"):
        in_whole_batches(task, 32)


def test_true_names_are_known():
    assert len(DATA_SET.categories) == 5
    assert json.dumps(DATA_SET.categories[0]) == '"breakfast_box"'
