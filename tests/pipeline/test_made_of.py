"""What an experiment is made of beside its data: the folders of images that its options name."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from pipeline.experiments import read_tasks, structured_catalogue
from pipeline.made_of import made_of
from tests.datasets.trees import draw_mvtec_category
from utils.runs.made_of import WHATEVER

DRAEM = structured_catalogue().compose("folder", "draem")


def write(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((8, 8, 3), level, np.uint8))


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Return the digest of what the options of DRAEM name, for one folder of textures."""
    monkeypatch.setenv("NOCO_CACHE", str(tmp_path / "cache"))
    draw_mvtec_category(tmp_path / "images", "cloth", num_train=1, num_good=1, num_defective=1)
    experiment = replace(DRAEM, data_root=tmp_path / "images")
    tasks = read_tasks(experiment, ["cloth"])

    def digest(folder):
        method = replace(experiment.method, anomaly_source=folder and str(folder))
        return made_of(replace(experiment, method=method), tasks)["cloth"].weights

    return digest


def test_a_fit_is_made_of_the_textures_that_it_pastes(named, tmp_path):
    folder = tmp_path / "textures"
    write(folder / "woven/0.png", 1)
    before = named(folder)
    assert before not in (WHATEVER, named(None))
    assert named(folder) == before
    write(folder / "woven/0.png", 20)
    changed = named(folder)
    assert changed != before
    write(folder / "1.png", 1)
    assert named(folder) not in (before, changed)


def test_a_folder_that_cannot_be_pasted_from_is_left_to_the_method(named, tmp_path):
    assert named(tmp_path / "nowhere") == WHATEVER
