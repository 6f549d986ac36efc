"""Whether the critics over- or underestimate: on real data, on generated data, and beside the returns that came."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.common.buffers import normalized
from sb3_mbpo.common.spaces import unflatten
from sb3_mbpo.dynamics.rollouts import Transitions

if TYPE_CHECKING:
    from sb3_mbpo.common.model_based import ModelBasedSAC

# Largest weight in a return of what was not seen of an episode, in whose place the critics' own value stands
MAX_REST = 0.5


class ValueCheck(NamedTuple):
    """
    Values in the units that the critics learn (of MBPO under ``VecNormalize``, normalised rewards), entropy included.

    :param q_real: Q-value of real transitions, ``(n,)``: MBPO's of the lowest critic, DHMBPO's of their mean
    :param returns: Soft discounted return that followed each of them, ``(n,)``
    :param q_model: Q-value of generated transitions, ``(m,)``; empty without any
    :param promised: What the actor's own objective says of the states, ``(n,)``; empty unless the actor learns from rollouts
    :param gained: Soft discounted return that followed, with the entropy in those states, ``(n,)``
    """

    q_real: np.ndarray
    returns: np.ndarray
    q_model: np.ndarray
    promised: np.ndarray = np.zeros(0)
    gained: np.ndarray = np.zeros(0)

    def bias(self) -> float:
        """
        :return: Mean of Q-value less return: above 0 the critics overestimate
        """
        return float((self.q_real - self.returns).mean())

    def relative_bias(self) -> float:
        """
        :return: The same, as a share of the mean absolute return
        """
        return self.bias() / max(float(np.abs(self.returns).mean()), 1e-8)

    def relative_promise(self) -> float:
        """
        :return: Mean of what the actor promises less what came, as a share of the mean absolute return
        """
        return float((self.promised - self.gained).mean()) / max(float(np.abs(self.gained).mean()), 1e-8)


def q_values(agent: "ModelBasedSAC", obs: Any, actions: th.Tensor) -> th.Tensor:
    """
    :param agent: Whose critics
    :param obs: As the critics see them, ``(n, *shape)``, or a dictionary of them
    :param actions: In [-1, 1], ``(n, action_dim)``
    :return: Of the critics as the algorithm combines them, ``(n,)``
    """
    with th.no_grad():
        return agent.combine(th.cat(agent.critic(obs, actions), dim=1))


def value_check(agent: "ModelBasedSAC", trajectories: Sequence[Transitions], max_model: int = 1_000) -> ValueCheck:
    """
    :param agent: Whose critics
    :param trajectories: Real ones of its present stochastic policy; of somewhat older policies, the returns are theirs
    :param max_model: Generated transitions to draw from the model buffer
    :return: Q-values and the returns that came. Where an episode was cut off (by a time limit, too), the critics' value of the
        last state stands for the rest, and hides that share of their bias; states in which it would weigh more than half
        are left out. Where a policy is so sure that its actions come out as -1 or 1, their density, and the entropy with it,
        is a lower bound.
    :raises ValueError: if no trajectory is long enough
    """
    env, gamma = agent.get_vec_normalize_env(), agent.gamma
    # Steps after which the rest weighs no more than MAX_REST; without a discount it never does
    n_seen = int(np.ceil(np.log(MAX_REST) / np.log(gamma))) if 0 < gamma < 1 else (1 if gamma == 0 else np.inf)
    q_real, returns, promised, gained = [], [], [], []
    for trajectory in trajectories:
        n = len(trajectory.rewards)
        is_over = bool(trajectory.terminated[-1])
        n_complete = int(n if is_over else max(n - n_seen + 1, 0))
        if n_complete == 0:
            continue
        obs = normalized(unflatten(agent.observation_space, trajectory.obs), env)
        rewards = trajectory.rewards.cpu().numpy()
        if env is not None and agent.learns_normalised_rewards:
            rewards = env.normalize_reward(rewards)
        bonus = -entropy_coefficient(agent) * log_density(agent, obs, trajectory.actions)
        following, soft_returns = 0.0 if is_over else _value(agent, trajectory.next_obs[-1:], env), np.zeros(n)
        for step in reversed(range(n)):
            soft_returns[step] = float(rewards[step]) + gamma * following
            # The entropy of an action counts in the state in which it is drawn, hence not in Q of that action
            following = soft_returns[step] + bonus[step].item()
        q_real.append(q_values(agent, obs, trajectory.actions).cpu().numpy()[:n_complete])
        returns.append(soft_returns[:n_complete])
        promise = agent.promised_values(trajectory.obs[:n_complete])
        if promise is not None:
            promised.append(promise.cpu().numpy())
            gained.append((soft_returns + bonus.cpu().numpy())[:n_complete])
    if not q_real:
        longest = max(len(trajectory.rewards) for trajectory in trajectories)
        raise ValueError(
            f"No trajectory ends in a terminal state or has {n_seen} steps, after which what follows counts no more than half "
            f"(`gamma` {gamma}): the longest has {longest}"
        )
    q_model = np.zeros(0)
    if agent.model_buffer.size() > 0:
        q_model = q_values(agent, *agent.sample_generated(max_model)).cpu().numpy()
    own = (np.concatenate(promised), np.concatenate(gained)) if promised else ()
    return ValueCheck(np.concatenate(q_real), np.concatenate(returns), q_model, *own)


def _value(agent: "ModelBasedSAC", obs: th.Tensor, env: VecNormalize | None) -> float:
    """Soft value of a state, with an action of the stochastic policy."""
    seen = normalized(unflatten(agent.observation_space, obs), env)
    with th.no_grad():
        if agent.use_sde:
            agent.actor.reset_noise(1)
        action, log_prob = agent.actor.action_log_prob(seen)
    return float((q_values(agent, seen, action) - entropy_coefficient(agent) * log_prob).item())


def entropy_coefficient(agent: "ModelBasedSAC") -> th.Tensor:
    """
    :param agent: Whose
    :return: At present
    """
    return agent.ent_coef_tensor if agent.log_ent_coef is None else agent.log_ent_coef.detach().exp()


def log_density(agent: "ModelBasedSAC", obs: Any, actions: th.Tensor) -> th.Tensor:
    """
    :param agent: Whose stochastic policy
    :param obs: As the policy sees them, ``(n, *shape)``, or a dictionary of them
    :param actions: In [-1, 1], ``(n, action_dim)``
    :return: Logarithm of the actions' density, ``(n,)``
    """
    with th.no_grad():
        mean, log_std, kwargs = agent.actor.get_action_dist_params(obs)
        distribution = agent.actor.action_dist.proba_distribution(mean, log_std, **kwargs)
        # At -1 and 1 the density is infinite
        return distribution.log_prob(actions.clamp(-1 + 1e-6, 1 - 1e-6))
