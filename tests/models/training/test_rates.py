import pytest

from models.training.rates import late_drops, warmed_cosine


def test_the_rate_falls_after_four_fifths_and_nine_tenths():
    """Of 700 epochs, at 560 and 630."""
    rates = {epoch: late_drops(epoch, 700) for epoch in (0, 559, 560, 629, 630, 699)}
    assert rates == pytest.approx({0: 1, 559: 1, 560: 0.2, 629: 0.2, 630: 0.04, 699: 0.04})


def test_a_warmed_cosine_rises_in_a_line_and_falls_to_where_it_began():
    at = {part: warmed_cosine(part, warmup=0.2, least=0.1) for part in (0, 0.1, 0.2, 0.6, 1, 2)}
    assert at == pytest.approx({0: 0.1, 0.1: 0.55, 0.2: 1, 0.6: 0.55, 1: 0.1, 2: 0.1})
    assert warmed_cosine(0.4, warmup=0.2, least=0.0) == pytest.approx(0.8535533905932737)
    assert warmed_cosine(0.0, warmup=0.0, least=0.1) == 1
