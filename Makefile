# `make demo` shows the main job; `make quick` and `make test` check a change. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
# One thread per process: with two, OpenMP's spin waits made a shared machine 50 times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo gpu imagenette test test-main test-transformers5 test-common test-slow quick coverage lint docs dist
.PHONY: release-check clean

# First real answers, from Lite0's ImageNet weights; then a training run from nothing to the end.
demo: $(VENV)/.ready
	$(PY) examples/write_photos.py demo/photos
	$(PY) convert.py lite0 --output_dir demo/lite0 --overwrite
	$(PY) classify.py --model demo/lite0 --top_k 3 --save_plot demo/photos.png \
	    demo/photos/coffee.png demo/photos/chelsea.png demo/photos/camera.png
	$(PY) examples/write_digits.py demo/digits
	$(VENV)/bin/accelerate launch --config_file accelerate_configs/cpu.yaml train.py --config digits \
	    --data_dir demo/digits --output_dir demo/model --overwrite
	$(PY) validate.py --model demo/model --data_dir demo/digits
	$(PY) classify.py --model demo/model --top_k 3 --save_plot demo/digits.png \
	    demo/digits/val/three/0003.png demo/digits/val/seven/0007.png demo/digits/val/nine/0009.png

# The real models that quantization and export are measured on: B0 and WideSE-B0 warm-started from Lite0, fine-tuned.
# DATA holds train/<class>/ and val/<class>/, e.g. Imagenette's; 10 minutes each on one CPU core.
imagenette: checkpoints/b0-imagenette/config.json checkpoints/widese-b0-imagenette/config.json

.PRECIOUS: checkpoints/%-lite0/config.json
checkpoints/%-lite0/config.json: | $(VENV)/.ready
	$(PY) convert.py lite0 --warm_start $* --images $(or $(DATA),$(error name a folder: make imagenette DATA=DIR))/train \
	    --output_dir $(@D)

checkpoints/%-imagenette/config.json: checkpoints/%-lite0/config.json
	$(PY) train.py --config imagenette-finetune --variant $* --model checkpoints/$*-lite0 \
	    --data_dir $(or $(DATA),$(error name a folder: make imagenette DATA=DIR)) \
	    --output_dir $(@D) --resume auto

# What works on a GPU and how fast, as far as nine minutes go; OUT gets at most eight files. `--only` runs parts again.
gpu: $(VENV)/.ready
	$(PY) benchmarks/gpu_check.py --out $(or $(OUT),benchmarks/$(shell date +%F)-gpu) --seconds 540

test: test-main test-common test-transformers5

test-main: $(VENV)/.ready
	$(PY) -m pytest -n 2 --dist loadfile tests

# What touches transformers, on its newest version, laid over the environment instead of installing torch twice.
NO_TRANSFORMERS = $(patsubst %,tests/test_%.py,cli convert_cli errors file_systems files imports installation lock manifest \
    qat_cli reading release scripts small_outputs squeeze_excite_gradient tables timm_parity tuning way_of_a_recipe)
test-transformers5: $(VENV)/.transformers5
	PYTHONPATH=$(abspath $(VENV))/transformers5 $(PY) -m pytest -n 2 --dist loadfile tests/hub \
	    $(filter-out $(NO_TRANSFORMERS),$(wildcard tests/test_*.py)) \
	    tests/export/test_runtime.py tests/export/test_float.py tests/quantization/test_save_and_load.py

# transformers' own tests of any model, backbone, configuration and image processor, run against our classes.
# Both versions at once, one core each.
COMMON = EFFNET_HF_TRANSFORMERS_TESTS=$$($(PY) tests/common_suite/fetch.py $(VENV)/common) $(PY) -m pytest tests/test_common.py
test-common: $(VENV)/.ready $(VENV)/.transformers5
	( export PYTHONPATH=$(abspath $(VENV))/transformers5; $(COMMON) -p no:cacheprovider ) & newest=$$!; \
	$(COMMON); oldest=$$?; wait $$newest && exit $$oldest

# What `make test` leaves out because it takes minutes: whole runs in processes of their own, the README's commands, and the
# wheel in an environment that has its dependencies but not this folder.
test-slow: $(VENV)/.ready
	$(PY) -m pytest -n 2 --dist loadfile -m slow tests

# Every Python x torch x transformers that we say we support: an hour on two cores, 35 GB of environments.
.PHONY: test-matrix
test-matrix: $(VENV)/.ready
	$(VENV)/bin/pip install --quiet uv
	$(PY) tests/matrix/matrix.py

# What setup.cfg promises, at both ends, each in an environment of its own (7 GB): the oldest version of everything under
# the oldest Python, and the newest under the newest Python, which nothing holds back. What passed becomes requirements/newest.txt.
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13
EXTRAS = dali,dev,jpeg,onnx,openvino,quant,serve,tracking
.PHONY: floors newest
floors: $(VENV)/floors/.ready
	$(VENV)/floors/bin/python -m pytest -n 2 --dist loadfile -W ignore::DeprecationWarning tests

