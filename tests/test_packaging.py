"""Real wheels in real virtual environments: what they hold, that RL Zoo knows MBPO, that nothing stays behind."""

import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a build reads: it is done in a copy, for a build inside the repository would leave its traces there
SOURCES = ["LICENSE", "MANIFEST.in", "README.md", "hyperparams", "pyproject.toml", "sb3_mbpo", "setup.py"]
STARTUP_FILES = {"sb3_mbpo.pth", "sb3_mbpo.start"}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """
    :param command: Program and arguments
    :param cwd: Working directory
    :param variables: Additional environment variables
    :return: What the program printed, errors included
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=dist)
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def older_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of an older release, with a module that the present one does not have."""
    older, dist = tmp_path_factory.mktemp("older") / "source", tmp_path_factory.mktemp("older-dist")
    shutil.copytree(source, older)
    (older / "sb3_mbpo/version.txt").write_text("0.0.1\n")
    (older / "sb3_mbpo/zoo/old.py").touch()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", dist, older, cwd=dist)
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a new virtual environment, which borrows the packages of the one that runs the tests."""
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    interpreter = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    borrowed = "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site_packages(interpreter) / "borrowed.pth").write_text(borrowed)
    return interpreter


def site_packages(python: Path) -> Path:
    """
    :param python: Interpreter
    :return: Where its packages are installed
    """
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=python.parent).strip())


def modules_at_start(python: Path) -> set[str]:
    """
    :param python: Interpreter
    :return: The modules that it loads when it starts
    """
    return set(run(python, "-c", "import sys; print(*sys.modules)", cwd=python.parent).split())


def names_in(wheel: Path) -> set[str]:
    """
    :param wheel: A wheel
    :return: The names of the files in it
    """
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


# It downloads Gym, which is in no extra: it warns of itself wherever it is installed
@pytest.mark.slow
def test_environment_of_openai_gym(tmp_path: Path) -> None:
    """SB3 wraps it if Gym and shimmy are installed."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        tmp_path,
        "gym==0.26.2",
        "gym-notices==0.0.8",
    ]
    run(*pip, "shimmy>=2", cwd=tmp_path)
    code = """
import gym, numpy as np
from sb3_mbpo import MBPO

class Old(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}
    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}

agent = MBPO("MlpPolicy", Old(), buffer_size=100, learning_starts=10, model_gradient_steps=0.1, gradient_steps=1)
print(agent.learn(20)._n_updates)
"""
    python_path = os.pathsep.join([str(ROOT), str(tmp_path)])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": python_path},
        text=True,
        capture_output=True,
    )
    assert result.stdout.split()[-1] == "10", result.stderr


def test_wheel_contents(wheel: Path) -> None:
    names = names_in(wheel)
    version = (ROOT / "sb3_mbpo/version.txt").read_text().strip()
    assert {name.split("/")[0] for name in names} == {"sb3_mbpo", f"sb3_mbpo-{version}.dist-info", *STARTUP_FILES}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("sb3_mbpo/**/*.py")}
    data = {f"sb3_mbpo/{name}" for name in ("py.typed", "version.txt", "diagnostics/report.html")}
    data |= {f"sb3_mbpo/hyperparams/{algo}.yml" for algo in ("mbpo", "dhmbpo")}
    assert {name for name in names if name.startswith("sb3_mbpo/")} == sources | data


def test_source_distribution_makes_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(direct) as one, zipfile.ZipFile(wheel) as other:
        assert {name: one.read(name) for name in one.namelist()} == {name: other.read(name) for name in other.namelist()}


def test_startup_files_name_the_same_function() -> None:
    from sb3_mbpo.zoo.startup import install

    (entry_point,) = (ROOT / "sb3_mbpo/zoo/sb3_mbpo.start").read_text().splitlines()
    assert pkgutil.resolve_name(entry_point) is install
    (line,) = (ROOT / "sb3_mbpo/zoo/sb3_mbpo.pth").read_text().splitlines()
    assert line == "import sb3_mbpo.zoo.startup; sb3_mbpo.zoo.startup.install()"


