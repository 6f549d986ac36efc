"""Diagnostics of a trained agent, on systems whose answers are known."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo import MBPO
from sb3_mbpo.diagnostics import (
    collect,
    continued,
    error_by_step,
    policy_shift,
    replay,
    returns,
    value_check,
)
from sb3_mbpo.diagnostics.__main__ import Measured, main, parser
from sb3_mbpo.diagnostics.live import gaussian_of
from sb3_mbpo.dynamics.rollouts import Transitions
from sb3_mbpo.model_env import ModelEnv
from tests.agents import make_agent
from tests.envs import CountingEnv, GoalEnv, PointEnv
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
    own = Transitions(*map(th.cat, zip(*trajectories, strict=True)))
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


# --- Policy shift ----------------------------------------------------------------------------------------------------


def test_policy_shift_on_known_policies():
    """x' = x + a / 2: the divergence of policies that differ in a bias is known, and models of more data are better."""
    agent = make_agent(PointEnv(), model_hidden_sizes=[32, 32])
    # The same spread in all states, so that the divergence is, too
    with th.no_grad():
        agent.actor.log_std.weight.zero_()
    others = [make_agent(PointEnv()) for _ in range(2)]
    for other, bias in zip(others, (0.0, 0.3), strict=True):
        other.policy.load_state_dict(agent.policy.state_dict())
        with th.no_grad():
            other.actor.mu.bias += bias
    env = make_vec_env(PointEnv, seed=0)
    data = Transitions(*map(th.cat, zip(*collect(agent, env, 1_500), strict=True)))
    before = {name: tensor.clone() for name, tensor in agent.policy.state_dict().items()}
    shift = policy_shift(agent, data, others, env, data_sizes=(20, 1_500), n_steps=200)
    assert shift.data_sizes == [20, 1_500] and shift.error.shape == shift.model_error.shape == (2, 3)
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
        rows.append(Transitions(*map(th.cat, zip(*collect_(*args), strict=True))))
        return [rows[-1]]

    monkeypatch.setattr(module, "collect", watched)
    monkeypatch.setattr(module, "Ensemble", lambda *args: known)
    monkeypatch.setattr(module, "fit", lambda *args: None)
    env = make_vec_env(PointEnv, seed=0)
    data = Transitions(*map(th.cat, zip(*collect(agent, env, 300), strict=True)))
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


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files of a small agent in Hopper, whose episodes end."""
    folder = tmp_path_factory.mktemp("trained")
    agent = make_agent("Hopper-v5", learning_starts=400, model_train_freq=200, model_max_epochs=3).learn(650)
    agent.save(folder / "agent")
    agent.save_replay_buffer(folder / "buffer")
    agent.train(50, agent.batch_size)
    agent.save(folder / "later")
    return folder


COMMON = ["--env", "Hopper-v5", "--steps", "300", "--return-horizon", "20", "--horizon", "4"]


def test_commands_in_another_process(trained, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sb3_mbpo.diagnostics",
        "open-loop",
        str(trained / "agent.zip"),
        *COMMON,
        "--out",
        "figures",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.split() and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"] and all(np.isfinite(float(value)) for row in rows for value in row)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"open_loop.png", "dimensions.png", "replay.png"}


def test_exploitation_and_policy_shift(trained, tmp_path, capsys):
    main(["exploitation", str(trained / "agent.zip"), *COMMON, "--out", str(tmp_path)])
    assert "Return of 20 steps from" in capsys.readouterr().out
    shift = ["policy-shift", str(trained / "agent.zip"), *COMMON, "--out", str(tmp_path), "--data-sizes", "100", "300"]
    main([*shift, "--replay-buffer", str(trained / "buffer.pkl")])
    printed = capsys.readouterr().out
    assert "d error / d policy shift:" in printed and "error, 300" in printed
    main([*shift, "--later", str(trained / "later.zip")])
    assert {path.name for path in tmp_path.iterdir()} == {"exploitation.png", "policy_shift.png"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["policy-shift", "{agent}", "--env", "Hopper-v5", "--steps", "50"], "needs --replay-buffer"),
        (["open-loop", "{agent}", "--env", "Walker2d-v5"], "Observation spaces do not match"),
        (["open-loop", "nothing.zip", "--env", "Hopper-v5"], "neither a file"),
        (["open-loop", "{agent}", "--env", "Nonsense-v0"], "Nonsense"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--env-kwargs", '{"nope": 1}'], "env-kwargs .*nope"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--gym-packages", "nopkg"], "nopkg"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--replay-buffer", "missing.pkl"], "There is no file missing.pkl$"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--vec-normalize", "{buffer}"], "no statistics of VecNormalize"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--out", "{agent}"], "exists"),
    ],
)
def test_errors_of_commands(trained, tmp_path, arguments, message):
    files = {"{agent}": trained / "agent.zip", "{buffer}": trained / "buffer.pkl"}
    arguments = [str(files.get(argument, argument)) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        main(arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path)])


@pytest.mark.parametrize("argument", ["--steps", "--horizon", "--return-horizon", "--data-sizes", "--columns", "--seed"])
def test_numbers_of_commands(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["open-loop", "agent.zip", "--env", "Hopper-v5", argument, "-1"])
    assert f"argument {argument}: must be" in capsys.readouterr().err


def test_measured_on_episodes_that_no_agent_was_trained_on(tmp_path):
    """Loading an agent seeds all with its own seed: neither it nor a later agent may do so before episodes begin."""
    agent = make_agent("Pendulum-v1", seed=0).learn(450)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer")
    arguments = ["policy-shift", str(tmp_path / "agent.zip"), "--env", "Pendulum-v1", "--steps", "300"]
    starts = {}
    for seed in ("0", "0", "1"):
        more = ["--later", str(tmp_path / "agent.zip"), "--seed", seed]
        measured = Measured(parser().parse_args([*arguments, *more]))
        rows = [tuple(trajectory.obs[0].tolist()) for trajectory in measured.trajectories]
        # Also those that are collected afterwards
        rows += [tuple(trajectory.obs[0].tolist()) for trajectory in collect(measured.agent, measured.env, 300)]
        assert starts.setdefault(seed, rows) == rows and len(set(rows)) == 4
    known = {tuple(row) for row in agent.replay_buffer.observations[:450, 0].tolist()}
    assert not (set(starts["0"]) | set(starts["1"])) & known and not set(starts["0"]) & set(starts["1"])


def test_statistics_that_are_forgotten(tmp_path):
    """The policy would see raw numbers."""
    agent = make_agent(VecNormalize(make_vec_env("Pendulum-v1"))).learn(70)
    agent.save(tmp_path / "agent")
    with pytest.raises(SystemExit, match="was trained in VecNormalize: pass its statistics with --vec-normalize"):
        main(["open-loop", str(tmp_path / "agent.zip"), "--env", "Pendulum-v1", "--out", str(tmp_path)])


def test_statistics_of_later_agents(trained):
    """There is one file for them all, which would make policies that never were."""
    both = ["--later", str(trained / "later.zip"), "--vec-normalize", str(trained / "buffer.pkl")]
    with pytest.raises(SystemExit, match="--later does not go with --vec-normalize"):
        main(["policy-shift", str(trained / "agent.zip"), *COMMON, *both])


@pytest.mark.parametrize("normalize", [False, True])
def test_an_agent_that_was_trained_in_two_environments(normalize, tmp_path):
    """Its replay buffer has a column for each."""
    env = make_vec_env("Pendulum-v1", n_envs=2)
    env = VecNormalize(env) if normalize else env
    agent = make_agent(env).learn(140)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer")
    more = ["--replay-buffer", str(tmp_path / "buffer.pkl")]
    if normalize:
        env.save(str(tmp_path / "normalize.pkl"))
        more += ["--vec-normalize", str(tmp_path / "normalize.pkl")]
    arguments = [str(tmp_path / "agent"), "--env", "Pendulum-v1", "--steps", "100", "--data-sizes", "100"]
    main(["policy-shift", *arguments, *more, "--out", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "policy_shift.png").stat().st_size > 10_000


def test_a_model_that_was_never_trained(tmp_path):
    make_agent().save(tmp_path / "agent")
    with pytest.raises(SystemExit, match="has not been trained yet"):
        main(["open-loop", str(tmp_path / "agent"), "--env", "Pendulum-v1", "--out", str(tmp_path)])


def test_vec_normalize_and_environment_arguments(tmp_path):
    env = VecNormalize(make_vec_env("Pendulum-v1", env_kwargs={"g": 5.0}))
    agent = make_agent(env).learn(70)
    agent.save(tmp_path / "agent")
    env.save(str(tmp_path / "normalize.pkl"))
    arguments = ["--env", "Pendulum-v1", "--env-kwargs", json.dumps({"g": 5.0}), "--steps", "200"]
    main(
        [
            "open-loop",
            str(tmp_path / "agent"),
            *arguments,
            "--vec-normalize",
            str(tmp_path / "normalize.pkl"),
            "--out",
            str(tmp_path),
        ]
    )
    assert (tmp_path / "replay.png").stat().st_size > 10_000


# --- The report, in a browser ----------------------------------------------------------------------------------------


def browser():
    """Chromium or Chrome, from the system."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    raise FileNotFoundError("This test opens a page in a browser: install chromium (Debian: apt-get install chromium)")


