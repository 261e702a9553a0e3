import math

from figures import ulsad_tables
from tests.figures.paper_runs import MVTEC, constant, structured, write_run

LOCO = ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors")


def ulsad(dataset, **changes):
    return structured(dataset, "ulsad", layers=[2, 3], method={"branches": "both"}, **changes)


def test_published_numbers_and_ours_side_by_side(tmp_path):
    columns = {"pixel_auroc": 0.97, "aupro": 0.9}
    kinds = {
        **{"image_auroc_logical": 0.7, "image_auroc_structural": 0.9},
        **{"image_auroc_mean": 0.8, "spro": 0.6},
    }
    runs = [
        write_run(tmp_path / "a", ulsad("mvtec"), constant(MVTEC, 0.9, (0, 1)), **columns),
        write_run(tmp_path / "b", ulsad("mvtec_loco"), constant(LOCO[:2], 0.8), **columns, **kinds),
    ]
    paths = ulsad_tables.main([*map(str, runs), "--out", str(tmp_path / "out")])
    names = {path.name for path in paths}
    assert {"out-1.png", "out-1.md", "out-2.csv", "out-2.tex"} <= names
    five = (tmp_path / "out-1.md").read_text()
    assert "97.7" in five
    assert "92.5" in five
    assert "90.0 ± 0.0" in five
    assert "mvtec_loco (2 of 5 categories)" in five
    both = (tmp_path / "out-2.md").read_text()
    assert "70.0" in both
    assert "sPRO 0.05" in both
    assert "97.7" not in both
    assert "Not data sets of the paper" not in both


def test_data_of_ones_own_come_after_the_papers(tmp_path):
    config = ulsad("folder", data_root="my/cans")
    own = {"image_auroc_logical": 0.5, "image_auroc_structural": math.nan, "spro": 0.4}
    run = write_run(tmp_path / "a", config, constant(["cans"], 0.75), aupro=0.6, **own,
                    image_auroc_mean=math.nan)  # fmt: skip
    ulsad_tables.main([str(run), "--out", str(tmp_path / "out")])
    header = (tmp_path / "out-1.csv").read_text().splitlines()[0]
    assert header.index("visa") < header.index("cans")
    both = (tmp_path / "out-2.md").read_text()
    assert "50.0" in both
    assert "cans" in both
