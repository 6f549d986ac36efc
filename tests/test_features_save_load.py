"""What SB3 offers to save and load, with SAC and MBPO side by side."""

import io
import json
import zipfile
from contextlib import nullcontext
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo import MBPO, MlpPolicy
from tests.envs import CountingEnv, GoalEnv
from tests.test_features import FEATURES, assert_same, known, make, never, noise, pendulums, steps_in

BOTH = (SAC, MBPO)

pytestmark = pytest.mark.filterwarnings("ignore:Path .* does not exist. Will create it")
OBS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def actions_of(agent, obs=OBS):
    return agent.predict(obs, deterministic=True)[0]


@pytest.fixture(params=BOTH, ids=["SAC", "MBPO"])
def agent(request):
    return make(request.param).learn(70)


def contents(path):
    with zipfile.ZipFile(path) as file:
        return set(json.loads(file.read("data"))), set(file.namelist())


# --- save, load -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["str", "path", "no suffix", "new folder", "stream"])
def test_where_to(agent, kind, tmp_path):
    path = {
        "str": str(tmp_path / "agent.zip"),
        "path": tmp_path / "agent.zip",
        "no suffix": tmp_path / "agent",
        "new folder": tmp_path / "folder" / "agent",
        "stream": io.BytesIO(),
    }[kind]
    agent.save(path)
    if kind == "stream":
        path.seek(0)
    loaded = type(agent).load(path)
    assert np.array_equal(actions_of(loaded), actions_of(agent)) and loaded.num_timesteps == 70


def test_zip_has_what_sacs_has(tmp_path):
    for cls in BOTH:
        make(cls).learn(70).save(tmp_path / cls.__name__)
    (sac_data, sac_files), (data, files) = (contents(tmp_path / f"{cls.__name__}.zip") for cls in BOTH)
    assert sac_data <= data and sac_files <= files


@pytest.mark.parametrize("names", [["learning_rate"], ["gamma", "ep_info_buffer"], ["termination_fn", "real_ratio"]], ids=str)
def test_exclude(names, tmp_path):
    """Not in the zip; the default is back after loading."""
    agent = make(MBPO, learning_rate=1e-2, gamma=0.5, real_ratio=0.5, termination_fn=never).learn(70)
    agent.save(tmp_path / "whole")
    agent.save(tmp_path / "part", exclude=names)
    assert contents(tmp_path / "whole.zip")[0] - contents(tmp_path / "part.zip")[0] == set(names)
    loaded = MBPO.load(tmp_path / "part", env=gym.make("Pendulum-v1"))
    defaults = MBPO("MlpPolicy", "Pendulum-v1", buffer_size=1)
    for name in ("learning_rate", "gamma", "ep_info_buffer", "termination_fn", "real_ratio"):
        if name in names:
            assert getattr(loaded, name) == getattr(defaults, name), name
        elif name != "ep_info_buffer":
            assert getattr(loaded, name) is not None and getattr(loaded, name) != getattr(defaults, name), name
    loaded.learn(62)


def test_include_the_replay_buffer(agent, tmp_path):
    """One file for all; goes on as with a file of its own."""
    agent.save(tmp_path / "agent", include=["replay_buffer"])
    loaded = type(agent).load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    assert np.array_equal(loaded.replay_buffer.observations[:70], agent.replay_buffer.observations[:70])
    loaded.learn(1, reset_num_timesteps=False)
    assert loaded._n_updates == agent._n_updates + 1 and loaded.replay_buffer.size() == 71


def test_include_the_environment(agent, tmp_path):
    agent.save(tmp_path / "agent", include=["env"])
    assert type(agent).load(tmp_path / "agent").learn(5).get_env().num_envs == 1


LOADED_WITH = {
    "learning_rate": dict(learning_rate=1e-2),
    "gamma and tau": dict(gamma=0.5, tau=0.1),
    "seed": dict(seed=5),
    "train_freq": dict(train_freq=(1, "episode")),
    "gradient_steps": dict(gradient_steps=3),
    "batch_size": dict(batch_size=8, verbose=1),
    "device": dict(device="cpu"),
    "custom_objects": dict(custom_objects={"learning_rate": 0.5}),
}


