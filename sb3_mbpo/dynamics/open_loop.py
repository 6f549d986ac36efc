"""How far the model strays from trajectories that really happened, when it follows the actions that were really taken."""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch as th

from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.dynamics.rollouts import Reward, Transitions, predict
from sb3_mbpo.dynamics.units import rounding, spread

# Largest error of a generated state, as a share of the standard deviation of real observations, with which it is trusted
TOLERANCE = 0.1
# (start obs, actions, particles) -> for each step observations and rewards
OpenLoop = Callable[[th.Tensor, th.Tensor, int], Iterator[tuple[th.Tensor, th.Tensor]]]


class Windows(NamedTuple):
    """
    Pieces of real trajectories, raw units, actions in [-1, 1]. Those that are shorter are filled up with zeros.

    :param obs: ``(n, horizon + 1, obs_dim)``
    :param actions: ``(n, horizon, action_dim)``
    :param rewards: ``(n, horizon)``
    :param valid: Which steps there are, bool, ``(n, horizon)``
    """

    obs: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    valid: th.Tensor


def windows(trajectories: Sequence[Transitions], horizon: int, max_windows: int | None = None) -> Windows:
    """
    A window begins at each step of each trajectory, or, if those are too many, at some of them at even distances.

    :param trajectories: Consecutive transitions of one episode each
    :param horizon: Steps in a window; at the end of a trajectory there are fewer
    :param max_windows: Most windows
    :return: The windows, at least one
    :raises ValueError: if there is no transition at all
    """
    starts = [(i, step) for i, trajectory in enumerate(trajectories) for step in range(len(trajectory.obs))]
    if not starts:
        raise ValueError("There are no transitions to compare the model with")
    if max_windows is not None and len(starts) > max_windows:
        starts = [starts[i * len(starts) // max_windows] for i in range(max_windows)]
    first = trajectories[0]
    n, obs_dim, action_dim = len(starts), first.obs.shape[1], first.actions.shape[1]
    # Each in its own precision
    result = Windows(
        first.obs.new_zeros(n, horizon + 1, obs_dim),
        first.actions.new_zeros(n, horizon, action_dim),
        first.rewards.new_zeros(n, horizon),
        first.obs.new_zeros(n, horizon, dtype=th.bool),
    )
    for row, (i, step) in enumerate(starts):
        piece = [column[step : step + horizon] for column in trajectories[i]]
        obs, actions, next_obs, rewards, _ = piece
        length = len(obs)
        result.obs[row, :1] = obs[:1]
        result.obs[row, 1 : length + 1] = next_obs
        result.actions[row, :length] = actions
        result.rewards[row, :length] = rewards
        result.valid[row, :length] = True
    return result


@th.no_grad()
def open_loop(
    ensemble: Ensemble,
    obs: th.Tensor,
    actions: th.Tensor,
    n_particles: int,
    reward: Reward | None = None,
    constant: Sequence[int] = (),
    binary: Sequence[int] = (),
) -> Iterator[tuple[th.Tensor, th.Tensor]]:
    """
    Follow recorded actions under the model, from each start several times, each step as in a model rollout: with an elite
    chosen at random and a sample from its Gaussian. Nothing ends a trajectory.

    :param ensemble: A fitted ensemble
    :param obs: Start states, ``(n, obs_dim)``
    :param actions: Actions to take, in [-1, 1], ``(n, horizon, action_dim)``
    :param n_particles: Trajectories from each start
    :param reward: Reward function of what is finite, the ensemble's prediction if None
    :param constant: See :func:`sb3_mbpo.dynamics.rollouts.predict`
    :param binary: See :func:`sb3_mbpo.dynamics.rollouts.predict`
    :return: For each step the predicted observations ``(n, n_particles, obs_dim)`` and rewards ``(n, n_particles)``
    """
    n, horizon, _ = actions.shape
    obs = obs.repeat_interleave(n_particles, dim=0)
    for step in range(horizon):
        taken = actions[:, step].repeat_interleave(n_particles, dim=0)
        next_obs, rewards = predict(ensemble, obs, taken, constant, binary)
        if reward is not None:
            finite = (obs.isfinite() & next_obs.isfinite()).all(dim=1)
            rewards = th.full_like(rewards, th.nan)
            if finite.any():
                rewards[finite] = reward(obs[finite], taken[finite], next_obs[finite]).to(rewards)
        yield next_obs.view(n, n_particles, -1), rewards.view(n, n_particles)
        obs = next_obs


class OpenLoopError(NamedTuple):
    """
    Errors of the model at some steps of a rollout. The first column is the reward, the others are the dimensions of the
    observation; raw units. Infinite where the model's prediction is.

    :param steps: Which steps, the first is 1
    :param n_windows: Trajectories that were long enough, ``(n_steps,)``
    :param rmse: Root mean square of the mean prediction's error, ``(n_steps, 1 + obs_dim)``
    :param std: Root mean square of the predicted standard deviation, ``(n_steps, 1 + obs_dim)``
    :param spread: Standard deviation of what is to be predicted, the change of the observation since the first step, or the
        reward: the error of the best constant prediction, ``(n_steps, 1 + obs_dim)``
    :param inside: Shares of the true values within one and within two predicted standard deviations of the mean prediction;
        0.683 and 0.954 if the model knows what it does not know, ``(2, n_steps, 1 + obs_dim)``
    :param scale: Standard deviation of the reward and of each dimension of the observation in the real data,
        ``(1 + obs_dim,)``
    """

    steps: list[int]
    n_windows: th.Tensor
    rmse: th.Tensor
    std: th.Tensor
    spread: th.Tensor
    inside: th.Tensor
    scale: th.Tensor

    def varies(self) -> th.Tensor:
        """
        :return: Which dimensions of the observation are not constant in the real data, bool, ``(obs_dim,)``
        """
        return self.scale[1:] > 0

    @property
    def sample_rmse(self) -> th.Tensor:
        """
        :return: Root mean square error of a single trajectory under the model, such as model rollouts are: the error of the
            mean prediction and the deviation from it, ``(n_steps, 1 + obs_dim)``
        """
        return (self.rmse.square() + self.std.square()).sqrt()

    def relative(self, of: str = "rmse") -> th.Tensor:
        """
        :param of: "rmse", "std" or "sample_rmse"
        :return: In units of the real data's standard deviation, averaged over the dimensions of the observation that vary,
            ``(n_steps,)``
        """
        values: th.Tensor = getattr(self, of)
        return (values[:, 1:] / self.scale[1:])[:, self.varies()].mean(dim=1)

    def r2(self) -> th.Tensor:
        """
        :return: Share of the variance that the mean prediction explains, ``(n_steps, 1 + obs_dim)``: 1 is perfect, below 0 is
            worse than a constant. NaN where there is no variance.
        """
        ratio = self.rmse.square() / self.spread.square()
        return th.where(self.spread > 0, 1 - ratio, th.nan)


def trusted_steps(errors: Sequence[float]) -> int:
    """
    :param errors: Of generated states after 1, 2, ... steps, as a share of the standard deviation of real observations
    :return: How many steps come before the first error above 0.1
    """
    return len(list(takewhile(lambda error: error <= TOLERANCE, errors)))


def data_scale(transitions: Transitions) -> th.Tensor:
    """
    :param transitions: Real ones
    :return: Standard deviation of the reward and of each dimension of the observation, ``(1 + obs_dim,)``. What varies by
        less than its precision can tell apart has none.
    """
    data = th.cat([transitions.rewards[:, None], transitions.obs], dim=1)
    return spread(data, data)


def open_loop_error(
    follow: OpenLoop, real: Windows, steps: Sequence[int], scale: th.Tensor, n_particles: int = 25
) -> OpenLoopError:
    """
    Compare the model with real trajectories, which it should not have been trained on.

    :param follow: :func:`open_loop` of a model
    :param real: What really happened
    :param steps: At which steps of the rollout, in ascending order. Those that no window reaches are left out.
    :param scale: See :class:`OpenLoopError`, and :func:`data_scale`
    :param n_particles: Model trajectories for each window
    :return: The errors
    """
    reached = [step for step in steps if step <= real.valid.shape[1] and bool(real.valid[:, step - 1].any())]
    rows = []
    predictions = follow(real.obs[:, 0], real.actions[:, : max(reached)], n_particles)
    for step, (next_obs, rewards) in enumerate(predictions, start=1):
        if step not in reached:
            continue
        valid = real.valid[:, step - 1]
        predicted = th.cat([rewards[valid, :, None], next_obs[valid]], dim=2)
        true = th.cat([real.rewards[valid, step - 1, None], real.obs[valid, step]], dim=1)
        std, mean = th.std_mean(predicted, dim=1, correction=1)
        error = (mean - true).abs().nan_to_num(nan=th.inf)
        std = std.nan_to_num(nan=th.inf)
        change = true.clone()
        change[:, 1:] -= real.obs[valid, 0]
        # What is known exactly is off by rounding: rollouts are in float32
        tolerance = rounding(true.float()).to(error)
        inside = [((error <= n_sigma * std + tolerance) & std.isfinite()).float().mean(dim=0) for n_sigma in (1, 2)]
        rms = [value.square().mean(dim=0).sqrt() for value in (error, std)]
        rows.append((valid.sum(), *rms, spread(change, true), th.stack(inside)))
    n_windows, rmse, spread_of_particles, changes, inside_shares = (th.stack(column) for column in zip(*rows, strict=True))
    return OpenLoopError(reached, n_windows, rmse, spread_of_particles, changes, inside_shares.transpose(0, 1), scale)
