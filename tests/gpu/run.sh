#!/usr/bin/env bash
# Everything that needs a GPU, in one run: tests/gpu/run.sh [OUT]
# Tests first, then figures, written below OUT (default: gpu-results). On a machine without a GPU,
# TEST_DEVICE=cpu runs the same steps at a small size, so that the script is known to work.
#   CIFAR=FOLDER      CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg, to train on; else digits
#   AIRBENCH=FILE.py  a copy of airbench94_muon.py, to train beside ours
#   STEPS="a b"       only these steps
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-gpu-results}")
device=${TEST_DEVICE:-cuda}
python=${PYTHON:-.venv/bin/python}
export TEST_DEVICE=$device PYTHONPATH=$PWD:$PWD/proto/gen:$PWD/server:$PWD/training:$PWD/export:$PWD/clients${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
failed=()

if [[ $device == cpu ]]; then
  epochs=2 seeds=1 photos=60 net=net precisions="" half=fp32 sizes=1,2,8 seconds=1 closed=1,16 images=60 fronts=2
else
  epochs=10 seeds=5 photos=2000 net=resnet50 precisions="--precision fp16 --precision bf16" half=fp16
  sizes=1,2,4,8,16,32,64,128,256 seconds=5 closed=1,8,32,64,128,256,512 images=20000 fronts="1 2 4 8"
fi

step() { # step NAME COMMAND...: runs it, keeps its output, continues after a failure
  local name=$1
  shift
  [[ " ${STEPS:-$name} " == *" $name "* ]] || return 0
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.txt"
  local status=${PIPESTATUS[0]}
  ((status == 0)) || { failed+=("$name"); echo "== $name failed with $status"; }
}

bench() { # bench MODELS SERVER_FLAGS BENCH_FLAGS...
  local models=$1 flags=$2
  shift 2
  "$python" -m benchmarks.served "$models" "--device $device $flags" \
    --duration-s "$seconds" --timeout-s 5 "$@"
}

nvidia-smi 2>/dev/null | tee "$out/device.txt"
step versions "$python" -c '
import onnxruntime, torch, torchvision
print("torch", torch.__version__, "torchvision", torchvision.__version__, "CUDA", torch.version.cuda)
print("onnxruntime", onnxruntime.__version__, onnxruntime.get_available_providers())'

# 1. The right device and the right answers.
step tests "$python" -m pytest -q -rs tests/gpu/test_serving.py tests/gpu/test_overlap.py

# 2. Serving small images: what the device, the copies and the host take; then closed and open loops.
step train "$python" -m convoy.training --data digits --device "$device" --epochs "$epochs" --out "$out/run"
step export "$python" -m convoy.export "$out/run/best.pt" --repository "$out/models" --name digits \
  --precision tf32
step device-time "$python" -m benchmarks.device_time "$out/models/digits/1" --device "$device" --batches "$sizes"
step device-time-tf32 "$python" -m benchmarks.device_time "$out/models/digits/1" --device "$device" \
  --precision tf32 --batches "$sizes"
step device-time-graphs "$python" -m benchmarks.device_time "$out/models/digits/1" --device "$device" \
  --batches "$sizes" --cuda-graphs
step closed bench "$out/models" "" --payload raw --concurrency "$closed" --plot "$out/closed.png"
step closed-one-instance bench "$out/models" "--instances 1" --payload raw --concurrency "$closed" \
  --plot "$out/closed-one-instance.png"
step closed-graphs bench "$out/models" --cuda-graphs --payload raw --concurrency "$closed" \
  --plot "$out/closed-graphs.png"
if [[ $device == cuda ]] && "$python" -c "import tensorrt" 2>/dev/null; then
  # The first load builds the engine.
  step closed-tensorrt bench "$out/models" "--provider tensorrt --state-dir $out/state" --payload raw \
    --concurrency "$closed" --plot "$out/closed-tensorrt.png"
fi
for n in $fronts; do # several connections: the kernel spreads these, not calls
  step "closed-front-ends-$n" bench "$out/models" "--front-ends $n" --protocol oip --model digits --payload raw \
    --connections 8 --concurrency "$closed" --plot "$out/closed-front-ends-$n.png"
done
step open bench "$out/models" "" --payload raw --sweep --rate 500 --slo-ms 10 --plot "$out/open.png"
step compare "$python" -m benchmarks.server "$out/models" digits --flags "--device $device" \
  --rounds "$seeds" --tries "$seeds" --seconds "$seconds" --out "$out/compare"

# 2. Serving 224 x 224, eight images a request, in half precision.
step photographs "$python" -m benchmarks.photographs "$out/large" --images "$photos" --architecture "$net"
# shellcheck disable=SC2086
step export-large "$python" -m convoy.export weights "$out/large/$net.pt" --architecture "$net" --name large \
  --labels "$out/large/labels.txt" --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 \
  --resize-shorter-px 256 --data "imagefolder:$out/large/photos" --repository "$out/large/models" $precisions
step device-time-large "$python" -m benchmarks.device_time "$out/large/models/large/1" --device "$device" \
  --precision "$half" --batches "$sizes"
for backend in onnx torchscript; do
  step "closed-large-$backend" bench "$out/large/models" "--backend $backend --precision $half" --protocol oip --model large \
    --payload raw --images 8 --concurrency 1,2,4,8,16 --plot "$out/closed-large-$backend.png"
done

# 3. Batch inference on JPEG files: is the device busy while the processors decode?
step batch "$python" -m benchmarks.batch speed "$out/large/photos" --repository "$out/large/models" \
  --images "$images" --rounds "$seeds" --device "$device"

# 4. Training beside airbench94.
step airbench "$python" -m benchmarks.airbench "${CIFAR:+imagefolder:}${CIFAR:-digits}" --device "$device" \
  --epochs "$epochs" --seeds "$seeds" ${AIRBENCH:+--airbench "$AIRBENCH"}

echo "== failed: ${failed[*]:-none}"
((${#failed[@]} == 0))
