"""The algorithm as a whole: what happens when, and with which data."""

import inspect
import warnings
from copy import deepcopy
from itertools import pairwise
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mbpo import MBPO, MlpPolicy
from sb3_mbpo.common import buffers, model_env
from sb3_mbpo.common.callbacks import DynamicsCallback
from sb3_mbpo.dynamics import open_loop, training
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.mbpo.callbacks import MBPOCallback
from tests.agents import SMALL, make_agent
from tests.envs import CountingEnv, PointEnv


@pytest.fixture
def events(monkeypatch):
    """Every training of the model, every model rollout's length and every call of `train`, with the step it came at."""
    events = []
    train_model, generate, train = DynamicsCallback._train_model, MBPOCallback._generate_rollouts, MBPO.train

    def watched_train_model(self, transitions):
        events.append(("model", self.model.lifetime_timesteps, len(transitions.obs)))
        train_model(self, transitions)

    def watched_generate(self, transitions):
        generate(self, transitions)
        events.append(("rollouts", self.model.lifetime_timesteps, self.model.model_buffer.buffer_size))

    def watched_train(self, gradient_steps, batch_size=64):
        events.append(("updates", self.lifetime_timesteps, gradient_steps))
        train(self, gradient_steps, batch_size)

    monkeypatch.setattr(DynamicsCallback, "_train_model", watched_train_model)
    monkeypatch.setattr(MBPOCallback, "_generate_rollouts", watched_generate)
    monkeypatch.setattr(MBPO, "train", watched_train)
    return events


def steps(events, what):
    return [step for kind, step, _ in events if kind == what]


def test_constructor_is_sacs_with_mbpos_own_arguments_after():
    ours, sacs = list(inspect.signature(MBPO.__init__).parameters), list(inspect.signature(SAC.__init__).parameters)
    assert ours[: len(sacs)] == sacs
    own = ours[len(sacs) :]
    assert set(own) == {
        *("ensemble_size", "num_elites", "model_hidden_sizes", "model_learning_rate", "model_train_freq", "real_ratio"),
        *("rollout_batch_size", "rollout_schedule", "model_retain_epochs", "termination_fn", "reward_fn"),
        *("model_gradient_steps", "compile", "rollout_start", "value_expansion_horizon"),
    }
    agent = MBPO("MlpPolicy", "Pendulum-v1", buffer_size=100)
    for name in own:
        assert getattr(agent, name) == inspect.signature(MBPO.__init__).parameters[name].default
    assert isinstance(agent.policy, MlpPolicy) and isinstance(agent, SAC)
    # The paper's values
    assert (agent.ensemble_size, agent.num_elites, agent.real_ratio, agent.model_train_freq) == (7, 5, 0.05, 250)
    assert (agent.rollout_batch_size, agent.model_learning_rate, agent.learning_starts) == (100_000, 2e-3, 5_000)
    assert list(agent.model_hidden_sizes) == [200] * 4 and agent.model_buffer.buffer_size == 400_000
    assert inspect.signature(MBPO.learn).parameters["total_timesteps"].default > 0


def test_order_of_events(events):
    agent = make_agent(gradient_steps=3).learn(200)
    # Warm-up first, then the model before the first update
    assert events[:4] == [("model", 61, 61), ("rollouts", 61, 2_000), ("updates", 61, 3), ("updates", 62, 3)]
    assert steps(events, "model") == steps(events, "rollouts") == [61, 111, 161]
    assert steps(events, "updates") == list(range(61, 201))
    assert agent._n_updates == 3 * 140
    # All real transitions
    assert [n for kind, _, n in events if kind == "model"] == [61, 111, 161]
    assert agent.model_buffer.size() == 300 and agent.num_timesteps == agent.lifetime_timesteps == 200


