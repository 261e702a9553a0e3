"""What every method must do, whatever it is; and that one may take features and images."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_origin, get_type_hints

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from configs.options import Bound, FeatureOptions, check_types, marks_of
from datasets.reading.loading import ArrayDataset, BatchLoader
from datasets.reading.transforms import PairTransform
from models.backbone.extractor import FrozenExtractor
from models.backbone.raw_images import RawImages
from models.building import build_detector, build_extractor, shape_of
from models.deployment.network import Deployed
from models.detector import Detector
from models.features.feature_norm import normalised
from models.features.multiscale import join_stages, split_images
from models.method import find_methods
from tests.models.banks import Bank, StagedBank, Stages, seeded
from utils.evaluation.scoring import Scoring, score_all
from utils.features.bank import FeatureBank

pytestmark = [
    pytest.mark.filterwarnings("ignore::models.methods.simplenet.simplenet.TrivialSolutionWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]
FOUND = find_methods("structured") | find_methods("semantic")
METHODS = {name: method for name, method in FOUND.items() if name != "anomalib:NAME"}
BACKBONE = "test_resnet"
SHORT = {"epochs": 2, "pretrain_epochs": 1, "prototypes": 3, "time": (3.0, 10.0)}
STAGES = (3, 5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A whole random model in a file, as if it were trained: panda_ewc needs its classifier."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    save_file(timm.create_model(BACKBONE, pretrained=False, num_classes=5).state_dict(), path)
    return path


def draw_images(count, seed=1):
    """Images (N, 3, 32, 32), uint8, channels last as banks give them."""
    images = torch.randint(256, (count, 3, 32, 32), generator=seeded(seed)).byte()
    return images.contiguous(memory_format=torch.channels_last)


def draw_stages(count, seed=1):
    return [
        torch.randn(count, channels, side, side, generator=seeded(seed)).contiguous(
            memory_format=torch.channels_last
        )
        for channels, side in zip(STAGES, (6, 3), strict=True)
    ]


def prepared(method, weights):
    """What a method is built on, a bank of its own, and a batch to be scored."""
    if "images" not in method.takes:
        return Stages(*STAGES), StagedBank(draw_stages(7)), draw_stages(4, seed=2)
    backbone = method.experiment.get("semantic", {}).get("backbone", BACKBONE)
    is_pooled = "structured" not in method.tasks
    extractor = build_extractor(method, backbone, (2, 4), weights=str(weights), pooled=is_pooled)
    return extractor, Bank(draw_images(7)), [draw_images(4, seed=2)]


@torch.inference_mode()
def scored(detector, stages):
    return [part for part in detector.score_stages(stages) if part is not None]


def assert_same_bits(found, wanted):
    assert len(found) == len(wanted)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_fits_scores_reloads_refits_and_exports(name, weights, tmp_path):
    method = METHODS[name]
    known = {entry.name for entry in fields(method.options)}
    options = replace(method.options, **{n: v for n, v in SHORT.items() if n in known})
    extractor, bank, stages = prepared(method, weights)

    detector = build_detector(name, extractor, options)
    detector.fit(bank, generator=seeded())
    wanted = scored(detector.eval(), stages)
    assert (len(wanted[0]), wanted[0].ndim) == (4, 3)
    assert all(len(part) == 4 and part.isfinite().all() and part.std() > 0 for part in wanted)

    state = {key: tensor.contiguous() for key, tensor in detector.state_dict().items()}
    save_file(state, tmp_path / "head.safetensors")
    loaded = build_detector(name, extractor, options)
    loaded.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert_same_bits(scored(loaded.eval(), stages), wanted)

    torch.manual_seed(99)  # the global generator has no say, nor has what was loaded
    loaded.fit(bank, generator=seeded())
    again = loaded.state_dict()
    assert again.keys() == state.keys()
    assert_same_bits(list(again.values()), list(state.values()))
    assert_same_bits(scored(loaded.eval(), stages), wanted)

    with torch.no_grad():
        found = detector.exported().eval()(join_stages(stages))
    for ours, theirs in zip(found if isinstance(found, tuple) else [found], wanted, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=1e-4 * float(theirs.max() - theirs.min())
        )


@pytest.mark.parametrize("name", FOUND)
def test_values_that_an_option_cannot_have_are_refused(name):
    """Words by what reads them, tyro or `check_types`; numbers by the options themselves."""
    options = FOUND[name].options
    check_types(options)
    for option, hint in get_type_hints(type(options)).items():
        if get_origin(hint) is Literal:
            with pytest.raises(ValueError, match=f"{option} is 'nonsense'"):
                check_types(replace(options, **{option: "nonsense"}))
        if any(isinstance(mark, Bound) for mark in marks_of(type(options), option)):
            with pytest.raises(
                ValueError, match=f"--method.{option.replace('_', '-')} nan must be"
            ):
                replace(options, **{option: math.nan})


# Features and images


@dataclass(frozen=True, kw_only=True)
class BothOptions(FeatureOptions):
    """None of its own."""


class Both(Detector):
    """Distance of features to their mean as map, that of the images' mean colour as score."""

    def __init__(self, features, options):
        super().__init__()
        assert features.backbone is not None
        self.options = options
        self.register_buffer("mean", torch.zeros(features.channels))
        self.register_buffer("colour", torch.zeros(3))

    def fit(self, bank, *, generator, monitor=None):  # noqa: ARG002
        features, colours = [], []
        for stages in bank.stage_batches(3, generator=generator):
            maps, images = split_images(stages)
            features.append(join_stages(maps).mean(dim=(2, 3)))
            colours.append(images.float().mean(dim=(2, 3)))
        self.mean.copy_(torch.cat(features).mean(dim=0))
        self.colour.copy_(torch.cat(colours).mean(dim=0))

    def forward(self, features, images):
        maps = (features - self.mean[:, None, None]).norm(dim=1)
        return maps, (images.float().mean(dim=(2, 3)) - self.colour).norm(dim=1)

    def score_stages(self, stages):
        maps, images = split_images(stages)
        return self(join_stages(maps), images)


