"""UniAD against slow loops, PyTorch's own attention, and its promise: no neighbour is seen."""

import functools
import importlib.util
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.backbone.extractor import FrozenExtractor
from models.deployment.network import Deployed
from models.detector import FeatureShape
from models.errors import ModelError
from models.features.feature_norm import normalised
from models.methods.uniad.network import (
    Attention,
    DecoderLayer,
    Dropout,
    EncoderLayer,
    Transformer,
    blocks_everything,
    neighbour_mask,
)
from models.methods.uniad.uniad import METHOD, Uniad, UniadOptions
from tests.models.banks import Bank, StagedBank, draw_bank, draw_images, seeded, told
from utils.evaluation.scoring import Scoring, score_batch
from utils.evaluation.smoothing import smoothing_matrix

C = 6
SMALL = {
    **{"hidden": 16, "heads": 2, "feed_forward": 24, "encoder_layers": 1, "decoder_layers": 1},
    **{"neighbourhood": 3, "epochs": 2, "batch_size": 4},
}


def uniad(channels=(C,), **options):
    return Uniad(FeatureShape(channels), UniadOptions(**SMALL | options))


def fitted(bank, seed=0, channels=None, **options):
    detector = uniad(channels or (bank.channels,), **options)
    detector.fit(bank, generator=seeded(seed))
    return detector


def transformer(height, width, **changes):
    sizes = {"width": 16, "heads": 2, "inner": 24, "num_encoder": 1, "num_decoder": 1}
    network = Transformer(C, **sizes | {"neighbourhood": 3} | changes)
    network.start(height, width, seeded())
    return network.eval()


# The mask


def by_loops(height, width, window):
    mask = torch.zeros(height * width, height * width)
    for y in range(height):
        for x in range(width):
            for v in range(max(0, y - window // 2), min(height, y + window // 2 + 1)):
                for u in range(max(0, x - window // 2), min(width, x + window // 2 + 1)):
                    mask[y * width + x, v * width + u] = -math.inf
    return mask


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 7), (14, 14), (1, 6)])
@pytest.mark.parametrize("window", [1, 3, 7])
def test_the_mask_is_a_window_around_each_query(size, window):
    mask = neighbour_mask(*size, window)
    assert torch.equal(mask, by_loops(*size, window))
    assert blocks_everything(*size, window) == bool(mask.isinf().all(dim=1).any())


def seen(network, height, width):
    """Whether output i changes with input j, (N, N)."""
    N = height * width
    tokens = torch.randn(1, N, C, generator=seeded(2), requires_grad=True)
    weights = torch.randn(C, generator=seeded(3))
    rows = [
        torch.autograd.grad(network(tokens)[0, i] @ weights, tokens)[0][0].abs().sum(dim=1)
        for i in range(N)
    ]
    return torch.stack(rows) != 0


def test_an_encoder_layer_sees_a_token_itself_and_all_but_its_neighbours():
    """The token itself only as the sum of each layer keeps it."""
    network = transformer(4, 5, num_decoder=0)
    wanted = neighbour_mask(4, 5, 3) == 0
    assert torch.equal(seen(network, 4, 5), wanted | torch.eye(20, dtype=torch.bool))
    nn.init.zeros_(network.encoder[0].attention.out.weight)
    assert torch.equal(seen(network, 4, 5), torch.eye(20, dtype=torch.bool))


def test_a_decoder_layer_sees_neither_a_token_nor_its_neighbours():
    network = transformer(4, 5, num_encoder=0)
    assert torch.equal(seen(network, 4, 5), neighbour_mask(4, 5, 3) == 0)
    unmasked = transformer(4, 5, num_encoder=0, neighbourhood=None)
    assert seen(unmasked, 4, 5).all()


@pytest.mark.parametrize("attention", ["to_encoded", "to_previous"])
def test_each_attention_of_a_decoder_layer_alone_keeps_the_mask(attention):
    network = transformer(4, 5, num_encoder=0)
    other = {"to_encoded": "to_previous", "to_previous": "to_encoded"}[attention]
    nn.init.zeros_(getattr(network.decoder[0], other).out.weight)
    assert torch.equal(seen(network, 4, 5), neighbour_mask(4, 5, 3) == 0)


# Layers


def as_torch(attention):
    """PyTorch's own attention with the same weights."""
    theirs = nn.MultiheadAttention(
        attention.out.in_features, attention.heads, batch_first=True
    ).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.weight)
        theirs.in_proj_bias.copy_(attention.bias)
        theirs.out_proj.load_state_dict(attention.out.state_dict())
    return theirs


