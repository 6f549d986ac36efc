"""
Model-based reinforcement learning for Stable-Baselines3: MBPO (Janner et al., NeurIPS 2019) and DHMBPO (Kubo et al.,
TMLR 2025).

The names are imported on first use: this file is read at every start of an interpreter that has
the package installed (see ``sb3_mbpo.zoo.startup``), so it must import neither torch nor typing.
"""

TYPE_CHECKING = False  # what type checkers take for true, without the cost of importing typing
if TYPE_CHECKING:
    from sb3_mbpo.dhmbpo import DHMBPO
    from sb3_mbpo.mbpo import MBPO, MlpPolicy, MultiInputPolicy

    __version__: str

__all__ = ["DHMBPO", "MBPO", "MlpPolicy", "MultiInputPolicy"]


def __getattr__(name: str) -> object:
    if name == "DHMBPO":
        import sb3_mbpo.dhmbpo

        return sb3_mbpo.dhmbpo.DHMBPO
    if name in __all__:
        import sb3_mbpo.mbpo

        return getattr(sb3_mbpo.mbpo, name)
    if name == "__version__":
        import os

        with open(os.path.join(os.path.dirname(__file__), "version.txt"), encoding="utf-8") as file:
            return file.read().strip()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
