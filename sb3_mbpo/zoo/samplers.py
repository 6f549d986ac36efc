"""The search space of RL Zoo's ``--optimize`` for MBPO."""

from typing import Any

import optuna

NET_ARCHS = {"small": [64, 64], "medium": [256, 256]}


def sample_mbpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for MBPO hyperparams.

    :param trial: Optuna trial, which keeps what is sampled as flat values for ``convert_mbpo_params``
    :param n_actions: Dimension of the action space
    :param n_envs: Number of parallel environments (unused)
    :param additional_args: What the zoo passes on for hindsight experience replay (unused)
    :return: Arguments for the constructor of ``MBPO``
    """
    sampled_params = {
        "gradient_steps": trial.suggest_int("gradient_steps", 5, 40),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.03, log=True),
        "tau": trial.suggest_float("tau", 1e-3, 0.08, log=True),
        # From 2**6=64, of which the smallest real_ratio still leaves one real transition, to 2**10=1024
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 10),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
        # The paper's tasks lie between -0.05 and -1 per dimension of the action
        "target_entropy": trial.suggest_float("target_entropy", -n_actions, -0.05 * n_actions),
        "real_ratio": trial.suggest_float("real_ratio", 0.02, 0.5, log=True),
        "model_train_freq": trial.suggest_categorical("model_train_freq", [125, 250, 500]),
        "model_hidden_size": trial.suggest_categorical("model_hidden_size", [100, 200, 400]),
        # Rollouts grow from 1 step to rollout_length during rollout_ramp environment steps from rollout_start on
        "rollout_start": trial.suggest_int("rollout_start", 1_000, 50_000, log=True),
        "rollout_ramp": trial.suggest_int("rollout_ramp", 1_000, 200_000, log=True),
        "rollout_length": trial.suggest_int("rollout_length", 1, 25),
    }
    hyperparams = convert_mbpo_params(sampled_params)
    # Display true values
    for name in ("gamma", "batch_size", "rollout_schedule"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def convert_mbpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial of ``sample_mbpo_params``, as Optuna stores them
    :return: Arguments for the constructor of ``MBPO``
    """
    hyperparams = sampled_params.copy()
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["batch_size"] = 2 ** hyperparams.pop("batch_size_pow")
    hyperparams["policy_kwargs"] = {"net_arch": NET_ARCHS[hyperparams.pop("net_arch")].copy()}
    hyperparams["model_hidden_sizes"] = [hyperparams.pop("model_hidden_size")] * 4
    start, ramp = hyperparams.pop("rollout_start"), hyperparams.pop("rollout_ramp")
    hyperparams["rollout_schedule"] = [start, start + ramp, 1, hyperparams.pop("rollout_length")]
    return hyperparams
