"""Agents small enough to train in a second."""

from sb3_mbpo import MBPO

SMALL = dict(
    learning_starts=60,
    batch_size=32,
    # The default takes two seconds to make with HER
    buffer_size=10_000,
    gradient_steps=1,
    policy_kwargs={"net_arch": [16]},
    model_hidden_sizes=[16, 16],
    ensemble_size=3,
    num_elites=2,
    model_gradient_steps=0.01,
    model_train_freq=50,
    rollout_batch_size=100,
    rollout_schedule=[0, 1_000, 1, 1],
    seed=0,
    device="cpu",
)


def make_agent(env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    return MBPO(policy, env, **{**SMALL, **kwargs})
