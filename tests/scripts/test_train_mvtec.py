"""The structured script end to end, on small images whose defects only a trained head finds."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from datasets.reading.images import read_image, read_mask
from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.methods.noco import Noco, NocoOptions
from tests.datasets.trees import draw_mvtec_category, draw_visa_category, texture, write_visa_csv
from tests.datasets.trees import save as save_image
from train_mvtec import main
from utils.evaluation.smoothing import upsample_and_blur
from utils.metrics.metrics import metric_names
from utils.runs.files import read_rows
from utils.runs.run import Run

SIZE = 64
SIDE = 24  # of a defect
CATEGORIES = ("cloth", "wood")
TABLES = ("table.md", "table.tex", "table.csv", "table.json")
QUICK = (
    *("--backbone", "tf_efficientnet_lite0", "--image-size", str(SIZE), "--crop-size", "none"),
    *("--method.epochs", "3", "--method.batch-size", "4", "--method.learning-rate", "1e-3"),
    *("--workers", "0", "--overlays", "1"),
)


def draw_turned_category(root, name, seed, *, num_train=8, num_test=4, place=(12, 28)):
    """Draws a category in MVTec's layout whose defects are turned or flattened squares.

    Both are plain to see and both make features shorter, so that an untrained projector scores
    them lowest: image AUROC near 0.
    """
    rng = np.random.default_rng(seed)
    folder = root / name
    for split, count in (("train", num_train), ("test", num_test)):
        for index in range(count):
            save_image(folder / split / f"good/{index:03d}.png", texture(rng, (SIZE, SIZE)))
    for defect in ("turned", "flat"):
        for index in range(num_test):
            image = texture(rng, (SIZE, SIZE))
            top, left = rng.integers(*place, 2)
            square = slice(top, top + SIDE), slice(left, left + SIDE)
            turned, flat = np.rot90(image[square]), image[square].mean(axis=(0, 1))
            image[square] = turned if defect == "turned" else flat
            mask = np.zeros((SIZE, SIZE), dtype=bool)
            mask[square] = True
            save_image(folder / f"test/{defect}/{index:03d}.png", image)
            save_image(folder / f"ground_truth/{defect}/{index:03d}_mask.png", mask)
    return folder


def train(root, output, *options, dataset="folder"):
    """Run the script and return its run folder."""
    arguments = [dataset, "--data-root", str(root), "--output", str(output), *QUICK, *options]
    return main(arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for seed, category in enumerate(CATEGORIES):
        draw_turned_category(root, category, seed)
    return root


@pytest.fixture(scope="module")
def full(root, tmp_path_factory):
    """The undisturbed run of both categories and two seeds."""
    return train(root, tmp_path_factory.mktemp("full"), "--seeds", "0", "1", "--save-maps")


def measured(folder):
    """The rows of results.csv without the time they took."""
    return [
        {name: value for name, value in row.items() if not name.endswith("_seconds")}
        for row in read_rows(folder / "results.csv")
    ]


def table_lines(folder):
    """category -> column -> value, of table.csv."""
    with (folder / "table.csv").open(newline="") as file:
        return {line.pop("category"): line for line in csv.DictReader(file)}


def same_arrays(first, second):
    with np.load(first) as one, np.load(second) as two:
        assert one.files == two.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name])


def same_heads(first, second, category, seed):
    # Not by bytes: safetensors writes its metadata in any order.
    one, two = (Run.read(folder).load_head(category, seed) for folder in (first, second))
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(tensor, two[0][name]) for name, tensor in one[0].items())


def test_plain_defects_are_found(full):
    rows = read_rows(full / "results.csv")
    assert [(row["category"], row["seed"]) for row in rows] == [
        (category, seed) for category in CATEGORIES for seed in (0, 1)
    ]
    for row in rows:
        assert row["image_auroc"] > 0.9
        assert row["pixel_auroc"] > 0.9
        assert row["aupro"] > 0.8
        assert (row["num_train"], row["num_test"]) == (8, 12)
        assert (row["step"], row["undefined"]) == (3, "")
        assert row["trainable"] == 176 * 177 + 1


def test_a_head_that_learns_nothing_fails(root, tmp_path):
    """The claim above is one about training: with no learning the same images are missed."""
    folder = train(root, tmp_path, "--method.learning-rate", "1e-12", "--overlays", "0")
    for row in read_rows(folder / "results.csv"):
        assert row["image_auroc"] < 0.5
    assert not (folder / "overlays").exists()


def test_every_file_of_the_run_is_there_and_readable(full, root):
    assert full.parent.name == "folder-noco"
    config = json.loads((full / "config.json").read_text())
    assert config["backbone"] == "tf_efficientnet_lite0"
    assert config["method"]["epochs"] == 3
    assert config["crop_size"] is None
    environment = json.loads((full / "environment.json").read_text())
    assert environment["command"].startswith("train_mvtec.py folder --data-root")
    assert environment["device"] in ("cpu", "cuda")

    run = Run.read(full)
    for category in CATEGORIES:
        for seed in (0, 1):
            scores = run.load_scores(category, seed)
            assert len(scores["path"]) == 12
            assert scores["map"].shape == (12, SIZE, SIZE)
            assert set(scores["defect"]) == {"good", "turned", "flat"}
            state, metadata = run.load_head(category, seed)
            assert state["projector.weight"].shape == (176, 176)
            assert metadata["category"] == category
        pictures = sorted((full / "overlays" / f"{category}-seed0").glob("*.png"))
        assert pictures
        for picture in pictures:
            with Image.open(picture) as image:
                image.load()
                assert min(image.size) > 50
        assert not (full / "overlays" / f"{category}-seed1").exists()

    lines = [json.loads(line) for line in (full / "metrics.jsonl").read_text().splitlines()]
    for category in CATEGORIES:
        for seed in (0, 1):
            events = [x for x in lines if (x["category"], x["seed"]) == (category, seed)]
            assert [x["event"] for x in events] == ["data", "step", "step", "step"]
            losses = [x["loss"] for x in events[1:]]
            assert losses == sorted(losses, reverse=True)
    for name in TABLES:
        text = (full / name).read_text()
        assert all(category in text for category in (*CATEGORIES, "mean"))
    assert "n = 2 seeds (0, 1)" in (full / "table.md").read_text()
    assert not list(full.rglob("*.tmp"))


def test_rows_are_the_metrics_of_the_saved_scores(full, root):
    for row in read_rows(full / "results.csv"):
        scores = Run.read(full).load_scores(row["category"], row["seed"])
        assert scores["label"].tolist() == [int("good" not in path) for path in scores["path"]]
        np.testing.assert_array_equal(scores["score"], scores["map"].max(axis=(1, 2)))
        auroc = roc_auc_score(scores["label"], scores["score"])
        assert row["image_auroc"] == pytest.approx(auroc, abs=1e-9)
        masks = np.zeros(scores["map"].shape, dtype=bool)
        for mask, path, defect in zip(masks, scores["path"], scores["defect"], strict=True):
            if defect != "good":
                truth = root / row["category"] / "ground_truth" / defect
                mask[:] = read_mask(truth / f"{path[-len('000.png') : -len('.png')]}_mask.png")
        pixel_auroc = roc_auc_score(masks.ravel(), scores["map"].ravel())
        assert row["pixel_auroc"] == pytest.approx(pixel_auroc, abs=1e-9)


def test_table_is_the_mean_of_the_rows(full):
    rows, table = read_rows(full / "results.csv"), table_lines(full)
    for category in CATEGORIES:
        values = [row["pixel_ap"] for row in rows if row["category"] == category]
        assert float(table[category]["last_pixel_ap"]) == pytest.approx(100 * np.mean(values))
        std = float(table[category]["last_pixel_ap_std"])
        assert std == pytest.approx(100 * np.std(values, ddof=1))
    mean = np.mean([row["pixel_ap"] for row in rows])
    assert float(table["mean"]["last_pixel_ap"]) == pytest.approx(100 * mean)


def test_saved_head_gives_the_saved_scores(full):
    run = Run.read(full)
    scores = run.load_scores("wood", 1)
    extractor = FrozenExtractor("tf_efficientnet_lite0", (1, 2, 3))
    images = torch.stack(
        [torch.from_numpy(read_image(Path(path))).permute(2, 0, 1) for path in scores["path"]]
    )
    head = Noco(FeatureShape(extractor.stage_channels), NocoOptions())
    head.load_state_dict(run.load_head("wood", 1)[0])
    with torch.no_grad():
        features = extractor.assemble([m.half() for m in extractor.stage_maps(images)])
        maps = upsample_and_blur(head(features), SIZE, sigma=4.0)
    np.testing.assert_allclose(maps, scores["map"], rtol=1e-4)
    np.testing.assert_allclose(maps.amax(dim=(1, 2)), scores["score"], rtol=1e-4)


def test_interrupted_run_continues_to_the_same_bytes(full, root, tmp_path, monkeypatch, capsys):
    fit, started = Noco.fit, []

    def interrupted(self, bank, **options):
        started.append(self)
        if len(started) == 3:  # the first seed of the second category
            raise KeyboardInterrupt
        fit(self, bank, **options)

    command = (root, tmp_path, "--seeds", "0", "1", "--save-maps")
    with monkeypatch.context() as patch:
        patch.setattr(Noco, "fit", interrupted)
        with pytest.raises(SystemExit) as exit_:
            train(*command)
    assert exit_.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
    (folder,) = (tmp_path / "folder-noco").iterdir()
    assert [(row["category"], row["seed"]) for row in measured(folder)] == [
        ("cloth", 0),
        ("cloth", 1),
    ]
    assert not (folder / "table.md").exists()

    with monkeypatch.context() as patch:
        resumed = []
        patch.setattr(Noco, "fit", lambda self, *a, **k: (resumed.append(1), fit(self, *a, **k)))
        assert train(*command) == folder
    assert len(resumed) == 2
    assert folder.name == full.name
    assert measured(folder) == measured(full)
    for name in ("metrics.jsonl", "config.json", *TABLES):
        assert (folder / name).read_bytes() == (full / name).read_bytes(), name
    for category in CATEGORIES:
        for seed in (0, 1):
            stem = f"{category}-seed{seed}"
            same_arrays(folder / f"scores/{stem}.npz", full / f"scores/{stem}.npz")
            same_heads(folder, full, category, seed)
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["continued"]) == 1


def without_seconds(folder):
    """results.csv, byte for byte but for the columns of times."""
    with (folder / "results.csv").open(newline="") as file:
        columns, *lines = csv.reader(file)
    kept = [i for i, name in enumerate(columns) if not name.endswith("_seconds")]
    return [[line[i] for i in kept] for line in (columns, *lines)]


def test_results_file_is_the_same_text(full, root, tmp_path):
    """And a run's own config.json is all that it takes."""
    again = ("--output", str(tmp_path), "--run", "again", "--workers", "0")
    folder = main(["--from-run", str(full), *again])
    assert folder == tmp_path / "folder-noco" / "again"
    assert without_seconds(folder) == without_seconds(full)
    assert (folder / "config.json").read_bytes() == (full / "config.json").read_bytes()


