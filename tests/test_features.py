"""SB3's SAC and MBPO side by side: arguments, spaces, wrappers, errors and seeds. docs/features.md names these tests."""

import inspect
import re
from contextlib import nullcontext
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.wrappers import TimeFeatureWrapper
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)
from torch import nn

from sb3_mbpo import MBPO
from sb3_mbpo.common.buffers import real_transitions
from tests import envs
from tests.agents import SMALL
from tests.envs import CountingEnv, GoalEnv, PointEnv

OF_SAC = {name: value for name, value in SMALL.items() if name in inspect.signature(SAC).parameters}


def make(cls, env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    """A small agent, of SAC or MBPO, with the same arguments. How good its model is does not matter here."""
    return cls(policy, env, **{**(SMALL if cls is MBPO else OF_SAC), **kwargs})


def pendulums(n_envs=1, vec_env_cls=DummyVecEnv, **kwargs):
    return make_vec_env("Pendulum-v1", n_envs=n_envs, vec_env_cls=vec_env_cls, vec_env_kwargs=kwargs)


class BoxEnv(CountingEnv):
    """
    Refuses an action that is not in its space. Observations count the steps, the reward is the sum of the action.
    """

    def __init__(self, action_space=None, observation_space=None):
        super().__init__()
        self.action_space = action_space or self.action_space
        self.observation_space = observation_space or self.observation_space

    def step(self, action):
        assert action.shape == self.action_space.shape and self.action_space.contains(np.asarray(action)), action
        obs, _, *others = super().step(np.ravel(action))
        return obs, float(np.sum(action)), *others


class TinyImages(gym.ObservationWrapper):
    """Observations of whole numbers become pictures of floats."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (1, 36, 36), np.float32)

    def observation(self, observation):
        return np.full((1, 36, 36), observation[0], np.float32)


class Video(CountingEnv):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    render_mode = "rgb_array"

    def render(self):
        return np.full((64, 64, 3), self.count, np.uint8)


class Normalizing(BaseFeaturesExtractor):
    """Learns, keeps statistics, and acts at random in training mode."""

    def __init__(self, observation_space, dim=8):
        super().__init__(observation_space, dim)
        self.layers = nn.Sequential(nn.Linear(observation_space.shape[0], dim), nn.BatchNorm1d(dim), nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


def architecture(**kwargs):
    return dict(policy_kwargs={"net_arch": [16], **kwargs})


def never(obs, action, next_obs):
    """A termination function; what is not known takes seconds to learn."""
    return np.zeros(len(action), dtype=bool)


def known(cls):
    return {"termination_fn": never} if cls is MBPO else {}


def noise(cls=NormalActionNoise, n=1):
    return cls(np.zeros(n), 0.2 * np.ones(n))


# Name: environment, arguments. Functions, as environments and noise have a state.
FEATURES = {
    "no options": lambda: {},
    "id": lambda: dict(env="Pendulum-v1"),
    "environment": lambda: dict(env=gym.make("Pendulum-v1")),
    # Arguments in SAC's order
    "learning_rate: schedule": lambda: dict(learning_rate=lambda progress: 1e-2 * progress),
    "learning_rate: LinearSchedule": lambda: dict(learning_rate=LinearSchedule(1e-2, 1e-4, 0.5)),
    "learning_rate: ConstantSchedule": lambda: dict(learning_rate=ConstantSchedule(1e-2)),
    "buffer_size": lambda: dict(buffer_size=40),
    "learning_starts": lambda: dict(learning_starts=0),
    "batch_size": lambda: dict(batch_size=7),
    "tau": lambda: dict(tau=1.0),
    "gamma": lambda: dict(gamma=0.5),
    "train_freq: 4": lambda: dict(train_freq=4),
    "train_freq: steps": lambda: dict(train_freq=(3, "step"), gradient_steps=2),
    "train_freq: episodes": lambda: dict(env=CountingEnv(), train_freq=(2, "episode"), gradient_steps=-1),
    "gradient_steps: -1": lambda: dict(env=pendulums(3), train_freq=2, gradient_steps=-1),
    "gradient_steps: 0": lambda: dict(gradient_steps=0),
    "action_noise": lambda: dict(action_noise=noise()),
    "action_noise: Ornstein-Uhlenbeck, vectorised": lambda: dict(
        env=pendulums(2), action_noise=VectorizedActionNoise(noise(OrnsteinUhlenbeckActionNoise), 2)
    ),
    "action_noise: several environments": lambda: dict(
        env=make_vec_env(CountingEnv, n_envs=3), action_noise=noise(OrnsteinUhlenbeckActionNoise)
    ),
    "replay_buffer_class": lambda: dict(
        replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs={"n_steps": 2, "gamma": 0.9}
    ),
    "replay_buffer_class: HerReplayBuffer": lambda: dict(
        env=GoalEnv(),
        policy="MultiInputPolicy",
        buffer_size=200,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 2},
    ),
    "replay_buffer_kwargs": lambda: dict(env=CountingEnv(), replay_buffer_kwargs={"handle_timeout_termination": False}),
    "optimize_memory_usage": lambda: dict(
        optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}
    ),
    "n_steps": lambda: dict(env=pendulums(2), n_steps=3),
    "ent_coef": lambda: dict(ent_coef=0.1),
    "ent_coef: auto_0.1": lambda: dict(ent_coef="auto_0.1"),
    "target_update_interval": lambda: dict(gradient_steps=5, target_update_interval=2),
    "target_entropy": lambda: dict(target_entropy=-0.3),
    "use_sde": lambda: dict(use_sde=True, train_freq=4),
    "sde_sample_freq": lambda: dict(use_sde=True, sde_sample_freq=3, train_freq=10),
    "use_sde_at_warmup": lambda: dict(env=pendulums(2), use_sde=True, use_sde_at_warmup=True),
    "seed": lambda: dict(seed=3),
    # policy_kwargs
    "policy class": lambda: dict(policy=SAC.policy_aliases["MlpPolicy"]),
    "net_arch": lambda: architecture(net_arch={"pi": [8], "qf": [12, 6]}),
    "activation_fn": lambda: architecture(activation_fn=nn.ELU),
    "n_critics": lambda: architecture(n_critics=3),
    "optimizer_class": lambda: architecture(optimizer_class=RMSpropTFLike, optimizer_kwargs={"eps": 1e-4}),
    "log_std_init": lambda: dict(use_sde=True, **architecture(log_std_init=-1, use_expln=True, clip_mean=1.0)),
    "features_extractor_class": lambda: architecture(
        features_extractor_class=Normalizing, features_extractor_kwargs={"dim": 4}, share_features_extractor=True
    ),
    # Policies and spaces
    "MultiInputPolicy": lambda: dict(env=GoalEnv(), policy="MultiInputPolicy", buffer_size=200),
    "CnnPolicy, images of floats": lambda: dict(
        env=TinyImages(CountingEnv()), policy="CnnPolicy", buffer_size=100, **architecture(normalize_images=False)
    ),
    "observations (2, 1)": lambda: dict(env=CountingEnv(obs_shape=(2, 1))),
    "observations float64": lambda: dict(env=CountingEnv(dtype=np.float64)),
    "actions (2, 2)": lambda: dict(env=BoxEnv(spaces.Box(-2, 5, (2, 2)))),
    # Vectorised environments and their wrappers
    "DummyVecEnv": lambda: dict(env=pendulums(2)),
    "SubprocVecEnv": lambda: dict(env=pendulums(2, SubprocVecEnv, start_method="fork")),
    "VecNormalize": lambda: dict(env=VecNormalize(pendulums(2))),
    "VecNormalize in VecMonitor": lambda: dict(env=VecMonitor(VecNormalize(DummyVecEnv([CountingEnv])))),
    "VecFrameStack in VecNormalize": lambda: dict(env=VecNormalize(VecFrameStack(pendulums(2), 3))),
    "VecMonitor": lambda: dict(env=VecMonitor(DummyVecEnv([CountingEnv]))),
    "VecCheckNan": lambda: dict(env=VecCheckNan(pendulums(2))),
    "VecExtractDictObs": lambda: dict(env=VecExtractDictObs(DummyVecEnv([GoalEnv]), "observation")),
    "TimeFeatureWrapper": lambda: dict(env=TimeFeatureWrapper(gym.make("Pendulum-v1"))),
}


def assert_same(first, second):
    for (name, expected), actual in zip(first.policy.state_dict().items(), second.policy.state_dict().values(), strict=True):
        assert th.equal(expected, actual), name


def steps_in(agent):
    return agent.num_timesteps, agent._n_updates, agent._episode_num, agent.replay_buffer.size()


@pytest.mark.parametrize("name", FEATURES)
def test_without_its_model_it_is_sac(name):
    """The collecting of data and the updates are SAC's, to the last bit; so are buffers, optimizers and counts."""
    sac, mbpo = make(SAC, **FEATURES[name]()).learn(80), make(MBPO, real_ratio=1, **FEATURES[name]()).learn(80)
    assert steps_in(sac) == steps_in(mbpo)
    assert_same(sac, mbpo)
    for part in ("replay_buffer", "policy", "action_noise", "actor.optimizer", "critic.optimizer"):
        sacs, ours = (eval(f"agent.{part}", {"agent": agent}) for agent in (sac, mbpo))
        assert type(sacs) is type(ours), part
    assert np.array_equal(sac.replay_buffer.actions, mbpo.replay_buffer.actions)
    for agent in (sac, mbpo):
        agent.get_env().close()


@pytest.mark.parametrize("name", FEATURES)
def test_with_its_model_it_learns(name):
    """Nothing is lost on the way to the model: rollouts begin in each of the real states, and SAC's updates follow."""
    # The model is trained once, at the end
    kwargs = dict(learning_starts=79)
    ours = dict(model_train_freq=78, rollout_batch_size=1_000, termination_fn=never)
    agent = make(MBPO, **{**kwargs, **ours, **FEATURES[name]()})
    before = {key: tensor.clone() for key, tensor in agent.policy.state_dict().items()}
    agent.learn(80)
    assert steps_in(agent) == steps_in(make(SAC, **{**kwargs, **FEATURES[name]()}).learn(80))
    # In hindsight goals are others
    parts = slice(4, 7) if "HerReplayBuffer" in name else slice(None)
    real = real_transitions(agent.replay_buffer).obs[:, parts].float().unique(dim=0)
    start = agent.model_buffer.observations[: agent.model_buffer.pos][-1_000:, parts].unique(dim=0)
    assert th.equal(start, real) and len(real) >= 10
    if agent.gradient_steps != 0:
        assert any(not th.equal(tensor, before[key]) for key, tensor in agent.policy.state_dict().items())
    assert all(th.isfinite(tensor).all() for tensor in agent.policy.state_dict().values())
    agent.get_env().close()


@pytest.mark.parametrize("env", ["Pendulum-v1", pendulums(3)], ids=["one", "three"])
def test_the_warm_up_is_sacs(env):
    """With its model, too: actions, observations and rewards up to the first update."""
    sac, mbpo = (make(cls, env).learn(60) for cls in (SAC, MBPO))
    for name in ("observations", "actions", "rewards"):
        assert np.array_equal(getattr(sac.replay_buffer, name), getattr(mbpo.replay_buffer, name)), name


def test_defaults_that_differ_from_sacs():
    sac, mbpo = (cls("MlpPolicy", "Pendulum-v1", buffer_size=10) for cls in (SAC, MBPO))
    names = [
        name for name in vars(sac) if not name.startswith("_") and isinstance(getattr(sac, name), int | float | str | None)
    ]
    assert {name for name in names if getattr(sac, name) != getattr(mbpo, name)} == {"learning_starts", "gradient_steps"}


# --- Action noise, gSDE, learning rates, entropy ----------------------------------------------------------------------


def test_action_noise_is_of_each_environment_and_not_in_the_model():
    """Of two environments with one policy, one is always pushed up and one down."""
    pushes = [NormalActionNoise(np.full(1, mean), np.full(1, 1e-3)) for mean in (5.0, -5.0)]
    agent = make(MBPO, pendulums(2), action_noise=noise())
    agent.learn(1)
    assert isinstance(agent.action_noise, VectorizedActionNoise) and agent.action_noise.n_envs == 2
    agent.action_noise.noises = pushes
    agent.learn(80)
    actions = agent.replay_buffer.actions[: agent.replay_buffer.size(), :, 0]
    assert (actions[:, 0] == 1).sum() >= 39 and (actions[:, 1] == -1).sum() >= 39
    assert (agent.model_buffer.actions[: agent.model_buffer.size()].abs() < 1).all()


@pytest.mark.parametrize("at_warmup", [True, False])
def test_gsde_at_warmup(at_warmup):
    """A smooth function of the state and one noise matrix, or chance."""
    agent = make(MBPO, CountingEnv(episode_length=100), use_sde=True, use_sde_at_warmup=at_warmup, train_freq=60).learn(60)
    changes = np.abs(np.diff(agent.replay_buffer.actions[10:60, 0, 0]))
    assert (changes.max() < 0.2) == at_warmup


@pytest.mark.parametrize("compile", [False, True])
def test_learning_rate_schedule(compile):
    agent = make(MBPO, learning_rate=LinearSchedule(1e-2, 1e-3, 1.0), compile=compile).learn(100)
    # Of the last update, after all steps are done; the model keeps its own
    assert [agent.actor.optimizer.param_groups[0]["lr"], agent.ent_coef_optimizer.param_groups[0]["lr"]] == pytest.approx(
        [1e-3] * 2
    )
    assert agent.critic.optimizer.param_groups[0]["lr"] == agent.logger.name_to_value["train/learning_rate"]
    assert agent.dynamics.optimizer.param_groups[0]["lr"] == agent.model_learning_rate
    assert agent.logger.name_to_value["train/compiled"] == compile


def test_networks_with_statistics_and_dropout():
    """Batch norm's statistics change in updates only, and are copied to the target; predictions are not random."""
    agent = make(MBPO, gradient_steps=0, **architecture(features_extractor_class=Normalizing))

    def statistics(network):
        return network.features_extractor.layers[1].running_mean.clone()

    agent.learn(80)
    assert agent.model_buffer.size() == 100 and all(not statistics(net).any() for net in (agent.actor, agent.critic))
    agent.gradient_steps = 2
    agent.learn(10, reset_num_timesteps=False)
    assert all(statistics(net).any() for net in (agent.actor, agent.critic))
    assert th.equal(statistics(agent.critic), statistics(agent.critic_target))
    obs = np.ones((5, 3), np.float32)
    assert len(np.unique([agent.predict(obs, deterministic=True)[0] for _ in range(5)], axis=0)) == 1


# --- Spaces -----------------------------------------------------------------------------------------------------------

ACTION_SPACES = [
    spaces.Box(-2, 3, (1,)),
    spaces.Box(-2, 3, (2, 2)),
    spaces.Box(-2, 3, ()),
    spaces.Box(np.array([-1, 0, 5], np.float32), np.array([1, 3, 7], np.float32)),
    spaces.Box(0, 1e6, (2,)),
    spaces.Box(-2, 3, (2,), np.float64),
]


@pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")
@pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
def test_action_spaces(space):
    """Whoever sees actions (environment, user's functions, caller of `predict`) sees them in their space."""
    seen = []

    def reward_fn(obs, action, next_obs):
        seen.append(action)
        return action.reshape(len(action), -1).sum(axis=1)

    agent = make(MBPO, BoxEnv(space), reward_fn=reward_fn, termination_fn=never).learn(70)
    assert seen[-1].shape == (100, *space.shape)
    assert all(space.contains(action.astype(space.dtype)) for action in seen[-1])
    # Each dimension in its own units
    scaled = agent.model_buffer.actions[:100].numpy()
    width = (space.high - space.low).ravel()
    expected = space.low.ravel() + (scaled + 1) / 2 * width
    np.testing.assert_allclose(seen[-1].reshape(100, -1) / width, expected / width, atol=1e-5)
    assert scaled.std() > 0.1 and np.abs(scaled).max() <= 1
    obs = agent.get_env().reset()
    assert agent.predict(obs)[0].shape == (1, *space.shape) and agent.predict(obs[0])[0].shape == space.shape
    evaluate_policy(agent, agent.get_env(), n_eval_episodes=1, warn=False)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (1,)),
        spaces.Box(-1, 100, (2, 1)),
        spaces.Box(-1, 100, (2, 1, 1, 2), np.float64),
        spaces.Box(-np.inf, np.inf, (2,), np.float16),
    ],
    ids=str,
)
def test_observation_spaces(space):
    agent = make(MBPO, BoxEnv(observation_space=space), termination_fn=never).learn(70)
    sample = agent.mixed_buffer.sample(40)
    assert sample.observations.shape == (40, *space.shape)
    # What the model learned is one more at each step, but for the first step of an episode
    assert np.array_equal(np.unique(agent.model_buffer.observations[:100]), np.arange(10))
    obs = agent.get_env().reset()
    assert agent.predict(obs[0])[0].shape == (1,)


