"""convoy-server, also `python -m server`."""

import sys

import uvloop
from prometheus_client import CollectorRegistry

from server.app import serve
from server.errors import StartupError
from server.logs import configure_logging
from server.settings import parse_settings


def main() -> None:
    """Runs the server until it is told to stop.

    Exits 0 after a drain, 2 with one line on stderr when it cannot start; a second signal kills it.
    """
    try:
        settings = parse_settings(sys.argv[1:])
        configure_logging(settings.log_level, settings.log_format)
        uvloop.run(serve(settings, CollectorRegistry()))
    except StartupError as error:
        print(f"convoy-server: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
