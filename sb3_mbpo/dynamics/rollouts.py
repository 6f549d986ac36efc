"""Branched rollouts: short trajectories of the current policy under the ensemble, from real states."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch as th

from sb3_mbpo.dynamics.ensemble import Ensemble

# (obs) -> actions in [-1, 1]
Policy = Callable[[th.Tensor], th.Tensor]
# (obs, actions, next_obs) -> one value per row
Termination = Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]
Reward = Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]


class Transitions(NamedTuple):
    """
    Rows of (obs, action, next_obs, reward, terminated), raw units, actions in [-1, 1].

    :param obs: ``(n, obs_dim)``
    :param actions: ``(n, action_dim)``
    :param next_obs: ``(n, obs_dim)``
    :param rewards: ``(n,)``
    :param terminated: ``(n,)``, bool; a timeout is not a termination
    """

    obs: th.Tensor
    actions: th.Tensor
    next_obs: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor


def concatenate(parts: Iterable[Transitions]) -> Transitions:
    """
    :param parts: At least one: trajectories, or steps of a rollout
    :return: All rows, in their order
    """
    return Transitions(*map(th.cat, zip(*parts, strict=True)))


@th.no_grad()
def predict(
    ensemble: Ensemble,
    obs: th.Tensor,
    actions: th.Tensor,
    constant: Sequence[int] = (),
    binary: Sequence[int] = (),
) -> tuple[th.Tensor, th.Tensor]:
    """
    One step under the model: for each row a sample of an elite chosen at random.

    :param ensemble: A fitted ensemble
    :param obs: ``(n, obs_dim)``
    :param actions: In [-1, 1], ``(n, action_dim)``
    :param constant: Dimensions of the observation that stay as they are in the whole rollout: goals
    :param binary: Dimensions of the observation that are 0 or 1: predictions are rounded
    :return: Next observations ``(n, obs_dim)`` and rewards ``(n,)``, which need not be finite
    """
    next_obs, rewards = ensemble.sample(obs, actions)
    next_obs[:, list(constant)] = obs[:, list(constant)]
    bits = next_obs[:, list(binary)]
    next_obs[:, list(binary)] = th.where(bits.isfinite(), (bits > 0.5).float(), bits)
    return next_obs, rewards


@th.no_grad()
def model_step(
    ensemble: Ensemble,
    obs: th.Tensor,
    actions: th.Tensor,
    termination: Termination,
    reward: Reward | None = None,
    constant: Sequence[int] = (),
    binary: Sequence[int] = (),
) -> tuple[th.Tensor, Transitions]:
    """
    One step of the model. What it predicts to be infinite or NaN is not a transition.

    :param ensemble: A fitted ensemble
    :param obs: ``(n, obs_dim)``
    :param actions: ``(n, action_dim)``
    :param termination: Which transitions are terminal, bool
    :param reward: Reward function, the ensemble's prediction if None
    :param constant: See :func:`predict`
    :param binary: See :func:`predict`
    :return: Which rows are transitions, bool, ``(n,)``, and those transitions
    """
    next_obs, rewards = predict(ensemble, obs, actions, constant, binary)
    finite = th.isfinite(next_obs).all(dim=1) & th.isfinite(rewards)
    if not finite.all():
        obs, actions, next_obs, rewards = obs[finite], actions[finite], next_obs[finite], rewards[finite]
    if len(obs) == 0:
        return finite, Transitions(obs, actions, next_obs, rewards, rewards.bool())
    if reward is not None:
        rewards = reward(obs, actions, next_obs).to(obs)
    return finite, Transitions(obs, actions, next_obs, rewards, termination(obs, actions, next_obs))


@th.no_grad()
def rollout(
    ensemble: Ensemble,
    policy: Policy,
    start_obs: th.Tensor,
    length: int,
    termination: Termination,
    reward: Reward | None = None,
    constant: Sequence[int] = (),
    binary: Sequence[int] = (),
) -> Iterator[Transitions]:
    """
    Follow the policy under the model for ``length`` steps from each start state (paper, Algorithm 2). A terminal
    transition is yielded and ends its rollout. What :func:`model_step` does not take for a transition ends its rollout too.

    :param ensemble: A fitted ensemble
    :param policy: The stochastic policy
    :param start_obs: Real states, ``(n, obs_dim)``
    :param length: ``k``
    :param termination: Which transitions are terminal, bool
    :param reward: Reward function, the ensemble's prediction if None
    :param constant: See :func:`predict`
    :param binary: See :func:`predict`
    :return: The transitions of each step, at most ``n`` of them; ends early when no rollout is left
    """
    obs = start_obs
    for _ in range(length):
        _, transitions = model_step(ensemble, obs, policy(obs), termination, reward, constant, binary)
        if len(transitions.obs) == 0:
            return
        yield transitions
        obs = transitions.next_obs[~transitions.terminated]
        if len(obs) == 0:
            return
