"""The model's error on real trajectories, with models and systems whose every number is known."""

import math
from functools import partial

import numpy as np
import pytest
import torch as th
from scipy import special, stats
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.common.buffers import real_transitions, recent_trajectories
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.diagnostics.live import LiveDiagnostics, log_open_loop_error
from sb3_mbpo.dynamics.open_loop import OpenLoopError, data_scale, open_loop, open_loop_error, spread, windows
from sb3_mbpo.dynamics.rollouts import Transitions
from tests.agents import make_agent
from tests.envs import CountingEnv
from tests.test_ensemble import linear_ensemble, make_ensemble


def trajectory(obs, actions=None, rewards=None):
    """Consecutive transitions through these observations, ``(n + 1, obs_dim)``."""
    obs = th.as_tensor(obs, dtype=th.float32)
    n = len(obs) - 1
    actions = th.zeros(n, 1) if actions is None else th.as_tensor(actions, dtype=th.float32)
    rewards = th.zeros(n) if rewards is None else th.as_tensor(rewards, dtype=th.float32)
    return Transitions(obs[:-1], actions, obs[1:], rewards, th.zeros(n, dtype=th.bool))


def drifting(drift, sigma=1e-6):
    """A model in which reward and observation change by ``drift``, whatever happens."""
    return linear_ensemble(np.zeros((len(drift), len(drift))), sigma, drift)


def random_walks(n, length, sigma, drift, dims=2, seed=0):
    rng = np.random.default_rng(seed)
    steps = rng.normal(drift, sigma, (n, length, dims))
    starts = rng.normal(0, 1, (n, 1, dims))
    return [
        trajectory(np.concatenate([start, start + walk.cumsum(axis=0)])) for start, walk in zip(starts, steps, strict=True)
    ]


def test_windows_begin_at_every_step_and_end_with_the_trajectory():
    first = trajectory([[0.0], [1], [2], [3]], actions=[[10.0], [11], [12]], rewards=[20.0, 21, 22])
    second = trajectory([[50.0], [51]], actions=[[60.0]], rewards=[70.0])
    result = windows([first, second], horizon=2)
    assert result.obs.squeeze(2).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 0], [50, 51, 0]]
    assert result.actions.squeeze(2).tolist() == [[10, 11], [11, 12], [12, 0], [60, 0]]
    assert result.rewards.tolist() == [[20, 21], [21, 22], [22, 0], [70, 0]]
    assert result.valid.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    assert windows([first, second], 2, max_windows=2).obs[:, 0, 0].tolist() == [0, 2]
    with pytest.raises(ValueError, match="no transitions"):
        windows([], 2)


def test_open_loop_takes_the_recorded_actions():
    """x' = x + a, reward 2 x: the state, not the policy's idea, decides."""
    ensemble = linear_ensemble([[2.0, 0.0], [0.0, 1.0]], sigma=1e-6)
    steps = list(open_loop(ensemble, th.tensor([[1.0], [-1.0]]), th.tensor([[[0.5], [0.25]], [[0.0], [-1.0]]]), 3))
    assert [tuple(obs.shape) for obs, _ in steps] == [(2, 3, 1)] * 2
    assert steps[0][0][:, 0, 0].tolist() == pytest.approx([1.5, -1.0], abs=1e-4)
    assert steps[1][0][:, 2, 0].tolist() == pytest.approx([1.75, -2.0], abs=1e-4)
    assert steps[0][1][:, 1].tolist() == pytest.approx([2.0, -2.0], abs=1e-4)
    assert steps[1][1][:, 1].tolist() == pytest.approx([3.0, -2.0], abs=1e-4)


def test_goals_stay_and_bits_are_bits():
    ensemble = drifting([0.0, 0.3, 0.7, 0.4])
    ((obs, _), (again, _)) = open_loop(ensemble, th.zeros(1, 3), th.zeros(1, 2, 1), 2, constant=[0], binary=[1, 2])
    assert obs[0, 0].tolist() == [0, 1, 0]
    assert again[0, 0].tolist() == [0, 1, 0]


def test_a_reward_function_stands_for_the_models():
    ensemble = drifting([5.0, 1.0])
    steps = open_loop(ensemble, th.zeros(1, 1), th.ones(1, 2, 1), 2, reward=lambda obs, a, new: 10 * obs[:, 0] + a[:, 0])
    assert [rewards[0].tolist() for _, rewards in steps] == [
        pytest.approx([1, 1], abs=1e-4),
        pytest.approx([11, 11], abs=1e-4),
    ]


