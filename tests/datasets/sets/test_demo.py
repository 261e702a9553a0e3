import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from skimage import data

from datasets.reading.images import read_image, read_mask
from datasets.reading.masks import read_masks
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError
from datasets.sets.demo import demo
from datasets.sets.demo.defects import CHANGE_THRESHOLD, draw_defect
from datasets.sets.demo.demo import DATA_SET, DEFECTS, DEMO_CATEGORIES, build_demo, cut_crop
from datasets.tasks.structured import list_categories, read_category, task_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_demo(tmp_path_factory.mktemp("cache") / "made" / "on demand")


def digests(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_layout(root):
    assert list_categories(DATA_SET, root) == DEMO_CATEGORIES
    for name in DEMO_CATEGORIES:
        category = read_category(DATA_SET, root, name, DATA_SET.options)
        assert category.has_masks
        assert len(category.train) == demo.NUM_TRAIN
        assert [sample.defect for sample in category.test] == ["good"] * demo.NUM_GOOD + [
            defect for defect in DEFECTS for _ in range(demo.NUM_DEFECTIVE)
        ]
        assert read_image(category.train[0].path).shape == (demo.CROP_SIZE, demo.CROP_SIZE, 3)
        task, transform = task_of(category), PairTransform(224, None, "opencv_square")
        masks = read_masks(task.test.paths, task.masks, transform)
        assert masks[demo.NUM_GOOD :].any((1, 2)).all()
        assert not masks[: demo.NUM_GOOD].any()


def test_images_differ(root):
    images = {name: digest for name, digest in digests(root).items() if "ground_truth" not in name}
    assert len(set(images.values())) == len(images)


def test_two_processes_build_at_once_the_same_bytes(root, tmp_path):
    script = (
        "import sys, pathlib; from datasets.sets.demo.demo import build_demo; "
        "print(build_demo(pathlib.Path(sys.argv[1])))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "cache"],
            cwd=Path(demo.__file__).parents[3],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    built = tmp_path / "cache" / root.name
    assert outputs == [str(built)] * 2
    assert digests(built) == digests(root)
    assert list((tmp_path / "cache").iterdir()) == [built]


def test_loser_of_a_race_takes_the_winners_folder(root, tmp_path, monkeypatch):
    def build_after_another_process(folder, category, rng):
        if not (tmp_path / root.name).exists():
            (tmp_path / root.name / "winner").mkdir(parents=True)
        folder.mkdir(parents=True)

    monkeypatch.setattr(demo, "_build_category", build_after_another_process)
    with pytest.raises(DataError, match="0 of its"):
        build_demo(tmp_path)
    assert [path.name for path in (tmp_path / root.name).iterdir()] == ["winner"]


def test_complete_folder_is_reused(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert build_demo(root.parent) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.png")} == before


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_demo(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_folder_is_named(root, tmp_path):
    folder = shutil.copytree(root, tmp_path / root.name)
    (folder / "grass/train/good/003.png").unlink()
    with pytest.raises(DataError, match=rf"{folder} has 419 of its 420 files: delete the folder"):
        build_demo(tmp_path)


def test_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot build the demo data set in .*file.*NOCO_CACHE"):
        build_demo(tmp_path / "file")


@pytest.mark.skipif(os.name == "nt", reason="no permission bits")
def test_folder_has_the_usual_permissions(root, tmp_path):
    (tmp_path / "usual").mkdir()
    assert root.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_cut_crop_stays_in_its_columns_which_training_and_test_do_not_share(monkeypatch):
    assert demo.TRAIN_COLUMNS[1] <= demo.TEST_COLUMNS[0]
    monkeypatch.setattr(demo, "_GAIN", (1.0, 1.0))
    # Each pixel of this texture is its column, so a crop tells where it was cut.
    columns = np.tile(np.arange(512) // 2, (512, 1)).astype(np.uint8)
    rng = np.random.default_rng(0)
    for first, end in (demo.TRAIN_COLUMNS, demo.TEST_COLUMNS):
        crops = [cut_crop(columns, (first, end), rng, turns=True) for _ in range(300)]
        assert min(crop.min() for crop in crops) == first // 2
        assert max(crop.max() for crop in crops) == (end - 1) // 2


def test_training_and_normal_test_crops_are_alike(root):
    for name in DEMO_CATEGORIES:
        category = read_category(DATA_SET, root, name, DATA_SET.options)
        train = np.array([read_image(sample.path).mean() for sample in category.train])
        good = np.array([read_image(s.path).mean() for s in category.test if not s.label])
        assert train.std() > 2
        assert abs(train.mean() - good.mean()) < 0.1 * train.mean()


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("category", DEMO_CATEGORIES)
def test_mask_is_what_the_defect_changed(kind, category):
    rng = np.random.default_rng(5)
    other = DEMO_CATEGORIES[DEMO_CATEGORIES.index(category) - 1]
    for _ in range(5):
        crop = cut_crop(getattr(data, category)(), demo.TEST_COLUMNS, rng, turns=True)
        foreign = cut_crop(getattr(data, other)(), demo.TEST_COLUMNS, rng, turns=True)
        before = crop.copy()
        defective, mask = draw_defect(kind, crop, foreign, rng)
        np.testing.assert_array_equal(crop, before)
        change = np.abs(defective.astype(int) - crop.astype(int))
        assert change[~mask].max() == 0
        # The rest are closed gaps, where the drawn value happens to equal the old one.
        assert (change[mask] >= CHANGE_THRESHOLD).mean() > 0.7
        assert change[mask].mean() > 8
        assert 100 <= mask.sum() < 0.25 * mask.size
        regions, count = ndimage.label(mask)
        assert count >= 1
        assert (ndimage.maximum(change, regions, range(1, count + 1)) >= 12).all()


def test_masks_on_disk_fit_their_images(root):
    # A hole is dark throughout, but for its soft edge.
    for name in DEMO_CATEGORIES:
        for sample in read_category(DATA_SET, root, name, DATA_SET.options).test:
            if sample.defect == "hole":
                grey, mask = read_image(sample.path)[:, :, 0], read_mask(sample.mask_path)
                core = ndimage.binary_erosion(mask, iterations=2)
                assert core.any()
                assert np.median(grey[core]) <= 40
                assert grey[core].mean() < grey[~mask].mean() - 40
