"""Draws small data sets in their true layouts, with defects anyone can see."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A smooth grey-brown texture: (H, W) from `size` = (width, height) to (H, W, 3) uint8."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = 20 * np.sin(x / 3 + rng.uniform(0, 6)) + 10 * np.cos(y / 5 + rng.uniform(0, 6))
    grey = 120 + waves + rng.normal(0, 4, (height, width))
    return np.clip(grey[:, :, None] * [1.0, 0.95, 0.9], 0, 255).astype(np.uint8)


def add_defect(
    image: np.ndarray, defect: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a bright diagonal ("scratch") or a dark square (any other name).

    Returns:
        The image, (H, W, 3) uint8, and the mask of the changed pixels, (H, W) bool.
    """
    height, width = image.shape[:2]
    side = max(min(height, width) // 4, 2)
    # Near the centre, where no centre crop cuts it away.
    top = int(rng.integers(height // 3, height // 3 + side + 1))
    left = int(rng.integers(width // 3, width // 3 + side + 1))
    y, x = np.mgrid[:height, :width]
    mask = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    if defect == "scratch":
        mask &= np.abs((y - top) - (x - left)) <= 1
    defective = image.copy()
    defective[mask] = 250 if defect == "scratch" else 5
    return defective, mask


def save(path: Path, array: np.ndarray) -> Path:
    """Writes uint8 or bool pixels in the format of the suffix, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = array.astype(np.uint8) * 255 if array.dtype == bool else array
    Image.fromarray(values).save(path)
    return path


def draw_mvtec_category(
    root: Path,
    name: str,
    *,
    num_train: int = 4,
    num_good: int = 2,
    defects: Sequence[str] = ("hole", "scratch"),
    num_defective: int = 2,
    size: tuple[int, int] = (64, 64),
    suffix: str = ".png",
    masks: bool = True,
    seed: int = 0,
) -> Path:
    """Draws `root/name` in the layout of MVTec AD and returns it; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    category = root / name
    for index in range(num_train):
        save(category / f"train/good/{index:03d}{suffix}", texture(rng, size))
    for index in range(num_good):
        save(category / f"test/good/{index:03d}{suffix}", texture(rng, size))
    for defect in defects:
        for index in range(num_defective):
            image, mask = add_defect(texture(rng, size), defect, rng)
            save(category / f"test/{defect}/{index:03d}{suffix}", image)
            if masks:
                save(category / f"ground_truth/{defect}/{index:03d}_mask.png", mask)
    return category


def draw_visa_category(
    root: Path,
    name: str,
    *,
    num_normal: int = 6,
    num_anomalous: int = 2,
    size: tuple[int, int] = (80, 64),
    masks: bool = True,
    seed: int = 0,
) -> Path:
    """Draws `root/name` in the layout of VisA (masks count defects from 1) and returns it."""
    rng = np.random.default_rng(seed)
    data = root / name / "Data"
    for index in range(num_normal):
        save(data / f"Images/Normal/{index:04d}.JPG", texture(rng, size))
    for index in range(num_anomalous):
        image, mask = add_defect(texture(rng, size), "hole", rng)
        save(data / f"Images/Anomaly/{index:03d}.JPG", image)
        if masks:
            save(data / f"Masks/Anomaly/{index:03d}.png", mask.astype(np.uint8))
    return root / name


def write_visa_csv(root: Path, names: Sequence[str], *, num_test: int = 2) -> Path:
    """Writes `split_csv/1cls.csv` in VisA's columns: the first `num_test` normals are for test.

    The official file is no run of names either, so a reader that ignores it is found out.
    """
    path = root / "split_csv/1cls.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["object", "split", "label", "image", "mask"])
        for name in names:
            images = root / name / "Data/Images"
            for index, normal in enumerate(sorted(images.glob("Normal/*"))):
                split = "test" if index < num_test else "train"
                writer.writerow([name, split, "normal", normal.relative_to(root).as_posix(), ""])
            for anomaly in sorted(images.glob("Anomaly/*")):
                mask = root / name / "Data/Masks/Anomaly" / f"{anomaly.stem}.png"
                paths = [path.relative_to(root).as_posix() for path in (anomaly, mask)]
                writer.writerow([name, "test", "anomaly", *paths])
    return path


def draw_loco_category(
    root: Path,
    name: str = "juice_bottle",
    *,
    num_train: int = 6,
    num_normal: int = 3,
    size: tuple[int, int] = (48, 64),
    seed: int = 0,
) -> Path:
    """Draws `root/name` in the layout of MVTec LOCO and returns it; `size` is (width, height).

    Each anomalous image has a dark square and a bright scratch, a file each; the second logical
    image a third that lies over the square, as alternatives of one place do. The square has to be
    found by 30 pixels, the scratch by half of it.
    """
    rng = np.random.default_rng(seed)
    category = root / name
    counts = {"train": num_train, "validation": num_normal, "test": num_normal}
    for split, count in counts.items():
        for index in range(count):
            save(category / f"{split}/good/{index:03d}.png", texture(rng, size))
    for kind in ("logical_anomalies", "structural_anomalies"):
        for index in range(2):
            image, square = add_defect(texture(rng, size), "hole", rng)
            image, scratch = add_defect(image, "scratch", rng)
            save(category / f"test/{kind}/{index:03d}.png", image)
            masks = [square * 255, scratch * 254]
            if kind == "logical_anomalies" and index == 1:
                masks.append(np.roll(square, 1, axis=1) * 255)
            for number, mask in enumerate(masks):
                folder = category / f"ground_truth/{kind}/{index:03d}"
                save(folder / f"{number:03d}.png", mask.astype(np.uint8))
    entries = [
        {"defect_name": "square", "pixel_value": 255, "saturation_threshold": 30,
         "relative_saturation": False},
        {"defect_name": "scratch", "pixel_value": 254, "saturation_threshold": 0.5,
         "relative_saturation": True},
    ]  # fmt: skip
    (category / "defects_config.json").write_text(json.dumps(entries))
    return category


def draw_btad_category(
    root: Path, name: str = "01", *, suffix: str = ".bmp", seed: int = 0
) -> Path:
    """Draws `root/name` in the layout of BTAD and returns it; masks are .png, images as said."""
    rng = np.random.default_rng(seed)
    category = root / name
    for folder, count in (("train/ok", 4), ("test/ok", 2)):
        for index in range(count):
            save(category / f"{folder}/{index:04d}{suffix}", texture(rng, (40, 40)))
    for index in range(3):
        image, mask = add_defect(texture(rng, (40, 40)), "hole", rng)
        save(category / f"test/ko/{index:04d}{suffix}", image)
        save(category / f"ground_truth/ko/{index:04d}.{'bmp' if index else 'png'}", mask)
    return category
