"""
The scripts of RL Zoo with MBPO. Most run inside this process, which saves the seconds that an interpreter needs to import the
zoo; what depends on processes has its own.
"""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import imageio_ffmpeg
import matplotlib
import numpy as np
import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_mbpo import MBPO
from sb3_mbpo.zoo.registration import hyperparams_file, register
from sb3_mbpo.zoo.samplers import convert_mbpo_params
from tests.test_zoo import AFTER_STARTUP, ENV_ID, ROOT, manager, run, start

# The smallest model and the fewest updates that still do everything once
TINY: dict[str, Any] = {
    "policy": "MlpPolicy",
    "n_timesteps": 80,
    "policy_kwargs": "dict(net_arch=[16, 16])",
    "learning_starts": 60,
    "batch_size": 32,
    "gradient_steps": 1,
    "model_hidden_sizes": [16, 16],
    "model_gradient_steps": 0.05,
    "ensemble_size": 3,
    "num_elites": 2,
    "model_train_freq": 50,
    "rollout_batch_size": 200,
    "rollout_schedule": [0, 100, 1, 3],
}
OPTIONS = ["--algo", "mbpo", "--env", ENV_ID, "-f", "logs"]
OF_TRAIN = [*OPTIONS, "--device", "cpu", "--num-threads", "1", "--seed", "1", "--eval-episodes", "1"]
RUN = f"logs/mbpo/{ENV_ID}"


