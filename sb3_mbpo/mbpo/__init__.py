"""MBPO (Janner et al. 2019): the algorithm and what is its own."""

from sb3_mbpo.mbpo.mbpo import MBPO, MlpPolicy, MultiInputPolicy

__all__ = ["MBPO", "MlpPolicy", "MultiInputPolicy"]
