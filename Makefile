# The commands of the README.

CARGO ?= cargo

.PHONY: all setup build demo test lint bench clean

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

clean:
	$(CARGO) clean
