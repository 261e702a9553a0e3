"""The bridge to anomalib; all but the first tests need the library."""

import importlib.util
import logging
import random
import signal
import socket
import sys
import types
import urllib.error
import warnings

import pytest
import torch
from safetensors.torch import load, save
from sklearn.metrics import roc_auc_score

from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.anomalib.anomalib import AnomalibDetector, AnomalibOptions
from models.methods.anomalib.facts import FACTS, REFUSED
from tests.models.banks import Bank, seeded

needs_anomalib = pytest.mark.skipif(
    importlib.util.find_spec("anomalib") is None,
    reason="anomalib is not installed: pip install -r requirements-anomalib.txt",
)
LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def lite0():
    return FrozenExtractor(LITE0, (2, 3), patch_size=1)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return FrozenExtractor("resnet18", (1, 2, 3), weights="random", patch_size=1)


def draw_images(count, side=48, seed=3, squares=False):
    """Grey noise, channels last as a bank has it; with `squares`, a bright one on each image."""
    images = torch.randint(90, 140, (count, 3, side, side), generator=seeded(seed))
    if squares:
        images[:, :, side // 4 : side // 2, side // 4 : side // 2] = 240
    return images.to(torch.uint8).contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def bank():
    return Bank(draw_images(18))


def made(backbone, name, **options):
    return AnomalibDetector(FeatureShape((), backbone), AnomalibOptions(model=name, **options))


def fitted(backbone, name, bank, *, seed=0, **options):
    detector = made(backbone, name, **options)
    detector.fit(bank, generator=seeded(seed))
    return detector


def test_says_how_to_install_anomalib(monkeypatch):
    loaded = [name for name in sys.modules if name.startswith("anomalib.")]
    for name in ("anomalib", *loaded):
        monkeypatch.setitem(sys.modules, name, None)
    for part in ("library", "training"):
        monkeypatch.delitem(sys.modules, f"models.methods.anomalib.{part}", raising=False)
    with pytest.raises(ModelError, match=r"pip install -r requirements-anomalib\.txt"):
        made(types.SimpleNamespace(), "patchcore")


def test_model_options_are_pairs():
    with pytest.raises(ValueError, match=r"--method\.model-options 'coreset' must be KEY=VALUE"):
        AnomalibOptions(model_options=("layers=[blocks.2]", "coreset"))


def test_a_download_is_told_of_every_model_it_is_known_of():
    assert not set(FACTS) & set(REFUSED)
    assert all(facts.epochs is None or facts.epochs > 0 for facts in FACTS.values())


@needs_anomalib
def test_every_name_with_facts_is_a_model_of_anomalib():
    from models.methods.anomalib.wrapper import find_model

    for name in FACTS:
        assert find_model(name)[0] == name


@needs_anomalib
def test_names_are_found_in_any_spelling_of_anomalib():
    from anomalib.models import list_models

    from models.methods.anomalib.wrapper import find_model

    assert find_model("winclip") == find_model("win_clip") == find_model("WinClip")
    # Its models of videos, and those that need more than images.
    names = list_models() - {"ai_vad", "fuvas", "c_f_m", "vlm_ad"}
    found = {find_model(name)[0] for name in names}
    assert {"padim", "l2bt", "mh_patchcore", "efficient_ad"} <= found
    assert len(found) == len(names)


@needs_anomalib
@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("patchcor", (), "near it: patchcore"),
        ("zzz", (), "It has .*padim, patchcore"),
        ("ai_vad", (), "no image model 'ai_vad'"),
        ("cfm", (), "point cloud"),
        ("patchcore", ("coreset=0.1",), "no option 'coreset'.*coreset_sampling_ratio"),
        ("patchcore", ("evaluator=true",), "no option 'evaluator'"),
        ("padim", ("n_features=many",), "padim: --method.model-options.*n_features"),
    ],
)
def test_bad_names_and_options_end_with_a_message(lite0, name, words, message):
    with pytest.raises(ModelError, match=f"(?s){message}"):
        made(lite0, name, model_options=words)


