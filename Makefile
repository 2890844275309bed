SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup build install deb dist deb-tests quickstart demo test sim soak mutations bench bench-scale bench-remote check clean

# Finds a cargo that is new enough wherever it was installed.
with_cargo := . scripts/toolchain.sh;

# Files to use instead of the guest's images: IMAGES="base=a.ram base+1=b.ram"
export IMAGES
# "no" leaves the demonstration on a running Debian guest out
export LINUX

help: ## Print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

setup: ## Install what is missing; compile RocksDB once
	@scripts/setup.sh

build: setup ## Build the program: target/release/snapstore
	@$(with_cargo) cargo build --release --locked -p snapstore

install: ## Install what `make build` made: PREFIX (/usr/local), DESTDIR
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" scripts/install.sh

deb: build ## Make a package for Debian 12 and newer: target/deb/*.deb
	@$(with_cargo) scripts/deb.sh

dist: build ## Make an archive that can be unpacked anywhere: target/dist/*.tar.gz
	@$(with_cargo) scripts/dist.sh

deb-tests: deb dist ## Install, use and remove the package in fresh Debian 12 and 13 roots
	@scripts/deb-tests.sh

quickstart: ## From a clone to a restored guest's answer; shows each command, and how long it took
	@scripts/quickstart.sh

demo: build ## Do the main job on memory of a real guest, and measure it; then run Debian guests
	@$(with_cargo) cargo build --release --locked -p snapstore --example demo
	@scripts/demo.sh $(DEMO_ARGS)

test: setup ## Run all checks and tests; ends with the numbers
	@scripts/test.sh

sim := cargo run --locked -p snapstore-tests --features sim --bin sim --

sim: setup ## Simulate histories of the store, or tell that of SIM_SEED
	@$(with_cargo) $(sim) $(SIM_ARGS)

soak: setup ## Look for faults for SECONDS (3600): simulator, mounts, images of a real guest
	@scripts/soak.sh $(or $(SECONDS),3600)

mutations: setup ## Put known faults back, or FAULT; the simulator has to find each
	@$(with_cargo) $(sim) $(if $(FAULT),--mutations=$(FAULT),--mutations)

bench: setup ## Measure on the guest's images, machines and Linux guests
	@$(with_cargo) cargo build --release --locked --workspace; \
	images="$$(scripts/guest-images.sh)"; \
	SNAPSTORE_IMAGES="$$images" cargo run --release --locked -p snapstore-bench --bin bench
	@scripts/linux-bench.sh

bench-scale: setup ## Measure what depends on how much a store holds: 10^7 chunks, 100 000 packs
	@$(with_cargo) cargo build --release --locked -p snapstore -p snapstore-bench; \
	cargo run --release --locked -p snapstore-bench --bin bench -- \
		scale-chunks scale-tags scale-packs scale-gc

bench-remote: setup ## Measure remotes at 1, 10 and 50 ms, 100 and 1000 Mbit/s, beside restic and rclone
	@$(with_cargo) cargo build --release --locked -p snapstore -p snapstore-bench; \
	cargo run --release --locked -p snapstore-bench --bin bench -- \
		remote remote-fault remote-restore remote-copy remote-requests

check: setup ## Run formatter, linter and documentation only
	@scripts/test.sh --checks-only

clean: ## Remove what was built here; RocksDB and the images stay in ~/.cache/snapstore
	@$(with_cargo) cargo clean
