"""The diagnostics and the report speak of DHMBPO, too."""

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.common.buffers import recent_trajectories
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.diagnostics import DiagnosticsCallback
from sb3_mbpo.diagnostics.__main__ import main
from sb3_mbpo.diagnostics.policy_shift import continued
from sb3_mbpo.diagnostics.trajectories import collect
from sb3_mbpo.diagnostics.values import q_values, value_check
from tests.test_dhmbpo import make, parameters


@pytest.fixture(scope="module")
def trained():
    agent = make(model_gradient_steps=1.0, gamma=0.9)
    agent.learn(300)
    return agent


def test_values(trained):
    trajectories = collect(trained, trained.env, 250)
    check = value_check(trained, trajectories)
    assert len(check.q_model) == 1_000 and np.isfinite(check.q_model).all()
    # Of generated states, with actions of the policy
    th.manual_seed(0)
    obs, actions = trained.sample_generated(50)
    states = {tuple(row) for row in trained.model_buffer.states[: trained.model_buffer.size()].tolist()}
    assert {tuple(row) for row in obs.tolist()} <= states and actions.abs().max() <= 1


def test_what_the_actor_promises(trained):
    """A rollout that ends at once promises its first reward alone, with the entropy of its action."""
    agent = make(gamma=0.9, termination_fn=lambda obs, action, next_obs: np.ones(len(action), dtype=bool), ent_coef=0.3)
    with pytest.warns(UserWarning, match="`termination_fn` disagrees"):
        agent.learn(100)
    obs = agent.real_states[:40]
    th.manual_seed(1)
    promised = agent.promised_values(obs)
    th.manual_seed(1)
    noise = [agent._draw_rollout(3, len(part)) for part in obs.split(16)]
    states = obs.split(16)
    for part, noise_of_part, own in zip(states, noise, promised.split(16), strict=True):
        mean, log_std = agent.actor.gaussian(part)
        before = mean + log_std.exp() * noise_of_part.actions[0]
        log_prob = th.distributions.Normal(mean, log_std.exp()).log_prob(before) - th.log(1 - before.tanh() ** 2 + 1e-6)
        inputs = th.cat([part, before.tanh()], dim=1)
        members = [
            int((noise_of_part.slots[0] == row).nonzero()) * 2 // len(noise_of_part.slots[0]) for row in range(len(part))
        ]
        rewards = agent.dynamics.predict(inputs)[0][agent.dynamics.elites.long()][members, range(len(part)), 0]
        th.testing.assert_close(own, rewards - 0.3 * log_prob.squeeze(1), rtol=1e-4, atol=1e-4)
    check = value_check(trained, collect(trained, trained.env, 250))
    assert len(check.promised) == len(check.gained) == len(check.returns)
    # The entropy in the state itself is not in the value of an action
    assert (check.gained != check.returns).all()


def test_policy_goes_on_without_new_data(trained):
    before, size, states = parameters(trained), trained.replay_buffer.size(), trained.model_buffer.states.clone()
    policies = continued(trained.model_env, n_policies=2, updates=3)
    assert len(policies) == 2 and all((parameters(policy) != before).any() for policy in policies)
    assert (parameters(policies[0]) != parameters(policies[1])).any()
    # The agent is as it was, its buffer of states too
    assert (parameters(trained) == before).all() and trained.replay_buffer.size() == size
    assert (trained.model_buffer.states == states).all() and trained.model_env.agent is trained
    assert policies[0].real_states is trained.real_states and policies[0].model_env.agent is policies[0]


def test_policy_goes_on_in_a_loaded_agent(trained, tmp_path):
    trained.save(tmp_path / "agent")
    trained.save_replay_buffer(tmp_path / "buffer")
    loaded = type(trained).load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    loaded.load_replay_buffer(tmp_path / "buffer")
    (policy,) = continued(ModelEnv(loaded, loaded.env), n_policies=1, updates=2)
    assert (parameters(policy) != parameters(loaded)).any()


def test_report(trained, tmp_path, capsys):
    trained.save(tmp_path / "agent")
    trained.save_replay_buffer(tmp_path / "buffer")
    options = ["--env", "Pendulum-v1", "--replay-buffer", str(tmp_path / "buffer.pkl"), "--steps", "250", "--horizon", "5"]
    main(["report", str(tmp_path / "agent.zip"), *options, "--data-sizes", "100", "--policy-shift", "--out", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "5 states from real ones on, 3 steps with gradients" in page
    for question in (
        *("For how many steps is it right?", "Does the policy exploit the model?", "Are Q-values right?"),
        "Does the actor get what its rollouts promise?",
    ):
        assert question in page
    assert "not measured" not in page and "Q-values of generated transitions are" in page
    assert "Written" in capsys.readouterr().out


@pytest.mark.parametrize("train_freq", [50, (2, "episode")])
def test_callback_measures_before_each_training(train_freq, tmp_path):
    # Episodes of 25 steps
    agent = make(gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 25), gamma=0.9, train_freq=train_freq)
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    times = []

    class Noted(DiagnosticsCallback):
        def _measure(self, now):
            times.append(now)
            super()._measure(now)

    agent.learn(300, callback=Noted(freq=100, horizon=3, return_horizon=10))
    # At the end of blocks, before what they brought is trained on
    assert times == [150, 250]
    table = pd.read_csv(tmp_path / "progress.csv")
    r2 = next(column for column in table if column.startswith("diagnostics/r2_") and "reward" not in column)
    assert table[r2].notna().sum() == 2
    assert {"diagnostics/q_bias", "diagnostics/model_return", "diagnostics/q_model", "diagnostics/promised"} <= set(table)


def test_diagnostics_do_not_disturb():
    plain = make(gamma=0.9)
    plain.learn(200)
    watched = make(gamma=0.9)
    watched.learn(200, callback=DiagnosticsCallback(freq=100, horizon=3))
    assert (parameters(plain) == parameters(watched)).all()


def test_values_are_in_the_environments_rewards():
    """`VecNormalize` changes nothing of what is learned, and nothing of what is said of it."""
    checks = []
    for normalises in (False, True):
        env = make_vec_env("Pendulum-v1", 1, seed=0)
        agent = make(VecNormalize(env, norm_obs=False) if normalises else env, gamma=0.9).learn(200)
        assert not agent.uses_vec_normalize
        trajectories = recent_trajectories(agent.replay_buffer, 100, "cpu", agent.get_vec_normalize_env())
        th.manual_seed(0)
        checks.append(value_check(agent, trajectories))
    np.testing.assert_allclose(checks[0].returns, checks[1].returns, rtol=1e-5)
    np.testing.assert_allclose(checks[0].q_real, checks[1].q_real, rtol=1e-5)
    np.testing.assert_allclose(checks[0].gained, checks[1].gained, rtol=1e-5)


def test_q_values_are_the_critics_mean(trained):
    obs, actions = trained.sample_generated(20)
    expected = th.stack([values.squeeze(1) for values in trained.critic(obs, actions)]).mean(dim=0)
    th.testing.assert_close(q_values(trained, obs, actions), expected)
