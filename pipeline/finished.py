"""A run folder ready to score: what predict.py, evaluate.py and export.py start from."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs import semantic, structured
from configs.experiment import from_json, with_options
from configs.semantic import SemanticExperiment
from configs.structured import StructuredExperiment
from datasets.reading.transforms import PairTransform
from models import Extractor
from models import build_detector
from models import build_extractor
from models.detector import Detector
from utils.device import pick_device
from utils.evaluation.test_set import TestSet
from utils.evaluation.scoring import Scores
from utils.features.bank import FeatureBank
from utils.features.features import rounded_maps
from utils.runs.finished import chosen_options, finished_pairs
from utils.runs.run import Run
from utils.errors import RunError


@dataclass(frozen=True)
class FinishedRun:
    """A run folder, checked, with the backbone its heads stand on."""

    run: Run
    experiment: StructuredExperiment | SemanticExperiment
    extractor: Extractor
    device: torch.device

    @property
    def transform(self) -> PairTransform:
        """The transform of the training images."""
        experiment = self.experiment
        return PairTransform(experiment.image_size, experiment.crop_size, experiment.resize)

    @property
    def map_size(self) -> int | None:
        """Side of the anomaly maps in pixels; None where there are none (semantic runs)."""
        is_structured = isinstance(self.experiment, StructuredExperiment)
        return self.experiment.map_size if is_structured else None

    @property
    def blur_sigma(self) -> float:
        """Blur of the anomaly maps, in pixels; ignored by detectors whose maps are final."""
        return getattr(self.experiment, "blur_sigma", 0.0)

    def detector(self, category: str, seed: int, suffix: str = "") -> Detector:
        """Return a saved head on the device, in eval mode.

        It is built with the options of its pair, those that `--select synthetic` chose among them.

        Args:
            category: a finished category.
            seed: a finished seed.
            suffix: "", or "-last" or "-pixel" of a run with `--select best_test`.

        Raises:
            RunError: there is no such head, or it is not one of this run.
            ModelError: the method cannot be built.
        """
        path = self.run.head_path(category, seed, suffix)
        state, metadata = self.run.load_head(category, seed, suffix)
        # Heads of earlier versions do not say which weights they stand on.
        digest = metadata.get("backbone_digest", self.extractor.weights_digest)
        if digest != self.extractor.weights_digest:
            raise RunError(
                f"{path}: was fitted on features of other backbone weights ({digest}, now "
                f"{self.extractor.weights_digest}); give the same ones (--weights FILE)"
            )
        chosen = chosen_options(self.run, category, seed, suffix, metadata)
        try:
            method = with_options(self.experiment.method, chosen)
        except ValueError as error:
            raise RunError(f"{path}: {error}; train the pair again") from error
        head = build_detector(self.experiment.method_name, self.extractor, asdict(method))
        try:
            head.load_state_dict(state)
        # What a head makes of tensors of other shapes is its own affair.
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{path}: does not fit this run ({reason}); train it again") from error
        return head.to(self.device).eval()

    @torch.inference_mode()
    def score(self, detector: Detector, images: Tensor) -> Scores:
        """Score uint8 images (B, 3, S, S) as in training: from features rounded as banks hold them.

        Raises:
            FloatingPointError: a feature or a score is not finite.
        """
        stages = rounded_maps(self.extractor, images, torch.float16, "images")
        count = range(len(images))
        bank = FeatureBank(
            [stage.contiguous() for stage in stages],
            count,
            assemble=self.extractor.assemble,
            device=self.device,
        )
        test = TestSet(
            bank,
            torch.zeros(len(images)),
            names=[str(i) for i in count],
            kinds=["" for _ in count],
            map_size=self.map_size,
            blur_sigma=self.blur_sigma,
            batch_size=len(images),
        )
        return test.score(detector)


def load_run(folder: Path, *, device: str = "auto", weights: str | None = None) -> FinishedRun:
    """Read a run folder, which is data and never executed, and build its backbone.

    Args:
        folder: of the run.
        device: "auto", "cpu", "cuda", "cuda:1".
        weights: of the backbone, as `--weights` of the training scripts; None for the run's own.

    Raises:
        RunError: no run, no finished (category, seed), config.json is not one of this version, or
            the backbone's weights were random.
        ModelError: the backbone cannot be had.
        UsageError: the device cannot be had.
    """
    run = Run.read(folder)
    is_semantic = "protocol" in run.config
    kind, presets = (
        (SemanticExperiment, semantic.DATASETS)
        if is_semantic
        else (StructuredExperiment, structured.DATASETS)
    )
    try:
        experiment = from_json(kind, run.config)
        if experiment.dataset not in presets:
            raise ValueError(f"unknown data set {experiment.dataset!r}")
    except ValueError as error:
        raise RunError(f"{folder / 'config.json'}: {error}") from error
    assert isinstance(experiment, StructuredExperiment | SemanticExperiment)
    finished_pairs(run)  # a run without any is refused here
    place = pick_device(device)
    extractor = build_extractor(
        experiment.method_name,
        experiment.backbone,
        experiment.layers,
        weights=weights or experiment.weights,
        patch_size=getattr(experiment, "patch_size", 3),
        feature_location=experiment.feature_location,
        pooled=is_semantic,
        precision=experiment.precision,
        compile_backbone=experiment.compile,
    ).to(place)
    if extractor.random_weights:
        raise RunError(
            f"{folder}: its backbone had random weights (--weights random), which no run folder "
            "keeps: nothing can be scored with it again"
        )
    return FinishedRun(run, experiment, extractor, place)
