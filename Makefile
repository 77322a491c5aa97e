# make demo   the page with the shipped model      make test    the tests
# make setup  the .venv (done by every target)     make check   lint, format, types
# make model  train the shipped model from nothing make bench   every benchmark, one JSON line each
# make docs   the pages and the API reference      make gpu    right and fast on a GPU, in minutes
# make llamacpp   the tests of llama.cpp as an engine, which it builds in minutes

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Without an NVIDIA GPU the CPU build of torch is enough, and gigabytes smaller.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)

.PHONY: setup demo test test-slow check docs lowest llamacpp vllm bench gpu pictures real model mutants clean

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints-cpu.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing FluxChat and its tools into $(VENV) ..."
	@$(PY) -m pip install -q --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	@$(PY) -m llm_bridge.assets.fetch
	@touch $@

demo: setup
	@$(PY) -m app web

# One worker more than cores, since some of the time is waiting; a file's tests stay together, since they share what is
# costly to make.
WORKERS := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2) + 1 )))
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup
	@$(PYTEST) -m "not slow"

test-slow: setup
	@$(PYTEST) -m slow

check: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# Into site/, without network; a warning is an error.
docs: setup
	@$(PY) -m mkdocs build --strict

# docs/page.webp and docs/page/, taken of the real page in Chromium; some minutes.
pictures: setup
	@$(PY) -m tests.pictures

# Errors planted in a copy of the source, each of which some test must notice; takes minutes.
mutants: setup
	@$(PY) -m tests.mutants

# The lowest versions of what FluxChat and its extras need, in an environment of their own; needs uv and Python 3.11 or
# older. Of the extra gguf `make llamacpp` takes the lowest.
LOWEST := build/lowest
EXTRAS := library,mcp,speech,ray,json
lowest:
	@$(PYTHON) -m uv venv -q --allow-existing --python $(PYTHON) $(LOWEST)
	@$(PYTHON) -m uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[$(EXTRAS)]' \
		'pytest>=8' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6' 'hypothesis>=6.100' 'tokenizers>=0.20' 'jsonschema>=4.20'
	@$(LOWEST)/bin/python -m llm_bridge.assets.fetch
	@$(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" tests/llm_bridge \
		tests/app/test_chat.py tests/app/test_cli.py tests/app/library tests/app/speech tests/app/test_mcp_server.py
	@$(LOWEST)/bin/python -m pytest -m slow tests/app/library/test_ray.py

# The tests of llama.cpp as an engine, in an environment of its own beside .venv's packages; builds it, in minutes.
LLAMA := build/llamacpp
llamacpp: setup
	@test -x $(LLAMA)/bin/python || $(PYTHON) -m venv $(LLAMA)
	@$(PY) -c 'import site; print(site.getsitepackages()[0])' > \
		"$$($(LLAMA)/bin/python -c 'import site; print(site.getsitepackages()[0])')/fluxchat.pth"
	@$(LLAMA)/bin/python -m pip install -q --disable-pip-version-check 'llama-cpp-python>=0.3.36'
	@OMP_NUM_THREADS=1 $(LLAMA)/bin/python -m pytest tests/llm_bridge/engines

# Resumes where it was stopped; some hours on two cores.
RUNS := runs/box
RECIPE = --config training/recipes/$(1).yaml --resume
# Where most of the time goes, each core takes half of a batch.
BOTH := $(VENV)/bin/torchrun --nproc-per-node 2 -m
model: export OMP_NUM_THREADS = 1
model: setup
	@$(PY) -m training.synthetic fetch
	@$(PY) -m training.umt $(call RECIPE,cpu/umt)
	@$(BOTH) training.clip $(call RECIPE,box/clip) optim.micro_batch=32
	@$(PY) -m training.projector_warmup $(call RECIPE,box/projector_warmup)
	@$(BOTH) training.chat_stage1 $(call RECIPE,box/chat_stage1)
	@$(BOTH) training.chat_lora $(call RECIPE,box/chat_lora)
	@$(BOTH) training.chat_lora $(call RECIPE,box/chat_lora_answers)
	@$(PY) -m training.optimize_tokens --model $(RUNS)/chat_lora_answers/model --metric open --preset full \
		--first 100000 --clips 90 --tokens 64 128 256 --frames 8 16 --resolutions 112 --search full --no-times \
		--install $(RUNS)/chat_lora_answers/model --out $(RUNS)/plan
	@$(PY) -m training.evaluate world --model $(RUNS)/chat_lora_answers/model --clips 300 --budget 256 128 64 --plan \
		--compare uniform random --out $(RUNS)/world.json
	@$(PY) -m training.release --model $(RUNS)/chat_lora_answers/model --figures $(RUNS)/world.json \
		--alignment $(RUNS)/clip/alignment.safetensors

bench: setup
	@for name in encoder decode estimate second_turn start stage1 serve llm library; do $(PY) -m tests.bench.$$name || exit 1; done

# DEVICE=cpu takes the same paths, tiny. Runs where nothing can be installed: whatever python has torch and transformers.
GPU_PY = $(if $(wildcard $(PY)),$(PY),$(PYTHON))
gpu:
	@$(GPU_PY) -m tests.bench.gpu $(if $(DEVICE),--device $(DEVICE)) $(if $(ONLY),--only $(ONLY))

# The engine of vLLM with a real server, in an environment of its own (3.4 GB).
VLLM := build/vllm
vllm: setup
	@$(PY) -m tests.vllm_environment $(VLLM)
	@FLUXCHAT_VLLM_PYTHON=$(VLLM)/bin/python $(PY) -m pytest tests/llm_bridge/engines/test_vllm.py tests/llm_bridge/engines/test_vllm_server.py

real: setup
	@$(PY) -m app.compare_budgets $(if $(MODEL),--model $(MODEL)) $(CLIPS)

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
