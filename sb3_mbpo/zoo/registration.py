"""Make the algorithms known to RL Zoo: one function per zoo module that has to learn of it, each harmless when repeated."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna
    from rl_zoo3.exp_manager import ExperimentManager

# RL Zoo's name of each, and that in the package
ALGOS = {"mbpo": "MBPO", "dhmbpo": "DHMBPO"}


def hyperparams_file(algo: str) -> Path:
    """
    :param algo: RL Zoo's name of the algorithm
    :return: The tuned hyperparameters: inside the package when it was installed from a wheel,
        at the top of the checkout otherwise
    """
    package = Path(__file__).parents[1]
    packaged = package / "hyperparams" / f"{algo}.yml"
    return packaged if packaged.is_file() else package.parent / "hyperparams" / f"{algo}.yml"


def register_algorithms(utils: ModuleType) -> None:
    """
    :param utils: ``rl_zoo3.utils``, whose ``ALGOS`` is what ``--algo`` may name
    """
    import sb3_mbpo

    for algo, name in ALGOS.items():
        utils.ALGOS.setdefault(algo, getattr(sb3_mbpo, name))


def register_samplers(hyperparams_opt: ModuleType) -> None:
    """
    :param hyperparams_opt: ``rl_zoo3.hyperparams_opt``, which holds what ``--optimize`` searches
    """
    from sb3_mbpo.zoo import samplers

    for algo in ALGOS:
        hyperparams_opt.HYPERPARAMS_SAMPLER.setdefault(algo, getattr(samplers, f"sample_{algo}_params"))
        hyperparams_opt.HYPERPARAMS_CONVERTER.setdefault(algo, getattr(samplers, f"convert_{algo}_params"))


def register_hyperparams(exp_manager: ModuleType) -> None:
    """
    Fit the zoo's manager of experiments to the algorithms:

    - The packaged YAML is read where the zoo would look for ``mbpo.yml`` or ``dhmbpo.yml`` in its own folder and not find it.
      A file given with ``-conf`` is never replaced.
    - The ``env_kwargs`` of the YAML describe the evaluation environment and that of later scripts, too. The zoo itself
      leaves them out there, so that an Ant with fewer observations would meet one with more.
    - ``--trial-id 0`` is a trial. The zoo itself takes it for none, as it silently does without a study.
    - With ``-i``, the sizes of the model's networks are the agent's, not the YAML's, as the zoo does with ``policy_kwargs``.
    - The sampler of ``--optimize`` learns the number of environment steps, which rollout schedules depend on.

    :param exp_manager: ``rl_zoo3.exp_manager``
    """
    manager_class = exp_manager.ExperimentManager
    zoo_reads_hyperparams, zoo_objective = manager_class.read_hyperparameters, manager_class.objective
    if zoo_reads_hyperparams.__module__ == __name__:
        return

    # as in ExperimentManager.__init__: the hyperparameters are in the package, or beside it in a checkout of the zoo
    zoo = Path(str(exp_manager.__file__)).parent
    zoo = zoo if (zoo / "hyperparams").is_dir() else zoo.parent

    def read_hyperparameters(self: "ExperimentManager") -> tuple[dict[str, Any], dict[str, Any]]:
        if self.algo not in ALGOS:
            return zoo_reads_hyperparams(self)
        default = zoo / f"hyperparams/{self.algo}.yml"
        if self.config == str(default) and not default.exists():
            self.config = str(hyperparams_file(self.algo))
        given = self.custom_hyperparams or {}
        if self.trial_id is not None:
            if not (self.storage and self.study_name):
                raise ValueError(f"--trial-id {self.trial_id} needs --storage and --study-name")
            if self.trial_id == 0:
                self.custom_hyperparams = self.load_trial(self.storage, self.study_name, self.trial_id) | given
        hyperparams, saved_hyperparams = zoo_reads_hyperparams(self)
        if "ParallelTrainCallback" in str(hyperparams.get("callback")):
            raise ValueError("ParallelTrainCallback trains a copy of the agent as plain SAC, without a model: leave it out")
        env_kwargs = hyperparams.get("env_kwargs", {})
        self.eval_env_kwargs = self.eval_env_kwargs or env_kwargs
        # saved as args.yml, which is all that record_video and push_to_hub read
        self.args.env_kwargs = self.env_kwargs or env_kwargs or None
        if self.continue_training:
            for name in {"ensemble_size", "model_hidden_sizes"} - set(given):
                hyperparams.pop(name, None)
                saved_hyperparams.pop(name, None)
        return hyperparams, saved_hyperparams

    def objective(self: "ExperimentManager", trial: "optuna.Trial") -> float:
        if self.algo in ALGOS:
            trial.set_user_attr("n_timesteps", self.n_timesteps)
        return zoo_objective(self, trial)

    manager_class.read_hyperparameters, manager_class.objective = read_hyperparameters, objective


REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": register_algorithms,
    "rl_zoo3.hyperparams_opt": register_samplers,
    "rl_zoo3.exp_manager": register_hyperparams,
}


def register() -> None:
    """Register them with RL Zoo, importing it if need be. Unlike at start-up, an error is raised, not warned about."""
    for name, register_with in REGISTRATIONS.items():
        register_with(importlib.import_module(name))
