# make demo   the page with the shipped model      make test    the tests
# make setup  the .venv (done by every target)     make check   lint, format, types
# make model  train the shipped model from nothing make bench   every benchmark, one JSON line each

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Without an NVIDIA GPU the CPU build of torch is enough, and gigabytes smaller.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)

.PHONY: setup demo test test-slow check bench model clean

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints-cpu.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing FluxChat and its tools into $(VENV) ..."
	@$(PY) -m pip install -q --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	@$(PY) -m llm_bridge.fetch
	@touch $@

demo: setup
	@$(PY) -m app web

test: setup
	@$(PY) -m pytest -m "not slow"

test-slow: setup
	@$(PY) -m pytest

check: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# Resumes where it was stopped; some hours on two cores.
RUNS := runs/box
STAGE = $(PY) -m training.$(1) --config training/recipes/box/$(1).yaml --resume
model: setup
	@$(PY) -m training.demo_world fetch
	@$(call STAGE,clip)
	@$(call STAGE,warm_start)
	@$(call STAGE,chat_stage1)
	@$(call STAGE,chat_lora)
	@$(PY) -m training.optimize_tokens --encoder $(RUNS)/chat_lora/model --alignment $(RUNS)/clip --pool 1 \
		--tokens 256 128 64 32 --frames 4 8 16 --resolutions 84 112 --clips 128 --preset solo --no-times \
		--out $(RUNS)/tokens --install $(RUNS)/chat_lora/model
	@$(PY) -m training.evaluate world --model $(RUNS)/chat_lora/model --preset solo --clips 300 \
		--budget 64 32 16 --compare uniform random --plan --out $(RUNS)/world.json
	@$(PY) -m training.ship --model $(RUNS)/chat_lora/model --figures $(RUNS)/world.json --preset solo \
		--alignment $(RUNS)/clip/alignment.safetensors

bench: setup
	@for name in encoder decode estimate second_turn start stage1 serve; do $(PY) -m tests.bench.$$name || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
