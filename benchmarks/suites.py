"""Which tasks there are, and which algorithms: a name of RL Zoo's, and what differs from its hyperparameters."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.training import Run


class Task(NamedTuple):
    """
    :param steps: Environment steps of a run
    :param env_kwargs: Arguments of the environment for all algorithms alike; ``hyperparams/mbpo.yml`` has the same
    """

    steps: int
    env_kwargs: dict[str, Any]


SUITES = {
    # The paper's Figure 2, with its numbers of steps (of the pendulums: the authors' release)
    "paper": {
        "InvertedPendulum-v5": Task(20_000, {}),
        "InvertedDoublePendulum-v5": Task(20_000, {}),
        "Hopper-v5": Task(125_000, {}),
        "Walker2d-v5": Task(300_000, {}),
        "HalfCheetah-v5": Task(400_000, {}),
        "Ant-v5": Task(300_000, {"include_cfrc_ext_in_observation": False}),
        "Humanoid-v5": Task(
            300_000,
            {f"include_{part}_in_observation": False for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")},
        ),
    },
    # Of minutes
    "pendulums": {
        "InvertedPendulum-v5": Task(10_000, {}),
        # As in the paper's v2 the reward is 1 at every step; in v5 it is 0 at the fall, which the model has to learn
        "InvertedPendulum-v4": Task(10_000, {}),
        "Pendulum-v1": Task(10_000, {}),
        "InvertedDoublePendulum-v5": Task(10_000, {}),
    },
    # DeepMind Control; steps are decisions of the agent. Only `hyperparams/dhmbpo.yml` has settings for it.
    "control": {"dm_control/cartpole-swingup-v0": Task(3_000, {})},
}


class Algorithm(NamedTuple):
    """
    :param zoo: RL Zoo's name, whose hyperparameters for the task hold, or its default if it has none for the task: version
        2.9.2 has none of SAC and PPO for MuJoCo's v5 tasks
    :param changes: To these hyperparameters
    """

    zoo: str
    changes: dict[str, Any]


VARIANTS = {
    # The paper's "no model" (section 5): MBPO's hyperparameters, all of each batch real. The numbers are those of SAC.
    # 20 updates are MBPO's for Hopper and its default.
    "sac-g20": Algorithm("mbpo", {"real_ratio": 1.0, "gradient_steps": 20}),
    "mbpo-auto": Algorithm("mbpo", {"rollout_schedule": "auto"}),
}


def algorithms(names: list[str], label: str | None, hyperparams: dict[str, Any] | None) -> dict[str, Algorithm]:
    """
    :param names: Of RL Zoo's or of ``VARIANTS``
    :param label: Name in the tables if ``hyperparams`` are given
    :param hyperparams: Further changes to the hyperparameters of the one algorithm named
    :return: The algorithms by their names in the tables
    :raises ValueError: for an algorithm that RL Zoo does not know, and if changes and label do not come together, are for more
        than one algorithm, or the label is another algorithm's or no part of a file name
    """
    from rl_zoo3.utils import ALGOS

    known = sorted({*ALGOS, *VARIANTS})
    if unknown := set(names) - set(known):
        raise ValueError(f"`--algos` {', '.join(sorted(unknown))}: not among {', '.join(known)}")
    found = {name: VARIANTS.get(name, Algorithm(name, {})) for name in names}
    if label is None and hyperparams is None:
        return found
    if label is None or hyperparams is None:
        raise ValueError("`--hyperparams` and `--label` go together: the label is the name in the tables of what was changed")
    if len(found) > 1:
        raise ValueError(f"`--hyperparams` are for one algorithm, `--algos` has {len(found)}: {', '.join(found)}")
    if label in known or not re.fullmatch(r"[\w.-]+", label):
        raise ValueError(f"`--label` {label}: must be letters, digits and -_. and none of {', '.join(known)}")
    (algorithm,) = found.values()
    return {label: Algorithm(algorithm.zoo, {**algorithm.changes, **hyperparams})}


def runs(
    suite: str,
    envs: list[str] | None,
    algos: dict[str, Algorithm],
    seeds: list[int],
    steps: int | None,
    eval_every: int,
    threads: int,
    folder: Path,
    results: Path,
) -> list[Run]:
    """
    :param suite: Name of a suite
    :param envs: Tasks of it. None: all
    :param algos: Algorithms by their names in the tables
    :param seeds: Of each task and algorithm
    :param steps: Environment steps of each run. None: the suite's
    :param eval_every: Environment steps between two evaluations
    :param threads: Of each run
    :param folder: For checkpoints and logs
    :param results: For the tables of evaluations
    :return: All combinations, the seeds in the outermost loop: all curves begin before one has many seeds
    :raises ValueError: for a task that is not in the suite
    """
    tasks = SUITES[suite]
    if unknown := set(envs or ()) - set(tasks):
        raise ValueError(f"`--envs` {', '.join(sorted(unknown))}: not in the suite '{suite}', which has {', '.join(tasks)}")
    commit = machine.commit()
    return [
        Run(
            env=env,
            algo=name,
            seed=seed,
            steps=steps or tasks[env].steps,
            zoo_algo=algo.zoo,
            changes=algo.changes,
            env_kwargs=tasks[env].env_kwargs,
            eval_every=eval_every,
            threads=threads,
            folder=folder.absolute(),
            results=results.absolute(),
            commit=commit,
        )
        for seed in dict.fromkeys(seeds)
        for env in envs or tasks
        for name, algo in algos.items()
    ]
