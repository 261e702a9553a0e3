"""The device that tests pretend: what a GPU refuses and what waits for it are found."""

import pytest
import torch

from models.training.generators import derived
from tests.models.banks import seeded
from tests.models.pretended import TO_DEVICE, TO_HOST, pretended_device


@pytest.fixture
def device(monkeypatch):
    with pretended_device(monkeypatch) as device:
        yield device


def test_operations_are_computed_and_stay_on_the_device(device):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3).to("cuda"))
    rows = torch.ones(4, 3, device="cuda")
    loss = (rows @ weight.T).square().mean()
    loss.backward()
    assert {one.device.type for one in (rows, loss, weight.grad)} == {"cuda"}
    assert device.waits[1:] == []  # but for the copy of the weight
    assert loss.cpu() == (9 + 144) / 2
    assert torch.equal(weight.grad.cpu(), torch.tensor([[3.0] * 3, [12.0] * 3]))


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: here[there.long()],
        lambda there, here: here.sum().add_(there.sum()),
    ],
)
def test_two_devices_in_one_operation_are_refused(device, mix):
    with pytest.raises(RuntimeError, match="of tensors on two devices"):
        mix(torch.ones(3, device="cuda"), torch.ones(3))


def test_what_a_gpu_takes_of_the_host_is_taken(device):
    there = torch.arange(3.0, device="cuda")
    assert (there + torch.tensor(2.0)).tolist() == [2, 3, 4]
    assert there[torch.tensor([2, 0])].tolist() == [2, 0]
    assert TO_DEVICE in {wait.what for wait in device.waits}  # the indices


def test_a_generator_of_another_device_is_refused(device):
    there = derived(seeded(), "cuda")
    assert torch.empty(3, device="cuda").normal_(generator=there).device.type == "cuda"
    for place, generator in (("cuda", seeded()), ("cpu", there)):
        with pytest.raises(RuntimeError, match="by a generator of another"):
            torch.empty(3, device=place).normal_(generator=generator)


@pytest.mark.parametrize(
    ("what", "act"),
    [
        ("_local_scalar_dense", lambda there: there.sum().item()),
        ("_local_scalar_dense", lambda there: int(there[0])),
        ("_local_scalar_dense", lambda there: bool(there[0] > 0)),
        ("nonzero", lambda there: there.nonzero()),
        ("index by a mask", lambda there: there[there > 0]),
        ("bincount", lambda there: there.long().bincount()),
        ("_linalg_check_errors", lambda there: torch.linalg.inv(torch.diag(there + 1))),
        (TO_HOST, lambda there: there.cpu()),
        (TO_HOST, lambda there: there.tolist()),
        (TO_HOST, lambda there: there.to("cpu", non_blocking=True)),
        (TO_DEVICE, lambda there: torch.ones(2).to(there.device)),
        (TO_DEVICE, lambda there: torch.tensor([1.0, 2.0], device=there.device)),
    ],
)
def test_what_waits_is_noted(device, what, act):
    act(torch.arange(3.0, device="cuda"))
    assert [wait.what for wait in device.waits] == [what]


@pytest.mark.parametrize(
    "act",
    [
        lambda there: torch.ones(2).to(there.device, non_blocking=True),
        lambda there: there.masked_fill(there > 0, 1.0),
        lambda there: there.index_select(0, torch.zeros(1, dtype=torch.long, device="cuda")),
        lambda there: there[1:].sum() + torch.zeros_like(there),
    ],
)
def test_what_does_not_wait_is_not(device, act):
    act(torch.arange(3.0, device="cuda"))
    assert device.waits == []
