import math

import pytest
import torch

from models.methods.simplenet.discriminator import Discriminator, cross_entropy, truncated_l1
from tests.models.banks import seeded


def test_forward_by_hand():
    discriminator = Discriminator(2, 2).eval()
    with torch.no_grad():
        discriminator.first.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        discriminator.first.bias.copy_(torch.tensor([1.0, 0.0]))
        discriminator.normalisation.running_mean.copy_(torch.tensor([1.0, 0.0]))
        discriminator.normalisation.running_var.copy_(torch.tensor([4.0, 1.0]) - 1e-5)
        discriminator.last.weight.copy_(torch.tensor([[10.0, 100.0]]))
        discriminator.last.bias.fill_(5.0)
    # (6, 1) -> (7, -1) -> ((7 - 1) / 2, -1) = (3, -1) -> (3, -0.2) -> 30 - 20 + 5
    logits = discriminator(torch.tensor([[6.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(logits, torch.tensor([15.0, 5.0]))


def test_initialise_draws_anew_and_forgets_statistics():
    first, again = Discriminator(5, 7), Discriminator(5, 7)
    first(torch.randn(20, 5))  # in training mode: the statistics move
    with torch.no_grad():
        first.normalisation.weight.fill_(3)
    first.initialise(seeded())
    again.initialise(seeded())
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert first.normalisation.num_batches_tracked == 0


def test_truncated_l1_by_hand():
    normal, noisy = torch.tensor([0.7, 0.5, 0.1, -1.0]), torch.tensor([-0.6, 0.0])
    by_hand = (0 + 0 + 0.4 + 1.5) / 4 + (0 + 0.5) / 2
    assert truncated_l1(normal, noisy, 0.5).item() == pytest.approx(by_hand)
    by_hand = (0.3 + 0.5 + 0.9 + 2) / 4 + (0.4 + 1) / 2
    assert truncated_l1(normal, noisy, 1.0).item() == pytest.approx(by_hand)
    assert truncated_l1(torch.zeros(3), torch.zeros(3), 0.5).item() == 1.0  # the trivial solution


def test_truncated_l1_pulls_only_what_is_on_the_wrong_side():
    normal = torch.tensor([0.6, 0.4], requires_grad=True)
    noisy = torch.tensor([-0.6, -0.4], requires_grad=True)
    truncated_l1(normal, noisy, 0.5).backward()
    assert normal.grad.tolist() == [0.0, -0.5]
    assert noisy.grad.tolist() == [0.0, 0.5]


def test_cross_entropy_by_hand():
    odds = math.log(3)  # a logit whose probability is 3/4
    normal, noisy = torch.tensor([odds, -odds]), torch.tensor([-odds])
    expected = -(math.log(3 / 4) + math.log(1 / 4)) / 2 - math.log(3 / 4)
    assert cross_entropy(normal, noisy).item() == pytest.approx(expected)
    zero = torch.zeros(3)
    assert cross_entropy(zero, zero).item() == pytest.approx(2 * math.log(2))


def test_cross_entropy_survives_large_logits():
    loss = cross_entropy(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert loss.item() == pytest.approx(2e4)
