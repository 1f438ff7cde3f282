"""What the configuration names by text: `module:name`, `path/to/file.py:name`, or a name that stands for one.

Paths and modules are looked for from the current folder, which every process of a run shares.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_pmd.errors import ConfigError


def load(reference: str, *, what: str) -> Callable[..., Any]:
    """The function or class that `module:name` or `path/to/file.py:name` stands for.

    what: the setting that holds the reference, for messages. Modules of the current folder are found; a file
    may import its neighbours. Raises ConfigError saying what is missing, with the nearest name.
    """
    place, colon, name = reference.rpartition(":")
    if not (place and colon and name):
        raise ConfigError(f"{what}={reference!r} is not of the form module:name or path/to/file.py:name")
    module = load_module(place, what=f"{what}={reference!r}")
    if not hasattr(module, name):
        raise ConfigError(
            f"{what}={reference!r}: {place} ({getattr(module, '__file__', 'no file')}) has no "
            f"{name}{did_you_mean(name, dir(module))}"
        )
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(
            f"{what}={reference!r}: {name} is a {type(found).__name__}, not a function or class"
        )
    return found


def find(reference: str, *, what: str) -> None:
    """Look for what load() would load and run nothing of it. Raises ConfigError where there is no such file
    or module.
    """
    place = reference.rpartition(":")[0]
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ConfigError(f"{what}={reference!r}: {Path(place).absolute()}: no such file")
        return
    _look_in(Path.cwd())
    try:
        there = importlib.util.find_spec(place) is not None
    except ModuleNotFoundError:  # one of the packages that it is in
        there = False
    except Exception:  # a package of the user's fails in its own way: load() says how
        return
    if not there:
        raise ConfigError(f"{what}={reference!r}: there is no module {place} in this folder or on PYTHONPATH")


def load_module(place: str, *, what: str) -> ModuleType:
    """The module of this name, or of this file if the place ends with `.py`."""
    try:
        return _load_file(Path(place)) if place.endswith(".py") else _import(place)
    except Exception as error:  # the module is a user's: its import can fail in any way
        if isinstance(error, FileNotFoundError) and error.filename == place:
            raise ConfigError(f"{what}: {Path(place).absolute()}: no such file") from None
        advice = "; is it in this folder or on PYTHONPATH, and is what it needs installed?"
        if isinstance(error, SyntaxError):
            advice = ""
        raise ConfigError(
            f"{what}: {place} cannot be imported: {type(error).__name__}: {error}{advice}"
        ) from error


def _import(name: str) -> ModuleType:
    _look_in(Path.cwd())
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    """Run the file once in a process. Its name need not be that of a module, nor differ from another's."""
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    path = path.resolve()
    # whatever pickles an object of the file names its module: no dots, and the same name in every process
    name = f"{path.stem.replace('.', '_')}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _look_in(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a file that ends with .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: pydantic resolves annotations in the module of that name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: Path) -> None:
    """Last: a user's file may have the name of an installed module, which must go on to be found."""
    if str(folder) not in sys.path and not ("" in sys.path and folder == Path.cwd()):
        sys.path.append(str(folder))
    importlib.invalidate_caches()


class Registry(Mapping[str, str]):
    """Names that stand for a `module:name`, which is imported only when asked for."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        """kind: what the names are names of, in one word."""
        self.kind, self.entries = kind, entries

    def __getitem__(self, name: str) -> str:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def reference(self, name: str, *, what: str) -> str:
        """The `module:name` of a name; a name with a colon is one already, the user's own.

        Imports nothing. Raises ConfigError for an unknown name, with the nearest and all there are.
        """
        if name in self.entries:
            return self.entries[name]
        if all(name.rpartition(":")):
            return name
        raise ConfigError(
            f"{what}={name!r} is no {self.kind}{did_you_mean(name, self.entries)}; use "
            f"{', '.join(sorted(self.entries))}, or your own: module:name or path/to/file.py:name"
        )

    def load(self, name: str, *, what: str) -> Callable[..., Any]:
        """What the name stands for. Raises ConfigError for an unknown name, or if it cannot be loaded."""
        return load(self.reference(name, what=what), what=what)


def did_you_mean(name: str, there: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean X?)` with the nearest of the names there are, or nothing."""
    near = difflib.get_close_matches(name, list(there), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]}?)" if near else ""
