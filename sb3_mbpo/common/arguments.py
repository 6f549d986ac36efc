"""Whether arguments are in their ranges, and still those that the networks of the model were made with."""

import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces

from sb3_mbpo.dynamics.user_functions import check_tensor_fn, check_transition_fn

if TYPE_CHECKING:
    from sb3_mbpo.common.model_based import ModelBasedSAC


def is_whole_number(value: object) -> bool:
    """
    :param value: Anything
    :return: Whether it is an integer, Python's or NumPy's, but not a bool
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def are_sizes(value: object) -> bool:
    """
    :param value: Anything
    :return: Whether it is a list or tuple of whole numbers, 1 or more, and not empty: units of hidden layers
    """
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return is_list and all(is_whole_number(size) and size > 0 for size in value)  # type: ignore[attr-defined]


def check_whole(agent: object, *names: str) -> None:
    """
    :param agent: With the arguments as its attributes
    :param names: Of arguments
    :raises ValueError: if one of them is no whole number, 1 or more
    """
    for name in names:
        value = getattr(agent, name)
        if not is_whole_number(value) or value < 1:
            raise ValueError(f"`{name}` must be a whole number, 1 or more, not {value!r}")


def check_number(agent: object, name: str, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """
    :param agent: With the arguments as its attributes
    :param name: Of an argument
    :param is_allowed: Whether a number is in its range
    :param allowed: The range in words
    :raises ValueError: if it is no number, or not in its range
    """
    value = getattr(agent, name)
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not is_allowed(value):
        raise ValueError(f"`{name}` must be {allowed}, not {value!r}")


def check_arguments(agent: "ModelBasedSAC") -> None:
    """
    :param agent: With the arguments as its attributes
    :raises ValueError: if one of those that all algorithms have is not in its range
    """
    check_whole(agent, "batch_size", "ensemble_size", "num_elites", "model_train_freq")
    # SB3 makes a named tuple of it, and says what else may be wrong with it
    frequency = agent.train_freq[0] if isinstance(agent.train_freq, tuple) and agent.train_freq else agent.train_freq
    if is_whole_number(frequency) and frequency < 1:
        raise ValueError(f"`train_freq` must be 1 or more steps or episodes, not {frequency!r}")
    if not is_whole_number(agent.gradient_steps) or agent.gradient_steps < -1:
        raise ValueError(
            "`gradient_steps` must be a whole number, 0 or more, or -1 (as many as steps in the environment), not "
            f"{agent.gradient_steps!r}"
        )
    for name in ("tau", "gamma"):
        check_number(agent, name, lambda value: 0 <= value <= 1, "a number from 0 to 1")
    if agent.num_elites > agent.ensemble_size:
        raise ValueError(
            f"`num_elites` must not be larger than `ensemble_size` ({agent.ensemble_size}), but is {agent.num_elites}"
        )
    sizes = agent.model_hidden_sizes
    if not are_sizes(sizes):
        raise ValueError(f"`model_hidden_sizes` must be a list or tuple of whole numbers, 1 or more, not {sizes!r}")
    check_number(agent, "model_learning_rate", lambda value: 0 < value < np.inf, "a finite number above 0")
    if agent.model_gradient_steps is not None:
        allowed = "a finite number above 0, or None (the paper's rule: until no network improves)"
        check_number(agent, "model_gradient_steps", lambda value: 0 < value < np.inf, allowed)
    if not isinstance(agent.compile, bool) and agent.compile != "auto":
        raise ValueError(f"`compile` must be True, False or 'auto', not {agent.compile!r}")
    assert isinstance(agent.action_space, spaces.Box)
    for name in ("termination_fn", "reward_fn"):
        fn, is_reward = getattr(agent, name), name == "reward_fn"
        if fn is not None and is_reward and agent.needs_gradients:
            check_tensor_fn(fn, name, agent.observation_space, agent.action_space, agent.device)
        elif fn is not None:
            check_transition_fn(fn, name, agent.observation_space, agent.action_space, boolean=not is_reward)


def check_sizes(agent: "ModelBasedSAC") -> None:
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
