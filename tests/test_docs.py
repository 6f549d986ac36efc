"""
The documentation: it is built without a warning, and every block of code in it and in the README is run.

A page is a test. Its blocks run from top to bottom, as a reader would type them, in one folder and, if they are Python, in one
namespace. A block that no rule here covers fails.

- Python is executed.
- Of bash, ``python -c``, the example, the diagnostics and the scripts of RL Zoo are executed; the latter two inside this
  process, after the registration that the start-up file would have caused (tests/test_packaging.py has the real one).
  **Only checked** are installations (``pip install``: that the extras and the files exist; ``python -m venv``), and
  ``pytest``, ``make`` and the runs of benchmarks, which tests/test_benchmarks.py has (that options and targets exist).
- YAML names its file in its first line. It is written there, and a later command must use it.

What would train for hours is executed for real, but small, and without a trace of it in the text: the arguments of the
constructor that make an agent expensive are cut to `LIMITS`, `learn` ends after `MAX_STEPS`, nothing is compiled, and commands
get the options in `SMALL_OPTIONS` after their own. Whatever is run must train its model and its policy nonetheless.
"""

import ast
import functools
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from stable_baselines3 import SAC
from stable_baselines3.common.utils import set_random_seed

from benchmarks.__main__ import main as benchmarks
from benchmarks.__main__ import parser as benchmarks_parser
from benchmarks.suites import algorithms, runs
from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.common.model_based import ModelBasedSAC
from sb3_mbpo.diagnostics.__main__ import main as diagnostics
from sb3_mbpo.zoo.registration import register
from tests.test_logging import KEYS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Tables that pages include are no pages
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *DOCS.rglob("*.md")] if "_static" not in path.parts
)

MAX_STEPS = 90
LIMITS = dict(
    buffer_size=1_000,
    learning_starts=60,
    batch_size=32,
    gradient_steps=1,
    model_hidden_sizes=(16, 16),
    ensemble_size=3,
    num_elites=2,
    model_train_freq=20,
    model_gradient_steps=0.3,
    rollout_batch_size=200,
    rollout_schedule=(60, 90, 1, 3),
    train_freq=50,
    training_horizon=2,
    distribution_horizon=3,
)
NET_ARCH = [16, 16]

# Options of a command that are given again, smaller, and those that it gets in any case
SMALL_OPTIONS = {
    "-n": "90",
    "--eval-freq": "45",
    "--save-freq": "45",
    "--n-trials": "1",
    "--n-evaluations": "2",
    "--trial-id": "0",
}
ALWAYS = {
    "train": ["-n", "90", "--device", "cpu", "--num-threads", "1", "--eval-episodes", "1"],
    "enjoy": ["-n", "20", "--no-render", "--num-threads", "1"],
}

SMALL_DIAGNOSTICS = ["--steps", "150", "--return-horizon", "10", "--horizon", "3", "--data-sizes", "50", "100"]

pytestmark = [
    # What is recommended must not be warned of
    pytest.mark.filterwarnings("error::UserWarning"),
    # Of modules of the zoo that are run as scripts, and of its progress bar
    pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:rich is experimental"),
]


# --- Small agents -----------------------------------------------------------------------------------------------------


