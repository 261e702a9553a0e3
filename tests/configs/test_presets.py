"""The presets are the papers' numbers, written out again here by hand; see each comment."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import platformdirs
import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

from configs.cache import cache_folder
from configs.experiment import Experiment
from configs.options import Role, fields_marked
from configs.prediction import EvaluateOptions
from configs.presets import ANY_MODEL
from configs.semantic import SemanticExperiment
from configs.structured import StructuredExperiment
from datasets.reading.transforms import Resize
from datasets.sets.visa import VisaOptions
from datasets.tasks.one_class import OneClassProtocol
from models.backbone.extractor import describe_stages
from models.methods.noco import NocoOptions
from pipeline.experiments import SCRIPTS, experiment_of, semantic_catalogue, structured_catalogue
from utils.features.extraction import CACHES
from utils.runs.files import SELECTS

STRUCTURED_CATALOGUE = structured_catalogue()
SEMANTIC_CATALOGUE = semantic_catalogue()
structured_experiment = STRUCTURED_CATALOGUE.compose
semantic_experiment = SEMANTIC_CATALOGUE.compose

# Of NoCo's released scripts, structured: WideResNet50 stages 1 to 3, 256 then crop 224, batch,
# epochs. MVTec is resized by OpenCV (albumentations), the other two with Lanczos.
STRUCTURED = {
    "mvtec": ("opencv_square", 16, 50),
    "mpdd": ("lanczos_shorter", 8, 50),
    "visa": ("lanczos_shorter", 8, 50),
}
# Semantic: epochs, and the weight of r, which only the CIFAR script has.
SEMANTIC = {
    "cifar10": (10, 1e3),
    "cifar100": (10, 1e3),
    "cifar100_coarse": (10, 1e3),
    "cats_vs_dogs": (10, 1e3),
    "mnist": (20, 0.0),
    "fashion_mnist": (20, 0.0),
}
# Paper and code alike for both kinds of task.
NOCO = {
    "norm": 1.0,
    "objective": "randn",
    "out_dim": None,
    "radius_init": 1e-5,
    "weight_decay": 5e-4,
    "amsgrad": True,
}
ALL = [
    catalogue.compose(dataset, method.replace(ANY_MODEL, "padim"))
    for catalogue in (STRUCTURED_CATALOGUE, SEMANTIC_CATALOGUE)
    for dataset in catalogue.data_sets
    for method in catalogue.methods
]


def names(experiment):
    return f"{experiment.dataset}-{experiment.method_name}"


def assert_options(config, expected):
    found = dataclasses.asdict(config)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("dataset", STRUCTURED)
def test_structured_presets_are_the_papers(dataset):
    resize, batch_size, epochs = STRUCTURED[dataset]
    experiment = structured_experiment(dataset, "noco")
    assert experiment.backbone == "wide_resnet50_2.tv_in1k"
    assert experiment.layers == (1, 2, 3)
    assert (experiment.image_size, experiment.crop_size) == (256, 224)
    assert (experiment.resize, experiment.map_size) == (resize, 224)
    assert (experiment.patch_size, experiment.blur_sigma) == (3, 4.0)
    published = {"loss": "distance", "nu": 1e-3, "learning_rate": 1e-4, "radius_weight": 0.0}
    sizes = {"batch_size": batch_size, "epochs": epochs}
    assert_options(experiment.method, {**NOCO, **published, **sizes})


@pytest.mark.parametrize("dataset", SEMANTIC)
def test_semantic_presets_are_the_papers(dataset):
    epochs, radius_weight = SEMANTIC[dataset]
    experiment = semantic_experiment(dataset, "noco")
    assert experiment.backbone == "resnet152.tv_in1k"
    assert experiment.layers == (4,)
    assert (experiment.image_size, experiment.crop_size) == (256, 224)
    assert (experiment.resize, experiment.protocol) == ("bilinear_shorter", "one-vs-rest")
    published = {"loss": "squared", "nu": 1.0, "learning_rate": 1e-3, "batch_size": 64}
    assert_options(
        experiment.method,
        {**NOCO, **published, "epochs": epochs, "radius_weight": radius_weight},
    )


def test_layers_are_the_stages_the_papers_name():
    wide = describe_stages("wide_resnet50_2")
    assert [wide[layer].split(", ")[1] for layer in (1, 2, 3)] == [
        "256 channels",
        "512 channels",
        "1024 channels",
    ]
    assert describe_stages("resnet152")[4] == "4 (layer4, 2048 channels, stride 32)"


@pytest.mark.parametrize("dataset", ["folder", "demo"])
def test_own_images_are_never_cropped(dataset):
    experiment = structured_experiment(dataset, "noco")
    assert experiment.crop_size is None
    assert experiment.map_size == experiment.image_size == 224


def test_defaults_that_need_no_download():
    demo, digits = structured_experiment("demo", "noco"), semantic_experiment("digits", "noco")
    for experiment in (demo, digits):
        assert experiment.backbone == "tf_efficientnet_lite0"
        assert experiment.data_root == cache_folder()
    firsts = [next(iter(script.catalogue().data_sets)) for script in SCRIPTS.values()]
    assert firsts == ["mvtec", "cifar10", "digits"]
    assert digits.method.epochs == 20


@pytest.mark.parametrize("experiment", ALL, ids=names)
def test_every_preset_is_honest_and_survives_its_config_file(experiment):
    if experiment.method_name == "ulsad_released":  # it is there for what the released code does
        assert "OPTIMISTIC" in experiment.title
    else:
        assert experiment.select != "best_test"
        assert "OPTIMISTIC" not in experiment.title
    assert experiment.weights == "auto"
    assert not experiment.skip_unreadable
    again = experiment_of(experiment.to_json())
    assert again == experiment
    assert again.run_folder == experiment.run_folder


def test_configs_and_the_code_they_configure_know_the_same_words():
    types = get_type_hints(StructuredExperiment)
    assert get_args(types["resize"]) == get_args(Resize)
    assert get_args(get_type_hints(SemanticExperiment)["protocol"]) == get_args(OneClassProtocol)
    assert get_args(types["cache"]) == CACHES
    assert get_args(get_type_hints(EvaluateOptions)["cache"]) == CACHES
    assert set(get_args(types["select"])) <= set(SELECTS)


def test_every_data_set_has_one_script():
    listed = [name for script in SCRIPTS.values() for name in script.catalogue().data_sets]
    assert sorted(listed) == sorted(
        [*STRUCTURED_CATALOGUE.data_sets, *SEMANTIC_CATALOGUE.data_sets]
    )


def test_every_option_that_does_nothing_for_a_method_is_one_of_an_experiment():
    kinds = (StructuredExperiment, SemanticExperiment)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for catalogue in (STRUCTURED_CATALOGUE, SEMANTIC_CATALOGUE):
        for name, method in catalogue.methods.items():
            assert method.ignored <= known, name


def other_value(experiment, field, types):
    """Another value that the field may have."""
    value = getattr(experiment, field.name)
    choices = get_args(types[field.name])
    if field.name == "method":
        return dataclasses.replace(value, norm=0.5)
    if field.name == "data":
        return VisaOptions(split="csv")
    if numbers := {"test_batches": 32, "tiles": 3, "tile_size": 100}.get(field.name):
        return numbers
    if isinstance(value, bool):
        return not value
    if isinstance(value, float) and 0 <= value < 1:
        return value + 0.125  # shares stay shares
    if isinstance(value, int | float):
        return value - 2 if field.name == "bit_depth" else value + 2
    if isinstance(value, Path):
        return value / "other"
    if isinstance(value, tuple):
        words = {"categories": ("other",), "grid": ("norm=1,2",)}
        return words.get(field.name, (*value, 7))
    return next((c for c in choices if isinstance(c, str) and c != value), "other")


@pytest.mark.parametrize(
    "experiment",
    [structured_experiment("visa", "noco_exact"), semantic_experiment("cifar10", "noco_exact")],
    ids=names,
)
def test_run_folder_depends_on_what_is_measured_and_not_on_how(experiment):
    types = get_type_hints(type(experiment))
    fields = {f.name: f for f in dataclasses.fields(experiment)}
    how = fields_marked(type(experiment), Role.HOW)
    harmless = {"device", "workers", "cache", "checkpoint_minutes", "output", "run", "restart"}
    assert how == harmless, "does a number depend on the new one?"
    # A grid is refused where nothing chooses from it, --online where nothing learns online.
    method = dataclasses.replace(experiment.method, prototypes=1)
    experiment = dataclasses.replace(experiment, select="synthetic", method=method)
    for field in fields.values():
        # Windows overlap where there are some.
        beside = {"tiles": 2} if field.name == "tile_overlap" else {}
        base = dataclasses.replace(experiment, **beside)
        changed = dataclasses.replace(base, **{field.name: other_value(base, field, types)})
        assert getattr(changed, field.name) != getattr(base, field.name)
        is_same = changed.digest == base.digest
        assert is_same == (field.name in how), field.name
        assert (field.name in changed.to_json()) == (field.name not in how)


def test_run_folder_is_named_by_data_method_and_backbone():
    experiment = structured_experiment("visa", "noco")
    assert experiment.run_folder.parent == Path("results/visa-noco")
    assert experiment.run_folder.name == f"wide_resnet50_2.tv_in1k-{experiment.digest}"
    named = dataclasses.replace(experiment, run="mine", output=Path("elsewhere"))
    assert named.run_folder == Path("elsewhere/visa-noco/mine")
    slashed = dataclasses.replace(experiment, backbone="hf-hub:timm/resnet18")
    assert slashed.run_folder.parent == Path("results/visa-noco")


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Experiment)])
def test_nothing_writes_a_field(field):
    experiment = structured_experiment("mvtec", "noco")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(experiment, field, getattr(experiment, field))


BAD = [
    ({"image_size": 0}, "--image-size 0 must be above 0"),
    ({"crop_size": 257}, "--crop-size 257 must lie between 1 and --image-size 256, or be none"),
    ({"crop_size": 0}, "--crop-size 0 must be above 0"),
    ({"seeds": ()}, "--seeds needs at least one"),
    ({"seeds": (0, 0)}, r"--seeds \(0, 0\) must be different and not negative"),
    ({"seeds": (-1,)}, "must be different and not negative"),
    ({"seeds": (2**32,)}, r"--seeds \(4294967296,\) must be below 2\^32"),
    ({"categories": ("a", "b", "a")}, "--categories names one twice"),
    ({"layers": ()}, "--layers needs at least one stage"),
    ({"workers": -1}, "--workers -1 must be 0 or above"),
    ({"overlays": -1}, "--overlays -1 must be 0 or above"),
    ({"extract_batch_size": 0}, "--extract-batch-size 0 must be above 0"),
    ({"run": "a/b"}, "--run 'a/b' must be a plain folder name"),
    ({"patch_size": 4}, "--patch-size 4 must be odd"),
    ({"patch_size": -1}, "--patch-size -1 must be odd and above 0"),
    ({"blur_sigma": -0.5}, r"--blur-sigma -0\.5 must be 0 or above"),
    ({"blur_sigma": float("nan")}, "--blur-sigma nan"),
    ({"blur_sigma": float("inf")}, "--blur-sigma inf"),
    ({"calibration_share": 1.0}, r"--calibration-share 1\.0 must be at least 0 and below 1"),
    ({"false_alarm_rate": 0.0}, r"--false-alarm-rate 0\.0 must be between 0 and 1"),
    ({"online": True}, "--online: noco with these options does not learn from one image"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_values_are_refused_by_their_option(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(structured_experiment("mvtec", "noco"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": 0.0}, "--method.norm 0.0 must be above 0"),
        ({"nu": -1.0}, "--method.nu -1.0 must"),
        ({"learning_rate": float("nan")}, "--method.learning-rate nan must"),
        ({"batch_size": 0}, "--method.batch-size 0 must"),
        ({"epochs": 0}, "--method.epochs 0 must"),
        ({"out_dim": 0}, "--method.out-dim 0 must be above 0"),
    ],
)
def test_bad_method_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NocoOptions(**changes)


MESSAGE = (
    r"configuration of this version|as runs write it: it sets device|--seeds|split is 'csvs'"
    "|--image-size large must be above 0"
)


def test_config_of_another_version_is_refused():
    values = structured_experiment("mvtec", "noco").to_json()
    for broken in (
        {**values, "colour": "blue"},
        {name: value for name, value in values.items() if name != "layers"},
        {**values, "method_name": "nobody"},
        {**values, "method": {**values["method"], "momentum": 0.9}},
        {**values, "seeds": [0, 0]},
        {**values, "image_size": "large"},
        {**values, "data": {"split": "csv"}},  # VisA's option
        {**values, "dataset": "visa", "data": {"split": "csvs"}},
        {**values, "device": "cpu"},
        {},
    ):
        with pytest.raises(ValueError, match=MESSAGE):
            experiment_of(broken)


def test_semantic_changes_do_not_leak_into_structured_presets():
    before = structured_experiment("mvtec", "noco").method
    semantic_experiment("cifar10", "noco")
    assert structured_experiment("mvtec", "noco").method == before == NocoOptions()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NOCO_CACHE", "elsewhere")
    assert cache_folder() == Path("elsewhere")
    monkeypatch.delenv("NOCO_CACHE")
    monkeypatch.setattr(platformdirs, "PlatformDirs", Unix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "noco"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/noco"
    monkeypatch.setattr(platformdirs, "PlatformDirs", MacOS)
    assert cache_folder() == Path.home() / "Library/Caches/noco"
