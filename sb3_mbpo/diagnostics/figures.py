"""What the diagnostics measure, as figures of Matplotlib. They need no display."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_mbpo.diagnostics.exploitation import Returns
from sb3_mbpo.diagnostics.open_loop import Replay
from sb3_mbpo.diagnostics.policy_shift import PolicyShift
from sb3_mbpo.diagnostics.values import ValueCheck
from sb3_mbpo.dynamics.open_loop import OpenLoopError

# Readable by the colour-blind (Okabe and Ito)
REAL, MODEL, OTHER = "#000000", "#0072B2", "#D55E00"
# Inches: narrow, so that letters can be read on a phone
WIDTH = 4.2


def _axes(n: int, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """One below the other."""
    figure = Figure(figsize=(WIDTH, height * n), layout="constrained")
    axes = figure.subplots(n, squeeze=False).flatten().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def name_of(column: int) -> str:
    """
    :param column: Of what the model predicts: the reward, then the observation
    :return: What a figure calls it
    """
    return "reward" if column == 0 else f"obs[{column - 1}]"


def plot_error(error: OpenLoopError) -> Figure:
    """
    :param error: The model's error by step of a rollout
    :return: Error and predicted standard deviation; calibration
    """
    figure, (upper, lower) = _axes(2)
    steps = error.steps
    upper.plot(steps, error.relative().cpu(), color=REAL, label="error")
    upper.plot(steps, error.relative("std").cpu(), color=MODEL, linestyle="--", label="predicted std")
    upper.set(xlabel="step of the rollout", ylabel="in std of real observations", title="Model error", ylim=(0, None))
    upper.legend(frameon=False)
    varies = error.varies().cpu()
    for n_sigma, expected in ((1, 0.683), (2, 0.954)):
        inside = error.inside[n_sigma - 1, :, 1:].cpu()[:, varies].mean(dim=1)
        color = MODEL if n_sigma == 1 else OTHER
        lower.plot(steps, inside, color=color, label=f"within {n_sigma} std")
        lower.axhline(expected, color=color, linestyle=":", linewidth=1)
    lower.set(xlabel="step of the rollout", ylabel="share of true values", title="Calibration", ylim=(0, 1))
    lower.legend(frameon=False, loc="lower right")
    return figure


def plot_dimensions(error: OpenLoopError) -> Figure:
    """
    :param error: The model's error by step of a rollout
    :return: What the model explains of the variance of each dimension, at the first, a middle and the last step
    """
    rows = sorted({0, len(error.steps) // 2, len(error.steps) - 1})
    r2 = error.r2().cpu().numpy()
    figure, (ax,) = _axes(1)
    # What does not vary has none
    columns = np.flatnonzero(np.isfinite(r2[rows]).any(axis=0))
    x, width = np.arange(len(columns)), 0.8 / len(rows)
    for i, row in enumerate(rows):
        values = r2[row, columns].clip(-1, 1)
        ax.bar(
            x + (i - (len(rows) - 1) / 2) * width,
            values,
            width,
            color=(REAL, MODEL, OTHER)[i],
            label=f"step {error.steps[row]}",
        )
    ax.axhline(0, color="gray", linewidth=0.8)
    shown = slice(None, None, max(len(x) // 12, 1))
    ax.set_xticks(x[shown], ["r" if column == 0 else str(column - 1) for column in columns[shown]])
    ax.set(xlabel="reward (r) and dimensions of the observation", ylabel="R² (cut off at -1)", title="What the model explains")
    # Room for the legend above the bars
    ax.set_ylim(top=1.25)
    ax.legend(frameon=False, ncols=3, fontsize="small", loc="upper left")
    return figure


def plot_replay(replay: Replay, columns: Sequence[int]) -> Figure:
    """
    Figure 4 a and b of the paper.

    :param replay: A real action sequence under the model
    :param columns: Which: 0 is the reward, 1 the first dimension of the observation
    :return: The truth, the model's mean, and a band of one standard deviation
    """
    figure, axes = _axes(len(columns), height=1.6)
    steps = np.arange(1, len(replay.real) + 1)
    for ax, column in zip(axes, columns, strict=True):
        real, mean, std = (values[:, column].cpu().double().numpy() for values in replay)
        # A model that has blown up would flatten all else
        low, high = real.min(), real.max()
        margin = 1.5 * max(high - low, 1e-6)
        ax.plot(steps, mean, color=MODEL, label="model: mean, ±1 std")
        ax.fill_between(steps, mean - std, mean + std, color=MODEL, alpha=0.25, linewidth=0)
        ax.plot(steps, real, color=REAL, linewidth=1, label="environment")
        ax.set(ylabel=name_of(column), ylim=(low - margin, high + margin))
    axes[0].set_title("Same actions, real and under the model")
    axes[0].legend(frameon=False, ncols=2, fontsize="small")
    axes[-1].set_xlabel("step")
    return figure


def plot_returns(returns: Returns) -> Figure:
    """
    Figure 4 c of the paper, and returns from many states.

    :param returns: Of the policy under the model and in the environment
    :return: Returns so far from one state; returns from all starts, and their correlation
    """
    figure, (upper, lower) = _axes(2)
    steps = np.arange(1, len(returns.real_curve) + 1)
    upper.plot(steps, returns.model_curves.T, color=MODEL, alpha=0.25, linewidth=0.7)
    upper.plot(steps, returns.model_curves.mean(axis=0), color=MODEL, linewidth=2, label="model")
    upper.plot(steps, returns.real_curve, color=REAL, linewidth=2, label="environment")
    upper.set(xlabel="step", ylabel="return so far", title="From one state")
    upper.legend(frameon=False)
    lower.errorbar(
        returns.real,
        returns.model,
        returns.model_std,
        fmt="o",
        markersize=3,
        color=MODEL,
        ecolor=MODEL,
        elinewidth=0.5,
        alpha=0.6,
    )
    both = [min(returns.real.min(), returns.model.min()), max(returns.real.max(), returns.model.max())]
    lower.plot(both, both, color="gray", linestyle=":", linewidth=1)
    correlation = returns.correlation()
    title = f"From {len(returns.real)} states" + ("" if np.isnan(correlation) else f": correlation {correlation:.2f}")
    lower.set(xlabel="return in the environment", ylabel="return in the model")
    lower.set_title(title, fontsize="medium")
    return figure


def plot_policy_shift(shift: PolicyShift) -> Figure:
    """
    Figure 1 of the paper.

    :param shift: Errors of models under other policies than the one that collected their data
    :return: Error beside divergence for each amount of data; the slopes
    """
    figure, (upper, lower) = _axes(2)
    order = np.argsort(shift.kl)
    shades = np.linspace(0.35, 1, len(shift.data_sizes))
    for size, errors, shade in zip(shift.data_sizes, shift.error, shades, strict=True):
        upper.plot(shift.kl[order], errors[order], "o-", markersize=3, color=MODEL, alpha=shade, label=f"{size:,}")
    upper.set(
        xlabel="KL divergence of the policy (nats)", ylabel="error in std of changes", title="Model error", ylim=(0, None)
    )
    upper.legend(frameon=False, title="transitions", fontsize="small")
    lower.plot(shift.data_sizes, shift.slopes(), "o-", color=OTHER)
    lower.axhline(0, color="gray", linewidth=0.8)
    lower.set(xlabel="transitions", ylabel="d error / d policy shift", title="Slope", xscale="log")
    lower.set_xticks(shift.data_sizes, [f"{size:,}" for size in shift.data_sizes], minor=False)
    lower.minorticks_off()
    return figure


def plot_values(check: ValueCheck) -> Figure:
    """
    :param check: Q-values and returns
    :return: Q-values beside returns; their distributions on real and generated data
    """
    figure, (upper, lower) = _axes(2)
    upper.plot(check.returns, check.q_real, "o", markersize=2, color=MODEL, alpha=0.4)
    both = [min(check.returns.min(), check.q_real.min()), max(check.returns.max(), check.q_real.max())]
    upper.plot(both, both, color="gray", linestyle=":", linewidth=1)
    upper.set(xlabel="soft return that came", ylabel="Q-value", title=f"Bias {check.bias():+.3g}")
    shown = [(check.returns, REAL, "returns"), (check.q_real, MODEL, "Q, real data"), (check.q_model, OTHER, "Q, model data")]
    for values, color, label in shown:
        if len(values) > 0:
            lower.hist(values, bins=30, density=True, histtype="step", color=color, label=label)
    lower.set(xlabel="value", ylabel="density", title="Distributions")
    lower.legend(frameon=False, fontsize="small")
    return figure
