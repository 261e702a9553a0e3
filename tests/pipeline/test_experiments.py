import pytest

from pipeline.experiments import experiment_of, semantic_catalogue, structured_catalogue

STRUCTURED = structured_catalogue().compose("demo", "knn")
SEMANTIC = semantic_catalogue().compose("digits", "knn")


@pytest.mark.parametrize("experiment", [STRUCTURED, SEMANTIC])
def test_an_experiment_comes_back_from_its_configuration(experiment):
    assert experiment_of(experiment.to_json()) == experiment


@pytest.mark.parametrize(
    ("experiment", "changes", "message"),
    [
        (STRUCTURED, {"dataset": "mvtek"}, "unknown data set 'mvtek'"),
        (STRUCTURED, {"dataset": "digits"}, "unknown data set 'digits'"),
        (SEMANTIC, {"dataset": "cifar11"}, "unknown data set 'cifar11'"),
        (SEMANTIC, {"protocol": "one-vs-all"}, "protocol is 'one-vs-all', which it cannot be"),
    ],
)
def test_a_configuration_of_what_is_unknown_is_refused(experiment, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment_of(experiment.to_json() | changes)
