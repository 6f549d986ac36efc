from collections import deque

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mbpo.common import buffers
from sb3_mbpo.common.buffers import (
    MixedReplayBuffer,
    ModelReplayBuffer,
    ResidentTransitions,
    begins_episode,
    model_buffer_size,
    n_transitions,
    real_transitions,
)
from sb3_mbpo.dynamics.rollouts import Transitions
from tests.envs import CountingEnv

OBS_SPACE = spaces.Box(-np.inf, np.inf, (2, 1), np.float32)
ACTION_SPACE = spaces.Box(-1, 1, (3,), np.float32)


def transitions(numbers):
    """Transition i is made of i in every place."""
    column = th.tensor(list(numbers), dtype=th.float32)[:, None]
    terminated = column.squeeze(1) % 2 == 1
    return Transitions(column.repeat(1, 2), column.repeat(1, 3), column.repeat(1, 2) + 0.5, -column.squeeze(1), terminated)


def contents(buffer):
    """Numbers in the buffer, oldest first; checks that no row is mixed up."""
    order = (buffer.pos - buffer.size() + np.arange(buffer.size())) % buffer.buffer_size
    sample = buffer._get_samples(order)
    numbers = sample.rewards.squeeze(1) * -1
    expected = transitions(numbers.tolist())
    assert th.equal(sample.observations, expected.obs.reshape(-1, 2, 1))
    assert th.equal(sample.next_observations, expected.next_obs.reshape(-1, 2, 1))
    assert th.equal(sample.actions, expected.actions)
    assert th.equal(sample.dones, expected.terminated.float()[:, None])
    return numbers.int().tolist()


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 12), st.integers(0, 30), st.lists(st.one_of(st.integers(0, 30), st.integers(-30, -1)), max_size=12))
def test_model_buffer_is_first_in_first_out_also_across_resizes(capacity, reserved, operations):
    """A positive number adds as many rows, a negative one changes the capacity. The oracle is a deque."""
    max_size = max(capacity, reserved)
    buffer, oracle, counter = ModelReplayBuffer(capacity, OBS_SPACE, ACTION_SPACE, "cpu", max_size), deque(maxlen=capacity), 0
    memory = buffer.observations.data_ptr()
    for operation in operations:
        if operation >= 0:
            rows = range(counter, counter + operation)
            buffer.extend(transitions(rows))
            oracle.extend(rows)
            counter += operation
        else:
            buffer.resize(-operation)
            oracle = deque(oracle, maxlen=-operation)
        assert buffer.size() == len(oracle)
        assert contents(buffer) == list(oracle)
        assert buffer.buffer_size == oracle.maxlen
        if all(-operation <= max_size for operation in operations):
            assert buffer.observations.data_ptr() == memory
        if len(oracle) > 0:
            assert set((-buffer.sample(20).rewards).flatten().int().tolist()) <= set(oracle)


@pytest.fixture
def few_rows_at_once(monkeypatch):
    monkeypatch.setattr(buffers, "MOVED_AT_ONCE", 3)


def test_rows_are_moved_little_by_little(few_rows_at_once):
    """The places overlap, upwards and downwards."""
    buffer = ModelReplayBuffer(20, OBS_SPACE, ACTION_SPACE, "cpu", 25)
    buffer.extend(transitions(range(33)))
    for size, oldest in ((24, 13), (25, 13), (16, 17), (13, 20), (22, 20)):
        buffer.resize(size)
        assert contents(buffer) == list(range(oldest, 33))


def test_memory_of_the_model_buffer():
    """Two observations, one action, reward and end: 4 bytes a number, for the largest capacity."""
    assert ModelReplayBuffer(10, OBS_SPACE, ACTION_SPACE).n_bytes == 10 * 4 * (2 + 2 + 3 + 1 + 1)
    assert ModelReplayBuffer(10, OBS_SPACE, ACTION_SPACE, max_size=25).n_bytes == 25 * 4 * 9


def test_model_buffer_samples_uniformly():
    np.random.seed(0)
    buffer = ModelReplayBuffer(8, OBS_SPACE, ACTION_SPACE)
    buffer.extend(transitions(range(5)))
    numbers = -buffer.sample(50_000).rewards.squeeze(1)
    values, counts = numbers.unique(return_counts=True)
    assert values.tolist() == [0, 1, 2, 3, 4]
    assert np.abs(counts.numpy() - 10_000).max() < 5 * np.sqrt(50_000 * 0.2 * 0.8)


