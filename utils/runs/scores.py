"""The scores of a test set by one head, raw, as the metrics saw them: a file of arrays."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from utils.errors import RunError
from utils.runs.files import as_array, atomic_path

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TestScores:
    """What a run keeps of each test image.

    Attributes:
        paths: (N,) where each image lies, or its place in an array of images.
        labels: (N,), 1 = anomalous.
        scores: (N,), higher = more anomalous; the dtype is kept.
        defects: (N,) kind of defect, "good" for normal images; the class of semantic data.
        maps: (N, H, W); the dtype is kept.
        masks: (N, H, W) bool, of the size of the maps.
        norms: (N,), of the projection where the map is highest.
        angles: (N,), in radians, of that projection to the objective.
        reconstructions: (N, H, W, 3) uint8, what a network makes of the images.
        parts: name -> (N, H, W), maps that `maps` are the mean of.
    """

    __test__ = False  # no test class, whatever its name makes pytest think

    paths: Sequence[Path | str]
    labels: "ArrayLike | Tensor"
    scores: "ArrayLike | Tensor"
    defects: Sequence[str]
    maps: "ArrayLike | Tensor | None" = None
    masks: "ArrayLike | Tensor | None" = None
    norms: "ArrayLike | Tensor | None" = None
    angles: "ArrayLike | Tensor | None" = None
    reconstructions: "ArrayLike | Tensor | None" = None
    parts: "Mapping[str, ArrayLike | Tensor]" = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what the file holds, by name; what is None is left out."""
        optional = {
            **{"map": self.maps, "mask": self.masks, "norm": self.norms, "angle": self.angles},
            "reconstruction": self.reconstructions,
        }
        return {
            "path": np.array([str(path) for path in self.paths], dtype=np.str_),
            "label": as_array(self.labels).astype(np.int64),
            "score": as_array(self.scores),
            "defect": np.array(list(self.defects), dtype=np.str_),
            **{name: as_array(values) for name, values in optional.items() if values is not None},
            **{f"map_{name}": as_array(values) for name, values in self.parts.items()},
        }


def write_scores(path: Path, scores: TestScores) -> None:
    """Write scores atomically.

    Raises:
        ValueError: they differ in length.
    """
    arrays = scores.arrays()
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"scores for {path.name}: the lengths differ: {lengths}")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")
            # Names and masks compress well; float maps hardly do, and would take seconds.
            stored = name.startswith("map")
            member.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def read_scores(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays `path`, `label`, `score`, `defect`, and those of the others there are.

    `map`, `map_NAME` of each part, `reconstruction` of methods that make one and `mask` with
    `--save-maps`; `norm` and `angle` of methods with an objective.

    Raises:
        RunError: the file is corrupt.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # zipfile, zlib, struct and numpy each raise their own
        raise RunError(f"{path}: corrupt ({error}); run the pair again") from error
