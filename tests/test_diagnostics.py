"""Diagnostics of a trained agent, on systems whose answers are known."""

import importlib
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo import MBPO
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.diagnostics import (
    collect,
    continued,
    error_by_step,
    policy_shift,
    replay,
    returns,
    terminations,
    value_check,
)
from sb3_mbpo.diagnostics.figures import plot_dimensions
from sb3_mbpo.diagnostics.live import gaussian_of
from sb3_mbpo.diagnostics.open_loop import varying_columns
from sb3_mbpo.dynamics.rollouts import Transitions, concatenate
from tests.agents import make_agent
from tests.envs import CountingEnv, GoalEnv, PointEnv, UnpredictableEnv
from tests.test_ensemble import linear_ensemble
from tests.test_save_load import assert_same_parameters


def with_known_model(agent, matrix, sigma=1e-6, drift=None):
    """Put a linear model in the place of the agent's."""
    agent.dynamics = linear_ensemble(matrix, sigma, drift)
    return agent


@pytest.fixture
def point():
    """An agent in an environment, and the model that is exactly this environment, but for the terminal price."""
    agent = make_agent(
        PointEnv(price=0),
        reward_fn=lambda obs, action, next_obs: -np.abs(next_obs[:, 0]),
        termination_fn=lambda obs, action, next_obs: np.abs(next_obs[:, 0]) > 4,
    )
    return with_known_model(agent, [[0.0, 0.0], [0.0, 0.5]])


# --- Trajectories ----------------------------------------------------------------------------------------------------


def test_collect_gives_raw_trajectories():
    agent = make_agent(CountingEnv(low=-3, high=5, episode_length=10))
    env = make_vec_env(lambda: CountingEnv(low=-3, high=5, episode_length=10))
    trajectories = collect(agent, env, 25)
    assert [len(each.obs) for each in trajectories] == [10, 10, 5]
    for each in trajectories:
        assert each.obs[:, 0].tolist() == list(range(len(each.obs))) and th.equal(each.next_obs, each.obs + 1)
        assert each.actions.abs().max() <= 1 and len(each.actions.unique()) > 1
        # Rewards are the actions in the environment's units, and a little noise
        assert (each.rewards - (4 * each.actions[:, 0] + 1)).abs().max() < 0.5
    assert [each.terminated[-1].item() for each in trajectories] == [True, True, False]
    assert not th.cat([each.terminated[:-1] for each in trajectories]).any()


@pytest.mark.parametrize("wrap", [lambda env: env, lambda env: VecNormalize(env, norm_obs=False)])
def test_collect_keeps_the_precision_of_observations(wrap):
    """A clock in Unix time, in steps of a minute: float32 has 128 seconds between two numbers."""
    agent = make_agent(UnpredictableEnv(with_clock=True))
    for each in collect(agent, wrap(make_vec_env(UnpredictableEnv, env_kwargs={"with_clock": True})), 25):
        assert (each.next_obs - each.obs)[:, 1].tolist() == [60.0] * len(each.obs)
        assert each.rewards.dtype == each.actions.dtype == th.float32


def test_collect_with_vec_normalize_changes_nothing():
    def make_env(training):
        return VecNormalize(make_vec_env(lambda: CountingEnv(truncate=True)), training=training)

    agent = make_agent(make_env(True)).learn(70)
    env = make_env(True)
    env.obs_rms, env.ret_rms = agent.env.obs_rms, agent.env.ret_rms
    before = env.obs_rms.mean.copy(), env.ret_rms.var
    (first, second) = collect(agent, env, 20, deterministic=True)
    for each in (first, second):
        np.testing.assert_allclose(each.obs[:, 0], np.arange(10), atol=1e-4)
        np.testing.assert_allclose(each.next_obs[:, 0], np.arange(1, 11), atol=1e-4)
        # A timeout
        assert not each.terminated.any()
        assert (each.rewards - each.actions[:, 0]).abs().max() < 0.5
    assert (env.obs_rms.mean == before[0]).all() and env.ret_rms.var == before[1] and env.training


def test_collect_knows_the_parts_of_an_observation():
    """The environment's own order of them is another one than its space's."""
    agent = make_agent(GoalEnv(), "MultiInputPolicy")
    for each in collect(agent, make_vec_env(GoalEnv), 25):
        # Achieved goal and observation move, the desired goal does not
        assert th.equal(each.next_obs[:, 2:4], each.obs[:, 2:4])
        assert th.equal(each.next_obs[:-1], each.obs[1:])
        np.testing.assert_allclose(each.next_obs[:, :2], each.next_obs[:, 4:6], atol=1e-6)


