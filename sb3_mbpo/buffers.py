"""The buffer of generated transitions, the buffer that gradient updates sample from, and how to read the real one."""

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.dynamics.rollouts import Transitions


def n_transitions(replay_buffer: ReplayBuffer) -> int:
    """
    :param replay_buffer: SB3's buffer, whose ``size()`` counts rows of ``n_envs`` transitions
    :return: Number of real transitions in it
    """
    return replay_buffer.size() * replay_buffer.n_envs


def max_transitions(replay_buffer: ReplayBuffer) -> int:
    """
    :param replay_buffer: SB3's buffer, whose ``buffer_size`` counts rows of ``n_envs`` transitions
    :return: Number of real transitions that it can hold
    """
    return replay_buffer.buffer_size * replay_buffer.n_envs


def check_finite(replay_buffer: ReplayBuffer) -> None:
    """
    :param replay_buffer: SB3's replay buffer or any subclass of it
    :raises ValueError: if an observation, action or reward in it is not finite; the message names the first
    """
    for name in ("observations", "next_observations", "actions", "rewards"):
        if replay_buffer.optimize_memory_usage and name == "next_observations":
            continue
        rows = getattr(replay_buffer, name)[: replay_buffer.size()]
        finite = np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
        if not finite.all():
            row = int(finite.argmin())
            raise ValueError(
                f"The {name} of `replay_buffer` must be finite numbers, but those in row {row} are {rows[row]}. "
                "Remove such transitions before you load the buffer."
            )


def real_transitions(replay_buffer: ReplayBuffer, device: th.device | str = "cpu") -> Transitions:
    """
    All one-step transitions of a replay buffer, in raw units. Truncated ones are included (SB3 stores the true last
    observation) and are not terminal.

    With ``optimize_memory_usage`` the successor of an episode's last observation is lost: those transitions are left out.

    :param replay_buffer: SB3's replay buffer or any subclass of it
    :param device: Where to put the tensors
    :return: Float32 tensors, observations flattened
    """
    steps = np.arange(replay_buffer.size())
    if replay_buffer.optimize_memory_usage:
        if replay_buffer.full:
            # This row's observation has been overwritten by the newest successor
            steps = np.delete(steps, replay_buffer.pos)
        successors = replay_buffer.observations[(steps + 1) % replay_buffer.buffer_size]
        valid = replay_buffer.dones[steps] == 0
    else:
        successors = replay_buffer.next_observations[steps]
        valid = np.ones((len(steps), replay_buffer.n_envs), dtype=bool)
    terminated = replay_buffer.dones[steps] * (1 - replay_buffer.timeouts[steps]) > 0

    def tensor(array: np.ndarray) -> th.Tensor:
        width = int(np.prod(array.shape[2:]))
        return th.as_tensor(array[valid].reshape(-1, width), dtype=th.float32, device=device)

    return Transitions(
        obs=tensor(replay_buffer.observations[steps]),
        actions=tensor(replay_buffer.actions[steps]),
        next_obs=tensor(successors),
        rewards=tensor(replay_buffer.rewards[steps]).squeeze(1),
        terminated=th.as_tensor(terminated[valid], device=device),
    )


