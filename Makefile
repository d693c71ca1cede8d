PYTHON ?= python

.PHONY: bench bench-quick
bench:
	$(PYTHON) -m benchmarks.run --size llama-1.1b --rounds 5 --peer-rounds 1
bench-quick:
	$(PYTHON) -m benchmarks.run --quick