def test_finished_run_trains_nothing_again(full, root, tmp_path, monkeypatch):
    folder = tmp_path / "folder-noco" / full.name
    shutil.copytree(full, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def refused(*arguments, **options):
        raise AssertionError("a finished pair was computed again")

    monkeypatch.setattr(Noco, "fit", refused)
    monkeypatch.setattr(FrozenExtractor, "stage_maps", refused)
    assert train(root, tmp_path, "--seeds", "0", "1", "--save-maps") == folder
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_one_category_alone_gives_the_bits_it_has_in_the_full_run(full, root, tmp_path):
    alone = train(
        root, tmp_path, "--seeds", "1", "--categories", "wood", "--save-maps", "--workers", "1"
    )
    (row,) = measured(alone)
    (expected,) = [row for row in measured(full) if (row["category"], row["seed"]) == ("wood", 1)]
    assert row == expected
    same_arrays(alone / "scores/wood-seed1.npz", full / "scores/wood-seed1.npz")
    same_heads(alone, full, "wood", 1)


def test_another_config_into_the_same_folder_is_refused(root, tmp_path, capsys):
    one = ("--categories", "wood", "--run", "mine", "--method.epochs", "1", "--overlays", "0")
    folder = train(root, tmp_path, *one)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train(root, tmp_path, *one, "--method.norm", "4")
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "another configuration" in message
    assert "method.norm: 1.0 there, 4.0 now" in message
    assert "--restart" in message
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before

    assert train(root, tmp_path, *one, "--method.norm", "4", "--restart") == folder
    assert json.loads((folder / "config.json").read_text())["method"]["norm"] == 4


def test_best_on_test_is_named_optimistic_and_changes_no_training(full, root, tmp_path, capsys):
    folder = train(
        root, tmp_path, "--select", "best_test", "--categories", "cloth", "--overlays", "0"
    )
    printed = capsys.readouterr().out
    for text in (printed, *((folder / f"table.{kind}").read_text() for kind in ("md", "tex"))):
        assert "best on test (optimistic)" in text
    last, best = measured(folder)
    assert (last["select"], best["select"]) == ("last", "best_test")
    # Evaluating every epoch must not disturb the fit: the last state is that of the honest run.
    assert last == next(row for row in measured(full) if row["category"] == "cloth")
    assert best["image_auroc"] >= last["image_auroc"]
    assert best["pixel_auroc"] >= last["pixel_auroc"]
    for suffix in ("", "-last", "-pixel"):
        assert (folder / f"heads/cloth-seed0{suffix}.safetensors").is_file()
    steps = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    assert max(step["pixel_auroc"] for step in steps) == best["pixel_auroc"]
    assert steps[best["pixel_step"] - 1]["aupro"] == best["aupro"]


def test_random_weights_are_said_in_every_table(root, tmp_path, capsys):
    folder = train(
        root, tmp_path, "--weights", "random", "--categories", "wood", "--method.epochs", "1"
    )
    for text in (
        capsys.readouterr().out,
        (folder / "table.md").read_text(),
        (folder / "table.tex").read_text(),
    ):
        assert "RANDOM BACKBONE WEIGHTS" in text


def test_trained_weights_say_nothing_of_random_ones(full):
    assert "RANDOM" not in (full / "table.md").read_text()


def test_without_ground_truth_pixel_metrics_are_dashes(full, root, tmp_path):
    shutil.copytree(root / "wood", tmp_path / "images/wood")
    shutil.rmtree(tmp_path / "images/wood/ground_truth")
    folder = train(tmp_path / "images", tmp_path)
    (row,) = measured(folder)
    expected = next(row for row in measured(full) if row["category"] == "wood")
    for name in metric_names():
        if name.startswith("image"):
            assert row[name] == expected[name]
        else:
            assert math.isnan(row[name])
    assert "no masks" in row["undefined"]
    assert row["empty_masks"] == 0
    table = (folder / "table.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| wood"))
    assert line.count("–") == 3
    assert "–: undefined (" in table
    assert table_lines(folder)["wood"]["last_aupro"] == "nan"
    assert list((folder / "overlays/wood-seed0").glob("*.png"))