def smaller(value: Any, limit: Any) -> Any:
    """
    The smaller of two numbers, or of each two in lists; words stay; what is no number (no limit, a function) gives the limit.
    """
    if isinstance(value, str):
        return value
    if isinstance(limit, tuple):
        return [smaller(*pair) for pair in zip(value, limit, strict=False)]
    return min(value, limit) if isinstance(value, int | float) else limit


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that learn in a second, the same in each run: models as small as these deserve a warning now and then."""
    set_random_seed(0)
    for algorithm in (MBPO, DHMBPO):
        make_small(algorithm, monkeypatch)


def make_small(algorithm: type[ModelBasedSAC], monkeypatch: pytest.MonkeyPatch) -> None:
    init, learn = algorithm.__init__, algorithm.learn

    @functools.wraps(init)
    def small_init(self: ModelBasedSAC, *args: Any, **kwargs: Any) -> None:
        call = inspect.signature(init).bind(self, *args, **kwargs)
        call.apply_defaults()
        arguments = call.arguments
        for name in LIMITS.keys() & arguments.keys():
            arguments[name] = smaller(arguments[name], LIMITS[name])
        arguments["policy_kwargs"] = {**(arguments["policy_kwargs"] or {}), "net_arch": NET_ARCH}
        arguments["compile"] = False
        arguments["seed"] = 0 if arguments["seed"] is None else arguments["seed"]
        init(*call.args, **call.kwargs)

    @functools.wraps(learn)
    def short_learn(self: ModelBasedSAC, total_timesteps: int = 50_000, *args: Any, **kwargs: Any) -> ModelBasedSAC:
        learn(self, min(total_timesteps, MAX_STEPS), *args, **kwargs)
        assert self.dynamics.is_fitted and self._n_updates > 0
        return self

    monkeypatch.setattr(algorithm, "__init__", small_init)
    monkeypatch.setattr(algorithm, "learn", short_learn)


# --- Blocks -----------------------------------------------------------------------------------------------------------


class Reader:
    """
    Does what a page says.

    :param page: The page, relative to the repository
    """

    def __init__(self, page: str) -> None:
        self.page = page
        # Functions that are defined here are pickled as those of a script
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.unused_files: set[str] = set()

    def read(self) -> int:
        """
        :return: Number of blocks
        """
        rules: dict[str, Callable[[str, int], None]] = {"python": self.python, "bash": self.bash, "yaml": self.yaml}
        n_blocks = 0
        for token in MarkdownIt().enable("table").parse((ROOT / self.page).read_text(encoding="utf-8")):
            if token.type not in ("fence", "code_block"):
                continue
            assert token.map is not None
            line = token.map[0] + 2
            # What MyST makes something else of
            if token.info.startswith("{"):
                assert token.info.split("}")[0][1:] in ("toctree", "include", "eval-rst", "raw"), f"{self.page}:{line}"
                continue
            assert token.type == "fence" and token.info in rules, f"{self.page}:{line}: no rule for {token.info!r}"
            rules[token.info](token.content, line)
            n_blocks += 1
        assert not self.unused_files, f"{self.page} shows files that nothing uses"
        return n_blocks

    def python(self, code: str, line: int) -> None:
        """Execute it; in a traceback, line numbers are those of the page."""
        exec(compile("\n" * (line - 1) + code, str(ROOT / self.page), "exec"), self.namespace)

    def yaml(self, code: str, line: int) -> None:
        """Write it to the file that its first line names."""
        name = re.match(r"# ([\w.-]+\.yml)\n", code)
        assert name is not None, f"{self.page}:{line}: no file name in the first line"
        assert yaml.safe_load(code)
        Path(name[1]).write_text(code)
        self.unused_files.add(name[1])

    def bash(self, code: str, line: int) -> None:
        """Run its commands one after the other."""
        for text in code.replace("\\\n", " ").splitlines():
            words = shlex.split(text, comments=True)
            assert not {";", "|", "&", ">", "<", "||"} & set(words), f"{self.page}:{line}: {text}"
            for command in " ".join(map(shlex.quote, words)).split(" '&&' "):
                if command:
                    print("$", command)
                    self.command(shlex.split(command))

    def command(self, words: list[str]) -> None:
        """:param words: A single command"""
        self.unused_files -= set(words)
        with pytest.MonkeyPatch.context() as patch:
            while "=" in words[0]:
                patch.setenv(*words.pop(0).split("=", 1))
            match [Path(words[0]).name, *words[1:]]:
                case ["python" | "python3", "-m", "venv", _]:
                    pass
                case ["pip", "install", *arguments]:
                    check_installation(arguments)
                case ["pip", "uninstall", "sb3-mbpo"]:
                    pass
                case ["make", *targets]:
                    check_targets(targets)
                case ["python", "-m", "pytest", *options]:
                    assert set(options) <= {"--cov", "-n", "0"}, options
                case ["python", "-c", code]:
                    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
                case ["python", "-m", "benchmarks.speed" | "benchmarks.model" as module, *options]:
                    check_options(module.replace(".", "/") + ".py", options)
                case ["python", "-m", "benchmarks", "run", *options]:
                    check_runs(options)
                case ["python", "-m", "benchmarks", "report", *options]:
                    patch.setattr(sys, "argv", ["benchmarks", "report", *options])
                    benchmarks()
                case ["python", script] if script.startswith("examples/"):
                    runpy.run_path(str(ROOT / script), run_name="__main__")
                case ["python", "-m", "sb3_mbpo.zoo", script, *options]:
                    self.zoo(patch, "sb3_mbpo.zoo", script, options, [script])
                case ["python", "-m", "sb3_mbpo.diagnostics", *options]:
                    diagnostics([*options, *SMALL_DIAGNOSTICS])
                case ["python", "-m", module, *options] if module.startswith("rl_zoo3."):
                    self.zoo(patch, module, module.removeprefix("rl_zoo3."), options, [])
                case _:
                    pytest.fail(f"{self.page}: no rule for the command {words}")

    def zoo(self, patch: pytest.MonkeyPatch, module: str, script: str, options: list[str], first: list[str]) -> None:
        """A script of RL Zoo, small, in this process."""
        again = [word for option, value in SMALL_OPTIONS.items() if option in options for word in (option, value)]
        patch.setattr(sys, "argv", [module, *first, *options, *ALWAYS[script], *again])
        runpy.run_module(module, run_name="__main__")


def check_installation(arguments: list[str]) -> None:
    """That the files that ``pip install`` is given exist, and the extras of packages, as far as these are installed."""
    words = iter(arguments)
    for word in words:
        if word == "-c":
            assert (ROOT / next(words)).is_file()
        elif word not in ("-e", "-q", "-U"):
            # A clone is the working directory
            requirement = Requirement(re.sub(r"^\.", "sb3-mbpo", word))
            try:
                known = metadata(requirement.name).get_all("Provides-Extra") or []
            except PackageNotFoundError:
                assert not requirement.extras
            else:
                assert requirement.extras <= set(known), word


def check_options(script: str, words: list[str]) -> None:
    """That a script has them."""
    text = (ROOT / script).read_text()
    assert all(f'add_argument("{word}"' in text for word in words if word.startswith("-")), words


def check_runs(options: list[str]) -> None:
    """That a benchmark has these runs."""
    args = benchmarks_parser().parse_args(["run", *options])
    algos = algorithms(args.algos, args.label, args.hyperparams)
    assert runs(args.suite, args.envs, algos, args.seeds, args.steps, args.eval_every, 1, args.runs, args.results)


def check_targets(targets: list[str]) -> None:
    """That the Makefile has them."""
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets and set(targets) <= set(known), targets


@pytest.fixture
def reader_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> Callable[[str], Reader]:
    """A reader in an empty folder."""
    register()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return lambda page: Reader(page)


@pytest.mark.parametrize("page", PAGES)
def test_blocks(page: str, reader_of: Callable[[str], Reader]) -> None:
    n_blocks = reader_of(page).read()
    assert n_blocks == len(re.findall(r"^```(?:python|bash|yaml)$", (ROOT / page).read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "block",
    [
        *("```\nls\n```", "```text\nls\n```", "    ls", "```bash\nls\n```", "```bash\ntrue | ls\n```"),
        *("```bash\nmake nonsense\n```", "```bash\npython -m benchmarks.speed --nonsense\n```"),
        *('```bash\npip install ".[nonsense]"\n```', "```bash\npip install -c nonsense.txt .\n```"),
        *("```yaml\na: 1\n```", "```yaml\n# unused.yml\na: 1\n```"),
        *("```python\n1 / 0\n```", "```{code-block} python\n1 / 0\n```"),
        '```python\nimport warnings\nwarnings.warn("No!")\n```',
    ],
)
def test_what_is_wrong_or_not_covered_fails(block: str, reader_of: Callable[[str], Reader], tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(block + "\n")
    with pytest.raises((AssertionError, ZeroDivisionError, UserWarning, pytest.fail.Exception)):
        reader_of(str(tmp_path / "page.md")).read()


# --- Text -------------------------------------------------------------------------------------------------------------


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_it_is_built_without_warnings(tmp_path: Path) -> None:
    """As ``make doc`` does it."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, DOCS, tmp_path / "html"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    built = {path.relative_to(tmp_path / "html").with_suffix(".md").as_posix() for path in (tmp_path / "html").rglob("*.html")}
    assert {path.removeprefix("docs/") for path in PAGES} - {"README.md"} <= built
    # The diagrams are part of their pages, so that they follow the theme's switch between light and dark
    for page, title in (("how_it_works", "data-flow-title"), ("dhmbpo", "dhmbpo-flow-title")):
        assert f'<title id="{title}">' in (tmp_path / f"html/{page}.html").read_text()


