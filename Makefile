# Every target works as the first command on a fresh clone: it needs Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.9
PARTS := server training export clients

.DEFAULT_GOAL := help
.PHONY: help docs dist demo bench check test ray-test batch-test spark-test torch-test chart model-zoo soak compose-test screenshots sbom audit digests lint fmt proto lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# Without its bytecode, torch takes three times as long to import, in each of the tests' processes.
unexport PYTHONDONTWRITEBYTECODE

.venv/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip sync --quiet --require-hashes requirements.lock

	VIRTUAL_ENV=$(CURDIR)/.venv UV_NO_CONFIG=1 $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $@

demo: .venv/.installed  ## train, export, serve and classify real digits; leaves all in the folder demo
	$(BIN)/python examples/demo.py

PIP := VIRTUAL_ENV=$(CURDIR)/.venv UV_NO_CONFIG=1 $(BIN)/uv pip

docs: .venv/.installed  ## build the documentation site in build/site; warnings are errors
	$(PIP) install --quiet --require-hashes -r requirements-docs.lock
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: .venv/.installed  ## build the distributions in dist/ and check them
	$(PIP) install --quiet --group dist
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

# Each worker runs whole modules, so that a server started for a module is started once. Tests wait
# for a third of their time: three workers keep two processors busy.
WORKERS ?= 3
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadscope

check: lint  ## format, lint, types and the fast tests: the loop of a change
	$(PYTEST) -m 'not slow and not compose and not alone'

test: .venv/.installed  ## run all tests
	$(PYTEST) -m 'not compose and not alone'
	$(BIN)/pytest -m alone

ray-test: .venv/.installed  ## run the tests of the ray engine on a cluster of two local nodes
	VIRTUAL_ENV=$(CURDIR)/.venv UV_NO_CONFIG=1 $(BIN)/uv pip install --quiet --editable '.[ray]'
	$(BIN)/pytest tests/clients/test_batch_ray.py

batch-test: .venv/.installed  ## a batch job of 60,000 images with kills, in all engines
	VIRTUAL_ENV=$(CURDIR)/.venv UV_NO_CONFIG=1 $(BIN)/uv pip install --quiet --editable '.[ray]'
	TEST_IMAGES=60000 $(BIN)/pytest -s tests/clients/test_batch_accounting.py

spark-test: .venv/.installed  ## run the example for Spark; needs Java
	VIRTUAL_ENV=$(CURDIR)/.venv UV_NO_CONFIG=1 $(BIN)/uv pip install --quiet pyspark pandas
	$(BIN)/pytest -k spark tests/clients/test_examples.py

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

model-zoo: .venv/.installed  ## publish, serve and compare real nets in every format; hours, resumes
	$(BIN)/python -m benchmarks.model_zoo --document docs/models.md

chart: .venv/.installed  ## lint and render the Helm chart; installs Helm's engine in build/helm
	test -x build/helm/bin/python || $(BIN)/uv venv --quiet build/helm
	VIRTUAL_ENV=$(CURDIR)/build/helm UV_NO_CONFIG=1 $(BIN)/uv pip install --quiet helm-python-sdk==0.2.2
	build/helm/bin/python tests/deploy/render_chart.py
	$(BIN)/pytest tests/deploy/test_chart.py

MINUTES ?= 10
soak: .venv/.installed  ## minutes of load with cancels and swaps; memory must stay flat
	$(BIN)/python -m tests.chaos.soak --minutes $(MINUTES)

compose-test: .venv/.installed  ## build and run the container stack; skips without a Docker engine
	$(BIN)/pytest -m compose tests/deploy

COMPILE := UV_NO_CONFIG=1 $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header

# The extras of each image in the Dockerfile; for the runtime of a CPU: make sbom RUNTIME=cpu.
RUNTIME ?= server
EXTRAS_server := --extra $(RUNTIME) --extra cloud
EXTRAS_trainer := --extra $(RUNTIME) --extra cloud --extra torch --extra train --extra export
EXTRAS_client := --extra batch
IMAGES := server trainer client

build/sbom/$(RUNTIME)/%.txt: pyproject.toml requirements.lock requirements-cpu.lock .venv/.installed
	mkdir -p $(@D)
	$(COMPILE) pyproject.toml $(EXTRAS_$*) --constraint requirements.lock \
	  --constraint requirements-cpu.lock --output-file $@

sbom: $(IMAGES:%=build/sbom/$(RUNTIME)/%.txt)  ## list the packages of each image in build/sbom, as CycloneDX
	for image in $(IMAGES); do $(BIN)/uv tool run --quiet --from 'cyclonedx-bom>=7,<8' cyclonedx-py \
	  requirements build/sbom/$(RUNTIME)/$$image.txt --output-file build/sbom/$(RUNTIME)/$$image.cdx.json || exit; done

audit: $(IMAGES:%=build/sbom/$(RUNTIME)/%.txt)  ## look the packages of each image up in the database of vulnerabilities
	for image in $(IMAGES); do $(BIN)/uv tool run --quiet 'pip-audit>=2.9,<3' --disable-pip \
	  --require-hashes --requirement build/sbom/$(RUNTIME)/$$image.txt || failed=1; done; exit $${failed:-0}

digests:  ## print the stack's base images with their digests, for .env; pull them first
	@sed -n 's/^\([A-Z]*_IMAGE\)=\([^@]*\).*/\1 \2/p' .env.example | while read -r name image; do \
	  echo "$$name=$${image%@*}@$$(docker image inspect --format '{{index .RepoDigests 0}}' $$image | cut -d@ -f2)"; done

screenshots: .venv/.installed  ## draw the pictures of the page in docs/images; takes five minutes
	SCREENSHOTS=docs/images $(BIN)/pytest --timeout 600 tests/e2e/test_page.py -k screenshots

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

lint: .venv/.installed  ## format, lint, spelling, types, architecture, stubs in sync
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python proto/generate.py --check

fmt: .venv/.installed  ## format the code and apply the fixes of ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: .venv/.installed  ## regenerate the stubs in proto/gen
	$(BIN)/python proto/generate.py

lock: .venv/.installed  ## resolve the hashed locks anew
	$(COMPILE) pyproject.toml --extra all --extra cloud --group dev --output-file requirements.lock
	$(COMPILE) pyproject.toml --extra cpu --constraint requirements.lock --output-file requirements-cpu.lock
	$(COMPILE) --group docs --constraint requirements.lock --output-file requirements-docs.lock

clean:  ## remove the environment and what the tools left
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache runs models demo build dist
