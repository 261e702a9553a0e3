"""The losses against loops over pairs, and values worked out by hand."""

import math

import pytest
import torch

from models.discovery.anomalyncd.losses import (
    batch_losses,
    contrast_of_kinds,
    contrast_of_pairs,
    cross_entropy,
    distillation,
    evenness,
    normality_of,
    soft_targets,
)

HEADS, K, KNOWN = 3, 5, 2


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(n=4, seed=0):
    return numbers(HEADS, 2, n, K, seed=seed).tanh()


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def test_pairs_against_a_loop():
    projections = numbers(2, 3, 7)
    rows = [projections[v, i] for v in range(2) for i in range(3)]
    terms = []
    for i, row in enumerate(rows):
        others = [math.exp(cosine(row, rows[j])) for j in range(6) if j != i]
        terms.append(-math.log(math.exp(cosine(row, rows[(i + 3) % 6])) / sum(others)))
    assert contrast_of_pairs(projections).item() == pytest.approx(sum(terms) / 6)


def test_pairs_that_are_alike_by_hand():
    """Each view equals its other one and is at a right angle to the other piece: e / (e + 2)."""
    both = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    assert contrast_of_pairs(5 * both).item() == pytest.approx(-math.log(math.e / (math.e + 2)))


def test_kinds_against_a_loop():
    projections, kinds = numbers(2, 4, 6), [0, 2, 0, 1]
    rows = [(projections[v, i], kinds[i]) for v in range(2) for i in range(4)]
    terms = []
    for i, (row, kind) in enumerate(rows):
        weight = [math.exp(cosine(row, other) / 0.07) for other, _ in rows]
        below = sum(w for j, w in enumerate(weight) if j != i)
        alike = [j for j, (_, other) in enumerate(rows) if other == kind and j != i]
        terms.append(-sum(math.log(weight[j] / below) for j in alike) / len(alike))
    found = contrast_of_kinds(projections, torch.tensor(kinds))
    assert found.item() == pytest.approx(sum(terms) / 8)


def test_a_single_labelled_piece_has_no_contrast():
    projections = numbers(2, 1, 6).requires_grad_()
    loss = contrast_of_kinds(projections, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 0
    assert not projections.grad.any()


def test_contrasts_have_finite_gradients():
    projections = numbers(2, 4, 6).requires_grad_()
    loss = contrast_of_kinds(projections, torch.tensor([0, 0, 1, 2]))
    (loss + contrast_of_pairs(projections)).backward()
    assert torch.isfinite(projections.grad).all()
    assert projections.grad.abs().max() > 1e-3


def test_targets_have_no_labelled_kinds_and_sum_to_1():
    normality = torch.tensor([0.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    found = soft_targets(cosines(), normality, KNOWN, 0.07)
    assert found.shape == (HEADS, 2, 4, K)
    assert not found[..., :KNOWN].any()
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(HEADS, 2, 4, dtype=torch.float64))


def test_targets_by_hand():
    """Softmax of 0.04 log(1, 3, 4) at 0.04, cut and rescaled: (3, 4) / 7; then to the first."""
    row = 0.04 * torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64).log()
    found = soft_targets(row.expand(1, 2, 2, 3), torch.tensor([0.0, 0.4]), 1, 0.04)
    expected = torch.tensor([[0, 3 / 7, 4 / 7], [0, 0.4 + 0.6 * 3 / 7, 0.6 * 4 / 7]])
    torch.testing.assert_close(found, expected.double().expand(1, 2, 2, 3))


def test_normality_is_what_a_score_lacks():
    scores = torch.tensor([0.0, 0.2, 0.5, 1.0])
    torch.testing.assert_close(normality_of(scores, 0.5), torch.tensor([0.5, 0.3, 0.0, 0.0]))
    assert not normality_of(scores, None).any()


def test_each_view_teaches_the_other():
    values = cosines()
    target = soft_targets(values, torch.zeros(4), KNOWN, 0.05)
    expected = []
    for h in range(HEADS):
        terms = []
        for view, other in ((0, 1), (1, 0)):
            for i in range(4):
                student = (values[h, other, i] / 0.1).exp()
                student = student / student.sum()
                terms.append(-(target[h, view, i] * student.log()).sum().item())
        expected.append(sum(terms) / len(terms))
    found = distillation(target, values)
    assert found.tolist() == pytest.approx(expected)
    alone = -(target * (values / 0.1).log_softmax(-1)).sum(-1).mean((1, 2))
    assert not torch.allclose(found, alone)


def test_evenness_is_the_divergence_from_uniform():
    values = cosines(seed=3)
    for h, found in enumerate(evenness(values).tolist()):
        shares = (values[h] / 0.1).softmax(-1).reshape(-1, K).mean(0)
        assert found == pytest.approx(sum(p * math.log(p * K) for p in shares.tolist()))
        assert found > 0


def test_evenness_is_0_where_kinds_are_used_alike():
    one_each = torch.eye(K).expand(1, 2, K, K) * 50
    torch.testing.assert_close(evenness(one_each), torch.zeros(1), atol=1e-6, rtol=0)
    collapsed = torch.eye(K)[[0] * K].expand(1, 2, K, K) * 50
    torch.testing.assert_close(evenness(collapsed), torch.tensor([math.log(K)]))


def test_cross_entropy_against_a_loop():
    values, kinds = cosines(), [1, 0, 1, 1]
    terms = [
        -(values[h, v, i] / 0.1).log_softmax(0)[kind].item()
        for h in range(HEADS)
        for v in range(2)
        for i, kind in enumerate(kinds)
    ]
    found = cross_entropy(values, torch.tensor(kinds))
    assert found.item() == pytest.approx(sum(terms) / len(terms))


WEIGHTS = {"labelled_kinds": KNOWN, "teacher_temperature": 0.06}


def test_the_total_is_the_sum_of_its_parts():
    projections, values = numbers(2, 5, 6), cosines(5)
    kinds, normality = torch.tensor([1, 0]), torch.tensor([0.5, 0.0, 0.1], dtype=torch.float64)
    found = batch_losses(
        projections, values, kinds, normality, **WEIGHTS, sup_weight=0.3, entropy_weight=4
    )
    labelled, others = values[:, :, :2], values[:, :, 2:]
    target = soft_targets(others, normality, KNOWN, 0.06)
    unlabelled = distillation(target, others) + 4 * evenness(others)
    torch.testing.assert_close(found.unlabelled, unlabelled)
    expected = 0.7 * (unlabelled.mean() + contrast_of_pairs(projections)) + 0.3 * (
        cross_entropy(labelled, kinds) + contrast_of_kinds(projections[:, :2], kinds)
    )
    torch.testing.assert_close(found.loss, expected)


def test_nothing_is_learnt_through_the_target():
    projections, values = numbers(2, 5, 6), cosines(5).requires_grad_()
    kinds, normality = torch.tensor([1, 0]), torch.zeros(3, dtype=torch.float64)
    found = batch_losses(
        projections, values, kinds, normality, **WEIGHTS, sup_weight=0, entropy_weight=0
    )
    (grad,) = torch.autograd.grad(found.loss, values)
    target = soft_targets(values[:, :, 2:], normality, KNOWN, 0.06)
    predicted = (values[:, :, 2:] / 0.1).softmax(-1).detach()
    expected = (predicted - target.detach().flip(1)) / 0.1 / (2 * 3 * HEADS)
    torch.testing.assert_close(grad[:, :, 2:], expected)
    assert not grad[:, :, :2].any()
    assert found.detached().loss.requires_grad is False
