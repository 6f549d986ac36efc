"""
Which transitions end an episode: derived from the environment's own parameters where its class is known, or learned from the
replay buffer. What a user may pass instead is in ``user_functions.py``.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)
from torch import nn
from torch.nn import functional as F

from sb3_mbpo.dynamics.training import BATCH_SIZE, split_at_random
from sb3_mbpo.dynamics.units import input_stats, standardised

# (low, high)
Range = Sequence[float]


# --- Known tasks: what Gymnasium's `step()` and `is_healthy` compute, from what the observation shows -----------------
# Inequalities are strict or not as they are there: what is NaN lies within no range, hence is not healthy.


def _never(next_obs: th.Tensor) -> th.Tensor:
    return th.zeros_like(next_obs[:, 0], dtype=th.bool)


def _within(values: th.Tensor, bounds: Range) -> th.Tensor:
    low, high = bounds
    return (low < values) & (values < high)


# `hidden` (True counts as 1): whether the observation leaves out x (planar robots) or x and y (the others)


def _hopper(
    next_obs: th.Tensor, terminate: bool, hidden: bool, z_range: Range, angle_range: Range, state_range: Range
) -> th.Tensor:
    z, angle, state = next_obs[:, 1 - hidden], next_obs[:, 2 - hidden], next_obs[:, 2 - hidden :]
    # The observation clips velocities to [-10, 10], so limits beyond (by default 100) are not visible in it
    healthy = _within(z, z_range) & _within(angle, angle_range) & _within(state, state_range).all(dim=1)
    return ~healthy & bool(terminate)


def _walker2d(next_obs: th.Tensor, terminate: bool, hidden: bool, z_range: Range, angle_range: Range) -> th.Tensor:
    z, angle = next_obs[:, 1 - hidden], next_obs[:, 2 - hidden]
    return ~(_within(z, z_range) & _within(angle, angle_range)) & bool(terminate)


def _ant(next_obs: th.Tensor, terminate: bool, hidden: bool, z_range: Range) -> th.Tensor:
    z = next_obs[:, 2 - 2 * hidden]
    low, high = z_range
    healthy = next_obs.isfinite().all(dim=1) & (low <= z) & (z <= high)
    return ~healthy & bool(terminate)


def _humanoid(next_obs: th.Tensor, terminate: bool, hidden: bool, z_range: Range) -> th.Tensor:
    return ~_within(next_obs[:, 2 - 2 * hidden], z_range) & bool(terminate)


def _inverted_pendulum(next_obs: th.Tensor) -> th.Tensor:
    return ~next_obs.isfinite().all(dim=1) | (next_obs[:, 1].abs() > 0.2)


def _inverted_double_pendulum(next_obs: th.Tensor, tip_height: list[list[float]]) -> th.Tensor:
    # Gymnasium reads the tip where MuJoCo's last Runge-Kutta stage left it, which is not quite the observed pose:
    # they are less than 0.1 mm apart as a rule, 4 mm in the worst case seen
    sin, cos = next_obs[:, 1:3], next_obs[:, 3:5]
    first, second = th.stack([th.ones_like(sin), sin, cos], dim=1).unbind(dim=2)
    return (first @ next_obs.new_tensor(tip_height) * second).sum(dim=1) <= 1


_HEALTH = ("_terminate_when_unhealthy", "_exclude_current_positions_from_observation", "_healthy_z_range")

# Class -> (condition, attributes of the live environment that are its arguments after next_obs)
_TASKS: dict[str, tuple[Callable[..., th.Tensor], tuple[str, ...]]] = {
    "gymnasium.envs.classic_control.pendulum:PendulumEnv": (_never, ()),
    **{
        f"gymnasium.envs.mujoco.{module}_{version}:{name}": (condition, attributes)
        for version in ("v4", "v5")
        for module, name, condition, attributes in (
            ("half_cheetah", "HalfCheetahEnv", _never, ()),
            ("hopper", "HopperEnv", _hopper, (*_HEALTH, "_healthy_angle_range", "_healthy_state_range")),
            ("walker2d", "Walker2dEnv", _walker2d, (*_HEALTH, "_healthy_angle_range")),
            ("ant", "AntEnv", _ant, _HEALTH),
            ("humanoid", "HumanoidEnv", _humanoid, _HEALTH),
            ("humanoidstandup", "HumanoidStandupEnv", _never, ()),
            ("swimmer", "SwimmerEnv", _never, ()),
            ("reacher", "ReacherEnv", _never, ()),
            ("pusher", "PusherEnv", _never, ()),
            ("inverted_pendulum", "InvertedPendulumEnv", _inverted_pendulum, ()),
            ("inverted_double_pendulum", "InvertedDoublePendulumEnv", _inverted_double_pendulum, ("model",)),
        )
    },
}

# `step` methods that pass on observation and termination as they are, by package; wrappers that inherit them do so too
_TRANSPARENT_STEPS = {
    f"{package}:{name}.step"
    for package, names in {
        "gymnasium": (
            *("Wrapper", "ActionWrapper", "RewardWrapper", "TimeLimit", "OrderEnforcing", "PassiveEnvChecker"),
            *("RecordEpisodeStatistics", "RecordVideo", "RenderCollection", "HumanRendering", "NormalizeReward"),
        ),
        "stable_baselines3": ("Monitor",),
        "rl_zoo3": (
            *("ActionNoiseWrapper", "ActionSmoothingWrapper", "DelayedRewardWrapper"),
            *("TruncatedOnSuccessWrapper", "FrameSkip", "PatchedTimeLimit"),
        ),
    }.items()
    for name in names
}
_TRANSPARENT_VEC_WRAPPERS = (VecNormalize, VecMonitor, VecCheckNan, VecVideoRecorder)


def _runs(wrapper: gym.Wrapper, task: str) -> bool:
    """Whether the innermost environment is of this very class; a subclass is another task."""
    cls = type(wrapper.unwrapped)
    return f"{cls.__module__}:{cls.__qualname__}" == task


def _hides(wrapper: gym.Wrapper, attributes: Iterable[str]) -> bool:
    """Whether a wrapper may change what the agent observes, or answers for one of the environment's attributes."""
    step, base = type(wrapper).step, wrapper.unwrapped
    package = step.__module__.partition(".")[0]
    return f"{package}:{step.__qualname__}" not in _TRANSPARENT_STEPS or not all(
        hasattr(base, name) and wrapper.get_wrapper_attr(name) is getattr(base, name) for name in attributes
    )