@pytest.mark.parametrize(
    "file, expected",
    [
        (
            "data_flow",
            ("Environment", "replay buffer", "Ensemble", "Model rollouts", "Model buffer", "batch", "SAC", "Policy"),
        ),
        ("dhmbpo_flow", ("Environment", "replay buffer", "Ensemble", "Distribution rollouts", "Training rollouts", "Policy")),
    ],
)
def test_the_diagram_is_a_picture_by_itself(file: str, expected: list[str]) -> None:
    root = xml.etree.ElementTree.parse(DOCS / "_static" / f"{file}.svg").getroot()
    words = " ".join("".join(element.itertext()) for element in root if element.tag.endswith("text"))
    for word in expected:
        assert word in words


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files(page: str) -> None:
    """Sphinx checks those between pages, but nobody those of the README."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text_of(page)):
        assert ((ROOT / page).parent / target).exists(), target


def test_tests_that_are_named_exist() -> None:
    tests = {name for path in ROOT.glob("tests/test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    files = {path.stem for path in ROOT.glob("tests/test_*.py")}
    named = {name for page in PAGES for name in re.findall(r"\btest_\w+", text_of(page))}
    assert named <= tests | files and len(named) > 100


def test_keys_of_the_log() -> None:
    """All that are named are logged, and all of MBPO's own are explained."""
    keys = r"`((?:model|train|time|open_loop|theory)/\w+)`"
    rare = {
        "model/reward_mismatch",
        "model/diverged",
        "train/diverged",
        "model/termination_seen",
        "model/termination_invented",
    }
    of_sac = {"train/actor_loss", "train/critic_loss", "train/ent_coef", "rollout/ep_rew_mean"}
    named = {
        key for page in PAGES for key in re.findall(r"`((?:model|train|time|rollout|open_loop|theory)/\w+)`", text_of(page))
    }
    of_dhmbpo = {"train/alive", "train/q_low", "train/q_high"}
    assert named == KEYS | rare | of_sac | of_dhmbpo
    assert of_dhmbpo <= set(re.findall(keys, text_of("docs/dhmbpo.md")))
    explained = set(re.findall(keys, text_of("docs/environments.md").split("## What to watch")[1]))
    assert explained >= KEYS | rare


