"""The paper's ablations (its Figure 3), each one argument away. Value expansion has a file of its own."""

import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo import MBPO
from tests.agents import make_agent
from tests.envs import CountingEnv, GoalEnv, PointEnv


@pytest.mark.parametrize("k", [1, 5, 15, 200, 500])
def test_rollouts_of_a_fixed_length(k):
    """Room for the rollouts of 1,000 steps; nothing else grows with k."""
    agent = make_agent(PointEnv(), rollout_schedule=[0, 0, k, k], rollout_batch_size=10).learn(130, log_interval=None)
    buffer, length = agent.model_buffer, agent.logger.name_to_value["model/rollout_length_mean"]
    assert agent.logger.name_to_value["model/rollout_length"] == k and 1 <= length <= k
    # Two generations of rollouts, which end where |x| > 4, or go all the way
    assert buffer.buffer_size == len(buffer.rewards) == 20 * 10 * k and 20 <= buffer.size() <= 20 * k
    assert all(th.isfinite(tensor).all() for tensor in agent.policy.state_dict().values())


def test_the_longest_rollouts_of_nothing_that_ends():
    """500 steps one after the other, each from where the last one led."""
    agent = make_agent(
        "Pendulum-v1", rollout_schedule=[0, 0, 500, 500], rollout_batch_size=3, model_gradient_steps=0.5, gradient_steps=1
    ).learn(62)
    buffer = agent.model_buffer
    assert buffer.size() == 1_500 and buffer.buffer_size == 20 * 1_500
    assert th.equal(buffer.observations[3:1_500], buffer.next_observations[:1_497])
    assert all(th.isfinite(tensor).all() for tensor in agent.policy.state_dict().values())


@pytest.mark.parametrize("n_envs, buffer_size", [(1, 1_000), (3, 1_000), (1, 45)])
def test_rollouts_from_the_initial_state_distribution(n_envs, buffer_size):
    """Episodes of ten steps, whose observation counts them."""
    env = make_vec_env(lambda: CountingEnv(episode_length=10, truncate=True), n_envs=n_envs)
    agent = make_agent(env, buffer_size=buffer_size, rollout_start="initial", rollout_schedule=[0, 0, 2, 2]).learn(120)
    start, second = agent.model_buffer.observations[:100], agent.model_buffer.observations[100:200]
    assert (start == 0).all() and th.equal(second, agent.model_buffer.next_observations[:100])
    assert agent.logger.name_to_value["train/n_updates"] > 0


def test_all_beginnings_are_equally_likely():
    agent = make_agent(PointEnv(), rollout_start="initial", rollout_batch_size=3_000, gradient_steps=0).learn(110)
    real = agent.replay_buffer
    # Those that were found are those before which an episode ended
    expected = {0.0: 0, **{float(real.observations[i, 0, 0]): 0 for i in range(61) if i == 0 or real.dones[i - 1, 0]}}
    del expected[0.0]
    starts, counts = agent.model_buffer.observations[:3_000].unique(return_counts=True)
    assert set(starts.tolist()) == set(expected) and 3 <= len(expected) < 20
    n = len(expected)
    assert (counts - 3_000 / n).abs().max() < 5 * np.sqrt(3_000 / n)


def test_beginnings_after_a_second_learn_and_after_loading(tmp_path):
    """Which begin an episode, though the one before has not ended: start states count from 0."""
    agent = make_agent(CountingEnv(episode_length=1_000), rollout_start="initial").learn(70)
    assert len(agent.model_buffer.observations[:100].unique()) == 1
    agent.learn(60)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer")
    loaded = MBPO.load(tmp_path / "agent", env=CountingEnv(episode_length=1_000))
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(60)
    assert loaded.rollout_start == "initial"
    for each in (agent, loaded):
        assert each.model_buffer.size() >= 100 and (each.model_buffer.observations[: each.model_buffer.size()] == 0).all()


def test_hindsight_relabels_the_goals_of_initial_states():
    agent = make_agent(
        GoalEnv(episode_length=10),
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        rollout_start="initial",
        rollout_batch_size=500,
    ).learn(65)
    real, start = agent.replay_buffer, agent.model_buffer.observations[:500]
    rows = np.arange(0, 61, 10)
    first = real.observations["achieved_goal"][rows, 0].astype(np.float32)
    own = real.observations["desired_goal"][rows, 0].astype(np.float32)
    row = (start[:, None, :2] == th.as_tensor(first)).all(dim=2)
    assert (row.sum(dim=1) == 1).all()
    is_relabelled = (start[:, 2:4] != th.as_tensor(own)[row.int().argmax(dim=1)]).any(dim=1)
    # Four in five of the six episodes that are over
    assert 0.5 < is_relabelled.float().mean() < 0.85


def test_initial_states_are_raw_under_vec_normalize():
    env = VecNormalize(make_vec_env(PointEnv, seed=0))
    agent = make_agent(env, rollout_start="initial").learn(65)
    real = agent.replay_buffer
    first = [real.observations[i, 0, 0] for i in range(61) if i == 0 or real.dones[i - 1, 0]]
    assert np.isin(agent.model_buffer.observations[:100].numpy(), first).all()


def test_memory_efficient_buffer_knows_beginnings():
    agent = make_agent(
        rollout_start="initial",
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        learning_starts=450,
        termination_fn=lambda obs, action, next_obs: np.zeros(len(obs), dtype=bool),
        gradient_steps=0,
    ).learn(455)
    # Pendulum's episodes have 200 steps
    first = th.as_tensor(agent.replay_buffer.observations[[0, 200, 400], 0])
    start = agent.model_buffer.observations[:100]
    assert (start[:, None] == first).all(dim=2).any(dim=1).all()


def test_no_beginning_is_an_error():
    agent = make_agent(CountingEnv(episode_length=1_000), rollout_start="initial", buffer_size=50, learning_starts=55)
    with pytest.raises(ValueError, match=r"no beginning .* among the 50 .*`rollout_start='initial'`.*`buffer_size`"):
        agent.learn(60)
