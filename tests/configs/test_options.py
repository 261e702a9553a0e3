"""What marks at the fields say: values that are allowed, options that count, roles."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import pytest

from configs import options
from configs.experiment import Experiment
from configs.options import (
    Beside,
    Bound,
    How,
    MethodOptions,
    OnlyWith,
    OptionalInt,
    PositiveInt,
    Role,
    Since,
    fields_marked,
    marks_of,
)
from configs.semantic import SemanticExperiment
from configs.structured import StructuredExperiment
from pipeline.experiments import SCRIPTS, semantic_catalogue, structured_catalogue

NAN, INF = float("nan"), float("inf")
BOUNDS = {
    "Positive": ("above 0", (1e-300, 7.0), (0.0, -1.0, NAN, INF)),
    "PositiveInt": ("above 0", (1,), (0, -1)),
    "NotNegative": ("0 or above", (0.0, 2.0), (-1e-300, NAN, INF)),
    "NotNegativeInt": ("0 or above", (0, 3), (-1,)),
    "Share": ("above 0 and at most 1", (1e-9, 1), (0.0, 1.001, NAN)),
    "Fraction": ("at least 0 and below 1", (0, 0.999), (1.0, -0.001, NAN)),
    "Between0And1": ("between 0 and 1", (0.001, 0.999), (0.0, 1.0, NAN)),
    "BitDepth": ("9 to 16", (9, 16), (8, 17)),
    "Odd": ("odd and above 0", (1, 3), (2, 0, -1)),
    "OptionalInt": ("above 0", (None, 1), (0, -1)),
    "OptionalFloat": ("above 0", (None, 0.1), (0.0, NAN, INF)),
    "OptionalFraction": ("in 0 to 1", (None, 0.0, 1.0), (-0.1, 1.1, NAN)),
    "OptionalNotNegative": ("0 or above", (None, 0.0, 2.5), (-0.1, NAN, INF)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_values_beyond_a_bound_are_refused_by_their_option(name):
    words, good, bad = BOUNDS[name]
    fields = [("some_rate", getattr(options, name))]
    kind = dataclasses.make_dataclass(
        "SomeOptions", fields, bases=(MethodOptions,), frozen=True, kw_only=True
    )
    for value in good:
        assert kind(some_rate=value).some_rate == value
    for value in bad:
        with pytest.raises(ValueError, match=f"^--method.some-rate {value} must be {words}$"):
            kind(some_rate=value)


def test_every_type_with_a_bound_is_tried():
    marks = {name: getattr(value, "__metadata__", ()) for name, value in vars(options).items()}
    assert {n for n, ms in marks.items() if any(isinstance(m, Bound) for m in ms)} == BOUNDS.keys()


@dataclass(frozen=True)
class Marked:
    plain: int = 0
    device: How[PositiveInt] = 1
    drawn: Annotated[Beside[OptionalInt], Since.LATER] = None


@dataclass(frozen=True)
class More(Marked):
    place: How[str] = ""


def test_fields_are_found_by_their_marks():
    assert fields_marked(Marked, Role.HOW) == {"device"}
    assert fields_marked(More, Role.HOW) == {"device", "place"}
    assert fields_marked(More, Role.BESIDE) == fields_marked(More, Since.LATER) == {"drawn"}
    assert fields_marked(More, Role.PART) == frozenset()
    assert marks_of(Marked, "plain") == ()
    # A role takes nothing away from what the type under it says.
    bounds = [mark.words for mark in marks_of(Marked, "device") if isinstance(mark, Bound)]
    assert bounds == ["above 0"]


def test_roles_of_the_experiments_options():
    assert fields_marked(Experiment, Role.PART) == {"categories", "seeds"}
    beside = {
        *("compile", "monitor_test", "online", "skip_unreadable", "false_alarm_rate"),
        *("deterministic", "overlays", "extract_batch_size"),
    }
    assert fields_marked(SemanticExperiment, Role.BESIDE) == beside
    assert fields_marked(StructuredExperiment, Role.BESIDE) == {*beside, "save_maps"}
    later = {
        *("calibration_share", "false_alarm_rate", "data", "bit_depth", "max_pixels"),
        *("scale_on", "test_batches", "protocol", "deterministic"),
        *("tiles", "tile_size", "tile_overlap"),
    }
    assert fields_marked(StructuredExperiment, Since.LATER) == later
    for field in dataclasses.fields(StructuredExperiment):
        roles = [m for m in marks_of(StructuredExperiment, field.name) if isinstance(m, Role)]
        assert len(roles) <= 1, field.name


def test_what_came_later_is_in_the_config_only_where_it_is_set():
    experiment = structured_catalogue().compose("visa", "knn")
    assert not {"calibration_share", "false_alarm_rate", "data"} & experiment.to_json().keys()
    split = dataclasses.replace(experiment.data, split="csv")
    changed = dataclasses.replace(experiment, data=split, calibration_share=0.2)
    config = changed.to_json()
    assert (config["data"], config["calibration_share"]) == ({"split": "csv"}, 0.2)
    assert "false_alarm_rate" not in config


# Data set and method, what makes the second option do nothing, and what it needs.
IDLE = [
    *(
        ("demo simplenet", "adaptor none", option, "adaptor is linear or mlp")
        for option in (
            *("adaptor-bias", "adaptor-learning-rate 1", "adaptor-weight-decay 1"),
            "adaptor-optimizer adamw",
        )
    ),
    ("demo simplenet", "loss cross_entropy", "threshold 1", "loss is truncated_l1"),
    ("demo noco_exact", "prototypes 1", "nearest 2", "prototypes is above 1"),
    ("demo noco_exact", "prototypes 1", "kmeans-positions 9", "prototypes is above 1"),
    *(
        ("demo noco_cf", "stages joined", option, "stages is apart")
        for option in ("averaged 2", "context 2", "context-weight 1")
    ),
    *(
        ("demo noco_cf", "prototypes 1", option, "prototypes is above 1")
        for option in ("nearest 2", "shrinkage 1", "parents 2")
    ),
    *(
        ("demo ulsad", "branches local", option, "branches is both or global")
        for option in (
            *("bottleneck 9", "tie direct", "detach-global"),
            *("attention-direction 1", "global-direction 1"),
        )
    ),
    ("demo ulsad", "branches global", "local-direction 1", "branches is both or local"),
    ("demo pni", "released", "sharpness 2", "released is off"),
    *(
        ("demo pni", "mlp-layers 1", option, "mlp-layers is above 1")
        for option in ("mlp-width 9", "dropout 0")
    ),
    ("demo uniad", "jitter 0", "jitter-probability 0.5", "jitter is above 0"),
    *(
        ("demo mspba", "cluster-weight 0", option, "cluster-weight is above 0")
        for option in ("clusters 9", "cluster-patches 9", "cluster-start 2", "cluster-every 2")
    ),
    *((f"demo {name}", "no-crops", "stride 9", "crops is on") for name in ("autoencoder", "vae")),
    *(
        ("demo mnad", "no-memory", option, "memory is on")
        for option in ("items 9", "compactness 1", "separateness 1", "mixing 0.5")
    ),
    ("demo draem", "no-sspcab", "sspcab-weight 1", "sspcab is on"),
    *(
        ("demo cutpaste", "representation image", option, "representation is patch")
        for option in ("crop 9", "window 9", "stride 9", "spread 9", "density per_position")
    ),
    ("demo cutpaste", "representation patch", "shift 0.1", "representation is image"),
    *(
        ("demo ddad", "adaptation-epochs 0", option, "adaptation-epochs is above 0")
        for option in (
            *("adaptation-learning-rate 1", "adaptation-conditioning 1"),
            "adaptation-weight 1",
        )
    ),
    *(
        ("demo saa", "rules saa", option, "rules is saa_plus")
        for option in (
            *("text-threshold 0.2", "num-objects 2", "area-ratio 0.5", "regions 3"),
            *("saliency-weight 1", "saliency-size 128"),
        )
    ),
    ("cifar10 panda_ewc", "fisher-file f.pth", "fisher-images 9", "fisher-file is none"),
    ("mnist deep_svdd", "objective one_class", "nu 0.2", "objective is soft_boundary"),
    ("mnist deep_svdd", "objective one_class", "warmup-epochs 2", "objective is soft_boundary"),
    ("mnist deep_svdd", "pretrain-epochs 0", "pretrain-milestone 2", "pretrain-epochs is above 0"),
    (
        "mnist deep_svdd",
        "pretrain-epochs 0",
        "pretrain-weight-decay 0",
        "pretrain-epochs is above 0",
    ),
]
SCRIPT_OF = {"demo": "train_mvtec", "cifar10": "train_cifar10", "mnist": "train_mnist"}


@pytest.mark.parametrize(("pair", "other", "option", "needed"), IDLE)
def test_an_option_that_does_nothing_with_another_is_refused(pair, other, option, needed, capsys):
    words = f"{pair} --method.{option} --method.{other}".split()
    script = SCRIPT_OF[words[0]]
    with pytest.raises(SystemExit) as exit_:
        SCRIPTS[script].parse(words)
    assert exit_.value.code == 2
    name = option.partition(" ")[0]
    message = f"--method.{name} does nothing unless --method.{needed}; leave it out"
    assert capsys.readouterr().err == f"error: {script}.py: {message}\n"


def test_every_option_that_needs_another_is_tried():
    methods = {**structured_catalogue().methods, **semantic_catalogue().methods}
    kinds = {name: type(method.options) for name, method in methods.items()}
    marked = set()
    for kind in kinds.values():
        for field in dataclasses.fields(kind):
            needs = [mark for mark in marks_of(kind, field.name) if isinstance(mark, OnlyWith)]
            assert all(mark.option in kind.__dataclass_fields__ for mark in needs)
            marked |= {(kind, field.name) for _ in needs}
    tried = {(kinds[one[0].split()[1]], one[2].split()[0].replace("-", "_")) for one in IDLE}
    assert tried == marked


def idle(experiment, **method):
    changed = dataclasses.replace(experiment.method, **method)
    changed = dataclasses.replace(experiment, method=changed)
    return structured_catalogue().idle_options(changed, experiment)


def test_an_option_counts_with_the_value_that_it_needs_or_as_the_preset_has_it():
    simplenet = structured_catalogue().compose("demo", "simplenet")
    assert idle(simplenet, adaptor="mlp", adaptor_bias=True, threshold=1.0) == []
    assert idle(simplenet, adaptor="none", loss="cross_entropy") == []
    assert idle(simplenet, adaptor="none", adaptor_bias=True, adaptor_learning_rate=1.0) == [
        ("--method.adaptor-bias", "unless --method.adaptor is linear or mlp"),
        ("--method.adaptor-learning-rate", "unless --method.adaptor is linear or mlp"),
    ]
    # The preset sets a bias, which no user did.
    released = structured_catalogue().compose("demo", "simplenet_released")
    assert released.method.adaptor_bias
    assert idle(released, adaptor="none") == []
