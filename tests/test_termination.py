"""The derived functions against the real environments, and the learned classifier."""

import math
import warnings
from functools import cache, partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces, wrappers
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from rl_zoo3 import gym_patches
from rl_zoo3 import wrappers as zoo
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_mbpo.dynamics import termination
from sb3_mbpo.dynamics.termination import TerminationClassifier, derive_termination_fn


def make(env_id, **kwargs):
    with warnings.catch_warnings():  # v4 is said to be out of date
        warnings.simplefilter("ignore")
        return gym.make(env_id, **kwargs)


def derive(*envs):
    return derive_termination_fn(DummyVecEnv([partial(lambda env: env, env) for env in envs]))


def call(fn, next_obs):
    """Derived functions look at the next observation only."""
    return fn(None, None, np.atleast_2d(next_obs))


# --- Derived ---------------------------------------------------------------------------------------------------------

VERSIONS = ("v4", "v5")
ENDLESS = [
    *(f"{name}-{v}" for v in VERSIONS for name in ("HalfCheetah", "Swimmer", "Reacher", "HumanoidStandup")),
    "Pusher-v5",  # v4 cannot be made with MuJoCo 3 and later
    "Pendulum-v1",
]
SHOWS_ALL = {"exclude_current_positions_from_observation": False}
TASKS = [
    *((f"Hopper-{v}", {}) for v in VERSIONS),
    *((f"Hopper-{v}", dict(healthy_z_range=(1.1, 1.3), healthy_angle_range=(-0.1, 0.15), **SHOWS_ALL)) for v in VERSIONS),
    *(
        (f"Hopper-{v}", dict(healthy_z_range=(0, 9), healthy_angle_range=(-9, 9), healthy_state_range=(-4, 6)))
        for v in VERSIONS
    ),
    *((f"Walker2d-{v}", {}) for v in VERSIONS),
    *((f"Walker2d-{v}", dict(healthy_z_range=[1.1, 1.26], healthy_angle_range=(-0.3, 0.2), **SHOWS_ALL)) for v in VERSIONS),
    *((f"Ant-{v}", dict(healthy_z_range=(0.4, 0.8))) for v in VERSIONS),
    *((f"Ant-{v}", dict(healthy_z_range=(0.5, 1.0), **SHOWS_ALL)) for v in VERSIONS),
    ("Ant-v4", dict(healthy_z_range=(0.4, 0.8), use_contact_forces=True)),
    ("Ant-v5", dict(healthy_z_range=(0.4, 0.8), include_cfrc_ext_in_observation=False)),
    *((f"Humanoid-{v}", {}) for v in VERSIONS),
    *((f"Humanoid-{v}", dict(healthy_z_range=(1.2, 1.4), **SHOWS_ALL)) for v in VERSIONS),
    (
        "Humanoid-v5",
        {f"include_{name}_in_observation": False for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")},
    ),
    *((f"InvertedPendulum-{v}", {}) for v in VERSIONS),
    *((f"InvertedDoublePendulum-{v}", {}) for v in VERSIONS),
]


def play(env, n_steps, kinds=3):
    """Observations after each step and whether it was terminal. By episode: random actions, extreme ones, and none."""
    env.action_space.seed(0)
    rng = np.random.default_rng(0)
    low, high = env.action_space.low, env.action_space.high
    next_obs, terminated, episode = [], [], 0
    env.reset(seed=0)
    for _ in range(n_steps):
        extreme = np.where(rng.random(low.shape) < 0.5, low, high)
        action = (env.action_space.sample(), extreme, np.zeros_like(low))[episode % kinds]
        obs, _, is_terminal, is_truncated, _ = env.step(action)
        next_obs.append(obs)
        terminated.append(is_terminal)
        if is_terminal or is_truncated or rng.random() < 0.01:
            env.reset()
            episode += 1
    return np.array(next_obs), np.array(terminated)


def is_undecided(env, next_obs):
    """Where the double pendulum's tip, seen in the observation, is too close to the limit for the integrator's residue."""
    if "Double" not in env.spec.id:
        return np.zeros(len(next_obs), dtype=bool)
    a, b = np.arctan2(next_obs[:, 1:3], next_obs[:, 3:5]).T
    return np.abs(0.6 * np.cos(a) + 0.6 * np.cos(a + b) - 1) < 5e-3


@pytest.mark.parametrize("env_id, kwargs", TASKS)
def test_same_as_environment(env_id, kwargs):
    env = make(env_id, **kwargs)
    fn = derive(env)
    next_obs, terminated = play(env, 2_000)
    assert 20 <= terminated.sum() <= 1_980
    decided = ~is_undecided(env, next_obs)
    predicted = call(fn, next_obs)
    assert predicted.dtype == bool
    np.testing.assert_array_equal(predicted[decided], terminated[decided])
    assert decided.sum() >= 1_950


@pytest.mark.parametrize("env_id", ENDLESS)
def test_endless_tasks(env_id):
    env = make(env_id)
    next_obs, terminated = play(env, 300)
    assert not terminated.any()
    assert call(derive(env), next_obs).tolist() == [False] * 300


@pytest.mark.parametrize("env_id", [f"{name}-{v}" for v in VERSIONS for name in ("Hopper", "Walker2d", "Ant", "Humanoid")])
def test_terminate_when_unhealthy_false(env_id):
    env = make(env_id, terminate_when_unhealthy=False, healthy_z_range=(10, 20))
    next_obs, terminated = play(env, 30)
    assert not terminated.any()
    assert call(derive(env), next_obs).tolist() == [False] * 30


@cache
def frozen(env_id, **kwargs):
    """An environment whose `step` judges the state as it was set: the physics stand still."""
    env = make(env_id, disable_env_checker=True, **kwargs)
    env.reset(seed=0)
    env.unwrapped.do_simulation = lambda ctrl, n_frames: None
    return env, derive(env)


def assert_same_at(env, fn, qpos, qvel):
    qpos_now, qvel_now = env.unwrapped.init_qpos.copy(), env.unwrapped.init_qvel.copy()
    for array, values in ((qpos_now, qpos), (qvel_now, qvel)):
        for index, value in values.items():
            array[index] = value
    if np.isfinite(qpos_now).all() and np.isfinite(qvel_now).all():
        env.unwrapped.set_state(qpos_now, qvel_now)
    else:  # MuJoCo does not compute with such states, it only holds them
        env.unwrapped.data.qpos[:], env.unwrapped.data.qvel[:] = qpos_now, qvel_now
    with np.errstate(invalid="ignore"):
        obs, _, terminated, _, _ = env.unwrapped.step(np.zeros(env.action_space.shape, np.float32))
    assert bool(terminated) == call(fn, obs).item()
    return bool(terminated)


def around(*limits):
    """The limits themselves, the numbers next to them, and others."""
    close = [value for limit in limits for value in (np.nextafter(limit, -np.inf), limit, np.nextafter(limit, np.inf))]
    return st.sampled_from(close) | st.floats(min(limits) - 0.1, max(limits) + 0.1)


@pytest.mark.parametrize("version", VERSIONS)
@given(z=around(0.7), angle=around(-0.2, 0.2), joint=around(-4, 0.6), speed=around(-4, 0.6, 40))
@settings(max_examples=150, deadline=None)
def test_hopper_limits(version, z, angle, joint, speed):
    """The range of the state holds for the angle and what follows it, not for z."""
    env, fn = frozen(f"Hopper-{version}", healthy_state_range=(-4, 0.6))
    assert_same_at(env, fn, {1: z, 2: angle, 4: joint}, {5: speed})


@pytest.mark.parametrize("version", VERSIONS)
@given(z=around(0.8, 2.0), angle=around(-1, 1), joint=st.floats(-200, 200))
@settings(max_examples=100, deadline=None)
def test_walker2d_limits(version, z, angle, joint):
    env, fn = frozen(f"Walker2d-{version}")
    assert_same_at(env, fn, {1: z, 2: angle, 4: joint}, {})


NOT_FINITE = st.sampled_from([0, 0, np.nan, np.inf])


@pytest.mark.parametrize("version", VERSIONS)
@given(z=around(0.2, 1.0), joint=NOT_FINITE, speed=NOT_FINITE)
@settings(max_examples=100, deadline=None)
def test_ant_limits(version, z, joint, speed):
    env, fn = frozen(f"Ant-{version}")
    assert_same_at(env, fn, {2: z, 9: joint}, {3: speed})


@pytest.mark.parametrize("version", VERSIONS)
@given(z=around(1.0, 2.0), speed=NOT_FINITE)
@settings(max_examples=50, deadline=None)
def test_humanoid_limits(version, z, speed):
    env, fn = frozen(f"Humanoid-{version}")
    assert_same_at(env, fn, {2: z}, {8: speed})


@pytest.mark.parametrize("version", VERSIONS)
@given(angle=around(-0.2, 0.2), speed=NOT_FINITE)
@settings(max_examples=50, deadline=None)
def test_inverted_pendulum_limits(version, angle, speed):
    env, fn = frozen(f"InvertedPendulum-{version}")
    assert_same_at(env, fn, {1: angle}, {0: speed})


@pytest.mark.parametrize("version", VERSIONS)
@given(x=st.floats(-2, 2), a=st.floats(-4, 4), height=st.floats(0.5, 1.2) | st.sampled_from([1 - 1e-9, 1 + 1e-9]))
@settings(max_examples=100, deadline=None)
def test_inverted_double_pendulum_limits(version, x, a, height):
    """Poses whose tip is at the wanted height, where one exists."""
    env, fn = frozen(f"InvertedDoublePendulum-{version}")
    b = np.arccos(np.clip(height / 0.6 - np.cos(a), -1, 1)) - a
    if abs(0.6 * np.cos(a) + 0.6 * np.cos(a + b) - 1) > 1e-12:
        assert_same_at(env, fn, {0: x, 1: a, 2: b}, {})


def test_inverted_double_pendulum_lengths_are_the_models():
    env = make("InvertedDoublePendulum-v5")
    model = env.unwrapped.model
    model.body_pos[3], model.site_pos[0] = (0.1, 0, 0.9), (0.05, 0, 0.4)
    fn, before = derive(env), derive(make("InvertedDoublePendulum-v5"))
    next_obs, terminated = play(env, 300)
    np.testing.assert_array_equal(call(fn, next_obs), terminated)
    assert (call(before, next_obs) != terminated).sum() > 5
    # A rail that climbs: the height depends on x, too
    model.jnt_axis[0] = (np.sqrt(0.5), 0, np.sqrt(0.5))
    assert derive(env) is None


def test_reads_the_live_parameters():
    env = make("Hopper-v5")
    upright = env.unwrapped._get_obs()
    assert upright[0] == 1.25 and not call(derive(env), upright)
    env.unwrapped._healthy_z_range = np.array([1.3, np.inf])
    assert call(derive(env), upright)
    env.unwrapped._healthy_z_range = (0.7, np.inf)
    assert not call(derive(env), upright)
    env.unwrapped._healthy_angle_range = (0.1, 0.2)
    assert call(derive(env), upright)
    env.unwrapped._terminate_when_unhealthy = False
    assert not call(derive(env), upright)


def test_compares_in_the_precision_of_the_array():
    """0.8 as float32 is a little more than 0.8: in a model's precision, that is the limit."""
    fn = derive(make("Walker2d-v5"))
    for dtype in (np.float32, np.float64):
        obs = np.zeros((2, 17), dtype)
        obs[:, 0] = dtype(0.8), np.nextafter(dtype(0.8), dtype(1))
        assert call(fn, obs).tolist() == [True, False]


# --- What is known, and what is not ----------------------------------------------------------------------------------


class MyHopper(HopperEnv):
    pass


class Unknown(gym.Env):
    observation_space = spaces.Box(-1, 1, (11,), np.float64)
    action_space = spaces.Box(-1, 1, (3,), np.float32)
    unpicklable = property(lambda self: lambda: None)

    def reset(self, *, seed=None, options=None):
        return np.zeros(11), {}

    def step(self, action):
        return np.zeros(11), 0.0, False, False, {}


class LyingWrapper(gym.Wrapper):
    """Same shapes, another meaning."""

    def step(self, action):
        obs, reward, _, truncated, info = self.env.step(action)
        return -obs, reward, False, truncated, info


class MyReward(gym.RewardWrapper):
    def reward(self, reward):
        return -reward


class MyAction(gym.ActionWrapper):
    def action(self, action):
        return -action


class MyLimit(wrappers.TimeLimit):
    pass


def hidden_range(env):
    env = Monitor(env)
    env._healthy_z_range = (5, 6)  # what `vec_env.set_attr` does: the environment below keeps its own
    return env


def negate_action(env):
    return wrappers.TransformAction(env, lambda action: -action, None)


TRANSPARENT = [
    lambda env: env,
    Monitor,
    MyReward,
    MyAction,
    partial(MyLimit, max_episode_steps=5),
    negate_action,
    partial(wrappers.RescaleAction, min_action=-2, max_action=2),
    wrappers.ClipAction,
    wrappers.NormalizeReward,
    wrappers.RecordEpisodeStatistics,
    lambda env: Monitor(wrappers.RescaleAction(MyReward(env), -2, 2)),
]
OPAQUE = [
    LyingWrapper,
    hidden_range,
    wrappers.NormalizeObservation,
    wrappers.TimeAwareObservation,
    partial(wrappers.FrameStackObservation, stack_size=2),
    partial(wrappers.DelayObservation, delay=1),
    partial(wrappers.DtypeObservation, dtype=np.float32),
    lambda env: wrappers.TransformObservation(env, lambda obs: -obs, None),
    lambda env: Monitor(LyingWrapper(Monitor(env))),
]


@pytest.mark.parametrize("wrap", TRANSPARENT)
def test_transparent_wrappers(wrap):
    assert derive(wrap(make("Hopper-v5"))) is not None


@pytest.mark.parametrize("wrap", OPAQUE)
def test_opaque_wrappers(wrap):
    assert derive(wrap(make("Hopper-v5"))) is None


def test_zoo_wrappers():
    for wrapper in (
        *(zoo.ActionNoiseWrapper, zoo.ActionSmoothingWrapper, zoo.DelayedRewardWrapper),
        *(zoo.FrameSkip, zoo.TruncatedOnSuccessWrapper),
    ):
        assert derive(wrapper(make("Hopper-v5"))) is not None, wrapper
    # Importing the zoo puts this in place of Gymnasium's
    patched = gym_patches.PatchedTimeLimit
    assert isinstance(make("Hopper-v5"), patched)
    # It overwrites the base environment's space, too: comparing shapes would not reveal it
    assert derive(zoo.HistoryWrapper(HopperEnv())) is None


def test_vec_wrappers():
    env = DummyVecEnv([lambda: make("Hopper-v5")])
    assert derive_termination_fn(VecMonitor(VecCheckNan(VecNormalize(env)))) is not None
    assert derive_termination_fn(VecNormalize(VecFrameStack(env, 2))) is None


def test_exact_class_only():
    assert derive(HopperEnv()) is not None
    assert derive(MyHopper()) is None
    assert derive(Monitor(MyHopper())) is None
    assert derive(Unknown()) is None


def test_unknown_kind_of_vec_env():
    class MyVecEnv(DummyVecEnv):
        pass

    assert derive_termination_fn(MyVecEnv([lambda: make("Hopper-v5")])) is None


def test_parallel_environments_must_agree():
    assert derive(make("Hopper-v5"), make("Hopper-v5", reset_noise_scale=0.1)) is not None
    assert derive(make("Hopper-v5"), make("Hopper-v5", healthy_z_range=(0.8, 3))) is None
    assert derive(make("Hopper-v5"), make("Walker2d-v5")) is None
    assert derive(make("Hopper-v5"), MyHopper()) is None
    assert derive(make("Hopper-v5"), LyingWrapper(make("Hopper-v5"))) is None


def tall_hopper():
    return make("Hopper-v5", healthy_z_range=(1.3, 2))  # upright is too low


@pytest.mark.parametrize(
    "env_fns, ends",
    [
        ([lambda: Monitor(tall_hopper()), lambda: negate_action(tall_hopper())], True),
        ([lambda: make("InvertedDoublePendulum-v5")], False),
        ([lambda: Monitor(Unknown())], None),
        ([lambda: Monitor(LyingWrapper(tall_hopper()))], None),
        ([HopperEnv], None),
    ],
    ids=["Hopper", "InvertedDoublePendulum", "unknown", "opaque", "bare"],
)
def test_subprocesses(env_fns, ends):
    """The workers answer, and live on, whatever they run: what a lambda sits in could not be sent."""
    env = VecNormalize(SubprocVecEnv(env_fns), norm_obs=False)
    try:
        fn = derive_termination_fn(env)
        upright = env.reset()
        assert (fn if ends is None else call(fn, upright).all()) == ends
        env.step(np.zeros((len(env_fns), *env.action_space.shape)))
        assert all(process.is_alive() for process in env.unwrapped.processes)
    finally:
        env.close()


# --- Learned ---------------------------------------------------------------------------------------------------------


def dataset(n, threshold, seed=0):
    """An episode ends where the first of four normal variables, of very different units, exceeds the threshold."""
    normal = th.randn(n, 4, generator=th.Generator().manual_seed(seed))
    return normal * th.tensor([100.0, 0.01, 1, 1]) + th.tensor([1000.0, 0, 0, 0]), normal[:, 0] > threshold


def errors(classifier, next_obs, terminated):
    """Shares of the terminal rows that are missed, and of the others that are taken for terminal."""
    predicted = classifier.predict(next_obs)
    assert predicted.dtype == th.bool and predicted.shape == terminated.shape
    return (~predicted[terminated]).float().mean().item(), predicted[~terminated].float().mean().item()


def equal(state, other):
    return list(state) == list(other) and all(th.equal(state[key], other[key]) for key in state)


@pytest.fixture
def classifier():
    th.manual_seed(0)
    return TerminationClassifier(4)


@pytest.mark.parametrize("threshold, max_missed, max_false", [(0.0, 0.02, 0.02), (1.645, 0.06, 0.005), (2.33, 0.15, 0.002)])
def test_learns_a_threshold(classifier, threshold, max_missed, max_false):
    """Half, 5 % and 1 % of the rows are terminal."""
    loss = classifier.fit(*dataset(10_000, threshold))
    missed, false = errors(classifier, *dataset(20_000, threshold, seed=1))
    assert missed < max_missed and false < max_false
    assert loss < 0.02


def test_training_stops_where_there_is_no_more_to_learn(classifier, monkeypatch):
    """The loss of what can be told apart without error falls for ever."""
    train, looks = TerminationClassifier._train, []

    def watched(self, *args):
        looks.append(len(looks))
        train(self, *args)

    monkeypatch.setattr(TerminationClassifier, "_train", watched)
    next_obs = th.randn(1_000, 4)
    next_obs[:, 0] += 3 * next_obs[:, 0].sign()
    loss = classifier.fit(next_obs, next_obs[:, 0] > 0)
    assert len(looks) <= 5
    assert 0 < loss < 0.01 * math.log(2)


def test_learns_the_hoppers_fall():
    """A random policy's transitions, 4.5 % of them terminal."""
    next_obs, terminated = (th.as_tensor(array) for array in play(make("Hopper-v5"), 12_000, kinds=1))
    next_obs = next_obs.float()
    th.manual_seed(0)
    classifier = TerminationClassifier(11)
    for n in (4_000, 8_000):
        classifier.fit(next_obs[:n], terminated[:n])
    missed, false = errors(classifier, next_obs[8_000:], terminated[8_000:])
    assert missed < 0.1 and false < 0.01


def test_probabilities_are_right(classifier, monkeypatch):
    """Where the first number is positive, 10 % end whatever else: never more likely than not, and not to be exaggerated."""
    monkeypatch.setattr(termination, "MAX_LOOKS", 12)
    next_obs = th.randn(20_000, 4)
    terminated = (th.rand(20_000) < 0.1) & (next_obs[:, 0] > 0)
    classifier.fit(next_obs, terminated)
    with th.no_grad():
        probability = classifier(next_obs).sigmoid()
    assert probability[next_obs[:, 0] > 0.2].mean().item() == pytest.approx(0.1, abs=0.015)
    assert probability[next_obs[:, 0] < -0.2].mean().item() < 0.01
    assert not classifier.predict(next_obs).any()


def test_never_and_always(classifier, monkeypatch):
    monkeypatch.setattr(termination, "MAX_LOOKS", 10)
    next_obs, terminated = dataset(2_000, 0.0)
    extreme = th.cat([next_obs, 1e6 * th.randn(100, 4)])
    assert not classifier.predict(extreme).any()  # not fitted yet
    classifier.fit(next_obs, terminated)
    for labels in (th.zeros(2_000), th.ones(2_000, dtype=th.bool)):
        assert classifier.fit(next_obs, labels) == 0
        assert (classifier.predict(extreme) == labels[0].bool()).all()
    # What was learned before is not lost
    classifier.prior.zero_()
    assert errors(classifier, next_obs, terminated) < (0.1, 0.1)


def test_starts_from_its_weights_and_keeps_the_best(classifier, monkeypatch):
    next_obs, terminated = dataset(4_000, 1.0)
    monkeypatch.setattr(termination, "MAX_LOOKS", 10)
    classifier.fit(next_obs, terminated)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    predicted = classifier.predict(next_obs)
    classifier.optimizer.param_groups[0]["lr"] = 10.0  # whatever it tries gets worse
    loss = classifier.fit(next_obs, terminated)
    assert loss < 0.05
    assert equal(classifier.state_dict(), before)
    assert th.equal(classifier.predict(next_obs), predicted)


def test_stops_early(classifier, monkeypatch):
    looks = []
    train = TerminationClassifier._train
    monkeypatch.setattr(TerminationClassifier, "_train", lambda *args: looks.append(train(*args)))
    monkeypatch.setattr(termination, "STEPS_PER_LOOK", 5)
    monkeypatch.setattr(termination, "MAX_LOOKS", 12)
    next_obs, terminated = dataset(1_000, 0.0)
    classifier.fit(next_obs, terminated)
    assert len(looks) == 12
    looks.clear()
    classifier.optimizer.param_groups[0]["lr"] = 10.0
    classifier.fit(next_obs, terminated)
    assert len(looks) == termination.PATIENCE


def test_constant_dimension(classifier, monkeypatch):
    monkeypatch.setattr(termination, "MAX_LOOKS", 15)
    next_obs, terminated = dataset(10_001, 0.0)
    next_obs[:, 2], next_obs[:, 3] = 0.1, 0.0
    classifier.fit(next_obs, terminated)
    assert classifier.input_std[2:].tolist() == [0, 0]
    assert classifier.input_std[:2].tolist() == pytest.approx([100, 0.01], rel=0.05)
    assert errors(classifier, next_obs, terminated) < (0.02, 0.02)
    # What has told nothing tells nothing later
    before = classifier(next_obs)
    next_obs[:, 2] += 100
    assert th.equal(classifier(next_obs), before)


def test_random_state(monkeypatch):
    """Construction takes nothing from the global generator, fitting takes its batches from it."""
    state = th.get_rng_state()
    TerminationClassifier(4)
    assert th.equal(state, th.get_rng_state())

    monkeypatch.setattr(termination, "MAX_LOOKS", 1)

    def fitted(seed):
        th.manual_seed(0)
        classifier = TerminationClassifier(4)
        th.manual_seed(seed)
        classifier.fit(*dataset(500, 0.0))
        return classifier.state_dict()

    assert equal(fitted(1), fitted(1))
    assert not equal(fitted(1), fitted(2))


def test_save_and_load(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(termination, "MAX_LOOKS", 3)
    next_obs, terminated = dataset(2_000, 1.0)
    classifier.fit(next_obs, terminated)
    th.save({"module": classifier.state_dict(), "optimizer": classifier.optimizer.state_dict()}, tmp_path / "state.pt")
    saved = th.load(tmp_path / "state.pt", weights_only=True)
    other = TerminationClassifier(4)
    other.load_state_dict(saved["module"])
    other.optimizer.load_state_dict(saved["optimizer"])
    assert th.equal(classifier(next_obs), other(next_obs))
    # Training goes on as if nothing had happened
    losses = []
    for each in (classifier, other):
        th.manual_seed(1)
        losses.append(each.fit(*dataset(3_000, 1.0, seed=1)))
    assert losses[0] == losses[1]
    assert equal(classifier.state_dict(), other.state_dict())


def test_state_dict_is_all_floats(classifier):
    """SB3's own tests call ``rand_like`` on each entry."""
    assert all(tensor.is_floating_point() for tensor in classifier.state_dict().values())
    classifier.load_state_dict({name: th.rand_like(tensor) for name, tensor in classifier.state_dict().items()})
    assert classifier(th.zeros(5, 4)).shape == (5,)


def test_chunks(classifier, monkeypatch):
    monkeypatch.setattr(termination, "MAX_LOOKS", 3)
    next_obs, terminated = dataset(1_000, 0.0)
    classifier.fit(next_obs, terminated)
    predicted = classifier.predict(next_obs)
    monkeypatch.setattr(termination, "CHUNK_SIZE", 300)
    assert th.equal(predicted, classifier.predict(next_obs))
    assert classifier.predict(next_obs[:0]).shape == (0,)
