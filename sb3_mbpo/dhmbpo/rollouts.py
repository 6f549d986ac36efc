"""Rollouts under the model that gradients pass through, of many states at once (Kubo et al. 2025, training rollout)."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_mbpo.common.adam import Tensors
from sb3_mbpo.common.update import sample_actions
from sb3_mbpo.dhmbpo.policies import FARTHEST
from sb3_mbpo.dynamics.ensemble import Ensemble

# (obs, actions, next_obs) -> one value per row; flat observations and actions in [-1, 1]
RowFunction = Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]
# Which transitions are terminal. Or, where they were found out before by a function that cannot be part of a graph, bools,
# (horizon, batch)
Termination = RowFunction | th.Tensor


class Model(NamedTuple):
    """
    What a rollout needs to know of the environment.

    :param ensemble: Architecture, units and bounds of variances
    :param weights: Of each layer of the elites, ``(n_elites, in, out)``
    :param biases: Of each layer of the elites, ``(n_elites, 1, out)``
    :param constant: Which dimensions of the observation stay as they are (goals), bool, ``(obs_dim,)``
    :param binary: Which are 0 or 1: predictions are rounded, without a gradient, bool, ``(obs_dim,)``
    """

    ensemble: Ensemble
    weights: list[th.Tensor]
    biases: list[th.Tensor]
    constant: th.Tensor
    binary: th.Tensor


class RolloutNoise(NamedTuple):
    """
    What is drawn for a rollout.

    :param actions: Standard normal, ``(horizon + 1, batch, action_dim)``
    :param model: Standard normal, ``(horizon, batch, obs_dim)``
    :param slots: For each step a permutation of ``n_slots`` numbers, of which those below ``batch`` are rows of the batch;
        each elite has as many slots, ``(horizon, n_slots)``
    """

    actions: th.Tensor
    model: th.Tensor
    slots: th.Tensor


class Rollout(NamedTuple):
    """
    Under the model, from each state of the batch.

    :param obs: States, ``(horizon + 1, batch, obs_dim)``
    :param actions: ``(horizon + 1, batch, action_dim)``
    :param log_prob: Logarithm of their density, ``(horizon + 1, batch)``
    :param rewards: ``(horizon, batch)``
    :param alive: 1 where there is no terminal transition before the state, else 0, ``(horizon + 1, batch)``
    :param lost: 1 where the reward of finite states was no finite number, so that the rollout ended, ``(horizon, batch)``
    """

    obs: th.Tensor
    actions: th.Tensor
    log_prob: th.Tensor
    rewards: th.Tensor
    alive: th.Tensor
    lost: th.Tensor


def draw_rollout_noise(
    horizon: int, batch_size: int, obs_dim: int, action_dim: int, n_elites: int, device: th.device
) -> RolloutNoise:
    """
    :param horizon: Steps
    :param batch_size: Rollouts
    :param obs_dim: Size of a flat observation
    :param action_dim: Size of a flat action
    :param n_elites: Networks of the model
    :param device: Where
    :return: Noise
    """
    # The same number for each elite, so that all are one product
    n_slots = -(-batch_size // n_elites) * n_elites
    return RolloutNoise(
        th.randn(horizon + 1, batch_size, action_dim, device=device),
        th.randn(horizon, batch_size, obs_dim, device=device),
        th.rand(horizon, n_slots, device=device).argsort(dim=1),
    )


def model_step(
    model: Model, obs: th.Tensor, actions: th.Tensor, noise: th.Tensor, slots: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    A step that gradients pass through. The batch is split evenly among the elites. Noise is on the observation only, the
    reward is its mean.

    :param model: The model
    :param obs: ``(batch, obs_dim)``, raw
    :param actions: ``(batch, action_dim)``, in [-1, 1]
    :param noise: Standard normal, ``(batch, obs_dim)``
    :param slots: See :class:`RolloutNoise`, ``(n_slots,)``
    :return: Next observations, ``(batch, obs_dim)``, and rewards, ``(batch,)``
    """
    ensemble, n = model.ensemble, len(obs)
    inputs = ensemble.unit_inputs(th.cat([obs, actions], dim=1)).clamp(-FARTHEST, FARTHEST)
    # What is no row of the batch is any row: nobody looks at it
    rows = th.where(slots < n, slots, 0).view(len(model.weights[0]), -1)
    mean, log_var = (each.flatten(0, 1) for each in ensemble.layers(inputs[rows], model.weights, model.biases))
    slot_of_row = slots.argsort()[:n]
    mean, log_var = mean[slot_of_row], log_var[slot_of_row]
    unit = th.cat([mean[:, :1], mean[:, 1:] + (0.5 * log_var[:, 1:]).exp() * noise], dim=1)
    targets = (ensemble.target_mean + ensemble.target_std * unit).to(obs)
    next_obs = th.where(model.constant, obs, obs + targets[:, 1:])
    return th.where(model.binary, (next_obs > 0.5).to(obs), next_obs), targets[:, 0]