def drawn(module, seed=5):
    """A module with all parameters, biases too, away from their first values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)) / 3)
            seed += 1
    return module.eval()


def unchanged(values):
    return values


@pytest.mark.parametrize("drop", [None, unchanged], ids=["scoring", "training"])
@pytest.mark.parametrize("window", [3, None])
def test_attention_is_that_of_pytorch(drop, window):
    attention = drawn(Attention(16, 4))
    queries, keys, values = (torch.randn(3, 20, 16, generator=seeded(i)) for i in range(3))
    mask = None if window is None else neighbour_mask(4, 5, window)
    theirs = as_torch(attention)
    for given in ((queries, keys, values), (queries, queries, values)):
        wanted, _ = theirs(*given, attn_mask=mask)
        torch.testing.assert_close(attention(*given, mask, drop), wanted, rtol=1e-4, atol=1e-5)
    shared = queries[:1]
    wanted, _ = theirs(shared.expand(3, -1, -1), keys, values, attn_mask=mask)
    found = attention(shared, keys, values, mask, drop)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_encoder_layer_is_that_of_pytorch():
    layer = drawn(EncoderLayer(16, 4, 24))
    theirs = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    with torch.no_grad():
        theirs.self_attn.load_state_dict(as_torch(layer.attention).state_dict())
        theirs.linear1.load_state_dict(layer.feed_forward.first.state_dict())
        theirs.linear2.load_state_dict(layer.feed_forward.second.state_dict())
        theirs.norm1.load_state_dict(layer.norms[0].state_dict())
        theirs.norm2.load_state_dict(layer.norms[1].state_dict())
    tokens, mask = torch.randn(3, 20, 16, generator=seeded()), neighbour_mask(4, 5, 3)
    with torch.no_grad():
        wanted = theirs(tokens, src_mask=mask)
        found = layer(tokens, torch.zeros(20, 16), mask, None)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_positions_are_added_to_queries_and_keys_only():
    layer = drawn(EncoderLayer(16, 4, 24))
    tokens, positions = (torch.randn(2, 20, 16, generator=seeded(i)) for i in range(2))
    attended, _ = as_torch(layer.attention)(*[tokens + positions[0]] * 2, tokens)
    between = layer.norms[0](tokens + attended)
    wanted = layer.norms[1](between + layer.feed_forward(between, unchanged))
    torch.testing.assert_close(layer(tokens, positions[0], None, None), wanted)


def test_a_decoder_layer_asks_the_encoder_then_the_layer_before():
    layer = DecoderLayer(16, 4, 24)
    layer.resize("query", 20)
    drawn(layer)
    encoded, previous = (torch.randn(3, 20, 16, generator=seeded(i)) for i in range(2))
    positions, mask = torch.randn(20, 16, generator=seeded(2)), neighbour_mask(4, 5, 3)
    query = layer.query.expand(3, -1, -1)
    first, second = as_torch(layer.to_encoded), as_torch(layer.to_previous)
    found, _ = first(query + positions, encoded + positions, encoded, attn_mask=mask)
    tokens = layer.norms[0](query + found)
    found, _ = second(tokens + positions, previous + positions, previous, attn_mask=mask)
    tokens = layer.norms[1](tokens + found)
    wanted = layer.norms[2](tokens + layer.feed_forward(tokens, unchanged))
    found = layer(previous, encoded, encoded + positions, positions, mask, None)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_positions_are_those_of_column_and_row():
    network = transformer(3, 4)
    positions = network.positions()
    for y in range(3):
        for x in range(4):
            wanted = torch.cat([network.columns[x], network.rows[y]])
            assert torch.equal(positions[4 * y + x], wanted)


def test_the_network_has_the_published_size():
    """7.72 million parameters for 272 channels on 14 x 14, counted layer by layer."""
    channels, E, inner, side = 272, 256, 1024, 14
    attention = 4 * (E * E + E)
    feed_forward = E * inner + inner + inner * E + E
    encoder = attention + feed_forward + 2 * 2 * E
    decoder = side * side * E + 2 * attention + feed_forward + 3 * 2 * E
    projections = channels * E + E + E * channels + channels
    wanted = 4 * encoder + 4 * decoder + projections + 2 * side * E // 2 + 2 * E
    detector = Uniad(FeatureShape((24, 32, 56, 160)), METHOD.options)
    detector.network.start(side, side, seeded())
    assert detector.num_trainable == wanted
    assert round(wanted / 1e6, 2) == 7.72


def test_first_values():
    network = Transformer(
        40, width=64, heads=2, inner=100, num_encoder=2, num_decoder=1, neighbourhood=3
    )
    network.start(9, 11, seeded())
    layer = network.decoder[0]
    for linear in (network.first, network.last, layer.feed_forward.first, layer.to_encoded.out):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.97 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()
    bound = (6 / (64 + 3 * 64)) ** 0.5  # of the three inputs' projections, as one matrix
    assert 0.97 * bound < layer.to_encoded.weight.abs().max() <= bound
    assert layer.query.shape == (99, 64)
    assert abs(layer.query.mean()) < 0.05
    assert abs(layer.query.std() - 1) < 0.05
    for table in (network.rows, network.columns):
        assert 0 <= table.min() < 0.01
        assert 0.99 < table.max() <= 1
    states = [each.attention.weight for each in network.encoder]
    assert not torch.equal(*states)


# Noise


def test_dropout_drops_its_share_and_keeps_the_mean():
    drop = Dropout(0.1, seeded())
    found = drop(torch.ones(100, 10_001))
    share = (found == 0).double().mean().item()
    assert share == pytest.approx(0.1, abs=0.001)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    assert found.double().mean().item() == pytest.approx(1, abs=0.002)
    again = Dropout(0.1, seeded())
    assert torch.equal(again(torch.ones(100, 10_001)), found)
    assert not torch.equal(again(torch.ones(100, 10_001)), found)
    # Four entries share a random number; they are independent all the same.
    kept = (found[:, :10_000] > 0).double().reshape(-1, 4)
    assert np.abs(np.corrcoef(kept.numpy().T) - np.eye(4)).max() < 0.01
    values = torch.randn(7)
    assert Dropout(0.0, seeded())(values) is values


def test_jitter_has_a_deviation_in_proportion_to_each_tokens_norm():
    detector = uniad((40,), jitter=20.0)
    tokens = torch.randn(2, 3, 40, generator=seeded()) * torch.tensor([1.0, 5.0, 0.0]).view(3, 1)
    many = tokens.repeat(2000, 1, 1)
    noise = detector.jittered(many, seeded(1)) - many
    wanted = tokens.norm(dim=2) / 40 * 20
    for image in range(2):
        for token in range(3):
            found = noise[image::2, token].std().item()
            assert found == pytest.approx(wanted[image, token].item(), rel=0.02)
    assert abs(noise.mean()) < 0.05


def test_a_batch_is_jittered_with_a_probability():
    detector = uniad(jitter_probability=0.3)
    tokens, generator = torch.ones(1, 2, C), seeded()
    changed = [not torch.equal(detector.jittered(tokens, generator), tokens) for _ in range(1000)]
    assert sum(changed) == pytest.approx(300, abs=50)
    plain = uniad(jitter=0.0)
    assert plain.jittered(tokens, generator) is tokens


def test_scores_have_neither_jitter_nor_dropout_and_the_loss_has_both():
    bank = draw_bank()
    losses = {}
    for name, changes in {
        "none": {"jitter": 0.0, "dropout": 0.0},
        "jitter": {"dropout": 0.0},
        "dropout": {"jitter": 0.0},
    }.items():
        detector = uniad(epochs=1, batch_size=8, **changes)
        (values,) = told(detector, bank)
        losses[name] = values["loss"]
        assert torch.equal(detector(bank.features), detector(bank.features))
        assert not detector.training
    assert len(set(losses.values())) == 3
    # One step: the loss is that of the first weights, of tokens as they are.
    fresh = transformer(5, 5)
    generator = seeded()
    fresh.start(5, 5, generator)
    tokens = bank.features.flatten(2).mT
    assert losses["none"] == pytest.approx(F.mse_loss(fresh(tokens), tokens).item(), rel=1e-5)


def test_a_fit_leaves_the_global_generator():
    detector, state = uniad(), torch.random.get_rng_state()
    detector.fit(draw_bank(), generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), state)


# Tokens, maps and scores


def draw_stages(count, sides=((12, 10), (6, 5), (3, 4)), widths=(3, 5, 4)):
    return [
        torch.randn(count, width, *side, generator=seeded(i)).contiguous(
            memory_format=torch.channels_last
        )
        for i, (width, side) in enumerate(zip(widths, sides, strict=True))
    ]


def test_tokens_are_the_stages_resized_to_the_coarsest_corners_on_corners():
    stages = draw_stages(4)
    detector = fitted(StagedBank(stages), channels=(3, 5, 4), neighbourhood=1, epochs=1)
    assert detector.network.grid == (3, 4)
    tokens = detector.tokens(stages)
    assert tokens.shape == (4, 12, 12)
    by_place = tokens.unflatten(1, (3, 4))
    assert torch.equal(by_place[..., 8:].movedim(-1, 1), stages[2])
    for part, stage in zip((by_place[..., :3], by_place[..., 3:8]), stages[:2], strict=True):
        for y, down in ((0, 0), (2, -1)):
            for x, across in ((0, 0), (3, -1)):
                torch.testing.assert_close(part[:, y, x], stage[:, :, down, across])
    # Between two rows of the 6: y = 1 of 3 lies at 2.5.
    torch.testing.assert_close(by_place[:, 1, 0, 3:8], stages[1][:, :, 2:4, 0].mean(dim=2))


def test_a_grid_may_be_named():
    stages = draw_stages(4)
    detector = fitted(StagedBank(stages), channels=(3, 5, 4), grid=5, epochs=1)
    assert detector.network.grid == (5, 5)
    wanted = F.interpolate(stages[2], (5, 5), mode="bilinear", align_corners=True)
    torch.testing.assert_close(detector.tokens(stages)[..., 8:].mT.unflatten(2, (5, 5)), wanted)


def test_maps_are_norms_of_differences_sixteen_times_larger():
    bank = draw_bank(side=5)
    detector = fitted(bank)
    maps, scores = detector.score(bank.features)
    assert maps.shape == (8, 80, 80)
    assert torch.equal(detector(bank.features), maps)
    tokens = bank.features.flatten(2).mT
    norms = (detector.network(tokens) - tokens).square().sum(dim=2).sqrt().unflatten(1, (5, 5))
    corners = maps[:, ::79, ::79]
    torch.testing.assert_close(corners, norms[:, ::4, ::4])
    whole = nn.UpsamplingBilinear2d(scale_factor=16)(norms[:, None])
    torch.testing.assert_close(maps, whole[:, 0], rtol=1e-4, atol=1e-5)
    wanted = F.avg_pool2d(whole, 16, stride=1).amax(dim=(1, 2, 3))
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5)
    mean = uniad(image_score="mean")
    mean.load_state_dict(detector.state_dict())
    torch.testing.assert_close(mean.score(bank.features)[1], whole.mean(dim=(1, 2, 3)))


def test_a_head_scores_larger_features_on_its_own_grid():
    detector = fitted(draw_bank(side=5))
    large = torch.randn(2, C, 9, 11, generator=seeded())
    resized = F.interpolate(large, (5, 5), mode="bilinear", align_corners=True)
    assert torch.equal(detector(large), detector(resized))


def test_a_saved_head_of_a_grid_that_is_no_square_loads_into_any(tmp_path):
    stages = draw_stages(4, sides=((4, 7),), widths=(C,))
    detector = fitted(Bank(stages[0]))
    assert detector.network.grid == (4, 7)
    torch.save(detector.state_dict(), tmp_path / "head.pth")
    for other in (uniad(), fitted(draw_bank(side=5))):
        other.load_state_dict(torch.load(tmp_path / "head.pth"))
        assert other.num_trainable == detector.num_trainable
        assert torch.equal(other(stages[0]), detector(stages[0]))


# Training


def test_the_learning_rate_falls_and_gradients_are_clipped(monkeypatch):
    rates, norms = [], []
    step = torch.optim.AdamW.step

    def watched(self, *arguments, **options):
        (group,) = self.param_groups
        rates.append(group["lr"])
        gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    bank = Bank(100 * draw_bank().features)
    fitted(bank, epochs=5, lr_step=2, learning_rate=0.01, batch_size=8, clip_norm=0.5)
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])
    assert norms == pytest.approx([0.5] * 5, rel=1e-3)


def scenes(count, seed=0):
    """Features (N, 8, 6, 6) that two numbers of each image decide, by position, and noise."""
    places = torch.randn(2, 8, 6, 6, generator=seeded(99))
    numbers = torch.randn(count, 2, generator=seeded(seed)) / 3 + torch.tensor([1.0, 0.0])
    noise = torch.randn(count, 8, 6, 6, generator=seeded(seed + 1))
    return torch.einsum("nk,kchw->nchw", numbers, places) + 0.1 * noise


def test_a_visible_defect_stands_out():
    options = {"epochs": 15, "batch_size": 16, "learning_rate": 5e-3, "clip_norm": 1.0}
    detector = uniad((8,), **options, jitter=2.0)
    losses = [values["loss"] for values in told(detector, Bank(scenes(96)))]
    assert losses[-1] < 0.3 * losses[0]
    good, bad = scenes(30, seed=20), scenes(30, seed=40)
    bad[:, :, 1:3, 2:4] = 1.5 * torch.randn(30, 8, 2, 2, generator=seeded(7))
    with torch.no_grad():
        normal, (maps, anomalous) = detector.score(good)[1], detector.score(bad)
    ranked = (anomalous[:, None] > normal[None]).double().mean()
    assert ranked > 0.98
    inside = maps[:, 20:40, 36:56].mean()
    maps[:, :56, 16:76] = 0
    assert inside > 2 * maps.sum() / (maps > 0).sum()


def test_tokens_are_rebuilt_from_those_that_are_no_neighbours():
    """No answer that is the same for all images has a loss below the variance of each position."""
    places = torch.randn(2, 8, 6, 6, generator=seeded(99))
    numbers = torch.randn(96, 2, generator=seeded())
    bank = Bank(torch.einsum("nk,kchw->nchw", numbers, places))
    options = {"hidden": 32, "epochs": 20, "batch_size": 16, "learning_rate": 5e-3}
    detector = uniad((8,), **options, clip_norm=1.0, jitter=0.0, dropout=0.0)
    last = told(detector, bank)[-1]["loss"]
    assert last < 0.4 * bank.features.var(dim=0).mean()
    assert detector.remarks == []


def test_a_fit_that_hardly_looks_at_images_says_so():
    bank = Bank(scenes(20) + 1000)
    detector = uniad((8,), epochs=1)
    (values,) = told(detector, bank)
    variance = bank.features.double().var(dim=0, correction=0).mean().item()
    (remark,) = detector.remarks
    assert f"{values['loss']:.4g}, that of each position's mean token {variance:.4g}." in remark


# A single token


def test_pooled_features_are_one_token_without_a_mask():
    changes = METHOD.on["semantic"]
    detector = fitted(draw_bank(side=1), **changes)
    assert detector.remarks[0] == "The grid has one token, which attends to itself alone."
    maps, scores = detector.score(draw_bank(side=1).features)
    torch.testing.assert_close(maps, scores[:, None, None].expand(-1, 16, 16))
    detector.fit(draw_bank(side=5), generator=seeded())
    assert not any("one token" in remark for remark in detector.remarks)


# Refusals


@pytest.mark.parametrize(
    ("side", "window", "way"),
    [
        (1, 7, "--method.neighbourhood none"),
        (3, 7, "--method.neighbourhood 1, or --method.neighbourhood none"),
        (7, 7, "--method.neighbourhood 5, or --method.neighbourhood none"),
        (2, 3, "--method.neighbourhood 1, or --method.neighbourhood none"),
    ],
)
def test_a_window_that_leaves_nothing_is_refused(side, window, way):
    message = rf"on a grid of {side} x {side} tokens .*neighbourhood {window} leaves .*: {way}$"
    with pytest.raises(ModelError, match=message):
        fitted(draw_bank(side=side), neighbourhood=window)
    if "," in way:
        allowed = int(way.split()[1].rstrip(","))
        fitted(draw_bank(side=side), neighbourhood=allowed, epochs=1)
        with pytest.raises(ModelError, match="leaves the one in the middle"):
            fitted(draw_bank(side=side), neighbourhood=allowed + 2)


def test_more_tokens_than_attention_is_made_for_are_refused():
    with pytest.raises(ModelError, match=r"49 x 49 has 2,401 tokens, .* --method\.grid 14"):
        fitted(draw_bank(side=49, count=1))


def test_a_feature_norm_needs_a_named_grid():
    bank = StagedBank(draw_stages(4))
    options = UniadOptions(**SMALL, feature_norm="l2")
    with pytest.raises(ModelError, match=r"feature-norm l2 .* 12 x 10, .* --method\.grid 14"):
        normalised(Uniad(FeatureShape((3, 5, 4)), options), "l2", (3, 5, 4)).fit(
            bank, generator=seeded()
        )
    options = UniadOptions(**SMALL, feature_norm="l2", grid=5)
    head = Uniad(FeatureShape((3, 5, 4)), options)
    normalised(head, "l2", (3, 5, 4)).fit(bank, generator=seeded())
    assert head.network.grid == (5, 5)


def test_options_that_cannot_go_together_are_refused():
    for hidden, heads in ((250, 8), (9, 3)):
        with pytest.raises(ValueError, match=f"hidden {hidden} must be even and a multiple of"):
            UniadOptions(hidden=hidden, heads=heads)
    with pytest.raises(ValueError, match="are both 0"):
        UniadOptions(encoder_layers=0, decoder_layers=0)
    with pytest.raises(ValueError, match=r"--method.neighbourhood 4 must be odd"):
        UniadOptions(neighbourhood=4)
    assert UniadOptions(neighbourhood=None).neighbourhood is None


# Export


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(1)
    return FrozenExtractor("resnet10t", (1, 2), weights="random", patch_size=1)


def test_a_network_for_export_gives_the_suites_scores(extractor):
    images = draw_images(6, side=96)
    stages = [m.half().float() for m in extractor.stage_maps(images)]
    detector = Uniad(FeatureShape(extractor.stage_channels), UniadOptions(**SMALL))
    detector.fit(StagedBank(stages), generator=seeded())
    assert detector.network.grid == (12, 12)
    for sigma in (0.0, 3.0):
        smoothing = functools.partial(smoothing_matrix, size=96, sigma=sigma)
        network = Deployed(extractor, detector, image_size=96, smoothing=smoothing)
        wanted = score_batch(detector, stages, Scoring(map_size=96, blur_sigma=sigma))
        with torch.no_grad():
            scores, maps = network(images)
        torch.testing.assert_close(scores, wanted.images, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(maps, wanted.maps, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def staged():
    stages = draw_stages(6, sides=((9, 9), (5, 5)), widths=(3, 4))
    detector = fitted(StagedBank(stages), channels=(3, 4))
    with torch.no_grad():
        return detector.exported(), stages, detector.score_stages(stages)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_traced_graph_takes_any_batch(staged):
    graph, stages, wanted = staged
    with torch.no_grad():
        traced = torch.jit.trace(graph, ([part[:2] for part in stages],), check_trace=False)
        for size in (1, 6):
            found = traced([part[:size] for part in stages])
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other[:size])


@pytest.mark.slow
def test_an_onnx_graph_takes_any_batch(staged):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (requirements-export.txt)")
    import onnxruntime

    graph, stages, wanted = staged
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            ([part[:2] for part in stages],),
            dynamo=True,
            verbose=False,
            opset_version=18,
            input_names=["fine", "coarse"],
            dynamic_shapes=([{0: batch}, {0: batch}],),
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for size in (1, 6):
        parts = [part[:size].contiguous().numpy() for part in stages]
        found = session.run(None, dict(zip(("fine", "coarse"), parts, strict=True)))
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other[:size].numpy(), rtol=1e-4, atol=1e-5)
