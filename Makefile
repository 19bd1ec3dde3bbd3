# The commands of the README.

CARGO ?= cargo

.PHONY: all setup build demo test lint bench fuzz clean

all: build

setup:
	@tools/setup.sh

build: setup
	$(CARGO) build --release --locked -p frazil-tools -p frazil-benches

demo: setup
	$(CARGO) run --release --locked --quiet -p frazil-tools -- demo

# Formatting, lints and documentation first: they fail fastest.
lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --quiet

test: lint
	$(CARGO) test --workspace --locked

bench: build
	target/release/frazil-bench floors
	target/release/frazil-bench checkpoint
	target/release/frazil-bench resume
	target/release/frazil-bench store
	target/release/frazil-bench store-frames

# Every parser of the store under a coverage-guided fuzzer, FUZZ_SECONDS each. Needs cargo-fuzz.
FUZZ_SECONDS ?= 60
fuzz: setup
	cd snapstore && for target in header record node delta fingerprints pack_index journal manifest reference; do \
		RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --sanitizer none $$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

clean:
	$(CARGO) clean
