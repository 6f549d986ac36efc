"""What a user may do wrong, and what they are told: which argument, what it was, what is allowed."""

import re
import warnings
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces, wrappers
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

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
        ("train_freq", 0),
        ("train_freq", -4),
        ("gradient_steps", 1.5),
        ("gradient_steps", "10"),
        ("gradient_steps", -2),
        ("tau", 2),
        ("tau", -1),
        ("gamma", 1.5),
        ("model_train_freq", 0),
        ("model_train_freq", None),
        ("rollout_batch_size", -5),
        ("batch_size", 0),
        ("model_retain_epochs", 0),
        ("real_ratio", -0.1),
        ("real_ratio", 1.01),
        ("real_ratio", float("nan")),
        ("real_ratio", None),
        ("real_ratio", "0.05"),
        ("rollout_schedule", [20_000, 100_000, 1]),
        ("rollout_schedule", [20_000, 100_000, 15, 1]),
        ("rollout_schedule", "20000"),
        ("rollout_start", "real"),
        ("rollout_start", None),
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


def as_floats(env):
    return wrappers.DtypeObservation(env, np.float32)


@pytest.mark.parametrize(
    "space, advised",
    [
        (spaces.Tuple([spaces.Box(-1, 1, (2,))]), wrappers.FlattenObservation),
        (spaces.Discrete(5), lambda env: as_floats(wrappers.FlattenObservation(env))),
        (spaces.MultiBinary(3), lambda env: as_floats(wrappers.FlattenObservation(env))),
        (spaces.Box(0, 255, (4, 4, 3), np.uint8), as_floats),
        (spaces.Box(-5, 5, (2,), np.int64), as_floats),
        (spaces.Box(-1, 1, ()), lambda env: wrappers.ReshapeObservation(env, (1,))),
        # As walker of DeepMind Control has it
        (spaces.Dict(height=spaces.Box(-1, 1, ()), velocity=spaces.Box(-1, 1, (3,))), wrappers.FlattenObservation),
        (spaces.Dict(where=spaces.Discrete(4), velocity=spaces.Box(-1, 1, (3,))), wrappers.FlattenObservation),
        (spaces.Dict(arm=spaces.Dict(angle=spaces.Box(-1, 1, (3,)))), wrappers.FlattenObservation),
    ],
    ids=lambda value: str(value) if isinstance(value, spaces.Space) else "",
)
def test_observation_spaces(space, advised):
    with pytest.raises(ValueError, match="observation space") as error:
        MBPO("MlpPolicy", SpacesEnv(observation_space=space))
    message = str(error.value)
    assert str(space) in message and "Box" in message
    # The advice is good
    assert all(name in message for name in set(re.findall(r"\w+Observation", repr(advised(SpacesEnv(space))))))
    assert isinstance(MBPO("MlpPolicy", advised(SpacesEnv(observation_space=space)), buffer_size=10), MBPO)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5),
        spaces.MultiDiscrete([2, 2]),
        spaces.MultiBinary(3),
        spaces.Box(-5, 5, (2,), np.int64),
        spaces.Box(-np.inf, 1, (2,)),
        spaces.Box(-1, 1, (0,)),
    ],
    ids=str,
)
def test_action_spaces(space):
    with pytest.raises(ValueError, match="action space") as error:
        MBPO("MlpPolicy", SpacesEnv(action_space=space))
    assert str(space) in str(error.value)
    # As SB3's SAC has it
    assert isinstance(error.value, AssertionError)


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (0,)), spaces.Box(-1, 1, (3, 0)), spaces.Dict(a=spaces.Box(-1, 1, (0,)))], ids=str
)
def test_observations_without_numbers(space):
    with pytest.raises(ValueError, match="There are no numbers in it"):
        MBPO("MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy", SpacesEnv(observation_space=space))


@pytest.mark.parametrize(
    "low, high, dtype, which",
    [
        ([-1, 2], [1, 2], np.float32, "action[1] is between 2.0 and 2.0"),
        ([-3e38, 0], [3e38, 1], np.float32, "action[0] is between -3"),
        ([0, -1e300], [1, 1e300], np.float64, "action[1] is between -1e+300 and 1e+300"),
        ([0, 1], [1, 1 + 1e-50], np.float64, "action[1] is between 1.0 and 1.0"),
    ],
)
def test_actions_that_cannot_be_scaled(low, high, dtype, which):
    space = spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    with pytest.raises(ValueError, match="cannot be scaled") as error:
        MBPO("MlpPolicy", SpacesEnv(action_space=space))
    assert which in str(error.value)


def test_advice_for_actions_that_cannot_be_scaled():
    env = SpacesEnv(action_space=spaces.Box(np.array([-1, 2], np.float32), np.array([1, 2], np.float32)))
    free = wrappers.TransformAction(env, lambda action: np.append(action, 2), spaces.Box(-1, 1, (1,)))
    MBPO("MlpPolicy", free, buffer_size=10)


def test_advice_for_unbounded_actions():
    env = SpacesEnv(action_space=spaces.Box(-np.inf, 1, (2,)))
    with pytest.raises(ValueError, match="TransformAction"):
        MBPO("MlpPolicy", env)
    MBPO("MlpPolicy", wrappers.TransformAction(env, lambda action: action, spaces.Box(-1, 1, (2,))), buffer_size=10)


@pytest.mark.parametrize("env", [3, object, [gym.Env]])
def test_environment_of_another_type(env):
    with pytest.raises(ValueError, match="`env` must be"):
        MBPO("MlpPolicy", env)


