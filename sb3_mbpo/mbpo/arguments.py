"""Whether MBPO's own arguments are in their ranges, and still those that its networks were made with."""

from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces

from sb3_mbpo.dynamics.user_functions import check_transition_fn
from sb3_mbpo.mbpo.schedules import check_rollout_schedule, is_whole_number

if TYPE_CHECKING:
    from sb3_mbpo.mbpo import MBPO


def check_arguments(agent: "MBPO") -> None:
    """
    :param agent: With the arguments as its attributes
    :raises ValueError: if one of MBPO's own arguments is not in its range
    """
    whole = ("batch_size", "ensemble_size", "num_elites", "model_train_freq", "rollout_batch_size", "model_retain_epochs")
    for name in whole:
        value = getattr(agent, name)
        if not is_whole_number(value) or value < 1:
            raise ValueError(f"`{name}` must be a whole number, 1 or more, not {value!r}")
    if agent.num_elites > agent.ensemble_size:
        raise ValueError(
            f"`num_elites` must not be larger than `ensemble_size` ({agent.ensemble_size}), but is {agent.num_elites}"
        )
    sizes = agent.model_hidden_sizes
    if not isinstance(sizes, list | tuple) or not sizes or not all(is_whole_number(size) and size > 0 for size in sizes):
        raise ValueError(f"`model_hidden_sizes` must be a list or tuple of whole numbers, 1 or more, not {sizes!r}")
    for name, allowed in (
        ("model_learning_rate", "a finite number above 0"),
        ("real_ratio", "a number from 0 (no real transitions in a batch) to 1 (no model)"),
        ("model_gradient_steps", "a finite number above 0, or None (the paper's rule: until no network improves)"),
    ):
        value = getattr(agent, name)
        if name == "model_gradient_steps" and value is None:
            continue
        is_valid = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not is_valid or not (0 <= value <= 1 if name == "real_ratio" else 0 < value < np.inf):
            raise ValueError(f"`{name}` must be {allowed}, not {value!r}")
    if not isinstance(agent.compile, bool) and agent.compile != "auto":
        raise ValueError(f"`compile` must be True, False or 'auto', not {agent.compile!r}")
    if not is_whole_number(agent.value_expansion_horizon) or agent.value_expansion_horizon < 0:
        raise ValueError(
            "`value_expansion_horizon` must be a whole number, 1 or more, or 0 (no value expansion), not "
            f"{agent.value_expansion_horizon!r}"
        )
    check_rollout_schedule(agent.rollout_schedule)
    if agent.rollout_start not in ("replay", "initial"):
        raise ValueError(f"`rollout_start` must be 'replay' or 'initial', not {agent.rollout_start!r}")
    assert isinstance(agent.action_space, spaces.Box)
    for name, boolean in (("termination_fn", True), ("reward_fn", False)):
        if getattr(agent, name) is not None:
            check_transition_fn(getattr(agent, name), name, agent.observation_space, agent.action_space, boolean)


def check_sizes(agent: "MBPO") -> None:
    """
    :param agent: With its networks
    :raises ValueError: if an argument was changed to which the networks of the model were made
    """
    hidden = [weight.shape[2] for weight in agent.dynamics.weights[:-1]]
    members, elites = agent.dynamics.n_members, len(agent.dynamics.elites)
    for name, size in {"ensemble_size": members, "num_elites": elites, "model_hidden_sizes": hidden}.items():
        value = getattr(agent, name)
        if (list(value) if name == "model_hidden_sizes" else value) != size:
            raise ValueError(
                f"`{name}` was changed to {value!r}, but the model was made with {size!r} and cannot be changed: make a "
                f"new agent, or set it back to {size!r}"
            )
