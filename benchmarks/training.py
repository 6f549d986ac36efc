"""One run, from its start or from its newest checkpoint to its end, by RL Zoo's own manager of experiments."""

import argparse
import copy
import importlib
import json
import os
import platform
import shutil
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from filelock import FileLock, Timeout
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import sync_envs_normalization

from benchmarks import machine
from benchmarks.results import Row, read_rows, write_rows

FINAL_EPISODES = 10
# How long to wait for the lock of a run: whoever was killed may still be at a training of the model
LOCK_SECONDS = 120.0


class Run(NamedTuple):
    """
    :param env: Id of the environment
    :param algo: Name of the algorithm in the table
    :param seed: Of the training
    :param steps: Environment steps after which it ends
    :param zoo_algo: Name of the algorithm in RL Zoo
    :param changes: To RL Zoo's hyperparameters for this algorithm and environment
    :param env_kwargs: Arguments of the environment
    :param eval_every: Environment steps between two evaluations, of one episode each as in the paper
    :param threads: For PyTorch
    :param folder: Of all runs, for checkpoints and logs
    :param results: For the tables of evaluations
    :param commit: Of the code that asked for it; workers of a cluster may not have its history
    """

    env: str
    algo: str
    seed: int
    steps: int
    zoo_algo: str
    changes: dict[str, Any]
    env_kwargs: dict[str, Any]
    eval_every: int
    threads: int
    folder: Path
    results: Path
    commit: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.file_name}_{self.algo}_{self.seed}"

    @property
    def file_name(self) -> str:
        """Of its environment, in the names of files."""
        return self.env.replace("/", "-")

    @property
    def table(self) -> Path:
        """Its evaluations."""
        return self.results / f"{self.name}.csv"

    @property
    def is_finished(self) -> bool:
        """Whether its last evaluation, that of several episodes, is there."""
        rows = read_rows(self.table)
        return bool(rows) and rows[-1]["step"] >= self.steps and rows[-1]["episodes"] == FINAL_EPISODES

    def checkpoint(self) -> Path | None:
        """
        :return: The newest complete one, a folder that RL Zoo can continue from
        """
        return max((self.folder / self.name).glob("checkpoint-*"), default=None)