@needs_anomalib
def test_options_get_the_types_of_the_constructor(lite0):
    words = ("coreset_sampling_ratio=0.5", "num_neighbors=3", "layers=[blocks.2]")
    model = made(lite0, "patchcore", model_options=words)._recipe
    module = model.build(48).module
    assert module.coreset_sampling_ratio == 0.5
    assert module.model.num_neighbors == 3
    assert module.model.layers == ["blocks.2"]


CASES = {
    "dfm": (LITE0, {"model_options": ("pooling_kernel_size=1",)}),
    "patchcore": (LITE0, {"model_options": ("coreset_sampling_ratio=0.05",)}),
    "padim": (LITE0, {"model_options": ("n_features=12",)}),
    "stfpm": (LITE0, {"epochs": 2, "batch_size": 6}),
    "fastflow": ("resnet18", {"epochs": 2, "model_options": ("flow_steps=2",)}),
}


@needs_anomalib
@pytest.mark.parametrize("name", CASES)
def test_models_fit_score_raw_and_reload(name, bank, request, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    backbone, options = CASES[name]
    extractor = request.getfixturevalue("lite0" if backbone == LITE0 else "resnet")
    steps = []
    detector = made(extractor, name, **options)
    detector.fit(bank, generator=seeded(0), monitor=lambda *step: steps.append(step))
    assert steps == [(1, {})]
    assert detector.stopped_at(1) == {}
    assert detector.remarks == []
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []

    images = draw_images(4, seed=9, squares=True)
    with torch.inference_mode():
        maps, scores = detector.score(images)
        raw = detector.model(detector._pixels(images))
    assert maps.shape == (4, 48, 48)
    assert scores.shape == (4,)
    assert torch.isfinite(maps).all()
    assert torch.equal(scores, raw.pred_score.flatten())
    assert torch.equal(maps, raw.anomaly_map.squeeze(1))
    assert torch.equal(detector(images), maps)

    state = load(save({name: tensor.clone() for name, tensor in detector.state_dict().items()}))
    loaded = made(extractor, name, **options)
    loaded.load_state_dict(state)
    with torch.inference_mode():
        again, again_scores = loaded.score(images)
    assert torch.equal(again, maps)
    assert torch.equal(again_scores, scores)
    assert loaded.state_dict().keys() == state.keys()


@needs_anomalib
def test_a_loaded_head_can_take_another_size_of_image(lite0, bank):
    options = {"model_options": ("n_features=12",)}
    small = fitted(lite0, "padim", Bank(draw_images(6, side=32)), **options)
    large = fitted(lite0, "padim", bank, **options)
    images = draw_images(2, side=32, seed=9)
    expected = small.score(images)[1]
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.score(images)[1], expected)


@needs_anomalib
@pytest.mark.parametrize("name", ["patchcore", "padim"])
def test_plain_defects_are_found(lite0, bank, name):
    detector = fitted(lite0, name, bank, **CASES[name][1])
    images = torch.cat([draw_images(8, seed=5), draw_images(8, seed=6, squares=True)])
    labels = torch.arange(16) >= 8
    maps, scores = detector.score(images)
    assert roc_auc_score(labels, scores) > 0.95
    assert maps[8:, 14:22, 14:22].mean() > 1.2 * maps[8:, 36:, 36:].mean()