class _AnyWrapper:
    """
    Stands in for the class in ``VecEnv.env_is_wrapped(cls)``, which takes ``isinstance(wrapper, cls)`` of each wrapper where
    the environment lives. So a worker process answers with a bool; whatever else one asks for, if it cannot be
    pickled (a lambda in ``spec``, for instance) kills the worker.

    :param test: A function of the wrapper; must be picklable
    """

    def __init__(self, test: Callable[[gym.Wrapper], bool]) -> None:
        self.test = test

    def __instancecheck__(self, wrapper: gym.Wrapper) -> bool:
        return self.test(wrapper)


def _tip_height(model: Any) -> list[list[float]] | None:
    """
    Height of the tip of a double pendulum, read off its MuJoCo model by forward kinematics.

    :param model: ``mujoco.MjModel``, not changed
    :return: The matrix M of ``(1, sin a, cos a) @ M @ (1, sin b, cos b)``, where a and b are the angles, in m;
        None if the height is not of that form
    """
    import mujoco  # type: ignore[import-untyped]  # optional, but there where such a model is

    data = mujoco.MjData(model)

    def height(x: float, a: float, b: float) -> float:
        data.qpos[:] = x, a, b
        mujoco.mj_kinematics(model, data)
        return float(data.site_xpos[0, 2])

    def basis(angle: float) -> list[float]:
        return [1, np.sin(angle), np.cos(angle)]

    angles = (-np.pi / 2, 0, np.pi / 2)
    inverse = np.linalg.inv([basis(angle) for angle in angles])
    matrix = inverse @ [[height(0, a, b) for b in angles] for a in angles] @ inverse.T
    is_exact = np.isclose(basis(0.4) @ matrix @ basis(-0.3), height(0.5, 0.4, -0.3))
    return matrix.tolist() if is_exact else None


