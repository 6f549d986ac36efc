"""Whether MBPO's own arguments are in their ranges."""

from typing import TYPE_CHECKING

from sb3_mbpo.common.arguments import check_number, check_whole, is_whole_number
from sb3_mbpo.mbpo.schedules import check_rollout_schedule

if TYPE_CHECKING:
    from sb3_mbpo.mbpo import MBPO


def check_arguments(agent: "MBPO") -> None:
    """
    :param agent: With the arguments as its attributes
    :raises ValueError: if one of those that only MBPO has is not in its range
    """
    check_whole(agent, "rollout_batch_size", "model_retain_epochs")
    allowed = "a number from 0 (no real transitions in a batch) to 1 (no model)"
    check_number(agent, "real_ratio", lambda value: 0 <= value <= 1, allowed)
    if not is_whole_number(agent.value_expansion_horizon) or agent.value_expansion_horizon < 0:
        raise ValueError(
            "`value_expansion_horizon` must be a whole number, 1 or more, or 0 (no value expansion), not "
            f"{agent.value_expansion_horizon!r}"
        )
    check_rollout_schedule(agent.rollout_schedule)
    if agent.rollout_start not in ("replay", "initial"):
        raise ValueError(f"`rollout_start` must be 'replay' or 'initial', not {agent.rollout_start!r}")
