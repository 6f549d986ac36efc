"""What survives in a zip, and how an agent goes on from it."""

import json
import zipfile
from collections import OrderedDict
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import CheckpointCallback

from sb3_mbpo import MBPO
from sb3_mbpo.common.callbacks import DynamicsCallback
from sb3_mbpo.mbpo.callbacks import MBPOCallback
from tests.agents import make_agent
from tests.envs import CountingEnv


def assert_same_parameters(first, second):
    def assert_same(a, b, name):
        if isinstance(a, dict):
            assert a.keys() == b.keys(), name
            for key in a:
                assert_same(a[key], b[key], f"{name}.{key}")
        elif isinstance(a, th.Tensor):
            assert th.equal(a, b), name
        else:
            assert a == b, name

    assert_same(first.get_parameters(), second.get_parameters(), "")


@pytest.fixture
def agent():
    return make_agent(rollout_schedule=[0, 200, 1, 3]).learn(120)


def test_everything_comes_back_exactly(agent, tmp_path):
    agent.save(tmp_path / "agent.zip")
    loaded = MBPO.load(tmp_path / "agent.zip")
    assert_same_parameters(agent, loaded)
    assert {"dynamics", "dynamics.optimizer", "policy", "actor.optimizer", "critic.optimizer"} <= set(agent.get_parameters())
    dynamics = loaded.dynamics
    for name in ("input_mean", "input_std", "elites", "max_log_var", "min_log_var", "n_fits"):
        assert th.equal(getattr(dynamics, name), getattr(agent.dynamics, name))
    assert len(dynamics.optimizer.state_dict()["state"]) > 0
    for name in ("lifetime_timesteps", "last_model_training", "rollout_schedule", "model_hidden_sizes", "real_ratio"):
        assert getattr(loaded, name) == getattr(agent, name)
    obs = np.zeros((5, 3), dtype=np.float32)
    assert np.array_equal(agent.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_zip_holds_no_data_and_nothing_odd(agent, tmp_path):
    agent.save(tmp_path / "agent.zip")
    with zipfile.ZipFile(tmp_path / "agent.zip") as file:
        data = json.loads(file.read("data"))
        assert {"dynamics.pth", "dynamics.optimizer.pth", "policy.pth"} <= set(file.namelist())
    assert not {"model_buffer", "mixed_buffer", "replay_buffer", "dynamics", "seconds", "is_compiled"} & set(data)
    assert data["rollout_schedule"] == [0, 200, 1, 3] and data["model_hidden_sizes"] == [16, 16]


def test_goes_on_after_loading(agent, tmp_path, monkeypatch):
    """With its replay buffer: no second warm-up, the schedule and the model go on, the model buffer is filled again."""
    agent.save(tmp_path / "agent.zip")
    agent.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = MBPO.load(tmp_path / "agent.zip", env=gym.make("Pendulum-v1"))
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert loaded.model_buffer.size() == 0
    trainings = []
    train_model = DynamicsCallback._train_model
    monkeypatch.setattr(
        DynamicsCallback,
        "_train_model",
        lambda self, data: (trainings.append((self.model.lifetime_timesteps, len(data.obs))), train_model(self, data)),
    )
    acted = []
    loaded.actor.register_forward_pre_hook(lambda module, inputs: acted.append(len(inputs[0])))
    before = deepcopy(loaded.dynamics.state_dict())

    loaded.learn(1)
    # Refilled by the loaded model, untouched, at the length that the schedule has reached
    assert loaded.model_buffer.size() == 200 and trainings == []
    assert all(th.equal(tensor, before[name]) for name, tensor in loaded.dynamics.state_dict().items())
    assert loaded._n_updates == agent._n_updates + 1
    assert acted[0] == 1, "the policy acts, not chance"
    assert loaded.num_timesteps == 1 and loaded.lifetime_timesteps == 121

    loaded.learn(49, reset_num_timesteps=False)
    assert loaded.num_timesteps == 50 and loaded.lifetime_timesteps == 170
    # Trained at 61 and 111, hence due at 161
    assert trainings == [(161, 161)]
    assert loaded.dynamics.n_fits == agent.dynamics.n_fits + 1


def test_goes_on_without_its_replay_buffer(agent, tmp_path):
    """The policy acts from the first step; learning waits for a batch of real data, the model for more."""
    agent.save(tmp_path / "agent.zip")
    loaded = MBPO.load(tmp_path / "agent.zip", env=gym.make("Pendulum-v1"))
    acted = []
    loaded.actor.register_forward_pre_hook(lambda module, inputs: acted.append(len(inputs[0])))
    loaded.learn(31)
    assert acted == [1] * 31 and loaded._n_updates == agent._n_updates
    loaded.learn(1, reset_num_timesteps=False)
    # A batch of 32: the loaded model generates, but is not trained on so little
    assert loaded._n_updates == agent._n_updates + 1 and loaded.model_buffer.size() == 200
    assert loaded.dynamics.n_fits == agent.dynamics.n_fits
    loaded.learn(28, reset_num_timesteps=False)
    assert loaded.dynamics.n_fits == agent.dynamics.n_fits + 1


def test_loaded_model_keeps_generating_while_it_waits_for_data(tmp_path, monkeypatch):
    """Without the replay buffer the model is not trained for a long time; its data must not grow old meanwhile."""
    agent = make_agent(learning_starts=150).learn(160)
    agent.save(tmp_path / "agent.zip")
    loaded = MBPO.load(tmp_path / "agent.zip", env=gym.make("Pendulum-v1"))
    rollouts = []
    generate = MBPOCallback._generate_rollouts
    monkeypatch.setattr(
        MBPOCallback,
        "_generate_rollouts",
        lambda self, data: (rollouts.append((self.model.num_timesteps, len(data.obs))), generate(self, data)),
    )
    loaded.learn(151)
    assert rollouts == [(32, 32), (82, 82), (132, 132), (150, 150)]
    assert loaded.dynamics.n_fits == agent.dynamics.n_fits + 1


def test_numpy_numbers_as_arguments(tmp_path):
    agent = make_agent(
        model_learning_rate=np.float64(1e-3),
        real_ratio=np.float32(0.25),
        ensemble_size=np.int64(3),
        rollout_schedule=list(np.array([0, 10, 1, 2])),
        model_hidden_sizes=tuple(np.array([8, 8])),
    ).learn(70)
    agent.save(tmp_path / "agent.zip")
    assert_same_parameters(agent, MBPO.load(tmp_path / "agent.zip"))


def test_two_loads_go_on_alike(agent, tmp_path):
    agent.save(tmp_path / "agent.zip")
    agent.save_replay_buffer(tmp_path / "buffer.pkl")
    results = []
    for _ in range(2):
        loaded = MBPO.load(tmp_path / "agent.zip", env=gym.make("Pendulum-v1"), seed=7)
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
        loaded.set_random_seed(7)
        results.append(loaded.learn(60))
    assert_same_parameters(*results)


def test_overrides_and_checks_at_loading(agent, tmp_path):
    agent.save(tmp_path / "agent.zip")
    loaded = MBPO.load(tmp_path / "agent.zip", real_ratio=0.5, rollout_schedule=[0, 0, 2, 2], rollout_batch_size=7)
    assert loaded.real_ratio == 0.5 and loaded.model_buffer.buffer_size == 7 * 20 * 2
    with pytest.raises(ValueError, match=r"`real_ratio`.*not 1.5"):
        MBPO.load(tmp_path / "agent.zip", real_ratio=1.5)


def test_model_learning_rate_can_be_changed_at_loading(agent, tmp_path):
    agent.save(tmp_path / "agent.zip")
    loaded = MBPO.load(tmp_path / "agent.zip", env=gym.make("Pendulum-v1"), model_learning_rate=1e-5)
    loaded.learn(61)
    assert loaded.dynamics.n_fits == agent.dynamics.n_fits + 1
    assert [group["lr"] for group in loaded.dynamics.optimizer.param_groups] == [1e-5]


def test_user_functions_are_saved(tmp_path):
    agent = make_agent(CountingEnv(), termination_fn=lambda obs, action, next_obs: next_obs[:, 0] > 5, device="cpu")
    agent.save(tmp_path / "agent.zip")
    loaded = MBPO.load(tmp_path / "agent.zip", env=CountingEnv())
    rows = np.array([[4.0, 4.0], [6.0, 6.0]])
    assert loaded.termination_fn(rows, rows, rows).tolist() == [False, True]


def test_learned_termination_comes_back(tmp_path):
    agent = make_agent(CountingEnv(episode_length=10), learning_starts=100).learn(101)
    agent.save(tmp_path / "agent.zip")
    loaded = MBPO.load(tmp_path / "agent.zip")
    next_obs = th.rand(50, 1).repeat(1, 2) * 20
    expected = agent.termination_classifier.predict(next_obs)
    assert expected.any() and not expected.all()
    assert th.equal(loaded.termination_classifier.predict(next_obs), expected)


def test_set_parameters_as_sb3_tests_it(agent):
    """SB3's own test: random floats for all but the last entry of every state dict, and what must be refused."""
    original = deepcopy(agent.get_parameters())
    random = {}
    for name, params in original.items():
        if "optim" in name:
            random[name] = params
        else:
            random[name] = OrderedDict((key, th.rand_like(tensor)) for key, tensor in list(params.items())[:-1])
    agent.set_parameters(random, exact_match=False)
    for name, params in agent.get_parameters().items():
        if "optim" not in name:
            last = list(params)[-1]
            for key, tensor in params.items():
                assert th.allclose(original[name][key], tensor) == (key == last), (name, key)
    agent.learn(60)
    agent.set_parameters(original)
    assert th.equal(agent.get_parameters()["dynamics"]["elites"], original["dynamics"]["elites"])

    with pytest.raises(ValueError, match="not match"):
        agent.set_parameters(dict(list(original.items())[:-1]))
    with pytest.raises(RuntimeError):
        agent.set_parameters({name: dict(list(params.items())[:-1]) for name, params in original.items()})


def test_set_parameters_from_a_zip(agent, tmp_path):
    agent.save(tmp_path / "agent.zip")
    fresh = make_agent(seed=9, rollout_schedule=[0, 200, 1, 3])
    fresh.set_parameters(tmp_path / "agent.zip")
    assert_same_parameters(agent, fresh)
    fresh.learn(62)
    assert fresh.dynamics.n_fits == agent.dynamics.n_fits + 1


def test_checkpoints_in_the_middle_of_training(tmp_path):
    make_agent().learn(120, callback=CheckpointCallback(40, tmp_path, save_replay_buffer=True))
    for step in (40, 80, 120):
        loaded = MBPO.load(tmp_path / f"rl_model_{step}_steps.zip", env=gym.make("Pendulum-v1"))
        loaded.load_replay_buffer(tmp_path / f"rl_model_replay_buffer_{step}_steps.pkl")
        assert loaded.num_timesteps == step and loaded.learning_starts == 60
        loaded.learn(70, reset_num_timesteps=False)
        assert loaded.num_timesteps == step + 70 and loaded.dynamics.is_fitted
