"""A front end's process; the server starts it and tells it what to do."""

import mmap
import socket
import sys

import uvloop

from server.frontends.process import FrontEnd


async def _run(owner: int, listening: int, memory: int) -> None:
    pixels = mmap.mmap(memory, 0)
    await FrontEnd(pixels, socket.socket(fileno=listening)).run(socket.socket(fileno=owner))


if __name__ == "__main__":
    uvloop.run(_run(*map(int, sys.argv[1:])))
