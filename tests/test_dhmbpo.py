"""DHMBPO as a user meets it: blocks, states, policy, what users of SAC do."""

import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.common.compilation import planned_steps
from sb3_mbpo.common.update import networks_state
from sb3_mbpo.dhmbpo.buffers import StateBuffer
from tests.envs import CountingEnv

SMALL = dict(
    learning_starts=100,
    train_freq=50,
    gradient_steps=4,
    batch_size=16,
    buffer_size=10_000,
    policy_kwargs={"net_arch": [16, 16]},
    model_hidden_sizes=[16, 16],
    ensemble_size=3,
    num_elites=2,
    model_gradient_steps=0.05,
    training_horizon=3,
    distribution_horizon=5,
    seed=0,
    device="cpu",
    compile=False,
)


def make(env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    return DHMBPO(policy, env, **{**SMALL, **kwargs})


def parameters(agent):
    return th.cat([p.detach().flatten() for p in agent.policy.parameters()])


class Record(BaseCallback):
    """What the agent is like at each step."""

    def __init__(self, what):
        super().__init__()
        self.what, self.rows = what, []

    def _on_step(self):
        self.rows.append(self.what(self.model))
        return True


# --- Blocks ----------------------------------------------------------------------------------------------------------


def test_policy_is_frozen_for_a_block_and_learns_after_it():
    record = Record(lambda agent: (agent._n_updates, parameters(agent).sum().item()))
    agent = make()
    agent.learn(260, callback=record)
    updates = [row[0] for row in record.rows]
    # Two random blocks, as many updates for each; the policy acts from then on
    assert updates[:100] == [0] * 100 and updates[100:150] == [8] * 50
    assert updates[150:200] == [12] * 50 and updates[200:250] == [16] * 50
    sums = [row[1] for row in record.rows]
    for start, end in ((0, 100), (100, 150), (150, 200)):
        assert len(set(sums[start:end])) == 1
    assert len(set(sums[::50])) == 5


def test_random_until_learning_starts():
    class Actions(gym.ActionWrapper):
        seen = ()

        def action(self, action):
            self.seen += (action.item(),)
            return action

    env = Actions(gym.make("Pendulum-v1"))
    # A policy that would hardly move
    agent = make(env)
    with th.no_grad():
        agent.actor.mu.weight.zero_()
        agent.actor.log_std.weight.zero_()
        agent.actor.log_std.bias.fill_(-9)
    agent.learn(101)
    random, own = np.abs(env.seen[:100]), np.abs(env.seen[100:])
    assert random.mean() == pytest.approx(1.0, abs=0.15)
    assert len(own) == 50 and own.mean() < 0.5


@pytest.fixture
def updates(monkeypatch):
    """How many of each training; none is made."""
    made = []
    monkeypatch.setattr(DHMBPO, "train", lambda self, gradient_steps, batch_size: made.append(gradient_steps))
    monkeypatch.setattr(DHMBPO, "_n_updates", property(lambda self: sum(made), lambda self, value: None), raising=False)
    return made


@pytest.mark.parametrize(
    "kwargs, steps, expected",
    [
        ({"gradient_steps": -1}, 200, [100, 50, 50]),
        ({"train_freq": (1, "episode"), "gradient_steps": 3}, 600, [3, 3, 3]),
        ({"train_freq": (1, "episode"), "gradient_steps": -1}, 600, [200, 200, 200]),
        # The first three episodes at once
        ({"train_freq": (1, "episode"), "gradient_steps": 3, "learning_starts": 600}, 800, [9, 3]),
        ({"train_freq": (1, "episode"), "gradient_steps": -1, "learning_starts": 600}, 800, [600, 200]),
        ({"gradient_steps": 0}, 200, [0, 0, 0]),
        ({"learning_starts": 0}, 100, [4, 4]),
    ],
)
def test_gradient_steps(kwargs, steps, expected, updates):
    make(**kwargs).learn(steps)
    assert updates == expected


def test_episodes_count_in_the_agents_life(updates):
    agent = make(train_freq=(1, "episode"), gradient_steps=3, learning_starts=600)
    agent.learn(400)
    assert updates == []
    agent.learn(200)
    assert updates == [9]


@pytest.mark.parametrize(
    "kwargs, steps, planned",
    [
        ({}, 50, 0),
        # To the end of a block; those for the random steps, too
        ({}, 99, 8),
        ({}, 100, 8),
        ({}, 1_000, 80),
        ({"gradient_steps": -1}, 1_000, 1_000),
        ({"train_freq": (1, "episode")}, 1_000, 1_000),
    ],
)
def test_planned_updates(kwargs, steps, planned, updates):
    agent = make(**kwargs)
    assert agent.planned_updates(planned_steps(agent, steps)) == planned
    if planned in (0, 8, 80):
        agent.learn(steps)
        assert sum(updates) == planned


def test_distribution_rollouts_between_updates():
    """One for the critics' updates, and one before each 20 joint ones; each has all the states that it should."""
    agent = make(gradient_steps=45, termination_fn=lambda obs, action, next_obs: next_obs[:, 2] > 2)
    fill, made = agent.fill_model_buffer, []
    agent.fill_model_buffer = lambda *arguments: made.append((agent.critic.optimizer.state, fill(*arguments))) or made[-1][1]
    with pytest.warns(UserWarning, match="`termination_fn` disagrees"):
        agent.learn(150)
    # Twice 45 for the random blocks, then 45
    assert len(made) == (1 + 5) + (1 + 3)
    assert all(16 * 5 <= n < 2 * 16 * 5 for _, n in made)
    assert len(agent.model_buffer.states) == 10 * 16 * 5


def test_what_was_learned_on_is_renewed_with_each_block():
    agent = make()
    agent.learn(100)
    mean = agent.actor.standardise.mean.clone()
    assert len(agent.real_states) == 100
    agent.learn(50, reset_num_timesteps=False)
    assert len(agent.real_states) == 150 and (agent.actor.standardise.mean != mean).all()


def test_buffer_of_states_follows_the_arguments():
    agent = make()
    agent.learn(100)
    agent.distribution_horizon, agent.batch_size = 9, 32
    agent.learn(50, reset_num_timesteps=False)
    assert len(agent.model_buffer.states) == 10 * 32 * 9


def test_parallel_environments():
    agent = make(make_vec_env("Pendulum-v1", 3))
    record = Record(lambda agent: agent._n_updates)
    agent.learn(460, callback=record)
    # A block is 50 steps of each environment
    assert record.rows[:50] == [0] * 50 and record.rows[50:100] == [4] * 50 and record.rows[150] == 12
    assert agent.model_train_freq == 150


def test_model_is_trained_after_each_block():
    record = Record(lambda agent: agent.last_model_training)
    make().learn(210, callback=record)
    assert sorted(set(record.rows)) == [0, 100, 150, 200]


def test_critics_alone_come_first():
    """A quarter as many updates, so that Adam has made more steps with the critics than with the actor."""
    agent = make(gradient_steps=20)
    agent.learn(160)
    steps = [next(iter(each.optimizer.state.values()))["step"].item() for each in (agent.critic, agent.actor)]
    # Since the last block began
    assert steps == [25, 20]
    assert next(iter(agent.ent_coef_optimizer.state.values()))["step"].item() == 20


def test_it_says_how_long_to_wait(capsys):
    make(verbose=1).learn(150)
    lines = [line for line in capsys.readouterr().out.splitlines() if "pdates" in line]
    assert lines[0].startswith("Not compiled: gradient updates") and lines[1] == "First updates, for all steps so far: 8"
    assert lines[2].startswith("Updates at step 100: 8, ") and lines[3].startswith("Updates at step 150: 4, ")
    assert "% of the rollouts alive, bounds of the critics " in lines[2] and len(lines) == 4


def test_progress_bar_says_what_it_waits_for(monkeypatch):
    from tqdm.rich import tqdm_rich

    seen, set_description = [], tqdm_rich.set_description

    def watched(self, description="", refresh=True):
        seen.append(description)
        return set_description(self, description, refresh)

    monkeypatch.setattr(tqdm_rich, "set_description", watched)
    agent = make().learn(100, progress_bar=True)
    assert [each for each in seen if each] == ["Training the dynamics model", "Updating policy and critics"]
    assert seen[-1] == "" and agent.progress_bars == []


def test_log(tmp_path):
    agent = make("Hopper-v5", learning_starts=50)
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(160, log_interval=1)
    names = set((tmp_path / "progress.csv").read_text().splitlines()[0].split(","))
    assert {
        *("train/critic_loss", "train/actor_loss", "train/ent_coef", "train/ent_coef_loss", "train/n_updates"),
        *("train/alive", "train/q_low", "train/q_high", "train/compiled", "model/r2", "model/train_loss"),
        *("open_loop/error_1", "open_loop/error_5", "time/updates_seconds", "time/rollouts_seconds"),
    } <= names


# --- States ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(capacity=st.integers(1, 12), sizes=st.lists(st.integers(0, 20), max_size=6))
def test_state_buffer_holds_the_newest(capacity, sizes):
    buffer = StateBuffer(capacity, 1, th.device("cpu"))
    added = []
    for size in sizes:
        states = th.arange(len(added), len(added) + size, dtype=th.float32)[:, None]
        added += states.flatten().tolist()
        buffer.extend(states)
    newest = added[-capacity:]
    assert buffer.size() == len(newest)
    if newest:
        assert sorted(buffer.states[: buffer.size()].flatten().tolist()) == newest
        drawn = buffer.sample(400)
        assert drawn.shape == (400, 1) and set(drawn.flatten().tolist()) <= set(newest)
        if capacity <= 3:
            assert set(drawn.flatten().tolist()) == set(newest)


def is_dead_by_user(obs, action, next_obs):
    return next_obs[:, 0] > 3.5


@pytest.mark.parametrize("termination", ["known", "user", "learned"])
def test_distribution_rollouts_never_hold_a_dead_state(termination):
    if termination == "known":
        agent = make("Hopper-v5")
    else:
        # The observation counts to 4
        termination_fn = is_dead_by_user if termination == "user" else None
        agent = make(
            CountingEnv(episode_length=4), learning_starts=200, model_gradient_steps=1.0, termination_fn=termination_fn
        )
    agent.learn(400)
    states = agent.model_buffer.states[: agent.model_buffer.size()]
    assert len(states) > 100
    zeros = th.zeros(len(states), 1)
    assert not agent.model_env.termination(states, zeros.expand(-1, agent.action_space.shape[0]), states).any()
    if termination != "known":
        assert 2.5 < states.max() < 3.5
        # Other states would be dead, and the real ones that end an episode are no starts
        assert agent.model_env.termination(th.full_like(states, 4.0), zeros, th.full_like(states, 4.0)).all()
    else:
        healthy = (states[:, 0] > 0.7) & (states[:, 1].abs() < 0.2) & (states[:, 1:].abs() < 100).all(dim=1)
        assert healthy.all()


def test_a_rollout_that_has_ended_gives_no_more_states():
    """Where all end at once there are starts alone, drawn again and again, not the same in the place of what is missing."""
    agent = make(termination_fn=lambda obs, action, next_obs: np.ones(len(action), dtype=bool))
    with pytest.warns(UserWarning, match="`termination_fn` disagrees"):
        agent.learn(100)
    agent.model_buffer = StateBuffer(1_000, 3, agent.device)
    assert agent.fill_model_buffer(agent.model_env, agent.real_states) == 16 * 5
    states = {tuple(row) for row in agent.model_buffer.states[:80].tolist()}
    assert states <= {tuple(row) for row in agent.real_states.tolist()} and len(states) > 2 * 16


def test_distribution_rollouts_start_in_real_states():
    agent = make(distribution_horizon=1)
    agent.learn(100)
    states = agent.model_buffer.states[: agent.model_buffer.size()].numpy()
    real = {tuple(row) for row in agent.replay_buffer.observations[:100, 0]}
    # Not emptied: one before the critics' updates and one before the first of 20 joint ones, of 16 states each
    assert len(states) == 32 and {tuple(row) for row in states} <= real


def test_states_are_those_of_the_present_policy():
    """A policy that pushes one way, after the updates, has states that go that way."""
    agent = make(distribution_horizon=20)
    agent.learn(200)
    for sign in (1, -1):
        with th.no_grad():
            agent.actor.mu.weight.zero_()
            agent.actor.mu.bias.fill_(3.0 * sign)
        agent.model_buffer = StateBuffer(10_000, 3, agent.device)
        n = agent.fill_model_buffer(agent.model_env, th.tensor([[1.0, 0.0, 0.0]]))
        assert n == agent.model_buffer.size() >= 16 * 20
        velocities = agent.model_buffer.states[:n, 2].view(20, 16).mean(dim=1)
        assert sign * (velocities[3] - velocities[0]) > 0


# --- Policy ----------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_real_data():
    agent = make()
    agent.learn(100)
    real = agent.replay_buffer.observations[:100, 0].astype(np.float64)
    for network in (agent.actor, agent.critic, agent.critic_target):
        np.testing.assert_allclose(network.standardise.mean, real.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(network.standardise.std, real.std(axis=0), rtol=1e-5)
    # The target critics are in the units of the critics
    assert (agent.critic_target.bounds == agent.critic.bounds).all() and agent.critic.bounds.diff() > 0


def test_without_updates_the_policy_stays_as_it_is():
    agent = make().learn(150)
    before, agent.gradient_steps = networks_state(agent), 0
    agent.learn(200, reset_num_timesteps=False)
    th.testing.assert_close(networks_state(agent), before, rtol=0, atol=0)
    assert agent.last_model_training == 350


@pytest.mark.parametrize("exact_match", [True, False])
def test_weights_of_another_policy_are_refused(exact_match, tmp_path):
    SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16, 16]}).save(tmp_path / "sac")
    agent = make()
    before = networks_state(agent)
    with pytest.raises(ValueError, match="weights of another policy"):
        agent.set_parameters(tmp_path / "sac", exact_match=exact_match)
    th.testing.assert_close(networks_state(agent), before, rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"use_sde": True}, {"n_steps": 3}, {"target_update_interval": 5}])
