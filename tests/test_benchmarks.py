"""Benchmarks: runs that evaluate, stop anywhere and go on, on one machine or a cluster; and that the one of speed runs."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch as th
from filelock import FileLock
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks import engines, machine, suites, training
from benchmarks.__main__ import main
from benchmarks.results import COLUMNS, read_rows, write_rows
from benchmarks.speed import alone, peak_gigabytes
from benchmarks.training import Run, train

REPOSITORY = Path(__file__).parents[1]
# Seconds until a process is given up: minutes on a machine that does something else as well
PATIENCE = 900
SMALL = dict(
    learning_starts=100,
    gradient_steps=1,
    batch_size=32,
    policy_kwargs={"net_arch": [16]},
    model_hidden_sizes=[16],
    model_gradient_steps=0.05,
    rollout_batch_size=100,
)


def make_run(folder, steps=500, algo="mbpo", seed=0, changes=SMALL, env="Pendulum-v1", eval_every=100):
    return Run(env, algo, seed, steps, algo, changes, {}, eval_every, 1, folder / "runs", folder / "results", "abc")


# --- Runs ------------------------------------------------------------------------------------------------------------


def test_a_run_from_start_to_end(tmp_path):
    run = make_run(tmp_path, steps=250)
    assert not run.is_finished
    train(run)
    rows = read_rows(run.table)
    assert tuple(rows[0]) == COLUMNS and COLUMNS[:5] == ("env", "algo", "seed", "step", "return")
    assert [(row["step"], row["episodes"]) for row in rows] == [(100, 1), (200, 1), (250, 10)]
    for row in rows:
        assert (row["env"], row["algo"], row["seed"], row["resumed"], row["commit"]) == ("Pendulum-v1", "mbpo", 0, 0, "abc")
        assert -2_000 < row["return"] < 0 and row["episode_length"] == 200 and row["mujoco"].count(".") == 2
        parts = [row[f"{part}_seconds"] for part in ("env", "model", "rollouts", "updates", "compile")]
        assert row["wall_seconds"] >= sum(parts) - 0.3 and min(parts) >= 0
    assert rows[-1]["return_std"] > 0 and rows[0]["return_std"] == 0
    # Trained with the zoo's hyperparameters and what was changed of them
    (config,) = (tmp_path / "runs" / run.name).rglob("config.yml")
    assert "learning_starts\n    - 100" in config.read_text() and "rollout_schedule" in config.read_text()
    assert run.is_finished
    before = run.table.stat().st_mtime_ns
    train(run)
    assert run.table.stat().st_mtime_ns == before
    # More steps go on from there
    train(run._replace(steps=400))
    rows = read_rows(run.table)
    assert [row["step"] for row in rows] == [100, 200, 250, 300, 400] and [row["resumed"] for row in rows] == [0, 0, 0, 1, 1]
    seconds = [row["wall_seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_a_run_ends_where_it_was_evaluated_before(tmp_path):
    """One that was to be longer: ten episodes in the place of one."""
    run = make_run(tmp_path, 250)
    train(run)
    rows = read_rows(run.table)
    write_rows(run.table, [*rows[:2], {**rows[2], "episodes": 1}])
    assert not run.is_finished
    train(run)
    assert [(row["step"], row["episodes"]) for row in read_rows(run.table)] == [(100, 1), (200, 1), (250, 10)]
    assert run.checkpoint().name == "checkpoint-000000250" and not (run.checkpoint().parent / "outdated").exists()


def test_other_episodes_come_after_an_interruption(tmp_path):
    """A loaded agent seeds the environment as at the beginning, which would begin the same episodes again."""
    run = make_run(tmp_path, 600)
    train(run)
    train(run._replace(steps=1_200))
    with (run.checkpoint() / "replay_buffer.pkl").open("rb") as file:
        buffer = pickle.load(file)
    # An episode has 200 steps
    starts = buffer.observations[[0, 200, 400, 600, 800, 1_000], 0]
    assert len(np.unique(starts, axis=0)) == 6


@pytest.mark.parametrize(
    "algo, changes",
    [("sac", {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 50}), ("ppo", {"normalize": True, "n_steps": 64})],
)
def test_other_algorithms_and_normalised_environments_go_on(algo, changes, tmp_path):
    run = make_run(tmp_path, 150, algo, changes=changes)
    train(run)
    train(run._replace(steps=320))
    rows = read_rows(run.table)
    # PPO can be evaluated between two of its rollouts only, of 4 environments here
    steps = [100, 150, 200, 300, 320] if algo == "sac" else [256, 512]
    assert [row["step"] for row in rows] == steps
    assert rows[0]["model_seconds"] == "" and rows[-1]["resumed"] == 1
    assert (run.checkpoint() / "Pendulum-v1" / "vecnormalize.pkl").exists() == (algo == "ppo")


def test_the_initial_states_of_an_evaluation_are_its_own(tmp_path):
    """Whatever happened before: a policy that is not trained gets the same evaluation in an interrupted run."""
    changes = {**SMALL, "gradient_steps": 0}
    whole, parts = make_run(tmp_path / "whole", 300, changes=changes), make_run(tmp_path / "parts", 150, changes=changes)
    train(whole)
    train(parts)
    train(parts._replace(steps=300))
    in_whole, in_parts = ({row["step"]: row["return"] for row in read_rows(run.table)} for run in (whole, parts))
    assert in_whole[200] == in_parts[200] and in_whole[300] == in_parts[300] and in_whole[100] != in_whole[200]


def test_rows_without_a_checkpoint_are_not_thrown_away(tmp_path):
    run = make_run(tmp_path, 250)
    train(run)
    rows = read_rows(run.table)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"evaluations up to step 250, but there is no checkpoint"):
        train(run._replace(steps=400))
    # One row was written before a checkpoint could be
    write_rows(run.table, rows[:1])
    train(run)
    assert [row["step"] for row in read_rows(run.table)] == [100, 200, 250]


def test_what_is_saved_counts_and_not_the_table(tmp_path):
    """Which is under version control: it may be an older one again, or gone."""
    run = make_run(tmp_path, 300)
    train(run)
    rows = read_rows(run.table)
    write_rows(run.table, rows[:1])
    train(run._replace(steps=400))
    assert [row["step"] for row in read_rows(run.table)] == [100, 200, 300, 400]
    run.table.unlink()
    train(run._replace(steps=500))
    assert [row["step"] for row in read_rows(run.table)] == [100, 200, 300, 400, 500]
    assert [path.name for path in (tmp_path / "runs" / run.name).glob("checkpoint-*")] == ["checkpoint-000000500"]


def test_other_settings_do_not_go_on_with_a_run(tmp_path):
    """Its curve would be of neither."""
    run = make_run(tmp_path, 150, "sac", changes={"learning_starts": 50})
    train(run)
    other = run._replace(steps=300, changes={"learning_starts": 50, "gamma": 0.5})
    with pytest.raises(ValueError, match=r"trained with other settings: gamma was None and is 0.5"):
        train(other)
    assert run.is_finished and not other.is_finished


def test_what_an_evaluation_is_made_with(tmp_path, monkeypatch):
    """The statistics, arguments of the environment and threads of the training; and its time is its own."""
    seen = []

    def watched(model, env, *args, **kwargs):
        statistics = [each.obs_rms.mean.copy() for each in (env, model.get_vec_normalize_env())]
        gravity = [each.get_attr("g") for each in (env, model.env)]
        seen.append((np.array_equal(*statistics), gravity, th.get_num_threads()))
        time.sleep(0.5)
        return evaluate_policy(model, env, *args, **kwargs)

    def compile_all(agent, n_updates):
        time.sleep(0.5)
        return {"updates": "not now", "model": "not now"}

    monkeypatch.setattr(training, "evaluate_policy", watched)
    monkeypatch.setattr("sb3_mbpo.common.model_based.compile_all", compile_all)
    threads = th.get_num_threads()
    try:
        run = make_run(tmp_path, 250, changes={**SMALL, "normalize": True})
        train(run._replace(env_kwargs={"g": 5.0}, threads=threads + 1))
    finally:
        th.set_num_threads(threads)
    assert seen == [(True, [[5.0], [5.0]], threads + 1)] * 3
    for row in read_rows(run.table):
        parts = [row[f"{part}_seconds"] for part in ("env", "model", "rollouts", "updates", "compile")]
        assert row["compile_seconds"] >= 0.5 and row["wall_seconds"] >= sum(parts) - 0.3


def test_two_processes_do_not_train_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOCK_SECONDS", 0.1)
    run = make_run(tmp_path, 250)
    (tmp_path / "runs" / run.name).mkdir(parents=True)
    with FileLock(tmp_path / "runs" / run.name / "lock"):
        with pytest.raises(RuntimeError, match="trained by another process"):
            train(run)


def test_a_run_that_fails_stops_no_other(tmp_path):
    runs = [make_run(tmp_path, 150, changes={**SMALL, "nonsense": 1}), make_run(tmp_path, 150, seed=1)]
    first, second = engines.local(runs, jobs=2)
    assert "nonsense" in first and second is None and runs[1].is_finished


# --- Killed ----------------------------------------------------------------------------------------------------------

START = """
import sys
from pathlib import Path
from benchmarks import engines
from tests.test_benchmarks import make_run
runs = [make_run(Path(sys.argv[2]), seed=seed) for seed in (0, 1)]
engine, _, number = sys.argv[1].partition(" ")
if engine == "ray":
    engines.MAX_RETRIES = int(number)
