# Every target makes `.venv` and installs what it needs. PYTHON names the interpreter; pip's own variables (PIP_CONSTRAINT ...) apply.

PYTHON ?= python3
VENV := .venv/bin
INSTALLED := .venv/.installed
READY := .venv/.installed-dev
DOCS_READY := .venv/.installed-docs
TRL_READY := .venv-trl/.installed
TRL_SOURCE := .venv-trl/trl-0.23.1.tar.gz
LOWEST := .venv-lowest/bin
LOWEST_READY := .venv-lowest/.installed
OFFLINE := HF_HUB_OFFLINE=1
TEST := OMP_NUM_THREADS=1 $(OFFLINE) $(VENV)/python -m pytest
# What `bench`, `faults` and `gpu` run on: .venv, or PYTHON where the command line names it.
MEASURE := $(if $(filter command,$(origin PYTHON)),$(PYTHON),$(VENV)/python)
MEASURE_READY := $(if $(filter command,$(origin PYTHON)),,$(READY))

.PHONY: quickstart test test-runs test-parts test-all test-lowest lint types bench bench-cpu bench-migrating bench-scaling faults experiment-quickstart gpu wheel screenshots docs
.DEFAULT_GOAL := quickstart

$(INSTALLED): pyproject.toml
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --editable .
	touch $@

$(READY): $(INSTALLED)
	$(VENV)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(DOCS_READY): $(INSTALLED)
	$(VENV)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# Train the embedded model with RL on this machine and write runs/quickstart/report.html; ARGS=--overwrite replaces an older run.
quickstart: $(INSTALLED)
	$(OFFLINE) $(VENV)/adascope-fast train configs/quickstart.toml $(ARGS)

# Two processes side by side, each with one thread and a closing line of its own: what trains whole runs, and the rest.
test: $(READY)
	$(MAKE) --jobs=2 test-runs test-parts

RUNS := tests/bench tests/commands tests/engine tests/examples tests/experiments tests/training
test-runs: $(READY)
	$(TEST) $(RUNS)

# The kernels run a second time under Triton's interpreter, in a process of its own: the switch is read at import.
test-parts: $(READY)
	$(TEST) $(addprefix --ignore=,$(RUNS))
	TRITON_INTERPRET=1 $(TEST) tests/kernels

# TRL's own example and tests are run on ours, so its source distribution is fetched.
test-all: $(READY) $(TRL_SOURCE)
	ADASCOPE_TRL_SOURCE=$(CURDIR)/$(TRL_SOURCE) $(TEST) -m "not gpu"
	TRITON_INTERPRET=1 $(TEST) tests/kernels -m "not gpu"

$(TRL_SOURCE): $(READY)
	$(VENV)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(dir $@) trl==0.23.1
	touch $@

# The lower bounds of pyproject.toml, exactly.
$(LOWEST_READY): pyproject.toml .ci/lowest.txt
	test -x $(LOWEST)/python || $(PYTHON) -m venv .venv-lowest
	PIP_CONSTRAINT=$(CURDIR)/.ci/lowest.txt $(LOWEST)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# To be run by hand when a lower bound changes: the tests on all of them. Some of these versions warn of each other:
# torch's profiler of itself, transformers' tokenizer of tokenizers, Triton 3.6's interpreter of numpy.
test-lowest: $(LOWEST_READY)
	OMP_NUM_THREADS=1 $(OFFLINE) $(LOWEST)/python -m pytest \
	    -W 'ignore:Warning. Profiler clears events:UserWarning' -W 'ignore:Deprecated in 0.9.0:DeprecationWarning'
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(OFFLINE) $(LOWEST)/python -m pytest tests/kernels \
	    -W 'ignore:Conversion of an array:DeprecationWarning'

lint: $(READY)
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .

types: $(READY)
	$(VENV)/pyright

# Time and traffic of each operation, on a GPU if there is one; ARGS="--ops ... --rows ..." chooses, --help lists.
# `make bench PYTHON=python3` uses that Python as it is.
bench: $(MEASURE_READY)
	PYTHONPATH=. $(OFFLINE) $(MEASURE) bench/kernels/run.py $(ARGS)

