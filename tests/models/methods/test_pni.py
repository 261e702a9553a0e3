import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from models.detector import FeatureShape
from models.errors import ModelError
from models.features.coreset import draw_projection, greedy_k_centre
from models.methods.pni import pni as module
from models.methods.pni import training
from models.methods.pni.network import ExportedNetwork, Neighbourhood, NeighbourNetwork
from models.methods.pni.pni import Pni, PniOptions
from tests.models.banks import Bank, as_positions, draw_bank, fitted, monitoring, seeded, told

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
SMALL = {
    **{"coreset_ratio": 0.2, "dist_size": 12, "neighbourhood": 3, "mlp_width": 16},
    **{"mlp_layers": 2, "epochs": 2, "batch_size": 64, "temperature": 0.3},
}
pni = functools.partial(fitted, "pni", **SMALL)


def neighbours_of(features, side, removed):
    """Rows (B * H * W, (side^2 - 1) * C) by a loop, zeros beyond the edge."""
    B, C, H, W = features.shape
    rows = []
    for b, y, x in np.ndindex(B, H, W):
        row = []
        for cell in range(side * side):
            if cell == removed:
                continue
            v, u = y + cell // side - side // 2, x + cell % side - side // 2
            inside = 0 <= v < H and 0 <= u < W
            row.append(features[b, :, v, u] if inside else torch.zeros(C))
        rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("side", "released", "removed"),
    [(3, False, 4), (9, False, 40), (3, True, 5), (9, True, 41)],
)
def test_neighbours_are_those_of_a_loop(side, released, removed):
    """The released code leaves flat index 41 of 9 x 9 out, and the centre is 40."""
    features = draw_bank(count=2, channels=3, side=5).features[:, :, :, :4]
    neighbourhood = Neighbourhood(side, released=released)
    places = torch.randperm(40, generator=seeded())
    found = neighbourhood.gather(neighbourhood.padded(features), places)
    assert torch.equal(found, neighbours_of(features, side, removed)[places])


def trained_network(released=False, layers=3):
    network = NeighbourNetwork(
        3, Neighbourhood(5, released=released), layers=layers, width=7, dropout=0.5
    )
    network.initialise(4, seeded())
    network.train()
    for seed in range(3):  # batch statistics that are not those of the beginning
        network(2 + torch.randn(50, 72, generator=seeded(seed)), seeded())
    return network.eval()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("released", [False, True])
