"""What measured numbers depend on: processor, versions, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import sb3_mbpo


def processor() -> str:
    """
    :return: Name of the processor and number of cores
    """
    name = platform.processor() or platform.machine()
    if (path := Path("/proc/cpuinfo")).exists():
        name = next((line.split(":")[1].strip() for line in path.read_text().splitlines() if "model name" in line), name)
    return f"{name}, {os.cpu_count()} cores"


def installed(package: str) -> str:
    """
    :param package: Name of a distribution
    :return: Its version, or "not installed"
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """
    :return: Short hash of the commit that this folder is at, with a "+" if files that git tracks were changed since; empty
        outside of a checkout, or if another ``sb3_mbpo`` is in use than that of the checkout
    """
    here = Path(__file__).parent
    if Path(sb3_mbpo.__file__).resolve().parents[1] != here.resolve().parent:
        return ""
    try:
        answers = [
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (
                ["rev-parse", "--short=10", "HEAD"],
                # What a run itself writes is no change
                ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results"],
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answers[0] + ("+" if answers[1] else "")
