"""Invertible layers: inverses, and log-determinants against those of autograd's Jacobian."""

import math

import pytest
import torch
from torch import nn

from models.errors import ModelError
from models.methods.flows.couplings import (
    ClampedCoupling,
    Conv,
    SigmoidCoupling,
    SplitPrior,
    ZeroConv,
)
from models.methods.flows.glow import GlowOptions
from models.methods.flows.layers import (
    ActNorm,
    Chain,
    FoldedConv,
    InvertibleConv,
    Permutation,
    Squeeze,
    standard_normal,
)
from models.methods.flows.multiscale_flow import bits_per_dimension, build_flow, train_flow
from tests.models.banks import monitoring, seeded


def clamped(first):
    return ClampedCoupling(6, width=7, clamp=1.5, first=first)


def normed_conv():
    return FoldedConv(shaken(ActNorm(6)), shaken(InvertibleConv(6)))


# What makes a layer of six channels, and the maps or vectors that it takes, of few dimensions.
LAYERS = {
    "clamped coupling, first part": (lambda: clamped(True), (6,)),
    "clamped coupling, second part": (lambda: clamped(False), (6,)),
    "sigmoid coupling": (lambda: SigmoidCoupling(6, width=5), (6, 1, 2)),
    "sigmoid coupling, odd": (lambda: SigmoidCoupling(3, width=5), (3, 2, 1)),
    "split with prior": (lambda: SplitPrior(6), (6, 1, 1)),
    "permutation of vectors": (lambda: Permutation(6), (6,)),
    "permutation of maps": (lambda: Permutation(6), (6, 2, 1)),
    "actnorm": (lambda: ActNorm(6), (6, 1, 1)),
    "convolution at few positions": (lambda: InvertibleConv(6), (6, 1, 1)),
    "convolution at many positions": (lambda: InvertibleConv(3), (3, 2, 2)),
    "actnorm and convolution folded": (normed_conv, (6, 1, 1)),
    "squeeze": (Squeeze, (2, 2, 2)),
    "chain": (lambda: Chain([Squeeze(), ActNorm(4), SigmoidCoupling(4, width=5)]), (1, 2, 4)),
}


@torch.no_grad()
def shaken(module, seed=3, by=0.1):
    """The module with all parameters drawn, those that begin at zero too."""
    generator = seeded(seed)
    for layer in module.modules():
        if isinstance(layer, InvertibleConv | Permutation):
            layer.initialise(generator)
    for parameter in module.parameters():
        parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module


