"""
What ``sb3_mbpo.pth`` (Python 3.15 and later: ``sb3_mbpo.start``, PEP 829) runs at every start of an interpreter.

It only leaves a finder on ``sys.meta_path``, which does nothing until RL Zoo is imported, and it must stay cheap:
no import here but ``os`` and ``sys``, which every interpreter has loaded anyway.
Set the environment variable ``SB3_MBPO_NO_ZOO`` to switch it off.
"""

import os
import sys

TYPE_CHECKING = False  # what type checkers take for true, without the cost of importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

OPT_OUT = "SB3_MBPO_NO_ZOO"
ZOO_MODULES = frozenset({"rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"})


class ZooFinder:
    """Has MBPO registered with the modules of RL Zoo right after they are executed; finds nothing by itself."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """
        :param name: Full name of the module that is being imported
        :param path: ``__path__`` of its package
        :param target: The module that is being reloaded, if any
        :return: The spec that the other finders find, made to register MBPO, for a module of RL Zoo; else None
        """
        if name not in ZOO_MODULES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: "ModuleType") -> None:
                loader.exec_module = execute
                execute(module)
                _register(module)

            loader.exec_module = execute_and_register
        return spec


def _register(module: "ModuleType") -> None:
    # whatever is wrong with MBPO, the zoo's other algorithms must go on working
    try:
        from sb3_mbpo.zoo.registration import REGISTRATIONS

        REGISTRATIONS[module.__name__](module)
    except Exception as error:
        import warnings

        warnings.warn(
            f"sb3_mbpo could not register MBPO with {module.__name__}, which goes on without it: {error!r}"
            f" (set {OPT_OUT}=1 to stop sb3_mbpo from trying)",
            stacklevel=2,
        )


def install() -> None:
    """Put the finder before all others, once, unless the environment variable ``SB3_MBPO_NO_ZOO`` is set."""
    if not os.environ.get(OPT_OUT) and not any(isinstance(finder, ZooFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ZooFinder())
