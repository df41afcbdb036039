VENV := .venv
PYTHON := $(VENV)/bin/python
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: setup demo quick soak test lint

setup: $(VENV)/installed

# Made once; again only when a file that says what to install changes.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt $(wildcard third_party/detectron2/*.*)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt ./third_party/detectron2 -e '.[deploy,dev,pretrained]'
	touch $@

demo: setup
	$(RUN) python tools/demo.py --output output/demo

quick: setup
	$(RUN) python tools/quick.py --output output/quick

soak: setup
	$(RUN) python -m tools.soak --output output/soak

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .

# A process per core, each with one thread.
test: lint
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile
