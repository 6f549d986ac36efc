"""Commands on a trained agent, and the report in a browser."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.diagnostics import __main__ as commands
from sb3_mbpo.diagnostics import collect
from sb3_mbpo.diagnostics.__main__ import Measured, main, parser
from tests.agents import make_agent

# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files of a small agent in Hopper, whose episodes end."""
    folder = tmp_path_factory.mktemp("trained")
    agent = make_agent("Hopper-v5", learning_starts=400, model_train_freq=200).learn(650)
    agent.save(folder / "agent")
    agent.save_replay_buffer(folder / "buffer")
    agent.train(50, agent.batch_size)
    agent.save(folder / "later")
    return folder


COMMON = ["--env", "Hopper-v5", "--steps", "300", "--return-horizon", "20", "--horizon", "4"]


def test_commands_in_another_process(trained, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sb3_mbpo.diagnostics",
        "open-loop",
        str(trained / "agent.zip"),
        *COMMON,
        "--out",
        "figures",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.split() and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"] and all(np.isfinite(float(value)) for row in rows for value in row)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"open_loop.png", "dimensions.png", "replay.png"}


def test_exploitation_and_policy_shift(trained, tmp_path, capsys):
    main(["exploitation", str(trained / "agent.zip"), *COMMON, "--out", str(tmp_path)])
    assert "Return of 20 steps from" in capsys.readouterr().out
    shift = ["policy-shift", str(trained / "agent.zip"), *COMMON, "--out", str(tmp_path), "--data-sizes", "100", "300"]
    main([*shift, "--replay-buffer", str(trained / "buffer.pkl")])
    printed = capsys.readouterr().out
    assert "d error / d policy shift:" in printed and "error, 300" in printed
    main([*shift, "--later", str(trained / "later.zip")])
    assert {path.name for path in tmp_path.iterdir()} == {"exploitation.png", "policy_shift.png"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["policy-shift", "{agent}", "--env", "Hopper-v5", "--steps", "50"], "needs --replay-buffer"),
        (["report", "{agent}", "--env", "Hopper-v5", "--steps", "50", "--policy-shift"], "needs --replay-buffer"),
        (["open-loop", "{agent}", "--env", "Walker2d-v5"], "Observation spaces do not match"),
        (["open-loop", "nothing.zip", "--env", "Hopper-v5"], "neither a file"),
        (["open-loop", "{agent}", "--env", "Nonsense-v0"], "Nonsense"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--env-kwargs", '{"nope": 1}'], "env-kwargs .*nope"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--gym-packages", "nopkg"], "nopkg"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--replay-buffer", "missing.pkl"], "There is no file missing.pkl$"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--vec-normalize", "{buffer}"], "no statistics of VecNormalize"),
        (["open-loop", "{agent}", "--env", "Hopper-v5", "--out", "{agent}"], "exists"),
    ],
)
def test_errors_of_commands(trained, tmp_path, arguments, message):
    files = {"{agent}": trained / "agent.zip", "{buffer}": trained / "buffer.pkl"}
    arguments = [str(files.get(argument, argument)) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        main(arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path)])


@pytest.mark.parametrize("argument", ["--steps", "--horizon", "--return-horizon", "--data-sizes", "--columns", "--seed"])
def test_numbers_of_commands(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["open-loop", "agent.zip", "--env", "Hopper-v5", argument, "-1"])
    assert f"argument {argument}: must be" in capsys.readouterr().err


def test_measured_on_episodes_that_no_agent_was_trained_on(tmp_path):
    """Loading an agent seeds all with its own seed: neither it nor a later agent may do so before episodes begin."""
    agent = make_agent("Pendulum-v1", seed=0).learn(450)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer")
    arguments = ["policy-shift", str(tmp_path / "agent.zip"), "--env", "Pendulum-v1", "--steps", "300"]
    starts = {}
    for seed in ("0", "0", "1"):
        more = ["--later", str(tmp_path / "agent.zip"), "--seed", seed]
        measured = Measured(parser().parse_args([*arguments, *more]))
        rows = [tuple(trajectory.obs[0].tolist()) for trajectory in measured.trajectories]
        # Also those that are collected afterwards
        rows += [tuple(trajectory.obs[0].tolist()) for trajectory in collect(measured.agent, measured.env, 300)]
        assert starts.setdefault(seed, rows) == rows and len(set(rows)) == 4
    known = {tuple(row) for row in agent.replay_buffer.observations[:450, 0].tolist()}
    assert not (set(starts["0"]) | set(starts["1"])) & known and not set(starts["0"]) & set(starts["1"])


def test_statistics_that_are_forgotten(tmp_path):
    """The policy would see raw numbers."""
    agent = make_agent(VecNormalize(make_vec_env("Pendulum-v1"))).learn(70)
    agent.save(tmp_path / "agent")
    with pytest.raises(SystemExit, match="was trained in VecNormalize: pass its statistics with --vec-normalize"):
        main(["open-loop", str(tmp_path / "agent.zip"), "--env", "Pendulum-v1", "--out", str(tmp_path)])


def test_statistics_of_later_agents(trained):
    """There is one file for them all, which would make policies that never were."""
    both = ["--later", str(trained / "later.zip"), "--vec-normalize", str(trained / "buffer.pkl")]
    with pytest.raises(SystemExit, match="--later does not go with --vec-normalize"):
        main(["policy-shift", str(trained / "agent.zip"), *COMMON, *both])