@pytest.mark.parametrize("mode", ["wheel", "editable", "editable-strict"])
def test_install_use_uninstall(mode: str, source: Path, wheel: Path, python: Path, tmp_path: Path) -> None:
    packages = site_packages(python)
    files_before, modules_before = set(packages.rglob("*")), modules_at_start(python)
    what = {
        "wheel": [str(wheel)],
        "editable": ["--editable", str(source)],
        "editable-strict": ["--config-settings", "editable_mode=strict", "--editable", str(source)],
    }[mode]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    # --ignore-installed: whether the borrowed packages hold sb3-mbpo is of no interest
    run(*pip, "install", "--ignore-installed", "--no-deps", "--no-build-isolation", *what, cwd=tmp_path)
    assert {path.name for path in packages.iterdir()} >= STARTUP_FILES

    # the start-up line works, and the interpreter starts without what would slow it down
    modules = modules_at_start(python)
    assert {"sb3_mbpo", "sb3_mbpo.zoo", "sb3_mbpo.zoo.startup"} <= modules
    assert not {"torch", "numpy", "rl_zoo3", "sb3_mbpo.mbpo", "sb3_mbpo.zoo.registration"} & modules
    if mode == "wheel":  # setuptools' own finder for editable installs imports more
        assert modules - modules_before == {"sb3_mbpo", "sb3_mbpo.zoo", "sb3_mbpo.zoo.startup"}

    # the zoo, started from another folder, knows MBPO, unless the user does not want that
    choices = [line for line in run(python, "-m", "rl_zoo3.train", "--help", cwd=tmp_path).splitlines() if "{a2c," in line]
    assert choices and all("mbpo" in line for line in choices)
    assert "mbpo" not in run(python, "-m", "rl_zoo3.train", "--help", cwd=tmp_path, SB3_MBPO_NO_ZOO="1")
    code = "from sb3_mbpo.zoo.registration import hyperparams_file; print(hyperparams_file('mbpo').read_text())"
    assert run(python, "-c", code, cwd=tmp_path).strip() == (ROOT / "hyperparams/mbpo.yml").read_text().strip()

    if mode == "wheel":  # the other modes leave the sources where they are
        assert (packages / "sb3_mbpo/zoo/__pycache__").is_dir()
    run(*pip, "uninstall", "--yes", "sb3-mbpo", cwd=tmp_path)
    assert set(packages.rglob("*")) == files_before
    assert modules_at_start(python) == modules_before


def test_upgrade(older_wheel: Path, wheel: Path, python: Path, tmp_path: Path) -> None:
    """Over an older wheel, from the source distribution."""
    packages = site_packages(python)
    files_before = set(packages.rglob("*"))
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--no-deps", "--no-build-isolation"]
    version = [python, "-c", "import sb3_mbpo; print(sb3_mbpo.__version__)"]
    run(*install, "--ignore-installed", older_wheel, cwd=tmp_path)
    run(python, "-c", "import sb3_mbpo.zoo.old", cwd=tmp_path)
    assert run(*version, cwd=tmp_path).strip() == "0.0.1"
    assert len(list(packages.rglob("old*"))) == 2  # the module, and what the interpreter made of it

    (sdist,) = wheel.parent.glob("*.tar.gz")
    run(*install, "--upgrade", sdist, cwd=tmp_path)
    assert run(*version, cwd=tmp_path).strip() == (ROOT / "sb3_mbpo/version.txt").read_text().strip()
    assert not list(packages.rglob("old*")) and len(list(packages.glob("sb3_mbpo*.dist-info"))) == 1
    installed = {path.relative_to(packages).as_posix() for path in packages.rglob("*")}
    assert {name for name in names_in(wheel) if not name.endswith("RECORD")} <= installed
    assert "sb3_mbpo.zoo.startup" in modules_at_start(python)

    run(*pip, "uninstall", "--yes", "sb3-mbpo", cwd=tmp_path)
    assert set(packages.rglob("*")) == files_before