@pytest.mark.parametrize("n_envs", [3, 4])
def test_steps_that_jump(n_envs, events):
    """With several environments no multiple of anything is ever hit exactly."""
    env = make_vec_env("Pendulum-v1", n_envs=n_envs, seed=0)
    agent = make_agent(env, gradient_steps=-1).learn(210)
    trainings = steps(events, "model")
    assert trainings[0] == 60 + n_envs
    assert len(trainings) == 3 and all(50 <= b - a < 50 + n_envs for a, b in pairwise(trainings))
    assert [n for kind, _, n in events if kind == "model"] == trainings
    assert {n for kind, _, n in events if kind == "updates"} == {n_envs}
    buffer = agent.model_buffer
    assert buffer.size() > 0 and th.isfinite(buffer.observations[: buffer.size()]).all()


def test_train_freq_in_episodes(events):
    make_agent(CountingEnv(episode_length=30), train_freq=(1, "episode"), gradient_steps=2).learn(180)
    assert steps(events, "model") == [90, 150]
    assert steps(events, "updates") == [90, 120, 150, 180]


def test_batches_of_a_whole_run(monkeypatch):
    """Real and generated transitions in every batch that SAC gets, and before the first model none that is tiny."""
    agent = make_agent(batch_size=64, real_ratio=0.1, learning_starts=80)
    sampled = []
    real, generated = ReplayBuffer.sample, type(agent.model_buffer).sample

    def watch(name, original):
        def sample(self, batch_size, env=None):
            sampled.append((name, batch_size))
            return original(self, batch_size, env=env)

        return sample

    monkeypatch.setattr(ReplayBuffer, "sample", watch("real", real))
    monkeypatch.setattr(type(agent.model_buffer), "sample", watch("model", generated))
    agent.learn(79)
    agent.train(1, 64)
    assert sampled == [("real", 64)]
    sampled.clear()
    agent.learn(30)
    assert len(sampled) > 0 and set(sampled[::2]) == {("model", 58)} and set(sampled[1::2]) == {("real", 6)}
    assert isinstance(agent.replay_buffer, ReplayBuffer)


def test_rollouts_start_at_real_states_and_follow_the_stochastic_policy():
    agent = make_agent(rollout_batch_size=4_000, rollout_schedule=[0, 0, 2, 2], gradient_steps=0).learn(61)
    buffer, real = agent.model_buffer, th.as_tensor(agent.replay_buffer.observations[:61, 0])
    start, second = buffer.observations[:4_000], buffer.observations[4_000:8_000]
    # Each start is a real state, all equally often
    is_state = (start[:, None] == real).all(dim=2)
    assert (is_state.sum(dim=1) == 1).all()
    assert np.abs(is_state.sum(dim=0).numpy() - 4_000 / 61).max() < 5 * np.sqrt(4_000 / 61)
    # Without termination every rollout goes on from where it was
    assert th.equal(second, buffer.next_observations[:4_000]) and buffer.size() == 8_000
    # Actions of one state are spread as the policy says, before they are squashed by tanh
    mean, log_std, _ = agent.actor.get_action_dist_params(start)
    # In float32 the tanh of a large number is 1
    squashed = buffer.actions[:4_000].clamp(-1 + 1e-6, 1 - 1e-6)
    z = (th.atanh(squashed) - mean) / log_std.exp()
    assert abs(z.mean().item()) < 5 / np.sqrt(4_000) and z.std().item() == pytest.approx(1, abs=0.06)


def test_generated_transitions_are_those_of_the_environment():
    """A point moves by half the action; its reward is the distance that is left."""
    agent = make_agent(
        PointEnv(price=0), learning_starts=800, gradient_steps=0, model_hidden_sizes=[64, 64], model_learning_rate=3e-3
    ).learn(801)
    start, actions, next_obs, rewards, dones = (column[:100, 0] for column in agent.model_buffer._columns())
    # What 800 steps teach, noise included; start states spread over 8 units
    assert (next_obs - (start + actions / 2)).abs().mean() < 0.3
    alive = dones == 0
    assert alive.sum() > 50 and (rewards + next_obs.abs())[alive].abs().median() < 1
    # Over only beyond 4
    assert next_obs[~alive].abs().min() > 3.5 if dones.any() else (next_obs.abs() < 4.5).all()


