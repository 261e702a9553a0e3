import pytest
import torch

from models.backbone.extractor import FrozenExtractor
from models.backbone.raw_images import RawImages
from models.building import build_detector, build_extractor, shape_of
from models.detector import FeatureShape
from models.method import find_method
from tests.models.banks import Stages
from tests.models.test_deferred import TINY

BACKBONE, LAYERS = "test_resnet", (2, 4)


def extractor_of(name, **options):
    return build_extractor(find_method(name), BACKBONE, LAYERS, weights="random", **options)


def test_a_method_on_features_gets_a_frozen_backbone_as_asked_for():
    options = {"patch_size": 5, "pool": "mean", "precision": "bf16", "compile_backbone": True}
    extractor = extractor_of("knn", **options)
    assert isinstance(extractor, FrozenExtractor)
    assert (extractor.backbone, extractor.layers) == (BACKBONE, LAYERS)
    assert (extractor.patch_size, extractor.pooled) == (5, True)
    assert (extractor.precision, extractor.compiled) == ("bf16", True)
    assert shape_of(extractor) == FeatureShape(extractor.stage_channels, extractor)
    with_expansion = build_extractor(
        find_method("knn"),
        "tf_efficientnet_lite0",
        (2,),
        weights="random",
        feature_location="expansion",
    )
    assert with_expansion.feature_location == "expansion"


def test_a_method_on_images_gets_them_and_the_backbone():
    extractor = extractor_of("panda")
    assert isinstance(extractor, RawImages)
    assert isinstance(extractor.network, FrozenExtractor)
    assert extractor.features is None
    assert shape_of(extractor) == FeatureShape((), extractor.network)
    assert shape_of(extractor).channels == 0


def test_a_method_with_a_network_of_its_own_gets_images_alone():
    extractor = build_extractor(find_method("deep_svdd"), "lenet", (0,))
    assert isinstance(extractor, RawImages)
    assert extractor.network is extractor.features is None
    assert shape_of(extractor) == FeatureShape(())


def test_a_method_on_both_gets_both_of_one_backbone(write_methods):
    write_methods(
        both=TINY.replace("options=", 'takes=frozenset({"features", "images"}), options=')
    )
    extractor = extractor_of("both", pool="mean")
    assert isinstance(extractor, RawImages)
    assert extractor.network is extractor.features
    channels = extractor.network.stage_channels
    assert extractor.stage_channels == (*channels, 3)
    assert shape_of(extractor) == FeatureShape(channels, extractor.network)
    detector = build_detector("both", extractor, find_method("both").options)
    assert type(detector).__name__ == "Tiny"


@pytest.mark.parametrize("feature_norm", ["none", "l2"])
def test_a_detector_of_a_new_file_stands_behind_the_norm_that_is_asked_for(
    write_methods, feature_norm
):
    write_methods(tiny=TINY)
    options = type(find_method("tiny").options)(feature_norm=feature_norm, power=1.0)
    detector = build_detector("tiny", Stages(2, 3), options)
    features = torch.rand(4, 5, 2, 2)
    length = features.norm(dim=1) if feature_norm == "l2" else 1
    torch.testing.assert_close(detector(features), features.sum(dim=1) / length)
