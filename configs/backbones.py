"""What a vision transformer as backbone changes in a preset: its stages are blocks, of one grid."""

import re
import sys
from dataclasses import replace
from typing import Any, TypeVar

from configs.experiment import Experiment
from configs.options import option_name

E = TypeVar("E", bound=Experiment)
BLOCKS = {
    # Twelve blocks each: of the last two thirds, and for semantic data the last. Not measured.
    "structured": (5, 8, 11),
    "semantic": (11,),
}
NAMED = re.compile(r"vit_(small|base)_patch(?P<patch>14|16)(_reg4)?_dinov[23](\..+)?")
"""Backbones that have a preset: DINOv2 with and without registers, and DINOv3."""
TRANSFORMER = re.compile(r"(vit|deit3?|eva(02)?|beit(v2)?|cait|xcit)_")


def with_backbone(preset: E, backbone: str, *, names_layers: bool) -> E:
    """Return a preset as it is meant for a backbone.

    For a transformer of `NAMED` that is the blocks of `BLOCKS`, features as they are, and images
    of a size that its patches divide, which is said where it is another; any other backbone leaves
    the preset as it is.

    Args:
        preset: of data set and method.
        backbone: a timm name.
        names_layers: whether the stages are said beside.

    Raises:
        ValueError: another transformer, and its blocks are not said.
    """
    found = NAMED.fullmatch(backbone)
    if found is None:
        if TRANSFORMER.match(backbone) and not names_layers:
            raise ValueError(
                f"--backbone {backbone} is a transformer without a preset: name the blocks to take "
                "with --layers, counted from 0 (of twelve, say, --layers 5 8 11)"
            )
        return preset
    changes: dict[str, Any] = {"layers": BLOCKS[preset.task]}
    if hasattr(preset, "patch_size"):
        changes["patch_size"] = 1
    patch = int(found["patch"])
    name = "image_size" if preset.crop_size is None else "crop_size"
    side = getattr(preset, name)
    if side % patch:
        fitting = round(side / patch) * patch or patch
        changes |= {"image_size": max(preset.image_size, fitting), name: fitting}
        sys.stderr.write(
            f"{option_name(name)} is {fitting} and not {side} by default, which the "
            f"patches of {backbone} do not divide\n"
        )
    return replace(preset, **changes)
