"""Diagnostics in the midst of a training."""

from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_mbpo.diagnostics import DiagnosticsCallback, error_by_step, returns, value_check
from tests.agents import make_agent
from tests.envs import CountingEnv, GoalEnv
from tests.test_save_load import assert_same_parameters


@pytest.mark.parametrize("make_env, policy", [(CountingEnv, "MlpPolicy"), (GoalEnv, "MultiInputPolicy")])
def test_callback_writes_numbers_and_figures(make_env, policy, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent = make_agent(make_env(), policy, tensorboard_log=str(tmp_path), model_train_freq=30, gamma=0.5)
    agent.learn(160, callback=DiagnosticsCallback(freq=30, horizon=5, return_horizon=5), log_interval=1)
    events = EventAccumulator(str(tmp_path / "MBPO_1"))
    events.Reload()
    n_dims = agent.dynamics.weights[-1].shape[2] // 2
    scalars, images = set(events.Tags()["scalars"]), set(events.Tags()["images"])
    names = ["reward", *(f"obs[{i}]" for i in range(n_dims - 1))]
    assert {f"diagnostics/rmse_{name}" for name in names} <= scalars
    # Of what changes by the same amount in every step, nothing is to be explained
    changes = ["obs[4]"] if make_env is GoalEnv else ["reward"]
    assert {f"diagnostics/r2_{name}" for name in changes} <= scalars
    assert {
        f"diagnostics/{name}" for name in ("q_real", "q_model", "returns", "q_bias", "real_return", "model_return")
    } <= scalars
    assert images == {f"figures/{name}" for name in ("error", "dimensions", "replay", "values", "exploitation")}


def test_callback_writes_at_once(tmp_path):
    """However rarely SB3 writes its log, and with the steps at which it was measured."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent = make_agent(tensorboard_log=str(tmp_path), model_train_freq=30)
    agent.learn(185, callback=DiagnosticsCallback(freq=50), log_interval=1_000)
    events = EventAccumulator(str(tmp_path / "MBPO_1"))
    events.Reload()
    assert [event.step for event in events.Scalars("diagnostics/rmse_reward")] == [91, 151]
    assert [event.step for event in events.Images("figures/error")] == [91, 151]


def test_values_are_not_of_the_random_warm_up(monkeypatch):
    """Whose actions the policy would not take."""
    seen = []

    def watched(agent, trajectories):
        seen.append(th.cat([each.obs for each in trajectories]))
        return value_check(agent, trajectories)

    monkeypatch.setattr("sb3_mbpo.diagnostics.callback.value_check", watched)
    agent = make_agent(model_train_freq=30, gradient_steps=0).learn(155, callback=DiagnosticsCallback(freq=30))
    stored = agent.replay_buffer.observations[:, 0]
    # 60 random steps; measured at 91, 121 and 151, whose last transition is not stored yet
    assert [len(obs) for obs in seen] == [30, 60, 90]
    assert (seen[-1].numpy() == stored[60:150]).all()


def test_callback_measures_before_the_model_is_trained(monkeypatch):
    """On what it has not seen; at most every `freq` steps."""
    seen = []

    def watched(model_env, trajectories, horizon):
        agent = model_env.agent
        seen.append((agent.lifetime_timesteps, agent.dynamics.n_fits.item(), sum(len(each.obs) for each in trajectories)))
        return error_by_step(model_env, trajectories, horizon)

    monkeypatch.setattr("sb3_mbpo.diagnostics.callback.error_by_step", watched)
    make_agent(model_train_freq=30, gradient_steps=0).learn(185, callback=DiagnosticsCallback(freq=50))
    # Trained at 61, 91, 121, 151 and 181
    # The last transition is not stored yet
    assert seen == [(91, 1, 29), (151, 3, 29)]
    with pytest.raises(ValueError, match="must be 1 or more"):
        DiagnosticsCallback(freq=0)


def test_numbers_in_the_log_are_those_measured(monkeypatch):
    """Each under its name, and with its sign."""
    from stable_baselines3.common.logger import Logger

    measured, logged = {}, {}
    for name, function in (("error_by_step", error_by_step), ("returns", returns), ("value_check", value_check)):

        def watched(*args, name=name, function=function):
            measured[name] = function(*args)
            return measured[name]

        monkeypatch.setattr(f"sb3_mbpo.diagnostics.callback.{name}", watched)
    record = Logger.record

    def watched_record(self, key, value, exclude=None):
        if key.startswith("diagnostics/"):
            logged[key.removeprefix("diagnostics/")] = value
        record(self, key, value, exclude)

    monkeypatch.setattr(Logger, "record", watched_record)
    agent = make_agent(CountingEnv(noise=1.0), model_train_freq=30, gamma=0.5)
    agent.learn(95, callback=DiagnosticsCallback(freq=30, horizon=5, return_horizon=5))
    error, found, check = (measured[name] for name in ("error_by_step", "returns", "value_check"))
    expected = {
        "rmse_reward": error.rmse[0, 0],
        "r2_reward": error.r2()[0, 0],
        **{f"rmse_obs[{i}]": error.rmse[0, 1 + i] for i in range(error.rmse.shape[1] - 1)},
        "q_real": check.q_real.mean(),
        "q_model": check.q_model.mean(),
        "returns": check.returns.mean(),
        "q_bias": check.q_real.mean() - check.returns.mean(),
        "real_return": found.real.mean(),
        "model_return": found.model.mean(),
    }
    if not np.isnan(found.correlation()):
        expected["return_correlation"] = np.corrcoef(found.real, found.model)[0, 1]
    assert logged.keys() == expected.keys()
    documented = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text()
    assert all(f"`diagnostics/{name}`" in documented for name in expected if name != "rmse_obs[1]")
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}, {"real_ratio": 1.0}])
def test_the_training_does_not_notice(kwargs):
    """Neither its random numbers nor what gSDE explores with."""
    agents = []
    for callback in (None, DiagnosticsCallback(freq=30, horizon=5, return_horizon=5)):
        env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
        agent = make_agent(env, model_train_freq=30, train_freq=8, **kwargs)
        agents.append(agent.learn(184, callback=callback))
    without, with_it = agents
    assert_same_parameters(without, with_it)
    np.testing.assert_array_equal(without.replay_buffer.observations[:92], with_it.replay_buffer.observations[:92])


def test_without_a_model_values_are_measured(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent = make_agent(CountingEnv(), real_ratio=1.0, gamma=0.5, tensorboard_log=str(tmp_path))
    agent.learn(140, callback=DiagnosticsCallback(freq=30))
    events = EventAccumulator(str(tmp_path / "MBPO_1"))
    events.Reload()
    scalars = {name for name in events.Tags()["scalars"] if name.startswith("diagnostics/")}
    assert scalars == {f"diagnostics/{name}" for name in ("q_real", "returns", "q_bias")}
    assert [event.step for event in events.Scalars("diagnostics/q_bias")] == [91, 121]


@pytest.mark.parametrize("columns", [[0, 3], [-1]])
def test_dimensions_that_there_are_not(columns):
    with pytest.raises(ValueError, match=rf"`columns` must be dimensions .* from 0 to 2, not {columns[-1]}"):
        make_agent("Pendulum-v1").learn(10, callback=DiagnosticsCallback(columns=columns))


def test_one_callback_for_two_agents(monkeypatch):
    seen = []

    def watched(model_env, *args):
        seen.append(model_env.agent)
        return error_by_step(model_env, *args)

    monkeypatch.setattr("sb3_mbpo.diagnostics.callback.error_by_step", watched)
    callback = DiagnosticsCallback(freq=30, horizon=2)
    agents = [make_agent(model_train_freq=30).learn(95, callback=callback) for _ in range(2)]
    assert seen == agents
