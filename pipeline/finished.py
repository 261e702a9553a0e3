"""A run folder ready to score: what predict.py, evaluate.py and export.py start from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from configs.presets import with_options
from datasets.reading.transforms import PairTransform
from models.building import build_detector
from models.detector import Detector, Extractor
from pipeline.experiments import AnyExperiment, experiment_of
from pipeline.features import extractor_of, scoring_of, transform_of
from utils.errors import RunError
from utils.evaluation.scoring import Scores, Scoring, check_finite, score_batch
from utils.features.features import rounded_maps, widened
from utils.runs.finished import chosen_options, finished_pairs
from utils.runs.run import Run


@dataclass(frozen=True)
class FinishedRun:
    """A run folder, checked, with the backbone its heads stand on."""

    run: Run
    experiment: AnyExperiment
    extractor: Extractor

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.extractor.device

    @property
    def transform(self) -> PairTransform:
        """The transform of the training images."""
        return transform_of(self.experiment)

    @property
    def scoring(self) -> Scoring:
        """How anomaly maps become scores; its map size is None where there are none."""
        return scoring_of(self.experiment, self.extractor)

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
        head = self._built(category, seed, suffix, metadata)
        try:
            head.load_state_dict(state)
        # What a head makes of tensors of other shapes is its own affair.
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{path}: does not fit this run ({reason}); train it again") from error
        return head.to(self.device).eval()

    def unfitted(self, category: str, seed: int) -> Detector:
        """Return the detector of a pair on the device, as it was before its fit.

        Raises:
            RunError: there is no such head, or it is not one of this run.
            ModelError: the method cannot be built.
        """
        _, metadata = self.run.load_head(category, seed, "")
        return self._built(category, seed, "", metadata).to(self.device)

    def _built(
        self, category: str, seed: int, suffix: str, metadata: Mapping[str, str]
    ) -> Detector:
        """Build a pair's detector with the options that were chosen for it."""
        chosen = chosen_options(self.run, category, seed, suffix, metadata)
        try:
            method = with_options(self.experiment.method, chosen)
        except ValueError as error:
            path = self.run.head_path(category, seed, suffix)
            raise RunError(f"{path}: {error}; train the pair again") from error
        return build_detector(self.experiment.method_name, self.extractor, method)

    @torch.inference_mode()
    def score(self, detector: Detector, images: Tensor, boxes: Tensor | None = None) -> Scores:
        """Score uint8 images (B, 3, S, S) as in training: from features rounded as banks hold them.

        Images that the run cuts into T windows come as `in_windows` cuts them: (B, 3, T * S, S).
        `boxes` (B, 4) are those of `pipeline.features.boxes_of`.

        Raises:
            FloatingPointError: a feature or a score is not finite.
        """
        at_once = self.experiment.extract_batch_size
        stored = rounded_maps(self.extractor, images, torch.float16, "images", at_once=at_once)
        stages = widened([rearrange(m.contiguous(), "b h w c -> b c h w") for m in stored])
        scores = score_batch(detector, stages, self.scoring, boxes=boxes)
        check_finite(scores)
        return scores


def load_run(
    folder: Path, *, device: str = "auto", weights: str | None = None, **changes: Any
) -> FinishedRun:
    """Read a run folder, which is data and never executed, and build its backbone.

    Args:
        folder: of the run.
        device: "auto", "cpu", "cuda", "cuda:1".
        weights: of the backbone, as `--weights` of the training scripts; None for the run's own.
        changes: fields of the experiment that do not change what is measured, such as `data_root`.

    Raises:
        RunError: no run, no finished (category, seed), config.json is not one of this version, or
            the backbone's weights were random.
        ModelError: the backbone cannot be had.
        UsageError: the device cannot be had.
    """
    run = Run.read(folder)
    try:
        experiment = experiment_of(run.config)
    except ValueError as error:
        raise RunError(f"{folder / 'config.json'}: {error}") from error
    finished_pairs(run)  # a run without any is refused here
    changes.setdefault("data_root", run.located(experiment.data_root))
    experiment = replace(experiment, device=device, **changes)
    extractor = extractor_of(experiment, weights=weights)
    if extractor.random_weights:
        raise RunError(
            f"{folder}: its backbone had random weights (--weights random), which no run folder "
            "keeps: nothing can be scored with it again"
        )
    return FinishedRun(run, experiment, extractor)
