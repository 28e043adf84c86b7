# Every target sets up what it needs: python3 and make are enough. PYTHON=python3.12 make test uses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUN := OMP_NUM_THREADS=$(shell nproc 2>/dev/null || echo 2) $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml
DEMO := runs/demo
SMALL = --sequence-length 128 --batch-size 32 --micro-batch-size 32 --log-every 25 --warmup-steps 40 --cache-dir $(DEMO)/cache

.PHONY: setup demo test lint bench clean

setup: $(READY)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "forge needs Python 3.11 or newer; say PYTHON=python3.x make")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(READY)

# A small trunk on text that is on every machine, a module for Python and one for C++, and what each is worth.
demo: $(READY)
	$(RUN) train_shared.py --data local:docs@0.8 local:python@0.1 local:cpp@0.1 --output-dir $(DEMO)/trunk \
		--preset tiny --tokenizer train:2048 $(SMALL) --steps 480 --lr 3e-3 --val-every 0
	$(RUN) train_module.py --trunk $(DEMO)/trunk/trunk --name python --data local:python --output-dir $(DEMO)/python \
		$(SMALL) --steps 190 --val-every 0
	$(RUN) train_module.py --trunk $(DEMO)/trunk/trunk --name cpp --data local:cpp --output-dir $(DEMO)/cpp \
		$(SMALL) --steps 190 --val-every 0
	$(BIN)/python -m forge_common.evaluate --model $(DEMO)/trunk/trunk --module $(DEMO)/python/module $(DEMO)/cpp/module \
		--data docs=local:docs python=local:python cpp=local:cpp --cache-dir $(DEMO)/cache --json $(DEMO)/losses.json
	$(BIN)/python -m forge_common.generate --model $(DEMO)/trunk/trunk --prompt "This package provides" --max-new-tokens 60
	$(BIN)/python -m forge_common.generate --model $(DEMO)/trunk/trunk --module $(DEMO)/python/module --prompt "def main" \
		--max-new-tokens 60
	$(BIN)/python -m forge_common.generate --model $(DEMO)/trunk/trunk --module $(DEMO)/cpp/module --prompt "#include" \
		--max-new-tokens 60

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python benchmarks/engine.py

clean:
	rm -rf runs .pytest_cache .ruff_cache
