"""Environments, data and functions that misbehave: each ends in learning or in a clear error, never in a silent NaN."""

import csv
import math
import re
import warnings
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mbpo.common import model_env
from sb3_mbpo.common.errors import DivergenceError
from sb3_mbpo.common.update import networks_state
from sb3_mbpo.dynamics import training
from sb3_mbpo.dynamics.training import FitResult
from sb3_mbpo.mbpo.callbacks import MBPOCallback
from tests.agents import make_agent
from tests.envs import CountingEnv, GoalEnv, PointEnv, UnpredictableEnv


def assert_all_finite(agent):
    for module in (agent.policy, agent.dynamics):
        for name, tensor in module.state_dict().items():
            assert th.isfinite(tensor).all(), name
    n = agent.model_buffer.size()
    assert n > 0
    for column in agent.model_buffer._columns():
        assert th.isfinite(column[:n]).all()
    values = {key: value for key, value in agent.logger.name_to_value.items() if isinstance(value, float)}
    assert not {name: value for name, value in values.items() if np.isnan(value)}
    # Where a model blows up in some steps, its error is infinite
    assert not {name: value for name, value in values.items() if np.isinf(value) and not name.startswith("open_loop/")}


# --- Environments -------------------------------------------------------------------------------------------------------


class StrangeEnv(gym.Env):
    """
    Uniform observations and rewards, with something wrong.

    :param kind: What
    """

    def __init__(self, kind):
        self.kind = kind
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def _obs(self):
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        if self.kind == "constant dimensions":
            obs[:2] = 0, 7
        if self.kind == "constant observations":
            obs[:] = 3
        if self.kind == "beyond its bounds":
            obs *= 100
        if self.kind == "tiny observations":
            obs *= 1e-6
        if self.kind == "huge observations":
            obs *= 1e6
        if self.kind == "bounds that change":
            self.observation_space = spaces.Box(-self.np_random.uniform(1, 2), 2, (3,), np.float32)
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        obs = self._obs()
        reward = {"no variance": 2.5, "no reward": 0.0, "huge rewards": 1e6 * obs[0], "tiny rewards": 1e-6 * obs[0]}.get(
            self.kind, float(obs[0])
        )
        terminated = self.kind == "terminates at once" or (
            self.kind == "terminates at random" and self.np_random.random() < 0.2
        )
        truncated = self.kind == "truncated at once" or (self.kind != "never ends" and self.steps == 20)
        return obs, float(reward), terminated, truncated, {}


@pytest.mark.parametrize(
    "kind",
    [
        "terminates at once",
        "truncated at once",
        "terminates at random",
        "never ends",
        "constant dimensions",
        "constant observations",
        "beyond its bounds",
        "bounds that change",
        "tiny observations",
        "huge observations",
        "no variance",
        "no reward",
        "huge rewards",
        "tiny rewards",
    ],
)
def test_strange_environments(kind):
    agent = make_agent(StrangeEnv(kind), rollout_schedule=[0, 0, 3, 3]).learn(170)
    assert agent.dynamics.n_fits == 3 and agent._n_updates == 110
    assert_all_finite(agent)


class ScaledEnv(PointEnv):
    """
    :param scale: Of the rewards
    """

    def __init__(self, scale):
        super().__init__(price=0)
        self.scale = scale

    def step(self, action):
        obs, reward, *others = super().step(action)
        return obs, self.scale * reward, *others


@pytest.mark.parametrize("scale", [1e6, 1, 1e-6])
def test_rewards_of_any_size_are_learned(scale):
    """In raw units, also under a wrapper that normalises them for the policy."""
    env = VecNormalize(DummyVecEnv([lambda: ScaledEnv(scale)]), norm_obs=False)
    agent = make_agent(
        env, learning_starts=500, rollout_batch_size=500, model_hidden_sizes=[64, 64], model_gradient_steps=0.4
    ).learn(501)
    buffer = agent.model_buffer
    true = -scale * buffer.next_observations[:500, 0].abs()
    explained = 1 - ((buffer.rewards[:500, 0] - true).square().mean() / true.var())
    assert explained > 0.8
    assert_all_finite(agent)


