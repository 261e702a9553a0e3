"""Tokens that are stored once, against those that are made in each step."""

import tempfile

import pytest
import torch

from models.discovery.anomalyncd import token_sources
from models.discovery.anomalyncd.anomalyncd import AnomalyNcd
from models.discovery.anomalyncd.token_sources import (
    FreshTokens,
    Sight,
    StoredTokens,
    Tokens,
    draw_seeds,
)
from models.discovery.anomalyncd.views import central_view
from models.errors import ModelError
from tests.models.discovery.small import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:RANDOM BACKBONE WEIGHTS"),
    pytest.mark.usefixtures("narrow_projection"),
]


def sources(network, pieces, folder):
    common = {"sight": Sight(36, 32), "make": network._frozen_tokens}
    stored = StoredTokens(
        pieces,
        3,
        folder,
        torch.Generator().manual_seed(2),
        **common,
        batch_size=8,
        shape=(network.vit.num_tokens, network.vit.width),
    )
    return FreshTokens(pieces, *common.values()), stored


def test_stored_tokens_give_the_losses_of_fresh_ones(unlabelled, tmp_path, monkeypatch):
    monkeypatch.setattr(
        token_sources, "training_view", lambda i, m, size, _: central_view(i, m, size)
    )
    network = build()
    network.heads.initialise(torch.Generator().manual_seed(0))
    rows = [torch.tensor([4, 0, 8, 4, 2])]
    found = []
    for source in sources(network, unlabelled, tmp_path):
        (tokens,) = source.epoch(rows, torch.Generator().manual_seed(3))
        assert tokens.values.dtype == torch.float32
        assert tokens.visible.any(dim=1).all()
        found.append(
            (tokens, network.losses(tokens, torch.tensor([0, 1]), torch.full((3,), 0.1), 0.05))
        )
    (fresh, one), (stored, other) = found
    torch.testing.assert_close(stored.values, fresh.values, atol=1e-3, rtol=1e-3)
    assert torch.equal(stored.visible, fresh.visible)
    assert one.loss.item() > 1
    torch.testing.assert_close(other.loss, one.loss, atol=2e-3, rtol=1e-3)


def test_stored_views_are_those_of_their_seeds_and_two_differ(unlabelled, tmp_path):
    network = build()
    _, stored = sources(network, unlabelled, tmp_path)
    seeds = draw_seeds(len(unlabelled), 3, torch.Generator().manual_seed(2))
    sight = Sight(36, 32)
    pairs = set()
    for epoch in range(12):
        generator = torch.Generator().manual_seed(epoch)
        (tokens,) = stored.epoch([torch.tensor([7, 1])], generator)
        for b, row in enumerate((7, 1)):
            expected = network._frozen_tokens(*sight(unlabelled[row], seeds[row]))
            chosen = []
            for v in range(2):
                distances = (tokens.values[v * 2 + b] - expected.values).abs().amax(dim=(1, 2))
                chosen.append(int(distances.argmin()))
                assert distances.min() < 1e-2
                assert torch.equal(tokens.visible[v * 2 + b], expected.visible[chosen[-1]])
            assert chosen[0] != chosen[1]
            pairs.add(tuple(chosen))
    assert len(pairs) == 6


def test_stored_tokens_leave_nothing_behind(labelled, unlabelled, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written = []
    monkeypatch.setattr(
        AnomalyNcd, "_step", lambda *_: written.append(list(tmp_path.rglob("*.f16"))) or stop()
    )

    def stop():
        raise KeyboardInterrupt

    network = build(stored_views=2)
    network.chosen_head.fill_(2)  # of an earlier fit
    with pytest.raises(KeyboardInterrupt):
        network.fit(labelled, unlabelled, generator=torch.Generator().manual_seed(0))
    ((file,),) = written
    assert not list(tmp_path.iterdir())
    assert file.parent.parent == tmp_path
    assert int(network.chosen_head) == -1


def test_stored_tokens_need_room_and_numbers(unlabelled, tmp_path, monkeypatch):
    network = build()
    full = type("Usage", (), {"free": 10})
    with monkeypatch.context() as patch:
        patch.setattr(token_sources.shutil, "disk_usage", lambda _: full)
        with pytest.raises(ModelError, match="GB of the temporary folder") as caught:
            sources(network, unlabelled, tmp_path)
    assert caught.value.change == {"stored_views": "fewer, or 0"}
    made = network._frozen_tokens
    monkeypatch.setattr(
        network, "_frozen_tokens", lambda i, m: Tokens(1e6 * made(i, m).values, made(i, m).visible)
    )
    with pytest.raises(ModelError, match="too large for half precision"):
        sources(network, unlabelled, tmp_path)
