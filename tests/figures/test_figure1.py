"""NoCo's Fig. 1 from tiny run folders."""

import csv
import itertools
import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from datasets.data_set import num_categories
from datasets.sets.demo.demo import DEMO_CATEGORIES
from figures import figure1
from figures.shared.label_places import Box, place_labels
from figures.shared.own_results import papers_data, pool
from tests.figures.paper_runs import constant, semantic, structured, write_run

DIGITS = [str(digit) for digit in range(10)]
STRUCTURED, SEMANTIC = (papers_data(structured=kind) for kind in (True, False))
LITE = {"backbone": "tf_efficientnet_lite0"}


def on_all(root, value, **options):
    """Runs on the paper's seven data sets, with a constant AUROC on each kind."""
    folders = []
    for name in (*STRUCTURED, *SEMANTIC):
        is_structured = name in STRUCTURED
        config = (structured if is_structured else semantic)(name)
        categories = [f"c{i}" for i in range(num_categories(name))]
        values = constant(categories, value + (0.01 if is_structured else 0.0))
        trainable = 3_000_000 if is_structured else 4_400_000
        folders.append(write_run(root / name, config, values, trainable=trainable, **options))
    return folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    folders = on_all(root, 0.9)
    demo, digits = structured("demo", **LITE), semantic("digits", **LITE)
    folders.append(write_run(root / "demo", demo, constant(DEMO_CATEGORIES, 0.8), trainable=50_000))
    folders.append(write_run(root / "digits", digits, constant(DIGITS, 0.85), trainable=70_000))
    return folders


def test_data_are_those_of_the_papers_table():
    assert STRUCTURED == ("mvtec", "mpdd", "visa")
    assert SEMANTIC == ("fashion_mnist", "cifar10", "cifar100", "cats_vs_dogs")


def test_published_points_are_means_of_the_whole_table():
    points, left_out = figure1.published_points()
    by_name = {point.label: point for point in points}
    assert left_out == ["MRot"]  # no MPDD, no VisA
    assert len(by_name) == 11
    noco = by_name["NoCo"]
    assert noco.structured == pytest.approx((99.2 + 92.3 + 93.7) / 3)
    assert noco.semantic == pytest.approx((95.4 + 93.9 + 96.5 + 97.5) / 4)
    assert noco.millions == 3.7
    assert math.isnan(by_name["PatchCore"].millions)


def test_ours_are_pairs_of_the_same_setting(runs):
    whole, demo = figure1.own_points(pool(runs))
    assert (whole.structured, whole.semantic) == (pytest.approx(91.0), pytest.approx(90.0))
    assert whole.millions == pytest.approx((3.0 + 4.4) / 2)
    assert whole.kind == "ours"
    assert (demo.structured, demo.semantic) == (pytest.approx(80.0), pytest.approx(85.0))
    assert demo.kind == "not comparable"
    assert demo.structured_data == ("demo",)


def test_a_method_of_one_kind_or_with_a_hole_has_no_point(tmp_path):
    only = write_run(tmp_path / "a", structured("demo", **LITE), constant(DEMO_CATEGORIES, 0.8))
    assert figure1.own_points(pool([only])) == []
    part = constant(DIGITS[:9], 0.8)
    digits = write_run(tmp_path / "b", semantic("digits", **LITE), part)
    assert figure1.own_points(pool([only, digits])) == []


def test_some_of_the_papers_data_is_not_comparable(tmp_path):
    folders = [folder for folder in on_all(tmp_path, 0.9) if folder.name in ("mvtec", "cifar10")]
    (point,) = figure1.own_points(pool(folders))
    assert point.kind == "not comparable"
    assert point.structured_data == ("mvtec",)
    (note,) = figure1.notes_of([point])
    assert note == "ours: noco (last): some of the paper's data, not comparable."


