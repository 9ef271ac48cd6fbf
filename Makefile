# `make demo` and `make test` set up all that they need, once: Debian packages, a virtual environment, the extension
# module, and the guests. A target that has nothing to do costs no time.

PYTHON ?= python3
BIN := .venv/bin
TOOLS := .venv/.tools
EXTENSION := .venv/.extension
WHEEL_ENVIRONMENT := target/wheel-environment
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
BENCH_ENVIRONMENT := target/bench-environment

# What builds the extension and the guest's kernel, what tests run in the guest, whose root is this system's, and beside
# it: qemu-storage-daemon is in either of its two packages, depending on the release, and testpmd is in dpdk-dev.
PACKAGES := bc binutils bison busybox-static debian-archive-keyring dpdk-dev e2fsprogs flex gcc i2c-tools libc6-dev make \
    mount python3-venv qemu-system-common qemu-utils tshark valgrind xz-utils

# In a folder of its own: maturin sets PyO3 up in another way, and each would make the other build everything again.
CLIPPY := PYO3_PYTHON=$(CURDIR)/$(BIN)/python cargo clippy --target-dir target/clippy --locked --all-targets

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint fuzz guest wheel bench instructions clean packages

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(EXTENSION) uml ## Python classes are the devices of a real Linux: see what it does with them
	$(BIN)/vhost-user demo

test: $(EXTENSION) guest ## all tests: of the core, of the package, and of real guests
	cargo test --locked
	$(BIN)/pytest

lint: $(EXTENSION) ## formatting, clippy, ruff, mypy, the stubs against the module, the workflows
	cargo fmt --check
	$(CLIPPY) -- --deny warnings
	$(CLIPPY) --features python -- --deny warnings
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/stubtest --allowlist tests/packaging/stubtest.allow --ignore-unused-allowlist vhost_user
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/cibuildwheel --platform linux --archs x86_64,aarch64 --print-build-identifiers

bench: bench-environment ## how fast it is, against what others have: under ten minutes on a machine that does nothing else
	rm -rf target/criterion
	-cargo bench --locked --bench rings -- --noplot --warm-up-time 0.3 --measurement-time 1
	-cargo build --release --locked --manifest-path benchmarks/peer/Cargo.toml --target-dir target/peer
	$(BENCH_ENVIRONMENT)/bin/python benchmarks/run.py
	$(BENCH_ENVIRONMENT)/bin/python benchmarks/report.py

instructions: bench-environment ## what a ring and a request cost in instructions, against what is recorded
	cargo bench --locked --no-run --bench instructions
	$(BENCH_ENVIRONMENT)/bin/python benchmarks/instructions.py

# With the release build: what `maturin develop` makes for the tests is slower.
.PHONY: bench-environment
bench-environment: $(TOOLS)
	rm -rf target/bench-wheels
	$(BIN)/maturin build --quiet --release --locked --interpreter $(BIN)/python --out target/bench-wheels
	$(PYTHON) -m venv --clear $(BENCH_ENVIRONMENT)
	$(BENCH_ENVIRONMENT)/bin/pip install --quiet --no-index target/bench-wheels/*.whl

guest: uml qemu peers ## the kernels that the tests boot, and programs that they speak to; the first time takes ten minutes

fuzz: ## FUZZ_SECONDS=60 of each fuzz target; needs a nightly Rust and cargo-fuzz
	for target in $(FUZZ_TARGETS); do \
	    mkdir -p target/fuzz/found/$$target; \
	    cargo +nightly fuzz run --target-dir target/fuzz $$target target/fuzz/found/$$target fuzz/corpus/$$target -- \
	        -max_total_time=$(FUZZ_SECONDS) -max_len=768 -len_control=0 -timeout=20 || exit; \
	done

wheel: $(TOOLS) ## the wheels for this machine, built from the source distribution and tested in an empty environment
	rm -rf dist
	$(BIN)/maturin build --release --locked --sdist --interpreter $(BIN)/python --interpreter python3.14t --out dist
	$(PYTHON) -m venv --clear $(WHEEL_ENVIRONMENT)
	$(WHEEL_ENVIRONMENT)/bin/pip install --no-index dist/*-abi3-*.whl
	$(WHEEL_ENVIRONMENT)/bin/python tests/packaging/wheel.py

clean: ## remove what was made here; the guests stay in ~/.cache/vhost-user
	rm -rf .venv target dist wheelhouse

.PHONY: uml qemu peers
uml qemu peers: $(TOOLS)
	$(BIN)/python guest/build $@

$(EXTENSION): $(TOOLS) Cargo.toml Cargo.lock pyproject.toml $(shell find src -name '*.rs')
	PIP_QUIET=1 $(BIN)/maturin develop --locked
	touch $@

$(TOOLS): pyproject.toml | packages
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --group dev
	touch $@

packages:
	@missing="$(filter-out $(shell dpkg-query -W -f '$${db:Status-Status} $${Package}\n' $(PACKAGES) 2>&1 | sed -n 's/^installed //p'),$(PACKAGES))"; \
	if [ -z "$$missing" ]; then exit; fi; \
	if [ $$(id -u) != 0 ]; then \
	    echo "Debian packages are missing. Install them, then run make again:"; \
	    echo "    sudo apt-get install $$missing"; \
	    exit 1; \
	fi >&2; \
	apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $$missing
