"""Features of images, stored or not, as `--cache` says."""

from pathlib import Path

from datasets.samples import ImageLoader
from models.detector import Extractor
from utils.features.bank import STORES, FeatureBank
from utils.features.features import Features
from utils.features.streamed import StreamedFeatures

CACHES = (*STORES, "none")


def extract_features(
    extractor: Extractor,
    loader: ImageLoader,
    *,
    cache: str,
    description: str,
    folder: Path | None = None,
) -> Features:
    """Return the features of a loader's images.

    Args:
        extractor: the backbone.
        loader: batches of images.
        cache: where they are stored, as `FeatureBank.extract` has it; with "none" nowhere, and each
            reading runs the backbone again.
        description: what messages and the progress bar call the images.
        folder: of the store on disk; None for none.

    Raises:
        UsageError: not one image could be read, or the disk is full.
        FloatingPointError: a feature is beyond the range of half precision; with "none" that is
            found when the features are read.
    """
    if cache == "none":
        return StreamedFeatures.of(extractor, loader, description=description)
    return FeatureBank.extract(
        extractor, loader, store=cache, description=description, folder=folder
    )
