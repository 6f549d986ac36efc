"""Quantities of the algorithm as functions of the number of environment steps."""

import numbers
from collections.abc import Sequence


def rollout_length(schedule: Sequence[int], step: int) -> int:
    """
    Length ``k`` of the model rollouts: a straight line between two points, rounded down, constant outside
    (paper, Appendix C).

    :param schedule: ``(first_step, last_step, k_min, k_max)``: ``k_min`` up to ``first_step``,
        ``k_max`` from ``last_step`` on. Checked by ``check_rollout_schedule``.
    :param step: Environment steps done so far
    :return: ``k``, between ``k_min`` and ``k_max``
    """
    first_step, last_step, k_min, k_max = schedule
    if step <= first_step:
        return k_min
    if step >= last_step:
        return k_max
    # Integers throughout: a float slope can miss a whole number by one rounding error
    return k_min + (step - first_step) * (k_max - k_min) // (last_step - first_step)


def is_whole_number(value: object) -> bool:
    """
    :param value: Anything
    :return: Whether it is an integer, Python's or NumPy's, but not a bool
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_rollout_schedule(schedule: Sequence[int]) -> None:
    """
    :param schedule: What the user passed as ``rollout_schedule``
    :raises ValueError: if it is not four whole numbers with ``0 <= first_step <= last_step``
        and ``1 <= k_min <= k_max``
    """
    is_valid = isinstance(schedule, list | tuple) and len(schedule) == 4 and all(map(is_whole_number, schedule))
    if is_valid:
        first_step, last_step, k_min, k_max = schedule
        is_valid = 0 <= first_step <= last_step and 1 <= k_min <= k_max
    if not is_valid:
        raise ValueError(
            "`rollout_schedule` must be a list or tuple of four whole numbers, (first_step, last_step, k_min, k_max) with "
            f"0 <= first_step <= last_step and 1 <= k_min <= k_max, not {schedule!r}"
        )
