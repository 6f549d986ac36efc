"""RL Zoo knows MBPO: registration, hyperparameters, search space, and its scripts from the command line."""

import argparse
import copy
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3.exp_manager
import yaml
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.zoo.registration import REGISTRATIONS, hyperparams_file, register
from sb3_mbpo.zoo.samplers import convert_dhmbpo_params, convert_mbpo_params, sample_dhmbpo_params, sample_mbpo_params
from tests.envs import PointEnv

ALGORITHMS = {"mbpo": MBPO, "dhmbpo": DHMBPO}
SEARCHES = {
    "mbpo": (sample_mbpo_params, convert_mbpo_params),
    "dhmbpo": (sample_dhmbpo_params, convert_dhmbpo_params),
}
ROOT = Path(__file__).parents[1]
ZOO = Path(rl_zoo3.exp_manager.__file__).parent
# A script of the zoo, in an interpreter that has run the start-up line of an installed sb3_mbpo
AFTER_STARTUP = """
import runpy, sys
import sb3_mbpo.zoo.startup; sb3_mbpo.zoo.startup.install()
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


class PicturePointEnv(PointEnv):
    """
    A task that renders without any library.

    :param n: How many copies of the position are observed: whoever forgets this argument has the wrong environment
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "human"], "render_fps": 30}

    def __init__(self, n: int = 1, render_mode: str | None = None) -> None:
        super().__init__()
        self.n, self.render_mode = n, render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (n,), np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, info = super().reset(**kwargs)
        return obs.repeat(self.n), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, *others = super().step(action)
        return obs.repeat(self.n), *others

    def render(self) -> np.ndarray:
        return np.full((64, 64, 3), self.steps, dtype=np.uint8)


ENV_ID = "PicturePoint-v0"
gym.register(ENV_ID, PicturePointEnv)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def start(*arguments: str | Path, cwd: Path, path: str | Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """
    :param arguments: Arguments of a new interpreter
    :param cwd: Working directory
    :param path: Where ``sb3_mbpo`` is imported from
    :param variables: Additional environment variables
    :return: Exit code and output, errors included
    """
    python_path = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: str | Path, cwd: Path, **variables: str) -> str:
    """As ``start``, for what must succeed: the output only."""
    result = start(*arguments, cwd=cwd, **variables)
    assert result.returncode == 0, result.stdout
    return result.stdout


def manager(tmp_path: Path, algo: str = "mbpo", env: str = "Pendulum-v1", **kwargs: Any) -> ExperimentManager:
    """The zoo's manager of an experiment."""
    return ExperimentManager(argparse.Namespace(), algo, env, str(tmp_path / "logs"), **kwargs)


def test_register_twice_as_once() -> None:
    reads_hyperparams = ExperimentManager.read_hyperparameters
    register()
    assert ExperimentManager.read_hyperparameters is reads_hyperparams
    assert ALGOS["mbpo"] is MBPO and ALGOS["dhmbpo"] is DHMBPO
    assert HYPERPARAMS_SAMPLER["mbpo"] is sample_mbpo_params
    assert HYPERPARAMS_CONVERTER["mbpo"] is convert_mbpo_params
    assert HYPERPARAMS_SAMPLER["dhmbpo"] is sample_dhmbpo_params
    assert HYPERPARAMS_CONVERTER["dhmbpo"] is convert_dhmbpo_params


def test_register_keeps_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGOS, "mbpo", ALGOS["sac"])
    register()
    assert ALGOS["mbpo"] is ALGOS["sac"]


def test_packaged_hyperparams_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = manager(tmp_path)
    hyperparams, _ = experiment.read_hyperparameters()
    assert experiment.config == str(hyperparams_file("mbpo")) and hyperparams["policy"] == "MlpPolicy"


