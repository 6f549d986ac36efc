"""The tidy table of evaluations: one CSV file for each run, one row for each evaluation."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

# `return` is the mean of `episodes` deterministic episodes after `step` environment steps, `return_std` their standard
# deviation. Seconds are of this run so far, without those of evaluations and checkpoints, which are in `eval_seconds`, and
# without the work that was lost when it was killed; what is known of MBPO only is empty for others. `resumed` counts how often
# the run was taken up again.
COLUMNS = (
    *("env", "algo", "seed", "step", "return", "return_std", "episodes", "episode_length"),
    *(
        "wall_seconds",
        "env_seconds",
        "model_seconds",
        "rollouts_seconds",
        "updates_seconds",
        "compile_seconds",
        "eval_seconds",
    ),
    *("resumed", "threads", "machine", "commit"),
    *("python", "sb3_mbpo", "stable_baselines3", "rl_zoo3", "torch", "gymnasium", "mujoco"),
)

Row = dict[str, Any]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """
    Write all rows of a run; a process that is killed meanwhile leaves the file as it was.

    :param file: CSV
    :param rows: With the keys ``COLUMNS``
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def read_rows(file: Path) -> list[Row]:
    """
    :param file: CSV of a run, which need not exist
    :return: Its rows, numbers as numbers
    """
    if not file.exists():
        return []
    table = pd.read_csv(file, dtype={column: str for column in COLUMNS[-8:]}, keep_default_na=False)
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]


def read_all(folder: Path) -> pd.DataFrame:
    """
    :param folder: With one CSV for each run
    :return: All rows
    :raises FileNotFoundError: if there is none
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise FileNotFoundError(f"There is no CSV in {folder}: `python -m benchmarks run` writes them")
    return pd.concat([pd.read_csv(file, dtype={"commit": str}) for file in files], ignore_index=True)
