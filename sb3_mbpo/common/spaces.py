"""Which spaces are supported, and observations as the model has them: the parts of a ``Dict`` one after the other, flat."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mbpo.common.errors import UnsupportedSpaceError

Array = TypeVar("Array", np.ndarray, th.Tensor)


def _is_float_box(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """
    :param observation_space: The environment's
    :param action_space: The environment's
    :raises UnsupportedSpaceError: (a ``ValueError``) unless observations are a ``Box`` of floats, or a ``Dict`` of such boxes
        and of ``MultiBinary``, and actions a bounded ``Box`` of floats
    """
    has = f"`env` has the observation space {observation_space}."
    allowed = "Supported are Box observations of floats, of any shape but (), and Dict observations made of them"
    as_floats = "gymnasium.wrappers.DtypeObservation(env, np.float32)"
    if isinstance(observation_space, spaces.Dict):
        for name, part in observation_space.items():
            # Bits are kept as they are in SB3's own goal-conditioned tasks
            if not (_is_float_box(part) and part.shape != ()) and not isinstance(part, spaces.MultiBinary):
                raise UnsupportedSpaceError(
                    f"{has} Its part {name!r} is {part}. {allowed}, or of MultiBinary: make one Box of all parts with "
                    "`gymnasium.wrappers.FlattenObservation(env)` (and MlpPolicy), leave that part out with "
                    "`gymnasium.wrappers.FilterObservation`, or convert it with `gymnasium.wrappers.TransformObservation`. "
                    "The model is not made for images."
                )
    elif not isinstance(observation_space, spaces.Box):
        raise UnsupportedSpaceError(
            f"{has} {allowed}: wrap the environment with `gymnasium.wrappers.FlattenObservation(env)`, and if that gives "
            f"whole numbers with `{as_floats}`."
        )
    elif not _is_float_box(observation_space):
        raise UnsupportedSpaceError(
            f"{has} {allowed}. Images are refused, as the model is not made for them (SB3's SAC with CnnPolicy is); other "
            f"numbers can be converted with `{as_floats}`."
        )
    elif observation_space.shape == ():
        raise UnsupportedSpaceError(
            f"{has} {allowed}: wrap the environment with `gymnasium.wrappers.ReshapeObservation(env, (1,))`."
        )
    if flat_dim(observation_space) == 0:
        raise UnsupportedSpaceError(f"{has} There are no numbers in it, so there is nothing to learn from.")
    if not isinstance(action_space, spaces.Box) or not _is_float_box(action_space):
        raise UnsupportedSpaceError(
            f"`env` has the action space {action_space}. The algorithm only supports Box actions of floats; "
            "for discrete actions see SB3's DQN."
        )
    if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
        raise UnsupportedSpaceError(
            f"`env` has the action space {action_space}. Continuous action space must have a finite lower and upper bound: "
            "give it one with `gymnasium.wrappers.TransformAction(env, lambda action: action, spaces.Box(low, high))`."
        )
    if flat_dim(action_space) == 0:
        raise UnsupportedSpaceError(f"`env` has the action space {action_space}. There are no numbers in it to choose.")
    # As SB3 scales them, and in float32, in which policies compute
    with np.errstate(over="ignore"):
        widths = (action_space.high - action_space.low).astype(np.float32)
    for index in np.argwhere(~((widths > 0) & np.isfinite(widths))):
        low, high = action_space.low[tuple(index)], action_space.high[tuple(index)]
        raise UnsupportedSpaceError(
            f"`env` has the action space {action_space}, which cannot be scaled to [-1, 1]: action{index.tolist()} is between "
            f"{low} and {high}. Lower bounds must be below upper ones, and their difference a number of float32. Leave the "
            "dimension out, or give it other bounds, with `gymnasium.wrappers.TransformAction(env, function, spaces.Box(low, "
            "high))`, whose function makes the environment's action of the agent's."
        )


def check_goals(observation_space: spaces.Space[Any]) -> None:
    """
    :param observation_space: The environment's, for hindsight experience replay
    :raises UnsupportedSpaceError: (a ``ValueError``) if parts are missing that it needs
    """
    has = list(observation_space) if isinstance(observation_space, spaces.Dict) else []
    missing = [name for name in ("observation", "achieved_goal", "desired_goal") if name not in has]
    if missing:
        raise UnsupportedSpaceError(
            f"`HerReplayBuffer` needs Dict observations with the parts {missing} too, but `env` has the parts {has}. "
            "Use it for goal-conditioned environments only."
        )


def arrays(observation: Array | dict[str, Array]) -> list[Array]:
    """
    :param observation: An array, or a dictionary of them
    :return: The array, or those of the dictionary
    """
    return list(observation.values()) if isinstance(observation, dict) else [observation]


def map_arrays(function: Callable[[Array], Any], observation: Array | dict[str, Array]) -> Any:
    """
    :param function: Of an array
    :param observation: An array, or a dictionary of them
    :return: What the function makes of the array, or of each in the dictionary, under the same name
    """
    if isinstance(observation, dict):
        return {name: function(array) for name, array in observation.items()}
    return function(observation)


def _parts(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}


def shape_of(space: spaces.Space[Any]) -> tuple[int, ...]:
    """
    :param space: ``Box`` or ``MultiBinary``
    :return: Its shape
    """
    assert space.shape is not None
    return space.shape


def flat_dim(space: spaces.Space[Any]) -> int:
    """
    :param space: A supported observation or action space
    :return: Numbers in a flat observation or action
    """
    return sum(int(np.prod(shape_of(part))) for part in _parts(space).values())


def dim_names(space: spaces.Space[Any]) -> list[str]:
    """
    :param space: A supported observation space
    :return: For messages: where each number of a flat observation is found in an observation, as in Python
    """
    return [
        f"obs[{name!r}]{list(index)}" if name else f"obs{list(index)}"
        for name, part in _parts(space).items()
        for index in np.ndindex(shape_of(part))
    ]


def flatten(observation: Array | dict[str, Array], batch_dims: int = 1) -> Array:
    """
    :param observation: Arrays or tensors ``(*batch, *shape)``; a dictionary in the order of its space
    :param batch_dims: How many of the dimensions are the batch's
    :return: ``(*batch, dim)``, the parts one after the other
    """
    flat = [array.reshape(*array.shape[:batch_dims], math.prod(array.shape[batch_dims:])) for array in arrays(observation)]
    if len(flat) == 1:
        return flat[0]
    return th.cat(flat, dim=-1) if isinstance(flat[0], th.Tensor) else np.concatenate(flat, axis=-1)


def split(space: spaces.Space[Any]) -> list[tuple[str, slice, tuple[int, ...]]]:
    """
    :param space: A supported observation space
    :return: For each part its name ("" if the space is no ``Dict``), where it is in a flat observation, and its shape
    """
    parts = _parts(space)
    ends: list[int] = list(accumulate(map(flat_dim, parts.values())))
    return [
        (name, slice(start, end), shape_of(part))
        for (name, part), start, end in zip(parts.items(), [0, *ends], ends, strict=False)
    ]


def unflatten(space: spaces.Space[Any], flat: Array) -> Array | dict[str, Array]:
    """
    The inverse of :func:`flatten`.

    :param space: A supported observation space
    :param flat: ``(n, dim)``
    :return: ``(n, *shape)``, or a dictionary of them
    """
    observation = {name: flat[:, dims].reshape(len(flat), *shape) for name, dims, shape in split(space)}
    return observation if isinstance(space, spaces.Dict) else observation[""]


def in_space(space: spaces.Space[Any], flat: th.Tensor) -> Any:
    """
    What the environment's own functions, and the user's, know how to deal with.

    :param space: A supported observation space
    :param flat: ``(n, dim)``
    :return: NumPy arrays ``(n, *shape)``, or a dictionary of them; floats in their precision, bits in the type of their space
    """
    observation: Any = unflatten(space, flat.cpu().numpy())
    if isinstance(space, spaces.Dict):
        for name, part in space.items():
            if isinstance(part, spaces.MultiBinary):
                observation[name] = observation[name].astype(part.dtype)
    return observation


def dims_where(space: spaces.Space[Any], test: Callable[[str, spaces.Space[Any]], bool]) -> list[int]:
    """
    :param space: A supported observation space
    :param test: Function of the name and the space of a part
    :return: The dimensions of a flat observation that lie in parts that pass the test
    """
    passes = [value for name, part in _parts(space).items() for value in [test(name, part)] * flat_dim(part)]
    return [dim for dim, passed in enumerate(passes) if passed]
