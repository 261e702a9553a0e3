"""The metrics of maps on a pretended GPU are those of the same maps on the CPU."""

import pytest

from tests.models.pretended import pretended_device
from tests.utils.metrics.test_metrics import evaluate_pixels, random_maps
from utils.metrics.evaluate import evaluate


@pytest.mark.parametrize("levels", [None, 5])
def test_maps_on_a_gpu_are_measured_there(levels, monkeypatch):
    maps, masks = random_maps(0, levels)
    labels = masks.flatten(1).any(1)
    with pretended_device(monkeypatch) as device:
        found = evaluate(maps.amax(dim=(1, 2)), labels, maps.to("cuda"), masks)
        there = evaluate(maps.amax(dim=(1, 2)).to("cuda"), labels, maps.to("cuda"), masks.cuda())
    assert found == there == evaluate_pixels(maps, masks)
    assert any(wait.is_in("utils/metrics/counting.py:_on_device") for wait in device.waits)
