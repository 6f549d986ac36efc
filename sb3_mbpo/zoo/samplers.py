"""The search space of RL Zoo's ``--optimize`` for MBPO."""

from typing import Any

import optuna

NET_ARCHS = {"small": [64, 64], "medium": [256, 256]}
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
    her_kwargs = {}
    if additional_args.get("using_her_replay_buffer"):
        # As for the zoo's SAC
        sampled_params["n_sampled_goal"] = trial.suggest_int("n_sampled_goal", 1, 5)
        sampled_params["goal_selection_strategy"] = trial.suggest_categorical(
            "goal_selection_strategy", ["final", "episode", "future"]
        )
        her_kwargs = additional_args["her_kwargs"]
    hyperparams = convert_mbpo_params(sampled_params)
    if her_kwargs:
        hyperparams["replay_buffer_kwargs"] = her_kwargs | hyperparams["replay_buffer_kwargs"]
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
    her = {name: hyperparams.pop(name) for name in ("n_sampled_goal", "goal_selection_strategy") if name in hyperparams}
    if her:
        hyperparams["replay_buffer_kwargs"] = her
    return hyperparams