def test_collect_explores_with_a_new_matrix_at_each_step():
    """gSDE: as model rollouts do."""
    agent = make_agent(use_sde=True)
    agent.actor.reset_noise(3)
    before, used = agent.actor.action_dist.exploration_matrices, []
    agent.actor.action_dist.get_noise, get_noise = (
        lambda features: used.append(agent.actor.action_dist.exploration_mat) or get_noise(features),
        agent.actor.action_dist.get_noise,
    )
    collect(agent, make_vec_env("Pendulum-v1"), 10)
    assert len(used) == 10 and len({matrix.sum().item() for matrix in used}) == 10
    assert agent.actor.action_dist.exploration_matrices is before


def test_collect_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="must be one environment, not 2"):
        collect(make_agent(CountingEnv()), make_vec_env(CountingEnv, n_envs=2), 5)
    with pytest.raises(ValueError, match="observation_space"):
        collect(make_agent(CountingEnv()), make_vec_env(PointEnv), 5)


# --- Open loop and returns -------------------------------------------------------------------------------------------


def test_error_and_replay_of_the_right_model(point):
    model_env, trajectories = ModelEnv(point, point.env), collect(point, make_vec_env(PointEnv, env_kwargs={"price": 0}), 100)
    error = error_by_step(model_env, trajectories, horizon=5)
    assert error.steps == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(error.rmse, 0, atol=1e-4)
    np.testing.assert_allclose(error.r2(), 1, atol=1e-4)
    result = replay(model_env, trajectories[0], horizon=8, n_particles=20)
    assert result.real.shape == result.mean.shape == result.std.shape == (8, 2)
    np.testing.assert_allclose(result.mean, result.real, atol=1e-4)
    np.testing.assert_allclose(result.real[:, 0], -trajectories[0].next_obs[:8, 0].abs())


def test_errors_are_in_units_of_all_real_data(point):
    """As in the log: those of the replay buffer, if there is one."""
    model_env, trajectories = ModelEnv(point, point.env), collect(point, make_vec_env(PointEnv, env_kwargs={"price": 0}), 100)
    own = concatenate(trajectories)
    for data in (own, Transitions(own.obs * 3, own.actions, own.next_obs, own.rewards * 2, own.terminated)):
        scale = error_by_step(model_env, trajectories, horizon=2).scale
        expected = np.stack([data.rewards.double().std(correction=0), data.obs.double().std(correction=0)])
        np.testing.assert_allclose(scale, expected, rtol=1e-5)
        for obs, reward in zip(own.obs * 3, own.rewards * 2, strict=True):
            point.replay_buffer.add(obs[None].numpy(), obs[None].numpy(), np.zeros((1, 1)), reward.numpy(), np.zeros(1), [{}])


def test_replay_spreads_with_the_models_noise(point):
    with_known_model(point, [[0.0, 0.0], [0.0, 0.5]], sigma=0.1)
    (trajectory, *_) = collect(point, make_vec_env(PointEnv, env_kwargs={"price": 0}), 20)
    result = replay(ModelEnv(point, point.env), trajectory, n_particles=4_000)
    steps = np.arange(1, len(result.std) + 1)
    np.testing.assert_allclose(result.std[:, 1], 0.1 * np.sqrt(steps), rtol=0.1)


def test_returns_of_the_right_model_are_the_real_ones(point):
    # Without exploration, which would differ
    point.actor.forward = lambda obs, deterministic=False: point.actor.get_action_dist_params(obs)[0].tanh()
    trajectories = collect(point, make_vec_env(PointEnv, env_kwargs={"price": 0}, seed=3), 200)
    result = returns(ModelEnv(point, point.env), trajectories, horizon=7, n_starts=50, n_rollouts=2)
    np.testing.assert_allclose(result.model, result.real, atol=1e-3)
    np.testing.assert_allclose(result.model_std, 0, atol=1e-3)
    assert result.correlation() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(result.model_curves.mean(axis=0), result.real_curve, atol=1e-2)


