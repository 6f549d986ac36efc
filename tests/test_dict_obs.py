"""Dict observations, and goal-conditioned tasks with hindsight experience replay."""

import warnings
from contextlib import nullcontext

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mbpo import MBPO, MultiInputPolicy
from sb3_mbpo.common import buffers
from sb3_mbpo.common.spaces import dim_names, flat_dim, flatten, unflatten
from sb3_mbpo.common.update import not_covered, run_updates
from tests.agents import SMALL
from tests.envs import GoalEnv
from tests.test_update import BATCH_SIZE, assert_equal, sb3_updates, state_of

HER = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs={"n_sampled_goal": 4})
# Where the parts lie in a flat observation
ACHIEVED, DESIRED, OBSERVATION = slice(0, 2), slice(2, 4), slice(4, 7)


def make_agent(env=None, **kwargs):
    return MBPO("MultiInputPolicy", env or GoalEnv(), **{**SMALL, **kwargs})


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 5))
def test_flatten_and_back(shapes, n):
    space = spaces.Dict({f"part{i}": spaces.Box(-1, 1, tuple(shape)) for i, shape in enumerate(shapes)})
    rng = np.random.default_rng(0)
    observation = {name: rng.normal(size=(n, *part.shape)) for name, part in space.items()}
    flat = flatten(observation)
    assert flat.shape == (n, flat_dim(space))
    for back in (unflatten(space, flat), unflatten(space, th.as_tensor(flat))):
        assert list(back) == list(observation)
        assert all(np.array_equal(back[name], observation[name]) for name in observation)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (5,)),
        spaces.Box(-1, 1, (2, 3)),
        spaces.Dict({"b": spaces.Box(-1, 1, (2, 2)), "a": spaces.Box(-1, 1, (1,)), "bits": spaces.MultiBinary(3)}),
    ],
)
def test_names_of_dimensions_find_them(space):
    """As Python, they are the numbers of the flat observation."""
    obs = space.sample()
    values = [eval(name, {"obs": obs}) for name in dim_names(space)]
    np.testing.assert_array_equal(values, flatten(obs, batch_dims=0))


def test_without_hindsight():
    agent = make_agent(rollout_schedule=[0, 0, 3, 3]).learn(130)
    assert isinstance(agent.policy, MultiInputPolicy) and type(agent.replay_buffer) is DictReplayBuffer
    assert agent.dynamics.weights[0].shape[1] == 7 + 2
    # Rollouts begin in real states
    real = agent.replay_buffer
    start = agent.model_buffer.observations[:100]
    for part, name in ((ACHIEVED, "achieved_goal"), (DESIRED, "desired_goal"), (OBSERVATION, "observation")):
        values = th.as_tensor(real.observations[name][:61, 0].reshape(61, -1), dtype=th.float32)
        assert (start[:, None, part] == values).all(dim=2).any(dim=1).all()
    batch = agent.mixed_buffer.sample(64)
    assert {name: tuple(tensor.shape) for name, tensor in batch.observations.items()} == {
        "achieved_goal": (64, 2),
        "desired_goal": (64, 2),
        "observation": (64, 3, 1),
    }
    assert batch.rewards.shape == (64, 1) and agent.mixed_buffer.sample_batches(3, 8).rewards.shape == (3, 8, 1)


def test_real_transitions_stay_resident():
    agent = make_agent(make_vec_env(GoalEnv, n_envs=2, seed=0), buffer_size=100, gradient_steps=0)
    resident = buffers.ResidentTransitions()
    for _ in range(8):
        before = agent.lifetime_timesteps
        agent.learn(34)
        columns = resident.update(agent.replay_buffer, agent.lifetime_timesteps - before)
        for column, expected in zip(columns, buffers.real_transitions(agent.replay_buffer), strict=True):
            assert th.equal(column, expected)


