"""Quantities of the algorithm as functions of the number of environment steps."""

from collections.abc import Sequence

from sb3_mbpo.common.arguments import is_whole_number
from sb3_mbpo.dynamics.open_loop import trusted_steps

# Longest rollouts of the "auto" schedule: the paper's longest
AUTO_MAX = 25


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


def auto_rollout_length(errors: Sequence[float], previous: int) -> int:
    """
    The rule of ``rollout_schedule="auto"``: as many steps as the model is right for, at most one more than before.

    The paper's theory (:mod:`sb3_mbpo.theory`) weighs the model's error against the policy's shift in its place, but its
    constants are too pessimistic to be used as they are: they hardly ever allow a single step.

    :param errors: Error of generated states after 1, 2, ... steps, as a share of the standard deviation of real observations,
        averaged over their dimensions; on real transitions that the model was not trained on
    :param previous: The present ``k``, from 1 to 25
    :return: ``k``, from 1 to 25: the number of steps up to the first error above 0.1
    """
    return min(max(trusted_steps(errors), 1), previous + 1, AUTO_MAX)


def longest_rollout(schedule: Sequence[int] | str) -> int:
    """
    :param schedule: As ``rollout_schedule`` of ``MBPO``
    :return: The longest ``k`` that there will be
    """
    return AUTO_MAX if isinstance(schedule, str) else max(schedule[2:])


def check_rollout_schedule(schedule: Sequence[int] | str) -> None:
    """
    :param schedule: What the user passed as ``rollout_schedule``
    :raises ValueError: if it is neither "auto" nor four whole numbers with ``0 <= first_step <= last_step``
        and ``1 <= k_min <= k_max``
    """
    if isinstance(schedule, str):
        is_valid = schedule == "auto"
    else:
        is_valid = isinstance(schedule, list | tuple) and len(schedule) == 4 and all(map(is_whole_number, schedule))
        if is_valid:
            first_step, last_step, k_min, k_max = schedule
            is_valid = 0 <= first_step <= last_step and 1 <= k_min <= k_max
    if not is_valid:
        raise ValueError(
            "`rollout_schedule` must be 'auto', or a list or tuple of four whole numbers, (first_step, last_step, k_min, "
            f"k_max) with 0 <= first_step <= last_step and 1 <= k_min <= k_max, not {schedule!r}"
        )