def test_model_learns_raw_units_under_vec_normalize():
    """The policy sees normalised states, the model and its buffer raw ones."""
    env = VecNormalize(DummyVecEnv([lambda: CountingEnv(episode_length=50, truncate=True)]))
    seen, given = [], []

    def termination_fn(obs, action, next_obs):
        given.append((obs, next_obs))
        return np.zeros(len(obs), dtype=bool)

    agent = make_agent(
        env, model_gradient_steps=0.5, rollout_batch_size=500, learning_starts=100, termination_fn=termination_fn
    )
    agent.actor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    agent.learn(101)
    rollout_obs = next(obs for obs in seen if len(obs) == 500)
    raw = agent.model_buffer.observations[:500]
    assert raw.max() > 40 and np.allclose(agent.dynamics.input_mean[:2], 24.5, atol=6)
    np.testing.assert_allclose(rollout_obs, env.normalize_obs(raw.numpy()), atol=0.05)
    assert np.array_equal(given[-1][0], raw) and given[-1][1].max() > 40
    batch = agent.mixed_buffer.sample(64, env=env)
    assert batch.observations.abs().max() <= 10
    # Rewards are raw in the model buffer: the first action, not divided by the spread of the return
    true = agent.model_buffer.actions[:500, 0]
    assert np.corrcoef(true, agent.model_buffer.rewards[:500, 0])[0, 1] > 0.8


def test_gsde_explores_anew_in_every_rollout():
    """One noise matrix for all would make the actions a function of the state."""
    agent = make_agent(use_sde=True, rollout_batch_size=2_000, gradient_steps=0).learn(61)
    start, actions = agent.model_buffer.observations[:2_000], agent.model_buffer.actions[:2_000, 0]
    same_state = (start == start[0]).all(dim=1)
    assert same_state.sum() > 10 and len(actions[same_state].unique()) == same_state.sum()


def test_generated_transitions_are_discounted_by_the_agents_gamma():
    agent = make_agent(n_steps=3, gamma=0.9).learn(61)
    discounts = agent.mixed_buffer.sample(200).discounts
    assert th.allclose(discounts[10:], th.tensor(0.9)) and th.allclose(discounts[:10].max(), th.tensor(0.9**3), atol=0.2)


def test_no_warnings(tmp_path):
    """As SB3's tests have it: not in the constructor, nor while learning, nor when loading."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = make_agent(
            CountingEnv(truncate=True, noise=0),
            # A read-only array
            termination_fn=lambda obs, action, next_obs: np.broadcast_to(False, len(obs)),
            reward_fn=lambda obs, action, next_obs: action[:, 0],
        ).learn(120)
        agent.save(tmp_path / "agent.zip")
        MBPO.load(tmp_path / "agent.zip", env=CountingEnv()).learn(40)


def test_actions_are_scaled_for_the_users_functions():
    """The buffer holds actions in [-1, 1]; the environment's own lie in [3, 7]."""
    arguments = {}

    def termination_fn(obs, action, next_obs):
        arguments["termination"] = obs, action, next_obs
        return np.zeros(len(obs), dtype=bool)

    def reward_fn(obs, action, next_obs):
        arguments["reward"] = obs, action, next_obs
        return action[:, 0] * 100

    env = CountingEnv(obs_shape=(2, 3), low=3.0, high=7.0)
    agent = make_agent(env, termination_fn=termination_fn, reward_fn=reward_fn)
    agent.learn(61)
    for obs, action, next_obs in arguments.values():
        assert obs.shape == next_obs.shape == (100, 2, 3) and action.shape == (100, 1)
        assert (action >= 3).all() and (action <= 7).all() and action.std() > 0.1
        assert all(isinstance(array, np.ndarray) for array in (obs, action, next_obs))
    assert agent.model_buffer.actions[:100].abs().max() <= 1
    assert th.allclose(agent.model_buffer.rewards[:100], agent.model_buffer.actions[:100] * 200 + 500, atol=1e-3)


