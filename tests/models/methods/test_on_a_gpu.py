"""Every method on a CUDA device: a pretended one, which any machine has, and a real one."""

import copy

import pytest
import torch
from torch import nn

from models.building import build_detector
from models.features.matmul import fp32_settings, set_fp32
from tests.models.banks import seeded
from tests.models.methods.cases import CASES, prepared
from tests.models.pretended import TO_DEVICE, BankOn, moved, pretended_device

pytestmark = [
    pytest.mark.filterwarnings("ignore::models.methods.simplenet.simplenet.TrivialSolutionWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]
LOOP = "models/training/loop.py:run"
WAITS = {
    "the losses of an epoch, or a number of it for the monitor, at once": {
        "models/training/epochs.py:mean_of_finite",
        "models/methods/deep_svdd/deep_svdd.py:<lambda>",
        "models/methods/noco.py:<lambda>",
        "models/methods/simplenet/simplenet.py:_diagnose",
    },
    "a number of the normal images, once a fit, by which it goes on or is refused": {
        "models/features/feature_norm.py",
        "models/methods/cutpaste/density.py:_inverse_factor",
        "models/methods/deep_svdd/deep_svdd.py:_measure_range",
        "models/methods/fapm/fapm.py:_choose",
        "models/methods/fapm/fapm.py:_remark_weights",
        "models/methods/flows/glow.py:_measure",
        "models/methods/mahalanobis.py",
        "models/methods/ulsad/ulsad.py:_set_quantiles",
        "models/methods/uniad/uniad.py:_loss_of_means",
    },
    "linear algebra tells the host whether it worked": {
        "models/features/multiscale.py:add_second_moment",
        "models/methods/noco_cf/mixture.py:solve",
        "models/methods/noco_cf/noco_exact.py:decompose",
        "models/methods/padim.py:_invert",
    },
    "what is farthest, or nearest, decides what is computed next": {
        "models/features/coreset.py",
        "models/features/kmeans.py",
        # The exact search looks which queries its rounding leaves open.
        "models/features/nearest.py",
    },
    "positions are sorted by their centres, of which each has a number of its own": {
        "models/methods/noco_cf/noco_exact.py:partial_fit",
        "models/methods/noco_cf/sorted_by_centre.py",
    },
    "what is kept of a fit is chosen, or drawn by the probabilities, on the CPU": {
        "models/methods/fine_tuned/fisher.py:_draw_gradient",
        "models/methods/noco_cf/noco_cf.py:fit",
        "models/methods/pni/pni.py",
    },
    "anomalies are drawn into the images on the CPU": {"models/training/drawn.py"},
    "a network that is rewritten must stay what it was; looked at once": {
        "models/backbone/rewriting.py",
    },
    "kornia makes its constants on the CPU, at every call": {
        "models/methods/edgrec/colours.py",
        "models/training/similarity.py:ssim_map",
    },
}
"""Why a host may wait for its device -> files, or functions of them, that do."""
ALLOWED = {place for places in WAITS.values() for place in places}


@pytest.fixture(scope="module", params=CASES)
def case(request, classifier_file):
    return prepared(*CASES[request.param], classifier_file)


@pytest.fixture(scope="module")
def fitted(case):
    torch.manual_seed(1)
    return case.fitted()


def unexpected(waits):
    """Waits for which there is no reason, each as it is read in a message."""
    return sorted(
        {
            f"{wait.what}: {' < '.join(wait.places[:3])}"
            for wait in waits
            if not any(wait.is_in(place) for place in ALLOWED)
        }
    )


def test_a_fit_on_a_gpu_mixes_no_devices_and_waits_where_it_must(case, monkeypatch):
    """Copies to the device before a loop of training starts hold up nothing."""
    with pretended_device(monkeypatch) as device:
        extractor = moved(copy.deepcopy(case.extractor))
        detector = moved(build_detector(case.name, extractor, case.options))
        device.waits.clear()
        detector.fit(BankOn("cuda", case.bank), generator=seeded())
        waits = [w for w in device.waits if w.what != TO_DEVICE or w.is_in(LOOP)]
        assert {one.device.type for one in detector.state_dict().values()} == {"cuda"}
        with torch.no_grad():
            scores = detector.score_stages([stage.cuda() for stage in case.stages])
        assert all(one.cpu().isfinite().all() for one in scores if one is not None)
    assert unexpected(waits) == []


def test_scoring_on_a_gpu_mixes_no_devices_and_waits_where_it_must(case, fitted, monkeypatch):
    extractor = copy.deepcopy(case.extractor)
    detector = build_detector(case.name, extractor, case.options)
    detector.load_state_dict(fitted.state_dict())
    with pretended_device(monkeypatch) as device, torch.no_grad():
        moved(extractor)
        stages = [stage.cuda() for stage in case.stages]
        moved(detector).score_stages(stages)  # what is made once is there
        device.waits.clear()
        found = [one for one in detector.score_stages(stages) if one is not None]
        waits = list(device.waits)
        assert {one.device.type for one in found} == {"cuda"}
        found = [one.cpu() for one in found]
    assert unexpected(waits) == []
    for ours, wanted in zip(found, case.scored(fitted), strict=True):
        assert_close(ours, wanted)


def assert_close(ours, wanted):
    """Within 1e-4 of the range of all scores: rounding, of another order of sums."""
    tolerance = 1e-4 * float(wanted.max() - wanted.min())
    torch.testing.assert_close(ours, wanted, rtol=0, atol=tolerance)


# A real device; the same on the CPU for a few methods, so that any machine runs these lines.

ON_THE_CPU = ("noco_cf", "padim", "memseg", "simplenet")
"""A head in closed form, a large one, a network with drawn anomalies, and a trained head."""
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PLACES = [
    *(pytest.param(name, "cpu", id=f"{name}-cpu") for name in ON_THE_CPU),
    *(pytest.param(name, "cuda", id=f"{name}-cuda", marks=ON_A_GPU) for name in CASES),
]
TOLERANCE = 1e-3
"""Of the range of all scores: convolutions of a GPU round as they are faster, not as the CPU's."""
ROUNDING = 1e-5
"""Of the largest score: those of a network that has hardly learned differ by no more themselves."""
OUTSIDE = 0.01
"""Share of the pixels that may differ by more, where a method rounds to whole numbers."""


@pytest.fixture
def in_fp32():
    """IEEE float32 on a GPU, as `--precision fp32` sets it."""
    products, convolutions = (one == "tf32" for one in fp32_settings())
    set_fp32("ieee")
    yield
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


def made_on(device, case):
    """An unfitted detector on a device, and the images to score there."""
    extractor = copy.deepcopy(case.extractor)
    if isinstance(extractor, nn.Module):
        extractor.to(device)
    detector = build_detector(case.name, extractor, case.options).to(device)
    return detector, [stage.to(device) for stage in case.stages]


def scored_on(device, detector, stages):
    with torch.inference_mode():
        found = [one for one in detector.score_stages(stages) if one is not None]
    assert {one.device.type for one in found} == {device}
    return [one.cpu() for one in found]


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_a_head_fitted_on_the_cpu_scores_the_same_on_a_device(name, device, classifier_file):
    case = prepared(*CASES[name], classifier_file)
    fitted = case.fitted()
    detector, stages = made_on(device, case)
    detector.load_state_dict(fitted.state_dict())
    found = scored_on(device, detector, stages)
    for ours, wanted in zip(found, case.scored(fitted), strict=True):
        tolerance = TOLERANCE * (wanted.max() - wanted.min()) + ROUNDING * wanted.abs().max()
        away = (ours - wanted).abs() > tolerance
        assert away.double().mean() <= OUTSIDE


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_a_fit_on_a_device_scores_and_can_be_kept(name, device, classifier_file):
    case = prepared(*CASES[name], classifier_file)
    detector, stages = made_on(device, case)
    detector.fit(BankOn(device, case.bank), generator=seeded())
    found = scored_on(device, detector, stages)
    assert all(one.isfinite().all() and one.std() > 0 for one in found)
    again, _ = made_on(device, case)
    again.load_state_dict({key: one.cpu() for key, one in detector.state_dict().items()})
    for ours, wanted in zip(scored_on(device, again, stages), found, strict=True):
        assert_close(ours, wanted)
