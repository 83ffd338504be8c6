"""Imports OpenVINO so that nobody hears of it.

The package `openvino` comes with `openvino_telemetry`, by which every import forks a process that
tells Google Analytics, and writes to ~/intel. OpenVINO does without it where it cannot be imported.
"""

import sys

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino  # noqa: E402

__all__ = ["openvino"]