@pytest.mark.parametrize("vec_env_cls, n_envs", [(DummyVecEnv, 1), (DummyVecEnv, 3), (SubprocVecEnv, 2)])
def test_goals_in_rollouts(vec_env_cls, n_envs):
    """Of the start states, four in five have a goal that was achieved; it stays; rewards are the environment's own for it."""
    env = make_vec_env(GoalEnv, n_envs=n_envs, seed=0, vec_env_cls=vec_env_cls)
    agent = make_agent(env, rollout_batch_size=2_000, rollout_schedule=[0, 0, 3, 3], learning_starts=120, **HER)
    agent.learn(121 if n_envs < 3 else 123)
    buffer, real = agent.model_buffer, agent.replay_buffer
    obs, next_obs = (column[: buffer.size()] for column in (buffer.observations, buffer.next_observations))
    assert buffer.size() == 6_000 and th.equal(obs[:, DESIRED], next_obs[:, DESIRED])
    original, achieved = (
        th.as_tensor(array[: real.size()].reshape(-1, 2), dtype=th.float32)
        for array in (real.observations["desired_goal"], real.next_observations["achieved_goal"])
    )
    start = obs[:2_000, None, DESIRED]
    is_original = (start == original).all(dim=2).any(dim=1)
    is_achieved = (start == achieved).all(dim=2).any(dim=1)
    assert (is_original ^ is_achieved).all() and 0.7 < is_achieved.float().mean() < 0.9
    # The state is real and the goal one of its own episode
    assert th.allclose(obs[:2_000, ACHIEVED], obs[:2_000, 4:6])
    expected = GoalEnv().compute_reward(next_obs[:, ACHIEVED].numpy(), next_obs[:, DESIRED].numpy(), [{}])
    assert np.array_equal(buffer.rewards[:6_000, 0], expected) and 0 < np.mean(expected == 0) < 1
    env.close()


