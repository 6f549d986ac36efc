"""The contract of `termination_fn` and `reward_fn`: what is accepted, and what is said of the rest."""

from functools import partial

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mbpo.dynamics.user_functions import apply_transition_fn, check_transition_fn

OBS_SPACE = spaces.Box(1, 5, (3,), np.float64)
ACTION_SPACE = spaces.Box(-1, 1, (2, 2), np.float32)
CHECKS = {"termination_fn": True, "reward_fn": False}


def check(fn, name):
    check_transition_fn(fn, name, OBS_SPACE, ACTION_SPACE, CHECKS[name])


@pytest.mark.parametrize(
    "name, fn",
    [
        ("termination_fn", lambda obs, action, next_obs: next_obs[:, 0] > 3),
        ("termination_fn", lambda obs, action, next_obs: (np.abs(action) > 1).any(axis=(1, 2))),
        ("reward_fn", lambda obs, action, next_obs: next_obs[:, 0] - obs[:, 0]),
        ("reward_fn", lambda obs, action, next_obs: -np.square(action).sum(axis=(1, 2))),  # float32
    ],
)
def test_valid_functions(name, fn):
    check(fn, name)


def test_what_a_function_is_tried_on():
    seen = []

    def fn(*arrays):
        seen.extend(arrays)
        return np.zeros(len(arrays[0]), bool)

    state = np.random.get_state()[1].tolist(), th.get_rng_state().tolist()
    check(fn, "termination_fn")
    assert state == (np.random.get_state()[1].tolist(), th.get_rng_state().tolist())
    obs, action, next_obs = seen
    n = len(obs)
    assert n not in (2, 3, 4)
    assert obs.shape == next_obs.shape == (n, 3) and action.shape == (n, 2, 2)
    assert obs.dtype == np.float64 and action.dtype == np.float32
    assert OBS_SPACE.contains(obs[0]) and ACTION_SPACE.contains(action[0])


BOOLS = "array of bools with shape (5,)"
FLOATS = "array of floats with shape (5,)"


@pytest.mark.parametrize(
    "name, fn, fragments",
    [
        ("termination_fn", "hopper", ["None or a function of (obs, action, next_obs)", "'hopper'"]),
        ("reward_fn", 1.0, ["None or a function of (obs, action, next_obs)", "1.0"]),
        ("termination_fn", lambda obs, action: True, ["TypeError", "obs (5, 3), action (5, 2, 2), next_obs (5, 3)"]),
        ("reward_fn", lambda obs, action, next_obs: next_obs[:, 3], ["IndexError", "obs (5, 3)"]),
        ("termination_fn", lambda obs, action, next_obs: None, [BOOLS, "NoneType"]),
        ("termination_fn", lambda obs, action, next_obs: True, [BOOLS, "bool"]),
        ("termination_fn", lambda obs, action, next_obs: [False] * len(obs), [BOOLS, "list"]),
        ("termination_fn", lambda obs, action, next_obs: np.bool_(True), [BOOLS, "bool", "shape ()"]),
        ("termination_fn", lambda obs, action, next_obs: th.ones(len(obs)) > 0, [BOOLS, "Tensor", "torch.bool"]),
        ("termination_fn", lambda obs, action, next_obs: next_obs[:, 0], [BOOLS, "float64", "shape (5,)"]),
        ("termination_fn", lambda obs, action, next_obs: (next_obs[:, 0] > 0).astype(int), [BOOLS, "int64"]),
        ("termination_fn", lambda obs, action, next_obs: next_obs[0] > 0, [BOOLS, "bool", "shape (3,)"]),
        ("termination_fn", lambda obs, action, next_obs: next_obs[:, :1] > 0, [BOOLS, "bool", "shape (5, 1)"]),
        ("termination_fn", lambda obs, action, next_obs: next_obs > 0, [BOOLS, "bool", "shape (5, 3)"]),
        ("reward_fn", lambda obs, action, next_obs: next_obs[:, 0] > 0, [FLOATS, "bool", "shape (5,)"]),
        ("reward_fn", lambda obs, action, next_obs: next_obs[:, 0].astype(int), [FLOATS, "int64"]),
        ("reward_fn", lambda obs, action, next_obs: next_obs[:, 0].astype(object), [FLOATS, "object"]),
        ("reward_fn", lambda obs, action, next_obs: next_obs.mean(axis=0), [FLOATS, "float64", "shape (3,)"]),
        ("reward_fn", lambda obs, action, next_obs: 1.0, [FLOATS, "float"]),
    ],
)
def test_invalid_functions(name, fn, fragments):
    with pytest.raises(ValueError) as error:
        check(fn, name)
    for fragment in (f"`{name}`", *fragments):
        assert fragment in str(error.value)


def test_error_of_the_function_is_the_cause():
    with pytest.raises(ValueError) as error:
        check(lambda obs, action, next_obs: 1 / 0, "reward_fn")
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_every_call_is_checked():
    obs = np.ones((7, 3))
    fn = partial(apply_transition_fn, name="termination_fn", obs=obs, action=obs, next_obs=obs, boolean=True)
    assert fn(lambda obs, action, next_obs: next_obs[:, 0] > 0).tolist() == [True] * 7
    with pytest.raises(ValueError, match=r"`termination_fn` .* shape \(7,\).* shape \(1,\)"):
        fn(lambda obs, action, next_obs: next_obs[:1, 0] > 0)


def test_values_are_checked_on_real_data_only():
    """The trial is made with zeros, at which a good function may have a pole."""

    def reward_fn(obs, action, next_obs):
        with np.errstate(divide="ignore"):
            return 1 / next_obs[:, 0]

    check(reward_fn, "reward_fn")
    arrays = [np.array([[value], [2.0]]) for value in (1.0, 4.0, 0.0)]
    with pytest.raises(ValueError, match=r"`reward_fn` must return finite numbers, but returned inf for obs \[1.\]"):
        apply_transition_fn(reward_fn, "reward_fn", *arrays, boolean=False)


def test_a_function_may_work_in_place():
    def in_place(obs, action, next_obs):
        for array in (obs, action, next_obs):
            array *= 0
        return next_obs[:, 0]

    arrays = [np.full((7, 3), value) for value in (1.0, 2.0, 3.0)]
    assert not apply_transition_fn(in_place, "reward_fn", *arrays, boolean=False).any()
    assert [array.mean() for array in arrays] == [1, 2, 3]
