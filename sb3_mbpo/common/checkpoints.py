"""Files of an agent: written in one step, and checked before they are read."""

import base64
import json
import os
import pickletools
import re
import shutil
import sys
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from sb3_mbpo import __version__

# What only an agent of MBPO has in its zip
OWN_ENTRY = "dynamics.pth"
# What agents had whose model was not standardised
OLD_ARGUMENT = "model_max_epochs"
# What is enough, in place of attributes that cannot be loaded, for an agent that only predicts
IN_PLACE = {"termination_fn": None, "reward_fn": None, "learning_rate": 0.0, "lr_schedule": None, "action_noise": None}
# Arguments that decide the shapes of what is saved
SIZES = ("ensemble_size", "model_hidden_sizes", "num_elites", "policy_kwargs")


@contextmanager
def atomic_file(path: str | Path, suffix: str) -> Iterator[IO[bytes]]:
    """
    A file that appears under its name, in place of an older one, only when it is complete: what stops the process before
    leaves the older one as it was, and at most a file ``.<name>.<random>.tmp`` beside it.

    Names are treated as by SB3: a missing suffix is added, a missing folder made, and a name that is a folder's gets ``_2``.

    :param path: Where
    :param suffix: If the name has none, without the dot
    :return: For writing
    """
    target = Path(path)
    if not target.suffix:
        target = target.with_name(f"{target.name}.{suffix}")
    if target.is_dir():
        warnings.warn(f"Path '{target}' is a folder. Will save instead to {target}_2", stacklevel=4)
        target = target.with_name(f"{target.name}_2")
    if not target.parent.is_dir():
        warnings.warn(f"Path '{target.parent}' does not exist. Will create it.", stacklevel=4)
        target.parent.mkdir(parents=True, exist_ok=True)
    # The file that a link points to
    target = target.resolve()
    if target.exists() and not target.is_file():
        # A pipe or a device cannot be replaced
        with target.open("wb") as file:
            yield file
        return
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            # Before it gets its name, also in a power failure
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def find_file(path: str | Path, suffix: str) -> Path:
    """
    :param path: A file's name, with or without suffix
    :param suffix: Without the dot
    :return: The file that SB3 would open
    :raises FileNotFoundError: if there is none
    """
    for candidate in (Path(path), Path(f"{path}.{suffix}")):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"There is neither a file '{path}' nor '{path}.{suffix}'")


def saved_attributes(path: str | Path | BufferedIOBase) -> dict[str, Any]:
    """
    Check the file of an agent as far as that can be done without unpickling anything: whether it is a complete zip, with the
    checksums of all that is in it, and whether it is MBPO's.

    :param path: As in ``MBPO.load``
    :return: What is saved of an agent as JSON; what is pickled in it stays so
    :raises ValueError: if the file is damaged, another algorithm's, or of a version whose models cannot be read
    :raises FileNotFoundError: if there is none
    """
    file = find_file(path, "zip") if isinstance(path, str | Path) else path
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
            # Without it, this may be the inside of a weight file, itself a zip, at which the file was cut off
            if damaged is None and "data" not in names:
                raise EOFError("it lacks the agent's attributes")
            attributes: dict[str, Any] = {} if damaged else json.loads(archive.read("data"))
    # Which of these it is depends on where a byte is missing or wrong
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise ValueError(f"The file {file} is not the complete zip of an agent (truncated or altered?): {error}") from error
    finally:
        if isinstance(file, BufferedIOBase):
            file.seek(0)
    if damaged is not None:
        raise ValueError(f"The file {file} is damaged: the checksum of '{damaged}' in it is wrong")
    if OWN_ENTRY not in names:
        raise ValueError(
            f"The file {file} was not saved by MBPO or DHMBPO: it has no dynamics model. Load it with the algorithm that "
            "saved it; to start with the policy of a SAC, make an agent of MBPO (DHMBPO has networks of its own) and call "
            f"`agent.set_parameters({str(path)!r}, exact_match=False)`."
        )
    if OLD_ARGUMENT in attributes:
        raise ValueError(
            f"The agent in {file} was saved by an earlier version of sb3_mbpo, whose model had other units. It cannot be "
            "loaded by this one: train again, or load it with the version of that day."
        )
    return attributes