def test_arguments_without_a_meaning_are_refused_at_loading(change, tmp_path):
    make().save(tmp_path / "agent")
    with pytest.raises(ValueError, match=f"`{next(iter(change))}` has no meaning in DHMBPO"):
        DHMBPO.load(tmp_path / "agent", **change)


@pytest.mark.parametrize(
    "train_freq, n_envs, warned", [(49, 1, True), (50, 1, False), (25, 2, False), ((1, "episode"), 1, False)]
)
def test_blocks_that_are_too_short_are_warned_of(train_freq, n_envs, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(make_vec_env("Pendulum-v1", n_envs), train_freq=train_freq)
    assert [str(each.message)[:15] for each in caught] == ["`train_freq=49`"] * warned


def test_all_networks_are_elites():
    assert make(ensemble_size=4, num_elites=None).num_elites == 4


def test_policy_kwargs():
    kwargs = {"net_arch": {"pi": [8], "qf": [9, 7]}, "activation_fn": th.nn.ReLU, "n_critics": 3, "dropout": 0.0}
    agent = make(policy_kwargs=kwargs)
    agent.learn(160)
    assert [layer.out_features for layer in agent.actor.latent_pi if isinstance(layer, th.nn.Linear)] == [8]
    assert [tuple(weight.shape) for weight in agent.critic.weights] == [(3, 4, 9), (3, 9, 7), (3, 7, 1)]
    assert isinstance(agent.critic.activation, th.nn.ReLU) and len(agent.critic(*agent.sample_generated(5))) == 3


def test_predict_needs_no_wrapper(tmp_path):
    agent = make()
    agent.learn(200)
    agent.save(tmp_path / "agent")
    obs = np.array([[0.1, -0.9, 2.0], [1.0, 0.0, 0.0]], np.float32)
    loaded = DHMBPO.load(tmp_path / "agent")
    actions = agent.predict(obs, deterministic=True)[0]
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], actions)
    assert (agent.critic.bounds == loaded.critic.bounds).all() and agent.critic.bounds.diff().item() > 0
    # The statistics matter
    loaded.policy.set_statistics(th.zeros(3), th.ones(3))
    assert (loaded.predict(obs, deterministic=True)[0] != actions).any()
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        assert "policy.pth" in archive.namelist()


