"""What is kept of a finding, and how new images get the kinds that were found."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.anomalyncd import AnomalyNcdOptions
from configs.discovery import ContrastOptions, Masks, WholeImageOptions
from models.discovery.anomalyncd.anomalyncd import AnomalyNcd
from pipeline.discovery.collecting import Collected
from pipeline.discovery.cutting import Scale
from pipeline.discovery.finding import NORMAL, Found, anomalyncd_kinds, numbered
from pipeline.discovery.looking import Looked
from utils.device import pick_device
from utils.discovery.contrast import Standard
from utils.discovery.files import FACTS, TENSORS
from utils.discovery.kinds import nearest
from utils.discovery.levels import Levels
from utils.errors import RunError, UsageError
from utils.runs.files import atomic_path, corrupt, file_digest, read_object, write_text

METHODS = {
    "contrast": ContrastOptions,
    "anomalyncd": AnomalyNcdOptions,
    "whole_image": WholeImageOptions,
}


@dataclass(frozen=True)
class Kept:
    """A finding, as far as new images need it.

    Attributes:
        method: options of the method.
        masks: how maps became masks.
        most_regions: of an image.
        standard: of features.
        levels: of normal images; None where masks need none.
        scale: of maps; likewise.
        state: of the method; see `Found`.
        num_kinds: that were found.
        made_by: see `made_by`.
    """

    method: ContrastOptions | AnomalyNcdOptions | WholeImageOptions
    masks: Masks
    most_regions: int
    standard: Standard
    levels: Levels | None
    scale: Scale | None
    state: dict[str, Tensor]
    num_kinds: int
    made_by: dict[str, str]


def keep(folder: Path, kept: Kept) -> None:
    """Write a finding's state: tensors, and facts as JSON; neither is ever executed."""
    tensors = {f"state.{name}": value for name, value in kept.state.items()}
    for name, values in (("mean", kept.standard.means), ("std", kept.standard.deviations)):
        tensors |= {f"{name}.{i}": value for i, value in enumerate(values)}
    with atomic_path(folder / TENSORS) as temporary:
        save_file(
            {name: one.detach().cpu().contiguous() for name, one in tensors.items()}, temporary
        )
    facts = {
        "method": next(name for name, kind in METHODS.items() if isinstance(kept.method, kind)),
        "options": asdict(kept.method),
        "masks": kept.masks,
        "most_regions": kept.most_regions,
        "levels": None if kept.levels is None else asdict(kept.levels),
        "scale": None if kept.scale is None else asdict(kept.scale),
        "kinds": kept.num_kinds,
        **kept.made_by,
    }
    write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")


def made_by(looked: Looked) -> dict[str, str]:
    """Return digests of the backbone's weights and of the head, where there is one."""
    head = "" if looked.head is None else file_digest(looked.head)
    return {"backbone": looked.extractor.weights_digest, "head": head}


def read_kept(looked: Looked, folder: Path) -> Kept:
    """Read the state of a finding.

    Args:
        looked: the new images.
        folder: that discover.py wrote.

    Raises:
        RunError: nothing was found yet, or the files are damaged.
        UsageError: the masks were the data set's own, which new images lack.
    """
    if not (folder / FACTS).is_file():
        raise RunError(f"{folder}: no kinds were found; run discover.py without --assign first")
    facts = read_object(folder / FACTS)
    try:
        tensors = load_file(folder / TENSORS)
        method = METHODS[facts["method"]](**facts["options"])
        if facts["masks"] == "true":
            raise UsageError(
                f"{folder}: its kinds were found in the data set's own masks, which new images "
                "lack; run discover.py with other --masks first"
            )
        kept = Kept(
            method,
            facts["masks"],
            int(facts["most_regions"]),
            Standard(_listed(tensors, "mean"), _listed(tensors, "std")),
            None if facts["levels"] is None else Levels(**facts["levels"]),
            None if facts["scale"] is None else Scale(**facts["scale"]),
            {
                name.removeprefix("state."): value
                for name, value in tensors.items()
                if name.startswith("state.")
            },
            int(facts["kinds"]),
            {name: str(facts[name]) for name in ("backbone", "head")},
        )
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise corrupt(folder / FACTS, str(error)) from error
    for what, digest in made_by(looked).items():
        if kept.made_by[what] != digest:
            raise RunError(
                f"{folder}: its kinds were found with another {what} than the run has now; find "
                "them again, without --assign"
            )
    return kept


def assign(kept: Kept, collected: Collected, device: str) -> Found:
    """Give new images the kinds that were found before, a network on a device by its name."""
    owners = [region.image for region in collected.regions]
    if isinstance(kept.method, AnomalyNcdOptions):
        network = _network(kept, kept.method).to(pick_device(device))
        pieces = [region.piece for region in collected.regions]
        kinds, confidences, own, tokens = anomalyncd_kinds(network, pieces, owners)
        region_confidences, region_kinds = (one.numpy() for one in own.max(dim=1))
        return _found(kept, kinds, confidences, region_kinds, region_confidences, tokens)
    centres = kept.state["centres"].numpy()
    if isinstance(kept.method, ContrastOptions):
        inside = np.array(collected.has_mask)
        kinds, confidences = nearest(np.stack(collected.image_vectors), centres)
        kinds, confidences = np.where(inside, kinds, NORMAL), np.where(inside, confidences, np.nan)
        vectors = np.array(collected.region_vectors).reshape(len(owners), centres.shape[1])
        region_kinds, region_confidences = nearest(vectors, centres)
    else:
        kinds, confidences = nearest(np.stack(collected.whole_vectors), centres)
        region_kinds, region_confidences = kinds[owners], confidences[owners]
        vectors = np.stack(collected.whole_vectors)[owners]
    return _found(kept, kinds, confidences, region_kinds, region_confidences, vectors)


def _found(
    kept: Kept,
    kinds: np.ndarray,
    confidences: np.ndarray,
    region_kinds: np.ndarray,
    region_confidences: np.ndarray,
    points: np.ndarray,
) -> Found:
    numbers = kept.state["numbers"].numpy()
    return Found(
        numbered(kinds, numbers),
        confidences,
        numbered(region_kinds, numbers),
        region_confidences,
        points,
        kept.num_kinds,
        False,
        {},
    )


def _network(kept: Kept, method: AnomalyNcdOptions) -> AnomalyNcd:
    """Build the network that was trained.

    Raises:
        RunError: its backbone has other weights now.
    """
    labelled = int(kept.state["labelled_kinds"])
    network = AnomalyNcd(method, labelled_kinds=labelled, new_kinds=kept.num_kinds)
    digest = bytes(kept.state["vit_digest"].tolist()).decode()
    if network.vit.weights_digest != digest:
        raise RunError(
            f"the kinds were found with other weights of {method.backbone} ({digest}, now "
            f"{network.vit.weights_digest}); find them again"
        )
    network.load_state_dict(
        {
            name.removeprefix("network."): value
            for name, value in kept.state.items()
            if name.startswith("network.")
        }
    )
    return network


def _listed(tensors: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    count = sum(key.startswith(f"{name}.") for key in tensors)
    return tuple(torch.as_tensor(tensors[f"{name}.{i}"]) for i in range(count))