# The quickstart and its control that trains every step, over three seeds, two runs of one thread at a time.
experiment-quickstart: $(READY)
	$(OFFLINE) $(VENV)/python experiments/interval/interval.py --rewards scene_attributes --arms adascope every_step \
	    --iterations 12 --jobs 2 --work runs/experiment_quickstart --out experiments/interval/results/quickstart.json $(ARGS)

# TRL's last release with a DDPOTrainer needs transformers 4, so it has an environment of its own, with the same torch.
$(TRL_READY): $(READY)
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet trl==0.23.1 'transformers<5' diffusers peft scipy \
	    torch==$$($(VENV)/python -c 'import torch; print(torch.__version__.split("+")[0])')
	touch $@

# An iteration of RL end to end against TRL and an eager loop: CPU time, ratios within one run, under five minutes.
bench-cpu: $(TRL_READY)
	$(OFFLINE) $(VENV)/python bench/end_to_end.py --device cpu --sweep --out bench/results/end_to_end_cpu.json

# One script for TRL's DDPOTrainer, and the same with its import changed: CPU time of an epoch.
bench-migrating: $(TRL_READY)
	$(OFFLINE) $(VENV)/python bench/migrating.py $(ARGS)

# What processes send each other: counted on 1, 2 and 4 of this machine, computed for 8 to 512 GPUs.
bench-scaling: $(READY)
	$(OFFLINE) $(VENV)/python bench/scaling.py $(ARGS)

# Kills, damaged files, full disks, bad rewards and more, put into real runs; a fault that is not withstood is an error. About 20 minutes.
faults: $(MEASURE_READY)
	PYTHONPATH=. $(OFFLINE) $(MEASURE) -m bench.faults.run $(ARGS)

# GPU tests, the table of kernels, the end-to-end comparison, drift and published models, in this order, under nine minutes; says so where there is no GPU.
# `make gpu PYTHON=python3` uses that Python as it is and installs nothing.
gpu: $(MEASURE_READY)
	PYTHONPATH=. $(OFFLINE) $(MEASURE) bench/gpu.py

# Build the wheel (through the sdist, so that both are tried), install it in a clean environment, and use it from outside the checkout.
wheel: $(READY)
	@set -eu; \
	work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; checkout=$$PWD; \
	$(VENV)/python -m build --outdir "$$work" .; \
	$(PYTHON) -m venv "$$work/venv"; \
	"$$work/venv/bin/python" -m pip install --quiet "$$work"/*.whl; \
	cd "$$work"; export $(OFFLINE) OMP_NUM_THREADS=1; unset PYTHONPATH; \
	venv/bin/python "$$checkout/tests/installed.py" "$$work/venv"; \
	venv/bin/adascope-fast --help; \
	venv/bin/adascope-fast train "$$checkout/configs/tiny.toml" run.folder="$$work/run"; \
	test -s "$$work/run/report.html"; \
	echo "wheel: installed, imported and run from outside the checkout"

# The images of docs/images that show pages of a run, a calibration, an evaluation and a judge, in a headless Chromium; the first three are made if
# they are not there. Those of several runs beside each other are experiments/evaluation's.
screenshots: $(READY)
	test -s runs/quickstart/report.html || $(MAKE) quickstart
	test -s runs/calibration/calibration.json || $(OFFLINE) $(VENV)/adascope-fast calibrate configs/quickstart.toml --prompts 32
	test -s runs/evaluation_quickstart/report.html || $(OFFLINE) $(VENV)/adascope-fast evaluate runs/quickstart --num-prompts 24 --num 4 \
	    --out runs/evaluation_quickstart
	$(VENV)/python tests/reporting/screenshots.py runs/quickstart runs/calibration runs/evaluation_quickstart
	$(VENV)/python tests/judging/screenshots.py

# The documentation as static pages in site/; a warning is an error. The program writes the page of its configuration.
docs: $(DOCS_READY)
	mkdir -p build
	$(VENV)/adascope-fast config --markdown > build/configuration.md
	NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict
