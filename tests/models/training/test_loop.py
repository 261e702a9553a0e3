"""The loop over epochs: what it minimises and tells, which epoch it keeps, where it goes on."""

import copy

import pytest
import torch
from torch import nn

from models.training.loop import Loop, summed
from tests.models.banks import monitoring, seeded

VALUES = torch.tensor([[4.0], [8.0], [-2.0], [6.0]])


class Keeper:
    """A monitor that keeps each epoch's state of each phase."""

    scores_steps = False

    def __init__(self, phases=None):
        self.phases, self.offered, self.ended, self.told = phases or {}, [], [], []

    def __call__(self, step, values):
        self.told.append((step, values))

    def kept(self, phase):
        return self.phases.get(phase)

    def keep(self, phase, state, *, ended):
        self.offered.append((phase, copy.deepcopy(state())))
        self.ended.append(ended)


class Mean(nn.Module):
    """A number, and how often it was asked for in train mode."""

    def __init__(self):
        super().__init__()
        self.guess = nn.Parameter(torch.zeros(1))
        self.modes = []

    def forward(self, values):
        self.modes.append(self.training)
        return (values - self.guess).square().mean()


def build(module, epochs=3, **settings):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    settings = {"generator": seeded(), **settings}
    return Loop(module=module, optimizer=optimizer, epochs=epochs, **settings)


def shuffled(generator, size=2):
    return VALUES[torch.randperm(len(VALUES), generator=generator)].split(size)


def run(module, monitor=None, **settings):
    loop = build(module, **settings)
    batches = lambda: shuffled(loop.generator)  # noqa: E731
    return loop.run(batches, lambda batch: {"loss": module(batch)}, monitor=monitor)


def test_steps_are_those_of_a_plain_loop():
    module, plain = Mean(), torch.zeros(1)
    speed, generator, losses = torch.zeros(1), seeded(), []
    for _ in range(3):
        each = []
        for batch in shuffled(generator):
            each.append(float((batch - plain).square().mean()))
            speed = 0.5 * speed - 2 * (batch - plain).mean()
            plain = plain - 0.1 * speed
        losses.append(sum(each) / len(each))
    trained = run(module)
    torch.testing.assert_close(module.guess.detach(), plain)
    assert [values["loss"] for values in trained.values] == pytest.approx(losses)
    assert trained.epoch == 3
    assert module.modes == [True] * 6
    assert not module.training


def test_the_rate_follows_the_steps_where_their_number_is_known():
    asked, module = [], Mean()
    run(module, epochs=2, rate=lambda passed: asked.append(passed) or 0.0)
    assert asked == [0, 1]
    assert module.guess == 0
    asked.clear()
    loop = build(module, epochs=2, steps=2, rate=lambda passed: asked.append(passed) or 0.5)
    loop.run(lambda: shuffled(loop.generator), lambda batch: {"loss": module(batch)})
    assert asked == [0, 0, 0.5, 1, 1, 1.5]
    assert loop.optimizer.param_groups[0]["lr"] == 0.05


def test_the_gradient_is_clipped():
    module = Mean()
    loop = build(module, epochs=1, clip_norm=0.25)
    loop.run(lambda: [VALUES], lambda batch: {"loss": module(batch)})
    assert module.guess.item() == pytest.approx(0.1 * 0.25)


def test_the_epoch_of_least_validation_loss_is_kept():
    module, losses = Mean(), iter([3.0, 1.0, 1.0, 2.0])
    seen = []

    def validate():
        assert not module.training
        seen.append(module.guess.item())
        return torch.tensor(next(losses))

    loop = build(module, epochs=4)
    trained = loop.run(
        lambda: shuffled(loop.generator), lambda b: {"loss": module(b)}, validate=validate
    )
    assert trained.epoch == 2
    assert module.guess.item() == seen[1]
    assert [values["validation_loss"] for values in trained.values] == [3, 1, 1, 2]


@pytest.mark.parametrize("where", ["loss", "validation_loss"])
def test_a_loss_that_is_not_finite_is_named(where):
    module, calls = Mean(), []

    def losses(batch):
        calls.append(1)
        factor = torch.nan if where == "loss" and len(calls) == 4 else 1.0
        return {"loss": factor * module(batch)}

    loop = build(module)
    validate = (lambda: torch.tensor(torch.inf)) if where == "validation_loss" else None
    message = "loss is nan at epoch 2, step 2" if where == "loss" else "loss is inf at epoch 1"
    with pytest.raises(FloatingPointError, match=message):
        loop.run(lambda: shuffled(loop.generator), losses, validate=validate)