@pytest.mark.parametrize("name", LOADED_WITH)
def test_load_with(name, tmp_path):
    """As SAC: what is given counts from then on."""
    results = []
    for cls in BOTH:
        make(cls).learn(70).save(tmp_path / "agent")
        env = gym.make("Pendulum-v1", max_episode_steps=30)
        loaded = cls.load(tmp_path / "agent", env=env, **LOADED_WITH[name])
        for argument, value in {**LOADED_WITH[name], **LOADED_WITH[name].get("custom_objects", {})}.items():
            if argument not in ("device", "custom_objects", "train_freq"):
                assert getattr(loaded, argument) == value
        # SAC would warm up again
        loaded.learning_starts = 0
        loaded.learn(40, reset_num_timesteps=False)
        first_obs = loaded.replay_buffer.observations[0].tolist()
        results.append((steps_in(loaded), loaded.actor.optimizer.param_groups[0]["lr"], first_obs))
    assert results[0] == results[1]


def test_load_prints_the_system(agent, tmp_path, capsys):
    agent.save(tmp_path / "agent")
    type(agent).load(tmp_path / "agent", print_system_info=True)
    out = capsys.readouterr().out
    assert "== CURRENT SYSTEM INFO ==" in out and "== SAVED MODEL SYSTEM INFO ==" in out


@pytest.mark.parametrize("what", ["policy_kwargs", "the same policy_kwargs", "spaces", "nothing there"])
def test_load_refuses(agent, what, tmp_path):
    agent.save(tmp_path / "agent")
    kwargs, error = {
        "policy_kwargs": (dict(policy_kwargs={"net_arch": [17]}), "policy kwargs do not equal"),
        # SB3 has added `use_sde` to those in the zip
        "the same policy_kwargs": (dict(policy_kwargs={"net_arch": [16]}), "policy kwargs do not equal"),
        "spaces": (dict(env=CountingEnv()), "Observation spaces do not match"),
        "nothing there": ({}, "no_such_agent"),
    }[what]
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        type(agent).load(tmp_path / ("no_such_agent" if what == "nothing there" else "agent"), **kwargs)


def test_load_with_more_environments(agent, tmp_path):
    agent.save(tmp_path / "agent")
    loaded = type(agent).load(tmp_path / "agent", env=pendulums(3))
    loaded.learn(99)
    assert loaded.n_envs == loaded.replay_buffer.n_envs == 3 and loaded.replay_buffer.size() == 33


def test_load_without_environment(agent, tmp_path):
    """To predict, and to learn after `set_env`."""
    agent.save(tmp_path / "agent")
    loaded = type(agent).load(tmp_path / "agent")
    assert loaded.get_env() is None and np.array_equal(actions_of(loaded), actions_of(agent))
    with pytest.raises(AssertionError, match="You must set the environment"):
        loaded.learn(5)
    loaded.set_env(gym.make("Pendulum-v1"))
    assert loaded.learn(5).num_timesteps == 5


@pytest.mark.parametrize("force_reset", [True, False])
def test_load_with_force_reset(force_reset, tmp_path):
    """Without it, the agent goes on in the middle of the episode in which the environment is."""
    for cls in BOTH:
        env = make_vec_env(lambda: CountingEnv(episode_length=30))
        agent = make(cls, env, **known(cls)).learn(70)
        agent.save(tmp_path / "agent")
        loaded = cls.load(tmp_path / "agent", env=env, force_reset=force_reset)
        loaded.learn(1, reset_num_timesteps=False)
        assert loaded.replay_buffer.observations[0, 0, 0] == (0 if force_reset else 10)


@pytest.mark.parametrize("cls", BOTH)
def test_action_noise_of_another_number_of_environments(cls, tmp_path):
    """SB3 saves noise for two environments, which does not fit three."""
    make(cls, pendulums(2), action_noise=noise()).learn(70).save(tmp_path / "agent")
    loaded = cls.load(tmp_path / "agent", env=pendulums(3))
    assert isinstance(loaded.action_noise, VectorizedActionNoise)
    with pytest.raises(ValueError, match="could not be broadcast"):
        loaded.learn(80)
    loaded = cls.load(tmp_path / "agent", env=pendulums(3), action_noise=noise())
    assert loaded.learn(6).num_timesteps == 6


def test_vec_normalize(tmp_path):
    """As SB3 has it: saved in a file of its own; the loaded one is in use at once."""
    env = VecNormalize(pendulums(2))
    agent = make(MBPO, env).learn(80)
    agent.save(tmp_path / "agent")
    agent.get_vec_normalize_env().save(tmp_path / "statistics.pkl")
    loaded_env = VecNormalize.load(tmp_path / "statistics.pkl", pendulums(2))
    loaded = MBPO.load(tmp_path / "agent", env=loaded_env)
    assert loaded.get_vec_normalize_env() is loaded_env
    assert np.array_equal(loaded_env.normalize_obs(OBS), env.normalize_obs(OBS))
    loaded.learn(70)
    assert loaded_env.obs_rms.count > env.obs_rms.count