def test_a_convolution_is_the_rows_of_neighbours(released, layers):
    network = trained_network(released, layers)
    features = draw_bank(count=2, channels=3, side=6).features
    neighbourhood = network.neighbourhood
    rows = neighbourhood.gather(neighbourhood.padded(features), torch.arange(72))
    wanted = network(rows)
    assert wanted.shape == (72, 4)
    torch.testing.assert_close(network.on_maps(features), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ExportedNetwork(network)(features), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("released", [False, True])
def test_the_network_does_not_see_what_it_predicts_but_as_released(released):
    features = draw_bank(count=1, channels=3, side=7).features.requires_grad_(True)
    logits = trained_network(released).on_maps(features)[3 * 7 + 3]
    (gradient,) = torch.autograd.grad(logits.square().sum(), features)
    seen = gradient[0].abs().sum(dim=0) > 0
    wanted = torch.zeros(7, 7, dtype=torch.bool)
    wanted[1:6, 1:6] = True
    wanted[3, 4 if released else 3] = False
    assert torch.equal(seen, wanted)


def test_dropout_keeps_the_mean_and_draws_from_its_generator():
    network = trained_network()
    rows = torch.randn(4000, 72, generator=seeded(3))
    assert torch.equal(network(rows, seeded(1)), network(rows, seeded(1)))
    assert not torch.equal(network(rows, seeded(1)), network(rows, seeded(2)))
    hidden = network.norms[0](network.hidden[0](rows)).relu()
    network.hidden[1].weight.data.copy_(torch.eye(7))
    network.hidden[1].bias.data.zero_()
    network.norms[1].reset_parameters()
    network.last.resize(7)
    network.last.weight.data.copy_(torch.eye(7))
    network.last.bias.data.zero_()
    drops = torch.stack([network(rows, seeded(seed)).mean(dim=0) for seed in range(3)])
    torch.testing.assert_close(drops.mean(dim=0), hidden.mean(dim=0), rtol=0.1, atol=0.02)


def distances_of(left, right):
    return torch.cdist(left.double(), right.double(), compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("side", [3, 5])
def test_votes_are_those_of_a_loop(released, side):
    bank = draw_bank(count=4, channels=5, side=6)
    detector = pni(bank, neighbourhood=side, released=released, epochs=1)
    voted = detector.members[: len(detector.owner) if released else 12]
    H, W, radius = 6, 6, side // 2
    wanted = np.zeros((H, W, len(voted)))
    for image in bank.features:
        for y, x in np.ndindex(H, W):
            nearest = int(distances_of(image[:, y, x][None], voted).argmin())
            for v in range(max(0, y - radius), min(H, y + radius + 1)):
                for u in range(max(0, x - radius), min(W, x + radius + 1)):
                    wanted[v, u, nearest] += 1
    wanted /= wanted.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(detector.votes, wanted.ravel(), rtol=1e-5)


def probabilities(detector, features):
    """Softmax (P, D) of the network on rows of neighbours, float64."""
    options = detector.options
    centre = options.neighbourhood**2 // 2
    rows = neighbours_of(features, options.neighbourhood, centre + options.released)
    with torch.no_grad():
        logits = detector.network(rows).double()
    return (logits / options.temperature).softmax(dim=1).numpy()


def parts_of(detector, features):
    """Distances to C_emb, (P, M), and to C_dist, (P, D), votes (P, K), owner (M,), float64."""
    M, D = len(detector.owner), detector.network.last.out_features
    positions = as_positions(features)
    to_emb = distances_of(positions, detector.members[:M]).numpy()
    to_dist = distances_of(positions, detector.members[:D]).numpy()
    table = detector.votes.double().reshape(features.shape[2] * features.shape[3], -1)
    owner = distances_of(detector.members[:M], detector.members[:D]).argmin(dim=1).numpy()
    return to_emb, to_dist, table.repeat(len(features), 1).numpy(), owner


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 1.0),
        ({"sharpness": 0.7}, 1.0),
        ({"threshold": "emb"}, 1.0),
        ({"dist_size": 40, "coreset_ratio": 0.1}, 1.0),  # likely classes without a member
        ({"dist_size": 40, "coreset_ratio": 0.01}, 5.0),
    ],
)
def test_scores_are_those_of_a_loop_over_positions_and_members(options, scale):
    bank = draw_bank(count=6, channels=5, side=6)
    queries = scale * draw_bank(count=3, channels=5, side=6, seed=2).features
    detector = pni(bank, **options)
    likely, (to_emb, _, votes, owner) = (
        probabilities(detector, queries),
        parts_of(detector, queries),
    )
    count = len(owner) if options.get("threshold") == "emb" else votes.shape[1]
    tau = 1 / (2 * count)
    wanted = []
    for p in range(len(queries) * 36):
        passing = {}
        for m, distance in enumerate(to_emb[p]):
            probability = (likely[p, owner[m]] + votes[p, owner[m]]) / 2
            passing[m] = (probability > tau, probability, math.exp(-distance))
        best = max(probability for _, probability, _ in passing.values())
        normality = max(
            near for passes, probability, near in passing.values() if passes or probability == best
        )
        wanted.append(-math.log(normality) * options.get("sharpness", 1.0))
    maps, scores = detector.score(queries)
    assert scores is None
    np.testing.assert_allclose(maps.flatten(), wanted, rtol=1e-4)
    gated = maps.flatten().numpy() / options.get("sharpness", 1.0) > to_emb.min(axis=1) + 1e-4
    assert gated.any()
    assert not gated.all()


@pytest.mark.parametrize("options", [{}, {"dist_size": 40, "threshold": "emb"}])
def test_released_scores_are_those_of_a_loop(options):
    """The gate of the neighbours is filled by index, and read by rank."""
    bank = draw_bank(count=6, channels=5, side=7)
    queries = draw_bank(count=3, channels=5, side=7, seed=2).features
    detector = pni(bank, released=True, **options)
    likely = probabilities(detector, queries)
    to_emb, to_dist, votes, owner = parts_of(detector, queries)
    tau = 1 / (2 * (len(owner) if "threshold" in options else likely.shape[1]))
    wanted = []
    for p in range(len(queries) * 49):
        ranks = to_emb[p].argsort()
        ranks_of_dist = to_dist[p].argsort()
        near = np.log(0.99) - 0.99 * to_emb[p][ranks]  # log of 0.99 exp(-0.99 d), by rank
        gate = np.zeros(len(owner), dtype=bool)
        for j in range(likely.shape[1]):
            if likely[p, ranks_of_dist[j]] > tau:
                gate[owner == j] = True
        position = votes[p, ranks] > tau
        gate[-1] = position[-1] = True
        wanted.append(-(near[gate].max() + near[position].max()) / 2)
    wanted = np.reshape(wanted, (3, 7, 7))
    inside = wanted[:, 2:-2, 2:-2]
    maps, scores = detector.score(queries)
    np.testing.assert_allclose(maps, np.pad(inside, ((0, 0), (2, 2), (2, 2)), "edge"), rtol=1e-4)
    np.testing.assert_allclose(scores, inside.max(axis=(1, 2)), rtol=1e-4)


