# make install   .venv with everything that demo and test need (once)
# make demo      quantize the bundled model to 2 bits, compare, generate text
# make demo-gptq the same with GPTQ as a further method (installs gptqmodel first)
# make install-autoround   for `bitsmoe compare --methods autoround`
# make ablation  what each element of the method is worth (15 minutes)
# make test      all tests; make lint, make format, make check
PYTHON ?= python3
# The wheel of the package index carries CUDA on Linux; set TORCH to install another build.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

EXAMPLE := examples/moe-tiny
CALIBRATION := examples/data/calibration.jsonl
EVAL := examples/data/eval.jsonl
COMPARE = $(BIN)/bitsmoe compare $(EXAMPLE) --bits 2.0 --dataset $(CALIBRATION) --eval $(EVAL) \
	--prompt "In the beginning there was"

.PHONY: install install-gptq install-autoround demo demo-gptq ablation test lint format check clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e ".[dev,report]"
	touch $@

# gptqmodel's own dependency list replaces torch and pins numpy; these are the parts that it uses.
install-gptq: $(VENV)/.installed-gptq
$(VENV)/.installed-gptq: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps gptqmodel==7.6.0 defuser==0.0.28 device-smi==0.5.7 \
		logbar==0.4.15 pypcre==0.6.4 tokenicer==0.0.14
	$(BIN)/pip install -q accelerate==1.15.0 pillow==13.0.0 requests==2.34.2 threadpoolctl==3.8.0
	touch $@

install-autoround: $(VENV)/.installed-autoround
$(VENV)/.installed-autoround: $(VENV)/.installed
	$(BIN)/pip install -q auto-round==0.16.1
	touch $@

demo: install
	$(COMPARE) --methods full,rtn,bitsmoe

demo-gptq: install-gptq
	$(COMPARE) --methods full,rtn,gptq,bitsmoe

ablation: install
	$(BIN)/python examples/ablation.py $(EXAMPLE) --dataset $(CALIBRATION) --eval $(EVAL)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
