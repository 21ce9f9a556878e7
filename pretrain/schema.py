"""Frozen dataclasses read from YAML and dotted overrides; unknown keys are named."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentParser

from common.errors import UserError

Schema = TypeVar("Schema")


def read_schema(schema: type[Schema], path: str | Path | None, overrides: Sequence[str]) -> Schema:
    """An instance of a frozen dataclass from a YAML file, or none, and ``key=value`` overrides.

    Raises:
        UserError: Unknown key, or a value that the dataclass refuses.
    """
    arguments = [] if path is None else ["--config", str(path)]
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or key.startswith("-") or not key:
            raise UserError(f"override {item!r} is not of the form key=value, e.g. optim.epochs=20")
        arguments.append(f"--{key}={value}")
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(schema, as_group=False, fail_untyped=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            namespace = parser.parse_args(arguments)
            # The method was renamed in jsonargparse 4.49; older ones know only the second name.
            instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
            values = instantiate(namespace)
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises its own kinds for what a user wrote
        cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
        where = "" if path is None else f"{path}: "
        raise UserError(f"{where}{_one_line(cause)}") from None
    return schema(**{key.name: values[key.name] for key in fields(schema)})  # type: ignore[arg-type]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
