import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_mbpo.mbpo.schedules import auto_rollout_length, check_rollout_schedule, longest_rollout, rollout_length

HOPPER = (20_000, 100_000, 1, 15)


@st.composite
def schedules(draw):
    first = draw(st.integers(0, 10**6))
    k_min = draw(st.integers(1, 50))
    return first, first + draw(st.integers(0, 10**6)), k_min, k_min + draw(st.integers(0, 50))


@pytest.mark.parametrize(
    "step, expected",
    # 1 + 14 * (step - 20,000) / 80,000, rounded down
    [(0, 1), (20_000, 1), (25_714, 1), (25_715, 2), (60_000, 8), (99_999, 14), (100_000, 15), (10**9, 15)],
)
def test_paper_hopper(step, expected):
    assert rollout_length(HOPPER, step) == expected
    assert rollout_length(list(HOPPER), step) == expected
    check_rollout_schedule([np.int64(value) for value in HOPPER])


def test_constant_and_jump():
    assert {rollout_length((250, 3750, 1, 1), step) for step in range(0, 5000, 50)} == {1}
    assert [rollout_length((10, 10, 1, 5), step) for step in (9, 10, 11)] == [1, 1, 5]
    assert [rollout_length((0, 0, 3, 5), step) for step in (0, 1)] == [3, 5]


@given(schedules(), st.integers(0, 3 * 10**6), st.integers(0, 3 * 10**6))
def test_invariants(schedule, step, other):
    first, last, k_min, k_max = schedule
    check_rollout_schedule(schedule)
    k = rollout_length(schedule, step)
    assert k_min <= k <= k_max
    assert rollout_length(schedule, first) == k_min
    assert rollout_length(schedule, last + 1) == k_max
    assert (rollout_length(schedule, max(step, other)) >= rollout_length(schedule, min(step, other))) is True
    if first <= step <= last and first < last:
        exact = k_min + (k_max - k_min) * (step - first) / (last - first)
        assert exact - 1 - 1e-9 < k <= exact + 1e-9


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        5,
        "1234",
        (1, 2, 3),
        (1, 2, 3, 4, 5),
        (0, 10, 0, 5),
        (0, 10, 5, 1),
        (10, 0, 1, 5),
        (-1, 10, 1, 5),
        (0, 10.5, 1, 5),
        (0, "10", 1, 5),
        (0, 10, True, 5),
        (0, float("nan"), 1, 5),
    ],
)
def test_malformed(schedule):
    with pytest.raises(ValueError, match="rollout_schedule") as error:
        check_rollout_schedule(schedule)
    assert repr(schedule) in str(error.value) and "k_min <= k_max" in str(error.value)


@pytest.mark.parametrize(
    "errors, previous, expected",
    [
        ([0.05, 0.08, 0.11, 0.05], 5, 2),
        ([0.1, 0.1, 0.1], 5, 3),
        # One step at least
        ([0.2, 0.05], 5, 1),
        ([], 5, 1),
        # One more than before at most, and never more than the paper's longest
        ([0.01] * 25, 5, 6),
        ([0.01] * 40, 25, 25),
        ([0.01] * 40, 1, 2),
        ([np.inf, 0.01], 3, 1),
        ([np.nan, 0.01], 3, 1),
    ],
)
def test_auto_goes_as_far_as_the_model_is_right(errors, previous, expected):
    assert auto_rollout_length(errors, previous) == expected


@given(st.lists(st.floats(0, 1), max_size=40), st.integers(1, 25))
def test_auto_invariants(errors, previous):
    k = auto_rollout_length(errors, previous)
    assert 1 <= k <= min(previous + 1, 25)
    # A better model is never trusted less
    assert auto_rollout_length([error / 2 for error in errors], previous) >= k


def test_longest_rollout():
    assert longest_rollout(HOPPER) == 15 and longest_rollout("auto") == 25


@pytest.mark.parametrize("schedule", ["Auto", "", "15"])
def test_other_words_are_refused(schedule):
    with pytest.raises(ValueError, match="must be 'auto', or a list or tuple"):
        check_rollout_schedule(schedule)