@pytest.mark.parametrize("believed, one_sigma, two_sigma", [(1, 0.6827, 0.9545), (0.5, 0.3829, 0.6827), (2, 0.9545, 0.9999)])
def test_error_and_calibration_on_a_random_walk(believed, one_sigma, two_sigma):
    """The error after h steps is sigma sqrt(h), whatever the model believes its own to be."""
    sigma, drift = 0.3, 0.1
    model = drifting([0.0, drift, drift], believed * sigma)
    real = windows(random_walks(4_000, 4, sigma, drift), 4)
    first_only = type(real)(*(column[::4] for column in real))
    error = open_loop_error(partial(open_loop, model), first_only, (1, 4, 9), th.tensor([1.0, 2.0, 2.0]), n_particles=200)
    assert error.steps == [1, 4] and error.n_windows.tolist() == [4_000, 4_000]
    for row, step in enumerate(error.steps):
        expected = sigma * math.sqrt(step)
        np.testing.assert_allclose(error.rmse[row, 1:], expected, rtol=0.05)
        np.testing.assert_allclose(error.std[row, 1:], believed * expected, rtol=0.02)
        np.testing.assert_allclose(error.inside[0, row, 1:], one_sigma, atol=0.035)
        np.testing.assert_allclose(error.inside[1, row, 1:], two_sigma, atol=0.035)
        # The drift is the same everywhere: a constant predicts as well
        np.testing.assert_allclose(error.r2()[row, 1:], 0, atol=0.05)
    np.testing.assert_allclose(error.relative(), [sigma / 2, sigma], rtol=0.05)
    np.testing.assert_allclose(error.relative("std"), [believed * sigma / 2, believed * sigma], rtol=0.05)
    # One trajectory under the model and the real one both walk
    both = sigma * math.sqrt(1 + believed**2)
    np.testing.assert_allclose(error.relative("sample_rmse"), [both / 2, both], rtol=0.05)


