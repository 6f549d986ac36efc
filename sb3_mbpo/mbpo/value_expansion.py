"""
H-step model value expansion (Feinberg et al. 2018; paper, section 6.2) of SAC's critics: from the successor of each
transition of a batch the model is rolled out with the current policy, and the critics learn what it predicts, for the
transition and for every step of the rollout (the "TD-k trick").

A transition (s_-1, a_-1, r_-1, s_0) is followed by the model's states s_1 ... s_H and rewards r_0 ... r_H-1. The target of
Q(s_t, a_t) is the return over the rest of the rollout (in the paper's formula the last value is discounted by gamma^H for
every t, but it lies H - t steps ahead), with the entropies of SAC's soft values in it:

    T_t = r_t + gamma * V_t+1,    V_t = T_t - alpha * log pi(a_t | s_t),    V_H = min Q'(s_H, a_H) - alpha * log pi(a_H | s_H)

Q' are the target critics; a terminal step has the target r_t. The loss of each critic is half the mean of
(Q(s_t, a_t) - T_t)^2 over the batch and the H + 1 pairs t = -1 ... H - 1, so that H = 0 is SAC. (The paper divides their sum
by H.) Where a rollout ended early, the pairs that are missing count as 0: after a terminal state, value and target are 0.
"""

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

import torch as th
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.common.vec_env import VecNormalize
from torch.func import grad_and_value

from sb3_mbpo.common.adam import Tensors, adam_step
from sb3_mbpo.common.buffers import normalized, normalized_rewards
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.common.spaces import flatten, unflatten
from sb3_mbpo.common.update import (
    Batch,
    Networks,
    Settings,
    State,
    optimizers,
    q_values,
    run_updates,
    sac_update,
    sample_actions,
    try_update,
)

if TYPE_CHECKING:
    from sb3_mbpo.mbpo import MBPO


class Rollouts(NamedTuple):
    """
    Model rollouts from the successors s_0 of a batch. One that has ended stays in its last state.

    :param obs: s_0 ... s_H as the policy sees them, flat, ``(H + 1, batch, obs_dim)``
    :param actions: a_0 ... a_H, in [-1, 1], ``(H + 1, batch, action_dim)``
    :param log_prob: Logarithms of their densities, ``(H + 1, batch, 1)``
    :param rewards: r_0 ... r_H-1, normalised if the buffer's are, ``(H, batch, 1)``
    :param discounts: Of the value of s_1 ... s_H, ``(H, batch, 1)``: gamma, or 0 where the step is terminal
    :param is_step: Whether the rollout has the step at all, bool, ``(H, batch, 1)``
    """

    obs: th.Tensor
    actions: th.Tensor
    log_prob: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor
    is_step: th.Tensor


# (obs as the policy sees them, flat) -> actions and the logarithms of their densities, (n, 1)
Sampler = Callable[[th.Tensor], tuple[th.Tensor, th.Tensor]]
ExpandedUpdate = Callable[[Networks, State, Batch, Rollouts, Settings], th.Tensor]


@th.no_grad()
def roll_out(model_env: ModelEnv, policy: Sampler, next_obs: th.Tensor, terminal: th.Tensor, horizon: int) -> Rollouts:
    """
    Follow the policy under the model. A terminal step ends a rollout, and a prediction that is not finite ends it in the
    state before (see :func:`sb3_mbpo.dynamics.rollouts.model_step`).

    :param model_env: The model
    :param policy: Samples actions
    :param next_obs: s_0, raw and flat, ``(batch, obs_dim)``
    :param terminal: Whether s_0 is terminal, so that nothing follows, bool, ``(batch,)``
    :param horizon: ``H``, 0 or more
    :return: The rollouts
    """
    agent, state, goes_on = model_env.agent, next_obs, ~terminal
    rewards, discounts, is_step = (state.new_zeros(horizon, len(state), 1) for _ in range(3))
    acted = []
    for t in range(horizon + 1):
        obs = flatten(model_env.as_policy(state))
        actions, log_prob = policy(obs)
        acted.append((obs, actions, log_prob))
        rows = goes_on.nonzero().squeeze(1)
        if t == horizon or len(rows) == 0:
            continue
        is_transition, steps = model_env.step(state[rows], actions[rows])
        rows = rows[is_transition]
        rewards[t, rows, 0] = normalized_rewards(steps.rewards, agent.get_vec_normalize_env())
        discounts[t, rows, 0] = agent.gamma * (~steps.terminated).float()
        is_step[t, rows] = 1
        state = state.index_copy(0, rows, steps.next_obs)
        goes_on = th.zeros_like(goes_on).index_copy(0, rows, ~steps.terminated)
    all_obs, all_actions, log_probs = (th.stack(column) for column in zip(*acted, strict=True))
    return Rollouts(all_obs, all_actions, log_probs, rewards, discounts, is_step.bool())


