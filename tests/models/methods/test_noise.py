import pytest
import torch

from models.methods.simplenet.noise import GaussianNoise
from tests.models.banks import seeded


@pytest.mark.parametrize("sigma", [0.005, 0.015, 1.0, 50.0])
def test_noise_has_the_stated_sigma(sigma):
    adapted = 3 * torch.randn(2000, 200, generator=seeded(9))
    drawn = (GaussianNoise(sigma, seeded())(adapted).double() - adapted.double()) / sigma
    count = drawn.numel()
    assert abs(drawn.mean()) < 5 / count**0.5
    assert drawn.std().item() == pytest.approx(1, abs=5 / (2 * count) ** 0.5)
    assert drawn.pow(4).mean().item() == pytest.approx(3, abs=0.1)  # Gaussian, not uniform
    # Independent from entry to entry: as many signs agree as differ.
    agree = (drawn[:, 1:].sign() == drawn[:, :-1].sign()).double().mean()
    assert agree.item() == pytest.approx(0.5, abs=0.005)


def test_input_stays_as_it_is_and_gets_the_gradient():
    adapted = torch.randn(4, 3, requires_grad=True)
    before = adapted.detach().clone()
    noisy = GaussianNoise(0.5, seeded())(adapted)
    assert torch.equal(adapted, before)
    (2 * noisy).sum().backward()
    assert torch.equal(adapted.grad, torch.full((4, 3), 2.0))


def test_noise_depends_on_nothing_but_the_generator_given():
    adapted = torch.zeros(6, 5)
    torch.manual_seed(1)
    first = GaussianNoise(0.015, seeded(4))
    torch.manual_seed(2)
    again = GaussianNoise(0.015, seeded(4))
    assert torch.equal(first(adapted), again(adapted))
    assert not torch.equal(first(adapted), again(adapted) + first(adapted))
    assert not torch.equal(first(adapted), GaussianNoise(0.015, seeded(5))(adapted))


def test_what_the_given_generator_draws_next_does_not_depend_on_the_noise():
    given, twin = seeded(), seeded()
    noise, other = GaussianNoise(0.015, given), GaussianNoise(5.0, twin)
    for _ in range(3):
        noise(torch.zeros(10, 4))
    other(torch.zeros(1, 1))
    assert torch.equal(torch.randperm(20, generator=given), torch.randperm(20, generator=twin))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_noise_on_a_gpu_is_drawn_there_from_the_seed():
    adapted = torch.zeros(200, 100, device="cuda")
    first, again = (GaussianNoise(0.1, seeded(), "cuda")(adapted) for _ in range(2))
    assert torch.equal(first, again)
    assert first.std().item() == pytest.approx(0.1, rel=0.05)
