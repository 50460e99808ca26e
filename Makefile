# `make demo` runs the main job on a real model; `make test` builds and passes everything.
PYTHON ?= python3.11
BIN := .venv/bin
FUZZ_SECONDS ?= 60 # for each target

.PHONY: setup demo test lint compat bench fuzz asan aarch64 nightly clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest rsprune._core --allowlist tests/stubtest-allowlist.txt --ignore-unused-allowlist

# Packed folders in older releases of transformers, installed from PyPI: two minutes and more.
compat: setup
	$(BIN)/python -m pytest -m compat

bench: setup
	cargo bench --bench kernels
	@echo "Quality figures: see benches/README.md"

# Every file in rust/fuzz/src/bin, from its committed corpus; what is found stays in target/fuzz.
fuzz: nightly
	@command -v cargo-fuzz >/dev/null || { echo "make fuzz needs cargo-fuzz: run cargo install cargo-fuzz and make again." >&2; exit 1; }
	export TMPDIR=$$(mktemp -d -p /dev/shm 2>/dev/null || mktemp -d); trap 'rm -rf "$$TMPDIR"' EXIT; \
	for target in $(basename $(notdir $(wildcard rust/fuzz/src/bin/*.rs))); do \
		mkdir -p target/fuzz/corpus/$$target; \
		cargo +nightly fuzz run --fuzz-dir rust/fuzz --target-dir target/fuzz $$target \
			target/fuzz/corpus/$$target rust/fuzz/corpus/$$target \
			-- -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 || exit 1; \
	done

# The core's tests under AddressSanitizer (leaks included); doc tests have no sanitizer.
asan: nightly
	RUSTFLAGS=-Zsanitizer=address cargo +nightly test --package rsprune-core --lib --tests \
		--target x86_64-unknown-linux-gnu --target-dir target/asan

# The core's own tests with NEON, in an emulator: Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross
# and qemu-user-static, and rustup target add aarch64-unknown-linux-gnu.
aarch64:
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu" \
	cargo test --package rsprune-core --lib --target aarch64-unknown-linux-gnu --target-dir target/aarch64

nightly:
	@cargo +nightly --version >/dev/null 2>&1 || { echo "make fuzz and make asan need a nightly Rust: run rustup toolchain install nightly and make again." >&2; exit 1; }

clean:
	rm -rf target .venv python/rsprune/*.so
