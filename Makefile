VENV := .venv
PYTHON := $(VENV)/bin/python
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

# Of `make test-main`: one environment per source, which is made anew for another one.
MAIN := .venv-main
IN_MAIN := . $(MAIN)/bin/activate &&
MAIN_INSTALLED := $(MAIN)/installed-$(subst /,_,$(subst :,_,$(DETECTRON2)))

.PHONY: setup demo quick soak test test-main test-matrix lint

setup: $(VENV)/installed

# Made once; again only when a file that says what to install changes.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt $(wildcard third_party/detectron2/*.*)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt ./third_party/detectron2 -e '.[deploy,openvino,dev,pretrained]'
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

# Detectron2 of DETECTRON2, a checkout or what pip takes: the whole suite, then for two detectors
# teacher, FGD student, export, verification.
test-main: $(MAIN_INSTALLED)
	$(IN_MAIN) OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile
	$(IN_MAIN) python tools/quick.py --output output/test-main --only retinanet frcnn

# The README's recipe; tests/test_readme.py compares the two.
$(MAIN_INSTALLED): setup.cfg constraints.txt | $(filter output/checkout,$(DETECTRON2))
	@test -n "$(DETECTRON2)" || { echo "DETECTRON2 is not set: give a checkout, an address" \
	  "(git+https://...), or output/checkout, which is v0.6 in the layout of main" >&2; exit 2; }
	python3 -m venv --clear $(MAIN)
	$(IN_MAIN) pip install -q -c constraints.txt torch torchvision setuptools wheel ninja
	$(IN_MAIN) pip install -q -c constraints.txt --no-build-isolation '$(or $(wildcard $(DETECTRON2)/.),$(DETECTRON2))'
	$(IN_MAIN) pip install -q -c constraints.txt -e '.[deploy,openvino,dev,pretrained]'
	touch $@

# Where upstream's source cannot be had.
output/checkout: | setup
	$(RUN) python tools/checkout.py $@

test-matrix: setup
	$(RUN) OMP_NUM_THREADS=1 python -m tools.versions --output output/versions
