# Everything sets itself up: the first call makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
# The version of PyTorch that is tested; set TORCH= to keep one that is already in the environment.
TORCH ?= torch==2.13.0
LIMIT ?=

.PHONY: install test test-all lint demo demo-adapters study bench bench-quick fidelity reliability soak docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml native/merge.c native/CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[dev]"
	touch $@

test: install           ## the everyday suite, minutes
	$(RUN)/python -m pytest -n auto

test-all: install       ## everything, with what takes gigabytes or long
	$(RUN)/python -m pytest -n auto -m ""

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff
	$(RUN)/check-jsonschema -q --builtin-schema vendor.github-actions action.yml
	$(RUN)/pre-commit validate-manifest .pre-commit-hooks.yaml
	$(RUN)/pre-commit validate-config .pre-commit-config.yaml
	$(RUN)/shellcheck .github/action/*.sh .ci/run
	$(RUN)/hadolint Containerfile
	$(RUN)/lint-imports

demo-adapters: install  ## the demo's three adapters, trained anew; half an hour and more on one core, cut short it goes on
	$(RUN)/python recipes/demo/family.py
	$(RUN)/python recipes/demo/prepare.py
	for file in alignment task-arithmetic safety; do \
		$(RUN)/safemerge train-adapter recipes/demo/training/$$file.yaml || exit; done

demo: install           ## a real 135 M model: eroded, repaired, scored; LIMIT=40 for a quick look
	$(RUN)/python recipes/demo/family.py
	$(RUN)/safemerge-run recipes/demo/smollm2_arithmetic.yaml --force $(if $(LIMIT),--set evaluate.limit=$(LIMIT) --set evaluate.answer_tokens=32)

study: install          ## docs/preregistration.md, hours on two cores; PART=score does one part, FAMILIES=2 N=90 a subset, MINUTES=60 stops earlier
	$(RUN)/python recipes/demo/family.py
	$(RUN)/python -m benchmarks.study $(PART) $(if $(FAMILIES),--families $(FAMILIES)) $(if $(N),--limit $(N)) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(STUDY)

bench: install          ## against every peer and against copying the bytes, 1.1 B parameters
	$(RUN)/python -m benchmarks.timing.run --size llama-1.1b --rounds 5 --peer-rounds 1

bench-quick: install
	$(RUN)/python -m benchmarks.timing.run --quick

docs: install           ## the generated pages
	$(RUN)/python -m safemerge_recipes.recipe.reference
	$(RUN)/python -m safemerge_recipes.cli.reference

fidelity: install       ## every family with every kind of adapter against PEFT, as a table
	$(RUN)/python -W ignore -m tests.whole.fidelity_table docs/fidelity.md

reliability: install    ## 500 kills and other faults over every verb, as a table; half an hour and more, cut short it goes on
	$(RUN)/python -W ignore -m tests.whole.reliability --kills 500 --results .reliability.jsonl docs/reliability.md

soak: install           ## faults over every verb for half an hour (MINUTES=…), before a release; ends at the first loss
	$(RUN)/python -W ignore -m tests.whole.reliability --minutes $(or $(MINUTES),30)

clean:
	rm -rf $(VENV)
	git clean -qfX native safemerge_recipes
