# `make demo` runs the main job on a real model; `make test` builds and passes everything.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup demo test lint bench clean

setup: .venv/ready

.venv/ready: pyproject.toml Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name '*.toml')
	@command -v cargo >/dev/null || { echo "rsprune needs the Rust toolchain: install it from https://rustup.rs and run make again." >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "rsprune needs Python 3.11 or newer: install it, or name yours with make PYTHON=python3.12." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "maturin>=1.9,<2"
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/maturin develop --release --extras dev
	touch $@

demo: setup
	$(BIN)/rsprune demo

# The summary lines of cargo and of pytest come last.
test: lint
	cargo test --workspace --quiet
	$(BIN)/python -m pytest

lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest rsprune._core --allowlist tests/stubtest-allowlist.txt --ignore-unused-allowlist

bench: setup
	cargo bench --bench kernels
	@echo "Quality figures: see benches/README.md"

clean:
	rm -rf target .venv python/rsprune/*.so
