# The commands of this repository; `make help` lists them. Everything they make is under build/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

JOBS := $(shell nproc)
FUZZ_SECONDS := 60
FUZZ_RUNS := 1000000
PYTHON := build/venv/bin/python
BENCH_PYTHON := build/bench-venv/bin/python
VLLM_PYTHON := build/vllm-venv/bin/python
CPP_SOURCES := '*.cc' '*.h' '*.cu' '*.cuh'
REPORTS := build/test-reports
MODEL := build/models/SmolLM2-135M-Instruct

.PHONY: help
help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: demo
demo: programs build/venv/.complete $(MODEL)  ## a real prompt, prefilled, handed over and decoded
	@$(PYTHON) client/python/examples/demo.py --build=build

.PHONY: demo-gpu
demo-gpu: with-a-gpu programs build/bench-venv/.complete $(MODEL)  ## transformers decodes on the GPU that prefilld computed on, without a copy; installs torch (gigabytes)
	@$(BENCH_PYTHON) client/python/examples/demo_gpu.py --build=build

.PHONY: with-a-gpu
with-a-gpu:
	@nvidia-smi > /dev/null 2>&1 || { echo "there is no NVIDIA GPU here (nvidia-smi finds none)" >&2; exit 1; }

.PHONY: demo-vllm
demo-vllm: programs build/vllm-venv/.complete $(MODEL)  ## stock vLLM answers from prefilld's KV; installs 6 GB, asks first (YES=1: does not)
	@$(VLLM_PYTHON) client/python/examples/demo_vllm.py --build=build

.PHONY: build
build: configured  ## everything in C++, tests included
	@cmake --build build -j$(JOBS)

.PHONY: cuda
cuda: packages  ## the programs with the CUDA kernels, or an error where there is no nvcc
	@cmake --preset cuda || { cmake --preset release > /dev/null; exit 1; }  # else every later build fails too
	@cmake --build build -j$(JOBS) --target prefilld prefillctl

.PHONY: test
test: build build/venv/.complete  ## unit tests, those that need a GPU, then end-to-end tests; ends with their counts
	@rm -rf $(REPORTS) && mkdir $(REPORTS)
	@worst=0; \
	for label in unit gpu e2e; do \
		[ $$label = gpu ] && none=ignore jobs=1 || none=error jobs=$(JOBS); \
		ctest --test-dir build -j$$jobs --output-on-failure --no-tests=$$none -L $$label --output-junit test-reports/ctest-$$label.xml \
			|| worst=$$(( $$? > worst ? $$? : worst )); \
	done; \
	$(PYTHON) tests/summary.py $(REPORTS); \
	exit $$worst

.PHONY: test-vllm
test-vllm: programs build/vllm-venv/.complete $(MODEL)  ## vLLM and transformers on prefilld's KV; installs 6 GB, asks first (YES=1: does not)
	@ctest --test-dir build --output-on-failure --no-tests=error -L vllm

.PHONY: test-sanitized
test-sanitized: packages  ## unit tests under the address and undefined-behaviour sanitizers
	@cmake --preset dev
	@cmake --build --preset dev -j$(JOBS)
	@ctest --preset dev --no-tests=error

.PHONY: fuzz
fuzz: build/venv/.complete  ## every fuzzer of tests/fuzz for FUZZ_SECONDS (60) or FUZZ_RUNS (a million), as many at a time as there are processors
	@deploy/install-packages.sh clang libclang-rt-dev
	@cmake --preset fuzz
	@cmake --build --preset fuzz -j$(JOBS)
	@$(PYTHON) tests/fuzz/run.py --seconds=$(FUZZ_SECONDS) --runs=$(FUZZ_RUNS)

.PHONY: sanitize-gpu
sanitize-gpu: with-a-gpu configured  ## the small GPU tests under compute-sanitizer's memcheck, racecheck and synccheck
	@command -v compute-sanitizer > /dev/null || { echo "sanitize-gpu: there is no compute-sanitizer (it comes with the CUDA toolkit)" >&2; exit 1; }
	@cmake --build build -j$(JOBS) --target cuda_kernels_test
	@for tool in memcheck racecheck synccheck; do \
		echo "== $$tool"; \
		compute-sanitizer --tool=$$tool --error-exitcode=1 build/tests/cuda_kernels_test --gtest_brief=1 --gtest_filter='*Smoke*'; \
	done

.PHONY: bench
bench: build build/bench-venv/.complete $(MODEL)  ## quality and speed, beside transformers
	@$(BENCH_PYTHON) tests/bench/run.py

.PHONY: format
format: build/format-venv/.complete  ## clang-format and ruff on what we wrote
	@git ls-files $(CPP_SOURCES) | xargs clang-format -i
	@build/format-venv/bin/ruff check --fix .

.PHONY: format-check
format-check: build/format-venv/.complete  ## whether format would change anything
	@git ls-files $(CPP_SOURCES) | xargs clang-format --dry-run -Werror
	@build/format-venv/bin/ruff check .

.PHONY: clean
clean:  ## remove build/
	@rm -rf build

# What the demo runs: not the tests.
.PHONY: programs
programs: configured
	@cmake --build build -j$(JOBS) --target prefilld prefillctl

.PHONY: configured
configured: packages
	@test -f build/build.ninja || cmake --preset release

.PHONY: packages
packages:
	@deploy/install-packages.sh

build/venv/.complete: client/python/requirements.txt client/python/pyproject.toml | packages
	@python3 -m venv build/venv
	@$(PYTHON) -m pip install --no-deps -r client/python/requirements.txt
	@$(PYTHON) -m pip install --no-deps --no-build-isolation -e client/python
	@touch $@

build/format-venv/.complete: Makefile
	@python3 -m venv build/format-venv
	@build/format-venv/bin/pip install --quiet ruff==0.14.14
	@touch $@

build/vllm-venv/.complete: client/python/requirements-vllm.txt client/python/pyproject.toml | packages
	@test "$(YES)" = 1 || test -e build/vllm-venv || { read -r -p "This installs vLLM, about 6 GB, under build/vllm-venv. Go on? [y/N] " answer && [[ "$$answer" == [yY]* ]]; } \
		|| { echo "not installed; YES=1 does not ask" >&2; exit 1; }
	@python3 -m venv build/vllm-venv
	@$(VLLM_PYTHON) -m pip install --no-deps -r client/python/requirements-vllm.txt
	@$(VLLM_PYTHON) -m pip install --no-deps --no-build-isolation -e client/python
	@touch $@

build/bench-venv/.complete: tests/bench/requirements.txt client/python/pyproject.toml | packages
	@python3 -m venv build/bench-venv
	@$(BENCH_PYTHON) -m pip install -r tests/bench/requirements.txt
	@$(BENCH_PYTHON) -m pip install --no-deps -e client/python
	@touch $@

# The directory appears when it is complete.
$(MODEL): | build/venv/.complete
	@$(PYTHON) client/python/examples/convert_smollm2.py $@
