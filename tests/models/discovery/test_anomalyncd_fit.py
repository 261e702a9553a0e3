"""Training on coloured shapes with a small network of random weights."""

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.__future__ import set_overwrite_module_params_on_conversion
from torch._subclasses.fake_tensor import FakeTensorMode

from models.discovery.anomalyncd import token_sources
from models.discovery.anomalyncd.anomalyncd import AnomalyNcd
from models.discovery.anomalyncd.token_sources import Sight
from models.discovery.anomalyncd.views import central_view
from models.errors import ModelError
from tests.models.discovery.small import OPTIONS, build, fitted
from tests.threads import torch_threads

pytestmark = [
    pytest.mark.filterwarnings("ignore:RANDOM BACKBONE WEIGHTS"),
    pytest.mark.usefixtures("narrow_projection"),
]


@pytest.fixture(scope="module")
def usual(labelled, unlabelled):
    return fitted(labelled, unlabelled)


@pytest.mark.parametrize("stored_views", [0, 3])
def test_the_loss_falls(labelled, unlabelled, stored_views):
    changes = {"epochs": 12, "warmup_epochs": 6, "batch_size": 16, "learning_rate": 0.003}
    network, values = fitted(labelled, unlabelled, 3, stored_views=stored_views, **changes)
    assert [epoch for epoch, _ in values] == list(range(1, 13))
    assert all(math.isfinite(value) for _, found in values for value in found.values())

    def falls_to(name):
        first, last = (sum(found[name] for _, found in part) for part in (values[:3], values[-3:]))
        return last / first

    assert falls_to("loss") < 0.95
    assert falls_to("supervised") < 0.7
    # Colours are told apart to some degree even by random weights; one kind for all would agree 3
    # times.
    truth = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    found = network.probabilities(unlabelled).argmax(dim=1).tolist()
    agree = max(
        sum(names[kind] == name for kind, name in zip(found, truth, strict=True))
        for names in itertools.permutations(range(3))
    )
    assert agree >= 5


def test_pieces_of_low_scores_are_drawn_to_the_first_kind(labelled, unlabelled):
    low = [dataclasses.replace(piece, score=0.0) for piece in unlabelled]
    changes = {"epochs": 6, "entropy_weight": 0.0, "sup_weight": 0.0, "learning_rate": 0.02}
    changes["stored_views"] = 2
    network, _ = fitted(labelled, low, anomaly_threshold=1.0, **changes)
    assert network.probabilities(low).argmax(dim=1).tolist() == [0] * 9
    network, _ = fitted(labelled, low, anomaly_threshold=None, **changes)
    assert network.probabilities(low).argmax(dim=1).tolist() != [0] * 9


def test_the_frozen_part_does_not_move(labelled, unlabelled):
    network = build()
    (frozen,) = network.vit._frozen
    before = copy.deepcopy(frozen.state_dict())
    blocks = copy.deepcopy(network.vit.trained.state_dict())
    network.fit(labelled, unlabelled, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    moved = {
        name for name, v in network.vit.trained.state_dict().items() if v.ne(blocks[name]).any()
    }
    assert moved == set(blocks)
    assert not network.training


def test_what_is_saved_and_loaded(usual, unlabelled, tmp_path):
    network, _ = usual
    state = network.state_dict()
    assert {name.split(".")[0] for name in state} == {"vit", "heads", "chosen_head"}
    assert all(".trained.0." in name for name in state if name.startswith("vit"))
    torch.save(state, tmp_path / "head.pt")
    other = build()
    with pytest.raises(ModelError, match="not fitted"):
        other.probabilities(unlabelled)
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert torch.equal(other.probabilities(unlabelled), network.probabilities(unlabelled))


@pytest.mark.parametrize("stored_views", [0, 2])
def test_a_seed_decides_all(usual, labelled, unlabelled, stored_views):
    one, _ = fitted(labelled, unlabelled, 5, stored_views=stored_views)
    torch.manual_seed(99)
    again, _ = fitted(labelled, unlabelled, 5, stored_views=stored_views)
    other, _ = fitted(labelled, unlabelled, 6, stored_views=stored_views)
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(one.heads.directions, other.heads.directions)
    # A second fit begins anew.
    again.fit(labelled, unlabelled, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.heads.directions, one.heads.directions)


def test_numbers_of_threads_make_no_other_network(usual, labelled, unlabelled):
    """Up to rounding: sums of matrix products may be taken in another order."""
    found = []
    for count in (1, 3):
        with torch_threads(count):
            found.append(fitted(labelled, unlabelled)[0])
    one, other = found
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        one.probabilities(unlabelled), usual[0].probabilities(unlabelled), atol=1e-4, rtol=1e-3
    )


