"""The buffer of generated transitions, the buffer that gradient updates sample from, and how to read the real one."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import BaseBuffer, DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.common.spaces import arrays, flat_dim, flatten, map_arrays, unflatten
from sb3_mbpo.dynamics.rollouts import Transitions

# Rows of the model buffer that are moved at once when its capacity changes
MOVED_AT_ONCE = 100_000


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
        rows = flatten(map_arrays(lambda array: array[: replay_buffer.size()], getattr(replay_buffer, name)))
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            row = int(finite.argmin())
            raise ValueError(
                f"The {name} of `replay_buffer` must be finite numbers, but those in row {row} are {rows[row]}. "
                "Remove such transitions before you load the buffer."
            )


def real_transitions(
    replay_buffer: ReplayBuffer, device: th.device | str = "cpu", rows: np.ndarray | None = None
) -> Transitions:
    """
    One-step transitions of a replay buffer, in raw units. Truncated ones are included (SB3 stores the true last
    observation) and are not terminal.

    With ``optimize_memory_usage`` the successor of an episode's last observation is lost: those transitions are left out.

    :param replay_buffer: SB3's replay buffer or any subclass of it
    :param device: Where to put the tensors
    :param rows: Which rows (of ``n_envs`` transitions), all if None
    :return: Float32 tensors, observations flattened and in the buffer's own precision if that is higher: the model learns
        their differences
    """
    rows = np.arange(replay_buffer.size()) if rows is None else rows
    successors: Any
    if replay_buffer.optimize_memory_usage:
        if replay_buffer.full:
            # This row's observation has been overwritten by the newest successor
            rows = rows[rows != replay_buffer.pos]
        successors = replay_buffer.observations[(rows + 1) % replay_buffer.buffer_size]
        valid = replay_buffer.dones[rows] == 0
    else:
        successors = map_arrays(lambda array: array[rows], replay_buffer.next_observations)
        valid = np.ones((len(rows), replay_buffer.n_envs), dtype=bool)
    terminated = replay_buffer.dones[rows] * (1 - replay_buffer.timeouts[rows]) > 0

    def tensor(array: Any) -> th.Tensor:
        rows = flatten(array, batch_dims=2)[valid]
        return th.as_tensor(rows.astype(np.float32 if rows.itemsize <= 4 else np.float64), device=device)

    return Transitions(
        obs=tensor(map_arrays(lambda array: array[rows], replay_buffer.observations)),
        actions=tensor(replay_buffer.actions[rows]),
        next_obs=tensor(successors),
        rewards=tensor(replay_buffer.rewards[rows]).squeeze(1),
        terminated=th.as_tensor(terminated[valid], device=device),
    )


def in_one_precision(transitions: Transitions, vec_normalize: VecNormalize | None) -> Transitions:
    """
    Where observations are normalised, SB3 makes the last one of an episode from what was normalised, in float32. All others
    are rounded, too, so that what stays does not seem to change there.

    :param transitions: In raw units
    :param vec_normalize: What normalises, if anything does
    :return: The same, in float32 if observations are normalised
    """
    if vec_normalize is None or not vec_normalize.norm_obs:
        return transitions
    return transitions._replace(obs=transitions.obs.float(), next_obs=transitions.next_obs.float())


def begins_episode(replay_buffer: ReplayBuffer) -> np.ndarray:
    """
    Which transitions are the first of an episode: the one before, of the same environment, ended an episode, or did not lead
    to this one's observation, as when ``learn()`` was called anew in the midst of an episode. The very first transition is
    taken for one; once it is overwritten, the oldest is not, as nobody knows.

    With ``optimize_memory_usage`` only the end of the episode before tells.

    :param replay_buffer: SB3's replay buffer or any subclass of it
    :return: Bool, one for each row of :func:`real_transitions`
    """
    rows = np.arange(replay_buffer.size())
    oldest = replay_buffer.pos if replay_buffer.full else 0
    # Before the first row of a full buffer lies its last
    begins = replay_buffer.dones[rows - 1] > 0
    if not replay_buffer.optimize_memory_usage:
        successors = flatten(map_arrays(lambda array: array[rows - 1], replay_buffer.next_observations), batch_dims=2)
        observations = flatten(map_arrays(lambda array: array[rows], replay_buffer.observations), batch_dims=2)
        begins |= (successors != observations).any(axis=2)
    begins[oldest] = not replay_buffer.full
    if not replay_buffer.optimize_memory_usage:
        return begins.flatten()
    if replay_buffer.full:
        rows = rows[rows != replay_buffer.pos]
    return begins[rows][replay_buffer.dones[rows] == 0]


def recent_trajectories(
    replay_buffer: ReplayBuffer, n: int, device: th.device | str = "cpu", vec_normalize: VecNormalize | None = None
) -> list[Transitions]:
    """
    :param replay_buffer: SB3's replay buffer or any subclass of it
    :param n: How many of its newest transitions
    :param device: Where to put the tensors
    :param vec_normalize: See :func:`in_one_precision`
    :return: Pieces of episodes, in which each transition begins where the one before it ended. As
        :func:`real_transitions`.
    """
    n_rows = min(n // replay_buffer.n_envs, replay_buffer.size())
    rows = (replay_buffer.pos - n_rows + np.arange(n_rows)) % replay_buffer.buffer_size
    if replay_buffer.optimize_memory_usage and replay_buffer.full:
        rows = rows[rows != replay_buffer.pos]
    transitions = real_transitions(replay_buffer, device, rows)
    is_last = replay_buffer.dones[rows] > 0
    # With `optimize_memory_usage`, those are left out
    valid = ~is_last if replay_buffer.optimize_memory_usage else np.ones_like(is_last)
    index = valid.cumsum().reshape(valid.shape) - 1
    trajectories = []
    for env in range(replay_buffer.n_envs):
        own = index[valid[:, env], env]
        columns = Transitions(*(column[th.as_tensor(own, device=device)] for column in transitions))
        # A training that was stopped leaves an episode without an end
        goes_on = (columns.next_obs[:-1] == columns.obs[1:]).all(dim=1).cpu().numpy()
        ends = (~goes_on | is_last[valid[:, env], env][:-1]).nonzero()[0] + 1
        lengths = np.diff([0, *ends, len(own)]).tolist()
        pieces = zip(*(column.split(lengths) for column in columns), strict=True)
        trajectories += [in_one_precision(Transitions(*piece), vec_normalize) for piece in pieces if len(piece[0]) > 0]
    return trajectories


def relabelled(transitions: Transitions, replay_buffer: HerReplayBuffer) -> Transitions:
    """
    Hindsight experience replay (Andrychowicz et al. 2017) for all transitions at once: in the share of them for which the
    buffer itself would do so (``her_ratio``), drawn anew at each call, the desired goal is one that the episode has
    achieved, and the reward is the one for it. Episodes that are not over keep their goals.

    :param transitions: All of the buffer, as :func:`real_transitions` returns them; not changed
    :param replay_buffer: SB3's, which chooses the goals
    :return: The same transitions, with other goals and rewards
    :raises ValueError: if a reward is not finite
    """
    is_over = replay_buffer.ep_length[: replay_buffer.size()] > 0
    rows, envs = np.nonzero(is_over & (np.random.random(is_over.shape) < replay_buffer.her_ratio))
    if len(rows) == 0:
        return transitions
    virtual = replay_buffer._get_virtual_samples(rows, envs)
    index = th.as_tensor(rows * replay_buffer.n_envs + envs, device=transitions.obs.device)
    obs, next_obs, rewards = (column.clone() for column in (transitions.obs, transitions.next_obs, transitions.rewards))
    obs[index] = flatten(virtual.observations).to(obs)
    next_obs[index] = flatten(virtual.next_observations).to(next_obs)
    rewards[index] = virtual.rewards.squeeze(1).to(rewards)
    if not th.isfinite(rewards).all():
        row = int((~th.isfinite(rewards)).nonzero()[0])
        raise ValueError(
            f"`compute_reward` of the environment must return finite numbers, but returned {rewards[row].item()} for another "
            f"goal of transition {row}, obs {obs[row].tolist()}, next_obs {next_obs[row].tolist()} (the parts of the "
            "observation one after the other)"
        )
    return transitions._replace(obs=obs, next_obs=next_obs, rewards=rewards)


class ResidentTransitions:
    """
    All transitions of a replay buffer as tensors, on the device, of which only those are copied that are new. What is
    overwritten in place, other than by the buffer's own ``add``, is not noticed.

    :param device: Where to put the tensors
    """

    def __init__(self, device: th.device | str = "cpu") -> None:
        self.device = device
        self._columns: Transitions | None = None
        self._source: Callable[[], ReplayBuffer | None] = lambda: None
        self._pos = self._n = 0

    def update(self, replay_buffer: ReplayBuffer, n_steps: int) -> Transitions:
        """
        :param replay_buffer: SB3's replay buffer or any subclass of it, the same as last time or another
        :param n_steps: Transitions that were added to it since last time
        :return: What :func:`real_transitions` returns, in the order of the buffer's rows
        """
        known = (ReplayBuffer.add, DictReplayBuffer.add, HerReplayBuffer.add)
        if replay_buffer.optimize_memory_usage or type(replay_buffer).add not in known:
            # Whether a row is valid changes with time; a user's own buffer may write anywhere
            return real_transitions(replay_buffer, self.device)
        n = n_transitions(replay_buffer)
        is_another = self._source() is not replay_buffer or n < self._n
        if self._columns is None or is_another or n_steps >= max_transitions(replay_buffer):
            rows = np.arange(replay_buffer.size())
        else:
            n_new = (replay_buffer.pos - self._pos) % replay_buffer.buffer_size
            rows = (self._pos + np.arange(n_new)) % replay_buffer.buffer_size
        new = real_transitions(replay_buffer, self.device, rows)
        if self._columns is None or len(self._columns.obs) < n:
            # Room for as many again, so that this is rare
            capacity = min(2 * n, max_transitions(replay_buffer))
            room = Transitions(*(column.new_empty(capacity, *column.shape[1:]) for column in new))
            if self._columns is not None:
                for column, old in zip(room, self._columns, strict=True):
                    column[: len(old)] = old
            self._columns = room
        index = th.as_tensor(rows[:, None] * replay_buffer.n_envs + np.arange(replay_buffer.n_envs)).flatten()
        for column, values in zip(self._columns, new, strict=True):
            column[index.to(self.device)] = values
        self._source, self._pos, self._n = weakref.ref(replay_buffer), replay_buffer.pos, n
        return Transitions(*(column[:n] for column in self._columns))


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
    First-in-first-out buffer of generated transitions, as float32 tensors in raw units. Takes whole batches. Its memory is
    reserved at the beginning, for the largest capacity that it will have; on a CPU it is in use only once it is filled.

    :param buffer_size: Capacity in transitions
    :param observation_space: A ``Box`` or a ``Dict``, stored flat
    :param action_space: Actions are stored in [-1, 1]
    :param device: Where the tensors live
    :param max_size: Largest capacity that :meth:`resize` will be asked for, the present one if None
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        device: th.device | str = "auto",
        max_size: int | None = None,
    ) -> None:
        super().__init__(buffer_size, observation_space, action_space, device)
        self.n_stored = 0
        self._allocate(max_size or buffer_size)

    def _allocate(self, max_size: int) -> None:
        obs_dim = flat_dim(self.observation_space)

        def column(width: int) -> th.Tensor:
            # Not zeros, which would put all of it to use at once
            return th.empty(max_size, width, device=self.device)

        self.observations = column(obs_dim)
        self.actions = column(self.action_dim)
        self.next_observations = column(obs_dim)
        self.rewards = column(1)
        self.dones = column(1)

    def _columns(self) -> tuple[th.Tensor, ...]:
        return self.observations, self.actions, self.next_observations, self.rewards, self.dones

    @property
    def n_bytes(self) -> int:
        """Memory when it is filled up to its largest capacity."""
        return sum(column.nbytes for column in self._columns())

    def size(self) -> int:
        """
        :return: The current number of transitions
        """
        return self.n_stored

    def reset(self) -> None:
        """
        Forget all transitions.
        """
        super().reset()
        self.n_stored = 0

    def extend(self, transitions: Transitions) -> None:
        """
        :param transitions: Any number of rows; of more than the capacity the last ones are kept
        """
        rows = (*transitions[:3], transitions.rewards[:, None], transitions.terminated[:, None])
        n = min(len(rows[0]), self.buffer_size)
        until_end = min(n, self.buffer_size - self.pos)
        for column, new in zip(self._columns(), rows, strict=True):
            new = new[len(new) - n :]
            column[self.pos : self.pos + until_end] = new[:until_end]
            column[: n - until_end] = new[until_end:]
        self.pos = (self.pos + n) % self.buffer_size
        self.n_stored = min(self.n_stored + n, self.buffer_size)
        self.full = self.n_stored == self.buffer_size

    def resize(self, buffer_size: int) -> None:
        """
        Change the capacity; the newest transitions are kept. Takes no memory up to the largest capacity.

        :param buffer_size: New capacity in transitions
        """
        if buffer_size > len(self.rewards):
            old = self._columns()
            self._allocate(buffer_size)
            for column, values in zip(self._columns(), old, strict=True):
                column[: len(values)] = values
        n = min(self.n_stored, buffer_size)
        n_wrapped = max(n - self.pos, 0)
        if n_wrapped > 0:
            # The oldest ones stay at the end of the ring
            self._move(self.buffer_size - n_wrapped, buffer_size - n_wrapped, n_wrapped)
        elif self.pos > buffer_size:
            self._move(self.pos - n, 0, n)
            self.pos = n
        self.buffer_size = buffer_size
        self.pos %= buffer_size
        self.n_stored = n
        self.full = n == buffer_size

    def _move(self, source: int, target: int, n: int) -> None:
        """Move ``n`` rows; the places may overlap. Little by little, as a copy of all would double the memory."""
        starts = range(0, n, MOVED_AT_ONCE)
        for start in starts if target < source else reversed(starts):
            stop = min(start + MOVED_AT_ONCE, n)
            for column in self._columns():
                column[target + start : target + stop] = column[source + start : source + stop].clone()

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_size: Number of transitions, drawn with replacement
        :param env: Normalises observations and rewards
        :return: The batch
        """
        # The newest lies before `pos`; while the buffer is not full, the older ones need not begin at 0 (see `resize`)
        return self._get_samples((self.pos - 1 - np.random.randint(0, self.n_stored, size=batch_size)) % self.buffer_size, env)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        index = th.as_tensor(batch_inds, device=self.device)
        flat_obs, actions, flat_next_obs, rewards, dones = (column[index] for column in self._columns())
        obs, next_obs = (self._observation(flat, env) for flat in (flat_obs, flat_next_obs))
        rewards = normalized_rewards(rewards, env)
        if isinstance(self.observation_space, spaces.Dict):
            return DictReplayBufferSamples(obs, actions, next_obs, dones, rewards)  # type: ignore[return-value]
        return ReplayBufferSamples(obs, actions, next_obs, dones, rewards)

    def _observation(self, flat: th.Tensor, env: VecNormalize | None) -> Any:
        return normalized(unflatten(self.observation_space, flat), env)