@pytest.mark.slow
def test_learns_from_huge_rewards():
    """With what SB3 offers against it: rewards that are normalised for the policy. The model is in raw units."""
    env = VecNormalize(DummyVecEnv([lambda: ScaledEnv(1e6)]), norm_obs=False, gamma=0.95)
    agent = make_agent(
        env,
        learning_starts=200,
        gradient_steps=5,
        batch_size=128,
        learning_rate=1e-3,
        gamma=0.95,
        rollout_batch_size=2_000,
        policy_kwargs={"net_arch": [64, 64]},
        model_hidden_sizes=[64, 64],
    ).learn(1_200)
    plain, returns, best = PointEnv(price=0), [], []
    for seed in range(20):
        obs, _ = plain.reset(seed=seed)
        best.append(PointEnv.best_return(plain.x))
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = plain.step(agent.predict(obs, deterministic=True)[0])
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert np.mean(returns) > np.mean(best) - 3, (np.mean(returns), np.mean(best))


def test_an_interrupted_training_leaves_the_model_as_it_was(monkeypatch):
    """RL Zoo saves the agent after Ctrl-C."""
    agent = make_agent(model_gradient_steps=0.1).learn(62)
    before, adam = deepcopy(agent.dynamics.state_dict()), deepcopy(agent.dynamics.optimizer.state_dict())
    steps, train_step = [], training.train_step

    def interrupted(*args):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(1)
        return train_step(*args)

    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(60, reset_num_timesteps=False)
    assert len(steps) == 2 and same(before, agent.dynamics.state_dict()) and not agent.dynamics.training
    assert_same_adam(adam, agent.dynamics.optimizer.state_dict())


def assert_same_adam(before, after):
    assert before["param_groups"] == after["param_groups"] and len(before["state"]) == len(after["state"]) > 0
    for key, state in before["state"].items():
        assert state["step"] > 0 and same(state, after["state"][key])


# --- Little data --------------------------------------------------------------------------------------------------------


def test_buffer_of_one_transition():
    agent = make_agent(buffer_size=1)
    with pytest.raises(ValueError, match="`buffer_size` must be 2 or more to learn, not 1"):
        agent.learn(61)
    # Enough to act, as scripts that only show an agent know
    make_agent(buffer_size=1).learn(60)
    assert agent.predict(np.zeros(3, dtype=np.float32))[0].shape == (1,)
    make_agent(buffer_size=1, real_ratio=1).learn(70)


@pytest.mark.parametrize("buffer_size, batch_size", [(2, 32), (10, 256), (70, 71)])
def test_buffer_smaller_than_a_batch(buffer_size, batch_size):
    agent = make_agent(buffer_size=buffer_size, batch_size=batch_size).learn(130)
    assert agent.dynamics.n_fits == 2 and agent._n_updates == 70
    assert_all_finite(agent)


@pytest.mark.parametrize("learning_starts", [0, 1, 2])
def test_almost_no_data(learning_starts):
    agent = make_agent(learning_starts=learning_starts).learn(60)
    assert agent.dynamics.is_fitted
    assert_all_finite(agent)


def test_a_single_step():
    agent = make_agent(learning_starts=0).learn(1)
    assert agent.num_timesteps == 1 and not agent.dynamics.is_fitted


# --- Divergence ---------------------------------------------------------------------------------------------------------