@needs_anomalib
def test_one_seed_gives_one_fit_and_leaves_the_global_state_alone(lite0, bank):
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    images = draw_images(3, seed=9)
    first, second, other = (
        fitted(lite0, "stfpm", bank, seed=seed, epochs=1).score(images)[1] for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    assert (torch.rand(1), random.random()) == expected


@needs_anomalib
def test_the_experiment_gives_the_frozen_weights_and_they_stay_out_of_the_head(lite0, bank):
    detector = fitted(lite0, "stfpm", bank, epochs=1)
    teacher = detector.model.teacher_model.feature_extractor.state_dict()
    student = detector.model.student_model.feature_extractor.state_dict()
    weights = lite0.net.state_dict()
    assert len(weights) > 100
    assert all(torch.equal(teacher[name], tensor) for name, tensor in weights.items())
    assert not torch.equal(student["conv_stem.weight"], weights["conv_stem.weight"])
    names = set(detector.state_dict())
    assert "model.student_model.feature_extractor.conv_stem.weight" in names
    assert not any("teacher_model" in name for name in names)
    assert detector.num_trainable == sum(
        p.numel() for p in detector.model.student_model.parameters()
    )


@needs_anomalib
def test_copies_that_training_changes_belong_to_the_head(lite0, bank):
    detector = fitted(lite0, "padim", bank, model_options=("n_features=12",))
    (net,) = detector._copies.values()
    with torch.no_grad():
        net.conv_stem.weight.mul_(2)
    detector._forget_changed_copies()
    images = draw_images(2, seed=9)
    state = detector.state_dict()
    assert "model.feature_extractor.feature_extractor.conv_stem.weight" in state
    loaded = made(lite0, "padim", model_options=("n_features=12",))
    loaded.load_state_dict(state)
    assert loaded.state_dict().keys() == state.keys()
    assert torch.equal(loaded.score(images)[1], detector.score(images)[1])


@needs_anomalib
def test_expansion_features_are_the_ones_the_model_gets(bank):
    extractor = FrozenExtractor(LITE0, (2, 3), feature_location="expansion", patch_size=1)
    module = made(extractor, "patchcore")._recipe.build(48).module
    features = module.model.feature_extractor(torch.zeros(1, 3, 48, 48))
    assert [f.shape[1] for f in features.values()] == list(extractor.stage_channels)


@needs_anomalib
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("patchflow", {}, "stages up to 4.*--layers 2 3"),
        (
            "padim",
            {},
            "padim cannot be built.*n_features must be.*--method.model-options",
        ),
        ("fastflow", {}, f"{LITE0} is not supported.*--backbone"),
        ("patchcore", {"epochs": 3}, "exactly 1 epochs; leave --method.epochs out"),
        ("cflow", {"model_options": ("fiber_batch_size=1000000",)}, "cannot be trained.*fibers"),
    ],
)
def test_what_a_model_refuses_ends_with_a_message(lite0, bank, name, options, message):
    with pytest.raises(ModelError, match=f"(?s){message}"):
        fitted(lite0, name, bank, **options)


@needs_anomalib
def test_a_model_nobody_knows_the_epochs_of_asks_for_them(lite0):
    from models.methods.anomalib.training import duration
    from models.methods.anomalib.wrapper import LibraryModel

    unknown = LibraryModel("uninet", lite0)
    with pytest.raises(ModelError, match=r"give --method\.epochs"):
        duration(unknown, {})
    assert duration(LibraryModel("uninet", lite0, epochs=7), {})["max_epochs"] == 7
    steps = duration(LibraryModel("dinomaly", lite0), {})
    assert steps == {"max_epochs": -1, "max_steps": 5000}


@needs_anomalib
def test_images_are_resized_for_a_model_that_insists_on_a_size(resnet):
    images = draw_images(6, side=40)
    options = {"epochs": 1, "model_options": ("flow_steps=1",)}
    detector = fitted(resnet, "fastflow", Bank(images), **options)
    assert detector.score(images)[0].shape == (6, 40, 40)
    assert detector._pixels(images).shape == (6, 3, 48, 48)
    assert "48 pixels" in " ".join(detector.remarks)
    recipe = made(resnet, "uflow", model_options=("flow_steps=1",))._recipe
    assert recipe._own_side() == 448  # its pre-processing takes no other