def test_relabelled_goals_are_of_the_future_of_the_episode():
    agent = make_agent(GoalEnv(episode_length=7), gradient_steps=0, **HER).learn(61)
    real = buffers.real_transitions(agent.replay_buffer)
    relabelled = buffers.relabelled(real, agent.replay_buffer)
    changed = (real.obs[:, DESIRED] != relabelled.obs[:, DESIRED]).any(dim=1)
    # 61 = 8 * 7 + 5: the last episode is not over
    assert 30 < changed.sum() <= 56 and not changed[56:].any()
    for row in changed.nonzero().flatten().tolist():
        future = real.next_obs[row : 7 * (row // 7) + 7, ACHIEVED]
        assert (relabelled.obs[row, DESIRED] == future).all(dim=1).any()
    assert th.equal(relabelled.obs[:, DESIRED], relabelled.next_obs[:, DESIRED])
    reached = GoalEnv().compute_reward(real.next_obs[:, ACHIEVED].numpy(), relabelled.obs[:, DESIRED].numpy(), [{}])
    assert np.array_equal(relabelled.rewards, reached)
    for dims in (ACHIEVED, OBSERVATION):
        assert th.equal(relabelled.obs[:, dims], real.obs[:, dims])
    assert th.equal(relabelled.actions, real.actions) and th.equal(relabelled.terminated, real.terminated)
    assert relabelled.obs[0].dtype == th.float64 and not th.equal(
        buffers.relabelled(real, agent.replay_buffer).obs, relabelled.obs
    )


def test_rewards_out_of_info_are_predicted():
    """Nobody knows `info` in a model rollout, so the environment's `compute_reward` cannot be asked."""
    kwargs = dict(HER, replay_buffer_kwargs={"copy_info_dict": True})
    agent = make_agent(GoalEnv(needs_info=True), gradient_steps=0, learning_starts=100, **kwargs).learn(101)
    rewards = agent.model_buffer.rewards[: agent.model_buffer.size()]
    assert len(rewards.unique()) > 50
    agent.mixed_buffer.sample(32)


def test_users_functions_get_dictionaries():
    seen = {}

    def termination_fn(obs, action, next_obs):
        seen["termination"] = obs, action, next_obs
        return np.linalg.norm(next_obs["achieved_goal"] - next_obs["desired_goal"], axis=1) < 0.2

    def reward_fn(obs, action, next_obs):
        seen["reward"] = obs, action, next_obs
        return -action[:, 0].astype(np.float64)

    agent = make_agent(GoalEnv(terminate=True), termination_fn=termination_fn, reward_fn=reward_fn, **HER).learn(61)
    for obs, action, next_obs in seen.values():
        assert list(obs) == list(next_obs) == ["achieved_goal", "desired_goal", "observation"]
        assert obs["observation"].shape == (100, 3, 1) and action.shape == (100, 2)
    buffer = agent.model_buffer
    assert th.allclose(buffer.rewards[:100, 0], -buffer.actions[:100, 0], atol=1e-5)
    assert agent.logger.name_to_value["model/termination_mismatch"] == 0


def test_function_that_fails_names_the_transition():
    with pytest.raises(
        ValueError, match=r"`reward_fn` raised KeyError\('speed'\).*'desired_goal': \(\d, 2\).*first transition"
    ):
        make_agent(reward_fn=lambda obs, action, next_obs: obs["speed"])


def test_termination_is_learned_on_the_goals_that_were_pursued():
    """Relabelled, many of the transitions would be at their goal without having ended."""
    agent = make_agent(GoalEnv(terminate=True, episode_length=40), learning_starts=3_000, gradient_steps=0, **HER).learn(3_001)
    real = buffers.real_transitions(agent.replay_buffer)
    assert real.terminated.sum() > 10
    mismatch = agent.termination_classifier.predict(real.next_obs) != real.terminated
    assert mismatch.float().mean() < 0.5 * real.terminated.float().mean()


@pytest.mark.parametrize("kwargs", [{}, HER], ids=["dict", "her"])
def test_vec_normalize(kwargs):
    """The model in raw units, the policy in normalised ones."""
    env = VecNormalize(make_vec_env(GoalEnv, seed=0))
    agent = make_agent(env, rollout_batch_size=500, **kwargs)
    seen = []
    agent.actor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with warnings.catch_warnings():
        # A goal is rounded at the end of an episode only
        warnings.simplefilter("error", UserWarning)
        agent.learn(61)
    raw = agent.model_buffer.observations[:500]
    given = next(obs for obs in seen if len(obs["achieved_goal"]) == 500)
    for part, name in ((ACHIEVED, "achieved_goal"), (DESIRED, "desired_goal")):
        expected = (raw[:, part].numpy() - env.obs_rms[name].mean) / np.sqrt(env.obs_rms[name].var + env.epsilon)
        np.testing.assert_allclose(given[name], expected, atol=0.1)
    batch = agent.mixed_buffer.sample(100, env=env)
    assert batch.observations["achieved_goal"].dtype == th.float32 and len(batch.rewards) == 100


@pytest.mark.parametrize("n", [1, 2, 12])
def test_real_share_of_a_batch_is_relabelled(n):
    """Also of a batch with one real transition."""
    agent = make_agent(real_ratio=0.1, batch_size=10 * n, gradient_steps=0, **HER).learn(100)
    original = {tuple(goal) for goal in agent.replay_buffer.observations["desired_goal"][:100, 0]}
    samples = [agent.mixed_buffer.sample(10 * n) for _ in range(300)]
    goals = np.concatenate([sample.observations["desired_goal"][:n] for sample in samples])
    batches = agent.mixed_buffer.sample_batches(300, 10 * n).observations["desired_goal"][:, :n].reshape(-1, 2)
    for each in (goals, batches.numpy()):
        known = {tuple(np.float32(goal)) for goal in original}
        share = np.mean([tuple(goal) not in known for goal in np.float32(each)])
        assert share == pytest.approx(0.8, abs=5 * np.sqrt(0.16 / (300 * n)) + 0.02)


@pytest.mark.parametrize("kwargs", [{}, HER], ids=["dict", "her"])
def test_goes_on_after_loading(kwargs, tmp_path):
    agent = make_agent(**kwargs).learn(133)
    agent.save(tmp_path / "agent.zip")
    agent.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = MBPO.load(tmp_path / "agent.zip", env=GoalEnv())
    # The file was written in the middle of an episode
    with pytest.warns(UserWarning, match="truncated") if kwargs else nullcontext():
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == 193 and loaded.dynamics.n_fits == agent.dynamics.n_fits + 1
    if kwargs:
        obs = loaded.model_buffer
        assert th.equal(obs.observations[:100, DESIRED], obs.next_observations[:100, DESIRED])


def make_sac():
    agent = SAC("MultiInputPolicy", GoalEnv(), policy_kwargs={"net_arch": [16]}, seed=0, device="cpu", buffer_size=10)
    agent.set_logger(configure(None, []))
    return agent


def test_updates_are_sacs():
    """The function of tensors that is compiled, on flat observations, against ``SAC.train`` on dictionaries."""
    rng = np.random.default_rng(0)

    def gauss(*shape):
        return th.as_tensor(rng.normal(size=(5, BATCH_SIZE, *shape)), dtype=th.float32)

    def observations():
        return {"achieved_goal": gauss(2), "desired_goal": gauss(2), "observation": gauss(3, 1)}

    samples = DictReplayBufferSamples(observations(), gauss(2).tanh(), observations(), (gauss(1) > 1).float(), 3 * gauss(1))
    noise = th.stack([gauss(2), gauss(2)])
    ours, theirs = make_sac(), make_sac()
    assert not_covered(ours) is None
    run_updates(ours, samples, noise)
    sb3_updates(theirs, samples, noise)
    assert_equal(state_of(ours), state_of(theirs))


def test_an_extractor_that_learns_is_not_compiled():
    """With `normalize_images=False` SB3 takes any box of three dimensions for an image."""
    env = PartsEnv(a=spaces.Box(-1, 1, (3, 36, 36)), b=spaces.Box(-1, 1, (2,)))
    agent = SAC("MultiInputPolicy", env, policy_kwargs={"normalize_images": False}, buffer_size=10)
    assert "CombinedExtractor" in not_covered(agent)


class PartsEnv(gym.Env):
    def __init__(self, **parts):
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)


@pytest.mark.parametrize(
    "part",
    [
        spaces.Box(0, 255, (8, 8, 3), np.uint8),
        spaces.Box(0, 9, (2,), np.int64),
        spaces.Box(-1, 1, ()),
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.Dict(inner=spaces.Box(-1, 1, (2,))),
        spaces.Tuple([spaces.Box(-1, 1, (2,))]),
    ],
    ids=str,
)
def test_parts_that_are_refused(part):
    with pytest.raises(ValueError, match="observation space") as error:
        MBPO("MultiInputPolicy", PartsEnv(good=spaces.Box(-1, 1, (2,)), bad=part))
    message = str(error.value)
    assert f"part 'bad' is {part}" in message and "FilterObservation" in message
    assert isinstance(error.value, AssertionError)


def test_the_advice_is_good():
    env = PartsEnv(good=spaces.Box(-1, 1, (2,)), bad=spaces.Discrete(3))
    MBPO("MultiInputPolicy", gym.wrappers.FilterObservation(env, ["good"]), buffer_size=10)


@pytest.mark.parametrize("copy_info_dict", [True, False])
def test_bits_stay_bits(copy_info_dict):
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=True), n_envs=2, seed=0)
    kwargs = dict(HER, replay_buffer_kwargs={"copy_info_dict": copy_info_dict})
    agent = make_agent(env, rollout_schedule=[0, 0, 2, 2], **kwargs).learn(130)
    buffer = agent.model_buffer
    for column in (buffer.observations, buffer.next_observations):
        assert set(column[: buffer.size()].unique().tolist()) == {0, 1}
    evaluate_policy(agent, Monitor(BitFlippingEnv(n_bits=3, continuous=True)), n_eval_episodes=2)


