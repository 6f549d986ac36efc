"""Callbacks and logging of SB3, with SAC and MBPO side by side: the same calls, files, rows and stops."""

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from tqdm.rich import tqdm_rich

from sb3_mbpo import MBPO
from tests.envs import CountingEnv
from tests.test_features import known, make, steps_in

BOTH = (SAC, MBPO)

pytestmark = pytest.mark.filterwarnings("ignore:rich is experimental")


class ConstantReward(CountingEnv):
    def step(self, action):
        obs, _, terminated, truncated, _ = super().step(action)
        # Every second episode is a success
        self.episodes = getattr(self, "episodes", 0) + (terminated or truncated)
        return obs, 1.0, terminated, truncated, {"is_success": self.episodes % 2 == 0}


def small(cls, env=None, **kwargs):
    return make(cls, env or ConstantReward(), **known(cls), **kwargs)


def evaluation(**kwargs):
    return EvalCallback(Monitor(ConstantReward()), eval_freq=10, n_eval_episodes=1, verbose=0, **kwargs)


# --- Calls and stops --------------------------------------------------------------------------------------------------


class Recorder(BaseCallback):
    """Every call, the step it came at, and the names of SB3's local variables then."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def _record(self, what):
        self.calls.append((what, self.num_timesteps, self.n_calls, self.model.num_timesteps, frozenset(self.locals)))

    def _on_training_start(self):
        self._record("training start")

    def _on_rollout_start(self):
        self._record("rollout start")

    def _on_step(self):
        self._record("step")
        assert self.training_env is self.model.get_env() and self.logger is self.model.logger
        return True

    def _on_rollout_end(self):
        self._record("rollout end")

    def _on_training_end(self):
        self._record("training end")


WAYS = {
    "callback": lambda recorder: recorder,
    "list": lambda recorder: [recorder],
    "CallbackList": lambda recorder: CallbackList([recorder]),
    "nested": lambda recorder: [CallbackList([recorder]), EveryNTimesteps(1_000, Recorder())],
    "EveryNTimesteps": lambda recorder: EveryNTimesteps(7, recorder),
    "after each evaluation": lambda recorder: evaluation(callback_after_eval=recorder),
    "after the best evaluation": lambda recorder: evaluation(callback_on_new_best=recorder),
    "progress bar": lambda recorder: [recorder, ProgressBarCallback()],
}


@pytest.mark.parametrize("way, kwargs", [*((way, {}) for way in WAYS), ("callback", dict(train_freq=(2, "episode")))])
def test_calls(way, kwargs):
    """Two trainings with one callback, the second of which goes on."""
    recorders = {cls: Recorder() for cls in BOTH}
    for cls, recorder in recorders.items():
        callback = WAYS[way](recorder)
        agent = small(cls, **kwargs).learn(70, callback)
        agent.learn(20, callback, reset_num_timesteps=False)
    sacs, ours = (recorders[cls].calls for cls in BOTH)
    assert [call[:-1] for call in ours] == [call[:-1] for call in sacs] != []
    # All that a callback may look up
    assert all(mine[-1] >= other[-1] for mine, other in zip(ours, sacs, strict=True))


def test_function():
    """Called at each step with SB3's local and global variables; stops the training by returning False."""
    calls = {cls: [] for cls in BOTH}
    for cls in BOTH:

        def function(locals_, globals_, calls=calls[cls]):
            calls.append((locals_["self"].num_timesteps, float(locals_["rewards"][0]), set(locals_)))
            return len(calls) < 75

        assert small(cls).learn(100, function).num_timesteps == 75
    assert len(calls[MBPO]) == 75
    for ours, sacs in zip(calls[MBPO], calls[SAC], strict=True):
        assert ours[:2] == sacs[:2] and ours[2] >= sacs[2]


