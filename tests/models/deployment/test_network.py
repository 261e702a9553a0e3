"""The network for export gives what the suite's scoring gives; each head is in methods."""

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
from tests.models.banks import Bank, fitted, seeded
from utils.evaluation.smoothing import image_scores, smoothing_matrix, upsample_and_blur

pytestmark = [
    pytest.mark.filterwarnings("ignore::models.methods.simplenet.simplenet.TrivialSolutionWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
SIDE = 48
SIGMA = 2.0
PATCHES = {"epochs": 1, "samples_per_image": 1, "patch_sizes": (16, 8), "strides": (8, 5)}
FLOW = {"epochs": 1, "steps": 2, "width": 8}
VIEWS = {"blocks": 2, "width": 8, "train_views": 4, "test_views": 18, "epochs": 1}
NEIGHBOURS = {"epochs": 1, "mlp_width": 8, "dist_size": 20, "neighbourhood": 3}
REBUILT = {"network_size": 32, "width": 4, "images_per_epoch": 8, "epochs": 1}
FILLED_IN = {"width": 4, "region_sizes": (4, 8), "epochs": 1}
PASTED = {"width": 8, "epochs": 1, "steps_per_epoch": 2, "batch_size": 4}
CUT = {**PASTED, "representation": "patch", "crop": 24, "window": 16, "stride": 12}
DENOISED = {
    **{"base_width": 8, "channel_multipliers": (1, 2), "attention_factors": (2,), "heads": 2},
    **{"start_step": 200, "sampling_step": 100, "epochs": 1},
}
PROTOTYPES = {"time": (1e4,), "prototypes": 5, "nearest": 2}


@pytest.fixture(scope="module")
def images():
    """Coarse random patches, of which a backbone makes different features; (12, 3, S, S) uint8."""
    coarse = torch.randint(0, 256, (12, 3, SIDE // 8, SIDE // 8), generator=seeded(1))
    return coarse.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3).byte()


@functools.cache
def extractor_of(method, pooled):
    options = {"weights": "random", "pool": "mean" if pooled else None}
    return build_extractor(find_method(method), "resnet10t", (1, 2), **options)


def deployed_and_scored(method, options, images, sigma=None):
    """A network, what it makes of images, and what the suite does; pooled without `sigma`."""
    extractor = extractor_of(method, sigma is None)
    stored = [m.half() if m.is_floating_point() else m for m in extractor.stage_maps(images)]
    features = extractor.assemble(stored)
    detector = build_detector(method, extractor, replace(find_method(method).options, **options))
    detector.fit(Bank(features[:8]), generator=seeded())
    smoothing = size = None
    if sigma is not None:
        size = SIDE
        smoothing = functools.partial(smoothing_matrix, size=size, sigma=sigma)
    network = Deployed(extractor, detector.eval(), image_size=SIDE, smoothing=smoothing)
    with torch.inference_mode():
        maps, scores = detector.score(features)
        smooth = upsample_and_blur(maps, size, sigma or 0.0).float()
        scores = image_scores(smooth) if scores is None else scores
        return network, network(images), (scores, smooth)


def assert_near(found, wanted):
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5 * scale)


@pytest.mark.parametrize(
    ("method", "options", "sigma"),
    [
        ("noco", {"epochs": 1}, SIGMA),
        ("mahalanobis", {}, SIGMA),
        ("padim", {"dims": 20, "feature_norm": "l2_per_layer"}, SIGMA),
        ("patchcore", {"coreset_ratio": 0.1, "feature_norm": "l2_per_layer"}, SIGMA),
        ("pni", {**NEIGHBOURS, "coreset_ratio": 0.1, "channels": 40}, SIGMA),
        ("pni", {**NEIGHBOURS, "coreset_ratio": 0.1, "released": True}, SIGMA),
        ("fapm", {"feature_norm": "l2_per_layer"}, SIGMA),
        ("glow", {**FLOW, "levels": 2}, SIGMA),
        ("differnet", VIEWS, SIGMA),
        ("stpm", {"epochs": 1, "batch_size": 4}, SIGMA),
        ("stpm", {"epochs": 1, "batch_size": 4}, 0.0),
        ("mspba", PATCHES, 0.0),
        ("cutpaste", PASTED, SIGMA),
        ("cutpaste", CUT, 0.0),
        ("ddad", DENOISED, SIGMA),
        ("draem", {"width": 4, "discriminator_width": 4, "epochs": 1, "sspcab": True}, 0.0),
        ("draem", {"width": 4, "discriminator_width": 4, "epochs": 1}, SIGMA),
        ("edgrec", {"width": 4, "epochs": 1}, 0.0),
        ("edgrec", {"width": 4, "epochs": 1, "released": True}, SIGMA),
        ("memseg", {"steps_per_epoch": 2, "epochs": 1}, 0.0),
        ("autoencoder", {**REBUILT, "stride": 9}, 0.0),
        ("vae", {**REBUILT, "samples": 2}, SIGMA),
        ("riad", FILLED_IN, 0.0),
        ("mnad", {"width": 4, "epochs": 1, "image_score": "max"}, SIGMA),
    ],
)
def test_scores_and_maps_are_the_suites(method, options, sigma, images):
    network, (scores, maps), wanted = deployed_and_scored(method, options, images, sigma)
    assert network.outputs == ("scores", "maps")
    assert (network.smoothing is None) == (sigma == 0)
    assert wanted[0].std() > 0
    assert_near(scores, wanted[0])
    assert_near(maps, wanted[1])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("noco", {"epochs": 1}),
        ("noco_exact", PROTOTYPES),
        ("knn", {"max_positions": 300}),
        ("patchcore", {"coreset_ratio": 0.1}),
        ("fapm", {"near_ratio": 0.5, "far_ratio": 0.5}),
        ("panda", {"epochs": 1, "trained_stages": 1}),
        ("glow", FLOW),
        ("differnet", VIEWS),
        ("glow_images", FLOW),
        ("cutpaste", PASTED),
        ("ddad", DENOISED),
        ("autoencoder", {**REBUILT, "image_score": "mean", "loss": "l2"}),
        ("riad", {**FILLED_IN, "image_score": "mean"}),
        ("mnad", {"width": 4, "epochs": 1}),
        ("uniad", {"epochs": 1, "neighbourhood": None}),
    ],
)
def test_scores_of_pooled_features_and_of_images_are_the_suites(method, options, images):
    network, (scores,), wanted = deployed_and_scored(method, options, images)
    assert network.outputs == ("scores",)
    assert_near(scores, wanted[0])


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
    for name, options in {
        "noco_exact": PROTOTYPES,
        "padim": {"dims": 4},
        "mahalanobis": {},
        "knn": {},
        "patchcore": {"coreset_ratio": 0.1},
        "simplenet": {"epochs": 1},
        "pni": {**NEIGHBOURS, "coreset_ratio": 0.2, "channels": 5},
        "glow": {**FLOW, "levels": 2, "image_score": "max"},
    }.items():
        exported.append(fitted(name, bank, feature_norm="std", **options).exported())
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