@pytest.mark.filterwarnings("ignore:Your observation .* has an unconventional shape")
@pytest.mark.parametrize("env", [CountingEnv, PointEnv, GoalEnv, BoxEnv])
def test_the_environments_here_are_valid(env):
    assert env.__module__ in (envs.__name__, __name__)
    check_env(env())


# --- Wrappers ---------------------------------------------------------------------------------------------------------

NORMALIZED = {
    "all": VecNormalize,
    "observations only": lambda env: VecNormalize(env, norm_reward=False),
    "rewards only": lambda env: VecNormalize(env, norm_obs=False),
    "inside": lambda env: VecMonitor(VecNormalize(env)),
    "outside": lambda env: VecNormalize(VecCheckNan(VecFrameStack(env, 2))),
}


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize("set_env", [False, True])
def test_model_in_raw_units_policy_in_normalised(name, set_env):
    """Raw observations are whole numbers from 0 to 29, raw rewards at most 1.4."""
    env = NORMALIZED[name](make_vec_env(lambda: CountingEnv(episode_length=30), n_envs=2))
    if set_env:
        other = (
            VecFrameStack(make_vec_env(CountingEnv, n_envs=2), 2) if name == "outside" else make_vec_env(CountingEnv, n_envs=2)
        )
        agent = make(MBPO, other, termination_fn=never)
        agent.set_env(env)
    else:
        agent = make(MBPO, env, termination_fn=never)
    normalizer = agent.get_vec_normalize_env()
    assert isinstance(normalizer, VecNormalize)
    seen = []
    agent.actor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    agent.learn(62)
    start = agent.model_buffer.observations[:100].numpy()
    assert np.array_equal(start, start.round()) and start.max() > 25
    given = next(obs for obs in seen if len(obs) == 100).numpy()
    # The rollouts were made with the statistics of now
    np.testing.assert_allclose(given, normalizer.normalize_obs(start), atol=1e-5)
    assert np.array_equal(given, start) == (name == "rewards only")
    rewards = agent.mixed_buffer.sample(1_000, env=normalizer).rewards[500:]
    raw = agent.model_buffer.rewards[:100]
    expected = normalizer.normalize_reward(raw.numpy())
    assert rewards.numpy().min() >= expected.min() - 1e-5 and rewards.numpy().max() <= expected.max() + 1e-5


