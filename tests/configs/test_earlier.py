"""Runs of earlier versions are read: earlier.json has configurations as such a version wrote them.

It had one set of options for noco and noco_cf, with the solver among them, one for panda and
panda_ewc, with the variant, and `visa_split` for every structured data set.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from configs.earlier import upgraded
from configs.presets import ANY_MODEL
from datasets.sets.visa import VisaOptions
from pipeline.experiments import experiment_of, semantic_catalogue, structured_catalogue

EARLIER = json.loads(Path(__file__).with_name("earlier.json").read_text(encoding="utf-8"))
STRUCTURED, SEMANTIC = structured_catalogue(), semantic_catalogue()


def with_method(experiment, **options):
    return replace(experiment, method=replace(experiment.method, **options))


# Written out where the presets of the two versions have another method.
EXPECTED = {
    "noco": STRUCTURED.compose("mvtec", "noco"),
    "noco, solver closed_form": with_method(
        replace(STRUCTURED.compose("mpdd", "noco_exact"), layers=(1, 2, 3), select="last"),
        prototypes=8,
        time=(1e2, 1e4),
    ),
    # Its name, and its centres, until noco_cf became local.
    "noco_cf": with_method(STRUCTURED.compose("mvtec", "noco_exact"), prototypes=32),
    "noco_cf, solver sgd": with_method(
        SEMANTIC.compose("cifar10", "noco"),
        **{"feature_norm": "l2", "nu": 1e-3, "learning_rate": 1e-4},
        **{"radius_weight": 0.0, "epochs": 50},
    ),
    # Mixed precision was on until someone would have measured it.
    "panda": with_method(SEMANTIC.compose("cifar10", "panda"), mixed_precision=True),
    "panda, variant ewc": with_method(
        SEMANTIC.compose("cifar10", "panda_ewc"),
        **{"epochs": 15, "fisher_images": 200, "mixed_precision": True},
    ),
    "panda_ewc": with_method(SEMANTIC.compose("cifar10", "panda_ewc"), mixed_precision=True),
    "visa, visa_split csv": replace(
        STRUCTURED.compose("visa", "knn"), data=VisaOptions(split="csv")
    ),
    "visa, visa_split auto": STRUCTURED.compose("visa", "knn"),
    "mvtec, visa_split csv": STRUCTURED.compose("mvtec", "knn"),  # which did nothing there
    "anomalib:padim": with_method(
        STRUCTURED.compose("mvtec", "anomalib:padim"), model_options=("n_features=50",)
    ),
    "mean_shifted": with_method(SEMANTIC.compose("cifar10", "mean_shifted"), mixed_precision=True),
}


@pytest.mark.parametrize("name", EARLIER)
def test_a_configuration_of_an_earlier_version_is_read(name):
    config = json.dumps(EARLIER[name])
    assert experiment_of(upgraded(EARLIER[name])) == EXPECTED[name]
    assert json.dumps(EARLIER[name]) == config, "upgraded changed what it was given"


@pytest.mark.parametrize("catalogue", [STRUCTURED, SEMANTIC], ids=lambda one: one.kind.task)
def test_a_configuration_of_this_version_stays_as_it_is(catalogue):
    for dataset in catalogue.data_sets:
        for method in catalogue.methods:
            preset = catalogue.compose(dataset, method.replace(ANY_MODEL, "padim"))
            config = replace(preset, calibration_share=0.2, seeds=(3, 4)).to_json()
            assert upgraded(config) == config
    config = EXPECTED["visa, visa_split csv"].to_json()
    assert upgraded(config) == config


@pytest.mark.parametrize(
    "config", [{}, {"method": None}, {"method": [], "method_name": "noco"}, {"method_name": 3}]
)
def test_what_is_no_configuration_is_left_alone(config):
    assert upgraded(config) == config