def test_defects_that_the_crop_cuts_away_are_counted_and_named(tmp_path):
    draw_turned_category(tmp_path / "images", "wood", 3, num_test=3)
    corner = draw_turned_category(tmp_path / "corner", "wood", 4, num_test=2, place=(0, 1))
    # These cover the first 24 of 64 pixels; the crop of 32 of 128 leaves the pixels 24 to 39.
    for defect in ("turned", "flat"):
        for index in range(2):
            image = corner / f"test/{defect}/{index:03d}.png"
            image.rename(tmp_path / f"images/wood/test/{defect}/corner{index}.png")
            mask = corner / f"ground_truth/{defect}/{index:03d}_mask.png"
            mask.rename(tmp_path / f"images/wood/ground_truth/{defect}/corner{index}_mask.png")
    options = ("--method.epochs", "1", "--overlays", "1")
    cropped = train(
        tmp_path / "images", tmp_path, "--image-size", "128", "--crop-size", "32", *options
    )
    (row,) = measured(cropped)
    assert row["empty_masks"] == 4
    assert (row["num_test"], row["skipped"]) == (13, 0)
    data = json.loads((cropped / "metrics.jsonl").read_text().splitlines()[0])
    assert sorted(data["empty_masks"]) == sorted(
        str(tmp_path / f"images/wood/test/{defect}/corner{index}.png")
        for defect in ("turned", "flat")
        for index in range(2)
    )
    note = "4 anomalous test images have an empty mask"
    assert note in (cropped / "table.md").read_text()
    assert note in (cropped / "table.tex").read_text()

    whole = train(tmp_path / "images", tmp_path, "--image-size", "128", *options)
    assert measured(whole)[0]["empty_masks"] == 0
    assert "empty mask" not in (whole / "table.md").read_text()