@pytest.mark.parametrize("cls", [SAC, MBPO])
def test_last_observation_under_vec_normalize(cls):
    """
    `VecNormalize` clips the last observation of an episode, and SB3 stores what it can undo of it. SAC clips it again,
    but to a model it is wrong, as far as it is an outlier.
    """
    for clip_obs, is_exact in ((10.0, True), (1.5, False)):
        env = VecNormalize(DummyVecEnv([lambda: CountingEnv(episode_length=30)]), clip_obs=clip_obs)
        is_told = cls is MBPO and not is_exact
        with pytest.warns(UserWarning, match="raise `clip_obs`") if is_told else nullcontext():
            buffer = make(cls, env, **known(cls)).learn(60).replay_buffer
        inner, last = buffer.next_observations[:29], buffer.next_observations[29]
        assert np.array_equal(inner[:, 0, 0], np.arange(1, 30))
        assert (np.abs(last - 30) < 1e-3).all() == is_exact


@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos")
def test_video_recorder(tmp_path):
    env = VecVideoRecorder(DummyVecEnv([Video]), str(tmp_path), record_video_trigger=lambda step: step == 65, video_length=5)
    make(MBPO, env, termination_fn=never).learn(75)
    env.close()
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["rl-video-step-65-to-step-70.mp4"]