STOPS = {
    "StopTrainingOnMaxEpisodes": (80, lambda: StopTrainingOnMaxEpisodes(8)),
    "StopTrainingOnMaxEpisodes, list": (70, lambda: [Recorder(), StopTrainingOnMaxEpisodes(7)]),
    "StopTrainingOnRewardThreshold": (10, lambda: evaluation(callback_on_new_best=StopTrainingOnRewardThreshold(9.0))),
    "no StopTrainingOnRewardThreshold": (110, lambda: evaluation(callback_on_new_best=StopTrainingOnRewardThreshold(11.0))),
    "StopTrainingOnNoModelImprovement": (
        80,
        lambda: evaluation(callback_after_eval=StopTrainingOnNoModelImprovement(3, min_evals=4)),
    ),
    "EveryNTimesteps": (100, lambda: EveryNTimesteps(25, StopTrainingOnMaxEpisodes(2))),
    "function": (66, lambda: lambda locals_, globals_: locals_["self"].num_timesteps < 66),
    "first step": (1, lambda: lambda locals_, globals_: False),
}


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("name", STOPS)
def test_stops_where_sac_stops(name, n_envs):
    """At the same step, with the same data and updates behind it; and goes on from there."""
    step, callback = STOPS[name]
    agents = [small(cls, make_vec_env(ConstantReward, n_envs=n_envs)) for cls in BOTH]
    for agent in agents:
        agent.learn(110, callback())
    assert steps_in(agents[0]) == steps_in(agents[1])
    if n_envs == 1:
        assert agents[1].num_timesteps == step
    for agent in agents:
        agent.learn(20, reset_num_timesteps=False)
    assert steps_in(agents[0]) == steps_in(agents[1])


# --- Files ------------------------------------------------------------------------------------------------------------


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_files_of_callbacks(tmp_path):
    """Checkpoints with buffer and statistics of normalisation, evaluations, the best agent."""
    for cls in BOTH:
        env, eval_env = (VecNormalize(make_vec_env(ConstantReward), norm_reward=i == 0) for i in range(2))
        folder = tmp_path / cls.__name__
        checkpoints = CheckpointCallback(
            40, folder / "checkpoints", name_prefix="agent", save_replay_buffer=True, save_vecnormalize=True
        )
        evaluations = EvalCallback(
            eval_env, eval_freq=50, n_eval_episodes=2, log_path=folder, best_model_save_path=folder / "best", verbose=0
        )
        agent = small(cls, env).learn(120, [checkpoints, evaluations])
        # The statistics of training go to the evaluation
        assert eval_env.obs_rms.count == pytest.approx(env.obs_rms.count, abs=25) and eval_env.obs_rms.count > 90
    assert files(tmp_path / "MBPO") == files(tmp_path / "SAC") and len(files(tmp_path / "SAC")) == 3 * 3 + 2
    with np.load(tmp_path / "MBPO" / "evaluations.npz") as results:
        assert results["timesteps"].tolist() == [50, 100] and results["results"].tolist() == [[10, 10]] * 2

    folder = tmp_path / "MBPO" / "checkpoints"
    normalized = VecNormalize.load(folder / "agent_vecnormalize_120_steps.pkl", make_vec_env(ConstantReward))
    loaded = MBPO.load(folder / "agent_120_steps.zip", env=normalized)
    assert loaded.get_vec_normalize_env() is normalized and normalized.obs_rms.count == env.obs_rms.count
    obs = normalized.normalize_obs(np.full((1, 2), 5, np.float32))
    # Saved before the updates of the last step
    assert not np.array_equal(loaded.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    loaded.load_replay_buffer(folder / "agent_replay_buffer_120_steps.pkl")
    assert loaded.replay_buffer.size() == 119 and np.array_equal(
        loaded.replay_buffer.observations[:119], agent.replay_buffer.observations[:119]
    )
    loaded.learn(5, reset_num_timesteps=False)
    start = loaded.model_buffer.observations[:100]
    # Raw units
    assert start.max() == 9 and np.array_equal(start, start.round())
    assert (MBPO.load(tmp_path / "MBPO" / "best" / "best_model.zip")).num_timesteps == 50


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("name", [None, "mine"])
def test_folders_of_tensorboard(cls, name, tmp_path):
    agent = small(cls, tensorboard_log=str(tmp_path))
    kwargs = {} if name is None else dict(tb_log_name=name)
    for reset in (True, False, True):
        agent.learn(10, reset_num_timesteps=reset, log_interval=1, **kwargs)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name or cls.__name__}_{i}" for i in (1, 2)]


# --- Logs -------------------------------------------------------------------------------------------------------------


def log_of(agent, folder, **kwargs):
    agent.set_logger(configure(str(folder), ["csv", "json", "log"]))
    agent.learn(120, **kwargs)
    assert files(folder) == ["log.txt", "progress.csv", "progress.json"]
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


