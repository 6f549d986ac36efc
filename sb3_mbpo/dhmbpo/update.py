"""One update of DHMBPO as functions of tensors: what critics, actor and entropy coefficient learn from a training rollout."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch import nn
from torch.func import functional_call, grad_and_value, vjp

from sb3_mbpo.common.adam import Tensors, TrainState, adam_step
from sb3_mbpo.common.update import entropy_coefficient, update_ent_coef, update_target
from sb3_mbpo.dhmbpo.policies import bounded
from sb3_mbpo.dhmbpo.rollouts import Model, Rollout, RolloutNoise, RowFunction, Termination, roll_out

# Quantiles of the rewards with entropy that decide on the bounds of the critics, and how fast the bounds follow
QUANTILES = (0.01, 0.99)
BOUNDS_RATE = 3e-4


class Networks(NamedTuple):
    """
    Architecture only: the weights are in :class:`State`.

    :param actor: From flat observations to the Gaussian before it is squashed
    :param critic: From flat observations, actions and units that are left out, to values in half widths of the bounds
    """

    actor: nn.Module
    critic: nn.Module


class State(NamedTuple):
    """
    What an update changes.

    :param actor: The actor
    :param critic: The critics, side by side
    :param target: The target critics' parameters
    :param ent_coef: ``log_ent_coef``, ``(1,)``; or, if the entropy coefficient is fixed, ``ent_coef`` itself, without moments
    :param bounds: Lowest and highest value of the critics, ``(2,)``; equal before the first update
    """

    actor: TrainState
    critic: TrainState
    target: Tensors
    ent_coef: TrainState
    bounds: th.Tensor


class Noise(NamedTuple):
    """
    What is drawn for an update.

    :param rollout: For the training rollout
    :param critics: Numbers of two target critics, ``(2,)``
    :param dropped: Of each hidden layer of the critics, which units are left out, once for the critics' loss and once for the
        actor's, ``(2, n_dropped)``
    """

    rollout: RolloutNoise
    critics: th.Tensor
    dropped: tuple[th.Tensor, ...]


class Settings(NamedTuple):
    """
    The numbers of an update. They are tensors so that none of them is compiled in.

    :param actor: Adam's coefficients, ``(7,)``
    :param critic: Adam's coefficients, ``(7,)``
    :param ent_coef: Adam's coefficients, ``(7,)``
    :param target_entropy: Scalar
    :param gamma: Scalar
    :param tau: Scalar: share of the new weights in the target critics
    """

    actor: th.Tensor
    critic: th.Tensor
    ent_coef: th.Tensor
    target_entropy: th.Tensor
    gamma: th.Tensor
    tau: th.Tensor


def soft_returns(rollout: Rollout, ent_coef: th.Tensor, gamma: th.Tensor, last_values: th.Tensor) -> th.Tensor:
    """
    :param rollout: Of ``horizon`` steps
    :param ent_coef: Entropy coefficient
    :param gamma: Discount factor
    :param last_values: Of the last states, with their last actions, ``(batch,)``
    :return: Of all rewards and entropies, those of the first and the last action included, and of the last value, ``(batch,)``
    """
    horizon = len(rollout.rewards)
    discounts = gamma ** th.arange(horizon + 1, device=gamma.device)[:, None] * rollout.alive
    values = th.cat([rollout.rewards, last_values[None]]) - ent_coef * rollout.log_prob
    return (discounts * values).sum(dim=0)


def update_bounds(bounds: th.Tensor, rollout: Rollout, ent_coef: th.Tensor, gamma: th.Tensor) -> None:
    """
    Move the bounds, in place, towards what two quantiles of the rewards with entropy are worth if they come for ever.

    :param bounds: Lowest and highest value, ``(2,)``; if they are equal, they become what the rollout says
    :param rollout: Of this update
    :param ent_coef: Entropy coefficient
    :param gamma: Discount factor
    """
    rewards = rollout.rewards - ent_coef * rollout.log_prob[:-1]
    rewards = th.where(rollout.alive[:-1] > 0, rewards, th.nan)
    new = th.nanquantile(rewards.flatten(), rewards.new_tensor(QUANTILES)) / (1 - gamma)
    bounds.copy_(th.where(bounds[0] < bounds[1], bounds.lerp(new, BOUNDS_RATE), new))


def critic_values(
    critic: nn.Module,
    parameters: Tensors,
    bounds: th.Tensor,
    obs: th.Tensor,
    actions: th.Tensor,
    dropped: tuple[th.Tensor, ...] = (),
) -> th.Tensor:
    """
    :param critic: Architecture
    :param parameters: The critics'
    :param bounds: Lowest and highest value, ``(2,)``
    :param obs: ``(batch, obs_dim)``
    :param actions: ``(batch, action_dim)``
    :param dropped: Units of each hidden layer that are left out, ``(n_dropped,)``; none if empty
    :return: ``(n_critics, batch)``
    """
    return bounded(functional_call(critic, parameters, (obs, actions, dropped)), bounds)


def critic_targets(
    critic: nn.Module, state: State, rollout: Rollout, two: th.Tensor, ent_coef: th.Tensor, gamma: th.Tensor
) -> th.Tensor:
    """
    :param critic: Architecture
    :param state: Target critics and bounds
    :param rollout: Of this update
    :param two: Numbers of two target critics, ``(2,)``
    :param ent_coef: Entropy coefficient
    :param gamma: Discount factor
    :return: What the critics are to say of the first states and actions, ``(batch,)``
    """
    # The others need not be asked
    parameters = {name: parameter[two] for name, parameter in state.target.items()}
    values = critic_values(critic, parameters, state.bounds, rollout.obs[-1], rollout.actions[-1])
    last_values = values.amin(dim=0).clamp(state.bounds[0], state.bounds[1])
    # The entropy of the first action is not part of its value
    return soft_returns(rollout, ent_coef, gamma, last_values) + ent_coef * rollout.log_prob[0]


def update_critics(
    networks: Networks, state: State, rollout: Rollout, noise: Noise, ent_coef: th.Tensor, settings: Settings
) -> th.Tensor:
    """
    One step of bounds, critics and target critics, in place. Only the first states and actions of the rollout have a loss.

    :param networks: Architecture
    :param state: Changed
    :param rollout: Of this update
    :param noise: Which two target critics, and which units are left out
    :param ent_coef: Entropy coefficient
    :param settings: Numbers of the update
    :return: Loss, a scalar
    """
    update_bounds(state.bounds, rollout, ent_coef, settings.gamma)
    targets = critic_targets(networks.critic, state, rollout, noise.critics, ent_coef, settings.gamma)
    dropped = tuple(units[0] for units in noise.dropped)

    def loss(parameters: Tensors) -> th.Tensor:
        values = critic_values(networks.critic, parameters, state.bounds, rollout.obs[0], rollout.actions[0], dropped)
        return (values - targets).square().mean(dim=1).sum()

    gradients, value = grad_and_value(loss)(state.critic.parameters)
    adam_step(state.critic, gradients, settings.critic)
    update_target(state.target, state.critic.parameters, settings.tau)
    return value


def update_actor(
    networks: Networks,
    state: State,
    rollout: Rollout,
    pull_back: Callable[[Rollout], tuple[Tensors]],
    dropped: tuple[th.Tensor, ...],
    ent_coef: th.Tensor,
    settings: Settings,
) -> th.Tensor:
    """
    One step of the actor, in place, on the soft return of its rollout, with the critics' mean for what comes after.

    :param networks: Architecture
    :param state: Its actor is changed
    :param rollout: Of this update
    :param pull_back: From a gradient with respect to the rollout to one with respect to the actor's parameters
    :param dropped: Units of the critics that are left out
    :param ent_coef: Entropy coefficient
    :param settings: Numbers of the update
    :return: Loss, a scalar
    """

    def loss(rollout: Rollout) -> th.Tensor:
        last = rollout.obs[-1], rollout.actions[-1]
        values = critic_values(networks.critic, state.critic.parameters, state.bounds, *last, dropped)
        return -soft_returns(rollout, ent_coef, settings.gamma, values.mean(dim=0)).mean()

    of_rollout, value = grad_and_value(loss)(rollout)
    (gradients,) = pull_back(of_rollout)
    adam_step(state.actor, gradients, settings.actor)
    return value


def critic_update(
    networks: Networks,
    state: State,
    model: Model,
    start: th.Tensor,
    noise: Noise,
    settings: Settings,
    termination: Termination,
    reward: RowFunction | None = None,
) -> th.Tensor:
    """
    One update of the critics alone, in place. The arguments are those of :func:`joint_update`.

    :return: Loss of the critics, and how many rewards were no finite numbers, ``(2,)``
    """
    ent_coef = entropy_coefficient(state.ent_coef)
    rollout = roll_out(networks.actor, state.actor.parameters, model, start, noise.rollout, termination, reward)
    loss = update_critics(networks, state, rollout, noise, ent_coef, settings)
    return th.stack([loss, rollout.lost.sum()])


def joint_update(
    networks: Networks,
    state: State,
    model: Model,
    start: th.Tensor,
    noise: Noise,
    settings: Settings,
    termination: Termination,
    reward: RowFunction | None = None,
) -> th.Tensor:
    """
    One update of critics, actor and entropy coefficient, in place. The actor learns from the same rollout as the critics,
    after them, back through the model.

    :param networks: Architecture
    :param state: Changed
    :param model: The model
    :param start: States that were generated, ``(batch, obs_dim)``
    :param noise: What is drawn
    :param settings: Numbers of the update
    :param termination: Whether each transition is terminal, bool
    :param reward: Reward function, the model's prediction if None; gradients pass through it
    :return: Loss of the critics, of the actor, of the entropy coefficient, the latter from before, the share of the rollouts
        that had not ended, and how many rewards were no finite numbers, ``(6,)``
    """
    ent_coef = entropy_coefficient(state.ent_coef)

    def roll(parameters: Tensors) -> Rollout:
        return roll_out(networks.actor, parameters, model, start, noise.rollout, termination, reward)

    rollout, pull_back, *_ = vjp(roll, state.actor.parameters)
    rollout = Rollout(*(column.detach() for column in rollout))
    critic_loss = update_critics(networks, state, rollout, noise, ent_coef, settings)
    dropped = tuple(units[1] for units in noise.dropped)
    actor_loss = update_actor(networks, state, rollout, pull_back, dropped, ent_coef, settings)
    ent_coef_loss = update_ent_coef(state.ent_coef, rollout.log_prob[0], settings.ent_coef, settings.target_entropy)
    alive, lost = rollout.alive[-1].mean(), rollout.lost.sum()
    return th.stack([critic_loss, actor_loss, ent_coef_loss, ent_coef.squeeze(0), alive, lost])