def test_model_buffer_size():
    # Hopper: 4 trainings per 1,000 steps
    assert model_buffer_size(1, 250, 100_000, 1) == 400_000
    assert model_buffer_size(1, 250, 100_000, 15) == 6_000_000
    # Humanoid
    assert model_buffer_size(5, 1_000, 100_000, 25) == 12_500_000
    # Never less than one training's rollouts
    assert model_buffer_size(1, 5_000, 100, 2) == 200


def real_buffer(size=10, n_envs=1, buffer_class=ReplayBuffer, rows=7, **kwargs):
    """Row i, environment e is transition 1000 + 10 i + e; real numbers start at 1,000."""
    buffer = buffer_class(size, OBS_SPACE, ACTION_SPACE, n_envs=n_envs, **kwargs)
    for i in range(rows):
        number = 1_000.0 + 10 * i + np.arange(n_envs)
        obs = np.tile(number[:, None, None], (1, 2, 1))
        buffer.add(obs, obs + 0.5, np.tile(number[:, None], (1, 3)), -number, np.zeros(n_envs), [{} for _ in range(n_envs)])
    return buffer


@pytest.mark.parametrize(
    "batch_size, real_ratio, n_real", [(256, 0.05, 12), (256, 0.5, 128), (10, 0.99, 9), (3, 0.3, 0), (7, 0, 0)]
)
def test_every_batch_has_its_share_of_real_transitions(batch_size, real_ratio, n_real):
    model_buffer = ModelReplayBuffer(8, OBS_SPACE, ACTION_SPACE)
    model_buffer.extend(transitions(range(8)))
    mixed = MixedReplayBuffer(real_buffer(), model_buffer, real_ratio, 0.99)
    for _ in range(20):
        batch = mixed.sample(batch_size)
        is_real = batch.observations[:, 0, 0] >= 1_000
        assert is_real.sum() == n_real and len(is_real) == batch_size
        assert is_real[:n_real].all()
        # Rows stay together
        assert th.equal(batch.next_observations, batch.observations + 0.5)
        assert th.equal(batch.rewards, -batch.observations[:, 0])
        assert th.equal(batch.actions, batch.observations[:, 0].repeat(1, 3))
        assert batch.discounts is None


@pytest.mark.parametrize("real_ratio, n_real", [(0.05, 12), (0, 0), (1, 256)])
@pytest.mark.parametrize("discounts", [False, True])
def test_several_batches_at_once(real_ratio, n_real, discounts):
    np.random.seed(0)
    model_buffer = ModelReplayBuffer(1_000, OBS_SPACE, ACTION_SPACE)
    model_buffer.extend(transitions(range(1_000)))
    kwargs = dict(buffer_class=NStepReplayBuffer, n_steps=1, gamma=0.9) if discounts else {}
    mixed = MixedReplayBuffer(real_buffer(**kwargs), model_buffer, real_ratio, 0.99)
    batches = mixed.sample_batches(30, 256)
    assert batches.observations.shape == (30, 256, 2, 1) and batches.actions.shape == (30, 256, 3)
    assert batches.rewards.shape == batches.dones.shape == (30, 256, 1)
    is_real = batches.observations[:, :, 0, 0] >= 1_000
    assert (is_real.sum(dim=1) == n_real).all() and is_real[:, :n_real].all()
    assert th.equal(batches.next_observations, batches.observations + 0.5)
    assert th.equal(batches.rewards, -batches.observations[:, :, 0])
    # Drawn for each batch
    if n_real < 256:
        assert len({tuple(batch.flatten().tolist()) for batch in batches.rewards}) == 30
    if discounts and n_real > 0:
        assert th.equal(batches.discounts == 0.99, ~is_real[:, :, None])
    else:
        assert batches.discounts is None


def test_without_model_data_or_with_ratio_one_all_are_real():
    model_buffer = ModelReplayBuffer(8, OBS_SPACE, ACTION_SPACE)
    assert (MixedReplayBuffer(real_buffer(), model_buffer, 0.05, 0.99).sample(64).observations >= 1_000).all()
    model_buffer.extend(transitions(range(8)))
    np.random.seed(0)
    batch = MixedReplayBuffer(real_buffer(), model_buffer, 1.0, 0.99).sample(64)
    np.random.seed(0)
    expected = real_buffer().sample(64)
    assert all(th.equal(a, b) for a, b in zip(batch[:5], expected[:5], strict=True))


