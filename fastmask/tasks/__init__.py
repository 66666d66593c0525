"""What can be trained: one folder or file for each task, and where their data comes from.

A task is found by name: one of ours, one that an installed package offers, or any class that can be imported. A task of
your own is a subclass of `Task`; see docs/tasks.md.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys

from fastmask.errors import unknown
from fastmask.settings import ConfigError
from fastmask.tasks.task import Examples, Loss, Task, TaskSettings

__all__ = ["TASKS", "Examples", "Loss", "Task", "TaskSettings", "task_class"]

TASKS = {
    "parsing": "fastmask.tasks.parsing.task:Parsing",
    "tagging": "fastmask.tasks.tagging:Tagging",
    "classification": "fastmask.tasks.classification:Classification",
    "lm": "fastmask.tasks.lm:LanguageModelling",
    "translation": "fastmask.tasks.translation:Translation",
}
ENTRY_POINTS = "fastmask.tasks"  # the group that a package declares its tasks in


def task_class(name: str) -> type[Task]:
    """The class of a task: one of `TASKS`, of an entry point of the group ``fastmask.tasks``, or ``module:Class``.

    Raises:
        KeyError: no such name; the nearest ones are given.
        ConfigError: a module or class that cannot be imported, or is no `Task`.
    """
    where = TASKS.get(name) or name
    if ":" not in where:  # only then, as every installed package is looked at
        installed = {found.name: found.value for found in importlib.metadata.entry_points(group=ENTRY_POINTS)}
        where = installed.get(name, name)
    module, _, attribute = where.partition(":")
    if not attribute:
        raise unknown("task", name, [*TASKS, *installed])
    here = os.getcwd()
    if name not in TASKS and here not in sys.path:
        sys.path.append(here)  # an installed command does not look into the folder that it is started from
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise  # something that it needs
        raise ConfigError(f"task is {name!r}: there is no module {module!r} here or installed") from None
    except AttributeError:
        raise ConfigError(f"task is {name!r}: module {module!r} has no {attribute!r}") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task is {name!r}, which is {found!r:.100} (expected a subclass of fastmask.tasks.Task)")
    return found
