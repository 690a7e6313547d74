"""Generated tasks, one file each, all with the interface of `base.Task`.

A config names a task by its class path (`_target_`), so nothing is registered here, and a task from outside the package
works the same way.
"""

from data.tasks.base import IGNORE, Task

__all__ = ["IGNORE", "Task"]
