"""The network for export gives what the suite's scoring gives, for every method."""

import functools
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models.building import build_detector, build_extractor
from models.deployment.memory import BLOCK, Memory
from models.deployment.network import Deployed
from models.features.nearest import nearest
from models.method import find_method
from tests.models.banks import Bank, Stages, seeded
from utils.evaluation.smoothing import image_scores, smoothing_matrix, upsample_and_blur

pytestmark = [
    pytest.mark.filterwarnings("ignore::models.methods.simplenet.simplenet.TrivialSolutionWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
SIDE = 48
SIGMA = 2.0
ON_FEATURES = {
    "noco": {"epochs": 1},
    "noco-squared": {"epochs": 1, "loss": "squared"},
    "noco_cf": {"prototypes": 1, "time": (100.0,)},
    "noco_cf-prototypes": {"time": (1e4,), "prototypes": 5, "nearest": 2},
    "noco_cf-squared": {"time": (1e4,), "prototypes": 3, "loss": "squared"},
    "simplenet": {"epochs": 1},
    "simplenet_released": {"epochs": 1},
    "nc_disc": {"epochs": 1},
    "padim": {"dims": 20},
    "mahalanobis": {},
    "knn": {"max_positions": 300},
    "knn-euclidean": {"distance": "euclidean"},
    "patchcore": {"coreset_ratio": 0.1},
    "patchcore-maximum": {"coreset_ratio": 0.1, "num_neighbors": 1},
}
ON_IMAGES = {
    "panda": {"epochs": 1, "num_neighbors": 2},
    "mean_shifted": {"epochs": 1},
}


@pytest.fixture(scope="module")
def images():
    """Coarse random patches, of which a backbone makes different features; (12, 3, S, S) uint8."""
    coarse = torch.randint(0, 256, (12, 3, SIDE // 8, SIDE // 8), generator=seeded(1))
    return coarse.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3).byte()


@functools.cache
def extractor_of(method, pooled):
    options = {"weights": "random", "pooled": pooled}
    return build_extractor(find_method(method), "resnet10t", (1, 2), **options)


def built(name, extractor, options):
    """A detector of a method, by its name and perhaps what tells cases of it apart."""
    method = name.split("-")[0]
    return build_detector(method, extractor, replace(find_method(method).options, **options))


def fitted(name, options, images, pooled=False):
    extractor = extractor_of(name.split("-")[0], pooled)
    detector = built(name, extractor, options)
    detector.fit(Bank(stored(extractor, images)), generator=seeded())
    return extractor, detector.eval()


def stored(extractor, images):
    """Features as banks hold them."""
    maps = extractor.stage_maps(images)
    return extractor.assemble([m.half() if m.is_floating_point() else m for m in maps])


@torch.inference_mode()
def scored(extractor, detector, images, size, sigma=SIGMA):
    """Scores and maps as the suite computes them."""
    maps, own = detector.score(stored(extractor, images))
    smooth = upsample_and_blur(maps, size, 0.0 if detector.final_maps else sigma).float()
    return (image_scores(smooth) if own is None else own.float()), smooth


def deployed(extractor, detector, smoothing=None):
    return Deployed(extractor, detector, image_size=SIDE, smoothing=smoothing)


def blur(sigma=SIGMA):
    return functools.partial(smoothing_matrix, size=SIDE, sigma=sigma)


@pytest.mark.parametrize("feature_norm", ["none", "l2_per_layer"])
@pytest.mark.parametrize("name", ON_FEATURES)
def test_equals_the_suites_scoring(name, feature_norm, images):
    options = ON_FEATURES[name] | {"feature_norm": feature_norm}
    extractor, detector = fitted(name, options, images[:8])
    network = deployed(extractor, detector, blur())
    scores, maps = scored(extractor, detector, images, SIDE)
    assert scores.std() > 0
    with torch.no_grad():
        found = network(images)
    assert network.outputs == ("scores", "maps")
    torch.testing.assert_close(found[0], scores, rtol=2e-5, atol=2e-5 * float(scores.abs().max()))
    torch.testing.assert_close(found[1], maps, rtol=2e-5, atol=2e-5 * float(maps.abs().max()))


@pytest.mark.parametrize("name", ["noco", "noco_cf-prototypes", "knn", "patchcore"])
def test_equals_it_on_pooled_features(name, images):
    extractor, detector = fitted(name, ON_FEATURES[name], images[:8], pooled=True)
    network = deployed(extractor, detector)
    with torch.no_grad():
        (found,) = network(images)
    scores, _ = scored(extractor, detector, images, None)
    torch.testing.assert_close(found, scores, rtol=2e-5, atol=2e-5 * float(scores.abs().max()))


@pytest.mark.parametrize("sigma", [0.0, SIGMA])
def test_equals_it_for_student_and_teacher(sigma, images):
    extractor = extractor_of("stpm", False)
    detector = built("stpm", extractor, {"epochs": 1, "batch_size": 4})
    detector.fit(Bank(images[:8]), generator=seeded())
    network = deployed(extractor, detector.eval(), blur(sigma))
    assert (network.smoothing is None) == (sigma == 0)
    with torch.no_grad():
        found = network(images)
    scores, maps = scored(extractor, detector, images, SIDE, sigma)
    torch.testing.assert_close(found[0], scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], maps, rtol=1e-4, atol=1e-4 * float(maps.max()))


@pytest.mark.parametrize("method", ON_IMAGES)
def test_equals_it_for_fine_tuned_backbones(method, images):
    extractor = extractor_of(method, True)
    detector = built(method, extractor, ON_IMAGES[method] | {"trained_stages": 1})
    detector.fit(Bank(images[:8]), generator=seeded())
    with torch.no_grad():
        (found,) = deployed(extractor, detector.eval())(images)
    scores, _ = scored(extractor, detector, images, None)
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4 * float(scores.max()))


def test_equals_it_for_deep_svdd():
    extractor = build_extractor(find_method("deep_svdd"), "lenet", (0,))
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=seeded()).byte()
    detector = built("deep_svdd", extractor, {"epochs": 1, "pretrain_epochs": 1})
    detector.fit(Bank(images), generator=seeded())
    network = Deployed(extractor, detector.eval(), image_size=32, smoothing=None)
    with torch.no_grad():
        (found,) = network(images)
    torch.testing.assert_close(found, scored(extractor, detector, images, None)[0])