@pytest.mark.parametrize("feature_norm", ["none", "l2"])
def test_a_method_may_take_features_and_images(feature_norm):
    torch.manual_seed(0)
    backbone = FrozenExtractor(BACKBONE, (2, 3), weights="random")
    extractor = RawImages(backbone, backbone)
    pixels = draw_images(7)
    array = ArrayDataset(
        pixels.permute(0, 2, 3, 1).numpy(), PairTransform(32, None, "opencv_square")
    )
    loader = BatchLoader(array, batch_size=4, workers=0, skip_unreadable=False)
    bank = FeatureBank.extract(extractor, loader, store="host")
    assert bank.channels == sum(backbone.stage_channels)
    assert [stage.dtype for stage in bank.stages] == [torch.float16, torch.float16, torch.uint8]

    shape = shape_of(extractor)
    detector = normalised(Both(shape, BothOptions()), feature_norm, shape.stage_channels)
    detector.fit(bank.subset(range(5)), generator=seeded())
    side = backbone.grid(32)
    scores = score_all(detector, bank, Scoring(map_size=32))
    assert scores.maps.shape == (7, 32, 32)
    colours = pixels.float().mean(dim=(2, 3))
    expected = (colours - colours[:5].mean(dim=0)).norm(dim=1)
    torch.testing.assert_close(scores.images, expected, rtol=1e-4, atol=1e-4)
    features = next(bank.batches(7))
    assert features.shape == (7, bank.channels, side, side)
    features = features / features.norm(dim=1, keepdim=True) if feature_norm == "l2" else features
    maps = (features - features[:5].mean(dim=(0, 2, 3))[:, None, None]).norm(dim=1)
    plain = score_all(detector, bank, Scoring(map_size=side)).maps
    torch.testing.assert_close(plain, maps, rtol=1e-4, atol=1e-5)

    network = Deployed(
        extractor, detector.eval(), image_size=32, smoothing=lambda _: torch.eye(side)
    )
    with torch.no_grad():
        found = network(pixels)
    torch.testing.assert_close(found[0], scores.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], plain, rtol=1e-3, atol=1e-4)
