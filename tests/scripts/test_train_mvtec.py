"""The structured script end to end, on small images whose defects only a trained head finds."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from datasets.reading.images import read_mask
from models.backbone.extractor import FrozenExtractor
from models.methods.noco import Noco
from tests.datasets.trees import draw_mvtec_category, draw_visa_category, texture, write_visa_csv
from tests.datasets.trees import save as save_image
from tests.scripts.runs import IMAGES, assert_same_pair, assert_same_run, measured, refusal
from train_mvtec import main
from utils.metrics.metrics import metric_names
from utils.runs.run import Run

SIZE = 64
SIDE = 24  # of a defect
CATEGORIES = ("cloth", "wood")
QUICK = (
    *(*IMAGES, "--overlays", "1"),
    *("--method.epochs", "3", "--method.batch-size", "4", "--method.learning-rate", "1e-3"),
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


def words_of(root, output, *options, dataset="folder"):
    return [dataset, "--data-root", str(root), "--output", str(output), *QUICK, *options]


def train(*arguments, **options):
    """Run the script and return its run folder."""
    return main(words_of(*arguments, **options))


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


def row_of(folder, category, seed=0):
    """The first row of one category and seed."""
    return next(x for x in measured(folder) if (x["category"], x["seed"]) == (category, seed))


def table_lines(folder):
    """category -> column -> value, of table.csv."""
    with (folder / "table.csv").open(newline="") as file:
        return {line.pop("category"): line for line in csv.DictReader(file)}


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bytes_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_plain_defects_are_found(full):
    rows = measured(full)
    assert [(row["category"], row["seed"]) for row in rows] == [
        (category, seed) for category in CATEGORIES for seed in (0, 1)
    ]
    for row in rows:
        assert row["image_auroc"] > 0.9
        assert row["pixel_auroc"] > 0.9
        assert row["aupro"] > 0.8
        assert (row["num_train"], row["num_test"], row["empty_masks"]) == (8, 12, 0)
        assert (row["step"], row["undefined"]) == (3, "")
        assert row["trainable"] == 176 * 177 + 1


def test_a_head_that_learns_nothing_fails(root, tmp_path):
    """The claim above is one about training: with no learning the same images are missed."""
    folder = train(root, tmp_path, "--method.learning-rate", "1e-12", "--overlays", "0")
    assert all(row["image_auroc"] < 0.5 for row in measured(folder))
    assert not (folder / "overlays").exists()


def test_every_file_of_the_run_is_there_and_readable(full):
    assert full.parent.name == "folder-noco"
    config = json.loads((full / "config.json").read_text())
    assert (config["backbone"], config["crop_size"]) == ("tf_efficientnet_lite0", None)
    assert config["method"]["epochs"] == 3
    environment = json.loads((full / "environment.json").read_text())
    assert environment["command"].startswith("train_mvtec.py folder --data-root")
    assert environment["device"] in ("cpu", "cuda")

    run, lines = Run.read(full), log_of(full)
    for category in CATEGORIES:
        for seed in (0, 1):
            scores = run.load_scores(category, seed)
            assert scores["map"].shape == (12, SIZE, SIZE)
            assert set(scores["defect"]) == {"good", "turned", "flat"}
            state, metadata = run.load_head(category, seed)
            assert state["projector.weight"].shape == (176, 176)
            assert metadata["category"] == category
            events = [x for x in lines if (x["category"], x["seed"]) == (category, seed)]
            assert [x["event"] for x in events] == ["data", "step", "step", "step"]
            losses = [x["loss"] for x in events[1:]]
            assert losses == sorted(losses, reverse=True)
        pictures = sorted((full / "overlays" / f"{category}-seed0").glob("*.png"))
        assert pictures
        for picture in pictures:
            with Image.open(picture) as image:
                image.load()
                assert min(image.size) > 50
        assert not (full / "overlays" / f"{category}-seed1").exists()
    for kind in ("md", "tex", "csv", "json"):
        text = (full / f"table.{kind}").read_text()
        assert all(category in text for category in (*CATEGORIES, "mean"))
        assert "RANDOM" not in text
    assert "n = 2 seeds (0, 1)" in (full / "table.md").read_text()
    assert not list(full.rglob("*.tmp"))


def test_rows_are_the_metrics_of_the_saved_scores(full, root):
    for row in measured(full):
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


def test_interrupted_run_continues_to_the_same_bytes(full, root, tmp_path, monkeypatch, capsys):
    fit, started = Noco.fit, []

    def interrupted(self, bank, **options):
        started.append(self)
        if len(started) == 3:  # the first seed of the second category
            raise KeyboardInterrupt
        fit(self, bank, **options)

    monkeypatch.setattr(Noco, "fit", interrupted)
    words = words_of(root, tmp_path, "--seeds", "0", "1", "--save-maps")
    assert "the same command continues" in refusal(capsys, main, *words, code=130)
    folder = tmp_path / "folder-noco" / full.name
    assert [(row["category"], row["seed"]) for row in measured(folder)] == [
        ("cloth", 0),
        ("cloth", 1),
    ]
    assert not (folder / "table.md").exists()

    assert main(words) == folder
    assert len(started) == 3 + 2
    assert_same_run(folder, full)
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["continued"]) == 1


def test_finished_run_trains_nothing_again(full, root, tmp_path, monkeypatch):
    folder = shutil.copytree(full, tmp_path / "folder-noco" / full.name)
    before = bytes_of(folder)

    def refused(*arguments, **options):
        raise AssertionError("a finished pair was computed again")

    monkeypatch.setattr(Noco, "fit", refused)
    monkeypatch.setattr(FrozenExtractor, "stage_maps", refused)
    assert train(root, tmp_path, "--seeds", "0", "1", "--save-maps") == folder
    assert bytes_of(folder) == before


def test_one_category_alone_gives_the_bits_it_has_in_the_full_run(full, root, tmp_path):
    options = ("--seeds", "1", "--categories", "wood", "--save-maps", "--workers", "1")
    alone = train(root, tmp_path, *options)
    assert len(measured(alone)) == 1
    assert_same_pair(alone, full, "wood", 1)


def test_another_config_into_the_same_folder_is_refused(full, root, tmp_path, capsys):
    folder = shutil.copytree(full, tmp_path / "folder-noco" / "mine")
    before = bytes_of(folder)
    other = ("--run", "mine", "--categories", "wood", "--method.norm", "4", "--overlays", "0")
    words = words_of(root, tmp_path, *other)
    message = refusal(capsys, main, *words)
    assert "another configuration" in message
    assert "method.norm: 1.0 there, 4.0 now" in message
    assert "--restart" in message
    assert bytes_of(folder) == before

    assert main([*words, "--restart"]) == folder
    assert json.loads((folder / "config.json").read_text())["method"]["norm"] == 4
    assert [row["category"] for row in measured(folder)] == ["wood"]


def test_best_on_test_is_named_optimistic_and_changes_no_training(full, root, tmp_path, capsys):
    options = ("--select", "best_test", "--categories", "cloth", "--overlays", "0")
    folder = train(root, tmp_path, *options)
    printed = capsys.readouterr().out
    for text in (printed, *((folder / f"table.{kind}").read_text() for kind in ("md", "tex"))):
        assert "best on test (optimistic)" in text
    last, best = measured(folder)
    assert (last["select"], best["select"]) == ("last", "best_test")
    # Evaluating every epoch must not disturb the fit: the last state is that of the honest run.
    assert last == row_of(full, "cloth")
    assert best["image_auroc"] >= last["image_auroc"]
    for suffix in ("", "-last", "-pixel"):
        assert (folder / f"heads/cloth-seed0{suffix}.safetensors").is_file()
    steps = log_of(folder)[1:]
    assert max(step["pixel_auroc"] for step in steps) == best["pixel_auroc"]
    assert steps[best["pixel_step"] - 1]["aupro"] == best["aupro"]


def test_without_ground_truth_pixel_metrics_are_dashes(full, root, tmp_path):
    shutil.copytree(root / "wood", tmp_path / "images/wood")
    shutil.rmtree(tmp_path / "images/wood/ground_truth")
    folder = train(tmp_path / "images", tmp_path)
    (row,) = measured(folder)
    expected = row_of(full, "wood")
    for name in metric_names()[:7]:
        assert row[name] == (expected[name] if name.startswith("image") else None)
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
    wood, moved = tmp_path / "images/wood", []
    for image in sorted(corner.glob("test/[!g]*/*.png")):
        defect, number = image.parent.name, image.stem
        moved.append(image.rename(wood / f"test/{defect}/corner{number}.png"))
        mask = corner / f"ground_truth/{defect}/{number}_mask.png"
        mask.rename(wood / f"ground_truth/{defect}/corner{number}_mask.png")
    folder = train(
        tmp_path / "images",
        tmp_path,
        *("--image-size", "128", "--crop-size", "32", "--method.epochs", "1"),
    )
    (row,) = measured(folder)
    assert (row["empty_masks"], row["num_test"], row["skipped"]) == (4, 13, 0)
    assert sorted(log_of(folder)[0]["empty_masks"]) == sorted(map(str, moved))
    for kind in ("md", "tex"):
        note = "4 anomalous test images have an empty mask"
        assert note in (folder / f"table.{kind}").read_text()


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
    words = ["demo", "--data-root", str(tmp_path), "--output", str(tmp_path)]
    words += ["--categories", "brick", "--image-size", "96", "--method.epochs", "3"]
    words += ["--method.learning-rate", "1e-3", "--workers", "0", "--overlays", "1"]
    folder = main(words)
    (row,) = measured(folder)
    assert (row["category"], row["num_train"], row["num_test"]) == ("brick", 40, 60)
    assert row["image_auroc"] > 0.7
    assert row["empty_masks"] == 0
