"""RL Zoo's scripts with DHMBPO: train, go on, enjoy, record, tune."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sb3_mbpo import DHMBPO
from sb3_mbpo.zoo.registration import hyperparams_file
from tests.test_zoo import ENV_ID
from tests.test_zoo_scripts import pytestmark, registered, zoo  # noqa: F401

TINY: dict[str, Any] = {
    "policy": "MlpPolicy",
    "n_timesteps": 120,
    "policy_kwargs": "dict(net_arch=[16, 16])",
    "learning_starts": 60,
    "train_freq": 30,
    "gradient_steps": 2,
    "batch_size": 32,
    "model_hidden_sizes": [16, 16],
    "model_gradient_steps": 0.05,
    "ensemble_size": 3,
    "num_elites": 2,
    "training_horizon": 2,
    "distribution_horizon": 4,
}
OPTIONS = ["--algo", "dhmbpo", "--env", ENV_ID, "-f", "logs"]
OF_TRAIN = [*OPTIONS, "--device", "cpu", "--num-threads", "1", "--seed", "1", "--eval-episodes", "1"]
RUN = f"logs/dhmbpo/{ENV_ID}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which an agent was trained."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yml").write_text(yaml.safe_dump({ENV_ID: TINY | {"env_kwargs": {"n": 2}}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ("-conf", "tiny.yml", "--eval-freq", "60", "--save-freq", "60", "--save-replay-buffer")
        zoo("train", *OF_TRAIN, *options)
    return folder


def test_train(trained: Path) -> None:
    agent = DHMBPO.load(trained / f"{RUN}_1/{ENV_ID}.zip")
    # Two random blocks of 30, then two more
    assert agent.num_timesteps == 120 and agent._n_updates == 2 * 2 + 2 + 2
    assert agent.observation_space.shape == (2,) and (trained / f"{RUN}_1/best_model.zip").is_file()


def test_go_on(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    zoo("train", *OF_TRAIN, "-conf", "tiny.yml", "-n", "60", "-i", f"{RUN}_1/{ENV_ID}.zip", "--save-replay-buffer")
    newest = max((trained / "logs/dhmbpo").glob(f"{ENV_ID}_*"), key=lambda path: path.stat().st_mtime)
    agent = DHMBPO.load(newest / f"{ENV_ID}.zip")
    # No second warm-up
    assert agent.lifetime_timesteps == 180 and agent._n_updates == 8 + 4


def test_enjoy_and_record(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained)
    zoo("enjoy", *OPTIONS, "--no-render", "-n", "20", "--device", "cpu", "--exp-id", "1")
    assert "Mean reward" in capsys.readouterr().out
    zoo("record_video", *OPTIONS, "-n", "20", "--exp-id", "1")
    assert list((trained / f"{RUN}_1/videos").glob("*.mp4"))


def test_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Blocks, which are sampled, are longer than this training: all of it is random, and what is sampled only has to fit
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump({ENV_ID: TINY | {"learning_starts": 2_000}}))
    zoo(
        *("train", *OF_TRAIN, "-conf", "tiny.yml", "-n", "60", "--optimize", "--n-trials", "1", "--n-evaluations", "1"),
        *("--storage", "study.log", "--study-name", "dhmbpo"),
    )
    assert list(tmp_path.glob("logs/dhmbpo/report_*"))


def test_hyperparams_are_found_in_the_package() -> None:
    default = yaml.safe_load(hyperparams_file("dhmbpo").read_text())["default"]
    assert default == {"policy": "MlpPolicy", "n_timesteps": 100_000.0}