def test_constant_observations_do_no_harm():
    class WithConstant(gym.ObservationWrapper):
        def __init__(self):
            super().__init__(gym.make("Pendulum-v1"))
            self.observation_space = spaces.Box(-10, 10, (4,), np.float32)

        def observation(self, observation):
            return np.append(observation, np.float32(7))

    agent = make(WithConstant())
    agent.learn(200)
    assert parameters(agent).isfinite().all() and agent.actor.standardise.std[3] == 0
    low, high = (agent.predict(np.array([0.5, 0.5, 1.0, last], np.float32), deterministic=True)[0] for last in (7, 1e6))
    np.testing.assert_array_equal(low, high)


# --- Everything that users of SAC do ---------------------------------------------------------------------------------


def test_compiling_draws_no_random_numbers():
    after = []
    for compile in (False, True):
        agent = make(compile=compile, gradient_steps=1, learning_starts=50).learn(50)
        assert agent.is_compiled["updates"] == compile
        after.append((agent.model_buffer.states[:16], th.rand(5)))
    # The states in which the first distribution rollout starts, and what is drawn next
    assert all((eager == compiled).all() for eager, compiled in zip(*after, strict=True))


def test_compiling_leaves_the_agent_as_it_was():
    agent = make(compile=True)
    before = networks_state(agent)
    agent.try_updates()
    after = networks_state(agent)
    th.testing.assert_close(after, before, rtol=0, atol=0)
    assert len(parameters(agent)) > 1_000 and not agent.policy.critic.optimizer.state_dict()["state"]


