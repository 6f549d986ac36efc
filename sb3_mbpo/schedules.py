"""Quantities of the algorithm as functions of the number of environment steps."""

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


def check_rollout_schedule(schedule: Sequence[int]) -> None:
    """
    :param schedule: What the user passed as ``rollout_schedule``
    :raises ValueError: if it is not four whole numbers with ``0 <= first_step <= last_step``
        and ``1 <= k_min <= k_max``
    """
    allowed = "four whole numbers (first_step, last_step, k_min, k_max), 0 <= first_step <= last_step, 1 <= k_min <= k_max"
    is_sequence = isinstance(schedule, Sequence) and not isinstance(schedule, str)
    if not is_sequence or len(schedule) != 4 or not all(type(value) is int for value in schedule):
        raise ValueError(f"`rollout_schedule` must be {allowed}, not {schedule!r}")
    first_step, last_step, k_min, k_max = schedule
    if not (0 <= first_step <= last_step and 1 <= k_min <= k_max):
        raise ValueError(f"`rollout_schedule` must be {allowed}, not {schedule!r}")