def model_buffer_size(retain_epochs: int, model_train_freq: int, rollout_batch_size: int, rollout_length: int) -> int:
    """
    Capacity of the model buffer: the rollouts of ``retain_epochs`` epochs of 1,000 environment steps (authors' release),
    but at least those of one model training.

    :return: Number of transitions
    """
    rollouts = max(retain_epochs * 1_000 * rollout_batch_size // model_train_freq, rollout_batch_size)
    return rollouts * rollout_length


class ModelReplayBuffer(BaseBuffer):
    """
    First-in-first-out buffer of generated transitions, as float32 tensors in raw units. Takes whole batches.

    :param buffer_size: Capacity in transitions
    :param observation_space: Flat or not, stored flat
    :param action_space: Actions are stored in [-1, 1]
    :param device: Where the tensors live
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        device: th.device | str = "auto",
    ) -> None:
        super().__init__(buffer_size, observation_space, action_space, device)
        self._allocate()

    def _allocate(self) -> None:
        obs_dim = int(np.prod(self.obs_shape))

        def column(width: int) -> th.Tensor:
            return th.zeros(self.buffer_size, width, device=self.device)

        self.observations = column(obs_dim)
        self.actions = column(self.action_dim)
        self.next_observations = column(obs_dim)
        self.rewards = column(1)
        self.dones = column(1)
        self.reset()

    def _columns(self) -> tuple[th.Tensor, ...]:
        return self.observations, self.actions, self.next_observations, self.rewards, self.dones

    def extend(self, transitions: Transitions) -> None:
        """
        :param transitions: Any number of rows; of more than the capacity the last ones are kept
        """
        self._extend((*transitions[:3], transitions.rewards[:, None], transitions.terminated[:, None]))

    def _extend(self, rows: tuple[th.Tensor, ...]) -> None:
        n = min(len(rows[0]), self.buffer_size)
        index = (self.pos + th.arange(n, device=self.device)) % self.buffer_size
        for column, new in zip(self._columns(), rows, strict=True):
            column[index] = new[len(new) - n :].to(column)
        self.full = self.full or self.pos + n >= self.buffer_size
        self.pos = (self.pos + n) % self.buffer_size

    def resize(self, buffer_size: int) -> None:
        """
        Change the capacity; the newest transitions are kept.

        :param buffer_size: New capacity in transitions
        """
        if buffer_size == self.buffer_size:
            return
        oldest = self.pos if self.full else 0
        order = (oldest + th.arange(self.size(), device=self.device)) % self.buffer_size
        rows = tuple(column[order[-buffer_size:]] for column in self._columns())
        self.buffer_size = buffer_size
        self._allocate()
        self._extend(rows)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        index = th.as_tensor(batch_inds, device=self.device)
        obs, actions, next_obs, rewards, dones = (column[index] for column in self._columns())
        obs, next_obs = obs.reshape(-1, *self.obs_shape), next_obs.reshape(-1, *self.obs_shape)
        if env is not None:
            obs, next_obs, rewards = (
                th.as_tensor(normalized, dtype=th.float32, device=self.device)
                for normalized in (
                    self._normalize_obs(obs.cpu().numpy(), env),
                    self._normalize_obs(next_obs.cpu().numpy(), env),
                    self._normalize_reward(rewards.cpu().numpy(), env),
                )
            )
        return ReplayBufferSamples(obs, actions, next_obs, dones, rewards)


class MixedReplayBuffer:
    """
    What gradient updates sample from in place of the replay buffer: a fixed share of real transitions, the rest generated
    (paper, section 5; the share from the authors' release).

    :param replay_buffer: Real transitions
    :param model_buffer: Generated transitions. As long as it is empty, all are real.
    :param real_ratio: Share of real transitions in a batch, rounded down to whole transitions
    :param gamma: Discount of the generated transitions where the real ones bring their own (n-step returns)
    """

    def __init__(self, replay_buffer: ReplayBuffer, model_buffer: ModelReplayBuffer, real_ratio: float, gamma: float) -> None:
        self.replay_buffer = replay_buffer
        self.model_buffer = model_buffer
        self.real_ratio = real_ratio
        self.gamma = gamma

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_size: Number of transitions, of which ``int(batch_size * real_ratio)`` are real and come first
        :param env: Normalises observations and rewards, as in SB3's buffers
        :return: The batch
        """
        n_real = int(batch_size * self.real_ratio) if self.model_buffer.size() > 0 else batch_size
        if n_real == batch_size:
            return self.replay_buffer.sample(batch_size, env=env)
        generated = self.model_buffer.sample(batch_size - n_real, env=env)
        if n_real == 0:
            return generated
        real = self.replay_buffer.sample(n_real, env=env)
        discounts = None
        if real.discounts is not None:
            discounts = th.cat([real.discounts, th.full_like(generated.rewards, self.gamma)])
        return ReplayBufferSamples(
            th.cat([real.observations, generated.observations]),
            th.cat([real.actions, generated.actions]),
            th.cat([real.next_observations, generated.next_observations]),
            th.cat([real.dones, generated.dones]),
            th.cat([real.rewards, generated.rewards]),
            discounts,
        )