def test_same_seed_same_agent():
    first, second, other = (make(seed=seed).learn(200) for seed in (3, 3, 4))
    assert (parameters(first) == parameters(second)).all()
    assert (parameters(first) != parameters(other)).any()


def test_dict_observations_and_goals():
    env = BitFlippingEnv(n_bits=3, continuous=True)
    agent = make(
        *(env, "MultiInputPolicy"),
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 2, "goal_selection_strategy": "future"},
    )
    agent.learn(300)
    assert agent._n_updates > 0
    # achieved_goal, desired_goal, observation: bits, and goals stay what they were
    states = agent.model_buffer.states[: agent.model_buffer.size()]
    assert set(states.flatten().tolist()) <= {0.0, 1.0}
    assert agent.model_env.goal_dims == [3, 4, 5] and agent.model_env.reward is None
    # Rollouts start with relabelled goals: the environment's own is 1, 1, 1
    real_goals = agent.replay_buffer.observations["desired_goal"][: agent.replay_buffer.pos]
    goals = agent.real_states[:, agent.model_env.goal_dims]
    assert (real_goals == 1).all() and 0.2 < (goals == 0).any(dim=1).float().mean()
    agent.predict(agent.observation_space.sample())


def test_reward_normalisation_is_harmless():
    normalised = make(VecNormalize(make_vec_env("Pendulum-v1", 1, seed=0), norm_obs=False)).learn(200)
    plain = make(make_vec_env("Pendulum-v1", 1, seed=0)).learn(200)
    th.testing.assert_close(parameters(normalised), parameters(plain), rtol=0, atol=0)