pytestmark = [
    # Modules of the zoo are run again, as scripts
    pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:rich is experimental"),
    # VecMonitor, as a wrapper, around the zoo's own Monitor
    pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`:UserWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def zoo(script: str, *arguments: str | Path) -> None:
    """``python -m sb3_mbpo.zoo``, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["python -m sb3_mbpo.zoo", script, *map(str, arguments)])
        runpy.run_module("sb3_mbpo.zoo", run_name="__main__")


def run_module(name: str, *arguments: str) -> None:
    """``python -m name``, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_module(name, run_name="__main__")


def params(**hyperparams: Any) -> list[str]:
    """As ``-params`` wants them."""
    return ["-params", *(f"{name}:{value!r}" for name, value in hyperparams.items())]


def write_config(folder: Path, **hyperparams: Any) -> Path:
    """A YAML for ``-conf``."""
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump({ENV_ID: TINY | hyperparams}))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which an agent was trained with most of what ``train`` can do."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, env_kwargs={"n": 2}, n_timesteps=120, n_envs=2, normalize=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        zoo(
            *("train", *OF_TRAIN, "-conf", config, "--eval-freq", "60", "--n-eval-envs", "2", "--eval-episodes", "2"),
            *("--save-freq", "50", "--save-replay-buffer", "-tb", "tb", "--progress", "--log-interval", "1"),
        )
    return folder


@pytest.fixture
def logs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train(trained: Path) -> None:
    folder = trained / f"{RUN}_1"
    made = {path.name for path in folder.iterdir()}
    assert made >= {f"{ENV_ID}.zip", "best_model.zip", "replay_buffer.pkl", "0.monitor.csv", "1.monitor.csv"}
    assert {"rl_model_50_steps.zip", "rl_model_100_steps.zip", "evaluations.npz"} <= made
    assert (folder / ENV_ID / "vecnormalize.pkl").is_file()
    assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == [60, 120]
    model = MBPO.load(folder / f"{ENV_ID}.zip")
    assert model.num_timesteps == 120 and list(model.rollout_schedule) == [0, 100, 1, 3] and model.n_envs == 2
    assert model.observation_space.shape == (2,)
    assert list((trained / "tb").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("with_replay_buffer", [True, False])
def test_continue(with_replay_buffer: bool, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not with_replay_buffer:
        (logs / f"{RUN}_1/replay_buffer.pkl").unlink()
    # networks of other sizes in the YAML are not the agent's, as its policy_kwargs are not
    other_sizes = {"model_hidden_sizes": [8], "ensemble_size": 2, "policy_kwargs": "dict(net_arch=[8])"}
    config = write_config(logs, env_kwargs={"n": 2}, n_timesteps=120, n_envs=2, normalize=True, **other_sizes)
    arguments = ["train", *OF_TRAIN, "-conf", config, "--eval-freq", "-1", "-i", f"{RUN}_1/{ENV_ID}.zip"]
    zoo(*arguments)
    output = capsys.readouterr().out
    assert ("Loading replay buffer" in output) == with_replay_buffer
    # the last one was at step 112; without the buffer, the model waits for `learning_starts` new transitions
    first = re.search(r"Model training at step (\d+) on (\d+) transitions", output)
    assert first is not None and first.groups() == (("162", "162") if with_replay_buffer else ("180", "60"))
    model = MBPO.load(f"{RUN}_2/{ENV_ID}.zip")
    assert (model.num_timesteps, model.lifetime_timesteps) == (120, 240)
    assert (list(model.model_hidden_sizes), model.ensemble_size) == ([16, 16], 3)
    # but who asks for other sizes is told
    with pytest.raises(ValueError, match=r"model_hidden_sizes.* changed \(sizes of networks must be as saved"):
        zoo(*arguments, *params(model_hidden_sizes=[8, 8]))


@pytest.mark.parametrize(
    "which, loaded",
    [
        ([], f"{ENV_ID}.zip"),
        (["--load-best", "--norm-reward"], "best_model.zip"),
        (["--load-checkpoint", "50"], "rl_model_50_steps.zip"),
        (["--load-last-checkpoint", "--stochastic", "--progress"], "rl_model_100_steps.zip"),
    ],
)
def test_enjoy(which: list[str], loaded: str, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo("enjoy", *OPTIONS, "-n", "30", "--no-render", *which)
    output = capsys.readouterr().out
    assert f"Loading {RUN}_1/{loaded}" in output
    assert "Mean reward" in output


def test_record_video(logs: Path) -> None:
    zoo("record_video", *OPTIONS, "-n", "10", "-o", "videos", "--load-best")
    (video,) = (logs / "videos").iterdir()
    assert video.name == f"best-model-mbpo-{ENV_ID}-step-0-to-step-10.mp4"
    frames = imageio_ffmpeg.read_frames(str(video))
    assert next(frames)["size"] == (64, 64) and len(list(frames)) >= 10


def test_env_kwargs_of_the_command_line(logs: Path) -> None:
    zoo("train", *OF_TRAIN, "-conf", "tiny.yml", "-n", "70", "--eval-freq", "70", "--env-kwargs", "n:3")
    assert MBPO.load(f"{RUN}_2/{ENV_ID}.zip").observation_space.shape == (3,)
    zoo("enjoy", *OPTIONS, "-n", "10", "--no-render")
    zoo("record_video", *OPTIONS, "-n", "5")


@pytest.mark.slow
def test_record_training(tmp_path: Path) -> None:
    """It starts ``python`` and ``ffmpeg``."""
    (tmp_path / "sitecustomize.py").write_text("import sb3_mbpo.zoo.startup; sb3_mbpo.zoo.startup.install()")
    (tmp_path / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    options = ["--algo", "mbpo", "--env", "Pendulum-v1", "-f", "logs"]
    hyperparams = {name: value for name, value in TINY.items() if name != "policy_kwargs"}
    variables = {
        "path": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    for arguments in (
        ["rl_zoo3.train", *options, "-n", "100", "--save-freq", "50", "--eval-freq", "-1", *params(**hyperparams)],
        ["rl_zoo3.record_training", *options, "-n", "10", "--gif"],
    ):
        run("-m", *arguments, cwd=tmp_path, **variables)
    videos = tmp_path / "logs/mbpo/Pendulum-v1_1/videos"
    assert {path.name.split("-")[0] for path in videos.iterdir()} == {"final", "checkpoint", "training.mp4", "training.gif"}
    assert all(path.stat().st_size > 0 for path in videos.iterdir())


def test_plots(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plot(script: str, *arguments: str) -> None:
        run_module(f"rl_zoo3.plots.{script}", *arguments)

    with matplotlib.rc_context():
        matplotlib.use("Agg", force=True)
        plot("plot_train", "-a", "mbpo", "-e", ENV_ID, "-f", "logs", "-w", "1")
        all_plots = ["all_plots", "-a", "mbpo", "-e", ENV_ID, "-f", "logs", "-o", "results", "-print"]
        plot(*all_plots)
        # Upstream: it needs two runs of two evaluation episodes
        with pytest.raises(ValueError, match=r"min\(\) "):
            plot("plot_from_file", "-i", "results")
        shutil.copytree(f"{RUN}_1", f"{RUN}_2")
        plot(*all_plots)
        assert f"{ENV_ID}-MBPO-logs: 2" in capsys.readouterr().out
        plot("plot_from_file", "-i", "results", "-l", "mbpo", "--boxplot")
        assert "keys: ['MBPO-logs']" in capsys.readouterr().out
        matplotlib.pyplot.close("all")


def test_command_and_benchmark(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_module("rl_zoo3.cli", "enjoy", *OPTIONS, "-n", "10", "--no-render")
    assert f"Loading {RUN}_1/{ENV_ID}.zip" in capfd.readouterr().out
    # Upstream: it starts enjoy.py, which only a checkout of the zoo has
    run_module("rl_zoo3.benchmark", "--log-dir", "logs", "--benchmark-dir", "logs", "-n", "10", "--test-mode", "--no-hub")
    output = capfd.readouterr()
    assert f"Evaluating mbpo on {ENV_ID}" in output.out and "Error during evaluation, skipping" in output.out
    assert "enjoy.py" in output.err


class Hub(SimpleHTTPRequestHandler):
    """As much of the hub of models as a download needs: /owner/name/resolve/main/file."""

    protocol_version = "HTTP/1.1"

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.split("/")[-1])

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", "0" * 40)
        # What it is kept under in the cache: no path
        self.send_header("ETag", f'"{self.path.split("/")[-1].replace(".", "-")}"')
        if not os.path.exists(self.translate_path(self.path)):
            self.send_header("X-Error-Code", "EntryNotFound")
        super().end_headers()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder of files, and the environment variables with which they are downloaded."""
    folder = tmp_path / "hub"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Hub(*args, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        variables = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "TRUST_REMOTE_CODE": "True"}
        yield folder, variables | {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        server.shutdown()


def test_load_from_hub(hub: tuple[Path, dict[str, str]], trained: Path, logs: Path) -> None:
    folder, variables = hub
    shutil.copy(trained / f"{RUN}_1/{ENV_ID}.zip", folder / f"mbpo-{ENV_ID}.zip")
    for name in ("args.yml", "config.yml"):
        shutil.copy(trained / f"{RUN}_1/{ENV_ID}" / name, folder)
    (folder / "env_kwargs.yml").write_text("n: 2")
    shutil.make_archive(str(folder / "train_eval_metrics"), "zip", trained / f"{RUN}_1", "evaluations.npz")
    download = ["rl_zoo3.load_from_hub", *OPTIONS, "--organization", "me"]
    # Upstream: without VecNormalize it expects the class of error that huggingface_hub raised before its release 1
    result = start("-m", "sb3_mbpo.zoo", "load_from_hub", *download[1:], cwd=logs, **variables)
    assert result.returncode == 1 and "EntryNotFoundError: 404" in result.stdout and "vec_normalize.pkl" in result.stdout
    shutil.copy(trained / f"{RUN}_1/{ENV_ID}/vecnormalize.pkl", folder / "vec_normalize.pkl")
    run("-c", AFTER_STARTUP, *download, cwd=logs, **variables)
    assert (logs / f"{RUN}_2/evaluations.npz").is_file()
    zoo("enjoy", *OPTIONS, "--exp-id", "2", "-n", "10", "--no-render")


def test_push_to_hub(logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hub_of_sb3 = importlib.import_module("huggingface_sb3.push_to_hub")
    push = ["push_to_hub", *OPTIONS, "--organization", "me", "--no-render"]
    # Upstream: sb3-team-hf-integration 3.2 has no such function
    with pytest.raises(ImportError, match="cannot import name 'generate_metadata'"):
        zoo(*push)
    # With it, MBPO gets as far as the network
    monkeypatch.setattr(hub_of_sb3, "generate_metadata", hub_of_sb3._generate_metadata, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(Exception) as error:
        zoo(*push)
    assert type(error.value).__name__ == "ConnectError", repr(error.value)
    assert f"Uploading to me/mbpo-{ENV_ID}" in capsys.readouterr().out


def test_real_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the start-up line, in a VecEnv of processes; then with ``python -m sb3_mbpo.zoo``, which is resumed from."""
    hyperparams = TINY | {"policy_kwargs": {"net_arch": [16, 16]}, "n_envs": 2}
    options = ["--algo", "mbpo", "--env", "Ant-v5", "-f", "logs", "--device", "cpu", "--num-threads", "1"]
    train = ["train", *options, "-n", "100", "--eval-freq", "-1", *params(**hyperparams)]
    output = run("-c", AFTER_STARTUP, "rl_zoo3.train", *train[1:], "--vec-env", "subproc", cwd=tmp_path)
    assert f"Loading hyperparameters from: {hyperparams_file('mbpo')}" in output
    assert "Termination of model rollouts: derived from the environment" in output and "R2 of the changes" in output
    run("-m", "sb3_mbpo.zoo", *train, "-i", "logs/mbpo/Ant-v5_1/Ant-v5.zip", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    zoo("enjoy", *options[:6], "-n", "10", "--no-render")
    assert "Loading logs/mbpo/Ant-v5_2/Ant-v5.zip" in capsys.readouterr().out
    with open(tmp_path / "logs/mbpo/Ant-v5_2/Ant-v5/args.yml") as file:
        args = yaml.load(file, Loader=yaml.UnsafeLoader)
    assert args["env_kwargs"] == {"include_cfrc_ext_in_observation": False}


class CountingCallback(BaseCallback):
    """
    :param every: Print each so many steps
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every

    def _on_step(self) -> bool:
        if self.n_calls % self.every == 0:
            print(f"step {self.n_calls}")
        return True


def in_env(vec_env: Any, wrapper: type) -> bool:
    """Whether a VecEnv is wrapped so."""
    while hasattr(vec_env, "venv"):
        if isinstance(vec_env, wrapper):
            return True
        vec_env = vec_env.venv
    return False


@pytest.mark.parametrize(
    "hyperparams, has",
    [
        ({"frame_stack": 3}, lambda model: in_env(model.env, VecFrameStack) and model.observation_space.shape == (3,)),
        (
            {"normalize": "dict(norm_obs=True, norm_reward=False)", "gamma": 0.9},
            lambda model: in_env(model.env, VecNormalize) and model.env.gamma == 0.9 and not model.env.norm_reward,
        ),
        ({"learning_rate": "lin_3e-4"}, lambda model: 0 <= model.actor.optimizer.param_groups[0]["lr"] < 1e-4),
        (
            {"noise_type": "ornstein-uhlenbeck", "noise_std": 0.5},
            lambda model: isinstance(model.action_noise, OrnsteinUhlenbeckActionNoise),
        ),
        (
            {"env_wrapper": [{"rl_zoo3.wrappers.FrameSkip": {"skip": 2}}, "rl_zoo3.wrappers.HistoryWrapper"]},
            lambda model: model.observation_space.shape == (4,),
        ),
        ({"callback": [{f"{__name__}.CountingCallback": {"every": 70}}]}, lambda model: model.num_timesteps == 80),
        ({"train_freq": [1, "episode"], "gradient_steps": -1}, lambda model: model._n_updates == 20),
        ({"n_envs": 2, "vec_env_wrapper": "stable_baselines3.common.vec_env.VecMonitor"}, lambda model: model.n_envs == 2),
        ({"use_sde": True, "monitor_kwargs": "dict(info_keywords=())"}, lambda model: model.use_sde),
        ({"n_steps": 3, "policy": "stable_baselines3.sac.MlpPolicy"}, lambda model: model.n_steps == 3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings(hyperparams: dict[str, Any], has: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What SAC's entries in the zoo's YAML files may hold."""
    config = write_config(tmp_path, **hyperparams)
    experiment = manager(tmp_path, env=ENV_ID, config=str(config), eval_freq=40, log_interval=1, device="cpu")
    model, _ = experiment.setup_experiment() or (None, None)
    assert model is not None
    experiment.learn(model)
    assert model.num_timesteps == 80 and has(model)
    output = capsys.readouterr().out
    assert "Model training at step" in output
    assert ("step 70" in output) == ("callback" in hyperparams)


def test_refused_setting(tmp_path: Path) -> None:
    forgetful = {"optimize_memory_usage": True, "replay_buffer_kwargs": "dict(handle_timeout_termination=False)"}
    config = write_config(tmp_path, **forgetful)
    experiment = manager(tmp_path, env=ENV_ID, config=str(config), device="cpu")
    model, _ = experiment.setup_experiment() or (None, None)
    assert model is not None
    with pytest.raises(ValueError, match="termination condition of this environment cannot be learned"):
        experiment.learn(model)


PARALLEL = "rl_zoo3.callbacks.ParallelTrainCallback"


@pytest.mark.parametrize("callback", [PARALLEL, [{PARALLEL: {"gradient_steps": 2}}]])
def test_refused_callback(callback: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path, callback=callback)
    with pytest.raises(ValueError, match="ParallelTrainCallback trains a copy of the agent as plain SAC"):
        manager(tmp_path, env=ENV_ID, config=str(config)).setup_experiment()


@pytest.mark.parametrize("kind", ["tiny.py", "tiny_config"])
def test_python_config(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.py").write_text(f"hyperparams = { {ENV_ID: {'policy': 'MlpPolicy', 'n_timesteps': 7}} }")
    shutil.copy(tmp_path / "tiny.py", tmp_path / "tiny_config.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    hyperparams, _ = manager(tmp_path, env=ENV_ID, config=kind).read_hyperparameters()
    assert hyperparams == {"policy": "MlpPolicy", "n_timesteps": 7}


@pytest.mark.parametrize("given", ["-params", "-conf"])
def test_functions_in_settings(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a module that can be imported, as docs/zoo.md says: `enjoy` reads them by name."""
    (tmp_path / "functions_of_mine.py").write_text("def never(obs, action, next_obs):\n    return next_obs[:, 0] > 1e9\n")
    (tmp_path / "settings.py").write_text(
        "from functions_of_mine import never\n"
        f"hyperparams = { {ENV_ID: TINY} }\n"
        f"hyperparams[{ENV_ID!r}]['termination_fn'] = never\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_config(tmp_path)
    by_name = ["-conf", "tiny.yml", "-params", "termination_fn:__import__('functions_of_mine').never"]
    zoo("train", *OF_TRAIN, *(by_name if given == "-params" else ["-conf", "settings.py"]))
    zoo("enjoy", *OPTIONS, "-n", "10", "--no-render")
    assert MBPO.load(f"{RUN}_1/{ENV_ID}.zip").termination_fn.__name__ == "never"
    assert "Termination of model rollouts: given by the user" in capsys.readouterr().out


# Few steps after the warm-up: of the many updates and large networks that may be sampled
SEARCH = ["train", *OF_TRAIN, "-n", "64", "--optimize", "--n-evaluations", "2", "-conf", "tiny.yml"]


def search_config(folder: Path, **hyperparams: Any) -> None:
    """A YAML whose trials are cheap, whatever is sampled."""
    write_config(folder, model_gradient_steps=0.02, ensemble_size=2, num_elites=1, rollout_batch_size=50, **hyperparams)


def open_study(storage: str) -> optuna.Study:
    """As the zoo opens it."""
    journal = storage.endswith(".log")
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(storage)) if journal else storage,
        study_name="mbpo",
        direction="maximize",
        load_if_exists=True,
    )


@pytest.mark.parametrize("storage", ["study.log", pytest.param("sqlite:///study.db", marks=pytest.mark.slow)])
def test_share_a_study(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes at once; then their trials are trained with."""
    monkeypatch.chdir(tmp_path)
    search_config(tmp_path)
    study = open_study(storage)
    arguments = [*SEARCH[1:], "--storage", storage, "--study-name", "mbpo", "--no-optim-plots", "--n-trials", "1"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # PicturePoint is registered by the module that defines it
    command = [sys.executable, "-m", "sb3_mbpo.zoo", "train", *arguments, "--gym-packages", "tests.test_zoo"]
    workers = [
        subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        output, _ = worker.communicate()
        assert worker.returncode == 0, output
        assert "Number of finished trials" in output and "rollout_schedule" in output
    assert [trial.number for trial in study.trials] == [0, 1]
    assert all(trial.state.is_finished() and trial.user_attrs["n_timesteps"] == 64 for trial in study.trials)

    for trial_id in (0, 1):
        of_trial = ["--storage", storage, "--study-name", "mbpo", "--trial-id", str(trial_id)]
        zoo("train", *OF_TRAIN, "-conf", "tiny.yml", "-n", "64", "--eval-freq", "-1", "-uuid", *of_trial)
        (folder,) = tmp_path.glob(f"{RUN}_*-*")
        model = MBPO.load(folder / f"{ENV_ID}.zip")
        hyperparams = convert_mbpo_params(study.trials[trial_id].params)
        assert model.lr_schedule(1.0) == hyperparams.pop("learning_rate")  # the zoo makes a schedule of it
        assert model.policy_kwargs["net_arch"] == hyperparams.pop("policy_kwargs")["net_arch"]
        for name, value in hyperparams.items():
            assert getattr(model, name) == value
        shutil.rmtree(folder)


@pytest.mark.parametrize("pruner, sampler", [("halving", "random"), ("none", "tpe")])
def test_optimize(
    pruner: str, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In threads, and with each of the zoo's settings."""
    monkeypatch.chdir(tmp_path)
    search_config(tmp_path, normalize=True, n_envs=2, env_kwargs={"n": 2})
    choices = ["--pruner", pruner, "--sampler", sampler, "--n-startup-trials", "1", "--optimization-log-path", "trials"]
    zoo(*SEARCH, "--n-trials", "3", "--n-jobs", "2", *choices)
    assert "Number of finished trials:  3" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "trials").iterdir()} == {"trial_0", "trial_1", "trial_2"}
    assert len(list((tmp_path / "logs/mbpo").glob("report_*.csv"))) == 1


def test_optimize_another_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write = {ENV_ID: {"policy": "MlpPolicy", "n_timesteps": 30, "learning_starts": 20}}
    (tmp_path / "sac.yml").write_text(yaml.safe_dump(write))
    of_sac = ["sac" if option == "mbpo" else option for option in OF_TRAIN]
    search = ["--optimize", "--n-trials", "1", "--n-evaluations", "1", "--storage", "study.log", "--study-name", "mbpo"]
    zoo("train", *of_sac, "-conf", "sac.yml", *search)
    (trial,) = open_study("study.log").trials
    assert trial.state.is_finished() and "n_timesteps" not in trial.user_attrs | trial.params