failures = engines.local(runs, int(number)) if engine == "local" else engines.ray(runs, None)
print([failure and failure.splitlines()[-1] for failure in failures])
sys.exit(any(failures))
"""


def start(engine, folder):
    log = (folder / "log.txt").open("a")
    return subprocess.Popen([sys.executable, "-c", START, engine, folder], cwd=REPOSITORY, stdout=log, stderr=log)


def wait_for_rows(table, n, process):
    """While a run is going on."""
    deadline = time.monotonic() + PATIENCE
    while len(read_rows(table)) < n:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_as_undisturbed(folder, interrupted, other):
    undisturbed = make_run(folder / "undisturbed")
    train(undisturbed)
    expected = [(row["step"], row["episodes"]) for row in read_rows(undisturbed.table)]
    assert len(expected) == 5
    for run in (interrupted, other):
        assert [(row["step"], row["episodes"]) for row in read_rows(run.table)] == expected
    assert read_rows(interrupted.table)[-1]["resumed"] == 1 and read_rows(other.table)[-1]["resumed"] == 0


def test_killed_and_started_again(tmp_path):
    """Of two runs in line the first is killed, which ends the command; the same command goes on with it."""
    first, second = (make_run(tmp_path, seed=seed) for seed in (0, 1))
    process = start("local 1", tmp_path)
    wait_for_rows(first.table, 2, process)
    process.kill()
    process.wait()
    assert not first.is_finished and not second.table.exists()
    assert start("local 1", tmp_path).wait(timeout=PATIENCE) == 0, (tmp_path / "log.txt").read_text()
    check_as_undisturbed(tmp_path, first, second)


@pytest.mark.slow
def test_killed_with_two_runs_at_once(tmp_path):
    """Their processes end with the command: the same one again must not find its runs in use."""
    runs = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    process = start("local 2", tmp_path)
    for run in runs:
        wait_for_rows(run.table, 1, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not any(run.is_finished for run in runs)
    assert start("local 2", tmp_path).wait(timeout=PATIENCE) == 0, (tmp_path / "log.txt").read_text()
    # Idle by now; joblib would end them in some minutes
    for child in psutil.wait_procs(children, timeout=0)[1]:
        child.kill()
    for run in runs:
        rows = read_rows(run.table)
        assert [row["step"] for row in rows] == [100, 200, 300, 400, 500] and rows[-1]["resumed"] == 1


def kill_worker_of(run, process):
    """Of a local Ray; the one that holds the run's lock."""
    wait_for_rows(run.table, 2, process)
    holder = (run.folder / run.name / "lock").stat().st_ino
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "ray::" in " ".join(child.cmdline())]
    (worker,) = [child for child in workers if holder in [os.stat(f"/proc/{child.pid}/fd/{fd}").st_ino for fd in fds(child)]]
    os.kill(worker.pid, signal.SIGKILL)


