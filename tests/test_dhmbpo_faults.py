"""What goes wrong with DHMBPO, and what its users are told: updates undone, arguments refused."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import MlpPolicy as SACMlpPolicy

from sb3_mbpo import DHMBPO
from sb3_mbpo.common.errors import DivergenceError
from sb3_mbpo.common.update import networks_state
from sb3_mbpo.dhmbpo.policies import DHMBPOPolicy
from tests.envs import CountingEnv
from tests.test_dhmbpo import make, parameters, pendulum_reward


def test_interrupted_updates_leave_the_agent_as_it_was():
    agent = make(gradient_steps=40)
    agent.learn(100)
    before, n_updates = networks_state(agent), agent._n_updates
    fill, calls = agent.fill_model_buffer, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fill(*arguments)

    agent.fill_model_buffer = interrupted
    with pytest.raises(KeyboardInterrupt):
        agent.learn(50, reset_num_timesteps=False)
    # Weights, bounds and statistics, optimizers, entropy coefficient
    th.testing.assert_close(networks_state(agent), before, rtol=0, atol=0)
    assert agent._n_updates == n_updates and "actor.standardise.mean" in before[0]


def test_divergence_is_undone():
    agent = make(learning_rate=1e30)
    before = networks_state(agent)
    with pytest.raises(ValueError, match=r"diverged at step 100.* Lower `learning_rate`"):
        agent.learn(100)
    th.testing.assert_close(networks_state(agent), before, rtol=0, atol=0)
    assert parameters(agent).isfinite().all() and agent.critic.bounds.isfinite().all()
    assert agent.logger.name_to_value == {}
    assert agent.advice_on_divergence == "Lower `learning_rate`."


def test_reward_fn_whose_gradient_is_not_finite_is_named():
    def distance(obs, action, next_obs):
        return (0 * action[:, 0]).sqrt() - obs[:, 2].square()

    with pytest.warns(UserWarning, match="`reward_fn` disagrees"):
        with pytest.raises(DivergenceError, match=r"or mend `reward_fn`, whose gradient must be finite"):
            make(reward_fn=distance).learn(100)


def test_reward_fn_that_is_not_finite_is_named():
    def infinite(obs, action, next_obs):
        return pendulum_reward(obs, action, next_obs) / (obs[:, 0] > 0).float()

    agent = make(reward_fn=infinite)
    with pytest.raises(ValueError, match=r"`reward_fn` must return finite numbers"):
        agent.learn(100)
    assert parameters(agent).isfinite().all()


def test_train_without_a_model_says_what_to_do(tmp_path):
    make().learn(100).save(tmp_path / "agent")
    loaded = DHMBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    with pytest.raises(ValueError, match=r"call `learn`"):
        loaded.train(1)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"training_horizon": 0}, r"`training_horizon` must be a whole number, 1 or more, not 0"),
        ({"distribution_horizon": 2.5}, r"`distribution_horizon` must be a whole number, 1 or more, not 2.5"),
        ({"gamma": 1.0}, r"`gamma` must be a number from 0 to below 1.* not 1.0"),
        ({"policy": SACMlpPolicy}, r"`policy` must be 'MlpPolicy'"),
        ({"policy_kwargs": {"dropout": 1.0}}, r"`dropout` must be a number from 0 to below 1"),
        ({"policy_kwargs": {"net_arch": []}}, r"`net_arch` must be a list of whole numbers, .* not \[\]"),
        ({"policy_kwargs": {"net_arch": 256}}, r"`net_arch` must be a list of whole numbers, .* not 256"),
        ({"policy_kwargs": {"net_arch": {"pi": [16], "qf": [1.5]}}}, r"`net_arch` must be a list of whole numbers"),
        ({"policy_kwargs": {"activation_fn": "relu"}}, r"`activation_fn` must be a class of torch.nn.* not 'relu'"),
        ({"policy_kwargs": {"n_critics": 0}}, r"`n_critics` must be a whole number, 1 or more, not 0"),
        ({"policy_kwargs": {"use_sde": True}}, r"`use_sde` must be False"),
        ({"policy_kwargs": {"optimizer_class": th.optim.SGD}}, r"`policy_kwargs`.* Adam only"),
        ({"policy_kwargs": {"optimizer_kwargs": {"amsgrad": True}}}, r"`policy_kwargs`.* Adam only"),
        ({"reward_fn": 3}, r"`reward_fn` must be None or a function"),
        ({"reward_fn": lambda obs, action, next_obs: -np.square(obs[:, 0])}, r"`reward_fn` raised .* gets tensors of torch"),
        ({"reward_fn": lambda obs, action, next_obs: np.zeros(len(action))}, r"must return a tensor of floats .* ndarray"),
        ({"reward_fn": lambda obs, action, next_obs: action}, r"must return a tensor of floats with shape \(4,\)"),
        ({"reward_fn": lambda obs, action, next_obs: th.ones(len(action))}, r"returned a tensor without a gradient"),
    ],
)
def test_arguments_that_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_state_dependent_exploration_is_refused():
    with pytest.raises(ValueError, match=r"`use_sde` must be False"):
        DHMBPOPolicy(spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,)), lambda _: 1e-3, use_sde=True)


def test_features_extractor_is_refused():
    from stable_baselines3.common.torch_layers import NatureCNN

    with pytest.raises(ValueError, match=r"`features_extractor_class` must be .* not NatureCNN"):
        make(policy_kwargs={"features_extractor_class": NatureCNN})


@pytest.mark.parametrize("when", ["constructor", "learn"])
def test_normalised_observations_are_refused(when):
    env = VecNormalize(make_vec_env("Pendulum-v1", 1))
    with pytest.raises(ValueError, match=r"`env` normalises observations .* leave the wrapper out"):
        if when == "constructor":
            make(env)
        else:
            agent = make()
            agent.set_env(env)
            agent.learn(10)


@pytest.mark.parametrize("name", ["n_steps", "use_sde", "target_update_interval"])
def test_arguments_of_sac_without_a_meaning_are_unknown(name):
    with pytest.raises(TypeError, match=name):
        make(**{name: 1})


def test_environment_is_not_harmed():
    check_env(CountingEnv())
    agent = make(CountingEnv(), learning_starts=50)
    agent.learn(100)
    assert agent._n_updates == 8