def test_both_coresets_are_beginnings_of_one_greedy_choice():
    bank = draw_bank(count=6, channels=9, side=5)
    for size, ratio, count in ((12, 0.2, 30), (40, 0.1, 15)):
        detector = pni(bank, dist_size=size, coreset_ratio=ratio, projection_dim=3, epochs=1)
        generator = seeded()
        points = as_positions(bank.features) @ draw_projection(9, 3, generator)
        chosen = greedy_k_centre(points, max(count, size), generator=generator)
        assert torch.equal(detector.members, as_positions(bank.features)[chosen])
        assert (len(detector.owner), detector.classes) == (count, size)
        own = min(count, size)
        assert torch.equal(detector.owner[:own], torch.arange(own))
        assert detector.tau == 1 / (2 * size)
        assert detector.remarks == []


def test_fewer_features_than_members_asked_for_are_remarked():
    features = draw_bank(count=1, side=3).features.repeat(6, 1, 1, 1)
    (remark,) = pni(Bank(features), dist_size=20, coreset_ratio=0.4, epochs=1).remarks
    assert remark.startswith("C_emb has 9 members and C_dist 9, of 21 and 20 asked for")


def test_channels_are_averaged_in_groups_of_neighbours():
    bank, queries = draw_bank(channels=6), draw_bank(channels=6, seed=2).features
    pooled = [part.unflatten(1, (3, 2)).mean(dim=2) for part in (bank.features, queries)]
    wanted = pni(Bank(pooled[0]))(pooled[1])
    torch.testing.assert_close(pni(bank, channels=3)(queries), wanted)
    assert pni(bank, channels=None).members.shape[1] == 6


def test_the_network_may_see_fewer_channels_than_distances_do():
    bank, queries = draw_bank(channels=6), draw_bank(channels=6, seed=2).features
    detector = pni(bank, neighbour_channels=2)
    assert detector.members.shape[1] == 6
    assert detector.network.linears[0].in_features == 2 * 8
    swapped = queries[:, [2, 0, 1, 5, 3, 4]]  # the same means of three
    reduced = [detector.seen(detector.reduced(part)) for part in (queries, swapped)]
    torch.testing.assert_close(*[detector.network.on_maps(part) for part in reduced])
    assert not torch.allclose(detector(queries), detector(swapped), rtol=0.1)


def test_scores_do_not_depend_on_what_is_looked_at_at_once(monkeypatch):
    bank, queries = draw_bank(side=6), draw_bank(count=5, side=6, seed=2).features
    for released in (False, True):
        detector = pni(bank, released=released)
        wanted = detector(queries)
        with monkeypatch.context() as patch:
            patch.setattr(module, "POSITIONS", 72)
            patch.setattr(module, "PRODUCT", 1)
            torch.testing.assert_close(detector(queries), wanted)


def test_every_position_is_trained_on_or_held_out_once_an_epoch(monkeypatch):
    bank = draw_bank(count=7, channels=4, side=3)
    classes = torch.arange(63).reshape(7, 9).int()
    network = NeighbourNetwork(4, Neighbourhood(3, released=False), layers=2, width=5, dropout=0.0)
    task = training.Task(bank, classes, lambda features: features, torch.device("cpu"))
    held = training._draw_held(classes, 0.25, seeded())
    assert held.sum() == 16
    monkeypatch.setattr(training, "HELD", 2 * 4 * 9)  # two images
    rows = neighbours_of(bank.features, 3, 4)
    for wanted in (held, ~held):
        for generator in (None, seeded(1)):
            found = list(task.batches(network, wanted, 5, generator))
            assert max(len(part) for _, part in found) == 5
            seen = torch.cat([part for _, part in found])
            assert torch.equal(seen.sort().values, classes[wanted].long())
            assert torch.equal(seen, classes[wanted].long()) == (generator is None)
            assert torch.equal(torch.cat([part for part, _ in found]), rows[seen])


