import dataclasses
import json
import re
from pathlib import Path

import pytest

from configs.options import DataOptions
from configs.presets import ANY_MODEL
from datasets.sets.visa import VisaOptions
from pipeline.experiments import SCRIPTS, semantic_catalogue, structured_catalogue

STRUCTURED = structured_catalogue()
SEMANTIC = semantic_catalogue()


def parsed(*words, prog="train_mvtec"):
    return SCRIPTS[prog].parse(words)


def methods_of(prog):
    """Method words; a model stands for those of its library."""
    return [name.replace(ANY_MODEL, "padim") for name in SCRIPTS[prog].catalogue().methods]


def refused(capsys, *words, **options):
    """The message, on one line, with which the words end the program with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        parsed(*words, **options)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return on_one_line(printed.err)


def on_one_line(text):
    """Text without the frames and line breaks of a terminal."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def test_no_words_give_the_first_preset_of_each_script():
    assert parsed() == STRUCTURED.compose("mvtec", "noco")
    assert parsed(prog="train_cifar10") == SEMANTIC.compose("cifar10", "noco")
    assert parsed(prog="train_mnist") == SEMANTIC.compose("digits", "noco")


@pytest.mark.parametrize("method", STRUCTURED.methods)
@pytest.mark.parametrize("dataset", STRUCTURED.data_sets)
def test_every_pair_is_two_words(dataset, method):
    assert parsed(dataset, method) == STRUCTURED.compose(dataset, method)


def test_a_method_alone_takes_the_first_data_set():
    assert parsed("noco") == parsed("mvtec", "noco")
    assert parsed("noco", prog="train_mnist").dataset == "digits"


@pytest.mark.parametrize(
    "words",
    [
        "visa --data-root X",
        "--data-root X visa",
        "--data-root=X visa",
        "--data_root X visa",
        "visa noco --data-root X",
        "visa --data-root X noco",
        "--data-root X visa noco",
        "--data-root X -- visa",
    ],
)
def test_words_may_stand_anywhere(words):
    expected = dataclasses.replace(STRUCTURED.compose("visa", "noco"), data_root=Path("X"))
    assert parsed(*words.split()) == expected


def test_words_after_a_switch_are_not_its_value():
    for switch, value in (("--skip-unreadable", True), ("--no-skip-unreadable", False)):
        experiment = parsed(switch, "visa")
        assert (experiment.dataset, experiment.skip_unreadable) == ("visa", value)
    for switch, value in (("--method.amsgrad", True), ("--method.no-amsgrad", False)):
        experiment = parsed(switch, "visa", "noco")
        assert (experiment.dataset, experiment.method.amsgrad) == ("visa", value)
    assert parsed("--restart", "--save-maps", "folder", "noco").dataset == "folder"


def test_words_after_a_list_belong_to_the_list_until_the_next_option():
    experiment = parsed("--categories", "screw", "visa")
    assert (experiment.dataset, experiment.categories) == ("mvtec", ("screw", "visa"))
    experiment = parsed(
        "--categories", "candle", "pcb1", "--seeds", "0", "1", "--device=cpu", "visa"
    )
    assert (experiment.dataset, experiment.categories) == ("visa", ("candle", "pcb1"))
    assert (experiment.seeds, experiment.device) == ((0, 1), "cpu")
    experiment = parsed("--categories", "candle", "--", "visa")
    assert (experiment.dataset, experiment.categories) == ("visa", ("candle",))
    assert parsed("--layers", "2", "3", "--skip-unreadable", "mpdd").layers == (2, 3)


def test_an_option_of_one_value_leaves_the_rest():
    experiment = parsed("--crop-size", "none", "visa")
    assert (experiment.dataset, experiment.crop_size, experiment.map_size) == ("visa", None, 256)
    experiment = parsed("--method.objective", "mean", "visa", "--method.norm", "8", "noco")
    assert (experiment.method.objective, experiment.method.norm) == ("mean", 8.0)
    # A value may be called like a data set.
    experiment = parsed("--run", "visa", "mpdd")
    assert (experiment.dataset, experiment.run) == ("mpdd", "visa")


def test_optional_integers():
    assert parsed("--crop-size", "NONE").crop_size is None
    assert parsed("--crop-size", "192").crop_size == 192
    assert parsed("--method.out-dim", "64").method.out_dim == 64
    assert parsed("--method.out-dim", "none", "noco").method.out_dim is None


def test_options_change_one_field_of_the_preset():
    experiment = parsed("mpdd", "--method.learning-rate", "3e-4")
    assert experiment.method.learning_rate == 3e-4
    assert experiment.method.batch_size == 8
    method = dataclasses.replace(experiment.method, learning_rate=1e-4)
    assert dataclasses.replace(experiment, method=method) == STRUCTURED.compose("mpdd", "noco")


