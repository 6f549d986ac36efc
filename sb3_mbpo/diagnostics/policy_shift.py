"""How the model's error grows when the policy moves away from the one that collected the data (paper, Figure 1)."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from rich.progress import track
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.common.buffers import real_transitions
from sb3_mbpo.common.spaces import flat_dim
from sb3_mbpo.diagnostics.live import gaussian_of
from sb3_mbpo.diagnostics.trajectories import collect
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.dynamics.rollouts import Transitions, concatenate
from sb3_mbpo.dynamics.training import budget, fit
from sb3_mbpo.dynamics.units import spread
from sb3_mbpo.theory import error_slope, gaussian_kl, model_error_from_nll, policy_shift_from_kl

if TYPE_CHECKING:
    from sb3_mbpo.common.model_based import ModelBasedSAC
    from sb3_mbpo.common.model_env import ModelEnv


class PolicyShift(NamedTuple):
    """
    Errors of models that know data of one policy only, on data of others.

    :param data_sizes: How many transitions each model was trained on, ``n_sizes`` of them
    :param kl: Mean divergence of each policy from the one that collected the data, nats, ``(n_policies,)``
    :param shift: The same as total variation distance, by Pinsker's inequality, in [0, 1], ``(n_policies,)``
    :param error: Mean absolute error of each model, one step, in standard deviations of the change of each dimension, averaged
        over them, ``(n_sizes, n_policies)``. Not squared: of some thousand transitions, one wrong contact would outweigh all.
    :param model_error: Surrogate of the total variation distance (:func:`sb3_mbpo.theory.model_error_from_nll`),
        ``(n_sizes, n_policies)``
    """

    data_sizes: list[int]
    kl: np.ndarray
    shift: np.ndarray
    error: np.ndarray
    model_error: np.ndarray

    def slopes(self, of: str = "error") -> list[float]:
        """
        :param of: "error" or "model_error"
        :return: d error / d shift for each data size (paper, Figure 1b), by least squares over all policies
        """
        return [error_slope(self.shift, errors) for errors in getattr(self, of)]


def policy_shift(
    agent: "ModelBasedSAC",
    data: Transitions,
    policies: Sequence["ModelBasedSAC"],
    env: VecEnv,
    data_sizes: Sequence[int] = (500, 1_000, 2_000),
    n_steps: int = 1_000,
) -> PolicyShift:
    """
    Train models on data of the agent's policy, and measure them on data of other policies.

    :param agent: Whose policy collected the data. Not changed
    :param data: Its transitions, as many as the largest data size
    :param policies: Other policies, such as later checkpoints of the training, or what :func:`continued` returns
    :param env: See :func:`sb3_mbpo.diagnostics.trajectories.collect`
    :param data_sizes: How many of the transitions to train on
    :param n_steps: Environment steps to collect with the agent's and with each other policy
    :return: Errors; the first policy is the agent's own, on data not trained on
    :raises ValueError: if there are too few transitions, or no policy is another than the agent's
    """
    if max(data_sizes) > len(data.obs):
        raise ValueError(
            f"`data` has {len(data.obs)} transitions, too few for the largest of `data_sizes` ({max(data_sizes)})"
        )
    if all(_divergence(policy, agent, data.obs).max() == 0 for policy in policies):
        raise ValueError("`policies` are all the same as the agent's: there is no shift to measure errors by")
    inputs, targets = _as_regression(data)
    models = []
    for size in track(data_sizes, "Training models"):
        model = Ensemble(
            flat_dim(agent.observation_space),
            flat_dim(agent.action_space),
            agent.model_hidden_sizes,
            agent.ensemble_size,
            agent.num_elites,
            agent.model_learning_rate,
        ).to(agent.device)
        rows = th.randperm(len(inputs), device=inputs.device)[:size]
        fit(model, inputs[rows], targets[rows], budget(agent.model_gradient_steps, size, size))
        models.append((model, model.nll(inputs[rows], targets[rows])))

    scale = spread(targets[:, 1:], data.obs)
    kl, shift, error, model_error = [], [], [], []
    for policy in track([agent, *policies], "Acting with each policy"):
        new = concatenate(collect(policy, env, n_steps))
        distance = _divergence(policy, agent, new.obs)
        kl.append(distance.mean().item())
        shift.append(policy_shift_from_kl(distance))
        x, y = _as_regression(new)
        error.append([_relative_error(model, x, y, scale) for model, _ in models])
        model_error.append([model_error_from_nll(model.nll(x, y), reference) for model, reference in models])
    return PolicyShift(list(data_sizes), np.array(kl), np.array(shift), np.array(error).T, np.array(model_error).T)


def _divergence(policy: "ModelBasedSAC", agent: "ModelBasedSAC", obs: th.Tensor) -> th.Tensor:
    """Of a policy from the agent's, in each state."""
    return gaussian_kl(*(moment for each in (policy, agent) for moment in gaussian_of(each, obs)))


def _as_regression(transitions: Transitions) -> tuple[th.Tensor, th.Tensor]:
    obs, actions, next_obs, rewards, _ = transitions
    return th.cat([obs, actions], dim=1), th.cat([rewards[:, None], next_obs - obs], dim=1)


def _relative_error(model: Ensemble, inputs: th.Tensor, targets: th.Tensor, scale: th.Tensor) -> float:
    with th.no_grad():
        mean, _ = model.predict(inputs)
        errors = (mean[model.elites.long()].mean(dim=0) - targets)[:, 1:].abs().mean(dim=0)
    varies = scale > 0
    return (errors / scale)[varies].mean().item()


def continued(model_env: "ModelEnv", n_policies: int = 5, updates: int = 200) -> list["ModelBasedSAC"]:
    """
    Optimise the agent's policy further without new data, as the paper does for Figure 1.

    :param model_env: The agent's model. The agent needs its replay buffer, and is not changed, but for its model buffer, which
        is filled if it is empty
    :param n_policies: How many policies to return
    :param updates: Gradient updates from each to the next
    :return: Copies of the agent, each trained further than the one before
    """
    agent = model_env.agent
    assert agent.replay_buffer is not None
    if agent.model_buffer.size() == 0:
        agent.fill_model_buffer(model_env, real_transitions(agent.replay_buffer, agent.device).obs)
    policies, latest = [], agent
    for _ in track(range(n_policies), "Training the policy further"):
        latest = _copy(latest)
        latest.train(updates, latest.batch_size)
        policies.append(latest)
    return policies


def _copy(agent: "ModelBasedSAC") -> "ModelBasedSAC":
    """With its own networks; what is only read is shared."""
    memo: dict[int, Any] = {id(each): each for each in agent.not_copied if each is not None}
    if hasattr(agent, "_logger"):
        memo[id(agent._logger)] = agent._logger
    if agent.use_sde:
        # Torch does not copy a matrix that has a gradient
        with th.no_grad():
            agent.actor.reset_noise(agent.n_envs)
    copied = copy.deepcopy(agent, memo=memo)
    # Silent, and a loaded agent has none
    copied.set_logger(Logger(folder=None, output_formats=[]))
    return copied
