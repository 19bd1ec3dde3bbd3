# The commands of the README.

CARGO ?= cargo

.PHONY: all setup setup-tests build install demo test lint bench hot-loops endurance images fuzz clean

all: build

setup:
	@tools/setup.sh

# As setup, plus what only tests need.
setup-tests:
	@tools/setup.sh --tests

build: setup
	$(CARGO) build --release --locked -p frazil-tools -p frazil-benches

# Installs the command, its man pages and its shell completion. DESTDIR is for packagers.
PREFIX ?= /usr/local
share = $(DESTDIR)$(PREFIX)/share
release = $(or $(CARGO_TARGET_DIR),target)/release
install: build
	install -D -m 755 "$(release)/frazil" "$(DESTDIR)$(PREFIX)/bin/frazil"
	"$(release)/frazil" man "$(share)/man/man1"
	install -d "$(share)/bash-completion/completions" "$(share)/zsh/site-functions" "$(share)/fish/vendor_completions.d"
	"$(release)/frazil" completion bash > "$(share)/bash-completion/completions/frazil"
	"$(release)/frazil" completion zsh > "$(share)/zsh/site-functions/_frazil"
	"$(release)/frazil" completion fish > "$(share)/fish/vendor_completions.d/frazil.fish"

demo: setup
	$(CARGO) run --release --locked --quiet -p frazil-tools -- demo

# Formatting, lints and documentation first: they fail fastest.
lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --quiet

test: setup-tests lint
	$(CARGO) test --workspace --locked

# Runs all benchmarks, against their limits and budgets. Takes long.
bench: build
	target/release/frazil-bench all --report target/report.html

# Benchmarks the hot loops that pages go through, one by one.
hot-loops: setup
	$(CARGO) bench --locked -p frazil-benches

# Takes checkpoints for ten minutes, and shows what grows.
endurance: build
	target/release/frazil-bench endurance

# Measures the store on the memory of a stock Debian kernel under QEMU: makes 6 GiB of dumps first.
images: build
	benches/linux-images.sh target/linux-images
	target/release/frazil-bench store-images --images target/linux-images/ram-*.raw

# Runs every parser of the store, and devices under hostile drivers, under a coverage-guided fuzzer,
# FUZZ_SECONDS each. Needs cargo-fuzz. New inputs go to fuzz/target/corpus; the seeds stay as they
# are. Devices need no seeds: any bytes are something that a driver does.
FUZZ_SECONDS ?= 60
fuzz: setup
	cd snapstore && for target in header record node delta fingerprints pack_index journal manifest reference; do \
		mkdir -p fuzz/target/corpus/$$target; \
		RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --sanitizer none $$target \
			fuzz/target/corpus/$$target fuzz/corpus/$$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done
	cd vmm && for target in buses virtio_block virtio_rng virtio_net virtio_balloon virtio_vsock; do \
		mkdir -p fuzz/target/corpus/$$target; \
		RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --sanitizer none $$target \
			fuzz/target/corpus/$$target -- -max_total_time=$(FUZZ_SECONDS) -max_len=4096 || exit 1; \
	done

clean:
	$(CARGO) clean
