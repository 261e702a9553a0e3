"""A method, a data set and a metric, as README and docs add them: a file or an entry each."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.datasets.trees import draw_mvtec_category

ROOT = Path(__file__).parents[1]
COPIED = ("configs", "datasets", "figures", "models", "pipeline", "utils", "*.py")
SMALL = "--backbone tf_efficientnet_lite0 --image-size 48 --workers 0 --overlays 0"
# All that follows the sweep, in one process: torch takes seconds to import.
AFTERWARDS = """
import sys
from pathlib import Path
import evaluate, export, predict, train_mnist, train_mvtec
from figures import compare

run, image, small = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split()
evaluate.main([str(run)])
predict.main([str(run), image, "--category", "goat", "--out", "predicted"])
export.main([str(run), "--category", "goat", "--format", "torchscript", "--out", "goat.pt"])
alone = ["hides", "centre", "--data-root", "hides", "--method.power", "1", "--categories", "goat"]
train_mvtec.main([*alone, *small])
knn = train_mvtec.main(["hides", "knn", "--data-root", "hides", "--layers", "2", "3", *small])
train_mnist.main(["digits", "centre", "--categories", "3", *small])
compare.main([str(run), str(knn), "--out", "compared"])
"""


def blocks():
    """The Python of the README, a method, and of the page on the rest, a data set and a metric."""
    texts = [
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/extending.md")
    ]
    return re.findall(r"```python\n(.*?)```", "".join(texts), flags=re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources with the three additions, and images of the new data set."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder)
    method, data_set, metric = blocks()
    (folder / "models/methods/centre.py").write_text(method, encoding="utf-8")
    (folder / "datasets/sets/hides.py").write_text(data_set, encoding="utf-8")
    function, added = metric.rstrip().rsplit("\n\n\n", 1)
    (entry,) = re.findall(r"^ +Metric\(.*\n", added, flags=re.MULTILINE)
    metrics = folder / "utils/metrics/metrics.py"
    head, opening, rest = metrics.read_text(encoding="utf-8").partition("METRICS = (\n")
    metrics.write_text(f"{head}{function}\n\n\n{opening}{entry}{rest}", encoding="utf-8")
    for name in ("calf", "goat"):
        draw_mvtec_category(
            folder / "hides", name, num_train=6, num_good=4, num_defective=3, size=(50, 50)
        )
    return folder


def run_python(folder, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_help_has_the_method_its_options_and_the_data_set(checkout):
    listed = run_python(checkout, "train_mvtec.py", "--help")
    assert "centre" in listed
    assert "hides" in listed
    options = run_python(checkout, "train_mvtec.py", "hides", "centre", "--help")
    assert "--method.power" in options
    assert "Exponent of the differences." in options


def test_what_is_added_trains_evaluates_predicts_exports_sweeps_and_is_compared(checkout):
    options = ["--data-root", "hides", *SMALL.split()]
    run_python(checkout, "sweep.py", "--datasets", "hides", "--methods", "centre", "--", *options)
    (run,) = (checkout / "results/hides-centre").iterdir()
    rows = list(csv.DictReader((run / "results.csv").open(encoding="utf-8")))
    assert [row["category"] for row in rows] == ["calf", "goat"]
    assert all(0 <= float(row["pixel_found"]) <= 1 for row in rows)
    table = (run / "table.md").read_text(encoding="utf-8")
    assert "centre on hides" in table
    assert "found at 1 %" in table

    image = next((checkout / "hides/goat/test/good").iterdir())
    run_python(checkout, "-c", AFTERWARDS, str(run), str(image), SMALL)
    assert (checkout / "predicted/scores.csv").is_file()
    assert (checkout / "goat.pt").is_file()
    assert len(list((checkout / "results/hides-centre").iterdir())) == 2
    assert len(list((checkout / "results/digits-centre").iterdir())) == 1
    compared = (checkout / "compared.md").read_text(encoding="utf-8")
    assert "centre" in compared
    assert "knn" in compared
