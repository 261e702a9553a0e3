"""Pieces of images that show coloured shapes, with their masks, as files."""

import numpy as np
from PIL import Image

from models.discovery.pieces import Piece

COLOURS = {"disc": (220, 30, 30), "bar": (30, 30, 220), "ring": (30, 220, 30), "good": (0, 0, 0)}


def draw_shape(shape, size, rng):
    """An image (size, size, 3) of noise with a shape on it, and where the shape is."""
    image = rng.integers(90, 140, (size, size, 3)).astype(np.uint8)
    down, across = size // 2 + rng.integers(-size // 16, size // 16 + 1, 2)
    y, x = np.ogrid[-down : size - down, -across : size - across]
    radius, distance = size // 3, np.hypot(y, x)
    inside = {
        "disc": distance < radius,
        "bar": (abs(y) < radius // 2) & (abs(x) < size),
        "ring": (distance < 1.3 * radius) & (distance > radius / 2),
        "good": np.zeros((size, size), dtype=bool),
    }[shape]
    image[inside] = COLOURS[shape]
    return image, inside


def write_pieces(folder, shape, count, *, size=40, seed=0):
    rng = np.random.default_rng(seed)
    pieces = []
    for i in range(count):
        image, inside = draw_shape(shape, size, rng)
        files = folder / f"{shape}{i}.png", folder / f"{shape}{i}_mask.png"
        Image.fromarray(image).save(files[0])
        Image.fromarray(inside).save(files[1])  # of 1 bit
        score = 0.1 if shape == "good" else 0.9
        pieces.append(Piece(*files, score, int(inside.sum())))
    return pieces