def normalized(obs: Any, env: VecNormalize | None) -> Any:
    """
    :param obs: Raw observations as tensors, ``(n, *shape)``, or a dictionary of them
    :param env: What normalises them, if anything
    :return: The same, normalised
    """
    if env is None:
        return obs
    as_numpy = map_arrays(lambda tensor: tensor.cpu().numpy(), obs)
    device = arrays(obs)[0].device
    return map_arrays(lambda array: th.as_tensor(array, dtype=th.float32, device=device), env.normalize_obs(as_numpy))


def normalized_rewards(rewards: th.Tensor, env: VecNormalize | None) -> th.Tensor:
    """
    :param rewards: Raw rewards, of any shape
    :param env: What normalises them, if anything
    :return: The same, normalised
    """
    if env is None:
        return rewards
    return th.as_tensor(env.normalize_reward(rewards.cpu().numpy()), dtype=th.float32, device=rewards.device)


def combine(function: Callable[..., th.Tensor], *samples: Any) -> Any:
    """
    :param function: Of as many tensors as there are samples
    :param samples: SB3's, all of one type
    :return: The same type; its columns, and the parts of its observations, are what the function makes of theirs. A column
        that one of them lacks is None.
    """

    def column(*values: Any) -> Any:
        if any(value is None for value in values):
            return None
        if isinstance(values[0], dict):
            return {name: function(*(value[name] for value in values)) for name in values[0]}
        return function(*values)

    names = samples[0]._fields
    return type(samples[0])(*(column(*(getattr(each, name) for each in samples)) for name in names))


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
        if self._n_real(batch_size) == batch_size:
            # Whatever the user's buffer may add to it
            return self.replay_buffer.sample(batch_size, env=env)
        return combine(lambda column: column[0], self.sample_batches(1, batch_size, env))

    def _n_real(self, batch_size: int) -> int:
        return int(batch_size * self.real_ratio) if self.model_buffer.size() > 0 else batch_size

    def _sample_real(self, n_batches: int, n: int, env: VecNormalize | None) -> ReplayBufferSamples:
        """``n`` transitions for each batch, one batch after the other."""
        buffer = type(self.replay_buffer)
        if all(each.__module__.startswith("stable_baselines3.") for each in (buffer.sample, buffer._get_samples)):
            if not isinstance(self.replay_buffer, HerReplayBuffer):
                return self.replay_buffer.sample(n_batches * n, env=env)
            # Relabelled transitions come last, so all are shuffled. Of a few, none would be relabelled.
            drawn = self.replay_buffer.sample(max(n_batches * n, self.replay_buffer.n_sampled_goal + 1), env=env)
            chosen = th.randperm(len(drawn.rewards), device=drawn.rewards.device)[: n_batches * n]
            return combine(lambda column: column[chosen], drawn)
        # A user's own buffer may depend on what a batch is: without replacement, for instance
        samples = [self.replay_buffer.sample(n, env=env) for _ in range(n_batches)]
        fields = DictReplayBufferSamples if isinstance(samples[0].observations, dict) else ReplayBufferSamples
        names = [name for name in fields._fields if getattr(samples[0], name, None) is not None]
        known: Any = [fields(**{name: getattr(sample, name) for name in names}) for sample in samples]
        return combine(lambda *columns: th.cat(columns), *known)

    def sample_batches(self, n_batches: int, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        Several batches at once.

        :param n_batches: Number of batches
        :param batch_size: Number of transitions in each, of which ``int(batch_size * real_ratio)`` are real and come first
        :param env: Normalises observations and rewards, as in SB3's buffers
        :return: The batches, ``(n_batches, batch_size, ...)`` each
        """

        def in_batches(samples: ReplayBufferSamples) -> Any:
            return combine(lambda column: column.reshape(n_batches, -1, *column.shape[1:]), samples)

        n_real = self._n_real(batch_size)
        if n_real == batch_size:
            return in_batches(self._sample_real(n_batches, n_real, env))
        generated = in_batches(self.model_buffer.sample(n_batches * (batch_size - n_real), env=env))
        if n_real == 0:
            return generated
        real = in_batches(self._sample_real(n_batches, n_real, env))
        if real.discounts is not None:
            generated = generated._replace(discounts=th.full_like(generated.rewards, self.gamma))
        return combine(lambda a, b: th.cat([a, b], dim=1), real, generated)
