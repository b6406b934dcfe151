"""Work that may take its process down with it, done in another process.

A kernel that touches memory it should not leaves the GPU's context dead, and with it every array and compiled program of
its process. So what launches kernels to time them runs in a worker: one process for all that is asked of it, since a
context and compiled programs are dear, and a new one after a death.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

STUCK = 900.0  # seconds without a sign of life; the slowest single step is a search over configurations, of minutes

_parent: Connection | None = None  # in a worker


class Died(Exception):
    """The worker is gone; the message says how.

    Attributes:
        step: the last step that it announced, None before the first.
    """

    def __init__(self, message: str, step: str | None):
        super().__init__(message)
        self.step = step


def begin(step: str) -> None:
    """Announces what comes next, so that it can be named if it is the last thing that happens. Outside a worker: nothing."""
    if _parent is not None:
        _parent.send(("begin", step))


class Worker:
    """Runs functions in a process of its own, started when first needed."""

    def __init__(self, stuck: float = STUCK):
        self.stuck = stuck
        self.process = self.pipe = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, function: Callable, *arguments: Any) -> Any:
        """function(*arguments), which the worker can import, as can be what it takes and returns.

        Raises:
            Died: if the process ends or raises, whatever the reason, or gives no sign of life for `stuck` seconds.
        """
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # a fork would lack the threads of JAX
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,))
            self.process.start()
            theirs.close()
        step, how = None, f"no sign of life for {self.stuck:g} s"
        try:
            self.pipe.send((function, arguments))
            while self.pipe.poll(self.stuck):
                what, value = self.pipe.recv()
                if what == "done":
                    return value
                if what == "raised":
                    how = value
                    break
                step = value
            else:
                self.process.kill()
        except (EOFError, ConnectionError):
            self.process.join()
            how = f"the process died (exit code {self.process.exitcode})"
        self._end()
        raise Died(how, step)

    def _end(self) -> None:
        if self.process is not None:
            self.pipe.close()  # at which it leaves, if it can
            self.process.join(10)
            self.process.kill()
            self.process.join()
            self.process = self.pipe = None


def survivors(
    worker: Worker, function: Callable[..., list], subject: Any, names: Sequence[str], *arguments: Any
) -> tuple[list, dict[str, str]]:
    """function(subject, names, *arguments), again without the name that was begun last for as long as the worker dies.

    Returns:
        What the function returned, an empty list if no name was left, and how those names that are not in it died.
    """
    dead: dict[str, str] = {}
    while left := [name for name in names if name not in dead]:
        try:
            return worker.ask(function, subject, left, *arguments), dead
        except Died as death:
            blamed = [death.step] if death.step in left else left
            dead |= dict.fromkeys(blamed, str(death))
    return [], dead


def _serve(parent: Connection) -> None:
    global _parent
    _parent = parent
    while True:
        try:
            function, arguments = parent.recv()
        except EOFError:
            return
        try:
            answer = "done", function(*arguments)
        except Exception as error:  # it may have left the device unusable: the parent starts another worker
            answer = "raised", one_line(error)
        parent.send(answer)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")
