"""What the report says of numbers, and what its figures show, number by number."""

import numpy as np
import pytest
import torch as th

from sb3_mbpo.diagnostics import figures, report
from sb3_mbpo.diagnostics.exploitation import Returns
from sb3_mbpo.diagnostics.open_loop import Replay
from sb3_mbpo.diagnostics.policy_shift import PolicyShift
from sb3_mbpo.diagnostics.terminations import Terminations
from sb3_mbpo.diagnostics.values import ValueCheck
from sb3_mbpo.dynamics.open_loop import OpenLoopError
from tests.agents import make_agent


def make_error(rmse, std=0.0, changes=1.0, inside=(0.68, 0.95)):
    """The same error in the reward and in two dimensions, whose standard deviation is 1, at each step."""
    rmse = th.as_tensor(rmse, dtype=th.float32)[:, None].repeat(1, 3)
    shares = th.stack([th.full_like(rmse, share) for share in inside])
    n = th.full((len(rmse),), 7)
    return OpenLoopError(
        list(range(1, len(rmse) + 1)), n, rmse, th.full_like(rmse, std), th.full_like(rmse, changes), shares, th.ones(3)
    )


def verdicts(rollout_schedule=(0, 0, 1, 1), **kwargs):
    agent = make_agent(rollout_schedule=rollout_schedule)
    found, section = report.of_error(agent, make_error(**kwargs))
    return {finding.question: f"{finding.measured}: {finding.verdict}" for finding in found}, section


@pytest.mark.parametrize(
    "rmse, k, expected",
    [
        ([0.05, 0.09, 0.2], 1, "2: Rollouts, k = 1, stay within that"),
        ([0.05, 0.09, 0.2], 2, "2: Rollouts, k = 2, stay within that"),
        ([0.05, 0.09, 0.2], 3, "2: Rollouts, k = 3, go further than the model is right for: shorten"),
        ([0.11, 0.05], 1, "0: Even one step is off by more than 0.1 standard deviations; rollouts have k = 1"),
        ([0.01] * 40, 40, "40 or more: Rollouts, k = 40, stay within that"),
        ([0.01] * 25, 30, "25 or more: Rollouts, k = 30, are longer than what was measured, 25 steps"),
        ([np.inf, np.inf], 1, "0: Even one step"),
    ],
)
def test_how_far_the_model_is_right(rmse, k, expected):
    found, section = verdicts([0, 0, k, k], rmse=rmse)
    assert found["For how many steps is it right?"].startswith(expected)
    assert f"After one step the model is off by {rmse[0]:.3f} standard deviations" in section.paragraphs[0]


def test_a_single_trajectory_counts():
    """Mean and deviation are each within 0.1, but not together."""
    found, _ = verdicts([0, 0, 1, 1], rmse=[0.06, 0.08], std=0.07)
    assert found["For how many steps is it right?"].startswith("1:")
    agent = make_agent(rollout_schedule="auto")
    agent.auto_rollout_length = 4
    (*_, length, _), _ = report.of_error(agent, make_error([0.06, 0.08], std=0.07))
    assert "k = 4, go further than the model is right for: they will be shorter" in length.verdict


@pytest.mark.parametrize(
    "rmse, expected",
    [
        (1.1, "median R² -0.21: Worse than a constant"),
        (0.8, "median R² 0.36: The model explains less than half"),
        (0.5, "median R² 0.75: The model is usable"),
        (0.1, "median R² 0.99: One step of the model is nearly right"),
    ],
)
def test_what_is_explained(rmse, expected):
    found, _ = verdicts(rmse=[rmse])
    assert found["Does the model know what happens next?"].startswith(expected)
    assert found["Does it know the reward?"].startswith(f"R² {1 - rmse**2:.2f}")


@pytest.mark.parametrize(
    "inside, expected",
    [((0.54, 0.8), "Overconfident"), ((0.56, 0.8), "The model knows"), ((0.84, 0.99), "knows"), ((0.86, 0.99), "wider")],
)
def test_calibration(inside, expected):
    found, _ = verdicts(rmse=[0.1], inside=inside)
    assert found["Are its error bars right?"].startswith(f"{inside[0]:.0%} / {inside[1]:.0%}:")
    assert expected in found["Are its error bars right?"]