def test_memories_of_several_blocks_find_the_nearest():
    memory = torch.randn(2 * BLOCK + 7, 5, generator=seeded(1)) + 3
    queries = torch.cat([torch.randn(40, 5, generator=seeded(2)) + 3, memory[-1:]])
    search = Memory(memory)
    distances, rows = search(queries - search.shift, 3)
    wanted, wanted_rows = nearest(queries, memory, 3)
    torch.testing.assert_close(distances, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, wanted_rows)


def test_a_memory_smaller_than_the_features_proposed():
    search = Memory(torch.eye(3))
    distances, rows = search(torch.eye(3) - search.shift, 3)
    assert torch.equal(rows[:, 0], torch.arange(3))
    torch.testing.assert_close(distances[0], torch.tensor([0.0, 2**0.5, 2**0.5]))


class AllHeads(nn.Module):
    """Every head that is written anew, on the same features, so that one graph shows them all."""

    def __init__(self, heads):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features):
        found = [head(features) for head in self.heads]
        (pair,) = [one for one in found if isinstance(one, tuple)]  # PatchCore's
        maps = [one[0] if isinstance(one, tuple) else one for one in found]
        return torch.stack(maps), pair[1]


@pytest.fixture(scope="module")
def heads():
    bank = Bank(torch.randn(6, 7, 4, 4, generator=seeded()))
    exported = []
    for name in ("noco_cf-prototypes", "padim", "mahalanobis", "knn", "patchcore", "simplenet"):
        options = ON_FEATURES[name] | {"feature_norm": "std"}
        detector = built(name, Stages(3, 4), options | ({"dims": 4} if name == "padim" else {}))
        detector.fit(bank, generator=seeded())
        exported.append(detector.eval().exported())
    return AllHeads(exported).eval()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_traced_graph_takes_any_batch(heads, batch):
    example = torch.randn(2, 7, 4, 4, generator=seeded(3))
    with torch.no_grad():
        graph = torch.jit.trace(heads, (example,), check_trace=False)
        features = torch.randn(batch, 7, 4, 4, generator=seeded(batch))
        for found, wanted in zip(graph(features), heads(features), strict=True):
            torch.testing.assert_close(found, wanted)


def test_an_onnx_graph_takes_any_batch(heads):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (requirements-export.txt)")
    import onnxruntime

    example = torch.randn(2, 7, 4, 4, generator=seeded(3))
    with torch.no_grad():
        program = torch.onnx.export(
            heads,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=18,
            input_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (1, 3, 8):
        features = torch.randn(batch, 7, 4, 4, generator=seeded(batch))
        found = session.run(None, {"features": features.numpy()})
        with torch.no_grad():
            wanted = heads(features)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)
