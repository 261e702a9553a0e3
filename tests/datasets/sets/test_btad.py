import pytest

from configs.options import DataOptions
from datasets.reading.masks import read_masks
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError
from datasets.sets.btad import DATA_SET
from datasets.tasks.structured import structured_tasks
from tests.datasets.trees import draw_btad_category


@pytest.mark.parametrize("suffix", [".bmp", ".png"])
def test_images_and_masks_by_stem(tmp_path, suffix):
    draw_btad_category(tmp_path, "01", suffix=suffix)
    (task,) = structured_tasks(DATA_SET, tmp_path, ["01"], DataOptions())
    assert len(task.train) == 4
    assert task.kinds == ("good", "good", "ko", "ko", "ko")
    assert [None if m is None else m.name for m in task.masks] == [
        None, None, "0000.png", "0001.bmp", "0002.bmp",
    ]  # fmt: skip
    masks = read_masks(task.test.paths, task.masks, PairTransform(40, None, "opencv_square"))
    assert masks.flatten(1).any(dim=1).tolist() == [False, False, True, True, True]
    assert task.unused == ()
    assert task.validation is None


def test_what_is_missing_is_named(tmp_path):
    category = draw_btad_category(tmp_path, "02")
    (category / "ground_truth/ko/0001.bmp").unlink()
    with pytest.raises(DataError, match=r"test/ko/0001.bmp has no mask"):
        structured_tasks(DATA_SET, tmp_path, ["02"], DataOptions())
    draw_btad_category(tmp_path, "03")
    for image in (tmp_path / "03/train/ok").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"'03' of BTAD has no images in .*train/ok"):
        structured_tasks(DATA_SET, tmp_path, ["03"], DataOptions())
