import pytest
import torch

from models.methods.simplenet.adaptor import Adaptor
from tests.models.banks import seeded


def test_none_changes_nothing():
    positions = torch.randn(5, 7)
    assert Adaptor(7, "none")(positions) is positions


@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_one_matrix(bias):
    adaptor = Adaptor(3, "linear", bias=bias)
    adaptor.initialise(seeded())
    zero, units = adaptor(torch.zeros(1, 3)), adaptor(torch.eye(3))
    assert bool(zero.any()) == bias
    positions = torch.tensor([[1.0, -2.0, 0.5]])
    torch.testing.assert_close(adaptor(positions), positions @ (units - zero) + zero)


def test_mlp_has_a_leaky_hidden_layer():
    adaptor = Adaptor(2, "mlp")
    with torch.no_grad():
        adaptor.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        adaptor.layers[2].weight.copy_(torch.tensor([[10.0, 0.0], [0.0, 100.0]]))
    # (1, 1) -> hidden (1, -1) -> leaky (1, -0.2) -> (10, -20)
    torch.testing.assert_close(adaptor(torch.ones(1, 2)), torch.tensor([[10.0, -20.0]]))


def test_inits_have_their_distribution():
    size = 400
    default, xavier = Adaptor(size, bias=True), Adaptor(size, bias=True, init="xavier")
    default.initialise(seeded())
    xavier.initialise(seeded())
    bound = 1 / size**0.5
    drawn = default.layers[0].weight
    assert drawn.abs().max() <= bound
    assert drawn.abs().max() > 0.99 * bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    drawn = xavier.layers[0].weight
    assert drawn.std().item() == pytest.approx((2 / (2 * size)) ** 0.5, rel=0.01)
    assert drawn.abs().max() > 3 * drawn.std()  # normal, not uniform
    assert xavier.layers[0].bias.abs().max() <= bound