def test_eval_callback_and_set_env():
    agent = make()
    callback = EvalCallback(gym.make("Pendulum-v1"), n_eval_episodes=1, eval_freq=100, verbose=0)
    agent.learn(200, callback=callback)
    assert np.isfinite(callback.last_mean_reward)
    before = agent.model_env
    agent.set_env(gym.make("Pendulum-v1", g=5.0))
    # Also without a new block
    agent.train(1)
    assert agent.model_env is not before and agent.model_env.env is agent.env
    agent.learn(100, reset_num_timesteps=False)
    assert agent.num_timesteps == 300 and agent.model_env.env is agent.env


def test_environment_that_is_set_decides_on_terminations():
    agent = make("Hopper-v5").learn(100)
    states = th.tensor([[1.2, *[0.0] * 10]])
    assert not agent.model_env.termination(states, th.zeros(1, 3), states)
    agent.set_env(gym.make("Hopper-v5", healthy_z_range=(1.3, 2.0)))
    agent.learn(50, reset_num_timesteps=False)
    assert agent.model_env.termination(states, th.zeros(1, 3), states)


def test_exact_resume(tmp_path):
    agent = make()
    agent.learn(200)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer")
    weights = []
    for _ in range(2):
        loaded = DHMBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
        loaded.load_replay_buffer(tmp_path / "buffer")
        assert loaded._n_updates == agent._n_updates and loaded.replay_buffer.size() == 200
        assert loaded.log_ent_coef == agent.log_ent_coef
        for own, saved in ((loaded.policy, agent.policy), (loaded.dynamics, agent.dynamics)):
            assert all((tensor == saved.state_dict()[name]).all() for name, tensor in own.state_dict().items())
        loaded.set_random_seed(5)
        loaded.learn(100, reset_num_timesteps=False)
        # Neither random steps nor the updates for them again
        assert loaded._n_updates == agent._n_updates + 8
        weights.append(parameters(loaded))
    assert (weights[0] == weights[1]).all() and (weights[0] != parameters(agent)).any()