def test_predictions(usual, unlabelled):
    network, _ = usual
    found, embeddings = network.probabilities(unlabelled), network.embed(unlabelled)
    assert found.shape == (9, 3)
    assert embeddings.shape == (9, 64)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(9))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(9))
    assert torch.equal(network.probabilities_of(embeddings), found)
    alone = torch.cat([network.probabilities([piece]) for piece in unlabelled])
    torch.testing.assert_close(alone, found, atol=1e-5, rtol=1e-4)
    assert network.probabilities([]).shape == (0, 3)


def test_probabilities_are_those_of_the_chosen_head(usual, unlabelled):
    """By hand: all kinds' softmax at 0.1, labelled ones cut off, the rest rescaled."""
    network = copy.deepcopy(usual[0])
    embeddings = network.embed(unlabelled)
    for head in (1, 3):
        network.chosen_head.fill_(head)
        directions = torch.nn.functional.normalize(network.heads.directions.detach()[head], dim=1)
        shares = ((embeddings @ directions.T) / 0.1).softmax(dim=1)[:, 2:]
        expected = shares / shares.sum(dim=1, keepdim=True)
        torch.testing.assert_close(network.probabilities(unlabelled), expected)


def test_the_head_of_least_loss_without_labels_is_chosen(labelled, unlabelled, monkeypatch):
    steps = []
    network = build(epochs=2, heads=3)
    losses = network.losses

    def noted(*arguments):
        steps.append(losses(*arguments))
        return steps[-1]

    monkeypatch.setattr(network, "losses", noted)
    network.fit(labelled, unlabelled, generator=torch.Generator().manual_seed(0))
    last = torch.stack([step.unlabelled for step in steps[len(steps) // 2 :]]).mean(dim=0)
    assert len(steps) == 2 * 3
    assert network.diagnostics["head_losses"] == pytest.approx(last.tolist())
    assert int(network.chosen_head) == int(last.argmin())


def test_only_matrices_decay():
    network = build()
    decaying, others = network._optimizer().param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (OPTIONS.weight_decay, 0)
    assert all(p.ndim <= 1 for p in others["params"])
    assert any(p is network.heads.directions for p in decaying["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(list(network.parameters()))


def test_rates_and_temperatures_of_each_epoch(labelled, unlabelled, monkeypatch):
    network = build(epochs=4, warmup_epochs=3, repeat_times=2, stored_views=2)
    seen = []
    step = network._step

    def noted(optimizer, tokens, kinds, normality, temperature):
        rates = {group["lr"] for group in optimizer.param_groups}
        seen.append((rates.pop(), temperature, len(kinds), len(normality)))
        assert not rates
        return step(optimizer, tokens, kinds, normality, temperature)

    monkeypatch.setattr(network, "_step", noted)
    network.fit(labelled, unlabelled, generator=torch.Generator().manual_seed(0))
    assert [t for _, t, _, _ in seen] == [0.07] * 6 + [0.04] * 6
    assert seen[0][0] == 0.01
    assert seen[6][0] == pytest.approx((0.01 + 1e-5) / 2)
    assert all(n_l and n_u for _, _, n_l, n_u in seen)
    assert [n_l + n_u for _, _, n_l, n_u in seen[:3]] == [8, 8, 3]


def test_labels_and_scores_go_with_their_pieces(labelled, unlabelled, monkeypatch):
    """Of each batch: the labelled pieces first, each beside its kind; then the others' scores."""
    network = build(epochs=1)
    monkeypatch.setattr(
        token_sources, "training_view", lambda i, m, size, _: central_view(i, m, size)
    )
    centre = {}
    pieces = [*(piece for piece, _ in labelled), *unlabelled]
    for position, piece in enumerate(pieces):
        images, masks = Sight(36, 32)(piece, ())
        centre[network._frozen_tokens(images, masks).values[0].sum().item()] = position
    assert len(centre) == len(pieces)
    seen = []

    def noted(optimizer, tokens, kinds, normality, temperature):
        sums = torch.tensor(list(centre))
        for v in range(2):
            half = tokens.values.sum(dim=(1, 2)).chunk(2)[v]
            found = [list(centre.values())[int((sums - s).abs().argmin())] for s in half]
            n_l = len(kinds)
            assert [labelled[i][1] for i in found[:n_l]] == kinds.tolist()
            scores = [unlabelled[i - len(labelled)].score for i in found[n_l:]]
            assert normality.tolist() == pytest.approx([max(0, 0.5 - s) for s in scores])
            seen.extend(found)
        return network.losses(tokens, kinds, normality, temperature).detached()

    monkeypatch.setattr(network, "_step", noted)
    network.fit(labelled, unlabelled, generator=torch.Generator().manual_seed(0))
    assert len(set(seen)) > 10


def test_what_cannot_be_trained_on_is_refused(labelled, unlabelled):
    network = build()
    generator = torch.Generator()
    with pytest.raises(ModelError, match="there are 0 and 9"):
        network.fit([], unlabelled, generator=generator)
    with pytest.raises(ModelError, match="there are 10 and 0"):
        network.fit(labelled, [], generator=generator)
    with pytest.raises(ModelError, match=r"disc0\.png is of kind 2; .* these are 0 to 1"):
        network.fit([(labelled[0][0], 2)], unlabelled, generator=generator)
    with pytest.raises(ModelError, match="not 0 and 3"):
        AnomalyNcd(OPTIONS, labelled_kinds=0, new_kinds=3)


def test_a_loss_that_is_no_number_is_named(labelled, unlabelled):
    with pytest.raises(FloatingPointError, match="at epoch"):
        fitted(labelled, unlabelled, learning_rate=1e20)


def test_a_missing_file_ends_the_fit(labelled, unlabelled):
    gone = dataclasses.replace(unlabelled[0], image=Path("gone.png"))
    with pytest.raises(ModelError, match=r"gone\.png"):
        build().fit(labelled, [gone], generator=torch.Generator().manual_seed(0))


def test_tensors_of_a_gpu_are_not_mixed_with_others(unlabelled):
    """On fake tensors, which any machine has, and which raise where devices are mixed."""
    network = build()
    network.heads.initialise(torch.Generator().manual_seed(0))
    images = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        set_overwrite_module_params_on_conversion(True)
        try:
            network.to("cuda")
        finally:
            set_overwrite_module_params_on_conversion(False)
        tokens = network._frozen_tokens(images, images[:, :1])
        kinds, normality = torch.tensor([0, 1]).cuda(), torch.rand(6).cuda()
        found = network.losses(tokens, kinds, normality, 0.05)
        assert {value.device.type for value in vars(found).values()} == {"cuda"}
        embeddings = network.embed(unlabelled)
        assert (embeddings.shape, embeddings.device.type) == ((9, 64), "cpu")
        network.vit.restore()


def test_one_piece_of_each_sort_is_enough(labelled, unlabelled):
    network, values = fitted(labelled[:1], unlabelled[:1], new_kinds=1)
    assert all(math.isfinite(found["loss"]) for _, found in values)
    assert network.probabilities(unlabelled).tolist() == [[1.0]] * 9
