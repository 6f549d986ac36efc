"""Make MBPO known to RL Zoo: one function per zoo module that has to learn of it, each harmless when repeated."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_zoo3.exp_manager import ExperimentManager

ALGO = "mbpo"


def hyperparams_file() -> Path:
    """
    :return: The tuned hyperparameters: inside the package when it was installed from a wheel,
        at the top of the checkout otherwise
    """
    package = Path(__file__).parents[1]
    packaged = package / "hyperparams" / f"{ALGO}.yml"
    return packaged if packaged.is_file() else package.parent / "hyperparams" / f"{ALGO}.yml"


def register_algorithm(utils: ModuleType) -> None:
    """
    :param utils: ``rl_zoo3.utils``, whose ``ALGOS`` is what ``--algo`` may name
    """
    from sb3_mbpo.mbpo import MBPO

    utils.ALGOS.setdefault(ALGO, MBPO)


def register_samplers(hyperparams_opt: ModuleType) -> None:
    """
    :param hyperparams_opt: ``rl_zoo3.hyperparams_opt``, which holds what ``--optimize`` searches
    """
    from sb3_mbpo.zoo.samplers import convert_mbpo_params, sample_mbpo_params

    hyperparams_opt.HYPERPARAMS_SAMPLER.setdefault(ALGO, sample_mbpo_params)
    hyperparams_opt.HYPERPARAMS_CONVERTER.setdefault(ALGO, convert_mbpo_params)


def register_hyperparams(exp_manager: ModuleType) -> None:
    """
    Let the zoo read the packaged YAML where it would look for ``mbpo.yml`` in its own folder and not find it.
    A file given with ``-conf`` is never replaced. And let it evaluate in the environment that the YAML describes: the zoo
    itself leaves its ``env_kwargs`` out there, so that an Ant with fewer observations would meet one with more.

    :param exp_manager: ``rl_zoo3.exp_manager``
    """
    manager_class = exp_manager.ExperimentManager
    zoo_reads_hyperparams = manager_class.read_hyperparameters
    if zoo_reads_hyperparams.__module__ == __name__:
        return

    # as in ExperimentManager.__init__: the hyperparameters are in the package, or beside it in a checkout of the zoo
    zoo = Path(str(exp_manager.__file__)).parent
    zoo = zoo if (zoo / "hyperparams").is_dir() else zoo.parent
    default = str(zoo / f"hyperparams/{ALGO}.yml")

    def read_hyperparameters(self: "ExperimentManager") -> tuple[dict[str, Any], dict[str, Any]]:
        if self.algo == ALGO and self.config == default and not Path(default).exists():
            self.config = str(hyperparams_file())
        hyperparams, saved_hyperparams = zoo_reads_hyperparams(self)
        if self.algo == ALGO and not self.eval_env_kwargs:
            self.eval_env_kwargs = hyperparams.get("env_kwargs", {})
        return hyperparams, saved_hyperparams

    manager_class.read_hyperparameters = read_hyperparameters


REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": register_algorithm,
    "rl_zoo3.hyperparams_opt": register_samplers,
    "rl_zoo3.exp_manager": register_hyperparams,
}


def register() -> None:
    """Register MBPO with RL Zoo, importing it if need be. Unlike at start-up, an error is raised, not warned about."""
    for name, register_with in REGISTRATIONS.items():
        register_with(importlib.import_module(name))
