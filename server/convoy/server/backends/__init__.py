"""Run batches on a device: one module per runtime, imported only when that runtime is chosen.

`base` is the interface and the loader; `device` names devices and runtimes. The rest of the server
uses these two and `buffers`, never a runtime's own module.
"""

import os

# ONNX Runtime reads it when it is imported; otherwise it reports to its vendor.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