@pytest.mark.parametrize("where", ["achieved_goal", "observation"])
def test_non_finite_parts(where):
    class Faulty(GoalEnv):
        def step(self, action):
            obs, *others = super().step(action)
            if self.steps == 7:
                obs[where][1] = np.nan
            return obs, *others

    with pytest.raises(ValueError, match="Observations must be finite numbers, but at step 7"):
        make_agent(Faulty()).learn(100)
    agent = make_agent().learn(30)
    agent.replay_buffer.next_observations[where][5, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"The next_observations of `replay_buffer` must be finite.* row 5"):
        agent.learn(30)


@pytest.mark.slow
def test_learns_to_reach_goals():
    """A reward of -1 at each step that is not at the goal: nothing to learn from without hindsight."""
    agent = make_agent(
        GoalEnv(episode_length=20),
        learning_starts=200,
        gradient_steps=5,
        batch_size=128,
        learning_rate=1e-3,
        gamma=0.95,
        policy_kwargs={"net_arch": [64, 64]},
        model_hidden_sizes=[64, 64],
        rollout_batch_size=2_000,
        model_train_freq=100,
        **HER,
    )
    env = Monitor(GoalEnv(episode_length=20))
    before = evaluate_policy(agent, env, n_eval_episodes=30)[0]
    agent.learn(1_500)
    after = evaluate_policy(agent, env, n_eval_episodes=30)[0]
    # On average about 4 steps away
    assert before < -15 and after > -7, (before, after)


