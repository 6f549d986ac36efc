"""Whole trainings: does it learn?"""

import subprocess
import sys

import numpy as np
import pytest

from sb3_mbpo import DHMBPO, MBPO
from tests.envs import PointEnv


def mean_regret(agent, n_episodes=50):
    """How much less than the best policy the agent gets, on average."""
    env, regrets = PointEnv(), []
    for seed in range(n_episodes):
        obs, _ = env.reset(seed=seed)
        start, total, over = env.x, 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(agent.predict(obs, deterministic=True)[0])
            total, over = total + reward, terminated or truncated
        regrets.append(PointEnv.best_return(start) - total)
    return np.mean(regrets)


@pytest.mark.parametrize("real_ratio", [0.05, 0.0])
def test_learns_from_what_the_model_generates(real_ratio):
    """500 steps, and at a ratio of 0 not one real transition in any batch: what the model makes must be right."""
    agent = MBPO(
        "MlpPolicy",
        PointEnv(),
        learning_starts=300,
        gradient_steps=10,
        learning_rate=1e-3,
        batch_size=128,
        policy_kwargs={"net_arch": [32, 32]},
        gamma=0.9,
        ent_coef=0.05,
        model_hidden_sizes=[32, 32],
        model_learning_rate=3e-3,
        ensemble_size=3,
        num_elites=2,
        model_train_freq=100,
        rollout_batch_size=2_000,
        rollout_schedule=[0, 500, 1, 3],
        real_ratio=real_ratio,
        seed=0,
    )
    before = mean_regret(agent)
    agent.learn(500)
    after = mean_regret(agent)
    # What is left of it is the policy's jitter around the origin
    assert after < before / 2, (before, after)


@pytest.mark.parametrize("reward_fn", [None, lambda obs, action, next_obs: -next_obs[:, 0].abs()])
def test_learns_through_the_model(reward_fn):
    """DHMBPO, with a reward that is predicted and with one that is given."""
    agent = DHMBPO(
        "MlpPolicy",
        PointEnv(price=0),
        learning_starts=200,
        train_freq=50,
        gradient_steps=50,
        learning_rate=1e-3,
        batch_size=64,
        policy_kwargs={"net_arch": [32, 32]},
        gamma=0.9,
        ent_coef=0.05,
        model_hidden_sizes=[32, 32],
        ensemble_size=3,
        num_elites=2,
        training_horizon=3,
        distribution_horizon=5,
        reward_fn=reward_fn,
        seed=0,
    )
    before = mean_regret(agent)
    agent.learn(400)
    after = mean_regret(agent)
    assert after < before / 4, (before, after)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "algo, env, steps, bar",
    [
        *(("mbpo", "InvertedPendulum-v5", 5_000, 950), ("mbpo", "Pendulum-v1", 3_000, -250)),
        *(("dhmbpo", "InvertedPendulum-v5", 5_000, 950), ("dhmbpo", "Pendulum-v1", 5_000, -250)),
    ],
)
def test_tuned_hyperparameters_learn(algo, env, steps, bar, seed, tmp_path):
    """Through the zoo, as a user would: the best of the evaluations, of 20 episodes each."""
    command = ["-m", "sb3_mbpo.zoo", "train", "--algo", algo, "--env", env, "--seed", str(seed), "-f", str(tmp_path)]
    subprocess.run(
        [sys.executable, *command, "-n", str(steps), "--eval-freq", "500", "--eval-episodes", "20", "--num-threads", "2"],
        check=True,
    )
    evaluations = np.load(tmp_path / algo / f"{env}_1" / "evaluations.npz")
    assert evaluations["results"].mean(axis=1).max() >= bar, evaluations["results"].mean(axis=1)