@pytest.mark.parametrize("env, obs_dim", [("Ant-v5", 27), ("Humanoid-v5", 45), ("Hopper-v5", 11)])
def test_trains_and_evaluates_in_the_same_environment(env: str, obs_dim: int, tmp_path: Path) -> None:
    experiment = manager(tmp_path, env=env, hyperparams={"buffer_size": 1_000})
    model, _ = experiment.setup_experiment() or (None, None)
    assert model is not None
    for vec_env in (model.get_env(), experiment.create_envs(1, eval_env=True)):
        assert vec_env is not None and vec_env.observation_space.shape == (obs_dim,)


def test_env_kwargs_of_the_command_line_win(tmp_path: Path) -> None:
    only = {"include_cinert_in_observation": False}
    experiment = manager(tmp_path, env="Humanoid-v5", env_kwargs=only)
    experiment.read_hyperparameters()
    assert experiment.eval_env_kwargs == only
    experiment = manager(tmp_path, env="Humanoid-v5", eval_env_kwargs=only)
    experiment.read_hyperparameters()
    assert experiment.eval_env_kwargs == only


@pytest.mark.parametrize(
    "algo, env", [(algo, env) for algo in ALGORITHMS for env in yaml.safe_load(hyperparams_file(algo).read_text())]
)
def test_tuned_hyperparams_are_accepted(algo: str, env: str, tmp_path: Path) -> None:
    if env == "default":
        env = ENV_ID
    if env == "Pusher-v4" and int(version("mujoco").split(".")[0]) >= 3:
        # Gymnasium makes it with older ones only
        with pytest.raises(ImportError, match="only supported on `mujoco<3`"):
            gym.make(env)
        return
    options = {}
    if env.startswith("dm_control/"):
        # Its settings, wrappers too, for a task that needs no further package
        hyperparams = yaml.safe_load(hyperparams_file(algo).read_text())[env]
        options["config"], env = str(tmp_path / "own.yml"), ENV_ID
        Path(options["config"]).write_text(yaml.safe_dump({env: hyperparams}))
    experiment = manager(tmp_path, algo, env, hyperparams={"buffer_size": 1_000}, **options)
    model, _ = experiment.setup_experiment() or (None, None)
    assert isinstance(model, ALGORITHMS[algo])


def test_own_config_wins(tmp_path: Path) -> None:
    config = tmp_path / "own.yml"
    config.write_text("Pendulum-v1:\n  policy: MlpPolicy\n  n_timesteps: 7\n")
    hyperparams, _ = manager(tmp_path, config=str(config)).read_hyperparameters()
    assert hyperparams == {"policy": "MlpPolicy", "n_timesteps": 7}


