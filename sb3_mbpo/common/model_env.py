"""An agent's model as something to act in: the ensemble together with the policy, the terminations and the rewards."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.common.buffers import normalized
from sb3_mbpo.common.spaces import dims_where, in_space, split, unflatten
from sb3_mbpo.dynamics.open_loop import open_loop
from sb3_mbpo.dynamics.rollouts import Reward, Termination, Transitions, model_step, rollout
from sb3_mbpo.dynamics.termination import KnownTermination, derive_termination_fn
from sb3_mbpo.dynamics.user_functions import TensorFn, TransitionFn, apply_transition_fn, describe_row

if TYPE_CHECKING:
    from sb3_mbpo.common.model_based import ModelBasedSAC

# Model rollouts that are made side by side: few enough for the processor's caches, which makes them 1.7 times as fast as
# 100,000 at once
ROLLOUTS_AT_ONCE = 10_000


class ModelEnv:
    """
    Observations are raw and flat, actions in [-1, 1], as tensors on the agent's device.

    :param agent: Whose model, policy and functions these are
    :param env: The real environment, of which the terminations are derived where they are known
    """

    def __init__(self, agent: "ModelBasedSAC", env: VecEnv) -> None:
        self.agent, self.env = agent, env
        space = agent.observation_space
        self.binary_dims = dims_where(space, lambda name, part: isinstance(part, spaces.MultiBinary))
        is_goal_conditioned = isinstance(agent.replay_buffer, HerReplayBuffer)
        self.goal_dims = dims_where(space, lambda name, part: is_goal_conditioned and name == "desired_goal")
        # None: learned
        self.termination_fn: TransitionFn | KnownTermination | None = agent.termination_fn or derive_termination_fn(env)
        self.termination_of_tensors = self._termination_of_tensors()
        self.reward_of_tensors = self._reward_of_tensors() if agent.needs_gradients and agent.reward_fn is not None else None

    def rollout(self, start_obs: th.Tensor, length: int) -> Iterator[Transitions]:
        """
        Follow the stochastic policy (see :func:`sb3_mbpo.dynamics.rollouts.rollout`), in portions.

        :param start_obs: ``(n, obs_dim)``
        :param length: ``k``
        :return: Transitions, those of a step together, one portion after the other
        """
        for some in start_obs.split(ROLLOUTS_AT_ONCE):
            yield from rollout(
                *(self.agent.dynamics, self.policy, some, length, self.termination, self.reward),
                constant=self.goal_dims,
                binary=self.binary_dims,
            )

    def returns(self, start_obs: th.Tensor, length: int) -> th.Tensor:
        """
        :param start_obs: ``(n, obs_dim)``
        :param length: Steps in each rollout
        :return: Undiscounted return of the stochastic policy up to each step, ``(n, length)``. It stays as it is after a
            terminal transition, and where the model predicts anything that is not finite.
        """
        rewards = th.zeros(len(start_obs), length, device=start_obs.device)
        obs, rows = start_obs.float(), th.arange(len(start_obs), device=start_obs.device)
        with th.no_grad():
            for step in range(length):
                finite, transitions = self.step(obs, self.policy(obs))
                rows = rows[finite]
                rewards[rows, step] = transitions.rewards
                goes_on = ~transitions.terminated
                obs, rows = transitions.next_obs[goes_on], rows[goes_on]
                if len(rows) == 0:
                    break
        return rewards.cumsum(dim=1)

    def step(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, Transitions]:
        """
        One step (see :func:`sb3_mbpo.dynamics.rollouts.model_step`).

        :param obs: ``(n, obs_dim)``
        :param actions: ``(n, action_dim)``
        :return: Which rows are transitions, bool, ``(n,)``, and those transitions
        """
        return model_step(
            *(self.agent.dynamics, obs, actions, self.termination, self.reward),
            constant=self.goal_dims,
            binary=self.binary_dims,
        )

    def open_loop(self, obs: th.Tensor, actions: th.Tensor, n_particles: int) -> Iterator[tuple[th.Tensor, th.Tensor]]:
        """
        Follow recorded actions (see :func:`sb3_mbpo.dynamics.open_loop.open_loop`), further than the model is trusted: what is
        far from all data need not have a finite reward.

        :param obs: Start states, ``(n, obs_dim)``
        :param actions: ``(n, horizon, action_dim)``
        :param n_particles: Trajectories from each start
        :return: For each step observations ``(n, n_particles, obs_dim)`` and rewards ``(n, n_particles)``
        """
        reward = self._reward(finite=False)
        # In the precision of model rollouts
        return open_loop(self.agent.dynamics, obs.float(), actions, n_particles, reward, self.goal_dims, self.binary_dims)

    def as_policy(self, obs: th.Tensor) -> Any:
        """
        :param obs: ``(n, obs_dim)``
        :return: What the policy sees: normalised if the environment is, ``(n, *shape)``, or a dictionary of them
        """
        return normalized(unflatten(self.agent.observation_space, obs), self.agent.get_vec_normalize_env())

    def policy(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(n, obs_dim)``
        :return: Actions of the stochastic policy, as the replay buffer has them, ``(n, action_dim)``
        """
        agent = self.agent
        if agent.use_sde:
            agent.actor.reset_noise(len(obs))
        return agent.actor(self.as_policy(obs))

    def termination(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(n, obs_dim)``
        :param actions: ``(n, action_dim)``
        :param next_obs: ``(n, obs_dim)``
        :return: Whether each transition is terminal, bool, ``(n,)``
        """
        if self.termination_fn is None:
            return self.agent.termination_classifier.predict(next_obs)
        if isinstance(self.termination_fn, KnownTermination):
            return self.termination_fn.of_tensors(next_obs)
        return self._apply(self.termination_fn, "termination_fn", obs, actions, next_obs, boolean=True)

    def _termination_of_tensors(self) -> Termination | None:
        """As :meth:`termination`, of one batch, and in a compiled graph; None for a user's function, which is of arrays."""
        if self.termination_fn is None:
            classifier = self.agent.termination_classifier
            return lambda obs, actions, next_obs: classifier(next_obs) > 0
        if isinstance(self.termination_fn, KnownTermination):
            known = self.termination_fn
            return lambda obs, actions, next_obs: known.of_tensors(next_obs)
        return None

    def _reward_of_tensors(self) -> Reward:
        """The user's function, through which gradients pass, in a compiled graph."""
        reward_fn, action_space = cast(TensorFn, self.agent.reward_fn), self.agent.action_space
        assert isinstance(action_space, spaces.Box)
        low, high = (
            th.as_tensor(each, dtype=th.float32, device=self.agent.device).flatten()
            for each in (action_space.low, action_space.high)
        )
        shape = action_space.shape
        # What gradients do not need is worked out here, once
        parts = split(self.agent.observation_space)

        def reward(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
            before, after = ({name: flat[:, dims].reshape(-1, *of) for name, dims, of in parts} for flat in (obs, next_obs))
            action = (low + 0.5 * (actions + 1) * (high - low)).reshape(-1, *shape)
            if "" in before:
                return reward_fn(before[""], action, after[""])
            return reward_fn(before, action, after)

        return reward

    @property
    def reward(self) -> Reward | None:
        """The user's function, the environment's own where hindsight experience replay would ask it, None for the model."""
        return self._reward(finite=True)

    def _reward(self, finite: bool) -> Reward | None:
        buffer = self.agent.replay_buffer
        if self.agent.needs_gradients:
            # The environment's own has none
            return self.reward_of_tensors and partial(self._tensor_reward, finite=finite)
        if self.agent.reward_fn is not None:
            return partial(self._apply, cast(TransitionFn, self.agent.reward_fn), "reward_fn", boolean=False, finite=finite)
        # What rewards take from `info`, nobody knows in a model rollout
        if isinstance(buffer, HerReplayBuffer) and not buffer.copy_info_dict:
            return partial(self._goal_reward, finite=finite)
        return None

    def _goal_reward(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, finite: bool) -> th.Tensor:
        reached = in_space(self.agent.observation_space, next_obs)
        infos: list[dict[str, Any]] = [{} for _ in next_obs]
        rewards = self.env.env_method("compute_reward", reached["achieved_goal"], reached["desired_goal"], infos, indices=[0])[
            0
        ]
        rewards = np.asarray(rewards, dtype=np.float32).reshape(-1)
        if rewards.shape != (len(next_obs),) or (finite and not np.isfinite(rewards).all()):
            raise ValueError(
                f"`compute_reward` of the environment must return {len(next_obs)} finite numbers, one for each goal, but "
                f"returned {rewards}"
            )
        return th.as_tensor(rewards, device=next_obs.device)

    def _tensor_reward(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor, finite: bool) -> th.Tensor:
        assert self.reward_of_tensors is not None
        rewards = self.reward_of_tensors(obs.float(), actions, next_obs.float()).float()
        if finite and not rewards.isfinite().all():
            row = int(rewards.isfinite().int().argmin())
            example = describe_row(*self.as_environment(obs, actions, next_obs), row)
            raise ValueError(f"`reward_fn` must return finite numbers, but returned {rewards[row].item()} for {example}")
        return rewards

    def _apply(
        self,
        fn: TransitionFn,
        name: str,
        obs: th.Tensor,
        actions: th.Tensor,
        next_obs: th.Tensor,
        boolean: bool,
        finite: bool = True,
    ) -> th.Tensor:
        values = apply_transition_fn(fn, name, *self.as_environment(obs, actions, next_obs), boolean, finite)
        # A copy, as the user's array may be read-only
        return th.tensor(values, device=self.agent.device)

    def as_environment(self, obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> tuple[Any, np.ndarray, Any]:
        """
        What the environment itself would see.

        :param obs: ``(n, obs_dim)``
        :param actions: ``(n, action_dim)``
        :param next_obs: ``(n, obs_dim)``
        :return: Arrays, or dictionaries of them, in the environment's own shapes, and actions in its units
        """
        space, policy = self.agent.observation_space, self.agent.policy
        before, after = (in_space(space, each) for each in (obs, next_obs))
        action: Any = unflatten(self.agent.action_space, actions.cpu().numpy())
        return before, policy.unscale_action(action), after
