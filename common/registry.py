"""Classes by name, one module for each: a new one is a new file, and nothing else changes.

The name of a class is the name of its module, so that a registry lists its names from the folder
and imports nothing. ``common.config`` reads sections whose class is chosen by a registry.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from common.errors import UserError

Base = TypeVar("Base")
Settings = TypeVar("Settings")


class Registry(Generic[Base]):
    """The classes of a package.

    Args:
        package: Its modules hold one class each. Those that begin with ``_``, and the one that
            defines ``base``, are not listed.
        base: What the classes derive from.
    """

    def __init__(self, package: str, base: type[Base]) -> None:
        self.package, self.base = package, base

    def names(self) -> list[str]:
        """All names, sorted."""
        spec = importlib.util.find_spec(self.package)
        assert spec is not None, self.package
        modules = {module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)}
        own = self.base.__module__.rpartition(".")[2]
        return sorted(name for name in modules - {own} if not name.startswith("_"))

    def __getitem__(self, name: str) -> type[Base]:
        """The class of a name.

        Raises:
            UserError: If there is none; the nearest name is proposed.
        """
        from common.config import unknown

        if name not in self.names():
            raise UserError(unknown(f"name {name!r}", name, self.names()))
        module = importlib.import_module(f"{self.package}.{name}")
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, self.base)
            and value.__module__ == module.__name__
            and not value.__name__.startswith("_")
        ]
        assert len(classes) == 1, f"{module.__name__} must hold one {self.base.__name__}"
        return classes[0]


def with_sections(registry: Registry) -> Callable[[type[Settings]], type[Settings]]:
    """A decorator of frozen dataclasses: one more field for each class of a registry.

    The field has the name of the class and holds its settings, by default those of ``cls()``:
    registered settings become sections of a config. ``getattr(settings, name)`` gives them.
    """

    def extend(cls: type[Settings]) -> type[Settings]:
        classes = {name: registry[name] for name in registry.names()}
        fields = [
            (k, value, dataclasses.field(default_factory=value)) for k, value in classes.items()
        ]
        extended = dataclasses.make_dataclass(
            cls.__name__, fields, bases=(cls,), frozen=True, kw_only=True
        )
        extended.__module__, extended.__qualname__ = cls.__module__, cls.__qualname__
        extended.__doc__ = cls.__doc__
        return extended

    return extend