class KnownTermination:
    """
    The condition of a known task, as a function of arrays and of tensors.

    :param condition: Of raw observations, ``(n, obs_dim)``, and of the parameters
    :param parameters: Of the live environment
    """

    def __init__(self, condition: Callable[..., th.Tensor], parameters: Sequence[Any]) -> None:
        self.condition, self.parameters = condition, parameters

    def __call__(self, obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
        """
        :param obs: ``(n, obs_dim)``
        :param action: ``(n, action_dim)``
        :param next_obs: ``(n, obs_dim)``
        :return: Whether each transition is terminal, bool, ``(n,)``
        """
        terminated: np.ndarray = self.of_tensors(th.as_tensor(next_obs)).numpy()
        return terminated

    def of_tensors(self, next_obs: th.Tensor) -> th.Tensor:
        """
        :param next_obs: ``(n, obs_dim)``, raw
        :return: Whether each transition is terminal, bool, ``(n,)``
        """
        return self.condition(next_obs, *self.parameters)


def derive_termination_fn(env: VecEnv) -> KnownTermination | None:
    """
    The termination function of a task whose source is known (Gymnasium's MuJoCo tasks v4 and v5, and Pendulum), with the
    parameters that the live environment has now. Nothing is guessed: a subclass, a wrapper that may change
    observations or terminations, or parallel environments that differ give None.

    In a ``SubprocVecEnv`` only wrapped environments can be recognised, which those of ``gym.make`` and
    ``make_vec_env`` are.

    :param env: The training environment
    :return: The function, or None if it is not known
    """
    while isinstance(env, VecEnvWrapper):
        if type(env) not in _TRANSPARENT_VEC_WRAPPERS:
            return None
        env = env.venv
    if type(env) not in (DummyVecEnv, SubprocVecEnv):
        return None

    def ask(test: Callable[[gym.Wrapper], bool]) -> list[bool]:
        question: Any = _AnyWrapper(test)
        if isinstance(env, DummyVecEnv):
            # Wrapped once more, as a bare environment would not be asked
            return [is_wrapped(gym.Wrapper(each), question) for each in env.envs]
        return env.env_is_wrapped(question)

    task = next((task for task in _TASKS if all(ask(partial(_runs, task=task)))), None)
    if task is None:
        return None
    condition, attributes = _TASKS[task]
    if any(ask(partial(_hides, attributes=attributes))):
        return None

    def parameter(name: str, index: int) -> Any:
        value = env.get_attr(name, index)[0]
        return _tip_height(value) if name == "model" else np.asarray(value).tolist()

    parameters, *others = [[parameter(name, index) for name in attributes] for index in range(env.num_envs)]
    if None in parameters or any(other != parameters for other in others):
        return None
    return KnownTermination(condition, parameters)


# --- Learned, where nothing is known ---------------------------------------------------------------------------------

# Gradient steps between two looks at the holdout, looks without improvement after which training stops, and looks at most
STEPS_PER_LOOK = 50
PATIENCE = 5
MAX_LOOKS = 40
# Share of the labels' entropy below which the loss on held-out rows is low enough: where the data can be told apart without
# error, it falls for ever
SOLVED = 0.01
# Rows predicted at once, to bound memory
CHUNK_SIZE = 50_000


class TerminationClassifier(nn.Module):
    """
    Probability that an episode has ended, learned from the replay buffer. Its input is the next observation alone: a
    termination is a property of the state reached, and with observation and action beside it held-out
    errors were two to three times as many (Hopper, Walker2d).

    Constructing it does not touch the global random state, so that an agent that never uses it sees the same random
    numbers as SB3's ``SAC``.

    :param obs_dim: Size of the flattened observation
    """

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        with th.random.fork_rng(devices=[]):
            self.network = nn.Sequential(
                nn.Linear(obs_dim, 200), nn.SiLU(), nn.Linear(200, 200), nn.SiLU(), nn.Linear(200, 1), nn.Flatten(0)
            )
        # The log-odds in the data: minus infinity if nothing has ever ended, infinity if everything has
        self.prior: th.Tensor
        self.input_mean: th.Tensor
        self.input_std: th.Tensor
        self.register_buffer("prior", th.tensor(-th.inf))
        self.register_buffer("input_mean", th.zeros(obs_dim, dtype=th.float64))
        self.register_buffer("input_std", th.ones(obs_dim, dtype=th.float64))
        self.optimizer = th.optim.Adam(self.network.parameters(), lr=1e-3)

    def forward(self, next_obs: th.Tensor) -> th.Tensor:
        """
        :param next_obs: ``(n, obs_dim)``, raw units
        :return: Log-odds of termination, ``(n,)``
        """
        return self.network(standardised(next_obs, self.input_mean, self.input_std).to(self.prior)) + self.prior

    def fit(self, next_obs: th.Tensor, terminated: th.Tensor) -> float:
        """
        Train from the present weights until the loss on held-out rows stops falling or is 1 % of what knowing nothing
        gives, and keep the best weights. Rare
        terminations are not given more weight: the probabilities would be wrong.

        :param next_obs: ``(n, obs_dim)``, raw units
        :param terminated: ``(n,)``, bool or float; a timeout is not a termination
        :return: Cross-entropy on the held-out rows; 0 if all rows are terminal or none is, which is then predicted exactly
        """
        labels = terminated.float()
        self.prior.copy_(labels.mean().logit())
        if self.prior.isinf():
            return 0.0
        mean, std = input_stats(next_obs)
        self.input_mean.copy_(mean)
        self.input_std.copy_(std)

        train, holdout = split_at_random(len(next_obs), next_obs.device)
        enough = SOLVED * F.binary_cross_entropy(labels.mean(), labels.mean()).item()
        best_loss, best_weights, since_improvement = th.inf, {}, 0
        for look in range(MAX_LOOKS + 1):
            if look > 0:
                self._train(next_obs, labels, train)
            with th.no_grad():
                loss = F.binary_cross_entropy_with_logits(self(next_obs[holdout]), labels[holdout]).item()
            since_improvement += 1
            if loss < best_loss:
                best_loss, best_weights, since_improvement = loss, copy.deepcopy(self.network.state_dict()), 0
            if since_improvement == PATIENCE or best_loss < enough:
                break
        self.network.load_state_dict(best_weights)
        return best_loss

    def _train(self, next_obs: th.Tensor, labels: th.Tensor, rows: th.Tensor) -> None:
        for _ in range(STEPS_PER_LOOK):
            batch = rows[th.randint(len(rows), (min(BATCH_SIZE, len(rows)),), device=rows.device)]
            loss = F.binary_cross_entropy_with_logits(self(next_obs[batch]), labels[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @th.no_grad()
    def predict(self, next_obs: th.Tensor) -> th.Tensor:
        """
        :param next_obs: ``(n, obs_dim)``, raw units
        :return: Whether each is more likely terminal than not, bool, ``(n,)``
        """
        return th.cat([self(chunk) > 0 for chunk in next_obs.split(CHUNK_SIZE)])
