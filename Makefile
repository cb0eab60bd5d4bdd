# One virtual environment, made from whatever python3 >= 3.11 there is, with the versions of constraints.txt.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: setup demo test test-all lint docs site clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "seqlab needs python3 >= 3.11; name one with: make PYTHON=/path/to/python3"; exit 2; }
	@if command -v uv >/dev/null; then \
		uv venv -q --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV) && \
		uv pip install -q --python $(BIN)/python -e '.[test]' -c constraints.txt; \
	else \
		$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]' -c constraints.txt; \
	fi
	@touch $@

demo: setup
	@$(BIN)/seqlab train demo --workdir runs/demo
	@$(BIN)/seqlab stream runs/demo --prompt 'def ' --max-tokens 2000

test: setup
	$(BIN)/python -m pytest -q -n 2 -m 'not slow'

test-all: setup
	$(BIN)/python -m pytest -q -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: setup
	$(BIN)/python -m seqlab.tooling.mixer_pages docs/mixers
	$(BIN)/python -m seqlab.tooling.reference_pages docs/reference

# The site has an environment of its own: the pages are Markdown, and nobody needs a generator to work on the code.
# (The variable silences what mkdocs-material says of a future mkdocs.)
SITE ?= .venv-site

site: $(SITE)/.ready
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

$(SITE)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install -q --disable-pip-version-check mkdocs-material -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) $(SITE) build dist *.egg-info