def test_returns_end_at_terminal_states_and_leave_out_what_was_cut_off(point):
    """Real: 3 steps to a terminal state, and 2 that were cut off. x' = x + a / 2."""

    def piece(obs, terminated):
        obs = th.tensor(obs)[:, None]
        n = len(obs) - 1
        ends = th.zeros(n, dtype=th.bool)
        ends[-1] = terminated
        return Transitions(obs[:-1], th.ones(n, 1), obs[1:], -obs[1:, 0].abs(), ends)

    point.actor.forward = lambda obs, deterministic=False: th.ones(len(obs), 1)
    done, cut = piece([2.9, 3.4, 3.9, 4.4], True), piece([1.0, 1.5, 2.0], False)
    result = returns(ModelEnv(point, point.env), [done, cut], horizon=5, n_rollouts=2)
    np.testing.assert_allclose(result.real, [-11.7, -8.3, -4.4], rtol=1e-5)
    np.testing.assert_allclose(result.model, [-11.7, -8.3, -4.4], atol=1e-3)
    # At even distances
    long = piece(np.linspace(0, 3, 101).tolist(), False)
    chosen = returns(ModelEnv(point, point.env), [long], horizon=1, n_starts=5, n_rollouts=2)
    np.testing.assert_allclose(chosen.real, -np.linspace(0, 3, 101)[[1, 25, 50, 75, 100]], rtol=0.02)
    result = returns(ModelEnv(point, point.env), [done, cut], horizon=2, n_rollouts=2)
    np.testing.assert_allclose(result.real, [-7.3, -8.3, -4.4, -3.5], rtol=1e-5)
    with pytest.raises(ValueError, match=r"No trajectory is 3 steps long.*the longest has 2"):
        returns(ModelEnv(point, point.env), [cut], horizon=3)


def test_correlation_of_returns_that_do_not_vary():
    from sb3_mbpo.diagnostics import Returns

    flat = np.zeros(3)
    assert np.isnan(Returns(flat, flat, flat, flat, flat[None]).correlation())


# --- Terminations ----------------------------------------------------------------------------------------------------


def transitions_of(obs, actions, terminated):
    obs, actions = th.tensor(obs)[:, None], th.tensor(actions)[:, None]
    return Transitions(obs, actions, obs + actions, th.zeros(len(obs)), th.tensor(terminated))


def test_terminations_of_a_model_that_falls_short(point):
    """It moves half as far as the environment, whose episodes end beyond 4."""
    trajectories = [
        transitions_of([2.0, 3.2], [1.0, 1.0], [False, True]),
        transitions_of([2.5, 3.8, 3.9], [1.0, -1.0, 1.0], [False, False, True]),
    ]
    measured = terminations(ModelEnv(point, point.get_env()), trajectories)
    assert measured.real.tolist() == [False, True, False, False, True]
    assert measured.model == pytest.approx([0, 0, 0, 0, 1])
    assert measured.foreseen() == pytest.approx(0.5) and measured.invented() == 0


def test_terminations_are_probabilities(point):
    """Means of 4 and 3.6, with a standard deviation of 0.4: beyond 4 in a half and in 15.9 %."""
    agent = with_known_model(point, [[0.0, 0.0], [0.0, 0.5]], sigma=0.4)
    trajectories = [transitions_of([3.5, 3.1, 3.1], [1.0, 1.0, 1.0], [True, False, False])]
    measured = terminations(ModelEnv(agent, agent.get_env()), trajectories, n_samples=4_000)
    assert measured.foreseen() == pytest.approx(0.5, abs=0.03)
    assert measured.invented() == pytest.approx(2 * 0.1587, abs=0.04)


def test_terminations_where_nothing_ended_or_nothing_is_predicted(point):
    agent = with_known_model(point, [[0.0, 0.0], [0.0, 0.5]], drift=[0.0, float("nan")])
    measured = terminations(ModelEnv(agent, agent.get_env()), [transitions_of([9.0, 9.0], [1.0, 1.0], [False, False])])
    assert measured.model.tolist() == [0, 0] and np.isnan(measured.foreseen()) and measured.invented() == 0


def test_constant_dimensions_are_not_shown():
    obs = th.tensor([[0.0, 1, 2, 3, 4, 5, 6], [1.0, 1, 2, 0, 0, 0, 0]])
    assert varying_columns(obs) == [0, 3, 4, 5]
    assert varying_columns(obs[:1]) == []
    r2 = th.tensor([[0.9, 0.8, float("nan"), 0.7], [0.5, 0.4, float("nan"), 0.3]])
    figure = plot_dimensions(SimpleNamespace(steps=[1, 2], r2=lambda: r2))
    (ax,) = figure.axes
    # Steps 1 and 2 of the reward and of dimensions 0 and 2
    assert len(ax.patches) == 6 and [label.get_text() for label in ax.get_xticklabels()] == ["r", "0", "2"]


# --- Policy shift ----------------------------------------------------------------------------------------------------