def make_returns(real, model):
    real, model = np.asarray(real, dtype=float), np.asarray(model, dtype=float)
    return Returns(real, model, np.full(len(real), 0.5), np.arange(4.0), np.arange(8.0).reshape(2, 4))


@pytest.mark.parametrize(
    "real, model, measured, expected",
    [
        ([10, 20], [13, 24], "+23%", "promises more"),
        ([10, 20], [11, 20], "+3%", "about what"),
        ([10, 20], [6, 16], "-27%", "promises less"),
        ([-10, -20], [-5, -15], "+33%", "promises more"),
    ],
)
def test_exploitation(real, model, measured, expected):
    (finding,), section = report.of_returns(make_returns(real, model), 50)
    assert finding.measured == measured and expected in finding.verdict
    assert f"From 2 states, 50 steps: {np.mean(real):.4g}" in section.paragraphs[0]


@pytest.mark.parametrize(
    "q, returns, measured, expected",
    [
        ([16, 16], [10, 10], "+60%", "may collapse"),
        ([13, 13], [10, 10], "+30%", "overestimate somewhat"),
        ([11, 11], [10, 10], "+10%", "about right"),
        ([7, 7], [10, 10], "-30%", "underestimate"),
        ([-7, -7], [-10, -10], "+30%", "overestimate somewhat"),
    ],
)
def test_values(q, returns, measured, expected):
    check = ValueCheck(np.array(q, dtype=float), np.array(returns, dtype=float), np.array([3.0, 5.0]))
    assert check.relative_bias() == pytest.approx((np.mean(q) - np.mean(returns)) / 10)
    (finding,), section = report.of_values(check)
    assert finding.measured == f"{measured} of the returns" and expected in finding.verdict
    assert "Q-values of generated transitions are 4 on average" in section.paragraphs[0]


@pytest.mark.parametrize(
    "share, expected", [(0.004, "0%"), (-0.004, "0%"), (0.006, "+1%"), (-0.5, "-50%"), (2, "+200%"), (np.nan, "+nan%")]
)
def test_percent(share, expected):
    assert report.percent(share) == expected


@pytest.mark.parametrize(
    "real, model, measured, expected",
    [
        ([1, 1, 0, 0], [1, 0.7, 0.1, 0], "85% of 2", "ends episodes where they end"),
        ([1, 1, 0, 0], [0.8, 0.7, 0, 0], "75% of 2", "goes on where episodes end"),
        ([1, 1, 0, 0], [1, 1, 0.6, 0.5], "100% of 2", "ends episodes that go on"),
        ([0, 0, 0, 0], [0.1, 0, 0, 0.2], "none ended", "ends hardly any"),
        ([0, 0, 0, 0], [1, 0.5, 0, 0], "none ended", "ends episodes that go on"),
    ],
)
def test_ends_of_episodes(real, model, measured, expected):
    (finding,), section = report.of_terminations(Terminations(np.array(real, dtype=bool), np.array(model)))
    assert finding.measured == measured and expected in finding.verdict
    assert f"Of 4 transitions {sum(real)} were terminal" in section.paragraphs[0] and "nan" not in section.paragraphs[0]


def make_shift(model_error, shift=0.4, sizes=(100, 50)):
    """The model of more transitions is the first."""
    both = np.array([[0.0, model_error], [0.0, 0.9]])
    return PolicyShift(list(sizes), np.array([0.0, 2 * shift**2]), np.array([0.0, shift]), both * 2, both)


@pytest.mark.parametrize(
    "model_error, measured, expected",
    [(0.2, "k* = 7", "allows rollouts"), (0.4, "k* = 0", "allows no rollout"), (0.1, "k* = 10", "allows rollouts")],
)
def test_bound(model_error, measured, expected):
    """0.4 * 0.9^k = 0.2 for k = 6.6, and 0.1 for k = 13.2, but beyond the effective horizon, ten steps, nothing changes."""
    (finding,), section = report.of_shift(make_shift(model_error), 0.9)
    assert finding.measured == measured and expected in finding.verdict
    assert f"knows 100 transitions of the present policy, under the last of the later policies: error {model_error:.2f}" in (
        finding.verdict
    )
    assert f"{model_error / 0.4 * 2:.2f} (100), 4.50 (50)" in section.paragraphs[1]
    assert report.of_shift(make_shift(model_error), 1.0)[0][0].measured == "gamma is 1"