@pytest.mark.parametrize("prog", SCRIPTS)
def test_help_names_every_option_and_its_default(prog, capsys):
    for word in ("--help", "-h"):
        with pytest.raises(SystemExit) as exit_:
            parsed(word, prog=prog)
        assert exit_.value.code == 0
    text = on_one_line(capsys.readouterr().out)
    catalogue = SCRIPTS[prog].catalogue()
    datasets = list(catalogue.data_sets)
    default = catalogue.compose(datasets[0], "noco")
    assert f"DATASET: {', '.join(datasets)} (default {datasets[0]})" in text
    for field in dataclasses.fields(default):
        if field.name not in {"dataset", "method_name", "data", "method"}:
            assert f"--{field.name.replace('_', '-')}" in text
    for field in dataclasses.fields(default.method):
        assert f"--method.{field.name.replace('_', '-')}" in text
    assert "--dataset " not in text


def test_help_shows_the_defaults_of_the_pair_asked_for(capsys):
    for words in (("visa", "noco", "--help"), ("--help", "visa")):
        with pytest.raises(SystemExit) as exit_:
            parsed(*words)
        assert exit_.value.code == 0
        text = on_one_line(capsys.readouterr().out)
        assert "Defaults below are those of visa noco" in text
        assert "--method.batch-size INT" in text
        assert "(default: lanczos_shorter)" in text


LEARNS_ONLINE = (
    "--online: noco_exact with these options does not learn from one image at a time.* noco_cf and "
    "noco_exact do, with a --method.feature-norm that is not std"
)
GRID = "--select synthetic --grid"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "mvtecc",
            r"unknown data set 'mvtecc'; did you mean mvtec or mvtec_loco\? \(known: mvtec, btad",
        ),
        ("zzz", r"unknown data set 'zzz' \(known: mvtec, btad, demo"),
        ("visa nocoo", r"unknown method 'nocoo'; did you mean noco\b.*\? \(known: noco"),
        ("visa panda", "unknown method 'panda'"),  # of the other kind of task
        ("anomalib", "unknown data set 'anomalib'"),
        ("visa anomalib:", "unknown method 'anomalib:'"),
        ("visa noco:x", "unknown method 'noco:x'"),
        ("visa anomalib:padim --method.model-options n_features", "'n_features' must be KEY=VALUE"),
        ("noco visa", "unexpected word 'visa' after data set and method"),
        ("visa noco more", "unexpected word 'more' after data set and method"),
        ("--epochz 3", "Unrecognized options: --epochz"),
        ("--method.epoch 3", r"Unrecognized options: --method\.epoch\b.*--method\.epochs INT"),
        ("--dataset visa", "Unrecognized options: --dataset"),
        ("--method-name noco", "Unrecognized options: --method-name"),
        ("--crop-size half", "Error parsing --crop-size: .*'half'"),
        ("--crop-size", "Missing value for argument '--crop-size'"),
        ("--seeds 0 0", r"--seeds \(0, 0\) must be different and not negative"),
        ("--seeds", "--seeds needs at least one seed"),
        ("--seeds a", "Error parsing --seeds"),
        ("--layers 1 2 visa", "Error parsing --layers: .*'visa'"),
        ("--precision fp8", "invalid choice 'fp8' for argument '--precision'"),
        ("--select best", "invalid choice 'best' for argument '--select'"),
        ("--method.epochs 0", "--method.epochs 0 must be above 0"),
        ("--method.objective zeros", "invalid choice 'zeros'"),
        ("--method.amsgrad False", "False"),
        ("--image-size 2.5", "Error parsing --image-size"),
        ("--from-run", "--from-run needs a value"),
        ("--from-run nowhere", "--from-run nowhere: .*No such file"),
        ("visa --from-run nowhere", "--from-run brings its own data set and method"),
        ("noco_exact --method.prototypes 2 --online", LEARNS_ONLINE),
        ("noco_exact --method.prototypes 1 --method.feature-norm std --online", LEARNS_ONLINE),
        ("visa stpm --patch-size 3", "--patch-size does nothing for stpm; leave it out"),
        ("visa stpm --precision bf16", "--precision does nothing for stpm; leave it out"),
        ("visa anomalib:padim --blur-sigma 2", "--blur-sigma does nothing for anomalib:padim;"),
        ("mvtec --data.split csv", "Unrecognized options: --data.split"),
        ("visa --data.split last99", "invalid choice 'last99' for argument '--data.split'"),
        (f"mahalanobis {GRID} shrinkage=none,2", "--method.shrinkage 2.0 must be in 0 to 1"),
        (f"mahalanobis {GRID} shrinkage=none,none", "an option or value stands twice"),
        (f"padim {GRID} dims=half", "--grid 'dims=half': invalid literal for int"),
        (f"padim {GRID} regularization=none", "could not convert string to float: 'none'"),
        (f"noco_exact {GRID} time=1,2", "--grid 'time=1,2': only numbers and words can be"),
        (f"noco_exact {GRID} loss=cubed", "'loss=cubed': cubed is none of distance, squared"),
        (f"anomalib:padim {GRID} model=padim,cfa", "with an option of --method"),
        ("mahalanobis --grid shrinkage=none,0.1", "--grid is what --select synthetic chooses from"),
    ],
)
def test_bad_words_are_named(words, message, capsys):
    text = refused(capsys, *words.split())
    assert re.search(message, text), text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("prog", "words", "message"),
    [
        ("train_cifar10", "mnist", "train_cifar10.py: unknown data set 'mnist'.* cats_vs_dogs"),
        ("train_cifar10", "cifar10 stpm", "unknown method 'stpm'"),
        (
            "train_cifar10",
            "deep_svdd --backbone resnet18",
            "--backbone does nothing for deep_svdd;",
        ),
        ("train_mnist", "deep_svdd --weights random", "--weights does nothing for deep_svdd;"),
        ("train_cifar10", "panda --precision bf16", "--precision does nothing for panda;"),
    ],
)
def test_bad_words_of_the_semantic_scripts_are_named(prog, words, message, capsys):
    assert re.search(message, refused(capsys, *words.split(), prog=prog))


