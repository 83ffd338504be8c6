"""How the process is told to stop."""

import asyncio
import signal


async def stop_signal() -> signal.Signals:
    """Waits for SIGTERM or SIGINT; a second one ends the process at once, by the default action."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def stop(number: signal.Signals) -> None:
        for each in numbers:
            loop.remove_signal_handler(each)
            # Python's own for Ctrl-C would unwind, and so drain, first.
            signal.signal(each, signal.SIG_DFL)
        received.set_result(number)

    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    return await received
