"""Train MBPO until it balances InvertedPendulum, and draw its learning curve: a few minutes on a laptop's CPU."""

import time

import gymnasium as gym
import matplotlib.pyplot as plt
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mbpo import MBPO

ENV = "InvertedPendulum-v5"
PICTURE = "inverted_pendulum.png"

eval_env = Monitor(gym.make(ENV))
evaluation = EvalCallback(
    eval_env,
    # 1,000 is the most that an episode can give
    callback_on_new_best=StopTrainingOnRewardThreshold(950, verbose=1),
    eval_freq=250,
    log_path="logs/inverted_pendulum",
)
# The settings of hyperparams/mbpo.yml
agent = MBPO(
    "MlpPolicy", ENV, learning_starts=500, gradient_steps=10, target_entropy=-0.05, rollout_schedule=(250, 3750, 1, 1), seed=0
)
start = time.time()
agent.learn(5_000, callback=evaluation, progress_bar=True)
minutes = (time.time() - start) / 60

mean, std = evaluate_policy(agent, eval_env, n_eval_episodes=10)
print(f"Return after {agent.num_timesteps} environment steps and {minutes:.1f} minutes: {mean:.0f} +- {std:.0f} of 1000")

returns = [sum(episodes) / len(episodes) for episodes in evaluation.evaluations_results]
plt.plot(evaluation.evaluations_timesteps, returns, marker="o")
plt.title(f"MBPO on {ENV}, one seed")
plt.xlabel("environment steps")
plt.ylabel("mean return of 5 evaluation episodes")
plt.grid(alpha=0.3)
plt.savefig(PICTURE, dpi=150, bbox_inches="tight")
print(f"Learning curve: {PICTURE}")