def test_terminations_end_rollouts():
    agent = make_agent(
        CountingEnv(episode_length=40),
        rollout_schedule=[0, 0, 5, 5],
        termination_fn=lambda obs, action, next_obs: next_obs[:, 0] > -np.inf,
    ).learn(61)
    assert agent.model_buffer.size() == 100 and agent.model_buffer.dones[:100].all()


def test_learned_termination(events):
    """Nothing is known about this environment: episodes end when the count reaches 10."""
    agent = make_agent(
        CountingEnv(episode_length=10), learning_starts=500, rollout_batch_size=1_000, model_gradient_steps=1
    ).learn(501)
    assert agent.logger is not None
    buffer = agent.model_buffer
    dones, counts = buffer.dones[:1_000, 0].bool(), buffer.next_observations[:1_000, 0]
    assert dones.any() and not dones.all()
    assert counts[dones].min() > 9 and counts[~dones].max() < 10


@pytest.mark.parametrize("k_min, k_max", [(1, 4)])
def test_schedule_is_applied_and_retention_survives_it(k_min, k_max, events):
    """k grows by one every 100 steps; the capacity with it; the newest transitions stay."""
    agent = make_agent(rollout_schedule=[61, 361, k_min, k_max], rollout_batch_size=10, model_train_freq=100)
    agent.learn(161)
    first = agent.model_buffer.observations[:10].clone()
    assert [capacity for kind, _, capacity in events if kind == "rollouts"] == [100, 200]
    assert agent.model_buffer.size() == 10 + 20 and agent.model_buffer.buffer_size == 200
    assert th.equal(agent.model_buffer.observations[:10], first)
    agent.learn(250, reset_num_timesteps=False)
    assert [capacity for kind, _, capacity in events if kind == "rollouts"] == [100, 200, 300, 400]
    assert agent.model_buffer.size() == 10 + 20 + 30 + 40
    assert th.equal(agent.model_buffer.observations[:10], first)


def test_retention_is_bounded(events):
    agent = make_agent(model_train_freq=20, rollout_batch_size=1, model_retain_epochs=1).learn(200)
    # 50 trainings of one rollout each in 1,000 steps; each of them adds, none wipes
    assert agent.model_buffer.buffer_size == 50
    assert agent.model_buffer.size() == len(steps(events, "rollouts")) == 7


def test_real_ratio_one_is_sac():
    """The paper's "no model": the same numbers as SAC, bit for bit."""
    kwargs = {name: value for name, value in SMALL.items() if name in inspect.signature(SAC).parameters}
    kwargs.update(gradient_steps=4, target_update_interval=3)
    sac = SAC("MlpPolicy", "Pendulum-v1", **kwargs).learn(150)
    mbpo = make_agent(real_ratio=1.0, **{name: kwargs[name] for name in ("gradient_steps", "target_update_interval")}).learn(
        150
    )
    assert sac._n_updates == mbpo._n_updates == 4 * 90
    for (name, expected), actual in zip(sac.policy.state_dict().items(), mbpo.policy.state_dict().values(), strict=True):
        assert th.equal(expected, actual), name
    assert th.equal(sac.log_ent_coef, mbpo.log_ent_coef)
    assert np.array_equal(sac.replay_buffer.observations, mbpo.replay_buffer.observations)
    for optimizer in ("actor.optimizer", "critic.optimizer", "ent_coef_optimizer"):
        for state, other in zip(
            sac.get_parameters()[optimizer]["state"].values(), mbpo.get_parameters()[optimizer]["state"].values(), strict=True
        ):
            assert all(th.equal(state[key], other[key]) for key in state)
    assert not mbpo.dynamics.is_fitted and mbpo.model_buffer.size() == 0


