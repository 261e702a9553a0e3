"""SAA and SAA+: a detector that reads texts and a segmenter of anything, with no training image.

Source: "Segment Any Anomaly without Training via Hybrid Prompt Regularization" (Cao et al., 2023,
arXiv 2305.10724) and its released code. Grounding DINO looks for "defect on OBJECT" and the like,
rules on boxes drop what is too large or is the object itself, SAM cuts out one mask for each box,
masks on salient parts count more, and the map is made of the best few.

| paper | here | meaning |
| --- | --- | --- |
| P^L | GENERAL, prompts | texts about defects: for any object, and hand-written ones |
| P^P, theta_area | num_objects, area_ratio | how many objects, and how large a defect may be |
| P^S | saliency_weight | rescoring by exp(weight * mean saliency inside the mask) |
| P^C, K | regions | masks that the map is made of |

The released code is followed where it differs from the paper: areas are those of boxes (paper:
regions); how much of a box lies on the object does not matter (paper: a bound on their IoU); a
pixel under n masks has their scores over n + 1 (paper: n); with one object saliency compares all of
the image and not the object. The number of objects, theta_area and K, which it reads off a sentence
for each category, are options here. That sentence and the hand-written prompts were made by people
who knew the defects: none is a default but K = 5, which all of MVTec AD has, and the textures'
theta_area of 0.9.

Ours: the category's name has spaces and small letters, so that a name of several words can be
found in what a box is taken for; images are squares; every resize of an image is antialiased;
saliency is 0 where there is no other object to compare with (code: an error). The code has no plain
SAA: `--method.rules saa` takes every box of one text, with no rule but its threshold.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from configs.options import (
    Fraction,
    MethodOptions,
    NotNegative,
    OnlyWith,
    OptionalInt,
    OptionalPath,
    Positive,
    PositiveInt,
)
from models.detector import Detector, FeatureShape, FeatureSource, Monitor
from models.errors import ModelError
from models.method import Method
from models.methods.saa.networks import load_networks
from models.methods.saa.regions import BoxRules, best, box_areas, region_map, rescored
from models.methods.saa.saliency import (
    cell_features,
    resized_to_cells,
    resized_to_pixels,
    unlike_other_objects,
    unlike_the_image,
)

ANYTHING = "anomaly"
"""The text of SAA, which names no object (ours)."""
GENERAL = ("defect on {}", "damage on {}", "flaw on {}")
"""The texts of SAA+ for any object (released code)."""
UNKNOWN = "object"
"""What images show that nobody has named."""
SIDES = {False: 256, True: 1024}
"""Side in pixels of the images for saliency, with one object and with several (released code)."""
COARSEST = 64
"""Pixels of one cell of the coarsest map in Grounding DINO, of which it wants several."""
AT_ONCE = 32
"""Regions whose masks are held beside the best."""


def _is_plus(rules: Any) -> bool:
    return rules == "saa_plus"


@dataclass(frozen=True, kw_only=True)
class SaaOptions(MethodOptions):
    """Segment Any Anomaly: prompts and two networks, nothing is trained."""

    grounding_dino: OptionalPath = None
    """Folder of Grounding DINO with its tokenizer, as transformers has it; must be given."""
    sam: OptionalPath = None
    """Folder of SAM, as transformers has it; must be given."""
    rules: Literal["saa_plus", "saa"] = "saa_plus"
    """SAA+, or plain SAA: one text, no rule on area or words, no saliency, all regions."""
    prompts: tuple[str, ...] = ()
    """Further texts, each one name or several with dots between: "crack. black hole"."""
    object_name: str = ""
    """What the images show, in words; without it, the category's name."""
    box_threshold: Fraction = 0.1
    """Boxes must fit a token of the text better than this (released code)."""
    text_threshold: Annotated[Fraction, OnlyWith("rules", "saa_plus", _is_plus)] = 0.1
    """A box is taken for the tokens that it fits better than this (released code)."""
    num_objects: Annotated[PositiveInt, OnlyWith("rules", "saa_plus", _is_plus)] = 1
    """Objects in an image; of several, each is compared with the others."""
    area_ratio: Annotated[Positive, OnlyWith("rules", "saa_plus", _is_plus)] = 0.9
    """Largest area of a defect's box over that of the object (released code: 0.1 to 1)."""
    regions: Annotated[PositiveInt, OnlyWith("rules", "saa_plus", _is_plus)] = 5
    """Regions of highest score that make the map (released code for MVTec AD: 5)."""
    saliency_weight: Annotated[NotNegative, OnlyWith("rules", "saa_plus", _is_plus)] = 3.0
    """A region's score is multiplied by exp(this * its mean saliency) (released code: 3)."""
    saliency_size: Annotated[OptionalInt, OnlyWith("rules", "saa_plus", _is_plus)] = None
    """Pixels of the images for saliency; none for 256, or 1024 with several objects (code)."""
    grounding_size: PositiveInt = 800
    """Pixels that images are resized to for Grounding DINO (released code: 800)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not prompt.strip(" .") for prompt in self.prompts):
            raise ValueError("--method.prompts has one without a word")
        if self.grounding_size <= COARSEST:
            raise ValueError(
                f"--method.grounding-size {self.grounding_size} must be above {COARSEST}, the "
                "pixels of one cell of Grounding DINO's coarsest map"
            )


class Saa(Detector):
    """Grounding DINO and SAM, asked about each image; they are no part of the head.

    The head is what the images show, and a digest of the networks' weights.

    Attributes:
        category: see `KnowsCategory`.
        name: (L,) uint8, UTF-8: what the images show, as it was at the fit.
        weights: (16,) uint8, of `Networks.digest`.
        remarks: that no training image is used, and what was asked about.

    Raises:
        ModelError: the package transformers is not installed, or a network cannot be read.
    """

    final_maps: bool = True
    category: str | None = None
    sized_by_fit = ("name",)

    name: Tensor
    weights: Tensor

    def __init__(self, features: FeatureShape, options: SaaOptions) -> None:
        super().__init__()
        backbone = features.backbone
        assert backbone is not None
        self.options = options
        networks = load_networks(options.grounding_dino, options.sam, options.grounding_size)
        # In a tuple, so that they are not part of this head.
        self._frozen = (backbone, networks)
        if options.rules == "saa_plus":
            _check_size(features, self._saliency_side)
        digest = torch.frombuffer(bytearray.fromhex(networks.digest), dtype=torch.uint8)
        self.register_buffer("weights", digest)
        self.register_buffer("name", torch.zeros(0, dtype=torch.uint8))

    def fit(
        self, bank: FeatureSource, *, generator: torch.Generator, monitor: Monitor | None = None
    ) -> None:
        """Note what the images show; see `Detector.fit`.

        Raises:
            ModelError: a prompt is longer than Grounding DINO reads.
        """
        del bank, generator
        said = self.options.object_name or self.category or UNKNOWN
        encoded = bytearray(" ".join(said.lower().split()), "utf-8")
        self.name = torch.frombuffer(encoded, dtype=torch.uint8).to(self.weights.device)
        for prompt in self._prompts():
            self._frozen[1].grounder.check(prompt)
        self.remarks = self._remarks()
        if monitor is not None:
            monitor(1, {})

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Return anomaly maps (B, S, S) of uint8 images (B, 3, S, S); 0 where no region is."""
        images = features.to(self.weights.device)
        return torch.stack([self._anomaly_map(image) for image in images])  # (B, S, S)

    def exported(self) -> nn.Module:
        """Refuse: see `Detector.exported`.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "saa cannot be exported: its networks are not part of the head, and how many regions "
            "they find differs from image to image; most other methods can be"
        )

    @property
    def _object_name(self) -> str:
        if not len(self.name):
            raise ModelError("saa was neither fitted nor loaded")
        return bytes(self.name.tolist()).decode()

    @property
    def _saliency_side(self) -> int:
        return self.options.saliency_size or SIDES[self.options.num_objects > 1]

    def _prompts(self) -> list[str]:
        """Return all texts about defects."""
        if self.options.rules == "saa":
            return [ANYTHING, *self.options.prompts]
        general = [prompt.format(self._object_name) for prompt in GENERAL]
        return [*general, *self.options.prompts]

    def _anomaly_map(self, image: Tensor) -> Tensor:
        """Return the map (S, S) of one image (3, S, S)."""
        options, (_, networks) = self.options, self._frozen
        side, is_plus = image.shape[-1], options.rules == "saa_plus"
        objects = self._objects(image) if is_plus else None
        boxes, scores = self._defects(image, objects)
        if not len(boxes):
            return torch.zeros(side, side, device=image.device)
        embedding = networks.segmenter.embed(image)
        saliency = None
        if objects is not None and options.saliency_weight:
            saliency = self._saliency(image, embedding, objects)  # (S, S)
        kept = scores[:0], torch.zeros(0, side, side, dtype=torch.bool, device=image.device)
        for some, found in zip(boxes.split(AT_ONCE), scores.split(AT_ONCE), strict=True):
            masks = networks.segmenter.masks(embedding, some, side)  # (R, S, S)
            if saliency is not None:
                found = rescored(found, masks, saliency, options.saliency_weight)
            joined = torch.cat([kept[0], found]), torch.cat([kept[1], masks])
            kept = best(*joined, options.regions if is_plus else None)
        return region_map(*kept)

    def _objects(self, image: Tensor) -> Tensor:
        """Return the boxes (R, 4) that are taken for the object."""
        options = self.options
        proposals = self._frozen[1].grounder.propose(image, self._object_name)
        most = 1 / options.num_objects
        return BoxRules(options.box_threshold, options.text_threshold, most).kept(proposals)[0]

    def _defects(self, image: Tensor, objects: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the boxes (R, 4) of all prompts, and their scores (R,)."""
        options = self.options
        if objects is None:
            rules = BoxRules(options.box_threshold, options.text_threshold, float("inf"))
        else:
            # Without an object, defects may be as large as the image (released code).
            largest = float(box_areas(objects).max()) if len(objects) else 1.0
            rules = BoxRules(
                options.box_threshold,
                options.text_threshold,
                options.area_ratio * largest,
                self._object_name,
            )
        grounder = self._frozen[1].grounder
        kept = [rules.kept(grounder.propose(image, prompt)) for prompt in self._prompts()]
        boxes, scores = zip(*kept, strict=True)
        return torch.cat(boxes), torch.cat(scores)

    def _saliency(self, image: Tensor, embedding: Tensor, objects: Tensor) -> Tensor:
        """Return how unlike the rest each pixel is, (S, S)."""
        backbone, networks = self._frozen
        side = image.shape[-1]
        features = cell_features(backbone, image, self._saliency_side)  # (C, h, w)
        if self.options.num_objects == 1:
            return resized_to_pixels(unlike_the_image(features), side)
        _, height, width = features.shape
        masks = [
            resized_to_cells(networks.segmenter.masks(embedding, some, side), (height, width))
            for some in objects.split(AT_ONCE)
        ]  # (R, h, w) together
        cells = unlike_other_objects(features, torch.cat(masks))
        return resized_to_pixels(cells, side)

    def _remarks(self) -> list[str]:
        remarks = ["saa is zero-shot: no training image is used, only words and trained networks."]
        if self.options.prompts:
            written = ", ".join(repr(prompt) for prompt in self.options.prompts)
            remarks.append(
                f"saa was asked about {written} too: whoever wrote that may know the defects."
            )
        is_asked = self.options.rules == "saa_plus" and not self.options.object_name
        if is_asked and self.category is None:
            remarks.append(
                f'saa was asked about an "{UNKNOWN}", for want of one name of what the images '
                "show: --method.object-name NAME gives it."
            )
        return remarks

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Refuse a head of other networks."""
        stored = state_dict.get(f"{prefix}weights")
        if stored is not None and not torch.equal(stored.cpu(), self.weights.cpu()):
            raise ModelError(
                f"{self.options.grounding_dino} and {self.options.sam} have other weights than "
                "those with which the head was made: put these there again"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _check_size(features: FeatureShape, side: int) -> None:
    """Refuse a backbone that does not take images of the size that saliency shows it."""
    assert features.backbone is not None
    try:
        features.backbone.require_size(side)
    except ModelError as error:
        raise ModelError(
            f"saliency shows the backbone images of {side} pixels: {error}",
            {"saliency_size": "or, for saliency alone,"},
        ) from error


METHOD = Method(
    detector=lambda: Saa,
    options=SaaOptions(),
    tasks=frozenset({"structured"}),
    takes=frozenset({"images"}),
    # Ours: what Grounding DINO sees. The code reads images as they are.
    experiment={
        "structured": {
            **{"image_size": 800, "crop_size": None, "layers": (1, 2, 3)},
            **{"patch_size": 1, "blur_sigma": 0.0},
        }
    },
    ignores=frozenset({"blur_sigma", "compile"}),
)
