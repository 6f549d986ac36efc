"""Compiling a function of tensors to one graph with ``torch.compile``."""

import functools
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch as th

Function = TypeVar("Function", bound=Callable[..., Any])

# Graphs of one function in one process: each size of networks and batches has its own. torch gives up after 8.
MAX_GRAPHS = 256


@functools.cache
def compiled(function: Function, device_type: str) -> Function:
    """
    :param function: Of tensors, and of modules and named tuples with tensors in them
    :param device_type: Where the tensors will be, "cpu" for instance
    :return: The same function, which is compiled when it is called with arguments of new shapes, other types, or with
        another number of threads. That takes 10 to 30 s and a compiler, or some seconds if torch finds the graph in its cache
        on disk.
    """
    th._dynamo.config.recompile_limit = max(th._dynamo.config.recompile_limit, MAX_GRAPHS)
    # The code between the kernels in C++ too: 5 % faster. On a GPU this would need the CUDA toolkit.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp_wrapper": True} if device_type == "cpu" else {}
    return th.compile(function, fullgraph=True, dynamic=False, options=options)  # type: ignore[return-value]


def why_not(attempt: Callable[[], None]) -> str | None:
    """
    :param attempt: Calls a compiled function
    :return: Why torch cannot compile it here (no C++ compiler, for instance), None if it can
    """
    for switch in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(switch) == "1":
            return f"{switch} is set"
    if threading.current_thread() is not threading.main_thread():
        return "torch.compile does not work in threads"
    try:
        with warnings.catch_warnings():
            # About torch's own use of torch, on its first compilation
            warnings.simplefilter("ignore", DeprecationWarning)
            attempt()
    # Whatever stops the compiler (a missing header, a full disk, a version of Python): the uncompiled way does not need it
    except Exception as error:
        return f"torch.compile failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None