# --- Parameters, policy, replay buffer --------------------------------------------------------------------------------


def test_parameters_of_sac():
    """SAC's are among MBPO's under the same names, and can be taken over in place."""
    sac, mbpo = make(SAC).learn(80), make(MBPO, seed=9)
    assert set(sac.get_parameters()) < set(mbpo.get_parameters())
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        mbpo.set_parameters(sac.get_parameters())
    mbpo.set_parameters(sac.get_parameters(), exact_match=False)
    assert_same(sac, mbpo)
    assert mbpo.actor.optimizer.state_dict()["state"][0]["step"] == 20


def test_parameters_for_sac():
    """The way back, as docs/checkpoints.md has it."""
    mbpo, sac = make(MBPO).learn(80), make(SAC, seed=9, learning_starts=0)
    sac.set_parameters({name: value for name, value in mbpo.get_parameters().items() if name in sac.get_parameters()})
    assert_same(mbpo, sac)
    assert sac.actor.optimizer.state_dict()["state"][0]["step"] == mbpo.actor.optimizer.state_dict()["state"][0]["step"] > 0
    sac.replay_buffer = mbpo.replay_buffer
    assert sac.learn(20)._n_updates > 0


@pytest.mark.parametrize("wrong", [dict(no_such_name={}), dict(policy={"no_such_weight": th.zeros(1)})], ids=str)
def test_wrong_parameters(agent, wrong):
    with pytest.raises((ValueError, RuntimeError), match="no_such"):
        agent.set_parameters(wrong)


def test_parameters_are_set_all_or_none():
    agent = make(MBPO)
    before = deepcopy(agent.get_parameters())
    zeros = {name: th.zeros_like(tensor) for name, tensor in before["policy"].items()}
    with pytest.raises(ValueError, match="no_such_name"):
        agent.set_parameters({"policy": zeros, "no_such_name": {}})
    th.testing.assert_close(agent.get_parameters(), before, rtol=0, atol=0)


def test_policy_alone(agent, tmp_path):
    """SB3's own format: SAC's policy and MBPO's are the same class."""
    agent.policy.save(tmp_path / "policy.zip")
    loaded = MlpPolicy.load(tmp_path / "policy.zip")
    assert np.array_equal(loaded.predict(OBS, deterministic=True)[0], actions_of(agent))


@pytest.mark.parametrize("kind", ["path", "stream"])
def test_replay_buffer_of_sac(kind, tmp_path):
    """What SAC has collected is enough to begin with: no warm-up is needed."""
    target = io.BytesIO() if kind == "stream" else tmp_path / "folder" / "buffer.pkl"
    sac = make(SAC, learning_starts=1_000).learn(200)
    sac.save_replay_buffer(target)
    if kind == "stream":
        target.seek(0)
    agent = make(MBPO, learning_starts=0)
    agent.load_replay_buffer(target)
    agent.learn(1)
    assert agent._n_updates == 1 and agent.dynamics.is_fitted and agent.replay_buffer.size() == 201
    real = th.as_tensor(agent.replay_buffer.observations[:201, 0])
    start = agent.model_buffer.observations[:100]
    assert (start[:, None] == real).all(dim=2).any(dim=1).all() and len(start.unique(dim=0)) > 50


@pytest.mark.parametrize("truncate", [True, False])
def test_truncate_last_traj(truncate, tmp_path):
    """In hindsight an episode is over or goes on."""
    for cls in BOTH:
        kwargs = {**FEATURES["replay_buffer_class: HerReplayBuffer"](), **known(cls)}
        agent = make(cls, **kwargs).learn(73)
        agent.save_replay_buffer(tmp_path / "buffer.pkl")
        other = make(cls, **{**kwargs, "env": GoalEnv()})
        with pytest.warns(UserWarning, match="truncated") if truncate else nullcontext():
            other.load_replay_buffer(tmp_path / "buffer.pkl", truncate_last_traj=truncate)
        # The length of the episode that was running is known once it is over
        assert other.replay_buffer.ep_length[70:73, 0].tolist() == ([3] * 3 if truncate else [0] * 3)
        assert other.replay_buffer.env is other.get_env()
        other.learn(10)
