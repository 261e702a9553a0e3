import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets.reading.images import PLAIN
from datasets.reading.loading import (
    BATCHES_AHEAD,
    ArrayDataset,
    Batch,
    BatchLoader,
    ImageDataset,
    images_of,
)
from datasets.reading.masks import read_masks
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError, ImageSet
from datasets.synthetic import SyntheticDataset, cutpaste, rotate
from tests.datasets.trees import add_defect, save, texture

TRANSFORM = PairTransform(32, None, "opencv_square")


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    return [save(tmp_path / f"{index}.png", texture(rng, (40, 36))) for index in range(7)]


def loader(dataset, *, workers=0, for_gpu=False, skip=False, batch_size=3):
    options = {"batch_size": batch_size, "workers": workers, "for_gpu": for_gpu}
    return BatchLoader(dataset, skip_unreadable=skip, **options)


@pytest.fixture(params=[(0, False), (2, False), (2, True)], ids=["in turn", "threads", "processes"])
def load(request, paths):
    """Makes loaders of the files; pinning memory warns where there is no GPU to pin it for."""
    workers, for_gpu = request.param
    dataset = ImageDataset(paths, TRANSFORM)
    return lambda **options: loader(dataset, workers=workers, for_gpu=for_gpu, **options)


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_batches_come_in_order_and_leave_the_global_generator_alone(paths, load):
    before = torch.get_rng_state()
    batches = load()
    assert len(batches) == 3
    assert batches.num_images == 7
    for _ in range(2):
        found = list(batches)
        assert all(isinstance(batch, Batch) for batch in found)
        assert [batch.indices for batch in found] == [[0, 1, 2], [3, 4, 5], [6]]
        images = torch.cat([batch.images for batch in found])
        assert images.shape == (7, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert batches.skipped == []
    with Image.open(paths[5]) as image:
        expected = TRANSFORM.image(np.asarray(image))
    np.testing.assert_array_equal(images[5].permute(1, 2, 0), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_unreadable_images_are_left_out_and_listed(paths, load):
    truncate(paths[1])
    paths[6].unlink()
    batches = load(skip=True)
    for _ in range(2):
        found = list(batches)
        # The last batch has no image left.
        assert [batch.indices for batch in found] == [[0, 2], [3, 4, 5]]
        assert [len(batch.images) for batch in found] == [2, 3]
        (cut, cut_error), (gone, gone_error) = batches.skipped
        assert (cut, gone) == (paths[1], paths[6])
        assert "truncated" in cut_error
        assert "not found" in gone_error
    save(paths[1], texture(np.random.default_rng(1), (8, 8)))
    save(paths[6], texture(np.random.default_rng(1), (8, 8)))
    assert sum(len(batch.indices) for batch in batches) == 7
    assert batches.skipped == []


def test_some_images_in_any_order(paths, load):
    truncate(paths[1])
    whole = load(skip=True)
    assert whole.indices == [0, 1, 2, 3, 4, 5, 6]
    some = whole.at([5, 1, 0, 2, 5, 6])
    assert (some.indices, some.num_images, len(some)) == ([5, 1, 0, 2, 5, 6], 6, 2)
    found = list(some)
    assert [batch.indices for batch in found] == [[5, 0], [2, 5, 6]]
    assert [path for path, _ in some.skipped] == [paths[1]]
    images = dict(zip([0, 2, 3, 4, 5, 6], torch.cat([b.images for b in whole]), strict=True))
    for batch in found:
        for index, image in zip(batch.indices, batch.images, strict=True):
            assert torch.equal(image, images[index])
    again = some.at([3, 0])
    assert again.indices == [2, 5]
    assert [batch.indices for batch in again] == [[2, 5]]
    assert (len(whole.at([])), list(whole.at([]))) == (0, [])
    prints = [json.dumps(part.fingerprint()) for part in (whole, some, again)]
    assert len(set(prints)) == 3
    strict = load().at([1])
    assert whole.skips_unreadable > strict.skips_unreadable
    with pytest.raises(DataError, match=r"cannot read the image .*1\.png.*--skip-unreadable"):
        list(strict)


class WorkerState:
    """A transform whose image tells the state of the process it runs in."""

    reading = PLAIN

    def image(self, image):
        del image
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return np.array([[[torch.get_num_threads(), ignored, os.getpid() % 251]]], dtype=np.uint8)


def test_processes_have_one_thread_and_leave_interrupts_to_the_main_process(paths):
    batches = list(loader(ImageDataset(paths, WorkerState()), workers=2, for_gpu=True))
    states = torch.cat([batch.images for batch in batches]).flatten(1)  # (7, 3)
    assert (states[:, 0] == 1).all()
    assert (states[:, 1] == 1).all()
    assert len(states[:, 2].unique()) == 2


def test_threads_read_ahead_but_no_further_and_stop_when_dropped():
    """At most `BATCHES_AHEAD` batches are held beside the one in use."""
    read = []

    class Watched(ArrayDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    images = Watched(np.zeros((60, 32, 32), np.uint8), TRANSFORM)
    batches = iter(loader(images, workers=3, batch_size=4))
    assert next(batches).indices == [0, 1, 2, 3]
    deadline = time.monotonic() + 20
    while len(read) < 4 * (1 + BATCHES_AHEAD) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(read) == list(range(4 * (1 + BATCHES_AHEAD)))
    batches.close()
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())


def test_an_error_in_a_thread_reaches_the_caller():
    class Failing(ArrayDataset):
        def __getitem__(self, index):
            if index == 5:
                raise MemoryError("no room")
            return super().__getitem__(index)

    with pytest.raises(MemoryError, match="no room"):
        list(loader(Failing(np.zeros((9, 32, 32), np.uint8), TRANSFORM), workers=2))


@pytest.mark.parametrize("for_gpu", [False, True])
def test_interrupt_ends_quickly_with_one_traceback(tmp_path, for_gpu):
    script = tmp_path / "load.py"
    script.write_text(
        textwrap.dedent(
            """
            import signal
            import time
            import numpy as np
            from datasets.reading.loading import ArrayDataset, BatchLoader

            class Slow:
                def image(self, image):
                    time.sleep(0.05)
                    return image

            if __name__ == "__main__":
                # A background job of a shell without a terminal starts with interrupts ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                images = ArrayDataset(np.zeros((4000, 8, 8), np.uint8), Slow())
                options = {"batch_size": 1, "workers": 2, "for_gpu": FOR_GPU}
                for batch in BatchLoader(images, skip_unreadable=False, **options):
                    print(batch.indices, flush=True)
            """
        ).replace("FOR_GPU", str(for_gpu))
    )
    root = Path(datasets.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        # The second batch comes from the second worker: both have started.
        assert process.stdout.readline().strip() == "[0]"
        assert process.stdout.readline().strip() == "[1]"
        os.killpg(process.pid, signal.SIGINT)
        start = time.monotonic()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - start < 20
    assert process.returncode != 0
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_arrays_of_grey_and_colour():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 32, 32), dtype=np.uint8)
    colour = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    (grey_batch,) = loader(images_of(ImageSet("test", images=grey), TRANSFORM), batch_size=8)
    (colour_batch,) = loader(ArrayDataset(colour, TRANSFORM), batch_size=8)
    assert grey_batch.indices == [0, 1, 2, 3, 4]
    for channel in range(3):
        np.testing.assert_array_equal(grey_batch.images[:, channel], grey)
        np.testing.assert_array_equal(colour_batch.images[:, channel], colour[..., channel])


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 1), np.uint8), np.zeros((4, 4), np.uint8)]
)
def test_arrays_of_another_type_or_shape_are_refused(images):
    with pytest.raises(ValueError, match=r"uint8 of shape \(N, H, W\)"):
        ArrayDataset(images, TRANSFORM)