def test_n_step_returns_are_discounted_by_gamma_in_the_model_half():
    model_buffer = ModelReplayBuffer(8, OBS_SPACE, ACTION_SPACE)
    model_buffer.extend(transitions(range(8)))
    real = real_buffer(buffer_class=NStepReplayBuffer, n_steps=3, gamma=0.9)
    batch = MixedReplayBuffer(real, model_buffer, 0.5, 0.9).sample(100)
    assert batch.discounts.shape == batch.rewards.shape
    assert th.allclose(batch.discounts[50:], th.tensor(0.9))
    assert (batch.discounts[:50].unique().round(decimals=3) == 0.729).any()


def test_normalises_both_halves():
    model_buffer = ModelReplayBuffer(8, OBS_SPACE, ACTION_SPACE)
    model_buffer.extend(transitions(range(8)))
    env = VecNormalize(DummyVecEnv([lambda: CountingEnv(obs_shape=(2, 1), action_dim=3)]), clip_obs=1e9, clip_reward=1e9)
    env.obs_rms.mean[:], env.obs_rms.var[:], env.ret_rms.var = 100.0, 4.0, 25.0
    batch = MixedReplayBuffer(real_buffer(), model_buffer, 0.5, 0.99).sample(16, env=env)
    raw = batch.observations * 2 + 100
    assert th.allclose(batch.next_observations * 2 + 100, raw + 0.5, atol=1e-3)
    assert th.allclose(batch.rewards * 5, -raw[:, 0], atol=1e-3)
    assert batch.observations.dtype == batch.rewards.dtype == th.float32


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("rows", [4, 5, 8])
def test_real_transitions(n_envs, rows):
    """Each transition once, whatever the number of environments, and also when the buffer has wrapped around."""
    buffer = real_buffer(5 * n_envs, n_envs, rows=rows)
    obs, actions, next_obs, rewards, terminated = real_transitions(buffer)
    expected = sorted(1_000 + 10 * i + e for i in range(max(0, rows - 5), rows) for e in range(n_envs))
    assert sorted(obs[:, 0].int().tolist()) == expected and n_transitions(buffer) == len(expected)
    assert th.equal(next_obs, obs + 0.5) and th.equal(actions, obs[:, :1].repeat(1, 3)) and th.equal(rewards, -obs[:, 0])
    assert obs.shape[1] == 2 and not terminated.any()
    assert {column.dtype for column in (obs, actions, next_obs, rewards)} == {th.float32}


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 3),
    st.lists(st.one_of(st.integers(0, 12), st.just("another buffer"), st.just("more, unseen")), max_size=10),
)
def test_resident_transitions_are_those_of_the_buffer(n_envs, operations):
    """However many rows were added since last time, and also when the buffer was replaced."""
    buffer, resident, number, steps = real_buffer(5 * n_envs, n_envs, rows=2), ResidentTransitions(), 0, 0
    for operation in operations:
        if operation == "another buffer":
            buffer, steps = real_buffer(5 * n_envs, n_envs, rows=number % 7), steps
        else:
            for _ in range(7 if operation == "more, unseen" else operation):
                number += 1
                obs = np.full((n_envs, 2, 1), number) + np.arange(n_envs)[:, None, None] / 8
                done, info = np.full(n_envs, number % 3 == 0), [{"TimeLimit.truncated": number % 2 == 0}] * n_envs
                buffer.add(obs, obs + 0.5, np.full((n_envs, 3), number), np.full(n_envs, number), done, info)
                steps += n_envs
        if operation != "more, unseen":
            found = resident.update(buffer, steps)
            for column, expected in zip(found, real_transitions(buffer), strict=True):
                assert th.equal(column, expected) and column.dtype == expected.dtype
            steps = 0


def test_only_new_transitions_are_copied(monkeypatch):
    copied = []
    original = buffers.real_transitions
    monkeypatch.setattr(buffers, "real_transitions", lambda b, d, rows: copied.append(len(rows)) or original(b, d, rows))
    buffer, resident = real_buffer(100, rows=50), ResidentTransitions()
    resident.update(buffer, 50)
    row = np.zeros((1, 2, 1))
    for _ in range(3):
        buffer.add(row, row, np.zeros((1, 3)), np.zeros(1), np.zeros(1), [{}])
    resident.update(buffer, 3)
    resident.update(buffer, 0)
    assert copied == [50, 3, 0]