class EvaluateAndSave(BaseCallback):
    """
    Every ``eval_every`` steps, after the updates: evaluate the agent, write the row, save the agent. Row and checkpoint are of
    the same step, but after a kill between the two.

    :param run: What is trained
    :param manager: RL Zoo's, with the environments
    :param rows: Evaluations up to the checkpoint that the agent comes from
    :param resumed: How often the run was taken up again
    :param settings: That it is trained with, saved beside the agent
    :param launcher: Process without which the run must not go on
    """

    def __init__(
        self,
        run: Run,
        manager: ExperimentManager,
        rows: list[Row],
        resumed: int,
        settings: dict[str, str],
        launcher: int | None,
    ) -> None:
        super().__init__()
        self.run, self.manager, self.rows, self.resumed = run, manager, rows, resumed
        self.settings, self.launcher = settings, launcher
        self.eval_env = manager.create_envs(1, eval_env=True)
        self.before = rows[-1] if rows else {}
        # They do not change during the run
        self.about = {
            "resumed": resumed,
            "threads": run.threads,
            "machine": machine.processor(),
            "commit": run.commit,
            "python": platform.python_version(),
            "sb3_mbpo": machine.installed("sb3-mbpo"),
            **{
                package: machine.installed(package.replace("_", "-"))
                for package in ("stable_baselines3", "rl_zoo3", "torch", "gymnasium", "mujoco")
            },
        }

    def _init_callback(self) -> None:
        # Before MBPO compiles, which is part of the training
        self.start, self.own_seconds = time.perf_counter(), 0.0

    def _on_training_start(self) -> None:
        self.last_step = self.model.num_timesteps

    def _on_step(self) -> bool:
        if self.launcher is not None and os.getppid() != self.launcher:
            # Killed, and started again, it would find this run in use
            raise RuntimeError("The command that started this run is gone")
        return True

    def _on_rollout_start(self) -> None:
        # Here all that belongs to the last step is done: it is stored, the model trained, the updates made
        if self.model.num_timesteps // self.run.eval_every > self.last_step // self.run.eval_every:
            self._evaluate_and_save(n_episodes=1)

    def _on_training_end(self) -> None:
        self._evaluate_and_save(FINAL_EPISODES)

    def _evaluate_and_save(self, n_episodes: int) -> None:
        start = time.perf_counter()
        self.last_step = step = self.model.num_timesteps
        # The initial states of an evaluation do not depend on how often the run was taken up again, nor on its training
        self.eval_env.seed(int(np.random.SeedSequence([self.run.seed, step]).generate_state(1)[0]))
        sync_envs_normalization(self.training_env, self.eval_env)
        returns, lengths = evaluate_policy(self.model, self.eval_env, n_episodes, return_episode_rewards=True)
        row = {
            "env": self.run.env,
            "algo": self.run.algo,
            "seed": self.run.seed,
            "step": step,
            "return": round(float(np.mean(returns)), 3),
            "return_std": round(float(np.std(returns)), 3),
            "episodes": n_episodes,
            "episode_length": float(np.mean(lengths)),
            **self._seconds(start),
            **self.about,
        }
        # One for each step: where a run ends that went on before, the evaluation of several episodes
        self.rows = [*(each for each in self.rows if each["step"] < step), row]
        write_rows(self.run.table, self.rows)
        self._save(step)
        self.own_seconds += time.perf_counter() - start
        # Past the log, for whoever waits
        message = f"{self.run.name}: step {step:,}, return {row['return']:,.1f}, {row['wall_seconds']:,.0f} s"
        print(message, file=sys.__stdout__, flush=True)

    def _seconds(self, now: float) -> dict[str, float | str]:
        """Since the run began, with those of the attempts before."""
        seconds: dict[str, float | str] = {
            "wall": now - self.start - self.own_seconds,
            **getattr(self.model, "seconds", dict.fromkeys(("env", "model", "rollouts", "updates", "compile"), "")),
            "eval": self.own_seconds,
        }
        if isinstance(seconds["env"], float):
            # MBPO counts callbacks, hence what is done here, as environment
            seconds["env"] -= self.own_seconds
        return {
            f"{name}_seconds": value if isinstance(value, str) else round(value + self.before.get(f"{name}_seconds", 0.0), 1)
            for name, value in seconds.items()
        }

    def _save(self, step: int) -> None:
        """In the way in which RL Zoo saves, so that it can continue; complete or not at all."""
        folder = self.run.folder / self.run.name
        temporary, target = folder / "saving", folder / f"checkpoint-{step:09d}"
        if target.exists():
            # The same agent, evaluated again: only the rows are others
            write_rows(target / "rows.csv", self.rows)
            return
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_rows(temporary / "rows.csv", self.rows)
        (temporary / "settings.json").write_text(json.dumps(self.settings, indent=1))
        self.model.save(temporary / f"{self.run.file_name}.zip")
        if isinstance(self.model, OffPolicyAlgorithm):
            self.model.save_replay_buffer(temporary / "replay_buffer.pkl")
        if (vec_normalize := self.model.get_vec_normalize_env()) is not None:
            (temporary / self.run.env).mkdir()
            vec_normalize.save(str(temporary / self.run.env / "vecnormalize.pkl"))
        temporary.rename(target)
        for other in folder.glob("checkpoint-*"):
            if other != target:
                shutil.rmtree(other)


def rows_before(run: Run, checkpoint: Path | None) -> list[Row]:
    """
    :param run: What is trained
    :param checkpoint: That it goes on from
    :return: Its evaluations up to the checkpoint, in which they are saved: the table may be an older one, or gone
    :raises ValueError: if there are evaluations, but no checkpoint to go on from
    """
    if checkpoint is not None:
        return read_rows(checkpoint / "rows.csv")
    rows = read_rows(run.table)
    # With one row, it was killed before its first checkpoint
    if len(rows) > 1:
        raise ValueError(
            f"{run.table} has evaluations up to step {rows[-1]['step']:,}, but there is no checkpoint in "
            f"{run.folder / run.name} to go on from: say where it is (`--runs`), or begin again with other `--results`"
        )
    return []