def test_every_argument_has_its_section() -> None:
    own = set(inspect.signature(MBPO).parameters) - set(inspect.signature(SAC).parameters)
    pieces = re.split(r"^##+ ", text_of("docs/hyperparameters.md"), flags=re.MULTILINE)
    sections = [piece.split("\n\n", 1) for piece in pieces if "\n\nDefault " in piece]
    names = [name for heading, _ in sections for name in heading.split(", ")]
    assert set(names) == own | {"gradient_steps", "learning_starts", "target_entropy", "batch_size"}
    for heading, body in sections:
        costs, risks = body.partition("\n- **Risks** ")[::2]
        # The latter with the key of the log that shows it
        assert "\n- **Costs** " in costs and re.search(r"`(model|train|rollout)/", risks), heading
        defaults = re.match(r"Default ((?:`[^`]+`|[^\s:]+)(?: and \d+)?)", body)
        assert defaults is not None, heading
        values = [value.strip("`.,") for value in defaults[1].split(" and ")]
        for name, value in zip_longest(heading.split(", "), values, fillvalue=values[-1]):
            value = value.replace(",", "") if value[0].isdigit() else value
            assert ast.literal_eval(value) == inspect.signature(MBPO).parameters[name].default, name


def test_the_papers_values_are_those_of_the_zoo() -> None:
    hyperparams = yaml.safe_load((ROOT / "hyperparams/mbpo.yml").read_text())
    text = text_of("docs/hyperparameters.md")
    table = text.split("| Task |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert len(rows) == 7
    for task, n_steps, gradient_steps, target_entropy, rollout_schedule in rows:
        found: dict[str, Any] = {
            "gradient_steps": int(gradient_steps),
            "target_entropy": float(target_entropy),
            "rollout_schedule": [int(number) for number in rollout_schedule.split(", ")],
        }
        others = re.search(rf"^- {task}: (.+\n(?:  .+\n)*)", text, re.MULTILINE)
        for name, value in re.findall(r"`(\w+)` (\d[\d, ]*)", others[1] if others is not None else ""):
            numbers = [int(number) for number in value.split(", ")]
            found[name] = numbers if len(numbers) > 1 else numbers[0]
        entry = hyperparams[f"{task}-v5"]
        # RL Zoo's training of the first one is shorter, as it needs no more
        steps = 20_000 if task == "InvertedPendulum" else entry["n_timesteps"]
        assert {key: entry[key] for key in entry if key not in ("policy", "n_timesteps", "env_kwargs")} == found
        assert int(n_steps.replace(",", "")) == steps
