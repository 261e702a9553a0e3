"""A small data set that needs no download: crops of three textures that come with scikit-image.

Brick, grass and gravel are photographs of 512 x 512 grey pixels. The left half gives the training
crops, the right half the test crops, so no pixel is in both. Crops are flipped (brick) or flipped
and turned (grass and gravel) and vary a little in brightness, alike for training and test. The
kinds of defects are described in `datasets/sets/demo/defects.py`.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.data_set import WHOLE_224, StructuredSet
from datasets.reading.mvtec_layout import read_category
from datasets.samples import DataError

DEMO_CATEGORIES = ("brick", "grass", "gravel")
DEFECTS = ("foreign", "hole", "scratch", "smear", "stain")

# Part of the folder's name: raise it with any change of the recipe, and the data set is rebuilt.
RECIPE_VERSION = 1
_SEED = 20240501
CROP_SIZE = 160
TRAIN_COLUMNS = (0, 256)
TEST_COLUMNS = (256, 512)
NUM_TRAIN, NUM_GOOD, NUM_DEFECTIVE = 40, 20, 8
_GAIN = (0.94, 1.06)
_NUM_FILES = len(DEMO_CATEGORIES) * (NUM_TRAIN + NUM_GOOD + 2 * NUM_DEFECTIVE * len(DEFECTS))


def build_demo(root: Path) -> Path:
    """Builds the demo data set in the layout of MVTec AD, unless it is there.

    Each category has 40 training images, 20 normal test images and 8 of each of 5 kinds of
    defect, 160 x 160 grey PNGs. The pixels depend on nothing but the recipe. The folder appears
    complete or not at all, also when several processes build it at once.

    Args:
        root: The cache folder to build in; made if missing.

    Returns:
        The data set's root, a folder in `root`.

    Raises:
        DataError: The folder cannot be written, or a data set built earlier lost files.
    """
    folder = root / f"demo-v{RECIPE_VERSION}"
    if not folder.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            _build(folder)
        except OSError as error:
            raise DataError(
                f"cannot build the demo data set in {root}: {error}; "
                "set NOCO_CACHE to a folder that can be written"
            ) from error
    num_files = sum(1 for _ in folder.glob("*/*/*/*.png"))
    if num_files != _NUM_FILES:
        raise DataError(
            f"the demo data set in {folder} has {num_files} of its {_NUM_FILES} files: "
            "delete the folder, and it is built again"
        )
    return folder


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workspace:
        # A folder made in the private one gets the permissions the user's umask asks for.
        unfinished = Path(workspace) / folder.name
        for index, category in enumerate(DEMO_CATEGORIES):
            rng = np.random.default_rng([_SEED, index])
            _build_category(unfinished / category, category, rng)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was first; its folder has the same files.
            if not folder.is_dir():
                raise


def _build_category(folder: Path, category: str, rng: np.random.Generator) -> None:
    # Only here: scikit-image and SciPy take half a second to import.
    from skimage import data

    from datasets.sets.demo.defects import draw_defect

    textures = {name: getattr(data, name)() for name in DEMO_CATEGORIES}  # (512, 512) each
    texture = textures[category]
    others = [textures[other] for other in DEMO_CATEGORIES if other != category]
    turns = category != "brick"
    for index in range(NUM_TRAIN):
        crop = cut_crop(texture, TRAIN_COLUMNS, rng, turns=turns)
        _save(crop, folder / f"train/good/{index:03d}.png")
    for index in range(NUM_GOOD):
        crop = cut_crop(texture, TEST_COLUMNS, rng, turns=turns)
        _save(crop, folder / f"test/good/{index:03d}.png")
    for kind in DEFECTS:
        for index in range(NUM_DEFECTIVE):
            crop = cut_crop(texture, TEST_COLUMNS, rng, turns=turns)
            foreign = cut_crop(others[index % len(others)], TEST_COLUMNS, rng, turns=turns)
            defective, mask = draw_defect(kind, crop, foreign, rng)
            _save(defective, folder / f"test/{kind}/{index:03d}.png")
            _save(mask, folder / f"ground_truth/{kind}/{index:03d}_mask.png")


def cut_crop(
    texture: np.ndarray, columns: tuple[int, int], rng: np.random.Generator, *, turns: bool
) -> np.ndarray:
    """Cuts a random square from some columns of a texture, flips it and varies its brightness.

    Args:
        texture: (H, W) uint8.
        columns: First column and the one after the last.
        rng: Draws place, flips, turns and brightness.
        turns: Whether quarter turns are allowed too.

    Returns:
        (CROP_SIZE, CROP_SIZE) uint8.
    """
    top = rng.integers(0, texture.shape[0] - CROP_SIZE + 1)
    left = rng.integers(columns[0], columns[1] - CROP_SIZE + 1)
    crop = texture[top : top + CROP_SIZE, left : left + CROP_SIZE]
    crop = crop[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    if turns:
        crop = np.rot90(crop, int(rng.integers(4)))
    brightened = crop.astype(float) * rng.uniform(*_GAIN)
    return np.clip(np.rint(brightened), 0, 255).astype(np.uint8)  # (CROP_SIZE, CROP_SIZE)


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels
    Image.fromarray(values).save(path)


DATA_SET = StructuredSet(
    read=read_category,
    categories=DEMO_CATEGORIES,
    prepare=build_demo,
    # It has to run where nothing can be downloaded.
    experiment={"backbone": "tf_efficientnet_lite0", "layers": (1, 2, 3), **WHOLE_224},
)