def test_same_seed_same_agent():
    first, second, other = (make_agent(seed=seed).learn(120) for seed in (3, 3, 4))
    for name, tensor in first.policy.state_dict().items():
        assert th.equal(tensor, second.policy.state_dict()[name])
    for name, tensor in first.dynamics.state_dict().items():
        assert th.equal(tensor, second.dynamics.state_dict()[name])
    assert not th.equal(first.dynamics.weights[0], other.dynamics.weights[0])


def test_train_zero_changes_nothing_and_train_one_needs_no_model():
    agent = make_agent().learn(30)
    before = deepcopy(agent.get_parameters())
    with warnings.catch_warnings():
        # Means of nothing
        warnings.simplefilter("error")
        agent.train(0, 32)
    assert agent._n_updates == 0
    for name, tensor in before["policy"].items():
        assert th.equal(tensor, agent.get_parameters()["policy"][name])
    agent.train(1, 32)
    assert agent._n_updates == 1 and not agent.dynamics.is_fitted


def test_second_learn_goes_on(events):
    """The step count starts again, the agent's life does not: no warm-up, no fresh schedule, no fresh model."""
    agent = make_agent(rollout_schedule=[0, 200, 1, 3]).learn(100)
    assert agent.num_timesteps == 100
    events.clear()
    actions = []
    agent.actor.register_forward_pre_hook(lambda module, inputs: actions.append(len(inputs[0])))
    agent.learn(100)
    assert agent.num_timesteps == 100 and agent.lifetime_timesteps == 200
    # The policy acted from the first step on, and learned
    assert steps(events, "updates") == list(range(101, 201))
    assert steps(events, "model") == [111, 161]
    assert [capacity for kind, _, capacity in events if kind == "rollouts"] == [2_000 * 2, 2_000 * 2]
    assert actions[0] == 1 and actions.count(1) == 100


def test_learn_that_fails_does_not_age_the_agent():
    agent = make_agent().learn(70)
    agent.env = None
    for _ in range(2):
        with pytest.raises(AssertionError):
            agent.learn(10)
    assert agent.lifetime_timesteps == 70


def test_set_env_brings_its_own_termination():
    """Which transitions are terminal is the environment's business, not the agent's."""
    agent = make_agent(gym.make("Hopper-v5"), rollout_schedule=[0, 0, 1, 1]).learn(61)
    assert agent.model_buffer.dones[:100].sum() < 100
    agent.set_env(gym.make("Hopper-v5", healthy_z_range=(50.0, 60.0)))
    agent.learn(60)
    assert agent.model_buffer.dones[100:200].all()


def test_callbacks_of_all_kinds_and_a_list_that_stays_as_it_was():
    class Recorder(BaseCallback):
        def __init__(self):
            super().__init__()
            self.steps, self.rollouts = 0, 0

        def _on_step(self):
            self.steps += 1
            return True

        def _on_rollout_end(self):
            self.rollouts += 1

    calls = []
    recorder = Recorder()
    callbacks = [recorder, EvalCallback(Monitor(gym.make("Pendulum-v1")), eval_freq=50, n_eval_episodes=1, verbose=0)]
    agent = make_agent().learn(65, callback=callbacks)
    assert len(callbacks) == 2 and callbacks[0] is recorder
    assert recorder.steps == recorder.rollouts == 65
    agent.learn(5, callback=CallbackList(callbacks))
    agent.learn(5, callback=lambda locals_, globals_: calls.append(locals_["self"].num_timesteps) or True)
    assert recorder.steps == 70 and calls == [1, 2, 3, 4, 5]
    assert agent.learn(5, callback=[]).num_timesteps == 5
    # Stopping
    assert agent.learn(50, callback=lambda locals_, globals_: agent.num_timesteps < 3).num_timesteps == 3


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(use_sde=True),
        dict(use_sde=True, use_sde_at_warmup=True, sde_sample_freq=4),
        dict(n_steps=3),
        dict(optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}),
        dict(ent_coef=0.1),
        dict(ent_coef="auto_0.5", target_entropy=-0.5),
        dict(learning_rate=lambda progress: 1e-3 * progress),
        dict(buffer_size=50),
        dict(real_ratio=0),
        dict(action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))),
        dict(policy_kwargs={"net_arch": {"pi": [8], "qf": [16]}, "n_critics": 3, "activation_fn": th.nn.Tanh}),
        dict(ensemble_size=1, num_elites=1, model_hidden_sizes=(8,)),
        dict(learning_starts=0),
    ],
    ids=lambda kwargs: ", ".join(kwargs),
)
def test_options_of_sac(kwargs):
    agent = make_agent(**kwargs).learn(130)
    assert agent.dynamics.is_fitted and agent.model_buffer.size() >= 100
    for name, tensor in [*agent.policy.state_dict().items(), *agent.dynamics.state_dict().items()]:
        assert th.isfinite(tensor).all(), name
    if "n_steps" in kwargs:
        assert isinstance(agent.replay_buffer, NStepReplayBuffer)
        assert agent.mixed_buffer.sample(32).discounts is not None


