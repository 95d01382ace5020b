# Every target makes .venv when it is missing; `make clean` removes it.
PYTHON ?= python3
BIN := .venv/bin
# accelerate gives a CPU process one thread unless told otherwise.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Tests run side by side; a worker takes a gigabyte.
WORKERS ?= $(shell test $(THREADS) -lt 8 && echo $(THREADS) || echo 8)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(THREADS)
RUN := runs/quickstart

.PHONY: quickstart test test-fast test-cpus gpu crash-test attacks fuzz hub-test peer-test space-test web-test timm-test lint format clean

quickstart: .venv/installed
	$(LAUNCH) -m training.train training/configs/quickstart.yaml --output_dir $(RUN) --overwrite true
	$(BIN)/python -m training.data.scenes $(RUN)/scenes --split test --num_scenes 12 --seed 7 --overwrite \
		--scenes '{"clutter": 0, "contrast": [0.5, 0.9]}'
	$(BIN)/python training/publish/try_checkpoint.py $(RUN)/best $(RUN)/scenes --output $(RUN)/predictions.png

test: .venv/installed
	$(PYTEST)

test-fast: .venv/installed
	$(PYTEST) -m "not slow"

# The numerical tests as on other CPUs: a line for each setting.
test-cpus: .venv/installed
	$(BIN)/python -m tests.cpus

# All figures that take a GPU, within ten minutes; GPU_DATA=FOLDER adds the accuracy table on photographs. PARTS chooses.
gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu --page benchmarks/README.md $(if $(PARTS),--parts $(PARTS))

hub-test: .venv/installed
	@$(BIN)/python -m tests.hub_table

# transformers' own tests on our models; five minutes on two free cores. Downloads its source distribution once.
peer-test: .venv/installed
	$(BIN)/python -m tests.peer

# Kills training and fills its disk, and the like; minutes.
crash-test: .venv/installed
	$(BIN)/python -m tests.crash

# Every kind of attack that once succeeded, on the code before the fixes (from the history) and on the code as it is.
attacks: .venv/installed
	$(BIN)/python -m tests.attacks

# Images as no program writes them; a minute.
fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos
	git ls-files '*.yaml' '*.cff' | xargs $(BIN)/check-yaml
	git ls-files '*.toml' | xargs $(BIN)/check-toml

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# gradio wants Pillow below 13, so the Space has an environment of its own. Needs Chromium.
space-test: .venv-space/installed
	.venv-space/bin/python -m pytest tests/space

# The page of `export --layout web` in Chromium, and transformers.js in Node. Needs both, and npm.
web-test: .venv/installed .web-test/installed
	PYTHONPATH=.web-test $(BIN)/python -m pytest tests/web

# timm wants torchvision, which imports beside a torch of its own version alone: gigabytes, so not in CI.
timm-test: .venv-timm/installed
	.venv-timm/bin/python -m pytest tests/timm

clean:
	rm -rf .venv .venv-space .venv-timm .web-test build *.egg-info

.venv-space/installed: tests/space/requirements.txt
	$(PYTHON) -m venv .venv-space
	.venv-space/bin/python -m pip install --quiet -r tests/space/requirements.txt
	touch $@

# onnxruntime-node would download CUDA after its installation.
.web-test/installed: tests/web/package.json .venv/installed
	$(BIN)/python -m pip install --quiet --upgrade --target .web-test playwright==1.65.2
	cp tests/web/package.json .web-test/
	npm install --prefix .web-test --ignore-scripts --no-audit --no-fund --silent
	touch $@

.venv-timm/installed: tests/timm/requirements.txt
	$(PYTHON) -m venv .venv-timm
	.venv-timm/bin/python -m pip install --quiet -r tests/timm/requirements.txt
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,dev,onnx]"
	touch $@
