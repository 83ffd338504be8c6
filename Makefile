# Every target works as the first command on a fresh clone: it needs Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.9
PARTS := server training export clients

.DEFAULT_GOAL := help
.PHONY: help demo bench test ray-test torch-test soak compose-test lint fmt proto lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.venv/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip sync --quiet --require-hashes requirements.lock

	VIRTUAL_ENV=$(CURDIR)/.venv UV_NO_CONFIG=1 $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $@

demo: .venv/.installed  ## train, export, serve and classify real digits, start to end
	$(BIN)/python -m tests.demo

test: .venv/.installed  ## run the tests
	$(BIN)/pytest

ray-test: .venv/.installed  ## run the tests of the ray engine on a cluster of two local nodes
	VIRTUAL_ENV=$(CURDIR)/.venv UV_NO_CONFIG=1 $(BIN)/uv pip install --quiet --editable '.[ray]'
	$(BIN)/pytest tests/clients/test_batch_ray.py

TORCH ?= 2.11
TESTS ?= tests/export
torch-test: .venv/.installed  ## run TESTS under another release of torch: TORCH=2.11 is the oldest
	test -x build/torch-$(TORCH)/bin/python || $(BIN)/uv venv --quiet build/torch-$(TORCH)
	# All else as locked, but what torch chooses: torchvision, triton, CUDA, setuptools with its user.
	$(BIN)/uv pip freeze --exclude-editable | \
	  grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*|setuptools|hdrhistogram)==' > build/torch-$(TORCH)/locked.txt
	VIRTUAL_ENV=$(CURDIR)/build/torch-$(TORCH) UV_NO_CONFIG=1 $(BIN)/uv pip install --quiet \
	  --constraint build/torch-$(TORCH)/locked.txt --group dev --editable '.[all]' 'torch==$(TORCH).*'
	build/torch-$(TORCH)/bin/pytest $(TESTS)

MINUTES ?= 10
soak: .venv/.installed  ## minutes of load with cancels and swaps; memory must stay flat
	$(BIN)/python -m tests.chaos.soak --minutes $(MINUTES)

compose-test: .venv/.installed  ## build and run the container stack; skips without a Docker engine
	$(BIN)/pytest -m compose tests/deploy/test_compose.py

BENCH := build/bench
# Random weights do; a net is as fast with them. Each model has a repository of its own.
define BENCH_MODELS
import torch, torchvision
torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), "$(BENCH)/resnet18.pt")
endef
export BENCH_MODELS

$(BENCH)/.models:
	mkdir -p $(BENCH)
	$(BIN)/convoy-train --data digits --model net_res_deep --epochs 1 --out $(BENCH)/run
	$(BIN)/convoy-export $(BENCH)/run/best.pt --repository $(BENCH)/models --name small
	$(BIN)/convoy-train --data digits --model net_res_deep --set 'model_arguments={n_chans1=128}' \
	  --epochs 1 --out $(BENCH)/run-wide
	$(BIN)/convoy-export $(BENCH)/run-wide/best.pt --repository $(BENCH)/wide --name wide
	$(BIN)/python -c "$$BENCH_MODELS"
	seq 0 9 > $(BENCH)/labels.txt
	$(BIN)/convoy-export weights $(BENCH)/resnet18.pt --repository $(BENCH)/resnet18 \
	  --name resnet18 --architecture resnet18 --labels $(BENCH)/labels.txt --data digits \
	  --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25 --format onnx
	touch $@

# Five rounds of each load; where other work disturbs them, more, for as long as --limit-s.
BENCH_FLAGS ?= --seconds 1.5 --warmup-s 0.5 --limit-s 130
bench: .venv/.installed $(BENCH)/.models  ## measure the server beside raw ONNX Runtime and a naive server
	$(BIN)/python -m benchmarks.server $(BENCH)/models small $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.server $(BENCH)/models small --images 8 --concurrency 8,32 \
	  --load "" --only-convoy --out $(BENCH)/images-8 $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.server $(BENCH)/models small --images 32 --concurrency 8 \
	  --load "" --only-convoy --out $(BENCH)/images-32 $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.server $(BENCH)/wide wide --concurrency 16 --only-convoy \
	  --out $(BENCH)/overload $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.server $(BENCH)/resnet18 resnet18 --concurrency 4,16 --load "" \
	  --only-convoy --out $(BENCH)/resnet18-224 $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.disturbances $(BENCH)/models small \
	  --large $(BENCH)/resnet18/resnet18/1 --seconds 3
	$(BIN)/python -m benchmarks.repository_polling

lint: .venv/.installed  ## format, lint, types, architecture, stubs in sync
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python proto/generate.py --check

fmt: .venv/.installed  ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: .venv/.installed  ## regenerate the stubs in proto/gen
	$(BIN)/python proto/generate.py

COMPILE := UV_NO_CONFIG=1 $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header pyproject.toml

lock: .venv/.installed  ## resolve the hashed locks anew
	$(COMPILE) --extra all --group dev --output-file requirements.lock
	$(COMPILE) --extra cpu --constraint requirements.lock --output-file requirements-cpu.lock

clean:  ## remove the environment and what the tools left
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache runs models build dist
