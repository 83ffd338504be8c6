#!/usr/bin/env bash
# Everything that needs a GPU, in one run: tests/gpu/run.sh [OUT]
# Tests first, then figures, written below OUT (default: gpu-results). On a machine without a GPU,
# CONVOY_TEST_DEVICE=cpu runs what of it means something there.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-gpu-results}
device=${CONVOY_TEST_DEVICE:-cuda}
python=${PYTHON:-.venv/bin/python}
export CONVOY_TEST_DEVICE=$device PYTHONPATH=$PWD:$PWD/proto/gen${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
failed=0

step() { # step NAME COMMAND...: runs it, keeps its output, goes on after a failure
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.txt"
  local status=${PIPESTATUS[0]}
  ((status == 0)) || { failed=1; echo "== $name failed with $status"; }
}

nvidia-smi 2>/dev/null | tee "$out/device.txt"
step versions "$python" -c '
import onnxruntime, torch, torchvision
print("torch", torch.__version__, "torchvision", torchvision.__version__, "CUDA", torch.version.cuda)
print("onnxruntime", onnxruntime.__version__, onnxruntime.get_available_providers())'
step tests "$python" -m pytest -q -rs tests/gpu
step train "$python" -m training --data digits --device "$device" --epochs 10 --out "$out/run"
step export "$python" -m export "$out/run/best.pt" --repository "$out/models" --name digits
step bench "$python" -m benchmarks.server "$out/models" digits --flags "--device $device" --out "$out/bench"
exit $failed