@needs_anomalib
def test_normalisation_is_the_backbones_or_else_that_of_the_models_own_pre_processing(lite0):
    images = draw_images(2, seed=4)
    detector = made(lite0, "patchcore")
    detector._side = images.shape[-1]
    torch.testing.assert_close(detector._pixels(images), lite0.pixels(images))  # mean, std 0.5
    other = made(lite0, "patchcore", model_options=("backbone=resnet18",))
    other._side = 8
    white = other._pixels(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(white[0, :, 0, 0], expected)
    # No normalisation of its own: pixels in [0, 1].
    assert made(lite0, "efficient_ad").std.flatten().tolist() == [1, 1, 1]


@needs_anomalib
def test_models_without_maps_say_so(lite0, bank):
    detector = fitted(lite0, "dfkde", bank, model_options=("n_pca_components=4",))
    maps, scores = detector.score(draw_images(3, seed=9))
    assert maps.shape == (3, 1, 1)
    assert torch.equal(maps.flatten(), scores)
    assert "no map" in " ".join(detector.remarks)


@needs_anomalib
def test_export_is_left_to_the_library(lite0):
    with pytest.raises(ModelError, match="anomalib's dfm cannot be exported"):
        made(lite0, "dfm").exported()


@needs_anomalib
def test_a_loss_that_is_not_finite_is_named_by_epoch_and_step():
    from models.methods.anomalib.training import _Watch

    watch = _Watch("stfpm", sys.stderr)
    trainer = types.SimpleNamespace(max_epochs=3, max_steps=-1, current_epoch=1)
    watch.on_train_start(trainer, None)
    for value in (1.0, float("nan")):
        watch.on_train_batch_end(trainer, None, {"loss": torch.tensor(value)}, None, 0)
    with pytest.raises(FloatingPointError, match="stfpm is nan at epoch 2, step 2"):
        watch.on_train_epoch_end(trainer, None)


class Disturbed(Bank):
    """A bank that something happens to when training reads it."""

    def __init__(self, features, happens):
        super().__init__(features)
        self.happens = happens

    def batches(self, batch_size, *, generator=None):
        if generator is not None:
            self.happens()
        return super().batches(batch_size)


@needs_anomalib
def test_ctrl_c_interrupts_and_goes_on_doing_so(lite0, bank):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(lite0, "stfpm", Disturbed(bank.features, interrupt), epochs=1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@needs_anomalib
def test_a_terminated_fit_does_not_pass_for_a_success(lite0, bank):
    def terminate():
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        fitted(lite0, "stfpm", Disturbed(bank.features, terminate), epochs=1)
    assert ended.value.code == 128 + signal.SIGTERM


@needs_anomalib
def test_a_failed_download_is_one_message_each_time(lite0, bank, tmp_path, monkeypatch):
    """Anomalib makes the folder first, and next time would take the empty one for the textures."""
    from anomalib.models.image.draem import lightning_model

    def fail(folder, info):
        folder.mkdir(parents=True, exist_ok=True)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(lightning_model, "download_and_extract", fail)
    monkeypatch.setattr("models.methods.anomalib.wrapper.get_datasets_dir", lambda: tmp_path)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"draem needs the texture images.*dtd_dir=FOLDER"):
            fitted(lite0, "draem", bank, epochs=1)
    folder = tmp_path / "dtd"
    assert not folder.exists()
    folder.mkdir()
    (folder / "dtd-r1.0.1.tar.gz").write_bytes(b"broken off")
    with pytest.raises(ModelError, match="holds no images; delete it"):
        fitted(lite0, "draem", bank, epochs=1)


@needs_anomalib
def test_library_code_runs_seeded_silent_and_leaves_nothing_behind(capsys):
    from models.methods.anomalib.training import isolated

    before = socket.getdefaulttimeout(), logging.root.manager.disable
    terminal, drawn = sys.stderr, []
    for _ in range(2):
        with isolated(seed=4) as stderr:
            assert stderr is terminal is not sys.stderr
            sys.stdout.write("heard by nobody")
            warnings.warn("nor this", stacklevel=1)
            logging.getLogger("lightning.pytorch").warning("nor this")
            assert socket.getdefaulttimeout() < 30
            drawn.append((torch.rand(1).item(), random.random()))
    assert drawn[0] == drawn[1]
    assert capsys.readouterr() == ("", "")
    assert (socket.getdefaulttimeout(), logging.root.manager.disable) == before


@needs_anomalib
def test_models_that_compare_with_texts_are_told_the_category(lite0, monkeypatch):
    from models.methods.anomalib.wrapper import LibraryModel

    given = []

    def built(**arguments):
        given.append(arguments.get("class_name"))
        raise ModelError("enough seen")

    for words, category in (((), "metal nut"), (("class_name=bolt",), "metal nut"), ((), None)):
        recipe = LibraryModel("winclip", lite0, words)
        monkeypatch.setattr(recipe, "kind", built)
        monkeypatch.setattr(recipe, "_own_side", lambda: 240)
        monkeypatch.setattr(recipe, "normalisation", lambda: ([0.5] * 3, [0.5] * 3))
        with pytest.raises(ModelError, match="enough seen"):
            recipe.build(240, category)
        assert recipe.asks_for_category == (not words)
    assert given == ["metal nut", "bolt", None]