@pytest.mark.parametrize("with_buffer", [True, False])
def test_report_in_a_browser(trained, tmp_path, with_buffer):
    """Complete in itself, and legible on a telephone."""
    from playwright.sync_api import sync_playwright

    more = ["--replay-buffer", str(trained / "buffer.pkl"), "--data-sizes", "100", "300"] if with_buffer else []
    main(["report", str(trained / "agent.zip"), *COMMON, "--out", str(tmp_path), *more])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        for width, height in ((390, 844), (1280, 800)):
            page = chromium.new_page(viewport={"width": width, "height": height})
            problems, requests = [], []
            page.on("pageerror", lambda error, problems=problems: problems.append(error))
            page.on("console", lambda message, problems=problems: problems.append(message.text))
            page.on("request", lambda request, requests=requests: requests.append(request.url))
            page.goto(Path(tmp_path / "report.html").as_uri())
            assert problems == [] and all(url.startswith(("file:", "data:")) for url in requests)
            # Nothing sticks out
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            sizes = page.eval_on_selector_all("img", "images => images.map(image => [image.naturalWidth, image.clientWidth])")
            assert len(sizes) == 5 + with_buffer and all(natural > 0 for natural, _ in sizes)
            # The figures' letters of 10 points are at least 8 pixels high
            assert all(10 * shown / (4.2 * 72) >= 8 for _, shown in sizes)
            text = page.inner_text("body")
            assert "median R²" in text and "nan" not in text.lower().replace("nanos", "")
            assert ("k* =" in text) == with_buffer and ("It needs --replay-buffer" in text) != with_buffer
        chromium.close()


def test_report_of_a_reward_that_does_not_vary(tmp_path, capsys):
    """InvertedPendulum, as long as it stands: neither words nor letters in figures say nan."""
    import base64
    import re

    agent = make_agent("InvertedPendulum-v5", learning_starts=100).learn(160)
    agent.save(tmp_path / "agent")
    arguments = [str(tmp_path / "agent.zip"), "--env", "InvertedPendulum-v5", "--steps", "5", "--return-horizon", "2"]
    main(["report", *arguments, "--horizon", "2", "--out", str(tmp_path)])
    main(["open-loop", *arguments, "--horizon", "2", "--out", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    figures = [base64.b64decode(data).decode() for data in re.findall(r"svg\+xml;base64,([^\"]+)", page)]
    # Matplotlib draws letters as paths, and says in a comment which
    assert len(figures) >= 4 and "The reward did not vary" in page
    assert not any("<!-- nan" in figure.lower() or "correlation nan" in figure for figure in figures)
    assert "R² nan" not in page and not re.search(r"\bnan\b", capsys.readouterr().out)