def check_settings(run: Run, checkpoint: Path, settings: dict[str, str]) -> None:
    """
    :param run: What is trained
    :param checkpoint: To go on from
    :param settings: To go on with
    :raises ValueError: if they are not those that it was trained with: its curve would be of neither
    """
    saved: dict[str, str] = json.loads((checkpoint / "settings.json").read_text())
    differs = {name: (saved.get(name), settings.get(name)) for name in sorted(saved.keys() | settings.keys())}
    differs = {name: (before, now) for name, (before, now) in differs.items() if before != now}
    if differs:
        changes = ", ".join(f"{name} was {before} and is {now}" for name, (before, now) in differs.items())
        raise ValueError(
            f"{checkpoint} was trained with other settings: {changes}. Delete it and the run's table to begin again"
        )


def make_manager(run: Run, checkpoint: Path | None) -> ExperimentManager:
    """
    :param run: What is trained
    :param checkpoint: To go on from, if any
    :return: RL Zoo's, as its train script makes it
    """
    agent = "" if checkpoint is None else str(checkpoint / f"{run.file_name}.zip")
    if run.env.startswith("dm_control/"):
        # It registers them
        importlib.import_module("shimmy")
    # What is saved beside the agent
    args = argparse.Namespace(algo=run.zoo_algo, env=run.env, seed=run.seed, trained_agent=agent, hyperparams=run.changes)
    return ExperimentManager(
        args,
        run.zoo_algo,
        run.env,
        str(run.folder / run.name / "zoo"),
        n_timesteps=run.steps,
        eval_freq=-1,
        # The zoo and the agent change what they get
        hyperparams=copy.deepcopy(run.changes) or None,
        # Of the evaluation, too
        env_kwargs=copy.deepcopy(run.env_kwargs) or None,
        trained_agent=agent,
        seed=run.seed,
    )


def train(run: Run, launcher: int | None = None) -> None:
    """
    Train to the end, from the newest checkpoint if there is one. What is printed goes to ``log.txt`` in the run's folder, and
    what SB3 logs to CSV files there.

    :param run: What
    :param launcher: Process that started this one, and with which it ends
    :raises ValueError: if there are evaluations, but no checkpoint to go on from, or one that was trained with other settings
    :raises RuntimeError: if another process is training it, or the launcher is gone
    """
    folder = run.folder / run.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=LOCK_SECONDS):
            if not run.is_finished:
                with (folder / "log.txt").open("a", buffering=1) as log, redirect_stdout(log):
                    _train(run, folder, launcher)
    except Timeout as error:
        raise RuntimeError(f"{run.name} is being trained by another process, which holds {folder / 'lock'}") from error


def _train(run: Run, folder: Path, launcher: int | None) -> None:
    checkpoint = run.checkpoint()
    rows = rows_before(run, checkpoint)
    resumed = 0 if checkpoint is None else int(rows[-1]["resumed"]) + 1
    set_random_seed(run.seed)
    th.set_num_threads(run.threads)
    manager = make_manager(run, checkpoint)
    _, hyperparams = manager.read_hyperparameters()
    settings = {name: str(value) for name, value in hyperparams.items() if name != "n_timesteps"}
    settings |= {"algo": run.zoo_algo, "env_kwargs": str(run.env_kwargs)}
    if checkpoint is not None:
        check_settings(run, checkpoint, settings)
    setup = manager.setup_experiment()
    assert setup is not None
    model: BaseAlgorithm = setup[0]
    if resumed:
        # A loaded agent has seeded everything as at its beginning: the same episodes and the same noise would come again
        model.set_random_seed(run.seed + 1_000_000 * resumed)
    model.set_logger(configure(str(folder / f"progress-{model.num_timesteps:09d}"), ["csv"]))
    callback = EvaluateAndSave(run, manager, rows, resumed, settings, launcher)
    # Not by the manager, which would count steps from 0 again
    model.learn(
        run.steps - model.num_timesteps, callback=[*manager.callbacks, callback], log_interval=1, reset_num_timesteps=False
    )
    if model.env is not None:
        model.env.close()
    callback.eval_env.close()