LOGS = {
    "log_interval": lambda: dict(log_interval=3),
    "LogEveryNTimesteps": lambda: dict(log_interval=None, callback=LogEveryNTimesteps(25)),
    "EvalCallback": lambda: dict(log_interval=1, callback=evaluation()),
}


@pytest.mark.parametrize("name", LOGS)
def test_rows(name, tmp_path):
    """SAC's rows at SAC's steps with SAC's keys, and more keys."""
    rows = {
        cls: log_of(small(cls, ent_coef="auto_0.1", stats_window_size=3), tmp_path / cls.__name__, **LOGS[name]())
        for cls in BOTH
    }
    assert len(rows[SAC]) == {"log_interval": 4, "LogEveryNTimesteps": 4, "EvalCallback": 12 + 12}[name]
    assert set(rows[MBPO][0]) > set(rows[SAC][0])
    groups = {key.split("/")[0] for key in set(rows[MBPO][0]) - set(rows[SAC][0])}
    # The model's errors are known when it is trained for the second time
    assert {"model", "time", "train"} <= groups <= {"model", "open_loop", "theory", "time", "train"}
    same = ["time/total_timesteps", "time/episodes", "rollout/ep_len_mean", "rollout/ep_rew_mean", "rollout/success_rate"]
    same += ["train/n_updates", "train/learning_rate"] + (["eval/mean_reward"] if name == "EvalCallback" else [])
    for ours, sacs in zip(rows[MBPO], rows[SAC], strict=True):
        assert [ours[key] for key in same] == [sacs[key] for key in same]
    # The first value of the entropy coefficient is what was asked for
    assert float(next(row["train/ent_coef"] for row in rows[MBPO] if row["train/ent_coef"])) == pytest.approx(0.1, rel=0.02)


def test_no_log(tmp_path):
    assert log_of(small(MBPO), tmp_path, log_interval=None) == []


@pytest.mark.parametrize("window", [1, 4])
def test_stats_window_size(window):
    """Mean over the last episodes: their lengths are 10, 10, ..., and 3 at last."""

    class Shorter(ConstantReward):
        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            self.episode_length = 10 if getattr(self, "episodes", 0) < 7 else 3
            return obs, info

    agent = small(MBPO, Shorter(), stats_window_size=window).learn(73, log_interval=None)
    agent.dump_logs()
    assert agent.ep_info_buffer.maxlen == window
    assert np.mean([info["l"] for info in agent.ep_info_buffer]) == {1: 3, 4: 33 / 4}[window]


def test_vec_monitor(tmp_path):
    """Its file, its episodes in the log, the fields that were asked for."""
    env = VecMonitor(DummyVecEnv([ConstantReward] * 2), str(tmp_path / "monitor"), info_keywords=("is_success",))
    rows = log_of(small(MBPO, env), tmp_path / "log", log_interval=2)
    assert {(row["rollout/ep_len_mean"], row["rollout/ep_rew_mean"]) for row in rows} == {("10.0", "10.0")}
    env.close()
    with open(tmp_path / "monitor.monitor.csv") as file:
        assert file.readline().startswith("#")
        assert [row["is_success"] for row in csv.DictReader(file)] == ["False", "False", "True", "True"] * 3


def test_progress_bar_of_the_users_own(monkeypatch):
    """It moves with the steps, ends, and says why it stands still."""
    bars, said = [], []
    update, set_description = tqdm_rich.update, tqdm_rich.set_description

    def watched_update(self, n=1):
        bars.append(self)
        return update(self, n)

    def watched_description(self, description=None, refresh=True):
        said.append(description)
        return set_description(self, description, refresh)

    monkeypatch.setattr(tqdm_rich, "update", watched_update)
    monkeypatch.setattr(tqdm_rich, "set_description", watched_description)
    small(MBPO).learn(70, callback=CallbackList([ProgressBarCallback()]))
    assert bars[-1].n == bars[-1].total == 70 and "Training the dynamics model" in said and said[-1] == ""


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_verbose(verbose, capsys):
    """All that SAC prints, and more; nothing if nothing is wanted."""
    printed = {}
    for cls in BOTH:
        make(cls, gym.make("Pendulum-v1"), verbose=verbose).learn(70)
        printed[cls] = capsys.readouterr().out.splitlines()
    assert set(printed[SAC]) <= set(printed[MBPO])
    assert bool(printed[SAC]) == bool(printed[MBPO]) == (verbose > 0)
