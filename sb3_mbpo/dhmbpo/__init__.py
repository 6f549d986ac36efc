"""DHMBPO (Kubo et al. 2025): the algorithm, its networks and its updates."""

from sb3_mbpo.dhmbpo.dhmbpo import DHMBPO
from sb3_mbpo.dhmbpo.policies import DHMBPOPolicy, MultiInputPolicy

__all__ = ["DHMBPO", "DHMBPOPolicy", "MultiInputPolicy"]