def test_policy_shift_on_known_policies():
    """x' = x + a / 2: the divergence of policies that differ in a bias is known, and models of more data are better."""
    agent = make_agent(PointEnv(), model_hidden_sizes=[32, 32], model_gradient_steps=0.1)
    # The same spread in all states, so that the divergence is, too
    with th.no_grad():
        agent.actor.log_std.weight.zero_()
    others = [make_agent(PointEnv()) for _ in range(2)]
    for other, bias in zip(others, (0.0, 0.3), strict=True):
        other.policy.load_state_dict(agent.policy.state_dict())
        with th.no_grad():
            other.actor.mu.bias += bias
    env = make_vec_env(PointEnv, seed=0)
    data = concatenate(collect(agent, env, 1_500))
    before = {name: tensor.clone() for name, tensor in agent.policy.state_dict().items()}
    shift = policy_shift(agent, data, others, env, data_sizes=(6, 1_500), n_steps=200)
    assert shift.data_sizes == [6, 1_500] and shift.error.shape == shift.model_error.shape == (2, 3)
    _, std = gaussian_of(agent, data.obs)
    expected = ((0.3 / std) ** 2 / 2).mean().item()
    np.testing.assert_allclose(shift.kl, [0, 0, expected], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(shift.shift[2], np.sqrt(expected / 2), rtol=1e-3)
    assert (shift.error[1] < 0.5 * shift.error[0]).all()
    assert ((shift.model_error >= 0) & (shift.model_error <= 1)).all() and len(shift.slopes()) == 2
    for name, tensor in agent.policy.state_dict().items():
        assert th.equal(tensor, before[name])
    with pytest.raises(ValueError, match=r"`data` has 1500 transitions.*1501"):
        policy_shift(agent, data, others, env, data_sizes=(1_501,))
    with pytest.raises(ValueError, match="`policies` are all the same as the agent's"):
        policy_shift(agent, data, others[:1], env, data_sizes=(20,))


def test_numbers_of_policy_shift(monkeypatch):
    """Worked out anew, in float64, from the same data: a model that is wrong by more, the further an action is from 0."""
    # The package has a function of this name
    module = importlib.import_module("sb3_mbpo.diagnostics.policy_shift")
    agent, other = make_agent(PointEnv()), make_agent(PointEnv(), seed=1)
    sigma, rows, known = 0.2, [], linear_ensemble([[0.0, 0.0], [0.0, 0.6]], 0.2)
    collect_ = module.collect

    def watched(*args):
        rows.append(concatenate(collect_(*args)))
        return [rows[-1]]

    monkeypatch.setattr(module, "collect", watched)
    monkeypatch.setattr(module, "Ensemble", lambda *args: known)
    monkeypatch.setattr(module, "fit", lambda *args: None)
    env = make_vec_env(PointEnv, seed=0)
    data = concatenate(collect(agent, env, 300))
    shift = policy_shift(agent, data, [other], env, data_sizes=(300,), n_steps=200)

    def residuals(transitions):
        obs, actions, next_obs, rewards, _ = (column.double().numpy() for column in transitions)
        return np.stack([rewards, (next_obs - obs - 0.6 * actions)[:, 0]], axis=1)

    def nll(transitions):
        return (residuals(transitions) ** 2).sum(axis=1).mean() / (2 * sigma**2)

    scale = (data.next_obs - data.obs).double().std(correction=0).item()
    errors = [np.abs(residuals(new)[:, 1]).mean() / scale for new in rows]
    np.testing.assert_allclose(shift.error, [errors], rtol=1e-3)
    # Pinsker's bound of what the likelihood lacks
    expected = [min(np.sqrt(max(nll(new) - nll(data), 0) / 2), 1) for new in rows]
    np.testing.assert_allclose(shift.model_error, [expected], rtol=1e-2, atol=1e-3)
    assert shift.slopes() == [pytest.approx(np.polyfit(shift.shift, errors, 1)[0], rel=1e-3)]
    slope = np.polyfit(shift.shift, shift.model_error[0], 1)[0]
    assert shift.slopes("model_error") == [pytest.approx(slope, rel=1e-3)]


@pytest.mark.parametrize("use_sde", [False, True])
def test_continued_policies_move_on_and_the_agent_stays(use_sde, tmp_path):
    agent = make_agent(use_sde=use_sde).learn(130)
    agent.save(tmp_path / "before")
    agent.save_replay_buffer(tmp_path / "buffer")
    loaded = MBPO.load(tmp_path / "before", env=gym.make("Pendulum-v1"))
    loaded.load_replay_buffer(tmp_path / "buffer")
    for each in (agent, loaded):
        policies = continued(ModelEnv(each, each.env), n_policies=3, updates=5)
        assert [policy._n_updates - each._n_updates for policy in policies] == [5, 10, 15]
        assert each.model_buffer.size() > 0
        weights = [next(policy.actor.mu.parameters()).detach().clone() for policy in [each, *policies]]
        assert all(not th.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert_same_parameters(agent, MBPO.load(tmp_path / "before"))


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_values_beside_returns_worked_out_by_hand(normalize):
    """gamma 1/2 and a fixed entropy coefficient: G_t = r_t + (G_{t+1} - 0.1 log pi(a_{t+1})) / 2."""
    env = make_vec_env(CountingEnv)
    env = VecNormalize(env) if normalize else env
    agent = make_agent(env, gamma=0.5, ent_coef=0.1).learn(70)
    obs = th.arange(4.0)[:, None].repeat(1, 2)
    actions, rewards = th.tensor([[0.1], [-0.2], [0.3]]), th.tensor([1.0, 2.0, 4.0])
    done = Transitions(obs[:-1], actions, obs[1:], rewards, th.tensor([False, False, True]))
    check = value_check(agent, [done])
    seen = env.normalize_obs(obs[:-1].numpy()) if normalize else obs[:-1].numpy()
    scaled = env.normalize_reward(rewards.numpy()) if normalize else rewards.numpy()
    with th.no_grad():
        mean, log_std, _ = agent.actor.get_action_dist_params(th.as_tensor(seen, dtype=th.float32))
        q = th.stack(agent.critic(th.as_tensor(seen, dtype=th.float32), actions)).amin(dim=0)[:, 0]
    gaussian = np.arctanh(actions[:, 0].numpy().astype(np.float64))
    z = (gaussian - mean[:, 0].double().numpy()) / log_std[:, 0].double().exp().numpy()
    log_pi = -(z**2) / 2 - log_std[:, 0].numpy() - np.log(2 * np.pi) / 2 - np.log(1 - actions[:, 0].numpy() ** 2)
    third = scaled[2]
    second = scaled[1] + (third - 0.1 * log_pi[2]) / 2
    first = scaled[0] + (second - 0.1 * log_pi[1]) / 2
    np.testing.assert_allclose(check.returns, [first, second, third], rtol=1e-4)
    np.testing.assert_allclose(check.q_real, q, rtol=1e-5)
    assert check.bias() == pytest.approx((q.numpy() - [first, second, third]).mean(), rel=1e-4)
    assert len(check.q_model) == 1_000


def test_what_was_cut_off_counts_as_the_critics_say():
    """With gamma 0.9 the rest weighs no more than half from seven steps on: two of eight states have so many."""
    agent = make_agent(CountingEnv(), gamma=0.9, ent_coef=0.1)
    obs = th.arange(9.0)[:, None].repeat(1, 2)
    cut = Transitions(obs[:-1], th.zeros(8, 1), obs[1:], th.ones(8), th.zeros(8, dtype=th.bool))
    agent.actor.action_log_prob = lambda obs: (th.full((1, 1), 0.2), th.tensor([-0.7]))
    with th.no_grad():
        last = th.stack(agent.critic(obs[-1:], th.full((1, 1), 0.2))).amin().item() + 0.1 * 0.7
        mean, log_std, _ = agent.actor.get_action_dist_params(obs[:-1])
    bonus = 0.1 * ((mean[:, 0] / log_std[:, 0].exp()).square() / 2 + log_std[:, 0] + np.log(2 * np.pi) / 2).double().numpy()
    second = 1 + sum(0.9**i * (1 + bonus[1 + i]) for i in range(1, 7)) + 0.9**7 * last
    first = 1 + 0.9 * (second + bonus[1])
    check = value_check(agent, [cut])
    np.testing.assert_allclose(check.returns, [first, second], rtol=1e-5)
    assert len(check.q_real) == 2 and len(check.q_model) == 0
    short = Transitions(*(column[:6] for column in cut))
    with pytest.raises(ValueError, match=r"has 7 steps.*the longest has 6"):
        value_check(agent, [short])


def test_without_a_discount_only_what_has_ended_counts():
    agent = make_agent(CountingEnv(), gamma=1.0)
    obs = th.arange(9.0)[:, None].repeat(1, 2)
    cut = Transitions(obs[:-1], th.zeros(8, 1), obs[1:], th.ones(8), th.zeros(8, dtype=th.bool))
    with pytest.raises(ValueError, match="No trajectory ends in a terminal state"):
        value_check(agent, [cut])
    cut.terminated[-1] = True
    assert len(value_check(agent, [cut]).returns) == 8