def logged(folder):
    """What a CSV logger has written last."""
    with (folder / "progress.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return th.equal(first, second) if isinstance(first, th.Tensor) else first == second


@pytest.mark.parametrize("compile", [False, True], ids=["SAC.train", "compiled"])
@pytest.mark.parametrize("kwargs", [{}, {"ent_coef": 0.1}], ids=["learned entropy", "fixed entropy"])
def test_diverging_updates(compile, kwargs, tmp_path):
    """The last good weights are kept, optimizers and entropy coefficient too; it is logged."""
    agent = make_agent(compile=compile, gradient_steps=3, **kwargs).learn(62)
    assert agent.is_compiled["updates"] is compile
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learning_rate = 1e30
    agent._setup_lr_schedule()
    with pytest.raises(DivergenceError, match=r"Gradient updates diverged at step 62: .*from before.*`learning_rate`"):
        for _ in range(5):
            good = networks_state(agent)
            agent.train(3, 32)
    assert same(good[0], networks_state(agent)[0]) and same(good[2], networks_state(agent)[2])
    for before, after in zip(good[1], networks_state(agent)[1], strict=True):
        assert same(before["state"], after["state"])
    assert logged(tmp_path)["train/diverged"] == "1"
    # It can go on
    agent.learning_rate = 1e-4
    agent._setup_lr_schedule()
    agent.learn(5, reset_num_timesteps=False)
    assert_all_finite(agent)


def test_other_errors_of_train_pass(monkeypatch):
    agent = make_agent().learn(62)
    monkeypatch.setattr(type(agent.replay_buffer), "sample", lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("mine")))
    with pytest.raises(ValueError, match=r"^mine$"):
        agent.train(1, 32)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_diverging_model(compile, tmp_path):
    agent = make_agent(learning_starts=400, compile=compile).learn(401)
    before, adam = deepcopy(agent.dynamics.state_dict()), deepcopy(agent.dynamics.optimizer.state_dict()["state"])
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.model_learning_rate = 1e30
    with pytest.raises(DivergenceError, match=r"dynamics model diverged.*`model_learning_rate`"):
        agent.learn(60, reset_num_timesteps=False)
    assert logged(tmp_path)["model/diverged"] == "1"
    assert same(before, agent.dynamics.state_dict())
    assert all(same(adam[key], state) for key, state in agent.dynamics.optimizer.state_dict()["state"].items())
    assert isinstance(DivergenceError(), ValueError), "what RL Zoo prunes a trial at"


# --- What the model cannot learn ---------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_is_reported():
    """Noise around a mean: the change can be foreseen, as the mean comes next, the reward cannot."""
    agent = make_agent(UnpredictableEnv(), learning_starts=600, model_gradient_steps=0.5)
    pattern = r"predicts the reward no better than a constant: on \d+ held-out transitions, .*of the reward -\d"
    pattern += r".*and a `reward_fn`[^;]*\. If nothing does"
    with pytest.warns(UserWarning, match=pattern) as record:
        agent.learn(700)
    assert len([each for each in record if "no better" in str(each.message)]) == 1


@pytest.fixture
def callback():
    agent = make_agent(CountingEnv(obs_shape=(4,)))
    callback = MBPOCallback()
    callback.init_callback(agent)
    agent.set_logger(configure(None, []))
    return callback


@pytest.mark.parametrize(
    "r2, n_measured, text, poor",
    [
        # (reward, changes); the median lies between two
        ([0.9, 0.8, 0.1, 0.5, 0.6], 50, r"of the changes 0.55 \(worst: obs\[1\] 0.10\), of the reward 0.90", None),
        ([0.9, 0.8, -0.1, math.nan, math.nan], 50, r"changes 0.35 \(worst: obs\[1\] -0.10\)", None),
        (
            [-0.2, 0.8, 0.8, 0.8, 0.7],
            50,
            r"changes 0.80 \(worst: obs\[3\] 0.70\), of the reward -0.20",
            "the reward",
        ),
        (
            [0.5, -1.0, -1.0, -1.0, 0.7],
            50,
            r"changes -1.00 \(worst: obs\[0\] -1.00\)",
            "the change of the observation",
        ),
        # By chance
        ([-0.2, -1.0, -1.0, -1.0, 0.7], 49, r"changes -1.00", None),
        ([math.nan] * 5, 50, "unknown", None),
    ],
)
def test_what_is_said_of_the_model(r2, n_measured, text, poor, callback):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", UserWarning)
        said = callback._quality(FitResult(0.0, 1, th.tensor(r2), n_measured))
    assert re.search(text, said)
    assert [f"predicts {poor} no better than a constant" in str(each.message) for each in record] == (
        [] if poor is None else [True]
    )
    # What to try is for what is poor
    for name, advice in (("the change", "FrameStackObservation"), ("the reward", "a `reward_fn`")):
        assert [advice in str(each.message) for each in record] == ([] if poor is None else [name in poor])
    values = callback.model.logger.name_to_value
    changes = np.array(r2[1:])[~np.isnan(r2[1:])]
    if len(changes) > 0:
        assert values["model/r2"] == pytest.approx(np.median(changes))
        assert values["model/r2_worst"] == pytest.approx(changes.min()) and values["model/reward_r2"] == pytest.approx(r2[0])
    else:
        assert not any("r2" in name for name in values)


