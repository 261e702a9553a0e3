import dataclasses

import pytest

from models.building import build_detector
from models.method import find_method
from models.methods.simplenet.simplenet import SimpleNet, SimpleNetOptions
from pipeline.experiments import SCRIPTS, semantic_catalogue, structured_catalogue
from tests.models.banks import Stages

NAMES = ("simplenet", "simplenet_released", "nc_disc")
SIMPLENET = {name: find_method(name).options for name in NAMES}
STRUCTURED, SEMANTIC = structured_catalogue(), semantic_catalogue()
structured_experiment, semantic_experiment = STRUCTURED.compose, SEMANTIC.compose


def parsed(*words):
    return SCRIPTS["train_mvtec"].parse(words)


def test_paper_preset_has_the_papers_numbers():
    expected = {
        "adaptor": "linear",
        "adaptor_bias": False,
        "norm": None,
        "sigma": 0.015,
        "hidden": None,
        "loss": "truncated_l1",
        "threshold": 0.5,
        "learning_rate": 2e-4,
        "adaptor_learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "adaptor_weight_decay": 1e-5,
        "adaptor_optimizer": "adam",
        "batch_size": 4,
        "epochs": 160,
    }
    options = dataclasses.asdict(SIMPLENET["simplenet"])
    assert {name: options[name] for name in expected} == expected


def test_released_preset_differs_where_the_released_code_does():
    paper, released = (dataclasses.asdict(SIMPLENET[name]) for name in NAMES[:2])
    assert {name: value for name, value in released.items() if value != paper[name]} == {
        "adaptor_bias": True,
        "adaptor_optimizer": "adamw",
        "adaptor_weight_decay": 1e-2,
        "hidden": 1024,
        "last_bias": False,
        "init": "xavier",
        "batch_size": 8,
        "report_every": 4,
    }


@pytest.mark.parametrize(
    ("method", "expected"),
    [("simplenet", 4_724_737), ("nc_disc", 4_724_737), ("simplenet_released", 3_937_792)],
)
def test_parameter_counts_with_the_papers_backbone(method, expected):
    options = structured_experiment("mvtec", method).method
    assert build_detector(method, Stages(512, 1024), options).num_trainable == expected


def test_all_three_are_one_detector():
    for name in NAMES:
        assert find_method(name).detector_class() is SimpleNet
        assert type(SIMPLENET[name]) is SimpleNetOptions
    assert SIMPLENET["simplenet"] == SimpleNetOptions()
    assert SIMPLENET["nc_disc"] == SimpleNetOptions(norm=1.0)


@pytest.mark.parametrize("dataset", STRUCTURED.data_sets)
def test_only_the_released_preset_changes_the_images_of_structured_data(dataset):
    plain = structured_experiment(dataset, "noco")
    for method in ("simplenet", "nc_disc"):
        ours = structured_experiment(dataset, method)
        assert ours.layers == (2, 3)
        assert (ours.image_size, ours.crop_size) == (plain.image_size, plain.crop_size)
        assert (ours.backbone, ours.resize) == (plain.backbone, plain.resize)
    released = structured_experiment(dataset, "simplenet_released")
    whole = plain.crop_size is None  # the user's own images and the demo are never cropped
    assert (released.image_size, released.crop_size) == ((288, None) if whole else (329, 288))
    assert (released.layers, released.map_size) == ((2, 3), 288)
    assert released.backbone == plain.backbone


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("dataset", SEMANTIC.data_sets)
def test_semantic_data_keep_their_layers_and_take_larger_batches(dataset, method):
    ours, plain = semantic_experiment(dataset, method), semantic_experiment(dataset, "noco")
    assert (ours.layers, ours.backbone) == (plain.layers, plain.backbone)
    assert (ours.image_size, ours.crop_size) == (plain.image_size, plain.crop_size)
    assert ours.method == dataclasses.replace(SIMPLENET[method], batch_size=64)


def test_norm_none_on_the_command_line_turns_nc_disc_into_simplenet():
    plain, constrained = parsed("demo", "simplenet"), parsed("demo", "nc_disc")
    assert parsed("demo", "nc_disc", "--method.norm", "none").method == plain.method
    assert plain.run_folder != constrained.run_folder


POSITIVE = (
    *("norm", "sigma", "hidden", "threshold", "learning_rate", "adaptor_learning_rate"),
    *("batch_size", "epochs", "report_every"),
)


@pytest.mark.parametrize("name", [*POSITIVE, "weight_decay", "adaptor_weight_decay"])
def test_values_beyond_a_bound_are_refused_by_name(name):
    value, words = (0, "above 0") if name in POSITIVE else (-1, "0 or above")
    option = f"--method.{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{option} {value} must be {words}"):
        SimpleNetOptions(**{name: value})
