"""Learning curves and tables of the evaluations: what ``python -m benchmarks report`` writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rliable import library  # type: ignore[import-untyped]

# Evaluations of one episode are noisy: values in tables are means of so many
WINDOW = 5
BOOTSTRAPS = 2_000
# Of the way from the first evaluation to the best, at which sample efficiency is compared
SHARE = 0.9
# Environment steps of the columns
MARKS = (5_000, 10_000, 20_000, 30_000, 40_000, 50_000, 75_000, 100_000)
# The paper's means at these: its Figure 2, read from the authors' data
PAPER_MARKS = (10_000, 20_000, 50_000, 75_000, 100_000)
PAPER = {
    "Hopper-v5": (329, 530, 1702, 3034, 3315),
    "Walker2d-v5": (214, 418, 836, 1953, 3476),
    "HalfCheetah-v5": (1720, 4236, 7963, 9184, 9553),
    "Ant-v5": (339, 683, 782, 1140, 1453),
    "Humanoid-v5": (253, 324, 398, 470, 579),
}
# Readable by the colour-blind (Okabe and Ito)
COLORS = {
    "dhmbpo": "#CC79A7",
    "mbpo": "#0072B2",
    "sac": "#D55E00",
    "sac-g20": "#E69F00",
    "ppo": "#009E73",
    "mbpo-auto": "#56B4E9",
}
# Of algorithms with changed hyperparameters
OTHER_COLORS = ["#999999", "#661100", "#332288", "#117733"]
SPLIT = ("env", "model", "rollouts", "updates", "compile", "eval")


class Curve(NamedTuple):
    """
    Interquartile mean over seeds, with a 95 % bootstrap interval, at the steps where there are evaluations.

    :param steps: Environment steps, ``(n,)``
    :param iqm: Return, ``(n,)``
    :param low: Lower end of the interval, ``(n,)``; that of one seed has no width
    :param high: Upper end, ``(n,)``
    :param n_seeds: Seeds that were trained so far, ``(n,)``
    """

    steps: np.ndarray
    iqm: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n_seeds: np.ndarray

    def at(self, step: int) -> int | None:
        """
        :param step: Environment steps
        :return: Index of the nearest evaluation, None if it is further than 3 % away
        """
        if not len(self.steps):
            return None
        nearest = int(np.abs(self.steps - step).argmin())
        return nearest if abs(self.steps[nearest] - step) <= 0.03 * step else None


def iqm_over_seeds(scores: np.ndarray) -> np.ndarray:
    """
    :param scores: ``(n_seeds, 1, n)``, as rliable wants them
    :return: ``(n,)``
    """
    # What rliable's aggregate_iqm is, of all steps in one call; scipy's trim_mean takes most of its time for its arguments
    n_cut = len(scores) // 4
    means: np.ndarray = np.sort(scores[:, 0], axis=0)[n_cut : len(scores) - n_cut].mean(axis=0)
    return means


def returns(table: pd.DataFrame, env: str, algo: str) -> pd.DataFrame:
    """
    :param table: Of evaluations
    :param env: Task
    :param algo: Algorithm
    :return: Returns by step (index) and seed (column), NaN where a seed was not evaluated
    """
    rows = table[(table["env"] == env) & (table["algo"] == algo)]
    return rows.pivot(index="step", columns="seed", values="return").sort_index()


def smoothed(values: pd.DataFrame) -> pd.DataFrame:
    """
    :param values: Of :func:`returns`
    :return: Means of ``WINDOW`` evaluations of each seed, in the midst of them, where there are so many
    """
    return values.rolling(WINDOW, center=True).mean().dropna(how="all")


def last_means(values: pd.DataFrame) -> pd.DataFrame:
    """
    :param values: Of :func:`returns`
    :return: Means of the last ``WINDOW`` evaluations of each seed up to a step; of fewer at the beginning
    """
    return values.rolling(WINDOW, min_periods=1).mean().where(values.notna())


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """NumPy's global generator, the one that rliable's bootstrap draws from whatever ``random_state`` it is given."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def curve(values: pd.DataFrame) -> Curve:
    """
    :param values: By step and seed; seeds may have been trained for different times
    :return: The curve, each step over the seeds that got there; empty if there is no step
    """
    if values.empty:
        return Curve(*[np.empty(0)] * 5)
    # Steps with the same seeds at once
    group = (values.notna() != values.notna().shift()).any(axis=1).cumsum()
    pieces = []
    for _, piece in values.groupby(group):
        scores = piece.dropna(axis=1).to_numpy().T[:, None, :]
        with same_random_numbers():
            point, interval = library.get_interval_estimates({"": scores}, iqm_over_seeds, reps=BOOTSTRAPS)
        n_seeds = np.full(len(piece), len(scores))
        pieces.append((piece.index.to_numpy(), point[""], interval[""][0], interval[""][1], n_seeds))
    return Curve(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def all_curves(table: pd.DataFrame) -> dict[str, dict[str, pd.DataFrame]]:
    """
    :param table: Of evaluations
    :return: For each task and algorithm in it the returns by step and seed; tasks by name, algorithms as in ``COLORS``
    """
    order = {algo: i for i, algo in enumerate(COLORS)}
    return {
        env: {
            algo: returns(table, env, algo)
            for algo in sorted(table.loc[table["env"] == env, "algo"].unique(), key=lambda algo: (order.get(algo, 99), algo))
        }
        for env in sorted(table["env"].unique())
    }


def draw(ax: Axes, env: str, algos: dict[str, pd.DataFrame], colors: dict[str, str], reference: Path | None) -> None:
    """
    :param ax: Where
    :param env: Task
    :param algos: Returns of each algorithm
    :param colors: Of each algorithm
    :param reference: Folder with published curves, ``mbpo_paper_<task>.csv`` with env_step, mean, half_width
    """
    for algo, values in algos.items():
        drawn = curve(values)
        color = colors[algo]
        least, most = drawn.n_seeds.min(), drawn.n_seeds.max()
        n_seeds = f"{most}" if least == most else f"{least} to {most}"
        ax.plot(drawn.steps, drawn.iqm, color=color, label=f"{algo}, {n_seeds} seed{'s' if most > 1 else ''}")
        ax.fill_between(drawn.steps, drawn.low, drawn.high, color=color, alpha=0.2, linewidth=0)
    last = max(values.index.max() for values in algos.values())
    file = None if reference is None else reference / f"mbpo_paper_{env.split('-')[0]}.csv"
    if file is not None and file.exists():
        published = pd.read_csv(file)
        published = published[published["env_step"] <= last]
        mean, width = published["mean"], published["half_width"]
        ax.plot(published["env_step"], mean, color="black", linestyle="--", label="paper, 5 seeds (mean)")
        ax.fill_between(published["env_step"], mean - width, mean + width, color="black", alpha=0.1, linewidth=0)
    elif env in PAPER:
        marks = [(step, value) for step, value in zip(PAPER_MARKS, PAPER[env], strict=True) if step <= last]
        ax.plot([step for step, _ in marks], [value for _, value in marks], "kD", markersize=5, label="paper's mean")
    ax.set(title=env, xlabel="environment steps", ylabel="return")
    ax.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3)
    # Below the axes: inside there is a curve or a published mean in every corner
    ax.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def figure(curves: dict[str, dict[str, pd.DataFrame]], reference: Path | None = None) -> Figure:
    """
    :param curves: Of :func:`all_curves`
    :param reference: See :func:`draw`
    :return: A learning curve for each task
    """
    n_columns = min(len(curves), 2)
    n_rows = -(-len(curves) // n_columns)
    result = Figure(figsize=(4.8 * n_columns, 3.8 * n_rows), layout="constrained")
    axes = result.subplots(n_rows, n_columns, squeeze=False).flatten().tolist()
    others = sorted({algo for algos in curves.values() for algo in algos} - set(COLORS))
    colors = COLORS | dict(zip(others, cycle(OTHER_COLORS), strict=False))
    for ax, (env, algos) in zip(axes, curves.items(), strict=False):
        draw(ax, env, algos, colors, reference)
    for ax in axes[len(curves) :]:
        ax.set_visible(False)
    return result


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """
    :param header: Names of the columns
    :param rows: Cells
    :return: A table
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def in_thousands(step: int) -> str:
    """
    :param step: Environment steps
    :return: Short
    """
    return f"{step / 1000:g}k"


def cell(drawn: Curve, step: int, n_seeds: int) -> str:
    """
    :param drawn: Of an algorithm
    :param step: Environment steps
    :param n_seeds: Of the algorithm
    :return: Interquartile mean there, with its interval and how many seeds got there; empty if none did
    """
    i = drawn.at(step)
    if i is None:
        return ""
    interval = f" [{drawn.low[i]:,.0f}, {drawn.high[i]:,.0f}]" if drawn.n_seeds[i] > 1 else ""
    return f"{drawn.iqm[i]:,.0f}{interval}" + (f" ({drawn.n_seeds[i]} of {n_seeds})" if drawn.n_seeds[i] < n_seeds else "")


def marks_table(curves: dict[str, dict[str, pd.DataFrame]]) -> str:
    """
    :param curves: Of :func:`all_curves`
    :return: Returns at the paper's marks and at the end of each run, beside the paper's
    """
    rows = []
    for env, algos in curves.items():
        for algo, values in algos.items():
            last, n_seeds = int(values.index[-1]), values.shape[1]
            around, end = curve(smoothed(values)), curve(last_means(values).loc[[last]])
            cells = [cell(around, mark, n_seeds) for mark in MARKS]
            rows.append([env, algo, str(n_seeds), *cells, f"{cell(end, last, n_seeds)} at {in_thousands(last)}"])
        if env in PAPER:
            paper = dict(zip(PAPER_MARKS, PAPER[env], strict=True))
            rows.append([env, "*paper's mean*", "5", *(f"*{paper[mark]:,}*" if mark in paper else "" for mark in MARKS), ""])
    return markdown(["task", "algorithm", "seeds", *(in_thousands(mark) for mark in MARKS), "end"], rows)


def mean_curve(values: pd.DataFrame) -> "pd.Series[float]":
    """
    :param values: Returns by step and seed
    :return: Mean over all seeds of the last ``WINDOW`` evaluations (fewer at the beginning), so that what comes later lifts no
        step before it, and up to where the shortest run is, so that a seed that ends lifts no mean
    """
    return last_means(values.dropna()).mean(axis=1)


def efficiency_rows(curves: dict[str, dict[str, pd.DataFrame]]) -> Iterator[list[str]]:
    """
    :param curves: Of :func:`all_curves`
    :return: For each algorithm beside SAC a level that both got to, and their steps to it
    """
    for env, algos in curves.items():
        if "sac" not in algos:
            continue
        for algo, values in algos.items():
            if algo == "sac":
                continue
            means = [mean_curve(each) for each in (values, algos["sac"])]
            start, best = min(mean.iloc[0] for mean in means), min(mean.max() for mean in means)
            # Not the very best, which is luck
            level = start + SHARE * (best - start)
            steps = [int(mean.index[mean >= level][0]) for mean in means]
            # How much earlier than its first evaluation one was there, nobody knows
            at_once = [step == mean.index[0] for step, mean in zip(steps, means, strict=True)]
            bound = "at least " if at_once[0] else "at most " if at_once[1] else ""
            ratio = "unknown" if all(at_once) else f"{bound}{steps[1] / steps[0]:.1f}"
            cells = [("at most " if first else "") + f"{step:,}" for step, first in zip(steps, at_once, strict=True)]
            yield [env, algo, f"{level:,.0f}", *cells, ratio]


def seconds_table(table: pd.DataFrame) -> str:
    """
    :param table: Of evaluations
    :return: Hours of the runs, and where they went
    """
    rows = []
    last = table.sort_values("step").groupby(["env", "algo", "seed"]).tail(1)
    for (env, algo), runs in last.groupby(["env", "algo"]):
        wall = runs["wall_seconds"].sum()
        shares = [runs[f"{what}_seconds"].sum(min_count=1) / wall for what in SPLIT]
        per_step = wall / runs["step"].sum()
        rows.append(
            [
                *(str(env), str(algo), f"{len(runs)}", f"{runs['step'].mean():,.0f}", f"{wall / len(runs) / 3600:.2f}"),
                f"{per_step * 1000:,.0f}",
                *("" if np.isnan(share) else f"{share:.0%}" for share in shares),
                ", ".join(sorted({f"{n}" for n in runs["threads"]})),
            ]
        )
    header = ["task", "algorithm", "runs", "steps", "hours per run", "s per 1,000 steps", *SPLIT, "threads"]
    return markdown(header, rows)


def runs_table(table: pd.DataFrame) -> str:
    """
    :param table: Of evaluations
    :return: Where each run ended, and the best that it had been
    """
    rows = []
    for (env, algo, seed), run in table.sort_values("step").groupby(["env", "algo", "seed"]):
        level = run["return"].rolling(WINDOW, min_periods=1).mean()
        last = run.iloc[-1]
        end = f"{last['return']:,.0f}" + (f" ± {last['return_std']:,.0f}" if last["episodes"] > 1 else "")
        # The first of the best, if there are more
        best = f"{level.max():,.0f} at {in_thousands(run['step'].iloc[int(level.to_numpy().argmax())])}"
        cells = (in_thousands(last["step"]), f"{level.iloc[-1]:,.0f}", best, end, f"{last['episodes']:.0f}")
        rows.append([str(env), str(algo), str(seed), *cells])
    header = ["task", "algorithm", "seed", "steps", f"last {WINDOW}", f"best {WINDOW}", "at the end", "episodes"]
    return markdown(header, rows)


def versions_table(table: pd.DataFrame) -> str:
    """
    :param table: Of evaluations
    :return: What the runs were made with
    """
    columns = ["commit", "python", "sb3_mbpo", "stable_baselines3", "rl_zoo3", "torch", "gymnasium", "mujoco", "machine"]
    seen = table.fillna("").groupby(columns).size().reset_index(name="evaluations")
    return markdown([*columns, "evaluations"], [[str(cell) for cell in row] for row in seen.to_numpy()])


def tables(table: pd.DataFrame) -> str:
    """
    :param table: Of evaluations
    :return: All tables, Markdown
    """
    curves = all_curves(table)
    return "\n".join(
        [
            "## Return",
            "",
            f"Interquartile mean over seeds of the mean of {WINDOW} evaluations: those around the step, and the last at the "
            "end. With 95 % bootstrap intervals; of two or three seeds it is the mean, and the interval goes from the lowest "
            "to the highest.",
            "",
            marks_table(curves),
            "## Each run",
            "",
            f"Means of the last {WINDOW} evaluations and of the best {WINDOW} in a row (fewer at the beginning), so that one "
            "sees whether a policy was lost again; and the last evaluation, with the standard deviation of its episodes.",
            "",
            runs_table(table),
            "## Sample efficiency",
            "",
            f"Environment steps until the mean over seeds of the last {WINDOW} evaluations (fewer at the beginning) has come "
            f"{SHARE:.0%} of the way from the lower of both first evaluations to the highest level that both algorithms got "
            "to. As far as all seeds were trained. Where SAC has learned little, the level is low, and the ratio says little.",
            "",
            markdown(["task", "algorithm", "return", "its steps", "SAC's steps", "ratio"], list(efficiency_rows(curves))),
            "## Wall-clock",
            "",
            "Shares of the training time, but for `eval` (evaluations and checkpoints), which is not in it.",
            "",
            seconds_table(table),
            "## Versions",
            "",
            versions_table(table),
        ]
    )


def write(table: pd.DataFrame, out: Path, reference: Path | None = None) -> list[Path]:
    """
    :param table: Of evaluations
    :param out: Folder
    :param reference: See :func:`draw`
    :return: The files written
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn = figure(all_curves(table), reference)
    files = [out / "curves.png", out / "curves.svg", out / "tables.md"]
    drawn.savefig(files[0], dpi=120)
    # Without what differs in every file
    with matplotlib.rc_context({"svg.hashsalt": "benchmarks"}):
        drawn.savefig(files[1], metadata={"Date": None})
    files[2].write_text(tables(table))
    return files
