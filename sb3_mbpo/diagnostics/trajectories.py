"""Fresh trajectories of a trained agent, which its model has never seen."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_mbpo.common.buffers import in_one_precision
from sb3_mbpo.common.spaces import flatten, map_arrays
from sb3_mbpo.common.undisturbed import same_exploration
from sb3_mbpo.dynamics.rollouts import Transitions

if TYPE_CHECKING:
    from sb3_mbpo.common.model_based import ModelBasedSAC


def _raw(vec_normalize: VecNormalize | None, obs: Any) -> Any:
    return obs if vec_normalize is None else vec_normalize.unnormalize_obs(obs)


def collect(agent: "ModelBasedSAC", env: VecEnv, n_steps: int, deterministic: bool = False) -> list[Transitions]:
    """
    Act in the real environment. Neither the agent nor the statistics of a ``VecNormalize`` are changed. With gSDE, an
    exploration matrix is for one step only, as in model rollouts.

    :param agent: Who acts
    :param env: One environment with the agent's spaces; not the one in which a training goes on, as it is reset. Wrapped in
        ``VecNormalize`` if that is what the agent was trained with
    :param n_steps: Number of environment steps
    :param deterministic: Whether to act without exploration
    :return: Trajectories, the last of which may be unfinished: raw units, actions in [-1, 1]
    :raises ValueError: if there is more than one environment, or if its spaces are not the agent's
    """
    if env.num_envs != 1:
        raise ValueError(f"`env` must be one environment, not {env.num_envs}")
    for name in ("observation_space", "action_space"):
        if getattr(env, name) != getattr(agent, name):
            raise ValueError(f"`env` has the {name} {getattr(env, name)}, but the agent's is {getattr(agent, name)}")
    vec_normalize = unwrap_vec_normalize(env)
    was_training = vec_normalize is not None and vec_normalize.training
    if vec_normalize is not None:
        vec_normalize.training = False
    try:
        with same_exploration(agent):
            return _act(agent, env, vec_normalize, n_steps, deterministic)
    finally:
        if vec_normalize is not None:
            vec_normalize.training = was_training


def _act(
    agent: "ModelBasedSAC", env: VecEnv, vec_normalize: VecNormalize | None, n_steps: int, deterministic: bool
) -> list[Transitions]:
    trajectories, rows = [], []
    obs: Any = env.reset()
    raw_obs = obs if vec_normalize is None else vec_normalize.get_original_obs()
    for step in range(n_steps):
        if agent.use_sde:
            agent.actor.reset_noise()
        action, _ = agent.predict(obs, deterministic=deterministic)
        obs, reward, done, info = env.step(action)
        if vec_normalize is not None:
            reward = vec_normalize.get_original_reward()
        next_raw = obs if vec_normalize is None else vec_normalize.get_original_obs()
        successor = next_raw
        if done[0]:
            last = info[0]["terminal_observation"]
            if isinstance(last, dict):
                # The environment's own order need not be that of its space
                last = {name: last[name] for name in next_raw}
            last = map_arrays(lambda array: np.asarray(array)[None], last)
            successor = _raw(vec_normalize, last)
        terminated = bool(done[0]) and not info[0].get("TimeLimit.truncated", False)
        scaled = agent.policy.scale_action(action)
        rows.append((flatten(raw_obs), flatten(scaled), flatten(successor), reward, np.array([terminated])))
        raw_obs = next_raw
        if done[0] or step == n_steps - 1:
            obs_rows, actions, next_rows, rewards, terminated_rows = (
                th.as_tensor(np.concatenate(column), device=agent.device) for column in zip(*rows, strict=True)
            )
            # Observations as in the replay buffer: differences are taken in their own precision
            obs_rows, next_rows = (each if each.dtype == th.float64 else each.float() for each in (obs_rows, next_rows))
            trajectory = Transitions(obs_rows, actions.float(), next_rows, rewards.float(), terminated_rows)
            trajectories.append(in_one_precision(trajectory, vec_normalize))
            rows = []
    return trajectories
