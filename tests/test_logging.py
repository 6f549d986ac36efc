"""What a user sees of a training."""

import csv

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from sb3_mbpo.common.buffers import real_transitions
from sb3_mbpo.common.model_env import ModelEnv
from sb3_mbpo.diagnostics.live import LiveDiagnostics
from tests.agents import make_agent
from tests.envs import CountingEnv

KEYS = {
    *("model/train_loss", "model/gradient_steps", "model/r2", "model/r2_worst", "model/reward_r2", "model/training_seconds"),
    "model/termination_mismatch",
    *("model/model_buffer_gb", "model/compiled", "train/compiled", "time/compile_seconds"),
    *("model/rollout_length", "model/rollout_length_mean", "model/model_buffer_size", "model/real_buffer_size"),
    *("open_loop/error_1", "open_loop/error_2", "open_loop/error_5", "open_loop/error_10", "open_loop/error_20"),
    "open_loop/std_1",
    *("open_loop/inside_1_sigma_1", "open_loop/inside_2_sigma_1", "open_loop/r2_1", "open_loop/reward_r2_1"),
    *("theory/model_error", "theory/policy_shift", "theory/optimal_rollout_length", "theory/error_slope"),
    *("time/env_seconds", "time/model_seconds", "time/rollouts_seconds", "time/updates_seconds"),
}


@pytest.fixture
def rows(tmp_path):
    agent = make_agent(
        CountingEnv(episode_length=30),
        rollout_schedule=[0, 0, 4, 4],
        termination_fn=lambda obs, action, next_obs: np.arange(len(obs)) % 2 == 0,
    )
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(120, log_interval=1)
    with open(tmp_path / "progress.csv") as file:
        return list(csv.DictReader(file))


def test_keys(rows):
    # An environment that counts: its change is always the same, and nothing is to be explained
    nothing = {"open_loop/r2_1", "model/r2", "model/r2_worst"}
    assert KEYS - nothing <= set(rows[-1]) and nothing.isdisjoint(rows[-1])
    # SB3's logger cuts longer ones
    assert all(len(key) <= 36 for key in rows[-1])


def test_numbers(rows):
    # Rows at the ends of episodes: 30, 60 (warm-up), 90 and 120 (trained at 61 and 111)
    assert [row["model/gradient_steps"] for row in rows[:2]] == ["", ""]
    for row, real, trainings in zip(rows[2:], (90, 120), (1, 2), strict=True):
        # SB3 logs before the callback at the end of the step, hence the last complete training
        assert float(row["model/real_buffer_size"]) == real
        # 100 rollouts of which half end at each step: 100 + 50 + 25 + 12
        assert float(row["model/rollout_length"]) == 4
        assert float(row["model/rollout_length_mean"]) == pytest.approx(1.87, abs=0.02)
        assert float(row["model/model_buffer_size"]) == pytest.approx(187 * trainings, abs=2)
        assert float(row["model/gradient_steps"]) == (11 if trainings == 1 else 5)
        # The function calls every second row terminal, the environment none but one in thirty
        assert float(row["model/termination_mismatch"]) == pytest.approx(0.5, abs=0.06)
        assert np.isfinite(float(row["model/train_loss"]))
    seconds = {key: [float(row[key] or 0) for row in rows] for key in KEYS if key.endswith("seconds")}
    assert {row["time/compile_seconds"] for row in rows} == {rows[0]["time/compile_seconds"]}
    assert {row["train/compiled"] for row in rows[2:]} == {row["model/compiled"] for row in rows} == {"0"}
    # 20 trainings per 1,000 steps, 100 rollouts of length 4 each, 2 + 1 + 2 + 1 + 1 numbers of 4 bytes
    assert float(rows[-1]["model/model_buffer_gb"]) == pytest.approx(20 * 100 * 4 * 7 * 4 / 1e9)
    for key, values in seconds.items():
        if key.startswith("time/") and key != "time/compile_seconds":
            assert values == sorted(values), key
        assert values[-1] > 0, key
    assert seconds["time/model_seconds"][1] == seconds["time/updates_seconds"][1] == 0


