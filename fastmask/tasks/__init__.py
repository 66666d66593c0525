"""What can be trained: one folder or file for each task, and where their data comes from.

A task of your own is a subclass of `Task`; see docs/tasks.md.
"""

from fastmask.tasks.task import Examples, Loss, Task, TaskSettings

__all__ = ["Examples", "Loss", "Task", "TaskSettings"]