def expanded_targets(
    rewards: th.Tensor, discounts: th.Tensor, rollouts: Rollouts, last_values: th.Tensor, ent_coef: th.Tensor
) -> th.Tensor:
    """
    :param rewards: Of the transitions, r_-1, ``(batch, 1)``
    :param discounts: Of their successors' values, 0 if terminal, ``(batch, 1)``
    :param rollouts: From their successors
    :param last_values: Lowest target critic in s_H for a_H, ``(batch, 1)``
    :param ent_coef: Entropy coefficient alpha, ``(1,)``
    :return: T_-1 ... T_H-1, ``(H + 1, batch, 1)``; of steps that a rollout does not have, any finite number
    """
    soft_value = last_values - ent_coef * rollouts.log_prob[-1]
    targets = []
    for t in reversed(range(len(rollouts.rewards))):
        target = rollouts.rewards[t] + rollouts.discounts[t] * soft_value
        targets.append(target)
        # Without the step, the rollout has ended before it: the state is still the last one
        soft_value = th.where(rollouts.is_step[t], target - ent_coef * rollouts.log_prob[t], soft_value)
    targets.append(rewards + discounts * soft_value)
    return th.stack(targets[::-1])


def pairs(obs: th.Tensor, actions: th.Tensor, rollouts: Rollouts) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    :param obs: Of the transitions, s_-1, ``(batch, obs_dim)``
    :param actions: Of the transitions, a_-1, ``(batch, action_dim)``
    :param rollouts: From their successors
    :return: What the critics have targets for, t = -1 ... H - 1 one after the other, ``((H + 1) * batch, ...)`` each:
        observations, actions, and 1, or 0 where a rollout does not have the step
    """
    is_pair = th.cat([th.ones_like(rollouts.log_prob[:1]), rollouts.is_step.float()])
    return (
        th.cat([obs, rollouts.obs[:-1].flatten(0, 1)]),
        th.cat([actions, rollouts.actions[:-1].flatten(0, 1)]),
        is_pair.flatten(0, 1),
    )


def expanded_loss(values: th.Tensor, targets: th.Tensor, is_pair: th.Tensor) -> th.Tensor:
    """
    :param values: The critics', ``(n_critics, n, 1)``
    :param targets: ``(n, 1)``
    :param is_pair: 1, or 0 for what is not to be learned, ``(n, 1)``
    :return: Mean squared error over all n, halved, summed over the critics
    """
    return ((values - targets).square() * is_pair).mean(dim=(1, 2)).sum() / 2


# --- As functions of tensors, to be compiled --------------------------------------------------------------------------


def expanded_update(networks: Networks, state: State, batch: Batch, rollouts: Rollouts, settings: Settings) -> th.Tensor:
    """
    :func:`sb3_mbpo.common.update.sac_update` with expanded targets, in place.

    :param networks: Architecture
    :param state: Changed
    :param batch: Transitions and noise, of which that for the successors is not used
    :param rollouts: From the successors, of the policy from before
    :param settings: Adam's coefficients, target entropy, tau
    :return: As ``sac_update``, ``(4,)``
    """

    def update_critic(networks: Networks, state: State, batch: Batch, ent_coef: th.Tensor, settings: Settings) -> th.Tensor:
        last_values = q_values(networks.critic, state.target, rollouts.obs[-1], rollouts.actions[-1]).amin(dim=0)
        targets = expanded_targets(batch.rewards, batch.discounts, rollouts, last_values, ent_coef).flatten(0, 1)
        obs, actions, is_pair = pairs(batch.obs, batch.actions, rollouts)

        def loss(parameters: Tensors) -> th.Tensor:
            return expanded_loss(q_values(networks.critic, parameters, obs, actions), targets, is_pair)

        gradients, value = grad_and_value(loss)(state.critic.parameters)
        adam_step(state.critic, gradients, settings.critic)
        return value

    return sac_update(networks, state, batch, settings, update_critic)


def run_expanded_updates(
    agent: "MBPO", model_env: ModelEnv, n_updates: int, batch_size: int, update: ExpandedUpdate = expanded_update
) -> th.Tensor:
    """
    Update an agent on batches of its mixed buffer, with the rollouts of ``value_expansion_horizon`` steps.

    :param agent: One for which :func:`sb3_mbpo.common.update.not_covered` has nothing to say
    :param model_env: Its model
    :param n_updates: Number of updates
    :param batch_size: Transitions in each batch
    :param update: :func:`expanded_update` or what it was compiled to
    :return: What ``update`` returned each time, ``(n_updates, 4)``
    :raises DivergenceError: if a weight is not finite then; the agent is as it was
    """
    env = agent.get_vec_normalize_env()
    samples = agent.mixed_buffer.sample_batches(n_updates, batch_size, env=of_rewards_only(env))
    successors = iter(zip(flatten(samples.next_observations, batch_dims=2).float(), samples.dones, strict=True))
    samples = samples._replace(observations=normalized(samples.observations, env))

    def one(networks: Networks, state: State, batch: Batch, settings: Settings) -> th.Tensor:
        def policy(obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
            return sample_actions(networks.actor, state.actor.parameters, obs, th.randn_like(batch.actions))

        next_obs, dones = next(successors)
        rollouts = roll_out(model_env, policy, next_obs, dones.squeeze(1) > 0, agent.value_expansion_horizon)
        return update(networks, state, batch, rollouts, settings)

    return run_updates(agent, samples, th.randn(2, *samples.actions.shape, device=agent.device), one)


def try_expanded_update(agent: "MBPO", update: ExpandedUpdate) -> None:
    """
    As :func:`sb3_mbpo.common.update.try_update`, with rollouts in which there is no step.

    :param agent: One for which :func:`sb3_mbpo.common.update.not_covered` has nothing to say; not changed
    :param update: What :func:`expanded_update` is compiled to
    """
    horizon = agent.value_expansion_horizon

    def one(networks: Networks, state: State, batch: Batch, settings: Settings) -> th.Tensor:
        obs, actions, log_prob = (th.stack([each] * (horizon + 1)) for each in (batch.obs, batch.actions, batch.rewards))
        # Three tensors: whether two are the same one is part of a graph
        rewards, discounts, is_step = (th.zeros_like(log_prob[1:]) for _ in range(3))
        return update(networks, state, batch, Rollouts(obs, actions, log_prob, rewards, discounts, is_step.bool()), settings)

    try_update(agent, agent.batch_size, one)


# --- With SB3's modules, for whatever policy --------------------------------------------------------------------------


def of_rewards_only(env: VecNormalize | None) -> VecNormalize | None:
    """
    :param env: What normalises samples of a buffer, if anything
    :return: The same that leaves observations raw, as the model needs them
    """
    if env is None or not env.norm_obs:
        return env
    env = copy(env)
    env.norm_obs = False
    return env


def train(agent: "MBPO", model_env: ModelEnv, gradient_steps: int, batch_size: int) -> th.Tensor:
    """
    What ``SAC.train`` does on the mixed buffer, in its order, with expanded targets.

    :param agent: Changed
    :param model_env: Its model
    :param gradient_steps: Number of updates
    :param batch_size: Transitions in each batch
    :return: Losses of the critics, of the actor, of the entropy coefficient, and the latter, of each update:
        ``(gradient_steps, 4)``
    """
    agent.policy.set_training_mode(True)
    agent._update_learning_rate(optimizers(agent))
    results = []
    for step in range(gradient_steps):
        results.append(_update(agent, model_env, batch_size))
        if step % agent.target_update_interval == 0:
            polyak_update(agent.critic.parameters(), agent.critic_target.parameters(), agent.tau)
            polyak_update(agent.batch_norm_stats, agent.batch_norm_stats_target, 1.0)
    return th.stack(results)


def _minimize(loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _update(agent: "MBPO", model_env: ModelEnv, batch_size: int) -> th.Tensor:
    space, env = agent.observation_space, agent.get_vec_normalize_env()
    samples = agent.mixed_buffer.sample(batch_size, env=of_rewards_only(env))
    obs = normalized(samples.observations, env)
    if agent.use_sde:
        # One matrix for all, as in `SAC.train`
        agent.actor.reset_noise()

    def policy(flat_obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        actions, log_prob = agent.actor.action_log_prob(unflatten(space, flat_obs))
        return actions, log_prob.reshape(-1, 1)

    own_actions, log_prob = agent.actor.action_log_prob(obs)
    log_prob = log_prob.reshape(-1, 1)
    if agent.ent_coef_optimizer is None:
        ent_coef, ent_coef_loss = agent.ent_coef_tensor, th.zeros((), device=agent.device)
    else:
        assert agent.log_ent_coef is not None and isinstance(agent.target_entropy, float)
        ent_coef = agent.log_ent_coef.detach().exp()
        ent_coef_loss = -(agent.log_ent_coef * (log_prob + agent.target_entropy).detach()).mean()
        _minimize(ent_coef_loss, agent.ent_coef_optimizer)

    next_obs, terminal = flatten(samples.next_observations).float(), samples.dones.squeeze(1) > 0
    rollouts = roll_out(model_env, policy, next_obs, terminal, agent.value_expansion_horizon)
    discounts = (1 - samples.dones) * (agent.gamma if samples.discounts is None else samples.discounts)
    with th.no_grad():
        last_values = th.stack(agent.critic_target(unflatten(space, rollouts.obs[-1]), rollouts.actions[-1])).amin(dim=0)
        targets = expanded_targets(samples.rewards, discounts, rollouts, last_values, ent_coef).flatten(0, 1)
    all_obs, all_actions, is_pair = pairs(flatten(obs).float(), samples.actions, rollouts)
    critic_loss = expanded_loss(th.stack(agent.critic(unflatten(space, all_obs), all_actions)), targets, is_pair)
    _minimize(critic_loss, agent.critic.optimizer)

    actor_loss = (ent_coef * log_prob - th.stack(agent.critic(obs, own_actions)).amin(dim=0)).mean()
    _minimize(actor_loss, agent.actor.optimizer)
    return th.stack([critic_loss, actor_loss, ent_coef_loss, ent_coef.squeeze()]).detach()