@pytest.mark.parametrize("normalize", [False, True])
def test_an_agent_that_was_trained_in_two_environments(normalize, tmp_path):
    """Its replay buffer has a column for each."""
    env = make_vec_env("Pendulum-v1", n_envs=2)
    env = VecNormalize(env) if normalize else env
    agent = make_agent(env).learn(140)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer")
    more = ["--replay-buffer", str(tmp_path / "buffer.pkl")]
    if normalize:
        env.save(str(tmp_path / "normalize.pkl"))
        more += ["--vec-normalize", str(tmp_path / "normalize.pkl")]
    arguments = [str(tmp_path / "agent"), "--env", "Pendulum-v1", "--steps", "100", "--data-sizes", "100"]
    main(["policy-shift", *arguments, *more, "--out", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "policy_shift.png").stat().st_size > 10_000


def test_a_model_that_was_never_trained(tmp_path):
    make_agent().save(tmp_path / "agent")
    with pytest.raises(SystemExit, match="has not been trained yet"):
        main(["open-loop", str(tmp_path / "agent"), "--env", "Pendulum-v1", "--out", str(tmp_path)])


def test_vec_normalize_and_environment_arguments(tmp_path):
    env = VecNormalize(make_vec_env("Pendulum-v1", env_kwargs={"g": 5.0}))
    agent = make_agent(env).learn(70)
    agent.save(tmp_path / "agent")
    env.save(str(tmp_path / "normalize.pkl"))
    arguments = ["--env", "Pendulum-v1", "--env-kwargs", json.dumps({"g": 5.0}), "--steps", "200"]
    main(
        [
            "open-loop",
            str(tmp_path / "agent"),
            *arguments,
            "--vec-normalize",
            str(tmp_path / "normalize.pkl"),
            "--out",
            str(tmp_path),
        ]
    )
    assert (tmp_path / "replay.png").stat().st_size > 10_000


# --- The report, in a browser ----------------------------------------------------------------------------------------


def browser():
    """Chromium or Chrome, from the system."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    raise FileNotFoundError("This test opens a page in a browser: install chromium (Debian: apt-get install chromium)")


@pytest.mark.parametrize("with_buffer", [True, False])
def test_report_in_a_browser(trained, tmp_path, with_buffer):
    """Complete in itself, and legible on a telephone."""
    from playwright.sync_api import sync_playwright

    more = (
        ["--replay-buffer", str(trained / "buffer.pkl"), "--data-sizes", "100", "300", "--policy-shift"] if with_buffer else []
    )
    main(["report", str(trained / "agent.zip"), *COMMON, "--out", str(tmp_path), *more])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        for width, height in ((390, 844), (1280, 800)):
            page = chromium.new_page(viewport={"width": width, "height": height})
            problems, requests = [], []
            page.on("pageerror", lambda error, problems=problems: problems.append(error))
            page.on("console", lambda message, problems=problems: problems.append(message.text))
            page.on("request", lambda request, requests=requests: requests.append(request.url))
            page.goto(Path(tmp_path / "report.html").as_uri())
            assert problems == [] and all(url.startswith(("file:", "data:")) for url in requests)
            # Nothing sticks out
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            sizes = page.eval_on_selector_all("img", "images => images.map(image => [image.naturalWidth, image.clientWidth])")
            assert len(sizes) == 5 + with_buffer and all(natural > 0 for natural, _ in sizes)
            # The figures' letters of 10 points are at least 8 pixels high
            assert all(10 * shown / (4.2 * 72) >= 8 for _, shown in sizes)
            text = page.inner_text("body")
            assert "Does it see where episodes end?" in text
            assert "median R²" in text and "nan" not in text.lower().replace("nanos", "")
            assert ("k* =" in text) == with_buffer and ("It takes minutes" in text) != with_buffer
        chromium.close()


def test_report_is_written_as_it_goes(trained, tmp_path, monkeypatch, capsys):
    def stopped(measured):
        raise KeyboardInterrupt

    parts = [(name, question, stopped if name == "Values" else part) for name, question, part in commands.PARTS]
    monkeypatch.setattr(commands, "PARTS", parts)
    with pytest.raises(KeyboardInterrupt):
        main(["report", str(trained / "agent.zip"), *COMMON, "--out", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "Does the policy exploit the model?" in page and "Does it see where episodes end?" in page
    assert "</html>" in page and "Are Q-values right?" not in page
    assert [line[:3] for line in capsys.readouterr().out.splitlines() if line[1:3] == "/5"] == ["1/5", "2/5", "3/5", "4/5"]


def test_report_of_a_reward_that_does_not_vary(tmp_path, capsys):
    """InvertedPendulum, as long as it stands: neither words nor letters in figures say nan."""
    import base64
    import re

    agent = make_agent("InvertedPendulum-v5", learning_starts=100).learn(160)
    agent.save(tmp_path / "agent")
    arguments = [str(tmp_path / "agent.zip"), "--env", "InvertedPendulum-v5", "--steps", "5", "--return-horizon", "2"]
    main(["report", *arguments, "--horizon", "2", "--out", str(tmp_path)])
    main(["open-loop", *arguments, "--horizon", "2", "--out", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    figures = [base64.b64decode(data).decode() for data in re.findall(r"svg\+xml;base64,([^\"]+)", page)]
    # Matplotlib draws letters as paths, and says in a comment which
    assert len(figures) >= 4 and "The reward did not vary" in page
    assert not any("<!-- nan" in figure.lower() or "correlation nan" in figure for figure in figures)
    assert "R² nan" not in page and not re.search(r"\bnan\b", capsys.readouterr().out)
