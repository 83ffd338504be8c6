"""Run blocking work on daemon threads, so that work that never ends blocks nothing else."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def in_thread(
    work: Callable[..., Result],
    *arguments: object,
    discard: Callable[[Result], None] | None = None,
) -> Result:
    """Run a function on a daemon thread and return what it returns.

    `asyncio.to_thread` has few threads, and the process waits for them at its end. Storage may
    block for ever, and so may a runtime.

    Args:
        work: The function.
        arguments: Its arguments.
        discard: Called with the result if the caller was cancelled meanwhile.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def succeed(result: Result) -> None:
        if not future.done():
            future.set_result(result)
        elif discard:
            discard(result)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def run() -> None:
        try:
            result = work(*arguments)
        except BaseException as error:
            _post(loop, fail, error)
        else:
            _post(loop, succeed, result)

    threading.Thread(target=run, name="model-loader", daemon=True).start()
    return await future


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], argument: object) -> None:
    # On a closed loop no caller waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, argument)