def test_ways_of_selecting_meet_where_only_one_is_possible(tmp_path):
    """Digits cannot be chosen on rotations, so noco_cf has synthetic there and last here."""
    demo, digits = (f("x", "noco_exact", **LITE) for f in (structured, semantic))
    values = constant(DEMO_CATEGORIES, 0.8)
    a = write_run(tmp_path / "a", demo | {"dataset": "demo"}, values, select="synthetic")
    b = write_run(tmp_path / "b", digits | {"dataset": "digits"}, constant(DIGITS, 0.9))
    (point,) = figure1.own_points(pool([a, b]))
    assert point.label == "noco_exact (synthetic / last)"
    c = write_run(tmp_path / "c", demo | {"dataset": "demo"}, values)
    (point,) = figure1.own_points(pool([a, b, c]))
    assert point.label == "noco_exact (last)"


def test_files_hold_the_points_and_the_caption_says_what_they_are(runs, tmp_path):
    empty = write_run(tmp_path / "empty", structured(), {})
    paths = figure1.main([*map(str, (*runs, empty)), "--out", str(tmp_path / "f.png")])
    assert {path.name for path in paths} == {"f.png", "f.pdf", "f.csv", "f.md"}
    with (tmp_path / "f.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = {row["method"]: row for row in lines}
    assert rows["DRAEM"]["trainable_millions"] == "97.4"
    assert rows["PaDiM"]["trainable_millions"] == ""
    caption = (tmp_path / "f.md").read_text()
    assert "over mvtec, mpdd, visa (structured)" in caption
    assert "not drawn, since the table has no number for some: MRot" in caption
    assert "demo data, not comparable" in caption
    assert f"no category is finished: {empty}" in caption
    data = [(row["kind"], row["structured_data"], row["semantic_data"]) for row in lines[-2:]]
    whole = ("; ".join(sorted(names)) for names in (STRUCTURED, SEMANTIC))
    assert data == [("ours", *whole), ("not comparable", "demo", "digits")]


def test_circles_have_areas_in_proportion(runs):
    points = [*figure1.published_points()[0], *figure1.own_points(pool(runs))]
    figure = figure1.draw(points)
    drawn = {
        tuple(c.get_offsets()[0]): c.get_sizes()[0]
        for c in figure.axes[0].collections
        if len(c.get_facecolor()) and c.get_linestyle() and c.get_paths()[0].codes is not None
        and any(code == 4 for code in c.get_paths()[0].codes)
    }  # fmt: skip
    sized = [p for p in points if not math.isnan(p.millions)]
    assert len(drawn) == len(sized) == 11
    for point in sized:
        share = drawn[point.structured, point.semantic] / figure1.SIZE_PER_MILLION
        assert share == pytest.approx(point.millions)


def test_labels_cover_neither_each_other_nor_the_frame(runs):
    points = [*figure1.published_points()[0], *figure1.own_points(pool(runs))]
    figure = figure1.draw(points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    boxes = {t.get_text(): t.get_window_extent(renderer) for t in axes.texts}
    assert {"NoCo", "PatchCore"} <= set(boxes)
    assert any(text.endswith("demo data") for text in boxes)
    frame = axes.get_window_extent(renderer)
    for text, box in boxes.items():
        assert frame.x0 <= box.x0, text
        assert box.x1 <= frame.x1, text
    for (one, first), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not first.shrunk(0.98, 0.9).overlaps(second.shrunk(0.98, 0.9)), (one, other)


def test_labels_of_a_crowd_are_kept_apart():
    centres = [(100.0 + 3 * i, 100.0 + 2 * i) for i in range(6)]
    frame = Box(0, 0, 300, 300)
    boxes = place_labels(centres, [4.0] * 6, ["a label"] * 6, 8.0, frame)
    for one, other in itertools.combinations(boxes, 2):
        assert one.overlap(other) == 0
    assert all(box.overlap(frame) == pytest.approx(box.area) for box in boxes)


def test_overlap_and_distance_of_boxes():
    box = Box(0, 0, 4, 2)
    assert box.area == 8
    assert box.overlap(Box(3, 1, 9, 9)) == 1
    assert box.overlap(Box(4, 0, 5, 5)) == 0
    assert (box.distance(1, 1), box.distance(7, 6)) == (0, 5)
