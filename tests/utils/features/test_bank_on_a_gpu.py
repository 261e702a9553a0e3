"""Banks for a CUDA device: what is stored on disk is put there once, and read without waiting."""

import pytest
import torch

from tests.utils.features.test_bank import Loader, Scaled
from utils.features.bank import FeatureBank

ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PLACES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=ON_A_GPU),
]
IMAGES = torch.randint(256, (9, 3, 4, 4), generator=torch.Generator().manual_seed(1)).byte()


def extracted(device, store, folder):
    extractor = Scaled()
    extractor.device = torch.device(device)
    return FeatureBank.extract(extractor, Loader(IMAGES), store=store, folder=folder)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("store", ["auto", "disk", "device", "host"])
def test_a_bank_on_a_device_gives_what_one_on_the_cpu_gives(device, store, tmp_path):
    wanted = extracted("cpu", "host", None)
    extracted(device, "disk", tmp_path)  # what `auto` and `disk` find
    bank = extracted(device, store, tmp_path)
    assert {stage.device.type for stage in bank.stages} == {"cpu" if store == "host" else device}
    order = [torch.Generator().manual_seed(2) for _ in range(2)]
    pairs = zip(
        bank.stage_batches(4, generator=order[0]),
        wanted.stage_batches(4, generator=order[1]),
        strict=True,
    )
    for ours, theirs in pairs:
        assert {stage.device.type for stage in ours} == {device}
        assert all(map(torch.equal, [stage.cpu() for stage in ours], theirs))


@pytest.mark.parametrize("device", PLACES)
def test_parts_of_banks_in_two_places_are_joined(device, tmp_path):
    there, host = extracted(device, "device", None), extracted(device, "host", None)
    joined = there.subset([0, 2]).join(host.subset([1]))
    whole = next(there.subset([0, 2, 1]).batches(3))
    assert torch.equal(next(joined.batches(3)), whole)
    assert whole.device.type == device