def _has_bytecode(pickled: str) -> bool:
    """Whether a pickle, in base64, holds functions themselves, not only their names. Nothing is executed."""
    try:
        return any(argument == "CodeType" for _, argument, _ in pickletools.genops(base64.b64decode(pickled)))
    # Whoever unpickles it will say what is wrong with it
    except ValueError:
        return False


def check_python(path: str | Path | BufferedIOBase, saved: dict[str, Any], replaced: Collection[str]) -> None:
    """
    Functions that are in no module that can be imported (a lambda, what is defined in a script) are saved as bytecode, which
    another minor version of Python does not understand: it would crash.

    :param path: Of the agent's file
    :param saved: What :func:`saved_attributes` found in it
    :param replaced: Names of attributes that are not going to be unpickled
    :raises ValueError: if bytecode of another version would be unpickled
    """
    file = find_file(path, "zip") if isinstance(path, str | Path) else path
    try:
        with zipfile.ZipFile(file) as archive:
            info = archive.read("system_info.txt").decode() if "system_info.txt" in archive.namelist() else ""
    finally:
        if isinstance(file, BufferedIOBase):
            file.seek(0)
    version, here = re.search(r"Python: (\d+\.\d+)", info), f"{sys.version_info.major}.{sys.version_info.minor}"
    if version is None or version[1] == here:
        return
    names = [
        name
        for name, value in saved.items()
        if name not in replaced and isinstance(value, dict) and _has_bytecode(str(value.get(":serialized:", "")))
    ]
    if names:
        which = ", ".join(f"`{name}`" for name in names)
        instead = ", ".join(f"{name!r}: {IN_PLACE.get(name, '...')}" for name in names)
        raise ValueError(
            f"The agent in {file} was saved by Python {version[1]}, and holds bytecode that Python {here} cannot run: "
            f"{which}. Load it with Python {version[1]}, or pass what is to take their place; "
            f"`custom_objects={{{instead}}}` is enough to predict. Functions of a module that can be imported always load."
        )


def _is_changed(saved: Any, value: Any) -> bool:
    """Whether a value is another one than what is saved, as far as JSON tells."""
    try:
        return bool(saved != (list(value) if isinstance(value, tuple) else value))
    # Of arrays, for instance
    except ValueError:
        return True


@contextmanager
def explained(file: str, saved: dict[str, Any], given: dict[str, Any]) -> Iterator[None]:
    """
    What goes wrong when an agent is put together again, as an error that says with what.

    :param file: Its name
    :param saved: What :func:`saved_attributes` found in it
    :param given: Arguments that are given at loading
    :raises ValueError: in place of the errors of torch and SB3
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"What is saved in {file} needs the module {error.name!r}, which cannot be imported: start Python where it lies, "
            "or pass `custom_objects` with something in place of what is from there, for instance "
            "`custom_objects={'termination_fn': None}`."
        ) from error
    except (RuntimeError, KeyError, AttributeError, TypeError, EOFError, ImportError, ValueError) as error:
        # SB3 looks for a DQN where names do not match, and fails at it
        reason = error.__context__ if isinstance(error, KeyError) and error.__context__ is not None else error
        version = saved.get("sb3_mbpo_version", "(unknown version)")
        changed = [name for name in SIZES if name in given and _is_changed(saved.get(name), given[name])]
        if isinstance(error, ValueError) and not changed:
            # Of an argument that can be changed
            raise
        with_changes = f", with {', '.join(changed)} changed (sizes of networks must be as saved)" if changed else ""
        raise ValueError(
            f"The agent in {file}, saved by sb3_mbpo {version}, cannot be put together by sb3_mbpo {__version__}"
            f"{with_changes}: {reason}"
        ) from error