def test_a_small_buffer_does_not_ask_for_more_gradient_steps():
    """Trained at 61 and at 111, on 50 transitions each time."""
    agent = make_agent(buffer_size=50).learn(112)
    assert agent.logger.name_to_value["model/gradient_steps"] == round(0.01 * 50 * (1 + 1_000 / 111))


def test_the_budget_counts_the_steps_since_the_last_training():
    """Three environments: trained at 63 steps, and at the first multiple of three from 113 on."""
    agent = make_agent(make_vec_env("Pendulum-v1", n_envs=3), model_gradient_steps=0.1).learn(116)
    assert agent.last_model_training == 114
    assert agent.logger.name_to_value["model/gradient_steps"] == round(0.1 * 51 * (1 + 1_000 / 114))


def test_seconds_add_up():
    agent = make_agent()
    import time

    start = time.perf_counter()
    agent.learn(150)
    assert 0.8 * (time.perf_counter() - start) < sum(agent.seconds.values()) < time.perf_counter() - start


def test_stdout_and_tensorboard(tmp_path, capsys):
    agent = make_agent(CountingEnv(), verbose=1, tensorboard_log=str(tmp_path))
    agent.learn(80, log_interval=1)
    printed = capsys.readouterr().out
    # 0.01 x 61 x (1 + 1,000 / 61)
    assert printed.count("First training of the model, on 61 transitions: 11 gradient steps or fewer") == 1
    assert "reward_r2" in printed and "Termination of model rollouts: learned from the replay buffer" in printed
    assert "pass `termination_fn(obs, action, next_obs)`" in printed and "`model/termination_seen`" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["MBPO_1"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "MBPO_1"))
    events.Reload()
    # There was but one training of the model
    later = {key for key in KEYS if key.startswith(("open_loop/", "theory/"))} | {"model/r2", "model/r2_worst"}
    assert KEYS - later <= set(events.Tags()["scalars"])


def test_progress_bar_says_what_it_waits_for(monkeypatch):
    from tqdm.rich import tqdm_rich

    said = []
    set_description = tqdm_rich.set_description

    def watched(self, description=None, refresh=True):
        said.append((self.n, description))
        return set_description(self, description, refresh)

    monkeypatch.setattr(tqdm_rich, "set_description", watched)
    make_agent().learn(70, progress_bar=True)
    assert said == [
        *((61, "Training the dynamics model"), (61, "")),
        *((61, "Generating model rollouts"), (61, "")),
    ]


def test_every_model_training_is_reported(capsys):
    """Also those between two lines of the log."""
    make_agent(verbose=1).learn(170)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Model training")]
    assert [line.split(" transitions")[0] for line in lines] == [
        f"Model training at step {step} on {step}" for step in (61, 111, 161)
    ]
    for line in lines:
        assert " gradient steps, " in line and " s, R2 of the changes " in line and "worst: obs[" in line


@pytest.mark.parametrize("length, seen, invented", [(10, 1, 0), (7, 0, 0), (15, 1, 5 / 14)])
def test_learned_termination_is_measured_on_new_transitions(length, seen, invented):
    agent = make_agent(CountingEnv(episode_length=10)).learn(200)
    # From now on it ends elsewhere
    agent.env.envs[0].unwrapped.episode_length, agent.model_train_freq = length, 10_000
    agent.learn(300, reset_num_timesteps=False)
    LiveDiagnostics(agent, ModelEnv(agent, agent.env)).before_training(real_transitions(agent.replay_buffer), 1)
    logged = agent.logger.name_to_value
    assert logged["model/termination_seen"] == pytest.approx(seen, abs=0.1)
    assert logged["model/termination_invented"] == pytest.approx(invented, abs=0.05)