def two_halves(count, seed=1, side=8):
    """Features that differ left and right."""
    features = draw_bank(count=count, side=side, seed=seed).features
    features[:, :, :, side // 2 :] += 4
    return features


def test_losses_fall_and_the_epoch_of_least_validation_loss_is_kept(monkeypatch):
    options = PniOptions(**{**SMALL, "epochs": 8, "learning_rate": 0.01})
    detector = Pni(FeatureShape((6,)), options)
    validated = iter([2.0, 1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(training, "_validate", lambda *_: torch.tensor(next(validated)))
    states = []

    @monitoring
    def monitor(_, values):
        states.append({k: v.clone() for k, v in detector.network.state_dict().items()})
        losses.append(values["loss"])

    losses = []
    detector.fit(Bank(two_halves(12)), generator=seeded(), monitor=monitor)
    # Of 12 classes one half can be told by what is around.
    assert losses[-1] < losses[0]
    assert losses[-1] < math.log(12) - 0.5 * math.log(2)
    assert detector.diagnostics == {"kept_epoch": [3.0]}
    for name, value in detector.network.state_dict().items():
        assert torch.equal(value, states[2][name])
    assert not detector.training
    assert detector.stopped_at(3) == {"epochs": 3, "validation_share": 0.0}


def test_the_learning_rate_falls_every_few_epochs(monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    pni(draw_bank(), epochs=5, decay_epochs=2, batch_size=1000, learning_rate=0.1)
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001])


def test_a_last_batch_of_one_position_is_left_out():
    bank = draw_bank(count=1, side=3)
    (values,) = told(
        Pni(
            FeatureShape((6,)),
            PniOptions(**{**SMALL, "epochs": 1, "batch_size": 8, "validation_share": 0.0}),
        ),
        bank,
    )
    assert values.keys() == {"loss"}


def test_what_is_normal_elsewhere_is_found():
    """Right features on the left: PatchCore finds them normal."""
    bank, test = Bank(two_halves(16)), two_halves(16, seed=2)
    test[8:, :, 3, 1] = two_halves(8, seed=3)[:, :, 3, 6]
    labels = [0] * 8 + [1] * 8
    detector = pni(bank, epochs=10, learning_rate=0.01, dist_size=30, temperature=1.0)
    ours = detector(test)
    assert roc_auc_score(labels, ours.amax(dim=(1, 2))) > 0.95
    inside = ours[8:, 3, 1].min()
    assert inside > ours[:8].amax()
    theirs = fitted("patchcore", bank, num_neighbors=1).score(test)[1]
    assert roc_auc_score(labels, theirs) < 0.75


@pytest.mark.parametrize("released", [False, True])
def test_a_graph_takes_any_batch(released):
    detector = pni(draw_bank(side=6), released=released, channels=4)
    graph = detector.exported().eval()
    with torch.no_grad():
        example = draw_bank(2, side=6).features
        traced = torch.jit.trace(graph, (example,), check_trace=False)
        for batch in (1, 5):
            queries = draw_bank(batch, side=6, seed=batch).features
            found, wanted = traced(queries), detector.score(queries)
            pairs = zip(found, wanted, strict=True) if released else [(found, wanted[0])]
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_features_without_a_grid_are_refused():
    with pytest.raises(ModelError, match="grid of 2 x 2 positions, and the features have 1 x 1"):
        pni(draw_bank(side=1))
    with pytest.raises(ModelError, match="grid of 5 x 5 positions, and the features have 4 x 4"):
        pni(draw_bank(side=4), released=True)


def test_another_grid_is_an_error():
    detector = pni(draw_bank(side=5))
    with pytest.raises(ModelError, match="25 positions, the features have 4 x 4"):
        detector(draw_bank(side=4).features)


def test_a_share_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ModelError, match=r"share 0\.99 leaves no two positions") as caught:
        pni(draw_bank(count=2), validation_share=0.99)
    assert caught.value.change == {"validation_share": "lower"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbourhood": 1}, "--method.neighbourhood 1 has no neighbours"),
        ({"batch_size": 1}, "--method.batch-size 1 has no batch statistics"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PniOptions(), **changes)