def write_run(folder, experiment):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(experiment.to_json()))
    return str(folder)


@pytest.mark.parametrize(
    ("prog", "method"), [(prog, name) for prog in SCRIPTS for name in methods_of(prog)]
)
def test_from_run_is_the_same_measurement(tmp_path, prog, method):
    for dataset in SCRIPTS[prog].catalogue().data_sets:
        words = (dataset, method, "--seeds", "3", "4", "--categories", "a", "--image-size", "300")
        first = parsed(*words, "--crop-size", "none", "--workers", "5", prog=prog)
        run = write_run(tmp_path / dataset, first)
        again = parsed("--from-run", run, prog=prog)
        assert again.to_json() == first.to_json()
        assert again.digest == first.digest
        assert type(again.method) is type(first.method)


def test_from_run_takes_further_options(tmp_path):
    run = write_run(tmp_path, STRUCTURED.compose("visa", "noco"))
    again = parsed("--method.norm", "8", "--from-run", run, "--seeds", "7")
    assert (again.dataset, again.method.norm, again.seeds) == ("visa", 8.0, (7,))
    assert again.method.batch_size == 8
    assert parsed(f"--from-run={run}") == STRUCTURED.compose("visa", "noco")


def test_run_of_the_other_kind_of_task_is_refused(tmp_path, capsys):
    run = write_run(tmp_path, SEMANTIC.compose("cifar10", "noco"))
    assert "unknown data set 'cifar10'" in refused(capsys, "--from-run", run)
    run = write_run(tmp_path, SEMANTIC.compose("folder", "noco"))  # a name that both kinds have
    assert "a run on semantic data, which another script makes" in refused(
        capsys, "--from-run", run
    )
    run = write_run(tmp_path, STRUCTURED.compose("visa", "noco"))
    text = refused(capsys, "--from-run", run, prog="train_cifar10")
    assert "unknown data set 'visa'" in text


def test_a_librarys_model_is_named_after_a_colon(tmp_path):
    experiment = parsed("visa", "anomalib:patchcore", "--method.epochs", "2")
    assert experiment.method_name == "anomalib:patchcore"
    assert (experiment.method.model, experiment.method.epochs) == ("patchcore", 2)
    assert experiment.run_folder.parent.name == "visa-anomalib-patchcore"
    assert parsed("anomalib:padim").dataset == "mvtec"
    assert parsed("--from-run", write_run(tmp_path, experiment)) == experiment


def test_options_of_a_data_set():
    assert parsed("visa", "--data.split", "csv").data == VisaOptions(split="csv")
    assert parsed("--data.split=last100", "visa").data.split == "last100"
    assert parsed("mvtec").data == DataOptions()


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_what_has_no_synthetic_anomalies_is_not_chosen_by_them(dataset, tmp_path, capsys):
    words = (dataset, "noco_exact")
    assert parsed(*words, prog="train_mnist").select == "last"
    text = refused(capsys, *words, "--select", "synthetic", prog="train_mnist")
    assert "--select synthetic makes semantic anomalies by rotation" in text
    config = {**SEMANTIC.compose(*words).to_json(), "select": "synthetic"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = refused(capsys, "--from-run", str(tmp_path), prog="train_mnist")
    assert "--select synthetic makes semantic anomalies by rotation" in text
    assert parsed("fashion_mnist", "noco_exact", prog="train_mnist").select == "synthetic"


@pytest.mark.parametrize(
    ("words", "points"),
    [
        ("mahalanobis --grid shrinkage=none,0.1", [{"shrinkage": None}, {"shrinkage": 0.1}]),
        ("padim --grid dims=50,none", [{"dims": 50}, {"dims": None}]),
        ("nc_disc --grid norm=none,2 hidden=8", [{"norm": n, "hidden": 8} for n in (None, 2.0)]),
    ],
)
def test_a_grid_may_hold_none(words, points):
    method, *rest = words.split()
    assert parsed("demo", method, "--select", "synthetic", *rest).candidates() == points
