"""A real action sequence under the model (paper, Figure 4 a and b)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch as th

from sb3_mbpo.common.buffers import n_transitions, real_transitions
from sb3_mbpo.dynamics.open_loop import OpenLoopError, data_scale, open_loop_error, windows
from sb3_mbpo.dynamics.rollouts import Transitions, concatenate

if TYPE_CHECKING:
    from sb3_mbpo.common.model_env import ModelEnv


class Replay(NamedTuple):
    """
    What the model makes of a real action sequence. The first column is the reward, the others are the dimensions of the
    observation; raw units.

    :param real: What happened, ``(horizon, 1 + obs_dim)``
    :param mean: Mean of the model's trajectories, ``(horizon, 1 + obs_dim)``
    :param std: Their standard deviation, ``(horizon, 1 + obs_dim)``
    """

    real: th.Tensor
    mean: th.Tensor
    std: th.Tensor


def replay(model_env: "ModelEnv", trajectory: Transitions, horizon: int = 450, n_particles: int = 1_000) -> Replay:
    """
    From the first state of a real trajectory, follow its actions under the model many times. Nothing ends the model's
    trajectories.

    :param model_env: The model
    :param trajectory: Consecutive real transitions, not trained on
    :param horizon: Most steps; the paper's 450
    :param n_particles: Trajectories in the model; the paper's 1,000
    :return: The trajectories' mean and spread beside the truth
    """
    real = th.cat([trajectory.rewards[:, None], trajectory.next_obs], dim=1)[:horizon]
    predictions = model_env.open_loop(trajectory.obs[:1], trajectory.actions[None, :horizon], n_particles)
    moments = [th.std_mean(th.cat([rewards.T, next_obs[0]], dim=1), dim=0, correction=0) for next_obs, rewards in predictions]
    std, mean = (th.stack(column) for column in zip(*moments, strict=True))
    return Replay(real, mean, std)


def varying_columns(obs: th.Tensor, most: int = 4) -> list[int]:
    """
    :param obs: Observations, ``(n, obs_dim)``
    :param most: How many to return
    :return: The first dimensions that are not constant
    """
    return (obs != obs[0]).any(dim=0).nonzero().flatten().tolist()[:most]


def error_by_step(
    model_env: "ModelEnv",
    trajectories: Sequence[Transitions],
    horizon: int = 25,
    max_windows: int = 500,
    n_particles: int = 50,
) -> OpenLoopError:
    """
    The model's error at each step of a rollout, on real trajectories.

    :param model_env: The model
    :param trajectories: Real, not trained on
    :param horizon: Up to which step
    :param max_windows: Most starts
    :param n_particles: Model trajectories from each start
    :return: See :class:`sb3_mbpo.dynamics.open_loop.OpenLoopError`. Its scale is that of the replay buffer or, if that was
        not loaded, of the trajectories
    """
    buffer = model_env.agent.replay_buffer
    assert buffer is not None
    # As in the log, in units of all real data
    has_data = n_transitions(buffer) > 1
    data = real_transitions(buffer) if has_data else concatenate(trajectories)
    return open_loop_error(
        model_env.open_loop,
        windows(trajectories, horizon, max_windows),
        range(1, horizon + 1),
        data_scale(data).to(trajectories[0].obs),
        n_particles,
    )
