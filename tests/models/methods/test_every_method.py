"""What every method must do, whatever it is; and that one may take features and images."""

import io
import math
from dataclasses import dataclass, replace
from typing import Literal, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.options import Bound, FeatureOptions, check_types, marks_of
from datasets.reading.loading import ArrayDataset, BatchLoader
from datasets.reading.transforms import PairTransform
from models.backbone.extractor import FrozenExtractor
from models.backbone.raw_images import RawImages
from models.backbone.weights import state_digest
from models.building import compile_networks, shape_of
from models.deployment.network import Deployed
from models.detector import Detector
from models.features.feature_norm import normalised
from models.features.multiscale import join_stages, split_images
from tests.models.banks import draw_images, monitoring, seeded
from tests.models.methods.cases import BACKBONE, CASES, FOUND, METHODS, prepared
from utils.evaluation.scoring import Scoring, score_all
from utils.features.bank import FeatureBank

pytestmark = [
    pytest.mark.filterwarnings("ignore::models.methods.simplenet.simplenet.TrivialSolutionWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", params=CASES)
def case(request, classifier_file):
    return prepared(*CASES[request.param], classifier_file)


@pytest.fixture(scope="module")
def watched(case):
    """A detector after a fit, and what a monitor of it saw: steps, and scores at each."""
    torch.manual_seed(1)
    detector, seen = case.made(), []

    def monitor(step, values):
        assert all(isinstance(value, int | float) for value in values.values())
        torch.rand(step)  # the global generator is anyone's
        seen.append((step, case.scored(detector)))

    detector.fit(case.bank, generator=seeded(), monitor=monitoring(monitor, scores_steps=True))
    return detector, seen


def assert_same_bits(found, wanted):
    assert len(found) == len(wanted)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_a_monitor_sees_every_step_and_the_last_is_what_scores(case, watched):
    detector, seen = watched
    assert [step for step, _ in seen] == case.steps
    final = case.scored(detector)
    assert_same_bits(seen[-1][1], final)
    assert (len(final[0]), final[0].ndim) == (4, 3)
    assert all(len(part) == 4 and part.isfinite().all() and part.std() > 0 for part in final)
    if len(seen) > 1:
        assert not torch.equal(seen[0][1][0], final[0])


def test_a_step_is_where_the_fit_ends_that_it_names(case, watched):
    detector, seen = watched
    for step, scores in seen:
        alone = case.fitted(**detector.stopped_at(step))
        assert_same_bits(case.scored(alone), scores)


def test_a_fit_depends_on_its_bank_and_seed_alone(case, watched):
    """Not on who watches, on the global generator, or on what was fitted or loaded before."""
    wanted = watched[0].state_dict()
    torch.manual_seed(99)
    detector = case.made()
    detector.fit(case.bank.subset(torch.arange(6)), generator=seeded())
    detector.load_state_dict(wanted)
    assert_same_bits(case.scored(detector), watched[1][-1][1])
    detector.fit(case.bank, generator=seeded())
    assert detector.state_dict().keys() == wanted.keys()
    assert_same_bits(list(detector.state_dict().values()), list(wanted.values()))
    detector.fit(case.bank, generator=seeded(1))
    same = [part.equal(wanted[name]) for name, part in detector.state_dict().items()]
    assert all(same) != case.is_random
    network = getattr(case.extractor, "network", None)
    assert network is None or state_digest(network.net) == network.weights_digest


def test_a_saved_head_scores_identically(case, watched, tmp_path):
    state = {name: tensor.contiguous() for name, tensor in watched[0].state_dict().items()}
    save_file(state, tmp_path / "head.safetensors")
    loaded = case.made()
    loaded.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert_same_bits(case.scored(loaded), watched[1][-1][1])


def test_an_exported_head_scores_the_same(case, watched):
    graph = watched[0].exported()
    apart = getattr(graph, "takes_stages", False)
    maps, images = split_images(case.stages)
    given = [] if not maps else [maps if apart else join_stages(maps)]
    with torch.no_grad():
        found = graph(*given, *([] if images is None else [images]))
    wanted = watched[1][-1][1]
    for ours, theirs in zip(found if isinstance(found, tuple) else [found], wanted, strict=True):
        tolerance = 2e-5 * float(theirs.max() - theirs.min())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


class Keeping:
    """A monitor that keeps what a fit offers, and is killed after an epoch."""

    scores_steps = False

    def __init__(self, phases, killed_after):
        self.phases, self.killed_after, self.seen = phases, killed_after, []

    def __call__(self, step, values):
        self.seen.append((step, values))

    def kept(self, phase):
        return self.phases.get(phase)

    def keep(self, phase, state, *, ended):  # noqa: ARG002
        buffer = io.BytesIO()
        torch.save(state(), buffer)
        buffer.seek(0)
        self.phases[phase] = torch.load(buffer, weights_only=True)
        if self.seen and self.seen[-1][0] == self.killed_after:
            raise KeyboardInterrupt


def test_a_killed_fit_goes_on_to_the_same_bits(case, watched):
    """In another process: nothing of the detector that was killed is left."""
    if not hasattr(case.options, "epochs"):
        pytest.skip("is fitted in one step, or by another's trainer")
    if case.name.startswith("anomalib:"):
        pytest.skip("trains with Lightning, which keeps its own checkpoints")
    every = getattr(case.options, "report_every", 1)
    kept = {}
    with pytest.raises(KeyboardInterrupt):
        case.made().fit(case.bank, generator=seeded(), monitor=Keeping(kept, every))
    assert kept
    torch.manual_seed(5)
    detector, monitor = case.made(), Keeping(kept, None)
    detector.fit(case.bank, generator=seeded(), monitor=monitor)
    assert [step for step, _ in monitor.seen] == [step for step in case.steps if step > every]
    wanted = watched[0].state_dict()
    assert_same_bits(list(detector.state_dict().values()), list(wanted.values()))


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if "images" in method.takes]
)
def test_compiling_changes_what_trains_or_is_refused(name, classifier_file, monkeypatch):
    """Recorders in place of the compiler."""
    case, calls = prepared(name, {}, classifier_file), []

    def compiled(network):
        network._compiled_call_impl = lambda *given, **named: (
            calls.append(1) or network._call_impl(*given, **named)
        )

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    detector = case.made()
    compile_networks(detector)
    detector.fit(case.bank, generator=seeded())
    assert (len(calls) > 0) != ("compile" in METHODS[name].ignored)
    assert detector.state_dict().keys() == case.made().state_dict().keys()


TRAINED = [name for name, method in METHODS.items() if hasattr(method.options, "learning_rate")]


@pytest.mark.parametrize("name", TRAINED)
def test_a_loss_that_is_not_finite_ends_the_fit_and_is_named(name, classifier_file):
    case = prepared(name, {"learning_rate": 1e36}, classifier_file)
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at epoch 1, step 2"):
        case.fitted()


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


@pytest.mark.parametrize("feature_norm", ["none", "l2", "l2_per_layer", "std"])
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
    side = bank.stages[0].shape[1]
    scores = score_all(detector, bank, Scoring(map_size=32))
    assert scores.maps.shape == (7, 32, 32)
    colours = pixels.float().mean(dim=(2, 3))
    expected = (colours - colours[:5].mean(dim=0)).norm(dim=1)
    torch.testing.assert_close(scores.images, expected, rtol=1e-4, atol=1e-4)
    features = next(bank.batches(7))
    assert features.shape == (7, bank.channels, side, side)
    features = features if feature_norm == "none" else detector.feature_norm(features)
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