def test_goals_are_needed_for_hindsight():
    env = gym.wrappers.FilterObservation(GoalEnv(), ["observation"])
    with pytest.raises(ValueError, match=r"`HerReplayBuffer`.*'desired_goal'.*'observation'"):
        make_agent(env, **HER)
    with pytest.raises(ValueError, match=r"`HerReplayBuffer` needs Dict observations"):
        MBPO("MlpPolicy", "Pendulum-v1", **HER)


def test_waits_for_the_end_of_an_episode_after_loading(tmp_path):
    """Without its replay buffer there is none, and the warm-up, of which SB3 says that it should be longer, is long over."""
    env = GoalEnv(episode_length=60)
    agent = make_agent(env, learning_starts=70, **HER).learn(80)
    agent.save(tmp_path / "agent.zip")
    loaded = MBPO.load(tmp_path / "agent.zip", env=env)
    loaded.learn(59)
    assert loaded._n_updates == agent._n_updates
    loaded.learn(61)
    assert loaded._n_updates > agent._n_updates and loaded.model_buffer.size() > 0


class BitsEnv(BitFlippingEnv):
    """With a reward that only bits have, in a column."""

    def compute_reward(self, achieved_goal, desired_goal, info):
        if achieved_goal.ndim == 1:
            return super().compute_reward(achieved_goal, desired_goal, info)
        return -np.bitwise_xor(achieved_goal, desired_goal).any(axis=1, keepdims=True).astype(float)


def test_functions_of_bits_get_bits():
    def termination_fn(obs, action, next_obs):
        return (next_obs["achieved_goal"][:, 0] & next_obs["achieved_goal"][:, 1]) > 1

    with pytest.warns(UserWarning, match="disagrees"):
        agent = make_agent(BitsEnv(n_bits=3, continuous=True), termination_fn=termination_fn, **HER).learn(70)
    assert set(agent.model_buffer.rewards[: agent.model_buffer.size()].unique().tolist()) <= {-1, 0}


def test_rewards_of_goals_are_checked():
    class Faulty(GoalEnv):
        def compute_reward(self, achieved_goal, desired_goal, info):
            rewards = super().compute_reward(achieved_goal, desired_goal, info)
            # In model rollouts, of which there are 100
            return rewards if np.shape(rewards) != (100,) else np.full(100, np.nan)

    with pytest.raises(ValueError, match=r"`compute_reward` of the environment must return 100 finite numbers"):
        make_agent(Faulty(), **HER).learn(70)


def test_rewards_of_relabelled_goals_are_checked():
    class Env(GoalEnv):
        def compute_reward(self, achieved_goal, desired_goal, info):
            rewards = super().compute_reward(achieved_goal, desired_goal, info)
            return np.full_like(rewards, np.nan) if np.ndim(rewards) > 0 else rewards

    with pytest.raises(
        ValueError, match=r"`compute_reward` of the environment must return finite numbers.*another goal of tr"
    ):
        make_agent(Env(), gradient_steps=0, **HER).learn(100)
