"""What the benchmark makes of evaluations: curves, tables, and those that are committed."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rliable import metrics
from scipy.stats import trim_mean

from benchmarks import report, suites
from benchmarks.__main__ import RESULTS
from benchmarks.results import COLUMNS, read_all

REPOSITORY = Path(__file__).parents[1]


def table(returns, env="Hopper-v5", algo="mbpo", steps=None, **columns):
    """Rows of runs, whose returns are the rows of an array."""
    rows = []
    for seed, values in enumerate(returns):
        for i, value in enumerate(values):
            if not np.isnan(value):
                step = (i + 1) * 1_000 if steps is None else steps[i]
                rows.append({**dict.fromkeys(COLUMNS, np.nan), "env": env, "algo": algo, "seed": seed, "step": step})
                rows[-1] |= {"return": value, "wall_seconds": 2.0 * step / 1_000, "threads": 1, "commit": "a", **columns}
    return pd.DataFrame(rows)


def test_curve_is_the_interquartile_mean():
    returns = np.random.default_rng(0).normal(size=(8, 5)).cumsum(axis=1)
    curve = report.curve(report.returns(table(returns), "Hopper-v5", "mbpo"))
    np.testing.assert_allclose(curve.iqm, [metrics.aggregate_iqm(values) for values in returns.T])
    assert curve.steps.tolist() == [1_000, 2_000, 3_000, 4_000, 5_000] and (curve.n_seeds == 8).all()
    assert (curve.low < curve.iqm).all() and (curve.iqm < curve.high).all()
    # Percentiles of means of resampled seeds, by another way
    rng = np.random.default_rng(1)
    resampled = [trim_mean(rng.choice(returns[:, -1], 8), 0.25) for _ in range(20_000)]
    np.testing.assert_allclose([curve.low[-1], curve.high[-1]], np.percentile(resampled, [2.5, 97.5]), atol=0.2)


def test_curve_of_seeds_that_were_trained_for_different_times():
    returns = np.array([[1.0, 2, 3, 4], [3.0, 4, np.nan, np.nan]])
    curve = report.curve(report.returns(table(returns), "Hopper-v5", "mbpo"))
    assert curve.iqm.tolist() == [2, 3, 3, 4] and curve.n_seeds.tolist() == [2, 2, 1, 1]
    assert curve.low[2:].tolist() == curve.high[2:].tolist() == [3, 4]
    assert curve.at(2_000) == 1 and curve.at(2_010) == 1 and curve.at(2_500) is None


def test_tables():
    """MBPO rises by 100 every 1,000 steps, SAC by 25."""
    mbpo, sac = 100 * np.arange(1, 21.0), 25 * np.arange(1, 61.0)
    both = pd.concat([table([mbpo, mbpo + 10]), table([sac], algo="sac", env_seconds=1.0, eval_seconds=3.0)])
    curves = report.all_curves(both)
    assert list(curves["Hopper-v5"]) == ["mbpo", "sac"]
    text = report.tables(both)
    # The mean of 800 ... 1,200 and 10 more in another seed; at the end that of the last five
    assert (
        "| Hopper-v5 | mbpo | 2 | 505 [500, 510] | 1,005 [1,000, 1,010] |  |  |  |  |  |  | 1,805 [1,800, 1,810] at 20k |"
        in text
    )
    assert "| Hopper-v5 | sac | 1 | 125 | 250 | 500 | 750 | 1,000 | 1,250 |  |  | 1,450 at 60k |" in text
    assert "| Hopper-v5 | *paper's mean* | 5 |  | *329* | *530* |  |  | *1,702* | *3,034* | *3,315* |  |" in text
    # Of the last five, from 25, SAC's first, nine tenths of the way to 1,450, its best. MBPO is at 1,305 after 15,000.
    assert "| Hopper-v5 | mbpo | 1,308 | 16,000 | 55,000 | 3.4 |" in text
    assert "| Hopper-v5 | sac | 1 | 60,000 | 0.03 | 2 | 1% |  |  |  |  | 2% | 1 |" in text


def test_each_run():
    """One that was good and is lost, with ten episodes at its end; one that was killed before its end."""
    lost, killed = (
        table([[0.0, 100, 200, 300, 400, 1_000, 50, 40, 30, 20]], episodes=1),
        table([[7.0, 8]], algo="sac", episodes=1),
    )
    lost.loc[9, ["episodes", "return_std"]] = [10, 3.0]
    header, _, first, second = report.runs_table(pd.concat([lost, killed]).sample(frac=1, random_state=0)).splitlines()
    assert header == "| task | algorithm | seed | steps | last 5 | best 5 | at the end | episodes |"
    assert first == "| Hopper-v5 | mbpo | 0 | 10k | 228 | 400 at 6k | 20 ± 3 | 10 |"
    assert second == "| Hopper-v5 | sac | 0 | 2k | 8 | 8 at 2k | 8 | 1 |"


def test_who_is_there_at_once():
    """How much earlier, nobody knows; and one that is never as good sets the level."""
    at_once, slow = np.full((1, 10), 1_000.0), np.array([[20, 50, 100, 300, 600, 900, 900, 900, 900, 900.0]])
    (row,) = report.efficiency_rows(report.all_curves(pd.concat([table(at_once), table(slow, algo="sac")])))
    assert row == ["Hopper-v5", "mbpo", "812", "at most 1,000", "9,000", "at least 9.0"]
    (row,) = report.efficiency_rows(report.all_curves(pd.concat([table(slow), table(at_once, algo="sac")])))
    assert row[3:] == ["9,000", "at most 1,000", "at most 0.1"]
    (row,) = report.efficiency_rows(report.all_curves(pd.concat([table(at_once), table(at_once, algo="sac")])))
    assert row[3:] == ["at most 1,000", "at most 1,000", "unknown"]


def test_a_seed_that_ends_lifts_no_mean():
    """The bad one of two is shorter: beyond it there is no mean."""
    good, bad = 100 * np.arange(1, 21.0), np.concatenate([np.zeros(8), np.full(12, np.nan)])
    curves = report.all_curves(pd.concat([table([good, bad]), table([good], algo="sac")]))
    mean = report.mean_curve(curves["Hopper-v5"]["mbpo"])
    assert mean.index[-1] == 8_000 and mean.iloc[3] == 125
    assert "| Hopper-v5 | mbpo | 2 | 250 [0, 500] | 1,000 (1 of 2) |  |" in report.marks_table(curves)
    assert "| 1,800 (1 of 2) at 20k |" in report.marks_table(curves)
    almost = np.concatenate([np.zeros(18), np.full(2, np.nan)])
    assert "| 1,800 (1 of 2) at 20k |" in report.marks_table(report.all_curves(table([good, almost])))


def test_a_run_that_has_just_begun():
    """Fewer evaluations than are averaged."""
    assert "| Hopper-v5 | mbpo | 1 |  |  |  |  |  |  |  |  | 15 at 2k |" in report.tables(table([[10.0, 20]], episodes=1))


@pytest.mark.parametrize("reference", [False, True])
def test_figure(reference, tmp_path):
    """Published curves are drawn as they are, not resampled."""
    (tmp_path / "mbpo_paper_Hopper.csv").write_text("env_step,mean,half_width\n0,5,1\n10000,100,10\n90000,1,1\n")
    both = np.array([np.arange(12.0), np.arange(12.0) + 4])
    runs = pd.concat([table(both), table(np.ones((1, 12)), env="Pendulum-v1", algo="sac")])
    figure = report.figure(report.all_curves(runs), tmp_path if reference else None)
    hopper, pendulum = figure.axes
    labels = [text.get_text() for text in hopper.get_legend().get_texts()]
    assert labels == ["mbpo, 2 seeds", "paper, 5 seeds (mean)" if reference else "paper's mean"]
    published = hopper.get_lines()[1].get_xydata().tolist()
    assert published == ([[0, 5], [10_000, 100]] if reference else [[10_000, 329]])
    assert hopper.get_lines()[0].get_ydata().tolist() == (np.arange(12) + 2).tolist()
    # Of two seeds, the interval is from the one to the other
    bands = [band.get_paths()[0].vertices for band in hopper.collections]
    assert {(1_000, 0), (1_000, 4), (12_000, 11), (12_000, 15)} <= {tuple(corner) for corner in bands[0].tolist()}
    assert len(bands) == 1 + reference
    if reference:
        assert {tuple(corner) for corner in bands[1].tolist()} == {(0, 4), (0, 6), (10_000, 90), (10_000, 110)}
    assert [text.get_text() for text in pendulum.get_legend().get_texts()] == ["sac, 1 seed"]


def test_a_changed_algorithm_has_its_colour_in_all_tasks():
    ones = np.ones((1, 3))
    places = [("Ant-v5", "mbpo"), ("Ant-v5", "mbpo-g5"), ("Hopper-v5", "mbpo-g10"), ("Hopper-v5", "mbpo-g5")]
    figure = report.figure(report.all_curves(pd.concat([table(ones, env=env, algo=algo) for env, algo in places])))
    colors = [[line.get_color() for line in ax.get_lines()[:2]] for ax in figure.axes]
    assert colors[0][1] == colors[1][1] and len({*colors[0], *colors[1]}) == 3


def test_the_same_table_makes_the_same_files(tmp_path):
    """So that under version control only what is new differs."""
    runs = table(np.random.default_rng(0).normal(size=(5, 3)))
    for seed, name in enumerate(("first", "second")):
        # Whatever was drawn before
        np.random.seed(seed)
        files = report.write(runs, tmp_path / name)
    assert [path.name for path in files] == ["curves.png", "curves.svg", "tables.md"]
    for path in files:
        assert path.read_bytes() == (tmp_path / "first" / path.name).read_bytes()


def test_the_bootstrap_leaves_the_random_numbers_of_others():
    np.random.seed(1)
    expected = np.random.random(3).tolist()
    np.random.seed(1)
    report.curve(report.returns(table(np.random.default_rng(0).normal(size=(5, 3))), "Hopper-v5", "mbpo"))
    assert np.random.random(3).tolist() == expected


def test_the_documentation_shows_what_is_committed():
    """If not: ``make results``."""
    shown = (REPOSITORY / "docs" / "_static" / "results" / "tables.md").read_text()
    assert shown == report.tables(read_all(RESULTS))


def test_committed_results_are_tidy():
    """Of tasks and algorithms that there are, with the columns that there are, each evaluation once and in order."""
    results = read_all(RESULTS)
    assert tuple(results.columns) == COLUMNS
    assert (results.groupby(["env", "algo", "seed"])["step"].diff().dropna() > 0).all()
    assert results["return"].notna().all() and results["commit"].str.fullmatch("[0-9a-f]{10}").all()
    assert set(results["env"]) <= {env for suite in suites.SUITES.values() for env in suite}
