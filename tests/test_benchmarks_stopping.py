"""Benchmark of what training of the model stops by: its criteria, its errors and its command."""

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer

from benchmarks.stopping import CRITERIA, N_NEXT, Judged, errors, main, measure
from sb3_mbpo.dynamics.ensemble import Ensemble
from sb3_mbpo.dynamics.training import fit
from tests.agents import make_agent

REPOSITORY = Path(__file__).parents[1]


def test_criteria():
    rng = np.random.default_rng(0)
    squares, log_var = rng.chisquare(1, (3, 100, 4)), rng.normal(0, 1, (3, 100, 4))
    squares[:, 7] = 1e3
    rows = np.sort(squares.mean(2), 1)
    expected = {
        "standardised": rows.mean(1),
        "trimmed": rows[:, :95].mean(1),
        "median": rows[:, 49],
        "likelihood": np.exp(np.mean(squares / np.exp(log_var) + log_var, (1, 2))),
    }
    for name, values in expected.items():
        found = CRITERIA[name](th.as_tensor(squares), th.as_tensor(log_var))
        np.testing.assert_allclose(found, values, rtol=1e-12)
    assert {*expected, "raw"} == set(CRITERIA)


def test_one_percent_of_a_variance_is_one_percent_of_the_likelihood():
    squares = th.rand(2, 50, 3, dtype=th.float64)
    before, after = (CRITERIA["likelihood"](share * squares, (share * squares).log()) for share in (1, 0.99))
    np.testing.assert_allclose(after / before, 0.99)


def test_training_goes_by_the_criterion():
    th.manual_seed(0)
    inputs, targets, scale = th.randn(300, 3), th.randn(300, 3) * th.tensor([1.0, 10.0, 0.1]), th.tensor([1.0, 10.0, 0.1])
    raw = Judged(2, 1, None, scale)
    assert raw.mse(inputs, targets).equal(Ensemble.mse(raw, inputs, targets))
    mean, log_var = raw(inputs.expand(7, -1, -1))
    watched = []

    def criterion(squares, log_variances):
        watched.append((squares, log_variances))
        return th.ones(7)

    judged = Judged(2, 1, criterion, scale)
    judged.load_state_dict(raw.state_dict())
    assert judged.mse(inputs, targets).equal(th.ones(7))
    # Both in units of the standard deviations
    np.testing.assert_allclose(watched[0][0], ((mean - targets) / scale).square().detach(), rtol=1e-5)
    np.testing.assert_allclose(watched[0][1].exp(), (log_var.exp() / scale.square()).detach(), rtol=1e-5)
    # The first epoch improves on nothing, five more do not improve
    assert fit(judged, inputs, targets).epochs == 6 and len(watched) == 7


def test_errors_of_a_known_model():
    """The model says the same for all: its errors are those of a biased constant."""
    th.manual_seed(0)
    ensemble = Judged(2, 1, None, th.ones(3))
    with th.no_grad():
        ensemble.weights[-1].zero_()
        ensemble.biases[-1].copy_(th.tensor([0.5, 5.0, -0.05, -2.0, 2.0, -7.0]).expand(7, 1, 6))
        _, log_var = ensemble(th.zeros(7, 1, 3))
    scale = th.tensor([1.0, 10.0, 0.1])
    std = (0.5 * log_var[0, 0]).exp()
    truth = th.randn(20_000, 3)
    found = errors(ensemble, th.zeros(20_000, 3), truth * scale, scale, epochs=12)
    bias = np.array([0.5, 0.5, -0.5])
    off, relative = truth.numpy() - bias, (std / scale).numpy()
    assert found.epochs == 12
    # Of a standard normal around half a standard deviation
    assert found.mean == pytest.approx(np.sqrt(1.25), rel=0.02)
    assert found.typical == pytest.approx(np.median(np.sqrt(np.mean(off**2, 1))), rel=1e-3)
    assert found.sample == pytest.approx(np.sqrt(np.mean(off**2) + np.mean(relative**2)), rel=1e-4)
    assert found.inside == pytest.approx(np.mean(np.abs(off) < relative), abs=1e-3)
    nll = np.sum(0.5 * (off / relative) ** 2 + np.log(std.numpy()) + 0.5 * np.log(2 * np.pi), 1)
    assert found.nll == pytest.approx(np.median(nll), rel=1e-3)


@pytest.mark.slow
def test_errors_are_those_of_the_next_transitions():
    """Steps are of another size in the transitions before the first, in the next 1,000, and in those after them."""
    sizes = np.repeat([100.0, 0.0, 5.0, 100.0], [40, 400, N_NEXT, 50])
    rng = np.random.default_rng(0)
    space = gymnasium.spaces.Box(-5, 5, (2,))
    buffer = ReplayBuffer(len(sizes), space, space, device="cpu")
    for size in sizes:
        obs = rng.normal(0, 1, 2)
        buffer.add(obs, obs + size + rng.normal(0, 1, 2), rng.normal(0, 1, 2), rng.normal(size, 1), np.zeros(1), [{}])
    found = measure(buffer, None, 40, range(400, 401), seed=0, max_epochs=3)
    # Noise of one standard deviation, about a mean that is off by five
    assert found.epochs == 3 and found.mean == pytest.approx(np.sqrt(26), rel=0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [(["--end", "1000"], "61 transitions"), (["--begin", "30", "--end", "20"], "must not be below"), ([], "61 transitions")],
)
def test_too_few_transitions(arguments, message, tmp_path, monkeypatch, capsys):
    make_agent().learn(61).save_replay_buffer(tmp_path / "buffer.pkl")
    monkeypatch.setattr(sys, "argv", ["stopping", str(tmp_path / "buffer.pkl"), *arguments])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path):
    make_agent(learning_starts=1_600).learn(1_550).save_replay_buffer(tmp_path / "buffer.pkl")
    command = [sys.executable, "-m", "benchmarks.stopping", tmp_path / "buffer.pkl", "--begin", "400", "--end", "500"]
    command += ["--every", "100", "--first", "40", "--max-epochs", "7", "--criteria", "raw", "trimmed"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["raw", "trimmed"] and all(row[1] == "0" and 6 <= int(row[2]) <= 7 for row in rows)
    assert all(0 < float(value) < 3 for row in rows for value in row[3:6])