def test_unreadable_images_are_left_out_counted_and_named(root, tmp_path):
    shutil.copytree(root / "wood", tmp_path / "images/wood")
    bad = [tmp_path / f"images/wood/{name}.png" for name in ("train/good/003", "test/flat/001")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    folder = train(
        tmp_path / "images", tmp_path, "--skip-unreadable", "--seeds", "0", "1", "--save-maps"
    )
    for row in measured(folder):
        assert (row["skipped"], row["num_train"], row["num_test"]) == (2, 7, 11)
        assert row["image_auroc"] > 0.9
        assert row["pixel_auroc"] > 0.9  # masks still belong to their images
    data = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert len(data["skipped"]) == 2
    for path, reason in zip(bad, data["skipped"], strict=True):
        assert str(path) in reason
        assert "truncated" in reason
    paths = Run.read(folder).load_scores("wood", 0)["path"]
    assert str(bad[1]) not in paths
    assert "2 unreadable images were left out" in (folder / "table.md").read_text()


def test_published_numbers_and_groups_stand_beside_mvtec(tmp_path):
    for seed, category in enumerate(("carpet", "bottle")):
        draw_mvtec_category(tmp_path / "images", category, seed=seed)
    folder = train(
        tmp_path / "images",
        tmp_path,
        *("--categories", "carpet", "bottle", "--method.epochs", "1", "--image-size", "64"),
        dataset="mvtec",
    )
    table = table_lines(folder)
    assert list(table) == ["carpet", "bottle", "mean_textures", "mean_objects", "mean"]
    assert float(table["carpet"]["noco_paper_image_auroc"]) > 90
    assert table["mean"]["noco_paper_image_auroc"] == ""
    assert "mean textures (1 of 5)" in (folder / "table.md").read_text()


def test_visa_runs_in_its_own_layout(tmp_path):
    for seed, category in enumerate(("candle", "pcb1")):
        draw_visa_category(tmp_path / "images", category, seed=seed)
    write_visa_csv(tmp_path / "images", ("candle", "pcb1"))
    folder = train(
        tmp_path / "images",
        tmp_path,
        *("--categories", "candle", "pcb1", "--method.epochs", "1", "--image-size", "64"),
        *("--crop-size", "56", "--data.split", "csv"),
        dataset="visa",
    )
    for row in measured(folder):
        assert (row["num_train"], row["num_test"]) == (4, 4)
        assert row["aupro"] > 0.5
    config = json.loads((folder / "config.json").read_text())
    assert (config["resize"], config["data"]) == ("lanczos_shorter", {"split": "csv"})


@pytest.mark.slow
def test_demo_needs_no_data(tmp_path):
    """The embedded data set, as `make demo` runs it but with one category and small images."""
    folder = main(
        [
            *("demo", "--data-root", str(tmp_path), "--output", str(tmp_path)),
            *("--categories", "brick", "--image-size", "96", "--method.epochs", "3"),
            *("--method.learning-rate", "1e-3", "--workers", "0", "--overlays", "1"),
        ]
    )
    (row,) = measured(folder)
    assert (row["category"], row["num_train"], row["num_test"]) == ("brick", 40, 60)
    assert row["image_auroc"] > 0.7
    assert row["empty_masks"] == 0