def test_an_observation_with_time_is_another_observation(capsys):
    """Whose termination is not the one that is known of the environment inside."""
    make(MBPO, gym.make("Hopper-v5"), verbose=1).learn(1)
    assert "derived from the environment" in capsys.readouterr().out
    make(MBPO, TimeFeatureWrapper(gym.make("Hopper-v5")), verbose=1).learn(1)
    assert "learned from the replay buffer" in capsys.readouterr().out


# --- What is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "MlpPolicy, dict": lambda cls: make(cls, GoalEnv()),
    "MultiInputPolicy, box": lambda cls: make(cls, policy="MultiInputPolicy"),
    "CnnPolicy, vector": lambda cls: make(cls, policy="CnnPolicy"),
    "policy": lambda cls: make(cls, policy="LstmPolicy"),
    "no such argument": lambda cls: make(cls, clip_range=0.2),
    "no such environment": lambda cls: make(cls, "NoSuchEnv-v0"),
    "train_freq: unit": lambda cls: make(cls, train_freq=(1, "steps")),
    "train_freq: list": lambda cls: make(cls, train_freq=[1, "episode"]),
    "train_freq: float": lambda cls: make(cls, train_freq=1.5),
    "train_freq: episodes of several": lambda cls: make(cls, pendulums(2), train_freq=(1, "episode")).learn(10),
    "ent_coef": lambda cls: make(cls, ent_coef="low"),
    "ent_coef: auto_0": lambda cls: make(cls, ent_coef="auto_0"),
    "target_entropy": lambda cls: make(cls, target_entropy="low"),
    "n_steps, dict": lambda cls: make(cls, GoalEnv(), policy="MultiInputPolicy", n_steps=3),
    "n_steps, optimize_memory_usage": lambda cls: make(
        cls, n_steps=3, optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}
    ),
    "optimize_memory_usage": lambda cls: make(cls, optimize_memory_usage=True),
    "optimize_memory_usage, dict": lambda cls: make(
        *(cls, GoalEnv(), "MultiInputPolicy"),
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
    ),
    "set_env: number": lambda cls: make(cls).set_env(pendulums(2)),
    "set_env: spaces": lambda cls: make(cls).set_env(CountingEnv()),
    "predict: shape": lambda cls: make(cls).predict(np.zeros(7, np.float32)),
    "learn: no such argument": lambda cls: make(cls).learn(10, eval_env=None),
    "VecFrameStack of VecNormalize": lambda cls: make(cls, VecFrameStack(VecNormalize(pendulums()), 2)).learn(1),
    "VecCheckNan": lambda cls: make(
        cls, VecCheckNan(DummyVecEnv([lambda: envs.FaultyEnv("reward", np.nan, 1)]), raise_exception=True, warn_once=False)
    ).learn(2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_by_sac(name):
    """The same error, with the same message."""
    with pytest.raises(Exception) as sacs:
        REFUSED[name](SAC)
    with pytest.raises(type(sacs.value)) as ours:
        REFUSED[name](MBPO)
    assert str(ours.value).replace("MBPO", "SAC") == str(sacs.value)


@pytest.mark.parametrize("train_freq", [0, (0, "episode")])
def test_train_freq_of_zero(train_freq):
    """SB3 says so in `learn()`."""
    with pytest.raises(ValueError, match="`train_freq` must be 1 or more steps or episodes, not 0"):
        make(MBPO, train_freq=train_freq)


def test_n_steps_of_a_buffer_of_ones_own():
    """SB3 warns that it does nothing then."""
    with pytest.warns(UserWarning, match="`n_steps=3` is ignored"):
        make(MBPO, n_steps=3, replay_buffer_class=ReplayBuffer)


# --- Seeds and a training in parts ------------------------------------------------------------------------------------

SEEDED = {
    "default": lambda: {},
    "SubprocVecEnv": lambda: dict(env=pendulums(2, SubprocVecEnv, start_method="fork")),
    "gSDE": lambda: dict(use_sde=True, use_sde_at_warmup=True),
    "noise": lambda: dict(env=pendulums(2), action_noise=noise(OrnsteinUhlenbeckActionNoise)),
    "VecNormalize": lambda: dict(env=VecNormalize(pendulums(2))),
    "hindsight": lambda: dict(termination_fn=never, **FEATURES["replay_buffer_class: HerReplayBuffer"]()),
    "learned termination": lambda: dict(env=PointEnv(), model_train_freq=100),
    "dropout": FEATURES["features_extractor_class"],
    "compiled": lambda: dict(compile=True),
    "compiled, several": lambda: dict(compile=True, env=pendulums(2), gradient_steps=-1),
}


def assert_same_agents(first, second):
    assert_same(first, second)
    for name in ("dynamics", "termination_classifier"):
        for key, tensor in getattr(first, name).state_dict().items():
            assert th.equal(tensor, getattr(second, name).state_dict()[key]), (name, key)
    size = first.model_buffer.size()
    assert size == second.model_buffer.size() > 0
    for column, other in zip(first.model_buffer._columns(), second.model_buffer._columns(), strict=True):
        assert th.equal(column[:size], other[:size])


@pytest.mark.parametrize("name", SEEDED)
def test_one_seed_one_agent(name):
    """Policy, model and all that was generated; another seed gives another agent."""
    first, second, other = (make(MBPO, **{**SEEDED[name](), "seed": seed}).learn(112) for seed in (3, 3, 4))
    assert_same_agents(first, second)
    assert not th.equal(first.dynamics.weights[0], other.dynamics.weights[0])
    assert not np.array_equal(first.replay_buffer.actions, other.replay_buffer.actions)
    assert not th.equal(first.model_buffer.observations[:100], other.model_buffer.observations[:100])
    assert first.is_compiled == dict.fromkeys(("updates", "model"), name.startswith("compiled"))
    assert first.logger.name_to_value["train/compiled"] == name.startswith("compiled")
    for agent in (first, second, other):
        agent.get_env().close()


def test_no_seed_no_two_alike():
    first, second = (make(MBPO, seed=None).learn(61) for _ in range(2))
    assert not th.equal(first.dynamics.weights[0], second.dynamics.weights[0])


def test_processes_or_not_is_the_same():
    agents = [make(MBPO, pendulums(2, cls, **kwargs)).learn(80) for cls, kwargs in PARALLEL]
    assert_same_agents(*agents)
    for agent in agents:
        agent.get_env().close()


PARALLEL = [(DummyVecEnv, {}), (SubprocVecEnv, {"start_method": "fork"})]


@pytest.mark.parametrize("kwargs", [{}, dict(train_freq=4, gradient_steps=2), dict(n_steps=3), dict(use_sde=True)], ids=str)
def test_in_parts_as_in_one(kwargs):
    """The second call of `learn` goes on exactly where the first one stopped; as SAC's does."""
    for cls in (SAC, MBPO):
        whole, parts = make(cls, **kwargs).learn(120), make(cls, **kwargs).learn(80)
        parts.learn(40, reset_num_timesteps=False)
        assert steps_in(whole) == steps_in(parts)
        (assert_same if cls is SAC else assert_same_agents)(whole, parts)


def test_memory_efficient_buffer_between_two_calls():
    """SB3 ends the episode that was running. No row across that end trains the model: each counts one step."""
    agent = make(
        *(MBPO, CountingEnv(episode_length=50)),
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        termination_fn=lambda obs, action, next_obs: next_obs[:, 0] >= 50,
    ).learn(70)
    with pytest.warns(UserWarning, match="last trajectory in the replay buffer will be truncated"):
        agent.learn(70)
    assert agent.dynamics.is_fitted and np.flatnonzero(agent.replay_buffer.dones[:140]).tolist() == [49, 69, 119]
    real = real_transitions(agent.replay_buffer)
    assert len(real.obs) == 140 - 3 and (real.next_obs - real.obs == 1).all()


# --- Methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3])
def test_predict_is_sacs(n_envs):
    """With the same weights the same actions, also random ones, of one observation or several."""
    sac, mbpo = (make(cls, pendulums(n_envs)) for cls in (SAC, MBPO))
    mbpo.set_parameters(sac.learn(80).get_parameters(), exact_match=False)
    observations = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for obs in (observations, observations[0]):
        for deterministic in (True, False):
            results = []
            for agent in (sac, mbpo):
                agent.set_random_seed(1)
                results.append(agent.predict(obs, state=None, episode_start=np.ones(1), deterministic=deterministic))
            assert np.array_equal(results[0][0], results[1][0]) and results[0][1] is results[1][1] is None
            assert results[0][0].shape == (*obs.shape[:-1], 1)


def test_evaluation_leaves_the_agent_alone():
    """As in `EvalCallback`: the agent goes on as if it had not been evaluated, with its own environment untouched."""
    agents = []
    for evaluate in (True, False):
        agents.append(agent := make(MBPO).learn(70))
        if evaluate:
            rewards, lengths = evaluate_policy(
                agent, Monitor(gym.make("Pendulum-v1")), n_eval_episodes=3, return_episode_rewards=True
            )
            assert len(rewards) == 3 and lengths == [200] * 3
        agent.learn(50, reset_num_timesteps=False)
    assert_same_agents(*agents)


@pytest.mark.parametrize("cls", [SAC, MBPO])
@pytest.mark.parametrize("force_reset", [True, False])
def test_set_env(cls, force_reset):
    agent = make(cls, CountingEnv(episode_length=30), **known(cls)).learn(70)
    other = DummyVecEnv([lambda: CountingEnv(episode_length=30)])
    other.reset()
    agent.set_env(other, force_reset=force_reset)
    assert agent.get_env() is other and agent.get_vec_normalize_env() is None
    agent.learn(5, reset_num_timesteps=False)
    # Where the old environment stood, or at the beginning
    assert agent.replay_buffer.observations[70, 0, 0] == (0 if force_reset else 10)


@pytest.mark.parametrize("cls", [SAC, MBPO])
@pytest.mark.parametrize("total", [0, -5, 1e2, 7])
def test_total_timesteps(cls, total):
    env = pendulums(3)
    agent = make(cls, env).learn(total)
    assert agent.num_timesteps == {0: 0, -5: 0, 1e2: 102, 7: 9}[total]


def test_model_set_up_later():
    """As `load` does it."""
    agent = make(MBPO, _init_setup_model=False)
    agent._setup_model()
    assert_same_agents(agent.learn(80), make(MBPO).learn(80))


def test_extractor_of_flat_observations_is_compiled_with_the_rest():
    """Given by name it is SB3's default."""
    agent = make(MBPO, compile=True, **architecture(features_extractor_class=FlattenExtractor)).learn(62)
    assert agent.logger.name_to_value["train/compiled"] == 1


def test_the_table_names_tests_that_there_are():
    """docs/features.md: letters stand for files, brackets and braces for a feature that is tested here."""
    root = Path(__file__).parent.parent
    text = (root / "docs" / "features.md").read_text()
    paths = {letter: root / path for path, letter in re.findall(r"`(tests/\w+\.py)`\s\((\w)\)", text)}
    tests = {letter: re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE) for letter, path in paths.items()}
    named = re.findall(r"\b([A-Z])\s+((?:`test_\w+`,?\s+)+)", text + " ")
    assert len(paths) == 14 and len(named) > 60
    for letter, names in named:
        assert set(re.findall(r"test_\w+", names)) <= set(tests[letter]), (letter, names)
    assert set(re.findall(r"`\[([^\]]+)\]`", text)) - {"name"} <= set(FEATURES)
    assert set(re.findall(r"`\{([^}]+)\}`", text)) - {"name"} == set(REFUSED)