@pytest.mark.parametrize("name", ["missing.yml", "mbpo.yml"])
def test_missing_own_config_fails(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        manager(tmp_path, config=str(tmp_path / name)).read_hyperparameters()
    assert error.value.filename == str(tmp_path / name)


def test_other_algorithms_keep_their_hyperparams(tmp_path: Path) -> None:
    experiment = manager(tmp_path, algo="sac")
    experiment.read_hyperparameters()
    assert experiment.config == str(ZOO / "hyperparams/sac.yml")
    with pytest.raises(FileNotFoundError):
        manager(tmp_path, algo="unknown").read_hyperparameters()


@pytest.mark.parametrize("has_own_file", [True, False])
@pytest.mark.parametrize("checkout", [True, False], ids=["checkout", "package"])
def test_zoo_with_its_own_hyperparams(checkout: bool, has_own_file: bool, tmp_path: Path) -> None:
    """Both layouts of the zoo; should it bring an ``mbpo.yml`` one day, that one is used."""
    shutil.copytree(ZOO, tmp_path / "rl_zoo3", ignore=shutil.ignore_patterns("__pycache__"))
    hyperparams = tmp_path / "rl_zoo3/hyperparams"
    if checkout:
        hyperparams = hyperparams.rename(tmp_path / "hyperparams")
    own_file = hyperparams / "mbpo.yml"
    if has_own_file:
        own_file.write_text("default:\n  n_timesteps: 7\n")
    code = f"""
import argparse
from sb3_mbpo.zoo.registration import register; register()
from rl_zoo3.exp_manager import ExperimentManager
experiment = ExperimentManager(argparse.Namespace(), "mbpo", "Pendulum-v1", "logs")
experiment.read_hyperparameters()
assert experiment.config == {str(own_file if has_own_file else hyperparams_file("mbpo"))!r}, experiment.config
"""
    run("-c", code, cwd=tmp_path, path=os.pathsep.join([str(tmp_path), str(ROOT)]))


def accepted(algo: str, hyperparams: dict[str, Any]) -> bool:
    """Whether the constructor takes these arguments, and a zip and a YAML give them back unchanged."""
    inspect.signature(ALGORITHMS[algo]).bind("MlpPolicy", "Pendulum-v1", **hyperparams)
    if algo == "mbpo":
        start_step, end_step, k_min, k_max = hyperparams["rollout_schedule"]
        assert 0 <= start_step <= end_step and k_min == 1 and 1 <= k_max <= 25
        assert int(hyperparams["batch_size"] * hyperparams["real_ratio"]) >= 1
    else:
        assert hyperparams["gradient_steps"] / hyperparams["train_freq"] in (1, 2, 4)
    assert 0.9 < hyperparams["gamma"] < 1 and hyperparams["target_entropy"] < 0
    return bool(json.loads(json.dumps(hyperparams)) == hyperparams)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_samples_are_rebuilt_from_the_trial(algo: str) -> None:
    sample, convert = SEARCHES[algo]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), direction="maximize")
    for _ in range(100):
        sampled = sample(study.ask(), n_actions=3, n_envs=1, additional_args={})
        params = study.trials[-1].params
        assert all(isinstance(value, int | float | str) for value in params.values())
        assert convert(params) == sampled
        assert accepted(algo, sampled)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_converter_changes_neither_trial_nor_choices(algo: str) -> None:
    sample, convert = SEARCHES[algo]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    sampled = sample(study.ask(), n_actions=1, n_envs=1, additional_args={})
    params = study.trials[0].params
    before = copy.deepcopy((params, sampled))
    convert(params)["policy_kwargs"]["net_arch"].append(1)
    assert (params, convert(params)) == before


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("end", ["low", "high"])
def test_ends_of_the_search_space(end: str, algo: str) -> None:
    sample, _ = SEARCHES[algo]
    study = optuna.create_study()
    sample(study.ask(), n_actions=1, n_envs=1, additional_args={})
    extreme = {
        name: choices.choices[0 if end == "low" else -1]
        if isinstance(choices, CategoricalDistribution)
        else getattr(choices, end)
        for name, choices in study.trials[0].distributions.items()
    }
    study.enqueue_trial(extreme)
    hyperparams = sample(study.ask(), n_actions=1, n_envs=1, additional_args={})
    assert study.trials[1].params == extreme
    assert accepted(algo, hyperparams)
    model = ALGORITHMS[algo]("MlpPolicy", "Pendulum-v1", buffer_size=1_000, **hyperparams)
    for name, value in hyperparams.items():
        own = getattr(model, name)
        assert (own.frequency if name == "train_freq" else own) == value


