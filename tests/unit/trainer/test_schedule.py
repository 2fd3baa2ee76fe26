"""Learning rates by step."""

import pytest

from lowmem_ft.trainer.schedule import learning_rate


def rates(schedule: str, warmup: float, total: int = 10) -> list[float]:
    return [learning_rate(step, total=total, peak=1.0, schedule=schedule, warmup=warmup) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.3, 3])
def test_warmup_rises_to_the_peak(schedule: str, warmup: float) -> None:
    assert rates(schedule, warmup)[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_after_warmup() -> None:
    assert rates("constant", 0) == [1.0] * 10
    assert rates("linear", 0) == pytest.approx([1 - step / 10 for step in range(10)])
    cosine = rates("cosine", 0)
    assert cosine[5] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)


def test_no_rate_is_zero_before_the_end() -> None:
    for schedule in ("cosine", "linear", "constant"):
        assert min(rates(schedule, 0.03)) > 0