@pytest.fixture
def defective(tmp_path):
    rng = np.random.default_rng(3)
    image, mask = add_defect(texture(rng, (40, 36)), "hole", rng)
    path = save(tmp_path / "defective.png", image)
    mask_path = save(tmp_path / "defective_mask.png", mask)
    return path, mask_path, mask


def test_read_masks(paths, defective):
    path, mask_path, mask = defective
    images = [paths[0], path, paths[1]]
    masks = read_masks(images, [None, mask_path, None], TRANSFORM)
    assert masks.shape == (3, 32, 32)
    assert masks.dtype == torch.bool
    np.testing.assert_array_equal(masks[1], TRANSFORM.mask(mask))
    assert masks[1].any()
    assert not masks[0].any()
    assert not masks[2].any()
    assert read_masks([], [], TRANSFORM).shape == (0, 32, 32)


def test_mask_of_another_size_is_named(defective):
    path, mask_path, mask = defective
    save(mask_path, mask[:, :-1])
    message = r"defective_mask\.png is 39 x 36 pixels, its image .*defective\.png is 40 x 36"
    with pytest.raises(DataError, match=message):
        read_masks([path], [mask_path], TRANSFORM)


def test_masks_of_a_folder_are_joined_each_of_them_checked(tmp_path, defective):
    path, _, mask = defective
    left, right = mask.copy(), mask.copy()
    left[:, 20:], right[:, :20] = 0, 0
    save(tmp_path / "parts/0.png", left)
    save(tmp_path / "parts/1.png", right)
    (joined,) = read_masks([path], [tmp_path / "parts"], TRANSFORM)
    (whole,) = read_masks([path], [defective[1]], TRANSFORM)
    assert joined.equal(whole)
    assert joined.any()
    save(tmp_path / "parts/1.png", right[:, :-1])
    with pytest.raises(DataError, match=r"parts/1\.png is 39 x 36"):
        read_masks([path], [tmp_path / "parts"], TRANSFORM)


def test_fingerprint_changes_with_files_transform_and_drawing(paths):
    small, large = (PairTransform(size, None, "opencv_square") for size in (16, 24))

    def prints():
        images = ImageDataset(paths, small)
        return [
            images.fingerprint(),
            ImageDataset(paths, large).fingerprint(),
            ImageDataset(paths[:2], small).fingerprint(),
            SyntheticDataset(images, cutpaste).fingerprint(),
            SyntheticDataset(images, rotate).fingerprint(),
            SyntheticDataset(images, cutpaste, copies=2).fingerprint(),
            SyntheticDataset(images, cutpaste, seed=1).fingerprint(),
        ]

    first = prints()
    assert len(set(first)) == len(first)
    assert prints() == first
    os.utime(paths[0], (1, 1))
    assert not set(prints()) & set(first) - {first[2]}
    changed = prints()
    paths[2].unlink()
    assert prints()[0] != changed[0]
    assert prints()[2] == changed[2]


def test_fingerprint_of_arrays_and_loaders():
    images = np.zeros((4, 8, 8), dtype=np.uint8)
    other = images.copy()
    other[3, 7, 7] = 1
    sets = [ArrayDataset(array, TRANSFORM) for array in (images, other, images[:3])]
    assert len({data.fingerprint() for data in sets}) == 3
    assert ArrayDataset(images.copy(), TRANSFORM).fingerprint() == sets[0].fingerprint()
    loaders = [loader(sets[0], **change) for change in ({}, {"batch_size": 4}, {"skip": True})]
    assert len({json.dumps(one.fingerprint(), sort_keys=True) for one in loaders}) == 3
    assert loader(sets[0], workers=2).fingerprint() == loaders[0].fingerprint()
