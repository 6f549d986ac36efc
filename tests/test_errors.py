"""What a user may do wrong, and what they are told: which argument, what it was, what is allowed."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mbpo import MBPO
from tests.agents import make_agent
from tests.envs import CountingEnv, FaultyEnv


@pytest.mark.parametrize(
    "argument, value",
    [
        ("ensemble_size", 0),
        ("ensemble_size", 2.5),
        ("ensemble_size", True),
        ("num_elites", 0),
        ("num_elites", "two"),
        ("num_elites", 4),
        ("model_hidden_sizes", []),
        ("model_hidden_sizes", [16, 0]),
        ("model_hidden_sizes", [16, 1.5]),
        ("model_hidden_sizes", 200),
        ("model_hidden_sizes", "200"),
        ("model_learning_rate", 0),
        ("model_learning_rate", -1e-3),
        ("model_learning_rate", float("nan")),
        ("model_learning_rate", "1e-3"),
        ("model_train_freq", 0),
        ("model_train_freq", None),
        ("rollout_batch_size", -5),
        ("model_retain_epochs", 0),
        ("real_ratio", -0.1),
        ("real_ratio", 1.01),
        ("real_ratio", float("nan")),
        ("real_ratio", None),
        ("real_ratio", "0.05"),
        ("rollout_schedule", [20_000, 100_000, 1]),
        ("rollout_schedule", [20_000, 100_000, 15, 1]),
        ("rollout_schedule", "20000"),
        ("termination_fn", "hopper"),
        ("reward_fn", 3),
    ],
)
def test_arguments(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`") as error:
        make_agent(**{argument: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, 0.05, np.float32(0.5), np.float64(1)])
def test_ratios_that_are_allowed(value):
    assert make_agent(real_ratio=value).real_ratio == value


class SpacesEnv(gym.Env):
    def __init__(self, observation_space=None, action_space=None):
        box = spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space, self.action_space = observation_space or box, action_space or box


@pytest.mark.parametrize(
    "space, help_",
    [
        (spaces.Dict(a=spaces.Box(-1, 1, (2,))), "FlattenObservation"),
        (spaces.Tuple([spaces.Box(-1, 1, (2,))]), "FlattenObservation"),
        (spaces.Discrete(5), "FlattenObservation"),
        (spaces.MultiBinary(3), "FlattenObservation"),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), "DtypeObservation"),
        (spaces.Box(-5, 5, (2,), np.int64), "DtypeObservation"),
    ],
    ids=str,
)
def test_observation_spaces(space, help_):
    with pytest.raises(ValueError, match="observation space") as error:
        MBPO("MlpPolicy", SpacesEnv(observation_space=space))
    assert str(space) in str(error.value) and help_ in str(error.value) and "Box" in str(error.value)


@pytest.mark.parametrize(
    "space", [spaces.Discrete(5), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(3), spaces.Box(-np.inf, 1, (2,))], ids=str
)
def test_action_spaces(space):
    with pytest.raises(ValueError, match="action space") as error:
        MBPO("MlpPolicy", SpacesEnv(action_space=space))
    assert str(space) in str(error.value)
    # As SB3's SAC has it
    assert isinstance(error.value, AssertionError)


@pytest.mark.parametrize("name, good", [("termination_fn", np.zeros(1, dtype=bool)), ("reward_fn", np.zeros(1))])
@pytest.mark.parametrize("bad", ["shape", "type", "raises", "none", "scalar"])
def test_user_functions_are_tried_before_training(name, good, bad):
    def function(obs, action, next_obs):
        n = len(obs)
        if bad == "shape":
            return np.zeros((n, 1), dtype=good.dtype)
        if bad == "type":
            return np.full(n, "yes")
        if bad == "scalar":
            return good.dtype.type(0)
        if bad == "raises":
            raise RuntimeError("my own mistake")
        return None

    with pytest.raises(ValueError, match=name) as error:
        make_agent(**{name: function})
    if bad == "raises":
        assert "my own mistake" in str(error.value)


@pytest.mark.parametrize("where", ["observation", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at_step", [5, 10, 75])
def test_non_finite_environment(where, value, at_step):
    """Caught at the step it happens, before it is stored; also in the last observation of an episode (step 10)."""
    agent = make_agent(FaultyEnv(where, value, at_step))
    with pytest.raises(ValueError, match=rf"{where} that is not finite at step {at_step}"):
        agent.learn(100)
    assert agent.replay_buffer.size() == at_step - 1
    for name, tensor in [*agent.policy.state_dict().items(), *agent.dynamics.state_dict().items()]:
        assert th.isfinite(tensor).all(), name


@pytest.mark.parametrize("array", ["observations", "next_observations", "rewards", "actions"])
def test_non_finite_replay_buffer(array, tmp_path):
    """A buffer that was loaded has not been checked by anybody."""
    agent = make_agent().learn(120)
    agent.save_replay_buffer(tmp_path / "buffer.pkl")
    agent.load_replay_buffer(tmp_path / "buffer.pkl")
    getattr(agent.replay_buffer, array)[7] = np.nan
    before = {name: tensor.clone() for name, tensor in agent.dynamics.state_dict().items()}
    with pytest.raises(ValueError, match="transition 7 are not finite"):
        agent.learn(60, reset_num_timesteps=False)
    assert all(th.equal(tensor, before[name]) for name, tensor in agent.dynamics.state_dict().items())


def test_function_that_fails_later_is_an_error_too():
    def termination_fn(obs, action, next_obs):
        return np.zeros(len(obs) + (len(obs) > 50), dtype=bool)

    agent = make_agent(CountingEnv(), termination_fn=termination_fn)
    with pytest.raises(ValueError, match="termination_fn"):
        agent.learn(70)
