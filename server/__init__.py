"""Serves a model repository by gRPC with dynamic batching.

The way of a request: `protocols` (wire to domain) → `requests` → `batcher` → `backends` → reply.
`app` puts the parts together; `repository`, `manifest` and `loading` bring a version into service.
"""

from importlib.metadata import version

SERVER_NAME = "convoy"
SERVER_VERSION = version("convoy-serving")