def jacobian_log_det(function, x):
    """log |det| of a function of a single example, by autograd."""
    jacobian = torch.autograd.functional.jacobian(function, x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_inverse_undo_each_other(name):
    make, shape = LAYERS[name]
    layer = shaken(make())
    x = torch.randn(5, *shape, generator=seeded())
    y, _ = layer(x)
    assert y.numel() == x.numel()
    if y.shape == x.shape:
        assert (y - x).abs().max() > 0.1
    torch.testing.assert_close(layer.inverse(y), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(layer(layer.inverse(y))[0], y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_log_determinants_are_those_of_the_jacobian(name):
    make, shape = LAYERS[name]
    layer = shaken(make(), by=0.3).double()
    x = torch.randn(3, *shape, generator=seeded()).double()
    y, log_det = layer(x)
    wanted = torch.stack(
        [jacobian_log_det(lambda one: layer(one)[0], x[i : i + 1]) for i in (0, 1, 2)]
    )
    assert log_det.shape == (3,)
    torch.testing.assert_close(log_det, wanted, rtol=1e-8, atol=1e-8)
    if not name.startswith(("permutation", "squeeze")):
        assert log_det.abs().min() > 0.01
    _, parts = layer.located(x)
    assert parts.shape == (3, *y.shape[2:])


def test_a_clamped_log_scale_is_the_arcus_tangens_of_what_the_network_says():
    layer = shaken(clamped(first=False), by=1.0)
    x = 30 * torch.randn(4, 6, generator=seeded())
    y, log_det = layer(x)
    raw = layer.network(x[:, :3])
    log_scale = 1.5 * 0.636 * torch.atan(raw[:, :3] / 1.5)
    assert torch.equal(y[:, :3], x[:, :3])
    torch.testing.assert_close(y[:, 3:], log_scale.exp() * x[:, 3:] + raw[:, 3:])
    torch.testing.assert_close(log_det, log_scale.sum(dim=1))
    assert log_scale.abs().max() > 1
    assert log_scale.abs().max() < 1.5


def test_a_sigmoid_coupling_is_the_papers_and_begins_nearly_as_the_identity():
    layer = SigmoidCoupling(4, width=5)
    layer.initialise(seeded())
    x = torch.randn(2, 4, 3, 3, generator=seeded())
    y, log_det = layer(x)
    begins_at = torch.sigmoid(torch.tensor(2.0))
    torch.testing.assert_close(y, torch.cat([x[:, :2], begins_at * x[:, 2:]], dim=1))
    torch.testing.assert_close(log_det, torch.full((2,), 18 * math.log(begins_at)))
    raw = shaken(layer).network(x[:, :2])
    scale = torch.sigmoid(raw[:, :2] + 2)
    y, parts = layer.located(x)
    torch.testing.assert_close(y[:, 2:], (x[:, 2:] + raw[:, 2:]) * scale)
    torch.testing.assert_close(parts, scale.log().sum(dim=1))


def test_a_split_gives_the_density_under_the_gaussian_that_the_other_part_predicts():
    layer = shaken(SplitPrior(4))
    x = torch.randn(2, 4, 3, 3, generator=seeded())
    y, parts = layer.located(x)
    mean, log_std = layer.network(x[:, :2]).chunk(2, dim=1)
    wanted = torch.distributions.Normal(mean, log_std.exp()).log_prob(x[:, 2:]).sum(dim=1)
    torch.testing.assert_close(parts - standard_normal(y[:, 2:]), wanted)
    assert torch.equal(y[:, :2], x[:, :2])


def test_an_actnorm_makes_its_first_batch_standard():
    layer = ActNorm(4)
    x = 5 + torch.tensor([0.1, 1, 10, 0])[:, None, None] * torch.randn(
        9, 4, 3, 3, generator=seeded()
    )
    layer.adapt(x)
    y, _ = layer(x)
    torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    std = y.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(std, torch.tensor([1.0, 1, 1, 0]), rtol=1e-4, atol=1e-5)
    assert layer.log_scale[3] == 0  # nothing is known of a constant channel's scale


def test_all_actnorms_of_a_flow_are_set_by_one_batch():
    """Each by what those before it make of the batch."""
    flow = build_flow(3, levels=2, steps=2, width=8, squeezes_first=True)
    flow.initialise(seeded())
    x = 3 + 7 * torch.rand(16, 3, 8, 8, generator=seeded())
    flow.adapt(x)
    maps, num_norms = x, 0
    for level, chain in enumerate(flow.chains):
        for layer in chain:
            maps, _ = layer(maps)
            if isinstance(layer, ActNorm):
                num_norms += 1
                assert maps.mean(dim=(0, 2, 3)).abs().max() < 1e-4
                assert (maps.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-3
        maps = maps[:, : flow.kept[0]] if level == 0 else maps
    assert num_norms == 4


def test_a_convolution_begins_as_a_rotation_with_as_many_parameters_as_entries():
    layer = InvertibleConv(6)
    assert torch.equal(layer.matrix(), torch.eye(6))
    layer.initialise(seeded())
    matrix = layer.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(6), rtol=0, atol=1e-5)
    assert (matrix - torch.eye(6)).abs().max() > 0.3
    assert not torch.equal(layer.permutation, torch.arange(6))
    assert sum(p.numel() for p in layer.parameters()) == 36
    again = InvertibleConv(6)
    again.initialise(seeded(1))
    assert not torch.allclose(again.matrix(), matrix, atol=0.1)


def test_a_convolution_is_the_same_at_few_and_at_many_positions():
    layer = shaken(InvertibleConv(6))
    x = torch.randn(2, 6, 4, 4, generator=seeded())
    many, _ = layer(x)
    few = torch.cat(
        [layer(x[:, :, i : i + 1, j : j + 1])[0] for i in range(4) for j in range(4)], dim=2
    )
    torch.testing.assert_close(few.reshape(2, 6, 4, 4), many, rtol=1e-4, atol=1e-4)
    wanted = torch.einsum("rc,bchw->brhw", layer.matrix(), x)
    torch.testing.assert_close(many, wanted, rtol=1e-4, atol=1e-4)


def test_permutations_are_fixed_and_differ_by_block():
    chain = Chain([Permutation(30) for _ in range(8)])
    chain.initialise(seeded())
    orders = [tuple(layer.order.tolist()) for layer in chain]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({*orders, tuple(range(30))}) == 9
    x = torch.randn(2, 30, generator=seeded())
    assert torch.equal(chain(x)[0], chain(x)[0])
    again = Chain([Permutation(30) for _ in range(8)])
    again.initialise(seeded())
    assert [tuple(layer.order.tolist()) for layer in again] == orders


def test_a_squeeze_keeps_each_square_of_positions_together():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    y, _ = Squeeze()(x)
    assert y[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert y[0, :, 1, 1].tolist() == [10, 11, 14, 15]


@pytest.mark.parametrize(
    "kind", [lambda: Conv(3, 4, 3), lambda: ZeroConv(3, 4)], ids=["drawn", "zero"]
)
def test_at_a_single_position_a_kernels_middle_is_all(kind):
    layer = shaken(kind())
    x = torch.randn(5, 3, 1, 1, generator=seeded())
    scale = layer.log_scale.mul(3).exp() if isinstance(layer, ZeroConv) else torch.ones(4)
    whole = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1) * scale[:, None, None]
    torch.testing.assert_close(layer(x), whole)


# Channels, grid, levels, whether the first level squeezes.
FLOWS = {
    "a position": (6, (1, 1), 1, False),
    "one level": (2, (1, 3), 1, False),
    "two levels": (2, (2, 2), 2, False),
    "three levels": (2, (4, 4), 3, False),
    "image": (1, (4, 4), 2, True),
    "odd channels": (3, (2, 4), 2, False),
}


def made(name):
    C, grid, levels, squeezes_first = FLOWS[name]
    flow = build_flow(C, levels=levels, steps=2, width=5, squeezes_first=squeezes_first)
    return shaken(flow), torch.randn(3, C, *grid, generator=seeded(1))


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_and_its_inverse_undo_each_other(name):
    flow, x = made(name)
    latents, _ = flow(x)
    assert sum(part.numel() for part in latents) == x.numel()
    torch.testing.assert_close(flow.inverse(latents), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flows_density_is_that_of_the_change_of_variables(name):
    flow, x = made(name)
    flow, x = flow.double(), x.double()

    def all_latents(one):
        return torch.cat([part.flatten() for part in flow(one)[0]])

    _, log_det = flow(x)
    nll = flow.negative_log_likelihood(x)
    assert nll.shape == (3, *x.shape[2:])
    for i in range(3):
        one = x[i : i + 1]
        wanted = jacobian_log_det(all_latents, one)
        torch.testing.assert_close(log_det[i], wanted, rtol=1e-7, atol=1e-7)
        normal = torch.distributions.Normal(0, 1).log_prob(all_latents(one)).sum()
        torch.testing.assert_close(nll[i].sum(), -(normal + wanted), rtol=1e-7, atol=1e-7)
    bits = bits_per_dimension(nll, x.shape[1])
    torch.testing.assert_close(bits, nll.sum(dim=(1, 2)) / (x[0].numel() * math.log(2)))


def test_a_density_integrates_to_one():
    flow = shaken(build_flow(2, levels=1, steps=3, width=6, squeezes_first=False))
    axis = torch.linspace(-12, 12, 481)
    points = torch.cartesian_prod(axis, axis)[:, :, None, None]
    with torch.no_grad():
        density = (-flow.negative_log_likelihood(points)).exp()
    assert density.sum().item() * 0.05**2 == pytest.approx(1, abs=1e-3)


def test_a_map_says_where_what_is_unlikely_lies():
    """Of one step, whose coupling looks one position around, what is changed is seen there only."""
    flow = shaken(build_flow(4, levels=1, steps=1, width=5, squeezes_first=False))
    x = torch.randn(1, 4, 9, 9, generator=seeded())
    changed = x.clone()
    changed[:, :, 2, 6] += 5
    difference = (flow.negative_log_likelihood(changed) - flow.negative_log_likelihood(x))[0]
    rows, columns = torch.nonzero(difference, as_tuple=True)
    assert difference[2, 6].abs() > 1
    # Two 3 x 3 convolutions in a row.
    assert (rows - 2).abs().max() <= 2
    assert (columns - 6).abs().max() <= 2


def test_a_coarser_levels_part_is_divided_equally():
    flow = shaken(build_flow(1, levels=1, steps=1, width=5, squeezes_first=True))
    nll = flow.negative_log_likelihood(torch.randn(2, 1, 4, 4, generator=seeded()))
    squares = nll.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    assert torch.equal(squares, squares[..., :1].expand_as(squares))
    assert nll.std() > 0.1


@pytest.mark.parametrize("name", FLOWS)
def test_a_folded_flow_is_the_same_function(name):
    flow, x = made(name)
    folded = flow.folded()
    kinds = {type(layer) for layer in folded.modules()}
    assert FoldedConv in kinds
    assert not {ActNorm, InvertibleConv} & kinds
    torch.testing.assert_close(
        folded.negative_log_likelihood(x), flow.negative_log_likelihood(x), rtol=1e-4, atol=1e-4
    )


def test_every_parameter_of_a_flow_is_trained():
    flow, x = made("two levels")
    flow.negative_log_likelihood(x).sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("levels", "squeezes_first", "grid", "way_out"),
    [
        (2, False, (5, 4), "multiples of 2, these maps have 5 x 4 positions: at most 1"),
        (3, False, (6, 6), "multiples of 4, these maps have 6 x 6 positions: at most 2"),
        (3, True, (28, 28), "multiples of 8, these maps have 28 x 28 positions: at most 2"),
        (1, True, (7, 7), "multiples of 2, these maps have 7 x 7 positions: sides that are even"),
    ],
)
def test_a_grid_that_cannot_be_halved_is_refused(levels, squeezes_first, grid, way_out):
    flow = build_flow(2, levels=levels, steps=1, width=2, squeezes_first=squeezes_first)
    with pytest.raises(ModelError, match=way_out) as caught:
        flow.negative_log_likelihood(torch.zeros(1, 2, *grid))
    assert caught.value.change == {"levels": "lower"}


def test_a_single_channel_is_refused():
    with pytest.raises(ModelError, match="at least 2"):
        build_flow(1, levels=1, steps=1, width=2, squeezes_first=False)


def trained(flow, batches, options, *, steps):
    """Train a flow; return the losses of its epochs."""
    losses = []
    monitor = monitoring(lambda _, values: losses.append(values["loss"]))
    generator, noise = seeded(), seeded()
    train_flow(
        flow,
        flow,
        batches,
        options=options,
        steps=steps,
        generator=generator,
        noise=noise,
        monitor=monitor,
    )
    return losses


def test_the_learning_rate_rises_over_the_warm_up(monkeypatch):
    rates = []

    class Watched(torch.optim.Adamax):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adamax", Watched)
    flow = build_flow(2, levels=1, steps=1, width=2, squeezes_first=False)
    flow.initialise(seeded())
    batch = torch.randn(4, 2, 2, 2, generator=seeded())
    for warmup, expected in {
        2: [0.02, 0.04, 0.06, 0.08, 0.08, 0.08],
        0: [0.08] * 6,
    }.items():
        rates.clear()
        batches = lambda: iter([batch] * 2)  # noqa: E731
        options = GlowOptions(epochs=3, learning_rate=0.08, warmup_epochs=warmup)
        assert len(trained(flow, batches, options, steps=2)) == 3
        assert rates == pytest.approx(expected)


def test_training_finds_a_correlated_gaussian():
    """Its bits come down to those of the true density, which the flow can express."""
    mixing = torch.tensor([[2.0, 0.0], [1.9, 0.3]])
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), scale_tril=mixing)
    draws = torch.randn(2000, 2, generator=seeded()) @ mixing.T
    flow = build_flow(2, levels=1, steps=2, width=8, squeezes_first=False)
    flow.initialise(seeded())
    options = GlowOptions(epochs=12, learning_rate=0.03, warmup_epochs=1)
    batches = lambda: iter(draws[:, :, None, None].split(400))  # noqa: E731
    values = trained(flow, batches, options, steps=5)
    entropy = -normal.log_prob(draws).mean().item() / (2 * math.log(2))
    assert values[0] > entropy + 0.05
    assert values[-1] == pytest.approx(entropy, abs=0.03)
