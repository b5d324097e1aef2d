"""``path.py:name`` or ``package.module:name`` → the model and the inputs that this function returns."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from inductor_ext.errors import InductorExtError


class TargetError(InductorExtError):
    """What was named on the command line cannot be imported, or does not return a model and its inputs."""


def load(target: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """(model, args, kwargs) of a target. Errors of the user's own code come through as they are."""
    where, _, name = target.rpartition(":")
    if not where or not name.isidentifier():
        raise TargetError(f"wanted path.py:function or package.module:function, found {target!r}")
    module = _module(where)
    function = getattr(module, name, None)
    if not callable(function):
        functions = inspect.getmembers(module, inspect.isfunction)
        own = [name for name, value in functions if value.__module__ == module.__name__]
        raise TargetError(f"{where} has no function {name!r}; its functions are: {', '.join(own) or 'none'}")
    return _unpack(target, function())


def _module(where: str) -> ModuleType:
    path = Path(where)
    if where.endswith(".py"):
        if not path.is_file():
            raise TargetError(f"there is no file {where}")
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name and where.startswith(error.name):
            raise TargetError(f"there is no module {error.name!r}; a script is named with its .py") from None
        raise


def _unpack(target: str, value: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A lone tensor instead of the tuple of arguments is taken as the one argument."""
    if isinstance(value, tuple) and len(value) in (2, 3) and callable(value[0]):
        model, args, kwargs = (*value, {})[:3]
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        if isinstance(kwargs, dict):
            return model, args, kwargs
    raise TargetError(f"{target} must return (model, args) or (model, args, kwargs); it returned {type(value).__name__}")
