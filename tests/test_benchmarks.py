"""The benchmark runs; what it measures is its own business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
def test_speed(tmp_path):
    file = tmp_path / "speed.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed",
        "--sections",
        "updates",
        "model",
        "rollouts",
        "--tasks",
        "Hopper",
        "--rounds",
        "3",
    ]
    result = subprocess.run([*command, "--json", file], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    results = {(each["section"], each["case"]): each for each in json.loads(file.read_text())["results"]}
    for section, case, n_values in (
        ("gradient updates, Hopper", "SB3 SAC", 3),
        ("gradient updates, Hopper", "MBPO", 3),
        ("model training, Hopper", "eager", 3),
        ("model training, Hopper", "compiled", 3),
        ("model rollouts, Hopper", "k = 5", 1),
    ):
        values = results[section, case]["values"]
        assert len(values) == n_values and min(values) > 0 and case in result.stdout
    # The same rate divided by itself
    assert results["gradient updates, Hopper", "SB3 SAC"]["ratio"] == 1
