"""
How fast MBPO is here, beside SB3's SAC and, where it is installed, SBX's: every comparison in alternation, in one run.

    pip install -c constraints.txt -e ".[benchmarks]"
    python -m benchmarks.speed --json speed.json

Nothing else should run on the machine meanwhile. Prints a table of medians and of ratios (medians of the ratios of each
round), and writes all measured values as JSON.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import installed, processor
from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.common.buffers import ModelReplayBuffer, ResidentTransitions, model_buffer_size
from sb3_mbpo.common.compilation import compiled
from sb3_mbpo.common.model_env import ROLLOUTS_AT_ONCE
from sb3_mbpo.common.update import sac_update, try_update
from sb3_mbpo.dhmbpo.update import critic_update, joint_update
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.dynamics.rollouts import rollout
from sb3_mbpo.dynamics.training import BATCH_SIZE, fit, train_on, train_step, try_step

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "Hopper": ("Hopper-v5", {}),
    "HalfCheetah": ("HalfCheetah-v5", {}),
    "Ant": ("Ant-v5", {"include_cfrc_ext_in_observation": False}),
}
GRADIENT_STEPS, MINIBATCH = 20, 256


class Result(NamedTuple):
    """
    :param section: Part of the benchmark
    :param case: What was measured
    :param unit: Of the values
    :param values: One of each round
    :param ratio: Median of the ratios to the reference of the same rounds, above 1 if faster
    :param reference: What it is compared to
    """

    section: str
    case: str
    unit: str
    values: list[float]
    ratio: float | None = None
    reference: str | None = None


def alternate(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """
    :param cases: What to time
    :param rounds: How often each is timed, one after the other in each round
    :return: Seconds of each case in each round
    """
    for run in cases.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def rates(section: str, seconds: dict[str, np.ndarray], n: float, unit: str, reference: str | None = None) -> Iterator[Result]:
    """
    :param section: Part of the benchmark
    :param seconds: What :func:`alternate` returned
    :param n: How many of the unit each call did
    :param unit: Per second
    :param reference: Case that the others are compared to
    :return: Results in units per second
    """
    for name, values in seconds.items():
        ratio = float(np.median(seconds[reference] / values)) if reference is not None else None
        yield Result(section, name, unit, (n / values).tolist(), ratio, reference)


def milliseconds(
    section: str, seconds: dict[str, np.ndarray], n: int, unit: str, reference: str | None = None
) -> Iterator[Result]:
    """Like :func:`rates`, in milliseconds for each of the ``n`` of a call."""
    for result in rates(section, seconds, n, unit, reference):
        yield result._replace(values=[1e3 / value for value in result.values])


def products_alone(function: Callable[[], None], size: tuple[int, int, int]) -> Callable[[], None]:
    """
    The limit: no version of a function can be faster than its matrix products.

    :param function: Whose floating-point operations are counted
    :param size: Of a typical product in it: how many at once, rows, columns
    :return: Makes such products of as many operations
    """
    with FlopCounterMode(display=False) as counter:
        function()
    n_products, rows, columns = size
    left, right = th.randn(n_products, rows, columns), th.randn(n_products, columns, columns)
    out = th.empty(n_products, rows, columns)
    times = round(counter.get_total_flops() / (2 * left.numel() * columns))

    def run() -> None:
        for _ in range(times):
            th.bmm(left, right, out=out)

    return run


def repeated(function: Callable[[], None], n: int) -> Callable[[], None]:
    """Call a function ``n`` times."""

    def run() -> None:
        for _ in range(n):
            function()

    return run


def make_env(task: str) -> gym.Env[Any, Any]:
    """
    :param task: Key of ``TASKS``
    :return: The environment
    """
    env, kwargs = TASKS[task]
    return gym.make(env, **kwargs)


def made_ready(task: str, **kwargs: Any) -> MBPO:
    """
    :param task: Key of ``TASKS``
    :param kwargs: For MBPO
    :return: An agent with 5,000 real and 100,000 generated transitions, compiled
    """
    # Few gradient steps: the model need not be good here
    agent = MBPO(
        "MlpPolicy", make_env(task), seed=0, gradient_steps=1, compile=True, model_gradient_steps=0.01, device="cpu", **kwargs
    )
    agent.learn(agent.learning_starts + 1)
    return agent


def updates(task: str, rounds: int) -> Iterator[Result]:
    """Gradient updates per second, sampling included: 20 in each call of ``train``, as in the paper."""
    agent = made_ready(task)
    sac = SAC("MlpPolicy", make_env(task), seed=0, device="cpu", buffer_size=10_000)
    sac.replay_buffer = agent.replay_buffer
    cases: dict[str, Any] = {"SB3 SAC": sac, "MBPO": agent}
    if importlib.util.find_spec("sbx") is not None:
        # Not an import statement: mypy would want the package
        sbx = importlib.import_module("sbx").SAC(
            "MlpPolicy", make_env(task), seed=0, learning_starts=10**9, buffer_size=10_000
        )
        sbx.learn(5_000)
        cases["SBX SAC"] = sbx
    for each in cases.values():
        each.set_logger(configure(None, []))
    runs: dict[str, Callable[[], object]] = {
        name: partial(each.train, GRADIENT_STEPS, MINIBATCH) for name, each in cases.items()
    }
    products = products_alone(lambda: try_update(sac, MINIBATCH, sac_update), (2, MINIBATCH, 256))
    runs["its matrix products alone"] = repeated(products, GRADIENT_STEPS)
    seconds = alternate(runs, rounds)
    yield from rates(f"gradient updates, {task}", seconds, GRADIENT_STEPS, "updates/s", "SB3 SAC")


def random_batches(
    obs_dim: int, action_dim: int, n_members: int, n_batches: int
) -> tuple[th.Tensor, th.Tensor, list[th.Tensor], int]:
    """
    :return: Inputs and targets of 20,000 rows, batches of rows for each member, and their number
    """
    inputs, targets = th.randn(20_000, obs_dim + action_dim), th.randn(20_000, 1 + obs_dim)
    return inputs, targets, list(th.randint(20_000, (n_batches, n_members, BATCH_SIZE))), n_batches


def model_training(task: str, rounds: int) -> Iterator[Result]:
    """Milliseconds for a batch of 256 of each of seven networks."""
    env = make_env(task)
    assert env.observation_space.shape is not None and env.action_space.shape is not None
    obs_dim, action_dim, n_batches = env.observation_space.shape[0], env.action_space.shape[0], 20
    ensemble = Ensemble(obs_dim, action_dim, [200] * 4, 7, 5, 1e-3)
    arrays = random_batches(obs_dim, action_dim, 7, n_batches)
    try_step(ensemble, compiled(train_step, "cpu"))
    products = products_alone(lambda: try_step(ensemble, train_step), (7, BATCH_SIZE, 200))
    seconds = alternate(
        {
            "eager": lambda: train_on(ensemble, *arrays),
            "compiled": lambda: train_on(ensemble, *arrays, compiled(train_step, "cpu")),
            "its matrix products alone": repeated(products, n_batches),
        },
        rounds,
    )
    yield from milliseconds(f"model training, {task}", seconds, n_batches, "ms/batch", "eager")


def rollouts(task: str, rounds: int) -> Iterator[Result]:
    """Generated transitions per second: 100,000 rollouts, written into the model buffer."""
    agent = made_ready(task)
    assert agent.replay_buffer is not None
    start = th.as_tensor(agent.replay_buffer.observations[:5_000, 0], dtype=th.float32)[th.randint(5_000, (100_000,))]

    def generate(length: int) -> None:
        def never(obs: th.Tensor, actions: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
            return th.zeros(len(obs), dtype=th.bool)

        for some in start.split(ROLLOUTS_AT_ONCE):
            for step in rollout(agent.dynamics, agent.actor, some, length, never):
                agent.model_buffer.extend(step)

    for length in (1, 5):
        seconds = alternate({f"k = {length}": partial(generate, length)}, max(rounds // 3, 1))
        yield from rates(f"model rollouts, {task}", seconds, 100_000 * length, "transitions/s")


def double_horizon(task: str, rounds: int) -> Iterator[Result]:
    """DHMBPO's updates beside SAC's and their products alone, and what 1,000 steps cost beside MBPO's."""
    mbpo = MBPO("MlpPolicy", make_env(task), seed=0, compile=True, device="cpu")
    mbpo.learn(mbpo.learning_starts + 1)
    agent = DHMBPO("MlpPolicy", make_env(task), seed=0, gradient_steps=20, compile=True, device="cpu")
    agent.learn(agent.learning_starts)
    agent.gradient_steps = 1_000
    sac = SAC("MlpPolicy", make_env(task), seed=0, device="cpu", buffer_size=10_000)
    sac.replay_buffer = mbpo.replay_buffer
    for each in (mbpo, agent, sac):
        each.set_logger(configure(None, []))
    n = 20

    def updates_of(update: Callable[..., th.Tensor]) -> None:
        with th.no_grad():
            agent._some_updates(update, [], n, MINIBATCH)

    runs: dict[str, Callable[[], object]] = {"SB3 SAC": partial(sac.train, n, MINIBATCH)}
    for name, update in (("joint", joint_update), ("critics alone", critic_update)):
        runs[name] = partial(updates_of, compiled(update, "cpu"))

        def once(update: Callable[..., th.Tensor] = update) -> None:
            with th.no_grad():
                agent._some_updates(update, [], 1, MINIBATCH)

        runs[f"{name}, its matrix products alone"] = repeated(products_alone(once, (5, MINIBATCH, 256)), n)
    yield from rates(f"DHMBPO's updates, {task}", alternate(runs, rounds), n, "updates/s", "SB3 SAC")

    # In turns, as the machine may be slower at times
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(max(rounds // 5, 1)):
        for name, each, steps in (("MBPO", mbpo, 250), ("DHMBPO", agent, 1_000)):
            each.learn(steps, reset_num_timesteps=False)
            for part in ("model", "rollouts", "updates"):
                seconds.setdefault((name, part), []).append(each.seconds[part] * 1_000 / steps)
        start = time.perf_counter()
        sac.train(500, MINIBATCH)
        seconds.setdefault(("1,000 updates of SB3's SAC", ""), []).append(2 * (time.perf_counter() - start))
    for (name, part), values in seconds.items():
        yield Result(f"1,000 steps, {task}", f"{name} {part}".strip(), "s", values)
    totals = {
        name: np.sum([values for (of, _), values in seconds.items() if of == name], axis=0) for name in ("MBPO", "DHMBPO")
    }
    for name, total in totals.items():
        ratio = float(np.median(totals["MBPO"] / total))
        yield Result(f"1,000 steps, {task}", f"{name}, all", "s", total.tolist(), ratio, "MBPO, all")


def peak_gigabytes() -> float:
    """
    Most memory that this process has had in use; NaN where the system is not Linux. `getrusage` would count that of the
    process that began it.
    """
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return float("nan") if peak is None else int(peak[1]) * 1024 / 1e9


def whole_loop(task: str) -> list[Result]:
    """1,000 random steps, then 1,500 with 20 updates each and a model training every 250; rollouts of one step."""
    agent = MBPO("MlpPolicy", make_env(task), learning_starts=1_000, seed=0, compile=True, device="cpu")
    start = time.perf_counter()
    agent.learn(2_500)
    seconds = time.perf_counter() - start - agent.seconds["compile"]
    section = f"whole loop, {task}"
    return [
        Result(section, "2,500 steps, without compiling", "s", [seconds]),
        *(Result(section, f"of which {part}", "s", [value]) for part, value in agent.seconds.items() if part != "compile"),
        Result(section, "compiling", "s", [agent.seconds["compile"]]),
        Result(section, "learning", "environment steps/s", [1_500 / seconds]),
        Result(section, "updates", "updates/s", [agent._n_updates / agent.seconds["updates"]]),
        Result(section, "peak memory", "GB", [peak_gigabytes()]),
    ]


# Environment steps, observations, actions, rollout length at the end, epochs retained, model_train_freq
MEMORY_PLANS = {
    "Hopper, 125,000 steps": (125_000, 11, 3, 15, 1, 250),
    "HalfCheetah, 400,000 steps": (400_000, 17, 6, 1, 1, 250),
    "Ant (27-d), 300,000 steps": (300_000, 27, 8, 25, 1, 250),
    "Humanoid (45-d), 300,000 steps": (300_000, 45, 17, 25, 5, 1_000),
}


def memory(plan: str) -> list[Result]:
    """Peak memory with all buffers full, and after the growth of the model buffer for the last, longest rollouts."""
    steps, obs_dim, action_dim, length, retain, freq = MEMORY_PLANS[plan]
    observation_space, action_space = spaces.Box(-np.inf, np.inf, (obs_dim,)), spaces.Box(-1, 1, (action_dim,))
    base = peak_gigabytes()
    # Gymnasium's MuJoCo observations are float64
    real = ReplayBuffer(1_000_000, spaces.Box(-np.inf, np.inf, (obs_dim,), np.float64), action_space, "cpu")
    real.observations[:steps], real.next_observations[:steps], real.actions[:steps] = 1, 1, 1
    real.rewards[:steps], real.dones[:steps], real.timeouts[:steps] = 1, 0, 0
    real.pos = steps
    transitions = ResidentTransitions().update(real, steps)
    before, after = (model_buffer_size(retain, freq, 100_000, k) for k in (max(length - 1, 1), length))
    generated = ModelReplayBuffer(before, observation_space, action_space, "cpu", after)
    chunk = type(transitions)(*(column[:100_000] for column in transitions))
    for _ in range(before // 100_000):
        generated.extend(chunk)
    # Half a round more, so that the oldest transitions lie in the middle and must be moved
    for _ in range(before // 200_000):
        generated.extend(chunk)
    generated.resize(after)
    while not generated.full:
        generated.extend(chunk)
    # A training of the model takes its own
    ensemble = Ensemble(obs_dim, action_dim, [400] * 4 if plan.startswith("Humanoid") else [200] * 4, 7, 5, 1e-3)
    inputs = th.cat([transitions.obs, transitions.actions], dim=1)
    targets = th.cat([transitions.rewards[:, None], transitions.next_obs - transitions.obs], dim=1)
    fit(ensemble, inputs, targets, n_steps=100)
    section = "memory, all buffers full"
    return [
        Result(section, f"{plan}: model buffer", "GB", [generated.n_bytes / 1e9]),
        Result(section, f"{plan}: peak", "GB", [peak_gigabytes()]),
        Result(section, f"{plan}: peak, less what imports take", "GB", [peak_gigabytes() - base]),
    ]


def alone(function: Callable[[str], list[Result]], argument: str) -> list[Result]:
    """Run in a process of its own, whose peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (argument,))


class AnyEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    An environment of any size that costs nothing.

    :param obs_dim: Size of the observation
    """

    def __init__(self, obs_dim: int) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,))
        self.action_space = spaces.Box(-1, 1, (3,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(action[0]), False, False, {}


def growth(rounds: int) -> Iterator[Result]:
    """How the cost of an update and of a model batch grows with one size, the others being those of Hopper."""
    obs_dim, action_dim, n_batches = 11, 3, 10

    def update_cases(sizes: list[int], make: Callable[[int], tuple[MBPO, int]]) -> dict[str, Callable[[], object]]:
        cases: dict[str, Callable[[], object]] = {}
        for size in sizes:
            agent, batch_size = make(size)
            cases[f"{size:,}"] = partial(agent.train, GRADIENT_STEPS, batch_size)
        return cases

    def ready(obs_dim: int = obs_dim, real: int = 5_000, batch_size: int = MINIBATCH) -> tuple[MBPO, int]:
        agent = MBPO(
            "MlpPolicy",
            AnyEnv(obs_dim),
            learning_starts=real,
            buffer_size=real,
            batch_size=batch_size,
            gradient_steps=1,
            model_gradient_steps=0.01,
            rollout_batch_size=10_000,
            compile=True,
            device="cpu",
        )
        agent.learn(real + 1)
        agent.set_logger(configure(None, []))
        return agent, batch_size

    seconds = alternate(update_cases([64, 256, 1024], lambda size: ready(batch_size=size)), rounds)
    yield from milliseconds("update, by batch size", seconds, GRADIENT_STEPS, "ms/update", "256")
    seconds = alternate(update_cases([11, 45, 376], lambda size: ready(obs_dim=size)), rounds)
    yield from milliseconds("update, by observation size", seconds, GRADIENT_STEPS, "ms/update", "11")
    seconds = alternate(update_cases([5_000, 30_000, 300_000], lambda size: ready(real=size)), rounds)
    yield from milliseconds("update, by real transitions", seconds, GRADIENT_STEPS, "ms/update", "5,000")

    def model_cases(sizes: list[int], make: Callable[[int], Ensemble]) -> dict[str, Callable[[], object]]:
        cases: dict[str, Callable[[], object]] = {}
        for size in sizes:
            ensemble = make(size)
            n_in, n_out = ensemble.weights[0].shape[1], ensemble.weights[-1].shape[2] // 2
            arrays = random_batches(n_out - 1, n_in - n_out + 1, ensemble.n_members, n_batches)
            try_step(ensemble, compiled(train_step, "cpu"))
            cases[f"{size:,}"] = partial(train_on, ensemble, *arrays, compiled(train_step, "cpu"))
        return cases

    def sized(obs_dim: int = obs_dim, n_members: int = 7, hidden: int = 200) -> Ensemble:
        return Ensemble(obs_dim, action_dim, [hidden] * 4, n_members, 1, 1e-3)

    seconds = alternate(model_cases([1, 3, 7, 15], lambda size: sized(n_members=size)), rounds)
    yield from milliseconds("model training, by ensemble size", seconds, n_batches, "ms/batch", "7")
    seconds = alternate(model_cases([11, 45, 376], lambda size: sized(obs_dim=size)), rounds)
    yield from milliseconds("model training, by observation size", seconds, n_batches, "ms/batch", "11")
    seconds = alternate(model_cases([200, 400], lambda size: sized(hidden=size)), rounds)
    yield from milliseconds("model training, by hidden units", seconds, n_batches, "ms/batch", "200")


def report(results: list[Result], about: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=", ".join(f"{key} {value}" for key, value in about.items()))
    for column in ("", "case", "median", "quartiles", "unit", "ratio (faster > 1)"):
        table.add_column(column, justify="right" if column in ("median", "quartiles") else "left")
    section = None
    for result in results:
        if section not in (None, result.section):
            table.add_section()
        low, middle, high = np.percentile(result.values, [25, 50, 75])
        ratio = "" if result.ratio is None else f"{result.ratio:.2f} x {result.reference}"
        spread = "" if len(result.values) == 1 else f"{low:,.4g} to {high:,.4g}"
        table.add_row(
            result.section if result.section != section else "", result.case, f"{middle:,.4g}", spread, result.unit, ratio
        )
        section = result.section
    Console(width=150).print(table)


def main() -> None:
    """Command line."""
    sections = ("updates", "model", "rollouts", "dhmbpo", "loop", "memory", "growth")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections, help="Parts to run (default: all)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="Sizes to run (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="Rounds of each comparison (default: 15)")
    parser.add_argument("--threads", type=int, default=2, help="Cores to use (default: 2)")
    parser.add_argument("--json", type=Path, help="File for all values")
    args = parser.parse_args()
    # Holds for JAX too, which has no number of threads to set
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    th.set_num_threads(args.threads)
    packages = ("sb3-mbpo", "stable-baselines3", "torch", "sbx-rl", "jax", "mujoco")
    about = {"processor": processor(), "threads": args.threads, "python": platform.python_version()}
    about |= {package: installed(package) for package in packages}
    results: list[Result] = []

    def add(new: Iterator[Result] | list[Result]) -> None:
        for result in new:
            results.append(result)
            print(f"{result.section}: {result.case}: {np.median(result.values):,.4g} {result.unit}", flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps({"machine": about, "results": [each._asdict() for each in results]}, indent=1))

    for task in args.tasks:
        if "updates" in args.sections:
            add(updates(task, args.rounds))
        if "model" in args.sections:
            add(model_training(task, args.rounds))
        if "rollouts" in args.sections:
            add(rollouts(task, args.rounds))
        if "dhmbpo" in args.sections:
            add(double_horizon(task, args.rounds))
    if "loop" in args.sections:
        for task in args.tasks:
            add(alone(whole_loop, task))
    if "memory" in args.sections:
        for plan in MEMORY_PLANS:
            add(alone(memory, plan))
    if "growth" in args.sections:
        add(growth(args.rounds))
    report(results, about)


if __name__ == "__main__":
    main()
