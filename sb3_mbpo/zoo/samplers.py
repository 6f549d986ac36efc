"""The search spaces of RL Zoo's ``--optimize``."""

from typing import Any

import optuna

NET_ARCHS = {"small": [64, 64], "medium": [256, 256]}
DHMBPO_NET_ARCHS = {"small": [128, 128, 128], "medium": [256, 256, 256]}
# The default of MBPO.learn(), for whoever samples without the zoo's manager of experiments
N_TIMESTEPS = 125_000


def sample_mbpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for MBPO hyperparams.

    :param trial: Optuna trial, which keeps what is sampled as flat values for ``convert_mbpo_params``. Its user attribute
        ``n_timesteps``, if set, is the number of environment steps of its training.
    :param n_actions: Dimension of the action space
    :param n_envs: Number of parallel environments (unused)
    :param additional_args: Whether hindsight experience replay is in use, and its arguments
    :return: Arguments for the constructor of ``MBPO``
    """
    n_timesteps = trial.user_attrs.get("n_timesteps", N_TIMESTEPS)
    sampled_params = {
        # Not sampled, but recorded: the fractions below mean nothing without it
        "n_timesteps": trial.suggest_int("n_timesteps", n_timesteps, n_timesteps),
        # The paper: 10 to 40. This is what a trial's duration depends on.
        "gradient_steps": trial.suggest_int("gradient_steps", 5, 40, log=True),
        # These and net_arch as for the zoo's SAC, but narrower: without batches too small to hold a real transition, and
        # without the largest ones and networks, with which trials of many updates per step take long
        "learning_rate": trial.suggest_float("learning_rate", 3e-5, 2e-3, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.03, log=True),
        "tau": trial.suggest_float("tau", 1e-3, 0.08, log=True),
        # From 2**6=64 to 2**9=512
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 9),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
        # Per dimension of the action; the paper's tasks lie between -0.05 and -1
        "target_entropy": trial.suggest_float("target_entropy", -n_actions, -0.05 * n_actions),
        # The paper: 0.05. Of the smallest batch, the smallest ratio leaves one real transition.
        "real_ratio": trial.suggest_float("real_ratio", 0.02, 0.5, log=True),
        "model_train_freq": trial.suggest_categorical("model_train_freq", [125, 250, 500]),
        "model_hidden_size": trial.suggest_categorical("model_hidden_size", [100, 200, 400]),
        # Rollouts grow from 1 step to rollout_length, in these fractions of n_timesteps.
        # The paper's tasks start at 0.01 to 0.16 and grow for 0.17 to 0.93.
        "rollout_start": trial.suggest_float("rollout_start", 0, 0.5),
        "rollout_ramp": trial.suggest_float("rollout_ramp", 0, 1),
        "rollout_length": trial.suggest_int("rollout_length", 1, 25),
    }
    sampled_params |= _sample_her(trial, additional_args)
    hyperparams = _with_her_kwargs(convert_mbpo_params(sampled_params), additional_args)
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
    n_timesteps = hyperparams.pop("n_timesteps")
    start = round(hyperparams.pop("rollout_start") * n_timesteps)
    end = start + round(hyperparams.pop("rollout_ramp") * n_timesteps)
    hyperparams["rollout_schedule"] = [start, end, 1, hyperparams.pop("rollout_length")]
    return _convert_her(hyperparams)


def sample_dhmbpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for DHMBPO hyperparams.

    :param trial: Optuna trial, which keeps what is sampled as flat values for ``convert_dhmbpo_params``
    :param n_actions: Dimension of the action space
    :param n_envs: Number of parallel environments (unused)
    :param additional_args: Whether hindsight experience replay is in use, and its arguments
    :return: Arguments for the constructor of ``DHMBPO``
    """
    sampled_params = {
        # What a trial's duration depends on (paper: 1 to 8)
        "updates_per_step": trial.suggest_categorical("updates_per_step", [1, 2, 4]),
        "train_freq": trial.suggest_categorical("train_freq", [250, 500, 1_000]),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True),
        # As the paper's 0.005 within a factor of about six
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-3, 0.03, log=True),
        "tau": trial.suggest_float("tau", 1e-3, 0.02, log=True),
        # From 2**6=64 to 2**8=256
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 8),
        "net_arch": trial.suggest_categorical("net_arch", list(DHMBPO_NET_ARCHS)),
        # Per dimension of the action
        "target_entropy": trial.suggest_float("target_entropy", -n_actions, -0.05 * n_actions),
        # The paper: 3 to 7 and 10 to 40
        "training_horizon": trial.suggest_int("training_horizon", 1, 8),
        "distribution_horizon": trial.suggest_categorical("distribution_horizon", [5, 10, 20, 40]),
        "model_gradient_steps": trial.suggest_categorical("model_gradient_steps", [0.5, 1.0, 2.0]),
        "model_hidden_size": trial.suggest_categorical("model_hidden_size", [100, 200, 400]),
        **_sample_her(trial, additional_args),
    }
    hyperparams = _with_her_kwargs(convert_dhmbpo_params(sampled_params), additional_args)
    # Display true values
    for name in ("gamma", "batch_size", "gradient_steps"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def convert_dhmbpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial of ``sample_dhmbpo_params``, as Optuna stores them
    :return: Arguments for the constructor of ``DHMBPO``
    """
    hyperparams = sampled_params.copy()
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["batch_size"] = 2 ** hyperparams.pop("batch_size_pow")
    hyperparams["gradient_steps"] = hyperparams.pop("updates_per_step") * hyperparams["train_freq"]
    hyperparams["policy_kwargs"] = {"net_arch": DHMBPO_NET_ARCHS[hyperparams.pop("net_arch")].copy()}
    hyperparams["model_hidden_sizes"] = [hyperparams.pop("model_hidden_size")] * 4
    return _convert_her(hyperparams)


def _sample_her(trial: optuna.Trial, additional_args: dict[str, Any]) -> dict[str, Any]:
    """As for the zoo's SAC."""
    if not additional_args.get("using_her_replay_buffer"):
        return {}
    strategies = ["final", "episode", "future"]
    return {
        "n_sampled_goal": trial.suggest_int("n_sampled_goal", 1, 5),
        "goal_selection_strategy": trial.suggest_categorical("goal_selection_strategy", strategies),
    }


def _convert_her(hyperparams: dict[str, Any]) -> dict[str, Any]:
    her = {name: hyperparams.pop(name) for name in ("n_sampled_goal", "goal_selection_strategy") if name in hyperparams}
    return {**hyperparams, "replay_buffer_kwargs": her} if her else hyperparams


def _with_her_kwargs(hyperparams: dict[str, Any], additional_args: dict[str, Any]) -> dict[str, Any]:
    if not additional_args.get("using_her_replay_buffer"):
        return hyperparams
    return {**hyperparams, "replay_buffer_kwargs": additional_args["her_kwargs"] | hyperparams["replay_buffer_kwargs"]}
