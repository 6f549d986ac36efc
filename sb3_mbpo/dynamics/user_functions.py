"""The contract of the functions of transitions that a user may pass: ``termination_fn`` and ``reward_fn``."""

from collections.abc import Callable
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mbpo.common.spaces import map_arrays, shape_of

# An array (n, *shape); for a Dict space a dictionary of them
Observations = np.ndarray | dict[str, np.ndarray]
# (obs, action, next_obs) -> one value per row: raw observations, actions in the environment's units
TransitionFn = Callable[[Any, np.ndarray, Any], np.ndarray]
# The same of tensors, through which gradients pass
TensorFn = Callable[[Any, th.Tensor, Any], th.Tensor]


def _call(
    fn: TransitionFn, name: str, obs: Observations, action: np.ndarray, next_obs: Observations, boolean: bool
) -> np.ndarray:
    """Type, dtype and shape of what the function returns are checked, its values not."""
    try:
        values = fn(*(map_arrays(np.copy, each) for each in (obs, action, next_obs)))
    except Exception as error:
        arguments = {"obs": obs, "action": action, "next_obs": next_obs}
        shapes = ", ".join(f"{key} {map_arrays(np.shape, each)}" for key, each in arguments.items())
        raise ValueError(
            f"`{name}` raised {error!r} for arrays of shape {shapes}, the first transition of which is "
            f"{describe_row(obs, action, next_obs, 0)}"
        ) from error
    dtype, allowed = (np.bool_, "bools") if boolean else (np.floating, "floats")
    if isinstance(values, np.ndarray) and values.shape == (len(action),) and np.issubdtype(values.dtype, dtype):
        return values
    found = type(values).__name__
    found += "".join(f", {key} {getattr(values, key)}" for key in ("dtype", "shape") if hasattr(values, key))
    raise ValueError(
        f"`{name}` must return a numpy array of {allowed} with shape ({len(action)},), one per transition, but returned: "
        f"{found}"
    )


def describe_row(obs: Observations, action: np.ndarray, next_obs: Observations, row: int) -> str:
    """
    :param obs: ``(n, *obs_shape)``, or a dictionary of them
    :param action: ``(n, *action_shape)``
    :param next_obs: ``(n, *obs_shape)``, or a dictionary of them
    :param row: Which of the transitions
    :return: What a message says of it
    """
    obs, action, next_obs = (map_arrays(lambda array: array[row], each) for each in (obs, action, next_obs))
    return f"obs {obs}, action {action}, next_obs {next_obs}"


def apply_transition_fn(
    fn: TransitionFn,
    name: str,
    obs: Observations,
    action: np.ndarray,
    next_obs: Observations,
    boolean: bool,
    finite: bool = True,
) -> np.ndarray:
    """
    Call a function of transitions and check what it returns.

    :param fn: ``termination_fn`` or ``reward_fn``; gets copies, so it may work in place
    :param name: The argument's name, for messages
    :param obs: ``(n, *obs_shape)``, raw observations; for a ``Dict`` space a dictionary of them
    :param action: ``(n, *action_shape)``, in the environment's units
    :param next_obs: As ``obs``
    :param boolean: Whether it must return bools; floats otherwise
    :param finite: Whether they must be finite
    :return: ``(n,)``
    :raises ValueError: if the function raises, or returns anything else
    """
    values = _call(fn, name, obs, action, next_obs, boolean)
    is_finite = np.isfinite(values)
    if finite and not is_finite.all():
        row = int(is_finite.argmin())
        raise ValueError(
            f"`{name}` must return finite numbers, but returned {values[row]} for {describe_row(obs, action, next_obs, row)}"
        )
    return values


def check_transition_fn(
    fn: TransitionFn, name: str, observation_space: spaces.Space[Any], action_space: spaces.Box, boolean: bool
) -> None:
    """
    Try a user's function of transitions on a few rows of zeros, which need not be possible states: type, dtype and shape are
    checked, not the values. No random numbers are drawn.

    :param fn: ``termination_fn`` or ``reward_fn``
    :param name: The argument's name, for messages
    :param observation_space: Of the environment
    :param action_space: Of the environment
    :param boolean: Whether it must return bools; finite floats otherwise
    :raises ValueError: if it is no function, cannot be pickled, raises, or returns something of another type or shape
    """
    obs, action = _zeros(fn, name, observation_space, action_space)
    _call(fn, name, obs, action, obs, boolean)


def check_tensor_fn(
    fn: TensorFn, name: str, observation_space: spaces.Space[Any], action_space: spaces.Box, device: th.device
) -> None:
    """
    Try a user's function of tensors, through which gradients have to pass, on a few rows of zeros.

    :param fn: ``reward_fn``
    :param name: The argument's name, for messages
    :param observation_space: Of the environment
    :param action_space: Of the environment
    :param device: Where its tensors will be
    :raises ValueError: if it is no function, cannot be pickled, raises, returns something of another type or shape, or what
        has no gradient
    """
    arrays = _zeros(fn, name, observation_space, action_space)

    def tensor(array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array, dtype=th.float32, device=device).requires_grad_()

    obs, action = (map_arrays(tensor, each) for each in arrays)
    try:
        values = fn(obs, action, obs)
    except Exception as error:
        raise ValueError(
            f"`{name}` raised {error!r} for tensors: here gradients pass through it, so it gets tensors of torch, not arrays, "
            "and must compute with operations of torch"
        ) from error
    n = len(action)
    if not isinstance(values, th.Tensor) or values.shape != (n,) or not values.is_floating_point():
        found = f"{values.dtype}, {tuple(values.shape)}" if isinstance(values, th.Tensor) else type(values).__name__
        raise ValueError(
            f"`{name}` must return a tensor of floats with shape ({n},), one per transition, but returned: {found}"
        )
    if not values.requires_grad:
        raise ValueError(
            f"`{name}` returned a tensor without a gradient: compute it from the tensors that it gets, by operations of "
            "torch, without `detach()`, `numpy()` or comparisons alone. Without it (None), the model predicts the reward."
        )


def _zeros(
    fn: object, name: str, observation_space: spaces.Space[Any], action_space: spaces.Box
) -> tuple[Observations, np.ndarray]:
    """Observations and actions to try a function on, which is checked as far as that can be done without calling it."""
    if not callable(fn):
        raise ValueError(f"`{name}` must be None or a function of (obs, action, next_obs), not {fn!r}")
    try:
        cloudpickle.dumps(fn)
    # It raises whatever the objects do that the function refers to
    except Exception as error:
        raise ValueError(
            f"`{name}` must be picklable, as it is saved with the agent, but it is not: {error!r}. Does it refer to an open "
            "file, a lock, or an environment? Let it make what it needs by itself."
        ) from error
    parts = list(observation_space.values()) if isinstance(observation_space, spaces.Dict) else [observation_space]
    # A number of rows that is no other dimension, so that a result along the wrong axis shows
    taken = {size for shape in map(shape_of, [*parts, action_space]) for size in (*shape, int(np.prod(shape)))}
    n = next(n for n in range(3, 4 + len(taken)) if n not in taken)

    def zeros(space: Any) -> np.ndarray:
        rows = np.zeros((n, *shape_of(space)), dtype=space.dtype)
        return rows.clip(space.low, space.high).astype(space.dtype) if isinstance(space, spaces.Box) else rows

    if isinstance(observation_space, spaces.Dict):
        obs: Observations = {key: zeros(part) for key, part in observation_space.items()}
    else:
        obs = zeros(observation_space)
    return obs, zeros(action_space)