def state_step(
    actor: nn.Module,
    parameters: Tensors,
    model: Model,
    obs: th.Tensor,
    noise: RolloutNoise,
    termination: RowFunction | None,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    One step of a distribution rollout.

    :param actor: Architecture
    :param parameters: The actor's
    :param model: The model
    :param obs: ``(batch, obs_dim)``
    :param noise: Of this step, without the first dimension
    :param termination: Whether each transition is terminal; None if that is found out elsewhere
    :return: Actions, ``(batch, action_dim)``, next observations, ``(batch, obs_dim)``, and which of them are finite and not
        terminal, bool, ``(batch,)``
    """
    actions, _ = sample_actions(actor, parameters, obs, noise.actions)
    next_obs, _ = model_step(model, obs, actions, noise.model, noise.slots)
    goes_on = next_obs.isfinite().all(dim=1)
    if termination is not None:
        goes_on = goes_on & ~termination(obs, actions, next_obs)
    return actions, next_obs, goes_on


def roll_out(
    actor: nn.Module,
    parameters: Tensors,
    model: Model,
    start: th.Tensor,
    noise: RolloutNoise,
    termination: Termination,
    reward: RowFunction | None = None,
) -> Rollout:
    """
    Follow the actor. A row that has ended stays where it is, and no gradient passes through it: not even what is no number in
    the gradient of a reward function gets out.

    :param actor: From flat observations to the Gaussian before it is squashed; architecture only
    :param parameters: The actor's
    :param model: The model
    :param start: ``(batch, obs_dim)``
    :param noise: What is drawn
    :param termination: Whether each transition is terminal; has no gradient
    :param reward: Reward function, the model's prediction if None
    :return: States, actions and rewards
    """
    obs, alive = start, th.ones_like(start[:, 0])
    steps: list[tuple[th.Tensor, ...]] = []
    for step in range(len(noise.model)):
        actions, log_prob = sample_actions(actor, parameters, obs, noise.actions[step])
        goes_on = alive > 0
        obs, actions = (th.where(goes_on[:, None], each, each.detach()) for each in (obs, actions))
        next_obs, rewards = model_step(model, obs, actions, noise.model[step], noise.slots[step])
        if reward is not None:
            rewards = reward(obs, actions, next_obs).to(obs)
        has_state, has_reward = next_obs.isfinite().all(dim=1), rewards.isfinite()
        if isinstance(termination, th.Tensor):
            is_terminal = termination[step]
        else:
            is_terminal = termination(obs.detach(), actions.detach(), next_obs.detach())
        lost = goes_on & has_state & ~has_reward
        steps.append((obs, actions, log_prob.squeeze(1), th.where(has_reward, rewards, 0.0), alive, lost.to(alive)))
        goes_on = goes_on & has_state & has_reward & ~is_terminal
        obs, alive = th.where(goes_on[:, None], next_obs, obs), goes_on.to(alive)
    last_actions, log_prob = sample_actions(actor, parameters, obs, noise.actions[-1])
    all_obs, all_actions, log_probs, all_rewards, all_alive, all_lost = zip(*steps, strict=True)
    return Rollout(
        th.stack([*all_obs, obs]),
        th.stack([*all_actions, last_actions]),
        th.stack([*log_probs, log_prob.squeeze(1)]),
        th.stack(all_rewards),
        th.stack([*all_alive, alive]),
        th.stack(all_lost),
    )
