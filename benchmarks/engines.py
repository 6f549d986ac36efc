"""Where runs are made: each in a process of this machine, or as a task of a Ray cluster."""

import os
import traceback
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from joblib import Parallel, delayed

from benchmarks.training import Run, train

# How often Ray starts a run again whose worker died
MAX_RETRIES = 20


def attempt(run: Run, launcher: int | None = None) -> str | None:
    """
    :param run: What to train
    :param launcher: Process that started this one, and with which it ends
    :return: Why it failed, if it did: one run that fails stops no other
    """
    try:
        # In its own process there is none
        train(run, launcher if os.getppid() == launcher else None)
    except Exception:
        return traceback.format_exc()
    return None


def local(runs: list[Run], jobs: int) -> Iterable[str | None]:
    """
    :param runs: What to train
    :param jobs: How many at the same time
    :return: For each run why it failed, if it did
    """
    try:
        results: list[str | None] = Parallel(n_jobs=jobs)(delayed(attempt)(run, os.getpid()) for run in runs)
    except BrokenProcessPool as error:
        # Which takes the others with it
        reason = f"{error}\nA process was killed (out of memory?): start the command again"
        return [None if run.is_finished else reason for run in runs]
    return results


def ray(runs: list[Run], address: str | None) -> Iterable[str | None]:
    """
    One task for each run, on any node with as many free cores as it has threads. When its worker dies, another one takes it up
    from its checkpoint; so all nodes must see the folders of checkpoints and results under the same path.

    :param runs: What to train
    :param address: Of the cluster. None: one is started on this machine
    :return: For each run why it failed, if it did
    """
    import ray

    # The nodes have sb3_mbpo installed, not this folder
    with ray.init(address=address, runtime_env={"py_modules": [str(Path(__file__).parent)]}):
        task = ray.remote(attempt)
        tasks = [task.options(num_cpus=run.threads, max_retries=MAX_RETRIES, name=run.name).remote(run) for run in runs]
        results = []
        for each in tasks:
            try:
                results.append(ray.get(each))
            # Its workers died more often than that; the others go on
            except ray.exceptions.RayError as error:
                results.append(str(error))
    return results