def test_what_is_resident_survives_growth():
    """With room for 100 rows at first; old memory is overwritten so that it cannot be right by chance."""
    buffer, resident = real_buffer(10_000, rows=50), ResidentTransitions()
    resident.update(buffer, 50)
    for _ in range(3):
        n = buffer.size()
        for i in range(n):
            obs = np.full((1, 2, 1), float(i))
            buffer.add(obs, obs + 0.5, np.zeros((1, 3)), np.full(1, -float(i)), np.zeros(1), [{}])
        waste = [th.full((rows, width), -7.0) for rows in (2 * n, 4 * n) for width in (1, 2, 3) for _ in range(5)]
        del waste
        for column, expected in zip(resident.update(buffer, n), real_transitions(buffer), strict=True):
            assert th.equal(column, expected)


def test_timeouts_are_valid_and_not_terminal():
    buffer = ReplayBuffer(10, OBS_SPACE, ACTION_SPACE)
    zeros, row = np.zeros((1, 3)), np.zeros((1, 2, 1))
    for done, truncated in [(False, False), (True, False), (True, True)]:
        buffer.add(row, row, zeros, np.zeros(1), np.array([done]), [{"TimeLimit.truncated": truncated}])
    assert real_transitions(buffer).terminated.tolist() == [False, True, False]


@pytest.mark.parametrize("rows, expected", [(3, [0, 2]), (4, [0, 2]), (5, [2, 4]), (6, [2, 4]), (7, [4, 6])])
def test_memory_efficient_buffer_leaves_out_what_it_lost(rows, expected):
    """
    Every second transition ends an episode: there, the buffer holds the next episode's first observation. Once it is
    full, the newest successor takes the place of the oldest observation.
    """
    buffer = ReplayBuffer(5, OBS_SPACE, ACTION_SPACE, optimize_memory_usage=True, handle_timeout_termination=False)
    for i in range(rows):
        obs = np.full((1, 2, 1), float(i))
        done = i % 2 == 1
        buffer.add(obs, obs + 1, np.full((1, 3), float(i)), np.array([float(i)]), np.array([done]), [{}])
    found = real_transitions(buffer)
    assert sorted(found.rewards.int().tolist()) == expected
    assert th.equal(found.next_obs, found.obs + 1) and th.equal(found.rewards, found.obs[:, 0])


@pytest.mark.parametrize("optimize_memory_usage", [False, True])
@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3), st.integers(2, 12), st.lists(st.integers(0, 8), max_size=25), st.integers(0, 2**31))
def test_beginnings_of_episodes(optimize_memory_usage, n_envs, capacity, ends, seed):
    """Environments with episodes of their own; from time to time all of them are reset in the midst of one."""
    kwargs = dict(optimize_memory_usage=optimize_memory_usage, handle_timeout_termination=not optimize_memory_usage)
    buffer = ReplayBuffer(capacity * n_envs, OBS_SPACE, ACTION_SPACE, n_envs=n_envs, **kwargs)
    rng, starts, count = np.random.default_rng(seed), np.ones(n_envs, bool), 0
    state, is_first = rng.normal(size=n_envs), {}
    for end in ends:
        if end == 8:
            # With `optimize_memory_usage` this leaves no trace
            state, starts = rng.normal(size=n_envs), starts | (not optimize_memory_usage)
            continue
        # The numbers of the environments whose episode ends, in bits
        done, next_state = np.array([end >> env & 1 for env in range(n_envs)], bool), rng.normal(size=n_envs)
        rows = [np.tile(each[:, None, None], (1, 2, 1)) for each in (state, next_state)]
        rewards = count * n_envs + np.arange(n_envs)
        info = [{"TimeLimit.truncated": count % 2 == 0}] * n_envs
        buffer.add(*rows, np.zeros((n_envs, 3)), rewards, done, info)
        is_first.update(zip(rewards.tolist(), starts.tolist(), strict=True))
        state, starts, count = np.where(done, rng.normal(size=n_envs), next_state), done, count + 1
    if count == 0:
        return
    if count >= capacity:
        is_first.update(dict.fromkeys(range((count - capacity) * n_envs, (count - capacity + 1) * n_envs), False))
    found = begins_episode(buffer)
    assert found.tolist() == [is_first[int(reward)] for reward in real_transitions(buffer).rewards]
