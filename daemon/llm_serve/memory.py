"""What an instance has learned, from one process to the next: the course that held, for as long as it applies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from llm_serve.core import learned
from llm_serve.core.course import Course
from llm_serve.core.plan import EnginePlan
from llm_serve.host.logs import get_logger
from llm_serve.host.state_file import StateFile


class Memory:
    """The course of one instance on disk, under the key of what it was learned on."""

    def __init__(self, file: StateFile, key: Callable[[], learned.Key]) -> None:
        """`key` is asked again at each use: a model that was downloaded meanwhile has got a commit to be known by."""
        self._file, self._key = file, key
        self._is_written = False

    def under(self, key: Callable[[], learned.Key]) -> Memory:
        """The same file, for an instance whose settings have changed."""
        other = Memory(self._file, key)
        other._is_written = self._is_written
        return other

    def recall(self, asked: EnginePlan) -> Course:
        """The course to begin with. What cannot be read, or was learned on something else, is left out with a word."""
        value, warning = self._file.read()
        if warning:
            get_logger().warning(warning)
        if value is None:
            return Course(asked)
        steps, is_proven, why_dropped = learned.steps_for(value, self._key(), asked)
        if why_dropped:
            get_logger().warning(why_dropped)
        course = Course(asked, steps, is_proven)
        self._is_written = True
        if steps:
            get_logger().info("using what was learned", rung=course.rung, plan=course.plan.summary())
        return course

    async def remember(self, course: Course) -> None:
        """Write the course down; a disk that is full costs the memory and nothing else."""
        if not course.steps:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._file.forget)
            self._is_written = False
            return
        warning = await asyncio.to_thread(lambda: self._file.write(learned.to_json(course, self._key())))
        self._is_written = warning is None
        if warning:
            get_logger().warning(warning)

    def was_reset(self) -> bool:
        """True once when somebody has removed the file under us, as `reset` does."""
        gone = self._is_written and not self._file.path.exists()
        self._is_written = self._is_written and not gone
        return gone