def test_goes_on_without_the_replay_buffer(tmp_path):
    make().learn(200).save(tmp_path / "agent")
    loaded = DHMBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    n_updates, weights = loaded._n_updates, loaded.dynamics.weights[0].clone()
    # Too few transitions would spoil the loaded model, but not the policy's updates
    loaded.learn(50)
    assert loaded._n_updates == n_updates + 4 and (loaded.dynamics.weights[0] == weights).all()
    # Starts are all that there is
    assert len(loaded.real_states) == 50
    loaded.learn(100)
    assert (loaded.dynamics.weights[0] != weights).any()


def test_zip_of_another_algorithm_is_refused(tmp_path):
    make().save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"was saved by DHMBPO, not by MBPO: `DHMBPO.load` loads it"):
        MBPO.load(tmp_path / "agent")


def test_users_termination_function_is_the_known_one():
    """Asked outside of the graph, in the same rollouts: the same agent, bit for bit."""

    def never(obs, action, next_obs):
        return np.zeros(len(action), dtype=bool)

    th.testing.assert_close(parameters(make().learn(200)), parameters(make(termination_fn=never).learn(200)), rtol=0, atol=0)


def pendulum_reward(obs, action, next_obs):
    angle = th.atan2(obs[:, 1], obs[:, 0])
    return -(angle.square() + 0.1 * obs[:, 2].square() + 0.001 * action[:, 0].square())


def test_reward_fn():
    record = Record(lambda agent: agent.logger.name_to_value.get("model/reward_mismatch"))
    make(reward_fn=pendulum_reward).learn(150, callback=record)
    assert record.rows[-1] == 0


def test_reward_fn_gets_actions_in_the_environments_units():
    seen = []

    def effort(obs, action, next_obs):
        seen.append(action.detach().abs().max().item())
        return -action[:, 0].square()

    with pytest.warns(UserWarning, match="`reward_fn` disagrees"):
        make(reward_fn=effort).learn(150)
    # From -2 to 2
    assert 1.8 < max(seen) <= 2


def test_reward_fn_gets_float32_whatever_the_spaces_are():
    class InFloat64(gym.Wrapper):
        def __init__(self):
            super().__init__(gym.make("Pendulum-v1"))
            self.observation_space = spaces.Box(-10, 10, (3,), np.float64)
            self.action_space = spaces.Box(-2, 2, (1,), np.float64)

    seen = set()

    def reward(obs, action, next_obs):
        seen.add((obs.dtype, action.dtype, next_obs.dtype))
        # A constant of NumPy makes the result float64
        return pendulum_reward(obs, action, next_obs) * th.as_tensor(np.ones(len(action)))

    agent = make(InFloat64(), reward_fn=reward).learn(100)
    assert seen == {(th.float32,) * 3} and agent._n_updates == 8


def test_reward_fn_of_dict_observations_gets_dictionaries():
    seen = []

    def reward(obs, action, next_obs):
        seen.append({name: tuple(part.shape) for name, part in obs.items()})
        return -(next_obs["observation"] - next_obs["desired_goal"]).abs().sum(dim=1)

    make(BitFlippingEnv(n_bits=3, continuous=True), "MultiInputPolicy", reward_fn=reward).learn(100)
    assert seen[-1] == {"achieved_goal": (16, 3), "desired_goal": (16, 3), "observation": (16, 3)}
