"""Server: the versions of a model repository, served by gRPC and REST with dynamic batching.

A request goes one way: `edge` (connections and their limits) → `grpc` or `rest` (endpoint, then
servicer) → `protocol` (what both share) → `batching` (queue, scheduler, worker) → `backends` (one
run of the graph) → `batching.delivery` → reply. `images` decodes the files of a request first, and
with `frontends` other processes do all that comes before `batching`. `models` brings versions into
service: repository, manifest, signatures, loading, warm-up, canary. `metrics`, `logs` and
`telemetry` show what happens, `security` has TLS and tokens. `settings` reads the flags,
`assembly` and `ports` build the parts, and `app` runs them.
"""

from importlib.metadata import version

SERVER_NAME = "convoy"
__version__ = version("convoy-serving")
