"""From a method's name to what gives it its features, and to its detector."""

from configs.options import FeatureOptions, MethodOptions
from models.backbone.extractor import FrozenExtractor, Pool
from models.backbone.raw_images import RawImages
from models.detector import Detector, Extractor, FeatureShape
from models.features.feature_norm import normalised
from models.method import Method, find_method

WITHOUT_BACKBONE = "lenet"
"""The backbone's name where a method brings a network of its own."""


def build_extractor(
    method: Method,
    backbone: str,
    layers: tuple[int, ...],
    *,
    weights: str = "auto",
    patch_size: int = 3,
    feature_location: str = "bottleneck",
    pool: Pool | None = None,
    precision: str = "fp32",
    compile_backbone: bool = False,
    image_size: int | None = None,
) -> Extractor:
    """Build what turns images into what a method takes.

    Args:
        method: says what it takes.
        backbone: a timm model name, or `WITHOUT_BACKBONE`.
        layers: stages; this and what follows is as `FrozenExtractor` has it.
        weights: of the backbone.
        patch_size: side of the averaged neighbourhood.
        feature_location: "bottleneck" or "expansion".
        pool: "mean" or "class_token" for semantic tasks, None for maps.
        precision: autocast of the backbone.
        compile_backbone: run it through torch.compile.
        image_size: side in pixels of the images to come, which the backbone must take.

    Raises:
        ModelError: see `FrozenExtractor`; or the backbone takes no images of that size.
    """
    if backbone == WITHOUT_BACKBONE:
        return RawImages(None)
    frozen = FrozenExtractor(
        backbone,
        layers,
        weights=weights,
        patch_size=patch_size,
        feature_location=feature_location,
        pool=pool,
        precision=precision,
        compile_backbone=compile_backbone,
    )
    if image_size is not None:
        frozen.require_size(image_size)
    if "images" not in method.takes:
        return frozen
    return RawImages(frozen, frozen if "features" in method.takes else None)


def build_detector(method: str, extractor: Extractor, options: MethodOptions) -> Detector:
    """Build an unfitted detector, on the CPU, for what an extractor gives.

    Args:
        method: its name, with the model after a library's.
        extractor: of `build_extractor`.
        options: of the method.

    Raises:
        ModelError: an option has no meaning here.
    """
    shape = shape_of(extractor)
    kind = find_method(method).detector_class()
    detector = kind(shape, options)
    if not isinstance(options, FeatureOptions):
        return detector
    return normalised(detector, options.feature_norm, shape.stage_channels)


def compile_networks(detector: Detector) -> None:
    """Run a detector's networks through torch.compile from now on; its state stays as it is."""
    for network in detector.children():
        network.compile()


def shape_of(extractor: Extractor) -> FeatureShape:
    """Return what detectors are built for on an extractor."""
    if isinstance(extractor, RawImages):
        of_features = () if extractor.features is None else extractor.features.stage_channels
        return FeatureShape(of_features, extractor.network)
    backbone = extractor if isinstance(extractor, FrozenExtractor) else None
    return FeatureShape(extractor.stage_channels, backbone)