def test_arguments_that_were_changed_later():
    schedule = [0, 10, 1, 1]
    agent = make_agent(rollout_schedule=schedule)
    schedule[2] = 0
    with pytest.raises(ValueError, match="rollout_schedule"):
        agent.learn(10)


def test_memory_efficient_buffer_cannot_teach_terminations():
    """It loses just those transitions. What is known or given need not be learned."""
    kwargs = dict(optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False})
    agent = make_agent(CountingEnv(), **kwargs)
    with pytest.raises(ValueError, match=r"`optimize_memory_usage=True`.*`termination_fn`"):
        agent.learn(10)
    make_agent("Hopper-v5", **kwargs).learn(61)
    make_agent(CountingEnv(), termination_fn=lambda obs, action, next_obs: next_obs[:, 0] >= 10, **kwargs).learn(61)


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
    with pytest.raises(ValueError, match=rf"(?i){where}s must be finite numbers, but at step {at_step} .*{value}"):
        agent.learn(100)
    assert agent.replay_buffer.size() == at_step - 1
    for name, tensor in [*agent.policy.state_dict().items(), *agent.dynamics.state_dict().items()]:
        assert th.isfinite(tensor).all(), name


@pytest.mark.parametrize("where", ["observation", "reward"])
@pytest.mark.parametrize("training", [True, False])
def test_non_finite_environment_under_vec_normalize(where, training):
    """Which clips: an infinity comes out as 10."""
    env = VecNormalize(DummyVecEnv([lambda: FaultyEnv(where, np.inf, 25)]), training=training)
    agent = make_agent(env)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"at step 25 .*inf"):
        agent.learn(100)


@pytest.mark.parametrize("kwargs", [{}, {"real_ratio": 1}], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_non_finite_first_observation(normalize, kwargs):
    """Of the first reset alone, also of an environment that is set later: nothing of it is stored."""

    def faulty():
        env = CountingEnv()
        reset = env.reset

        def first_reset(**kwargs):
            env.reset = reset
            obs, info = reset(**kwargs)
            return obs * np.nan, info

        env.reset = first_reset
        env = DummyVecEnv([lambda: env])
        return VecNormalize(env) if normalize else env

    agent = make_agent(faulty(), **kwargs)
    with pytest.raises(ValueError, match=r"Observations must be finite numbers, but at step 0 .*nan.*`reset\(\)`"):
        agent.learn(100)
    assert agent.replay_buffer.size() == 0
    agent = make_agent(VecNormalize(DummyVecEnv([CountingEnv])) if normalize else CountingEnv(), **kwargs).learn(70)
    agent.set_env(faulty())
    with pytest.raises(ValueError, match=r"but at step 70 .*nan.*`reset\(\)`"):
        agent.learn(50, reset_num_timesteps=False)
    assert agent.replay_buffer.size() == 70


@pytest.mark.parametrize("array", ["observations", "next_observations", "rewards", "actions"])
@pytest.mark.parametrize("real_ratio", [0.05, 0.5, 1.0])
def test_non_finite_replay_buffer(array, real_ratio, tmp_path):
    """A buffer that was loaded has not been checked by anybody."""
    agent = make_agent(real_ratio=real_ratio).learn(70)
    agent.save_replay_buffer(tmp_path / "buffer.pkl")
    agent.load_replay_buffer(tmp_path / "buffer.pkl")
    getattr(agent.replay_buffer, array)[7] = np.nan
    before = deepcopy([agent.dynamics.state_dict(), agent.policy.state_dict()])
    with pytest.raises(ValueError, match=rf"The {array} of `replay_buffer` must be finite.* row 7 are .*nan"):
        agent.learn(60, reset_num_timesteps=False)
    for state, module in zip(before, (agent.dynamics, agent.policy), strict=True):
        assert all(th.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_function_that_fails_later_is_an_error_too():
    def termination_fn(obs, action, next_obs):
        return np.zeros(len(obs) + (len(obs) > 50), dtype=bool)

    agent = make_agent(CountingEnv(), termination_fn=termination_fn)
    with pytest.raises(ValueError, match="termination_fn"):
        agent.learn(70)


def test_infinity_in_the_last_observation_under_vec_normalize():
    """Which has clipped it: nobody can tell it from an outlier, but either is told of."""
    env = VecNormalize(DummyVecEnv([lambda: FaultyEnv("observation", np.inf, 30)]))
    with np.errstate(all="ignore"), pytest.warns(UserWarning, match=r"ended at step 30 lies 10.0 standard deviations"):
        make_agent(env).learn(40)


@pytest.mark.parametrize("kwargs", [dict(norm_obs=False), dict()], ids=str)
def test_no_word_of_clipping_where_nothing_is_clipped(kwargs):
    env = VecNormalize(DummyVecEnv([lambda: CountingEnv(episode_length=30)]), **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_agent(env).learn(70)


@pytest.mark.parametrize("steps, told", [(60, True), (61, False)])
def test_a_training_too_short_to_learn_is_told_of(steps, told, capsys):
    make_agent(verbose=1).learn(steps)
    expected = "All of these steps are random: learning starts after 60 of the agent's life (`learning_starts`)"
    assert (expected in capsys.readouterr().out) is told
    agent = make_agent(verbose=1).learn(50)
    agent.learn(20)
    assert (expected in capsys.readouterr().out.split("Termination of")[-1]) is False