@pytest.mark.parametrize("obs_shape", [(2,), (2, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_observation_spaces(obs_shape, dtype):
    agent = make_agent(CountingEnv(obs_shape=obs_shape, action_dim=2, dtype=dtype, low=-3, high=5)).learn(130)
    assert agent.model_buffer.sample(7).observations.shape == (7, *obs_shape)
    assert agent.mixed_buffer.sample(32).observations.shape == (32, *obs_shape)


def test_rollouts_run_in_eval_mode(monkeypatch):
    """A policy with dropout or batch norm must not be in training mode while it generates data."""
    agent, modes = make_agent(), []
    sample = Ensemble.sample

    def watched(self, obs, actions):
        modes.append((agent.policy.training, self.training))
        return sample(self, obs, actions)

    monkeypatch.setattr(Ensemble, "sample", watched)
    agent.learn(115)
    assert len(modes) >= 2 and set(modes) == {(False, False)}


def test_constants_of_training():
    assert (training.BATCH_SIZE, training.HOLDOUT_RATIO, training.MAX_HOLDOUT) == (256, 0.2, 5_000)
    assert (training.MIN_IMPROVEMENT, training.PATIENCE, training.MIN_EPOCH_ROWS) == (0.01, 5, 4_000)


def test_rollouts_in_portions(monkeypatch):
    monkeypatch.setattr(model_env, "ROLLOUTS_AT_ONCE", 30)
    agent = make_agent(rollout_schedule=[0, 0, 3, 3]).learn(61)
    assert agent.model_buffer.size() == 300 and len(agent.model_buffer.observations[:300].unique(dim=0)) > 200
    assert agent.logger.name_to_value["model/rollout_length_mean"] == 3


def test_room_for_the_longest_rollouts_is_reserved_at_once(events, capsys):
    agent = make_agent(rollout_schedule=[60, 160, 1, 5], verbose=1)
    assert "room for 10,000 generated transitions, 0.00 GB" in capsys.readouterr().out
    memory = agent.model_buffer.observations.data_ptr()
    assert len(agent.model_buffer.observations) == 10_000 and agent.model_buffer.buffer_size == 2_000
    agent.learn(170)
    assert [size for kind, _, size in events if kind == "rollouts"] == [2_000, 6_000, 10_000]
    assert agent.model_buffer.observations.data_ptr() == memory
    # No model, no room
    assert len(make_agent(real_ratio=1).model_buffer.rewards) == 1


def test_model_buffer_that_does_not_fit():
    with pytest.raises(ValueError, match=r"no memory for .* generated transitions .*`rollout_batch_size` \(1,000,000,000,000"):
        make_agent(rollout_batch_size=10**12)


def empty_the_buffer(locals_, globals_):
    """A user's callback."""
    if locals_["self"].num_timesteps == 200:
        locals_["self"].replay_buffer.reset()
    return True


@pytest.mark.parametrize(
    "buffer_size, n_envs, callback", [(40, 1, None), (70, 2, None), (600, 3, None), (300, 1, empty_the_buffer)]
)
def test_model_is_trained_on_what_the_buffer_holds_now(buffer_size, n_envs, callback, monkeypatch):
    """The buffer wraps around between two trainings, whole or in part, or is emptied."""
    sizes, train_model = [], DynamicsCallback._train_model

    def watched(self, transitions):
        for column, expected in zip(transitions, buffers.real_transitions(self.model.replay_buffer), strict=True):
            assert th.equal(column, expected)
        sizes.append(len(transitions.obs))
        train_model(self, transitions)

    monkeypatch.setattr(DynamicsCallback, "_train_model", watched)
    env = make_vec_env("Pendulum-v1", n_envs=n_envs, seed=0)
    make_agent(env, buffer_size=buffer_size, learning_starts=30, gradient_steps=0, model_train_freq=60).learn(
        800, callback=callback
    )
    assert len(sizes) > 8
    assert callback is None or min(sizes[3:]) < 100


class WeightedSamples(NamedTuple):
    """What a prioritised buffer may return."""

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    weights: th.Tensor


class WeightedBuffer(ReplayBuffer):
    n_batches = 0

    def sample(self, batch_size, env=None):
        self.n_batches += 1
        return WeightedSamples(*super().sample(batch_size, env=env)[:5], None, th.ones(batch_size))


@pytest.mark.parametrize("real_ratio", [0.5, 1])
def test_a_replay_buffer_of_the_users_own(real_ratio):
    agent = make_agent(replay_buffer_class=WeightedBuffer, real_ratio=real_ratio).learn(65)
    assert agent._n_updates == agent.replay_buffer.n_batches == 5
    batches = agent.mixed_buffer.sample_batches(4, 32)
    assert batches.rewards.shape == (4, 32, 1) and agent.replay_buffer.n_batches == 9
    assert hasattr(agent.mixed_buffer.sample(32), "weights") == (real_ratio == 1)


def test_auto_schedule(monkeypatch, events, tmp_path):
    """Rollouts grow with what the model is right for, shrink at once, and the length is the agent's."""
    # Neither the mean's error nor the deviation from it is above 0.1, but a generated state is off by 0.113
    measured = iter([0.01, 0.01, 0.08, 0.01, 0.01])

    def before_training(live, transitions, horizon):
        value = th.full((horizon, 4), next(measured))
        return open_loop.OpenLoopError(list(range(horizon)), value, value, value, value, value, th.ones(4))

    monkeypatch.setattr("sb3_mbpo.common.callbacks.LiveDiagnostics.before_training", before_training)
    agent = make_agent(rollout_schedule="auto", gradient_steps=0, model_train_freq=20).learn(145)
    # Trained at 61, 81, 101, 121 and 141; 1,000 / 20 * 100 rollouts have room
    assert [size // 5_000 for kind, _, size in events if kind == "rollouts"] == [1, 2, 3, 1, 2]
    assert agent.rollout_length == 2 and len(agent.model_buffer.rewards) == 25 * 5_000
    agent.save(tmp_path / "agent")
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    assert loaded.rollout_schedule == "auto" and loaded.rollout_length == 2


@pytest.mark.parametrize("kwargs", [{}, {"buffer_size": 150}])
def test_no_gradient_step_ever_sees_what_is_held_out(kwargs, monkeypatch):
    """Not even when the replay buffer is full, and new transitions take the place of old ones."""
    trained, measured = [], []

    def train(ensemble, inputs, targets, rows, holdout, *args):
        trained.append({tuple(row) for row in inputs[rows].tolist()})
        measured.append({tuple(row) for row in inputs[holdout].tolist()})
        return within_budget(ensemble, inputs, targets, rows, holdout, *args)

    within_budget = training._train_within_budget
    monkeypatch.setattr(training, "_train_within_budget", train)
    make_agent(**kwargs).learn(401)
    assert len(trained) == 7 and len(measured[-1]) == (15 if kwargs else 35)
    seen = set()
    for rows, held_out in zip(trained, measured, strict=True):
        seen |= rows
        assert held_out and seen.isdisjoint(held_out)
