"""
Whether the model can be trusted: as functions of a trained agent, as a callback for TensorBoard, and as commands
(``python -m sb3_mbpo.diagnostics --help``).
"""

from sb3_mbpo.diagnostics.callback import DiagnosticsCallback
from sb3_mbpo.diagnostics.exploitation import Returns, returns
from sb3_mbpo.diagnostics.open_loop import Replay, error_by_step, replay
from sb3_mbpo.diagnostics.policy_shift import PolicyShift, continued, policy_shift
from sb3_mbpo.diagnostics.terminations import Terminations, terminations
from sb3_mbpo.diagnostics.trajectories import collect
from sb3_mbpo.diagnostics.values import ValueCheck, value_check

__all__ = [
    "DiagnosticsCallback",
    "PolicyShift",
    "Replay",
    "Returns",
    "Terminations",
    "ValueCheck",
    "collect",
    "continued",
    "error_by_step",
    "policy_shift",
    "replay",
    "returns",
    "terminations",
    "value_check",
]
