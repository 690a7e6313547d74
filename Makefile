# The two main commands are `make train` and `make test`. Targets that depend on `setup` first install .venv if
# necessary (see launch/install.py).
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
PG19 ?=
LOCKS := launch/constraints-cpu.txt launch/constraints-cuda.txt

.PHONY: setup lock train repeat test check bench bench-gpu figures clean

setup: .venv/.installed

.venv/.installed: pyproject.toml launch/install.py $(LOCKS)
	$(PYTHON) launch/install.py

# A virtual environment breaks when its folder is moved (its scripts contain absolute paths), so it is set up again.
ifneq ($(CURDIR),$(shell sed -n 2p .venv/.installed 2>/dev/null))
.PHONY: .venv/.installed
endif

lock:  ## re-resolve the locked versions after a change in pyproject.toml; ARGS=--upgrade takes the newest
	$(PYTHON) -m launch.lock $(ARGS)

train: setup  ## train a small model on the built-in corpus, then run `make repeat`; ARGS="seed=1 ..." trains only
	$(BIN)/python train.py experiment=cpu_demo $(ARGS)
	$(if $(ARGS),,@$(MAKE) --no-print-directory repeat)

ANSWERS ?= 62
REPEAT = lengths=[64,1024,16384,65536] answers=$(ANSWERS)

repeat: setup  ## show what a memory adds: repeat a distant passage, OVQ versus a window; ANSWERS=620 tests longer
	$(BIN)/python -m launch.sweep --at-once 2 experiment=repeat,repeat_window
	$(BIN)/python -m eval.accuracy run=runs/repeat_window $(REPEAT)
	$(BIN)/python -m eval.accuracy run=runs/repeat $(REPEAT)
	$(BIN)/python -m eval.accuracy run=runs/repeat $(REPEAT) num_centroids=16384
	$(BIN)/python -m eval.plot runs=[runs/repeat,runs/repeat_window] kind=accuracy out=runs/repeat.png

test: setup  ## run the whole test suite; ARGS="tests/test_model.py -k causal" selects tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup  ## check style and types
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check . && $(BIN)/python -m mypy ovq data eval launch train.py

bench: setup  ## benchmark operators, training steps and inference on this CPU against peers; about 20 minutes
	$(BIN)/python -m eval.bench.cpu $(ARGS)

bench-gpu:  ## run all GPU checks and benchmarks, in at most nine minutes; skips setup, so needs no network
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m eval.bench.gpu $(ARGS)

figures: setup  ## make the CPU-scale figures, resuming if interrupted; PG19="data=... tokenizer..." adds those on PG19
	for figure in fig4 fig5 fig7 fig8 memory sensitivity; do $(BIN)/python -m eval.figures.$$figure $(ARGS) || exit; done
	$(if $(PG19),for figure in fig6 memory_pg19; do $(BIN)/python -m eval.figures.$$figure $(PG19) $(ARGS) || exit; done)

clean:  ## remove the environment and tool caches; keeps runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