def test_r2_of_a_right_and_of_a_wrong_model():
    """x' = x + a, reward 2 x."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (500, 1))
    actions[1::2] = -actions[::2]
    obs = np.concatenate([[[0.0]], actions.cumsum(axis=0)])
    real = windows([trajectory(obs, actions, 2 * obs[:-1, 0])], 3, max_windows=200)
    right, wrong = linear_ensemble([[2.0, 0.0], [0.0, 1.0]], 1e-6), linear_ensemble([[2.0, 0.0], [0.0, -1.0]], 1e-6)
    scale = th.ones(2)
    np.testing.assert_allclose(open_loop_error(partial(open_loop, right), real, (1, 2, 3), scale).r2(), 1, atol=1e-5)
    r2 = open_loop_error(partial(open_loop, wrong), real, (1, 3), scale).r2()
    # Twice the change: 1 - 4
    np.testing.assert_allclose(r2[:, 1], -3, atol=0.1)
    assert r2[0, 0] == pytest.approx(1, abs=1e-5)


def test_constant_dimensions_do_not_count_and_infinite_predictions_do():
    model = drifting([0.0, 1e38, 0.5])
    real = windows([trajectory(np.array([[float(i), 7.0] for i in range(12)]))], 8)
    error = open_loop_error(partial(open_loop, model), real, (1, 8), th.tensor([1.0, 2.0, 0.0]))
    assert error.varies().tolist() == [True, False]
    assert error.relative().tolist() == [th.inf, th.inf]
    # An infinite band is no band
    assert error.inside[:, 1, 1].tolist() == [0, 0]
    assert error.r2()[:, 2].isnan().all() and not error.rmse.isnan().any()


def test_scale_of_data():
    rows = trajectory(np.array([[1e6, 0.0], [1e6, 2.0], [1e6, 4.0]]), rewards=[1.0, 3.0])
    assert data_scale(rows).tolist() == [1.0, 0.0, 1.0]


def test_what_varies_by_rounding_alone_is_constant():
    """A clock that shows tenths: its changes differ in the last bit."""
    clock = th.arange(0, 400, dtype=th.float64).mul(0.1).float()[:, None]
    assert (clock[1:] - clock[:-1]).std() > 0
    assert spread(clock[1:] - clock[:-1], clock[1:]).tolist() == [0.0]
    assert spread(clock, clock).item() == pytest.approx(40 / math.sqrt(12), rel=0.01)
    rows = trajectory(clock, rewards=[0.1] * 399)
    assert data_scale(rows)[0] == 0
    error = open_loop_error(partial(open_loop, drifting([0.1, 0.1])), windows([rows], 3), (1, 3), data_scale(rows))
    assert error.r2().isnan().all()


def test_rewards_of_what_is_far_from_all_data():
    """An unstable model, and a reward function that overflows: no reason to stop a training or a report."""
    asked = []

    def reward(obs, action, next_obs):
        asked.append(obs)
        with np.errstate(over="ignore"):
            return -(next_obs[:, 0] ** 2)

    agent = make_agent(CountingEnv(obs_shape=(1,)), reward_fn=reward)
    agent.dynamics = drifting([0.0, 3e38])
    model_env = ModelEnv(agent, agent.env)
    real = windows([trajectory(np.arange(8.0)[:, None])], 4)
    error = open_loop_error(model_env.open_loop, real, (1, 2, 4), th.ones(2))
    assert all(np.isfinite(obs).all() for obs in asked)
    assert error.rmse[:, 0].tolist() == [th.inf] * 3 and error.relative().tolist()[1:] == [th.inf] * 2
    # Rollouts that are trained on must have finite ones
    with pytest.raises(ValueError, match="`reward_fn` must return finite numbers"):
        model_env.step(th.zeros(2, 1), th.zeros(2, 1))


def test_goals_stay_and_bits_are_bits_in_an_open_loop():
    agent = make_agent(BitFlippingEnv(n_bits=3, continuous=True), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    agent.learn(65)
    model_env = ModelEnv(agent, agent.env)
    obs = th.tensor([[0.0, 1, 0, 1, 1, 0, 0, 1, 0]]).repeat(5, 1)
    for next_obs, _ in model_env.open_loop(obs, th.rand(5, 4, 3) * 2 - 1, 20):
        assert set(next_obs.unique().tolist()) <= {0.0, 1.0}
        assert (next_obs[:, :, 3:6] == obs[:, None, 3:6]).all()


def test_likelihood_is_that_of_the_mixture_of_elites():
    th.manual_seed(0)
    ensemble = make_ensemble()
    ensemble.elites.copy_(th.tensor([2.0, 0.0]))
    inputs, targets = th.randn(5, 5), th.randn(5, 4)
    with th.no_grad():
        mean, log_var = (each.double().numpy() for each in ensemble(inputs.expand(ensemble.n_members, -1, -1)))
    logs = stats.norm(mean, np.exp(log_var / 2)).logpdf(targets.double().numpy()).sum(axis=2)
    expected = -(special.logsumexp(logs[[2, 0]], axis=0) - math.log(2))
    np.testing.assert_allclose(ensemble.nll(inputs, targets), expected, rtol=1e-4)


def fill(buffer, episodes):
    """Rows of all environments; ``episodes``: lists of (observation, next observation, done) of each."""
    for rows in zip(*episodes, strict=True):
        obs, next_obs, done = (np.array(column) for column in zip(*rows, strict=True))
        zeros = np.zeros((len(rows), 1))
        infos = [{"TimeLimit.truncated": False} for _ in rows]
        buffer.add(obs[:, None], next_obs[:, None], zeros, np.zeros(len(rows)), done, infos)


def walk(start, n, done_at=()):
    """Observations that count; after an end they go on from the next hundred."""
    rows, now = [], start
    for step in range(n):
        done = step in done_at
        rows.append((float(now), float(now + 1), done))
        now = now + 100 if done else now + 1
    return rows


def pieces(buffer, n):
    return sorted(piece.obs[:, 0].tolist() for piece in recent_trajectories(buffer, n))


@pytest.fixture
def space():
    return CountingEnv(obs_shape=(1,)).observation_space, CountingEnv().action_space


def test_recent_trajectories_end_where_episodes_end(space):
    buffer = ReplayBuffer(20, *space, device="cpu", n_envs=2)
    fill(buffer, [walk(0, 6, done_at=[2]), walk(1_000, 6)])
    assert pieces(buffer, 12) == [[0, 1, 2], [102, 103, 104], [1_000, 1_001, 1_002, 1_003, 1_004, 1_005]]
    assert pieces(buffer, 6) == [[102, 103, 104], [1_003, 1_004, 1_005]]
    assert pieces(buffer, 1_000) == pieces(buffer, 12) and pieces(buffer, 1) == []
    for piece in recent_trajectories(buffer, 12):
        assert th.equal(piece.next_obs[:-1], piece.obs[1:])


def test_recent_trajectories_of_a_full_buffer(space):
    buffer = ReplayBuffer(5, *space, device="cpu")
    fill(buffer, [walk(0, 8)])
    assert pieces(buffer, 100) == [[3, 4, 5, 6, 7]] and pieces(buffer, 2) == [[6, 7]]


def test_recent_trajectories_end_where_a_training_was_stopped(space):
    buffer = ReplayBuffer(20, *space, device="cpu")
    fill(buffer, [walk(0, 3)])
    fill(buffer, [walk(50, 2)])
    assert pieces(buffer, 100) == [[0, 1, 2], [50, 51]]


def test_recent_trajectories_with_optimize_memory_usage(space):
    """The last transition of an episode is lost."""
    kwargs = dict(device="cpu", optimize_memory_usage=True, handle_timeout_termination=False)
    buffer = ReplayBuffer(6, *space, **kwargs)
    fill(buffer, [walk(0, 5, done_at=[2])])
    assert pieces(buffer, 100) == [[0, 1], [102, 103]]
    fill(buffer, [walk(104, 4)])
    assert pieces(buffer, 100)[-1][-1] == 107


# --- In a training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(monkeypatch):
    """What was recorded, with the step; the last one before a dump is not all there is."""
    from stable_baselines3.common.logger import Logger

    records = []
    record = Logger.record

    def watched(self, key, value, exclude=None):
        records.append((key, value))
        record(self, key, value, exclude)

    monkeypatch.setattr(Logger, "record", watched)
    return records


def test_measured_on_what_was_not_trained_on(monkeypatch, logged):
    from sb3_mbpo.diagnostics import live

    seen = []
    measure = live.open_loop_error

    def watched(ensemble, real, *args):
        seen.append(real.obs[:, 0].clone())
        return measure(ensemble, real, *args)

    monkeypatch.setattr(live, "open_loop_error", watched)
    agent = make_agent("Pendulum-v1", model_train_freq=30, gradient_steps=0).learn(125)
    # Trained at 61, 91 and 121: measured at the last two, on the 30 transitions since
    stored = th.as_tensor(agent.replay_buffer.observations[:121, 0])
    assert [obs.tolist() for obs in seen] == [stored[61:91].tolist(), stored[91:121].tolist()]
    names = {name for name, _ in logged if name.startswith("open_loop/")}
    kinds = ("error", "std", "inside_1_sigma", "inside_2_sigma", "r2", "reward_r2")
    assert names == {f"open_loop/{kind}_{step}" for kind in kinds for step in (1, 2, 5, 10, 20)}
    assert all(len(name) <= 36 and np.isfinite(value) for name, value in logged if name in names)
    assert agent.open_loop_error.steps == list(range(1, 21)) and agent.open_loop_error.n_windows[0] == 30


def test_theory_of_a_policy_that_does_not_change(logged):
    make_agent(gradient_steps=0, model_train_freq=30).learn(125)
    values = {name: value for name, value in logged if name.startswith("theory/")}
    assert values["theory/policy_shift"] == pytest.approx(0, abs=1e-6) and values["theory/optimal_rollout_length"] == 0
    assert 0 <= values["theory/model_error"] <= 1


def test_policy_shift_is_that_between_two_trainings(logged):
    """All of the actor's last bias is moved: by how much is known."""
    agent = make_agent(gradient_steps=0, model_train_freq=30)

    def shift(local, _):
        if local["self"].num_timesteps == 110:
            with th.no_grad():
                agent.actor.mu.bias += 0.01
        return True

    agent.learn(125, callback=shift)
    unchanged, value = [value for name, value in logged if name == "theory/policy_shift"]
    assert unchanged == pytest.approx(0, abs=1e-6)
    obs = th.as_tensor(agent.replay_buffer.observations[91:121, 0])
    _, log_std, _ = agent.actor.get_action_dist_params(obs)
    # KL of two Gaussians of the same width is (shift / std)^2 / 2
    expected = (0.01 / log_std.exp() / 2).mean().item()
    assert value == pytest.approx(expected, rel=0.05)
    # Nothing is said of the slope where the policy has not moved
    (slope,) = [value for name, value in logged if name == "theory/error_slope"]
    error = [value for name, value in logged if name == "theory/model_error"][-1]
    assert slope == pytest.approx(error / value)


