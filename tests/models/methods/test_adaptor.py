import pytest
import torch

from models.methods.simplenet.adaptor import Adaptor


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("kind", "bias", "expected"),
    [
        ("linear", False, 1536 * 1536),  # the paper's
        ("linear", True, 1536 * 1536 + 1536),  # the released code's
        ("none", False, 0),
        ("none", True, 0),
        ("mlp", False, 2 * 1536 * 1536),
        ("mlp", True, 2 * (1536 * 1536 + 1536)),
    ],
)
def test_number_of_parameters(kind, bias, expected):
    assert sum(p.numel() for p in Adaptor(1536, kind, bias=bias).parameters()) == expected


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


@pytest.mark.parametrize("init", ["default", "xavier"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_seed_draws_the_same_weights(kind, init):
    first, again, other = (Adaptor(6, kind, bias=True, init=init) for _ in range(3))
    first.initialise(seeded(1))
    again.initialise(seeded(1))
    other.initialise(seeded(2))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])


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
