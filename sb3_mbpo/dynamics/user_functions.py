"""The contract of the functions of transitions that a user may pass: ``termination_fn`` and ``reward_fn``."""

from collections.abc import Callable

import numpy as np
from gymnasium import spaces

# (obs, action, next_obs) -> one value per row. NumPy arrays (n, *shape): raw observations, actions in the environment's units
TransitionFn = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _call(fn: TransitionFn, name: str, obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray, boolean: bool) -> np.ndarray:
    """Type, dtype and shape of what the function returns are checked, its values not."""
    try:
        values = fn(obs.copy(), action.copy(), next_obs.copy())
    except Exception as error:
        shapes = f"obs {obs.shape}, action {action.shape} and next_obs {next_obs.shape}"
        raise ValueError(f"`{name}` raised {error!r} for arrays of shape {shapes}") from error
    dtype, allowed = (np.bool_, "bools") if boolean else (np.floating, "floats")
    if isinstance(values, np.ndarray) and values.shape == (len(obs),) and np.issubdtype(values.dtype, dtype):
        return values
    found = type(values).__name__
    found += "".join(f", {key} {getattr(values, key)}" for key in ("dtype", "shape") if hasattr(values, key))
    raise ValueError(
        f"`{name}` must return a numpy array of {allowed} with shape ({len(obs)},), one per transition, but returned: {found}"
    )


def apply_transition_fn(
    fn: TransitionFn, name: str, obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray, boolean: bool
) -> np.ndarray:
    """
    Call a function of transitions and check what it returns.

    :param fn: ``termination_fn`` or ``reward_fn``; gets copies, so it may work in place
    :param name: The argument's name, for messages
    :param obs: ``(n, *obs_shape)``, raw observations
    :param action: ``(n, *action_shape)``, in the environment's units
    :param next_obs: ``(n, *obs_shape)``
    :param boolean: Whether it must return bools; finite floats otherwise
    :return: ``(n,)``
    :raises ValueError: if the function raises, or returns anything else
    """
    values = _call(fn, name, obs, action, next_obs, boolean)
    finite = np.isfinite(values)
    if not finite.all():
        row = int(finite.argmin())
        raise ValueError(
            f"`{name}` must return finite numbers, but returned {values[row]} for obs {obs[row]}, action {action[row]}, "
            f"next_obs {next_obs[row]}"
        )
    return values


def check_transition_fn(
    fn: TransitionFn, name: str, observation_space: spaces.Box, action_space: spaces.Box, boolean: bool
) -> None:
    """
    Try a user's function of transitions on a few rows of zeros, which need not be possible states: type, dtype and shape are
    checked, not the values. No random numbers are drawn.

    :param fn: ``termination_fn`` or ``reward_fn``
    :param name: The argument's name, for messages
    :param observation_space: Of the environment
    :param action_space: Of the environment
    :param boolean: Whether it must return bools; finite floats otherwise
    :raises ValueError: if it is no function, raises, or returns something of another type or shape
    """
    if not callable(fn):
        raise ValueError(f"`{name}` must be None or a function of (obs, action, next_obs), not {fn!r}")
    # A number of rows that is no other dimension, so that a result along the wrong axis shows
    taken = {size for space in (observation_space, action_space) for size in (*space.shape, int(np.prod(space.shape)))}
    n = next(n for n in range(3, 4 + len(taken)) if n not in taken)
    obs, action = (
        np.zeros((n, *space.shape)).clip(space.low, space.high).astype(space.dtype)
        for space in (observation_space, action_space)
    )
    _call(fn, name, obs, action, obs, boolean)