def test_without_a_discount_there_is_no_best_length(logged):
    """And no limit to it, which must not end a training."""
    make_agent(gamma=1.0, model_train_freq=30).learn(125)
    names = {name for name, _ in logged if name.startswith("theory/")}
    assert names == {"theory/model_error", "theory/policy_shift", "theory/error_slope"}


def test_a_perfect_model_is_good_for_the_whole_horizon(logged, monkeypatch):
    monkeypatch.setattr("sb3_mbpo.diagnostics.live.model_error_from_nll", lambda *args: 0.0)
    make_agent(gamma=0.9, model_train_freq=30).learn(125)
    assert dict(logged)["theory/optimal_rollout_length"] == pytest.approx(10)


def test_what_is_logged_of_an_error(tmp_path):
    """Each number under its name; of three dimensions the last does not vary."""
    values = iter(range(1, 100))

    def table(*shape):
        return th.tensor([[float(next(values)) for _ in range(shape[-1])] for _ in range(shape[-2])])

    rmse, std, changes = table(2, 4), table(2, 4), table(2, 4) * 10
    inside = th.stack([table(2, 4), table(2, 4)])
    scale = th.tensor([1.0, 2.0, 4.0, 0.0])
    error = OpenLoopError([1, 5], th.tensor([9, 9]), rmse, std, changes, inside, scale)
    logger = configure(str(tmp_path), [])
    log_open_loop_error(logger, error)
    expected = {}
    for row, step in enumerate([1, 5]):
        r2 = 1 - (rmse[row] / changes[row]) ** 2
        expected |= {
            f"open_loop/error_{step}": (rmse[row, 1] / 2 + rmse[row, 2] / 4) / 2,
            f"open_loop/std_{step}": (std[row, 1] / 2 + std[row, 2] / 4) / 2,
            f"open_loop/inside_1_sigma_{step}": inside[0, row, 1:3].mean(),
            f"open_loop/inside_2_sigma_{step}": inside[1, row, 1:3].mean(),
            f"open_loop/r2_{step}": r2[1:3].mean(),
            f"open_loop/reward_r2_{step}": r2[0],
        }
    assert logger.name_to_value.keys() == expected.keys()
    for name, value in expected.items():
        assert logger.name_to_value[name] == pytest.approx(value.item(), rel=1e-5), name