def test_nobody_is_told_of_a_reward_that_is_given():
    agent = make_agent(
        UnpredictableEnv(),
        learning_starts=600,
        model_gradient_steps=0.5,
        reward_fn=lambda obs, action, next_obs: np.zeros(len(obs)),
    )
    with pytest.warns(UserWarning, match="`reward_fn` disagrees") as record:
        agent.learn(601)
    assert not any("no better" in str(each.message) for each in record)
    assert "model/reward_r2" not in agent.logger.name_to_value


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rewards_of_any_precision(dtype):
    """In model rollouts of all kinds, of an environment in float64."""
    agent = make_agent(
        UnpredictableEnv(),
        value_expansion_horizon=1,
        reward_fn=lambda obs, action, next_obs: next_obs[:, 0].astype(dtype),
        termination_fn=lambda obs, action, next_obs: np.zeros(len(obs), dtype=bool),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        agent.learn(70)
        start = th.zeros(5, 2, dtype=th.float64)
        assert model_env.ModelEnv(agent, agent.get_env()).returns(start, 3).isfinite().all()


def test_functions_get_the_precision_of_what_is_stored():
    """Actions in float32 whatever the observations are, in model rollouts these too: a function may be a network."""
    network, seen = th.nn.Linear(1, 1), set()

    def reward_fn(obs, action, next_obs):
        seen.add((obs.dtype.name, action.dtype.name, next_obs.dtype.name))
        return network(th.as_tensor(action)).detach().numpy()[:, 0]

    env = UnpredictableEnv()
    env.observation_space = spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*disagrees")
        make_agent(env, reward_fn=reward_fn).learn(151)
    assert {("float32", "float32", "float32")} <= seen and all(actions == "float32" for _, actions, _ in seen)


class GoalOfEpisodeEnv(UnpredictableEnv):
    """Its second dimension stays for an episode."""

    goal = 1.7

    def reset(self, *, seed=None, options=None):
        self.goal += 0.1
        return super().reset(seed=seed)

    def observed(self):
        return np.array([float(self.x), self.goal])


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize])
def test_what_stays_for_an_episode(wrap):
    """
    It is known exactly, though it is in float64 and rollouts are not, and though under VecNormalize last observations are
    rounded to float32, where it must not seem to change.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        agent = make_agent(wrap(DummyVecEnv([GoalOfEpisodeEnv])), learning_starts=200).learn(251)
    assert agent.dynamics.target_std[2] == 0 < agent.dynamics.target_std[1]
    error = agent.open_loop_error
    assert error.r2()[0].isnan().tolist() == [False, False, True] and error.inside[0, 0, 2] == 1


@pytest.mark.parametrize("wrap", [lambda env: env, lambda env: VecNormalize(DummyVecEnv([lambda: env]))])
def test_a_clock_is_reported(wrap):
    agent = make_agent(wrap(UnpredictableEnv(with_clock=True)))
    pattern = r"obs\[1\] of the observation cannot be told apart.*up to 1.7e\+09 and change by about 60.*Subtract a constant"
    with pytest.warns(UserWarning, match=pattern):
        agent.learn(61)
    # Taken in float64, the change is always the same
    if agent.get_vec_normalize_env() is None:
        assert agent.dynamics.target_std[2] == 0 and agent.dynamics.target_mean[2] == 60


# --- Functions of the user ----------------------------------------------------------------------------------------------


def test_wrong_termination_is_reported_with_an_example():
    """Once, and it goes on: whose fault it is, nobody knows."""
    agent = make_agent(CountingEnv(), termination_fn=lambda obs, action, next_obs: next_obs[:, 0] > 6)
    pattern = (
        r"`termination_fn` disagrees with the environment on 18 of 61 real transitions. For obs \[6. 6.\], action \[.*\], "
        r"next_obs \[7. 7.\] a terminal transition is True by the function and False by the environment."
    )
    with pytest.warns(UserWarning, match=pattern) as record:
        agent.learn(170)
    assert len([each for each in record if "disagrees" in str(each.message)]) == 1


def test_missing_terminations_are_reported_though_they_are_few():
    """One of 100 transitions is terminal: too few to be 1 % of all, but all of them."""
    agent = make_agent(
        CountingEnv(episode_length=150),
        termination_fn=lambda obs, action, next_obs: np.zeros(len(obs), dtype=bool),
        learning_starts=160,
    )
    with pytest.warns(UserWarning, match=r"on 1 of 161 real transitions.*False by the function and True by the environment"):
        agent.learn(161)


def test_wrong_reward_is_reported_with_an_example():
    agent = make_agent(CountingEnv(low=3.0, high=7.0, noise=0), reward_fn=lambda obs, action, next_obs: action[:, 0] * 1.1)
    with pytest.warns(
        UserWarning, match=r"`reward_fn` disagrees.*on 61 of 61.*action \[\d\.\d+\].*the reward is \d\.\d+ by the"
    ):
        agent.learn(61)
    assert agent.logger.name_to_value["model/reward_mismatch"] == 1


def test_wrong_derived_termination_is_reported(monkeypatch):
    monkeypatch.setattr(model_env, "derive_termination_fn", lambda env: lambda obs, action, next_obs: next_obs[:, 0] > 1e9)
    with pytest.warns(UserWarning, match=r"The termination derived from the environment disagrees"):
        make_agent(CountingEnv()).learn(61)


@pytest.mark.parametrize(
    "termination_fn", [None, lambda obs, action, next_obs: next_obs[:, 0] >= 10], ids=["learned", "right"]
)
def test_no_report_without_reason(termination_fn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = make_agent(
            CountingEnv(noise=0.001), termination_fn=termination_fn, reward_fn=lambda obs, action, next_obs: action[:, 0]
        ).learn(120)
    assert agent.logger.name_to_value["model/reward_mismatch"] < 0.01


def test_example_of_dictionaries():
    agent = make_agent(
        GoalEnv(terminate=True),
        "MultiInputPolicy",
        termination_fn=lambda obs, action, next_obs: obs["observation"][:, 0, 0] > 0,
    )
    with pytest.warns(UserWarning, match=r"(?s)For obs \{'achieved_goal': .*'desired_goal'.* a terminal transition is True"):
        agent.learn(61)


@pytest.mark.parametrize("name", ["termination_fn", "reward_fn"])
@pytest.mark.parametrize("fault", ["raises", "shape"])
def test_functions_that_fail_in_training(name, fault):
    """Not on the zeros that they are tried on, but on real data."""

    def function(obs, action, next_obs):
        values = np.zeros(len(obs), dtype=bool if name == "termination_fn" else float)
        if (obs == 0).all():
            return values
        if fault == "raises":
            raise RuntimeError("my own mistake")
        return values[:, None]

    agent = make_agent(**{name: function})
    pattern = {"raises": r"my own mistake.*first transition of which is obs \[", "shape": r"with shape \(61,\)"}[fault]
    with pytest.raises(ValueError, match=f"(?s)`{name}`.*{pattern}"):
        agent.learn(70)


def test_timeouts_that_are_stored_as_terminations_are_no_fault_of_the_function():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_agent(replay_buffer_kwargs={"handle_timeout_termination": False}, learning_starts=210).learn(211)
