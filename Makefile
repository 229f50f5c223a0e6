# Two commands do everything: `make demo` and `make test`. Each sets up .venv on its first run.
PYTHON ?= python3
RUN = .venv/bin/python -m

.PHONY: demo test docs torture lint clean

demo: .venv/.installed
	$(RUN) tok2img demo

# Two processes of one thread each.
test: .venv/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) pytest -n 2

# The manual, as a site in site/ that opens from the disk: start with site/index.html.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet --strict

# Some minutes: training and tokenizing killed again and again, and what must hold for all input tried on much of it.
torture: .venv/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/python tests/robustness/kill_training.py 200
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/python tests/robustness/kill_tokenization.py 200
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CRASH_EVERY=1 $(RUN) pytest tests/tok2img/trainer/test_fault_tolerant_trainer.py -k crash
	OMP_NUM_THREADS=1 .venv/bin/python tests/robustness/codes_in_any_batch.py 100000
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PROPERTY_CASES=1000 $(RUN) pytest -m hypothesis

lint: .venv/.installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

# uv is quick where it is at hand; it finds local wheels through UV_FIND_LINKS as pip does through PIP_FIND_LINKS.
.venv/.installed: pyproject.toml constraints.txt
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python $(PYTHON) .venv && \
		UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[dev,eval]'; \
	else \
		$(PYTHON) -m venv .venv && .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'; \
	fi
	@touch $@

clean:
	rm -rf .venv runs site