def test_a_worker_of_a_cluster_is_killed(tmp_path):
    """A local Ray of two workers: another one takes the run up from its checkpoint, and the command does not notice."""
    first, second = (make_run(tmp_path, seed=seed) for seed in (0, 1))
    process = start("ray 20", tmp_path)
    kill_worker_of(first, process)
    assert process.wait(timeout=PATIENCE) == 0, (tmp_path / "log.txt").read_text()
    check_as_undisturbed(tmp_path, first, second)


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(tmp_path):
    """By the system, for want of memory: the command ends with what is to be done, which then helps."""
    runs = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    process = start("local 2", tmp_path)
    for run in runs:
        wait_for_rows(run.table, 1, process)
    children = psutil.Process(process.pid).children(recursive=True)
    (worker, *_) = [child for child in children if "LokyProcess" in " ".join(child.cmdline())]
    worker.kill()
    assert process.wait(timeout=PATIENCE) == 1
    assert "A process was killed (out of memory?): start the command again" in (tmp_path / "log.txt").read_text()
    assert start("local 2", tmp_path).wait(timeout=PATIENCE) == 0, (tmp_path / "log.txt").read_text()
    assert all(run.is_finished for run in runs)


@pytest.mark.slow
def test_a_run_of_a_cluster_that_is_given_up_stops_no_other(tmp_path):
    first, second = (make_run(tmp_path, seed=seed) for seed in (0, 1))
    process = start("ray 0", tmp_path)
    kill_worker_of(first, process)
    assert process.wait(timeout=PATIENCE) == 1
    assert not first.is_finished and second.is_finished
    assert "died" in (tmp_path / "log.txt").read_text()