@pytest.mark.parametrize("budget", [3_000, 400_000])
def test_rollout_schedule_scales_with_the_budget(budget: int) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        trial = study.ask()
        trial.set_user_attr("n_timesteps", budget)
        hyperparams = sample_mbpo_params(trial, n_actions=1, n_envs=1, additional_args={})
        assert "n_timesteps" not in hyperparams
        assert convert_mbpo_params(study.trials[-1].params) == hyperparams
    starts, ends = np.array([trial.user_attrs["rollout_schedule"][:2] for trial in study.trials]).T
    assert 0.4 * budget < starts.max() <= 0.5 * budget and ends.max() <= 1.5 * budget
    assert starts.min() < 0.1 * budget and (ends - starts).min() < 0.1 * budget < 0.8 * budget < (ends - starts).max()


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("her_kwargs", [{}, {"copy_info_dict": True, "n_sampled_goal": 0}])
def test_hindsight_is_sampled_as_for_sac(her_kwargs: dict[str, Any], algo: str) -> None:
    sample, convert = SEARCHES[algo]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    additional_args = {"using_her_replay_buffer": True, "her_kwargs": her_kwargs}
    sampled = sample(study.ask(), n_actions=1, n_envs=1, additional_args=additional_args)
    params = study.trials[0].params
    her = {name: params[name] for name in ("n_sampled_goal", "goal_selection_strategy")}
    assert sampled["replay_buffer_kwargs"] == her_kwargs | her and params["n_sampled_goal"] > 0
    converted = convert(params)
    assert converted.pop("replay_buffer_kwargs") == her and not set(her) & set(converted)
    without = {"using_her_replay_buffer": False, "her_kwargs": {}}
    sampled = sample(study.ask(), n_actions=1, n_envs=1, additional_args=without)
    assert "replay_buffer_kwargs" not in sampled


def test_trial_of_a_study_is_loaded(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.log")
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(storage)), study_name="mbpo", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    sampled = [sample_mbpo_params(study.ask(), n_actions=1, n_envs=1, additional_args={}) for _ in range(2)]
    assert sampled[0] != sampled[1]
    for trial_id in (0, 1):
        hyperparams, _ = manager(tmp_path, storage=storage, study_name="mbpo", trial_id=trial_id).read_hyperparameters()
        assert hyperparams | sampled[trial_id] == hyperparams
        given = {"tau": 0.5}
        hyperparams, _ = manager(
            tmp_path, storage=storage, study_name="mbpo", trial_id=trial_id, hyperparams=given
        ).read_hyperparameters()
        assert hyperparams | sampled[trial_id] | given == hyperparams


@pytest.mark.parametrize("missing", ["storage", "study_name"])
def test_trial_without_study_is_refused(missing: str, tmp_path: Path) -> None:
    study = {"storage": str(tmp_path / "study.log"), "study_name": "mbpo"}
    del study[missing]
    with pytest.raises(ValueError, match="--trial-id 0 needs --storage and --study-name"):
        manager(tmp_path, trial_id=0, **study).read_hyperparameters()


def test_startup_is_light(tmp_path: Path) -> None:
    code = """
import os, sys
before = set(sys.modules)
import sb3_mbpo.zoo.startup; sb3_mbpo.zoo.startup.install(); sb3_mbpo.zoo.startup.install()
print(*sorted(set(sys.modules) - before))
print(*(type(finder).__name__ for finder in sys.meta_path))
"""
    modules, finders = run("-S", "-c", code, cwd=tmp_path).splitlines()
    assert modules == "sb3_mbpo sb3_mbpo.zoo sb3_mbpo.zoo.startup"
    assert finders.split().count("ZooFinder") == 1
    modules, finders = run("-S", "-c", code, cwd=tmp_path, SB3_MBPO_NO_ZOO="1").splitlines()
    assert "ZooFinder" not in finders
    assert "ZooFinder" in run("-S", "-c", code, cwd=tmp_path, SB3_MBPO_NO_ZOO="")