newest:
	rm -rf $(VENV)/newest
	$(NEWEST_PYTHON) -m venv $(VENV)/newest
	$(VENV)/newest/bin/pip install --quiet uv
	$(VENV)/newest/bin/uv pip install --quiet --python $(VENV)/newest/bin/python --editable '.[$(EXTRAS)]'
	$(VENV)/newest/bin/python -m pytest -n 2 --dist loadfile -W 'ignore:Guards may run slower on Python 3.13.0' tests
	echo '# What `make newest` last passed with: see setup.cfg for what is required.' > requirements/newest.txt
	$(VENV)/newest/bin/pip freeze --exclude-editable >> requirements/newest.txt

$(VENV)/floors/.ready: setup.cfg requirements/floors.txt
	rm -rf $(@D)
	$(OLDEST_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --constraint requirements/floors.txt --editable '.[$(EXTRAS)]'
	touch $@

# Real clients of our checkpoints, in environments that have them over ours: for transformers 4.57, for 5, and for
# optimum-intel, which wants another Optimum than the ONNX exporters. What works is in docs/interop.md. Needs npm.
# And the converters of `export` for phones and small devices, which bring a gigabyte.
CLIENTS = -m pytest -n 2 --dist loadfile -m interop --interop_results build/interop.json
NEEDS_HUB_1 = tests/interop/test_space.py tests/interop/test_trackers.py
.PHONY: interop
interop: $(VENV)/interop/.ready $(VENV)/interop5/.ready $(VENV)/interop-intel/.ready
interop: $(VENV)/interop-devices/.ready $(VENV)/interop-litert/.ready
	npm ci --silent --ignore-scripts --prefix tests/interop/js
	npm ci --silent --ignore-scripts --prefix examples/browser
	mkdir -p build && rm -f build/interop.json
	$(VENV)/interop/bin/python $(CLIENTS) tests/interop $(NEEDS_HUB_1:%=--ignore %) --ignore tests/interop/test_openvino.py \
	    --ignore tests/interop/test_devices.py
	$(VENV)/interop-intel/bin/python $(CLIENTS) tests/interop/test_openvino.py
	$(VENV)/interop-devices/bin/python $(CLIENTS) tests/interop/test_devices.py
	$(VENV)/interop-litert/bin/python $(CLIENTS) tests/interop/test_devices.py
	$(VENV)/interop5/bin/python $(CLIENTS) $(NEEDS_HUB_1) $(patsubst %,tests/interop/test_%.py,detectors tracing transformers)
	$(PY) benchmarks/interop.py build/interop.json

$(VENV)/interop/.ready $(VENV)/interop-intel/.ready: BELOW = $(PY)
$(VENV)/interop-devices/.ready $(VENV)/interop-litert/.ready: BELOW = $(PY)
# litert-torch asks for a torch below 2.15, but works with ours.
$(VENV)/interop-litert/.ready: NO_DEPS = --no-deps
$(VENV)/interop5/.ready: BELOW = PYTHONPATH=$(abspath $(VENV))/transformers5 $(PY)
$(VENV)/%/.ready: requirements/%.txt $(VENV)/.ready $(VENV)/.transformers5
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(BELOW) -c "import os, sys; print(*[path for path in sys.path if '$(VENV)' in path], os.getcwd(), sep='\n')" \
	    > $$(echo $(@D)/lib/python*/site-packages)/below.pth
	$(@D)/bin/pip install --quiet $(NO_DEPS) --requirement $<
	touch $@

# While working, in a minute: the linters, and the tests that tests/conftest.py calls quick.
quick: lint
	$(PY) -m pytest -n 2 --dist loadfile -m quick tests

coverage: $(VENV)/.ready
	$(PY) -m pytest -n 2 --dist loadfile --cov --cov-report term:skip-covered tests

# The hooks of .pre-commit-config.yaml, on every file.
lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files -z | xargs -0 $(VENV)/bin/codespell
	$(VENV)/bin/mypy
	if [ -x $(VENV)/bin/hadolint ]; then $(VENV)/bin/hadolint Dockerfile; fi

# The pages and the API reference, into site/. They lie there as in the repository, so that its relative links work.
docs: $(VENV)/.ready
	rm -rf build/pages
	mkdir -p build/pages
	cp -r --parents README.md CONTRIBUTING.md CHANGELOG.md docs benchmarks/*.md benchmarks/*/*.png build/pages
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

$(VENV)/.ready: setup.cfg requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint requirements/constraints.txt \
	    --editable '.[dev,dali,docs,jpeg,onnx,openvino,optimum,quant,serve,tracking]'
	touch $@

$(VENV)/.transformers5: requirements/transformers5.txt $(VENV)/.ready
	rm -rf $(VENV)/transformers5
	$(VENV)/bin/pip install --quiet --no-deps --target $(VENV)/transformers5 --requirement requirements/transformers5.txt
	touch $@

# sdist and wheel, into dist/.
dist: $(VENV)/.ready
	rm -rf dist build/lib
	$(PY) -c "import setuptools.build_meta as build; build.build_sdist('dist'); build.build_wheel('dist')"

# Before a tag: see docs/releasing.md.
release-check: lint docs test test-slow
	test -z "$$(git status --porcelain)"

clean:
	rm -rf $(VENV) demo build dist site *.egg-info