def test_a_band_that_holds_everything_says_nothing():
    """Of eight truths in two dimensions six have a narrow band, in which are three; the model explodes at the end."""
    real = th.tensor([[0.0, 0.0], [2.0, 4.0], [0.0, 0.0], [2.0, 4.0]])
    off = th.tensor([[0.5, 0.5], [0.5, 0.05], [0.05, 0.05], [9.0, 9.0]])
    std = th.tensor([[0.1, 0.1], [0.1, 0.1], [0.1, 0.1], [1e9, np.inf]])
    section = report.of_replay(Replay(real, real + off, std), [0])
    assert (
        "narrower than the truth's own for 75% of the 4 steps, over all dimensions. 50% of the truth" in section.paragraphs[0]
    )
    nothing = report.of_replay(Replay(real, real + off, th.full((4, 2), np.inf)), [0])
    assert "for 0% of the 4 steps, over all dimensions. None of the truth" in nothing.paragraphs[0]


# --- Figures ---------------------------------------------------------------------------------------------------------


def lines(ax):
    return [(line.get_xdata(), line.get_ydata(), line.get_label()) for line in ax.get_lines()]


def test_figure_of_errors():
    error = make_error([0.1, 0.3], std=0.2, inside=(0.5, 0.75))
    upper, lower = figures.plot_error(error).axes
    (steps, values, label), (_, stds, std_label) = lines(upper)
    assert label == "error" and std_label == "predicted std"
    np.testing.assert_allclose([steps, values, stds], [[1, 2], [0.1, 0.3], [0.2, 0.2]], rtol=1e-6)
    shares = {label: values for _, values, label in lines(lower) if label.startswith("within")}
    np.testing.assert_allclose(shares["within 1 std"], 0.5)
    np.testing.assert_allclose(shares["within 2 std"], 0.75)
    (ax,) = figures.plot_dimensions(error).axes
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [0.99] * 3 + [0.91] * 3, rtol=1e-5)


def test_figure_of_a_replay():
    """Figure 4: a band of one standard deviation on each side of the mean."""
    real = th.tensor([[1.0, 5.0], [2.0, 6.0]])
    (ax,) = figures.plot_replay(Replay(real, real + 1, th.full((2, 2), 0.25)), [1]).axes
    (_, mean, mean_label), (_, truth, truth_label) = lines(ax)
    assert (mean.tolist(), truth.tolist()) == ([6, 7], [5, 6])
    assert mean_label.startswith("model") and truth_label == "environment" and ax.get_ylabel() == "obs[0]"
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    assert {tuple(corner) for corner in corners.tolist()} == {(1, 5.75), (1, 6.25), (2, 6.75), (2, 7.25)}


def test_figure_of_returns():
    found = make_returns([10, 20, 40], [12, 18, 50])
    upper, lower = figures.plot_returns(found).axes
    by_label = {label: values for _, values, label in lines(upper)}
    assert by_label["environment"].tolist() == [0, 1, 2, 3] and by_label["model"].tolist() == [2, 3, 4, 5]
    ((x, y, _), _) = lines(lower)
    assert x.tolist() == [10, 20, 40] and y.tolist() == [12, 18, 50]
    assert (lower.get_xlabel(), lower.get_ylabel()) == ("return in the environment", "return in the model")
    assert f"{np.corrcoef([10, 20, 40], [12, 18, 50])[0, 1]:.2f}" in lower.get_title()


def test_figure_of_policy_shift():
    upper, lower = figures.plot_policy_shift(make_shift(0.1)).axes
    (kl, error, label), (_, other, _) = lines(upper)
    assert label == "100" and kl.tolist() == [0, pytest.approx(0.32)]
    assert error.tolist() == [0, 0.2] and other.tolist() == [0, 1.8]
    (sizes, slopes, _), _ = lines(lower)
    np.testing.assert_allclose([sizes, slopes], [[100, 50], [0.5, 4.5]])


def test_figure_of_values():
    check = ValueCheck(np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.zeros(0))
    upper, lower = figures.plot_values(check).axes
    x, y, _ = lines(upper)[0]
    assert x.tolist() == [2, 2] and y.tolist() == [1, 3] and "Bias +0" in upper.get_title()
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["returns", "Q, real data"]