def test_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which may have run the start-up line already."""
    spec = importlib.util.spec_from_file_location("startup_again", ROOT / "sb3_mbpo/zoo/startup.py")
    assert spec is not None and spec.loader is not None
    startup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(startup)
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if type(each).__name__ != "ZooFinder"])
    others = list(sys.meta_path)
    monkeypatch.setenv("SB3_MBPO_NO_ZOO", "1")
    startup.install()
    assert sys.meta_path == others
    monkeypatch.delenv("SB3_MBPO_NO_ZOO")
    startup.install()
    startup.install()
    finder, *rest = sys.meta_path
    assert rest == others and finder.find_spec("json", None) is None

    def load(name: str) -> Any:
        spec = finder.find_spec(name, [str(ZOO)])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    assert load("rl_zoo3.utils").ALGOS["mbpo"] is MBPO
    assert finder.find_spec("rl_zoo3.utils", []) is None
    monkeypatch.setitem(REGISTRATIONS, "rl_zoo3.utils", lambda module: {}["no such luck"])
    with pytest.warns(UserWarning, match="could not register MBPO with rl_zoo3.utils.*'no such luck'.*SB3_MBPO_NO_ZOO=1"):
        assert "mbpo" not in load("rl_zoo3.utils").ALGOS


def test_zoo_after_startup(tmp_path: Path) -> None:
    arguments = ("-c", AFTER_STARTUP, "rl_zoo3.train", "--help")
    assert "ppo_lstm,mbpo,dhmbpo}" in run(*arguments, cwd=tmp_path)
    assert "mbpo" not in run(*arguments, cwd=tmp_path, SB3_MBPO_NO_ZOO="1")


def test_reloaded_zoo(tmp_path: Path) -> None:
    code = """
import sb3_mbpo.zoo.startup; sb3_mbpo.zoo.startup.install()
import importlib, rl_zoo3.utils, rl_zoo3.hyperparams_opt, rl_zoo3.exp_manager as exp_manager
for module in (rl_zoo3.utils, rl_zoo3.hyperparams_opt, exp_manager):
    importlib.reload(module)
assert "mbpo" in rl_zoo3.utils.ALGOS and "mbpo" in rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER
assert exp_manager.ExperimentManager.read_hyperparameters.__module__ == "sb3_mbpo.zoo.registration"
"""
    run("-W", "error::UserWarning", "-c", code, cwd=tmp_path)


def test_broken_mbpo_is_warned_of_and_left_out(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sb3_mbpo", tmp_path / "sb3_mbpo", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sb3_mbpo/mbpo/mbpo.py").write_text("raise RuntimeError('no such luck')")
    output = run("-c", AFTER_STARTUP, "rl_zoo3.train", "--help", cwd=tmp_path, path=str(tmp_path))
    assert "ppo_lstm}" in output and "mbpo}" not in output
    assert output.count("UserWarning: sb3_mbpo could not register MBPO with rl_zoo3.utils") == 1
    assert "RuntimeError('no such luck')" in output and "SB3_MBPO_NO_ZOO" in output
    # whoever names sb3_mbpo is told
    result = start("-m", "sb3_mbpo.zoo", "train", "--help", cwd=tmp_path, path=tmp_path)
    assert result.returncode == 1 and "RuntimeError: no such luck" in result.stdout.splitlines()[-1]


def test_broken_zoo_fails_as_without_mbpo(tmp_path: Path) -> None:
    (tmp_path / "rl_zoo3").mkdir()
    (tmp_path / "rl_zoo3/__init__.py").touch()
    (tmp_path / "rl_zoo3/train.py").write_text("import rl_zoo3.utils")
    result = start("-c", AFTER_STARTUP, "rl_zoo3.train", cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "ModuleNotFoundError: No module named 'rl_zoo3.utils'"
    (tmp_path / "rl_zoo3/utils.py").write_text("raise RuntimeError('no such luck')")
    result = start("-c", AFTER_STARTUP, "rl_zoo3.train", cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "RuntimeError: no such luck"
    assert result.returncode == 1 and "could not register" not in result.stdout


def test_main_says_what_it_needs(tmp_path: Path) -> None:
    for arguments in ([], ["no_such_script"]):
        result = start("-m", "sb3_mbpo.zoo", *arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stdout.startswith("usage: python -m sb3_mbpo.zoo script [arguments of the script]")
    assert "'no_such_script'" in result.stdout and "record_video" in result.stdout
    assert "--algo mbpo" in run("-m", "sb3_mbpo.zoo", "--help", cwd=tmp_path)
    without_site_packages = start("-S", "-m", "sb3_mbpo.zoo", "train", cwd=tmp_path)
    assert without_site_packages.returncode == 1
    assert without_site_packages.stdout.strip().endswith('pip install "sb3-mbpo[zoo]"')