def test_hooks_come_in_order_and_their_values_are_told():
    module, order = Mean(), []
    told = monitoring(lambda step, values: order.append((step, sorted(values))), scores_steps=True)
    loop = build(module, epochs=2)
    loop.run(
        lambda: shuffled(loop.generator),
        lambda batch: summed({"a": module(batch), "b": module(batch)}),
        monitor=told,
        before_epoch=lambda epoch: order.append(f"before {epoch}"),
        after_epoch=lambda epoch: order.append(f"after {epoch}") or {"radius": 1.0},
        complete=lambda: order.append("complete"),
    )
    names = ["a", "b", "loss", "radius"]
    assert order == [
        *("before 1", "after 1", "complete", (1, names)),
        *("before 2", "after 2", "complete", (2, names)),
    ]
    order.clear()
    loop = build(module, epochs=2)
    loop.run(
        lambda: shuffled(loop.generator),
        lambda batch: {"loss": module(batch)},
        complete=lambda: order.append("complete"),
    )
    assert order == ["complete"]  # nobody scores in between


def test_the_sum_of_the_terms_is_the_loss():
    found = summed({"a": torch.tensor(1.0), "b": torch.tensor(2.5)})
    assert {name: float(term) for name, term in found.items()} == {"loss": 3.5, "a": 1.0, "b": 2.5}


def test_reports_are_means_over_the_epochs_since_the_last():
    plain, rare = Keeper(), Keeper()
    run(Mean(), plain, epochs=5)
    run(Mean(), rare, epochs=5, report_every=2)
    losses = [values["loss"] for _, values in plain.told]
    assert [step for step, _ in rare.told] == [2, 4, 5]
    wanted = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert [values["loss"] for _, values in rare.told] == pytest.approx(wanted)


@pytest.mark.parametrize("report_every", [1, 2])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_it_goes_on_after_any_epoch_with_the_same_bits(after, report_every):
    def start(kept):
        """A second generator, a second optimizer, and something else that changes."""
        module, drawn = Mean(), seeded(5)
        module.other = nn.Parameter(torch.ones(1))
        counted = nn.Linear(1, 1)
        nn.init.zeros_(counted.weight)
        losses = iter([5.0, 3.0, 4.0, 1.0, 2.0][len(kept["epochs"]["values"]) if kept else 0 :])

        def loss(batch):
            noise = torch.rand(1, generator=drawn)
            with torch.no_grad():
                counted.weight += 1
            return {"loss": (module.other * module(batch + noise)).sum() * counted.weight.item()}

        monitor = Keeper(kept)
        loop = Loop(
            module=module,
            optimizer=torch.optim.Adam([module.guess], lr=0.1),
            second_optimizer=torch.optim.AdamW([module.other], lr=0.2),
            epochs=5,
            generator=seeded(),
            drawn={"noise": drawn},
            others={"counted": counted},
            rate=lambda passed: 1 / (1 + passed),
            report_every=report_every,
        )
        trained = loop.run(
            lambda: shuffled(loop.generator),
            loss,
            monitor=monitor,
            validate=lambda: torch.tensor(next(losses)),
        )
        return module, monitor, trained

    module, monitor, trained = start(None)
    phase, state = monitor.offered[after - 1]
    assert phase == "epochs"
    again, later, also = start({"epochs": state})
    assert torch.equal(module.guess, again.guess)
    assert torch.equal(module.other, again.other)
    assert also == trained
    assert trained.epoch == 4
    assert [entry for entry in monitor.told if entry[0] > after] == later.told


def test_a_first_phase_is_kept_at_its_end_and_not_told():
    module, keeper = Mean(), Keeper()
    loop = build(module, phase="pretraining")
    loop.run(
        lambda: shuffled(loop.generator),
        lambda batch: {"loss": module(batch)},
        monitor=keeper,
        is_first_phase=True,
    )
    assert keeper.told == []
    assert [phase for phase, _ in keeper.offered] == ["pretraining"] * 3
    assert keeper.ended == [False, False, True]
