"""What looks like an image and is not used is found, counted and named."""

import pytest

from datasets.reading.finding import find_images
from datasets.reading.unused import in_words, unused_images
from datasets.samples import DataError
from datasets.sets import folder as own_images
from datasets.sets.folder import FolderOptions
from datasets.tasks.structured import structured_tasks
from tests.datasets.trees import draw_mvtec_category

SET = own_images.DATA_SET[0]


@pytest.fixture
def part(tmp_path):
    return draw_mvtec_category(tmp_path / "data", "part", num_train=9, num_good=4, num_defective=4)


def read(part, options=None):
    (task,) = structured_tasks(SET, part.parent, (), options or FolderOptions())
    return task


def move(part, old, new):
    (part / new).parent.mkdir(parents=True, exist_ok=True)
    (part / old).rename(part / new)


def test_clean_data_have_nothing_unused(part):
    (part / "train/good/readme.txt").write_text("")
    (part / "train/good/.thumbnails").mkdir()
    move(part, "train/good/000.png", "train/good/.thumbnails/000.png")
    move(part, "train/good/001.png", "__MACOSX/001.png")
    task = read(part)
    assert task.unused == ()
    assert len(task.train_indices) == 7


def test_everything_that_is_left_out_is_named(part):
    for number in range(3):
        move(part, f"train/good/00{number}.png", f"train/good/day2/00{number}.png")
    move(part, "train/good/003.png", "train/good/003.jfif")  # read
    move(part, "train/good/004.png", "train/good/004.gif")
    (part / "train/good/link.png").symlink_to("/nowhere.png")
    move(part, "test/hole/000.png", "test/loose.png")
    move(part, "train/good/005.png", "train/Good/005.png")
    task = read(part)
    assert len(task.train_indices) == 4
    assert len(task.unused) == 3 + 1 + 1 + 1 + 1 + 1  # the last: a mask without its image
    assert in_words(task.unused, task.folder) == (
        "1 image in ground_truth/hole, 1 image in test, 1 image in train/Good, "
        "1 .gif file in train/good, 1 link that leads nowhere in train/good, "
        "3 images in train/good/day2"
    )


@pytest.mark.parametrize("name", ["ok", "OK", "normal"])
def test_a_defect_that_is_called_normal_is_asked_about(part, name):
    move(part, "test/scratch/000.png", f"test/{name}/000.png")
    with pytest.raises(DataError, match=f"test/{name}: are these normal images"):
        read(part)


def test_a_category_whose_normals_are_called_otherwise_is_named(part):
    (draw_mvtec_category(part.parent, "other") / "train/good").rename(
        part.parent / "other/train/Good"
    )
    with pytest.raises(
        DataError, match=r"other has train/ but no train/good .*has: Good.*categories part$"
    ):
        read(part)
    (task,) = structured_tasks(SET, part.parent, ("part",), FolderOptions())
    assert task.category == "part"


def test_masks_may_lack_where_that_is_asked_for(part):
    (part / "ground_truth/hole/000_mask.png").unlink()
    with pytest.raises(DataError, match=r"has no mask.*--data\.partial-masks"):
        read(part)
    task = read(part, FolderOptions(partial_masks=True))
    assert [m is None for m, x in zip(task.masks, task.test_labels, strict=True) if x] == [
        True,
        *[False] * 7,
    ]


def test_masks_in_a_folder_belong_to_the_image_of_its_name(part):
    move(part, "ground_truth/hole/000_mask.png", "ground_truth/hole/000/a.png")
    move(part, "ground_truth/hole/001_mask.png", "ground_truth/hole/000/b.png")
    with pytest.raises(DataError, match=r"hole/001\.png has no mask"):
        read(part)
    move(part, "test/hole/001.png", "test/good/more.png")
    task = read(part)
    assert part / "ground_truth/hole/000" in task.masks
    assert task.unused == ()


def test_names_that_macos_decomposed_are_the_same(part):
    composed, decomposed = "\u00e9", "e\u0301"
    move(part, "test/hole/000.png", f"test/hole/{composed}.png")
    move(part, "ground_truth/hole/000_mask.png", f"ground_truth/hole/{decomposed}_mask.png")
    assert part / f"ground_truth/hole/{decomposed}_mask.png" in read(part).masks
    part.rename(part.with_name(decomposed))
    (task,) = structured_tasks(SET, part.parent, (composed,), FolderOptions())
    assert task.category == decomposed


def test_a_folder_stands_for_what_is_the_users(part, tmp_path):
    photos = tmp_path / "photos"
    for name in (
        ".thumbnails/0.png",
        "__MACOSX/0.png",
        "@eaDir/0.png",
        "0.png",
        "scored/maps/0.png",
    ):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"")
    (photos / "scored/maps.json").write_text("{}")
    (photos / "line2").symlink_to(part / "test/good")
    (photos / "round").symlink_to(photos)
    found = find_images([str(photos)])
    names = [path.relative_to(photos).as_posix() for path in found]
    assert names == ["0.png", *(f"line2/00{number}.png" for number in range(4))]
    assert unused_images(photos, found) == (photos / "scored/maps/0.png",)
