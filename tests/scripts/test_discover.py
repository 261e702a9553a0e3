"""discover.py end to end on tiny runs: what it finds, writes and refuses."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import discover
from tests.scripts.runs import refusal, train
from utils.discovery.files import read_assignments, read_images
from utils.runs.files import delete_run

COLOURS = {"dot": (250, 30, 30), "bar": (20, 30, 240)}
SIZE = 80
RUN_ENDING = ("--workers", "0", "--cache", "host")


def defect(kind, rng):
    """Where a defect is, (SIZE, SIZE) bool."""
    y, x = np.mgrid[:SIZE, :SIZE]
    down, across = rng.integers(24, 56, 2)
    if kind == "dot":
        return np.hypot(y - down, x - across) < 10
    return (abs(y - down) < 5) & (abs(x - across) < 18)


def draw(folder, kind, number):
    """Save an image of a defect on a texture, and its mask."""
    rng = np.random.default_rng([len(kind), number])
    image = rng.integers(110, 140, (SIZE, SIZE, 3)).astype(np.uint8)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    split = "train" if kind == "train" else "test"
    if kind in COLOURS:
        mask = defect(kind, rng)
        image[mask] = COLOURS[kind]
        path = folder / f"ground_truth/{kind}/{number:03d}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    path = folder / split / (kind if kind in COLOURS else "good") / f"{number:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path, mask


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for kind, count in (("train", 20), ("good", 8), ("dot", 10), ("bar", 9)):
        for number in range(count):
            draw(root / "sheet", kind, number)
    return root


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("run"), "noco_cf")


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "a run"))


def found_in(*words):
    return discover.main([*map(str, words), *RUN_ENDING])


def refused(capsys, *words):
    return refusal(capsys, discover.main, *words, *RUN_ENDING)


def metrics_of(folder):
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_kinds_of_a_run_are_found_and_new_images_get_them(run, tmp_path):
    folder = found_in(run, "--kinds", "known")
    assert folder == run / "discovery/contrast"
    (row,) = metrics_of(folder)
    assert list(row)[:3] == ["nmi", "ari", "f1"]
    assert float(row["f1_without_good"]) == 1
    assert float(row["f1"]) > 0.8
    assert (row["kinds"], row["was_estimated"], row["names"]) == ("2", "0", "2")

    category = folder / "sheet"
    images = read_images(category)
    assert len(images) == 27
    kind_of = {one.name: one.kind for one in images if one.name != "good"}
    assert all(one.kind == kind_of[one.name] for one in images if one.name != "good")
    regions = read_assignments(category)
    for region in regions:
        with Image.open(category / region.file("masks")) as mask:
            inside = np.array(mask) > 0
            assert mask.size == (region.right - region.left, region.bottom - region.top)
        assert inside.sum() == region.area > 0
    for name in ("map.png", "confusion.png", "kinds/01.png", "kinds/02.png"):
        with Image.open(category / name) as picture:
            assert min(picture.size) > 100
    assert "this run" in (folder / "table.md").read_text()

    # New images of both kinds, called as the user calls the kinds.
    numbers = {one.name: one.number for one in images}
    names = tmp_path / "names.csv"
    names.write_text(f"kind,name\n{numbers['dot']},red dot\n{numbers['bar']},blue bar\n")
    new = tmp_path / "new"
    new.mkdir()
    for number, kind in enumerate(("dot", "bar", "bar", "good"), start=50):
        path, _ = draw(tmp_path / "drawn", kind, number)
        path.rename(new / f"{number}.png")
    before = {path: path.read_bytes() for path in category.glob("*.csv")}
    found_in(run, "--assign", new, "--names", names)
    assigned = {Path(one.image).stem: one for one in read_images(category / "assigned")}
    kinds = {stem: one.kind for stem, one in assigned.items()}
    assert kinds == {"50": "red dot", "51": "blue bar", "52": "blue bar", "53": "good"}
    assert assigned["53"].confidence is None
    assert {path: path.read_bytes() for path in before} == before


def test_names_stay_with_the_kinds_when_they_are_found_again(run):
    folder = found_in(run, "--kinds", "known") / "sheet"
    numbers = {one.name: one.number for one in read_images(folder)}
    (folder / "names.csv").write_text(f"kind,name\n{numbers['bar']},scratch\n")
    found_in(run, "--kinds", "3")
    again = {one.image: one for one in read_images(folder)}
    of_bars = [one.kind for one in again.values() if one.name == "bar"]
    assert of_bars.count("scratch") > len(of_bars) / 2
    assert not [one for one in again.values() if one.name == "dot" and one.kind == "scratch"]
    assert (folder / "names.csv").read_text().count("\n") == 4


def test_the_same_command_gives_the_same_files(run):
    folder = found_in(run) / "sheet"
    before = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    assert int(metrics_of(folder.parent)[0]["was_estimated"]) == 1
    found_in(run)
    assert {path.name: path.read_bytes() for path in folder.glob("*.csv")} == before


def test_kinds_of_another_head_are_not_given_to_new_images(run, root, capsys):
    folder = found_in(run, "--kinds", "known")
    facts = folder / "sheet/state.json"
    facts.write_text(re.sub(r'"head": "\w+"', '"head": "0"', facts.read_text()))
    said = refused(capsys, run, "--assign", root / "sheet/test/dot")
    assert "another head than the run has now" in said
    facts.write_text("{}")
    assert "state.json" in refused(capsys, run, "--assign", root / "sheet/test/dot")


def test_categories_add_up_in_one_table(run, root):
    folder = found_in(run, "--kinds", "known")
    text = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join([*text, text[1].replace("sheet", "cloth"), ""]))
    found_in(run, "--kinds", "3")
    rows = {row["category"]: row for row in metrics_of(folder)}
    assert (rows["cloth"]["kinds"], rows["sheet"]["kinds"]) == ("2", "3")
    assert "mean" in (folder / "table.md").read_text()


def test_true_masks_are_an_upper_bound_and_say_so(run, tmp_path, capsys):
    folder = found_in(run, "--kinds", "known", "--masks", "true", "--name", "bound")
    assert folder.name == "bound"
    assert float(metrics_of(folder)[0]["f1"]) == 1
    assert "UPPER BOUND" in (folder / "table.md").read_text()
    assert "new images lack" in refused(capsys, run, "--name", "bound", "--assign", tmp_path)


def test_images_without_labels_have_kinds_and_no_measure(run, root):
    folder = found_in(run, "--images", root / "sheet/test/dot", root / "sheet/test/bar")
    (row,) = metrics_of(folder)
    assert row["nmi"] == "nan"
    assert row["images"] == "19"
    assert not (folder / "table.md").exists()
    assert not (folder / "sheet/confusion.csv").exists()


def test_each_way_of_contrast_tells_these_kinds_apart(run):
    for number, words in enumerate(
        (
            ("--method.turns", "1"),
            ("--method.clustering", "kmeans"),
            ("--method.surroundings", "0"),
        )
    ):
        folder = found_in(run, "--kinds", "known", "--name", number, "contrast", *words)
        assert float(metrics_of(folder)[0]["f1_without_good"]) == 1


def test_a_run_that_starts_again_forgets_what_was_found(run):
    folder = found_in(run, "--kinds", "known")
    delete_run(run)
    assert not (folder / "metrics.csv").exists()
    assert not (folder / "sheet/state.json").exists()
    assert (folder / "sheet/names.csv").exists()


def test_names_that_are_left_out_are_not_looked_at(run, capsys):
    folder = found_in(run, "--leave-out", "bar")
    assert {row.name for row in read_images(folder / "sheet")} == {"good", "dot"}
    assert metrics_of(folder)[0]["names"] == "1"
    assert "leaves no image" in refused(capsys, run, "--leave-out", "bar", "dot", "good")


@pytest.fixture(scope="module")
def maps(root, tmp_path_factory):
    """Maps of other software of all test images: soft masks, of 16 bits."""
    folder = tmp_path_factory.mktemp("maps")
    for kind, count in (("good", 8), ("dot", 10), ("bar", 9)):
        for number in range(count):
            _, mask = draw(folder / "again", kind, number)
            path = folder / "maps" / kind / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 6000, mask.shape)
            Image.fromarray((noise + 50000 * mask).astype(np.uint16)).save(path)
    return folder / "maps"


def test_maps_of_other_software_need_no_run(root, maps, tmp_path, capsys):
    words = ("--maps", maps, "--images", root / "sheet/test", "--out", tmp_path / "found")
    folder = found_in(*words, "--kinds", "2")
    rows = read_images(folder / "maps")
    kinds = {}
    for row in rows:
        kinds.setdefault(Path(row.image).parent.name, set()).add(row.kind)
    assert kinds["good"] == {"good"}
    assert {frozenset(kinds["dot"]), frozenset(kinds["bar"])} == {
        frozenset({"kind 1"}),
        frozenset({"kind 2"}),
    }
    (maps / "dot/003.png").rename(tmp_path / "003.png")
    try:
        assert "dot/003.png" in refused(capsys, *words)
    finally:
        (tmp_path / "003.png").rename(maps / "dot/003.png")


def test_whole_images_are_a_baseline(run):
    folder = found_in(run, "--kinds", "known", "whole_image")
    (row,) = metrics_of(folder)
    assert (folder.name, row["kinds"]) == ("whole_image", "3")  # good is one of them
    assert {one.number for one in read_images(folder / "sheet")} == {1, 2, 3}


def test_anomalyncd_learns_beside_labelled_defects_and_assigns(run, root, tmp_path, capsys):
    base = tmp_path / "base"
    for kind in COLOURS:
        for number in range(70, 74):
            draw(base, kind, number)
    words = (
        *("--kinds", "known", "anomalyncd", "--base", base),
        *("--method.backbone", "test_vit", "--method.weights", "random"),
        *("--method.image-size", "32", "--method.resize", "36", "--method.mask-layers", "2"),
        *("--method.epochs", "2", "--method.warmup-epochs", "1", "--method.batch-size", "8"),
    )
    folder = found_in(run, *words)
    (row,) = metrics_of(folder)
    assert (row["method"], row["masks"], row["kinds"]) == ("anomalyncd", "mebin", "3")
    rows = read_images(folder / "sheet")
    assert len(rows) == 27
    assert all(row.number > 0 and 1 / 3 <= row.confidence <= 1 for row in rows)
    # A finding of one product is the base of the next.
    found_in(run, "--name", "contrast", "--kinds", "known")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert "has several findings" in refused(capsys, run, *words[:4], other, *words[5:])

    found_in(run, "--name", "anomalyncd", "--assign", root / "sheet/test")
    again = {row.image: row.kind for row in read_images(folder / "sheet/assigned")}
    assert again == {row.image: row.kind for row in rows}

    assert "are among those" in refused(capsys, run, *words[:4], root / "sheet", *words[5:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name a run folder, or --maps and --images"),
        (("nowhere",), "nowhere"),
        (("{run}", "--category", "cloth"), "no such head"),
        (("{run}", "--kinds", "0"), "--kinds 0 must be at least 1"),
        (("{run}", "--kinds", "many"), "many"),
        (("{run}", "anomalyncd"), "--base FOLDER"),
        (("{run}", "--base", "x"), "--base does nothing"),
        (("{run}", "contrast", "--method.turns", "3"), "--method.turns 3 must be 1, 2 or 4"),
        (("{run}", "--assign", "x.png"), "no kinds were found yet"),
        (("{run}", "--maps", "maps"), "--maps needs --images"),
        (("--maps", "maps", "--images", "x"), "--out"),
        (("{run}", "--maps", "m", "--images", "x", "--masks", "true"), "needs a run's own maps"),
        (("{run}", "--images", "x", "--kinds", "known"), "no names to count"),
        (("{run}", "--backbone", "x"), "--backbone does nothing with a run"),
        (("{run}", "--assign", "x", "--kinds", "3"), "--kinds does nothing with --assign"),
        (
            ("{run}", "--masks", "mebin", "--false-alarm-rate", "0.1"),
            "--false-alarm-rate does nothing with --masks mebin",
        ),
        (("{run}", "--masks", "mebin", "--most-regions", "2"), "--most-regions does nothing"),
        (
            ("--maps", "m", "--images", "x", "--out", "o", "--seed", "1"),
            "--seed does nothing without a run",
        ),
        (("{run}", "--false-alarm-rate", "2"), "--false-alarm-rate 2.0 must be"),
    ],
)
def test_bad_input_is_one_message(finished, words, said, capsys):
    found = refused(capsys, *(word.format(run=finished) for word in words))
    assert said in found.replace("│", "").replace("  ", " ")


def test_an_image_that_cannot_be_read_is_named_or_left_out(run, root, tmp_path, capsys):
    images = shutil.copytree(root / "sheet/test/dot", tmp_path / "photos")
    (images / "000.png").write_text("no image")
    assert "000.png" in refused(capsys, run, "--images", images)
    folder = found_in(run, "--images", images, "--skip-unreadable")
    assert "000.png" in capsys.readouterr().err
    assert len(read_images(folder / "sheet")) == 9


def test_a_semantic_run_has_no_regions(digits, capsys):
    assert "have no maps" in refused(capsys, digits)
