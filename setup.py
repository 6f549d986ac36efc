from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# Read at the start of every interpreter, if they lie in the root of site-packages (see sb3_mbpo/zoo/startup.py)
STARTUP_FILES = ["sb3_mbpo/zoo/sb3_mbpo.pth", "sb3_mbpo/zoo/sb3_mbpo.start"]

ZOO = [
    "rl_zoo3>=2.9,<3.0",
    # For enjoy and load_from_hub, which import it undeclared
    "requests",
    # For the report of --optimize, which needs it undeclared
    "pandas>=2.2,<3",
    "gymnasium[mujoco]",
    # Progress bar
    "tqdm",
    "rich",
]

DOCS = [
    # The reference of the search space imports it
    "optuna",
    "sphinx>=8.1",
    "furo",
    "myst-parser>=4",
]

DIAGNOSTICS = ["gymnasium[mujoco]", "jinja2", "matplotlib", "tensorboard", "rich"]


BENCHMARKS = [*ZOO, "filelock", "joblib", "matplotlib", "rliable>=1.2"]

# Runs of the benchmark on several machines
CLUSTER = [*BENCHMARKS, "ray>=2.40"]


class BuildWithStartupFiles(build_py):
    """Put the start-up files into the root of the wheel, also of the wheel of an editable install (PEP 660)."""

    def run(self) -> None:
        super().run()
        # What lies in build_lib does not get into an editable wheel, what is "installed" does
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        for file in STARTUP_FILES:
            self.copy_file(file, root)


setup(
    name="sb3-mbpo",
    version=Path("sb3_mbpo/version.txt").read_text().strip(),
    description="Model-based reinforcement learning for Stable-Baselines3: MBPO and DHMBPO",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="sb3_mbpo developers",
    license="MIT",
    keywords="reinforcement-learning model-based-reinforcement-learning mbpo dhmbpo stable-baselines3 pytorch gymnasium",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # The hyperparameters lie at the top of the repository, as in RL Zoo, but are installed inside the package
    packages=[*find_packages(include=["sb3_mbpo", "sb3_mbpo.*"]), "sb3_mbpo.hyperparams"],
    package_dir={"sb3_mbpo.hyperparams": "hyperparams"},
    package_data={"sb3_mbpo": ["py.typed", "version.txt", "diagnostics/report.html"], "sb3_mbpo.hyperparams": ["*.yml"]},
    cmdclass={"build_py": BuildWithStartupFiles},
    python_requires=">=3.10",
    install_requires=[
        "stable-baselines3>=2.9,<3.0",
        "gymnasium>=1.0,<2.0",
        "numpy>=1.20,<3.0",
        "torch>=2.8,<3.0",
        "cloudpickle",
    ],
    extras_require={
        "zoo": ZOO,
        "diagnostics": DIAGNOSTICS,
        "demo": ["gymnasium[mujoco]", "matplotlib", "tqdm", "rich"],
        "benchmarks": [*BENCHMARKS, "sbx-rl>=0.20", "shimmy[dm-control]>=2"],
        "cluster": CLUSTER,
        "docs": DOCS,
        "tests": [
            *ZOO,
            *DOCS,
            *DIAGNOSTICS,
            *CLUSTER,
            # Opens the report in a browser
            "playwright",
            # Finds the blocks of code in the documentation
            "markdown-it-py>=3",
            "packaging",
            # The zoo's plots
            "seaborn",
            "scipy",
            # Tasks of hyperparams/mbpo.yml
            "gymnasium[box2d]",
            "matplotlib",
            "pytest",
            "pytest-cov",
            "pytest-xdist[psutil]",
            "hypothesis",
            "tensorboard",
            # Lint, format, types
            "ruff",
            "mypy",
            "joblib-stubs",
            "pandas-stubs",
            # Wheels
            "build",
            "pip",
            "setuptools>=77",
        ],
    },
)