def test_live_numbers_with_a_model_that_is_known(logged):
    """
    The model is right for the first half of the data, on which it was trained, and wrong by 0.8 standard deviations in the
    second. Likelihoods differ by 0.8^2 / 2, whose Pinsker bound is 0.4.
    """
    agent = make_agent(CountingEnv(obs_shape=(1,)), gamma=0.5)
    sigma = 0.5
    agent.dynamics = drifting([0.0, 1.0], sigma)
    first, second = [(float(i), i + 1.0, False) for i in range(40)], [(40 + 1.4 * i, 41.4 + 1.4 * i, False) for i in range(40)]
    fill(agent.replay_buffer, [first + second])
    agent.num_timesteps, agent.last_model_training = 80, 40
    transitions = real_transitions(agent.replay_buffer)
    agent._logger = configure(None, [])
    live = LiveDiagnostics(agent, ModelEnv(agent, agent.env))
    live.after_training(Transitions(*(column[:40] for column in transitions)))
    error = live.before_training(transitions, 3)
    assert dict(logged)["theory/model_error"] == pytest.approx(0.4, rel=1e-3)
    scale = transitions.obs.std(dim=0, correction=0).item()
    np.testing.assert_allclose(error.scale, [0, scale], rtol=1e-5)
    assert error.n_windows.tolist() == [40, 39, 38]
    # 25 particles: the mean has a fifth of the deviation
    expected = np.sqrt(np.square(0.4 * np.arange(1, 4)) + sigma**2 * np.arange(1, 4) / 25)
    np.testing.assert_allclose(error.rmse[:, 1], expected, rtol=0.1)
    np.testing.assert_allclose(error.std[:, 1], sigma * np.sqrt(np.arange(1, 4)), rtol=0.1)


def test_a_policy_with_dropout_or_other_statistics(logged):
    """What is not trained does not shift, but for the statistics through which it sees."""

    agent = make_agent(gradient_steps=0, model_train_freq=30)
    agent.actor.latent_pi.append(th.nn.Dropout(0.5))
    agent.policy.make_actor = lambda: with_dropout(type(agent.policy).make_actor(agent.policy))
    agent.learn(95)
    assert dict(logged)["theory/policy_shift"] == pytest.approx(0, abs=1e-6)
    logged.clear()
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    make_agent(env, gradient_steps=0, model_train_freq=30).learn(95)
    assert dict(logged)["theory/policy_shift"] > 1e-4


def with_dropout(actor):
    actor.latent_pi.append(th.nn.Dropout(0.5))
    return actor