def fds(process):
    """Descriptors of open files, but for what is closed meanwhile."""
    return [fd for fd in os.listdir(f"/proc/{process.pid}/fd") if os.path.exists(f"/proc/{process.pid}/fd/{fd}")]


# --- Command line ----------------------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    """In the repository, through the zoo's hyperparameters for the task."""
    folders = ["--results", tmp_path / "results", "--runs", tmp_path / "runs"]
    common = ["--suite", "pendulums", "--envs", "InvertedPendulum-v5", "--algos", "mbpo", "sac", "--seeds", "0"]
    command = [sys.executable, "-m", "benchmarks", "run", *common, "--steps", "300", "--eval-every", "100", *folders]
    result = subprocess.run([*command, "--jobs", "2"], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"0 of 2 runs are finished in {tmp_path}" in result.stdout
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert again.stdout == f"2 of 2 runs are finished in {tmp_path / 'results'}\n"
    command = [sys.executable, "-m", "benchmarks", "report", *folders[:2], "--out", tmp_path / "report"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["curves.png", "curves.svg", "tables.md"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--envs", "Nonsense-v0"], "Nonsense-v0: not in the suite 'paper', which has InvertedPendulum-v5"),
        (["run", "--algos", "nonsense"], "nonsense: not among .*mbpo"),
        (["run", "--algos", "mbpo", "--hyperparams", "tau:0.01"], "`--hyperparams` and `--label` go together"),
        (["run", "--hyperparams", "tau=0.01"], "--hyperparams: tau=0.01: must be KEY:VALUE with values in Python"),
        (["run", "--hyperparams", "rollout_schedule:auto"], "such as .*'auto'.*name 'auto' is not defined"),
        (["run", "--algos", "mbpo", "--label", "other"], "`--hyperparams` and `--label` go together"),
        (["run", "--hyperparams", "tau:0.01", "--label", "other"], "for one algorithm, `--algos` has 2: mbpo, sac"),
        (
            ["run", "--algos", "mbpo", "--hyperparams", "tau:0.01", "--label", "sac"],
            "`--label` sac: must be .* none of .*sac-g20",
        ),
        (["run", "--algos", "mbpo", "--hyperparams", "tau:0.01", "--label", "../k"], "`--label` ../k: must be letters"),
        (["run", "--steps", "0"], "argument --steps: must be 1 or more, not 0"),
        (["report", "--results", "nowhere"], "There is no CSV in nowhere"),
        (["report", "--reference", "nowhere"], "There is no folder nowhere"),
    ],
)
def test_errors_of_the_command_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert re.search(message, capsys.readouterr().err)


def test_runs_of_a_suite(tmp_path):
    algos = suites.algorithms(["sac-g20", "mbpo"], None, None)
    runs = suites.runs("paper", ["Ant-v5", "Hopper-v5"], algos, [0, 1], None, 1_000, 1, tmp_path, tmp_path)
    assert [(run.seed, run.env, run.algo) for run in runs[:4]] == [
        (0, "Ant-v5", "sac-g20"),
        (0, "Ant-v5", "mbpo"),
        (0, "Hopper-v5", "sac-g20"),
        (0, "Hopper-v5", "mbpo"),
    ]
    assert len(runs) == 8 and runs[0].zoo_algo == runs[1].zoo_algo == "mbpo"
    assert runs[0].changes == {"real_ratio": 1.0, "gradient_steps": 20} and runs[1].changes == {}
    algos = suites.algorithms(["mbpo-auto"], None, None)
    (auto,) = suites.runs("paper", ["Hopper-v5"], algos, [0, 0], None, 1_000, 1, tmp_path, tmp_path)
    assert auto.changes == {"rollout_schedule": "auto"}
    assert runs[0].env_kwargs == {"include_cfrc_ext_in_observation": False} and runs[2].steps == 125_000


def test_changed_hyperparameters_have_a_name_of_their_own():
    changed = suites.algorithms(["sac-g20"], "sac-g10", {"gradient_steps": 10})
    assert changed == {"sac-g10": suites.Algorithm("mbpo", {"real_ratio": 1.0, "gradient_steps": 10})}
    # What everyone has by name is as it was
    assert suites.algorithms(["sac-g20"], None, None)["sac-g20"].changes["gradient_steps"] == 20


def test_environments_of_suites_are_those_of_the_hyperparameters():
    """So that all algorithms see the same."""
    import yaml

    mbpo, dhmbpo = (yaml.safe_load((REPOSITORY / "hyperparams" / f"{algo}.yml").read_text()) for algo in ("mbpo", "dhmbpo"))
    for suite in suites.SUITES.values():
        for env, task in suite.items():
            assert task.env_kwargs == mbpo[env].get("env_kwargs", {}) == dhmbpo.get(env, {}).get("env_kwargs", {})
            assert mbpo[env].get("env_wrapper") == dhmbpo.get(env, {}).get("env_wrapper")


# --- Machine ---------------------------------------------------------------------------------------------------------


def test_commit_is_that_of_the_package_in_use(monkeypatch):
    """Another one that is installed was not made of this checkout."""
    assert re.fullmatch(r"[0-9a-f]{10}\+?", machine.commit())
    monkeypatch.setattr("sb3_mbpo.__file__", "/elsewhere/site-packages/sb3_mbpo/__init__.py")
    assert machine.commit() == ""


# --- Speed -----------------------------------------------------------------------------------------------------------


def peak_of_a_process(_):
    return [peak_gigabytes()]


@pytest.mark.slow
def test_peak_memory_is_the_process_s_own():
    """Not that of the process that began it, which has had 800 MB more."""
    ballast = np.ones(100_000_000)
    assert alone(peak_of_a_process, "")[0] < peak_gigabytes() - 0.9 * ballast.nbytes / 1e9


@pytest.mark.slow
def test_speed(tmp_path):
    file = tmp_path / "speed.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed",
        "--sections",
        "updates",
        "model",
        "rollouts",
        "--tasks",
        "Hopper",
        "--rounds",
        "3",
    ]
    result = subprocess.run([*command, "--json", file], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    results = {(each["section"], each["case"]): each for each in json.loads(file.read_text())["results"]}
    for section, case, n_values in (
        ("gradient updates, Hopper", "SB3 SAC", 3),
        ("gradient updates, Hopper", "MBPO", 3),
        ("model training, Hopper", "eager", 3),
        ("model training, Hopper", "compiled", 3),
        ("model rollouts, Hopper", "k = 5", 1),
    ):
        values = results[section, case]["values"]
        assert len(values) == n_values and min(values) > 0 and case in result.stdout
    # The same rate divided by itself
    assert results["gradient updates, Hopper", "SB3 SAC"]["ratio"] == 1
