# vmshim: 'make help' lists the targets.

OUT    := _output
BIN    := $(OUT)/bin
PREFIX ?= /usr/local
CACHE  := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vmshim

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/vmshim/vmshim/internal/version.Version=$(VERSION)

# gRPC comes with containerd's API and is never served. Without the tag it brings
# html/template, for which the linker keeps every method: a third of the shim.
TAGS := grpcnotrace

# Where Go's own flags would look into .git, a checkout of another user fails.
export GOFLAGS := -buildvcs=false $(filter-out -buildvcs=%,$(GOFLAGS))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: prereqs
prereqs: ## install the Debian packages that are missing (as root)
	@[ -n "$(SKIP_PREREQS)" ] || hack/prereqs hack/packages.txt guest/packages.txt

.PHONY: prereqs-protos
prereqs-protos:
	@[ -n "$(SKIP_PREREQS)" ] || hack/prereqs hack/packages-protos.txt

.PHONY: prereqs-kernel
prereqs-kernel:
	@[ -n "$(SKIP_PREREQS)" ] || hack/prereqs hack/packages-kernel.txt

.PHONY: build
build: ## the shim and the command, into _output/bin
	CGO_ENABLED=0 go build -trimpath -tags '$(TAGS)' -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/containerd-shim-vm-v2 ./cmd/vmshim

-include guest/image.mk # agent, image, kernel

.PHONY: vhost-device-vsock
vhost-device-vsock: prereqs ## fetch the daemon that serves vsock where /dev/vhost-vsock does not
	@[ -w /dev/vhost-vsock ] || { mkdir -p $(BIN) && path=$$(hack/fetch-vhost-device-vsock) && ln -sf "$$path" $(BIN)/vhost-device-vsock; }

# Everything that a machine needs to run.
.PHONY: all
all: prereqs build image vhost-device-vsock ## prereqs, build, image, vhost-device-vsock

# -- checks ------------------------------------------------------------------

LINT := $(CACHE)/tools/golangci-lint-$(shell sed -n 's|^\tgithub.com/golangci/golangci-lint/v2 v\([^ ]*\).*|\1|p' tools/go.mod)-$(shell go env GOVERSION)

$(LINT):
	@echo "building golangci-lint (once; takes some minutes)"
	@mkdir -p $(@D)
	go build -modfile=tools/go.mod -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: check
check: prereqs $(LINT) check-protos ## format, vet, lint, go.mod, generated code, layout
	$(LINT) fmt --diff
	go vet ./...
	$(LINT) run ./...
	go mod tidy -diff
	go test -count=1 ./internal/arch

.PHONY: check-protos
check-protos: prereqs-protos
	@hack/check-protos

.PHONY: protos
protos: prereqs-protos ## generate code from the .proto files
	pkg/agent/protocol/generate.sh

.PHONY: fmt
fmt: $(LINT) ## format the code
	$(LINT) fmt

# -- tests -------------------------------------------------------------------

# What boots machines has names of its own; two machines at a time are enough
# for two cores, so packages run one after the other.
MACHINES   = VMSHIM_REQUIRE=1 go test -count=1 -p 1 -timeout $(TEST_LIMIT)
TEST_LIMIT = 40m

.PHONY: unit
unit: ## tests without a machine, under two minutes
	go test -short -race -skip '^Test(VM|Shim|E2E|KVM)' ./...

.PHONY: containerds
containerds: prereqs
	@hack/containerd debian >/dev/null
	@hack/containerd 1 >/dev/null
	@hack/containerd 2 >/dev/null
	@hack/critest >/dev/null

.PHONY: nerdctl
nerdctl: prereqs
	@hack/nerdctl >/dev/null

.PHONY: test
test: all unit demo vm-test shim-test e2e kvm-test ## everything that is promised, at most 40 minutes

.PHONY: vm-test
vm-test: all kernel-cached kvm-host-image ## tests of the parts in real machines
	VMSHIM_ROWS=$(abspath $(OUT))/agent-rows.txt $(MACHINES) -run '^TestVM' ./pkg/... ./internal/... ./test/...
	@cat $(OUT)/agent-rows.txt

.PHONY: shim-test
shim-test: all ## the built shim without containerd
	$(MACHINES) -run '^TestShim' ./pkg/... ./test/...

.PHONY: e2e
e2e: all containerds nerdctl ## with containerd: Debian's, the last 1.x and the newest 2.x
	$(MACHINES) -run '^TestE2E' ./test/...

# Two modes of ours beside runc; half an hour on two cores without KVM.
.PHONY: critest
critest: all containerds ## CRI's conformance tests, compared with runc: FOCUS=, MODES=vm,vm-sandbox
	go run ./test/critest -focus '$(FOCUS)' $(if $(MODES),-modes '$(MODES)') -out $(OUT)/critest

.PHONY: test-all
test-all: export VMSHIM_TEST_ALL = 1
test-all: test test-kvm test-kvm-crowd test-kernel critest fuzz bench bench-kvm ## make test, then what takes longer

# The other kernels: that of Debian's release, and the tuned one.
.PHONY: test-kernel
test-kernel: all kernel containerds nerdctl ## every test with a machine, on the other kernels
	go run ./guest/mkimage -agent $(BIN)/vmshim-agent -cache $(CACHE)/debs -out $(OUT)/guest-stable -kernel linux-image-cloud-$(shell dpkg --print-architecture)
	for guest in stable tuned; do \
		echo "== guest-$$guest"; \
		VMSHIM_GUEST=$(abspath $(OUT))/guest-$$guest $(MACHINES) -run '^Test(VM|Shim|E2E)' -skip '^TestVMKVMHost' ./... || exit; \
	done

FUZZTIME ?= 30s

.PHONY: fuzz
fuzz: ## every fuzz test for FUZZTIME (30s)
	@hack/fuzz $(FUZZTIME)

.PHONY: bench
bench: all containerds ## start, exec, stdio, memory, pods and networks, as ratios: _output/bench.json
	CGO_ENABLED=0 go run ./test/bench -json $(OUT)/bench.json

.PHONY: demo
demo: all ## a container in a machine, through containerd, step by step
	@go run ./test/demo

# -- a KVM host in a machine ---------------------------------------------------

# What users run (KVM, the kernel's vsock, vhost-net, control groups of version
# 2) where this machine has not got it: test/kvmhost.
OWN_RELEASE = $(shell . /etc/os-release && echo $$VERSION_CODENAME)
HOST       ?= $(OWN_RELEASE)
KVM_HOST    = $(abspath $(BIN))/kvmhost -host $(HOST) -image $(abspath $(OUT))/kvmhost-$(HOST) \
	-vhost-device-vsock $(abspath $(BIN))/vhost-device-vsock -share $(CACHE) -share $(shell go env GOROOT) -share $(shell go env GOMODCACHE)

.PHONY: prereqs-kvm-host
prereqs-kvm-host:
	@[ -n "$(SKIP_PREREQS)" ] || hack/prereqs hack/packages-kvmhost.txt

# The newest kernel there is for the release: Debian 12's first one, 6.1, panics
# where the host is emulated (docs/limitations.md). HOST_KERNEL= names another.
.PHONY: kvm-host-image
kvm-host-image: prereqs prereqs-kvm-host
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $(BIN)/kvmhost ./test/kvmhost
	go run ./guest/mkimage -agent $(BIN)/kvmhost -lists test/kvmhost -cache $(CACHE)/debs -out $(OUT)/kvmhost-$(HOST) \
		-kernel '$(HOST_KERNEL)'

.PHONY: kvm-host
kvm-host: all kvm-host-image ## run CMD='…' on a KVM host; HOST=bookworm or trixie; GET='files to copy back'
	@$(KVM_HOST) $(addprefix -get ,$(GET)) sh -c "$$CMD"

# Tests are linked statically, for they run under another release's libc. On one
# CPU, because emulated ones get in each other's way: docs/limitations.md.
ON_KVM_HOST = $(MACHINES) -tags 'netgo osusergo' -ldflags '-linkmode external -extldflags -static' -exec '$(KVM_HOST) -again 2 -cpus 1 -timeout $(TEST_LIMIT) $(1)'

.PHONY: kvm-test
kvm-test: TEST_LIMIT = 20m # of each part
kvm-test: all kvm-host-image ## what only a KVM host has, on one
	cd pkg/hypervisor/qemu && $(ON_KVM_HOST) -run '^TestKVM'
	cd test/kvm && $(ON_KVM_HOST) -run '^TestKVM' -skip '^TestKVMSandboxesAtOnce$$' # it is too many
	cd test/vm && $(ON_KVM_HOST) -run '^TestKVM'
	cd test/shim && $(ON_KVM_HOST) -run '^TestShimTemplate$$'

SANDBOXES ?= 50

# A sandbox takes a fifth of a GiB, and 20 seconds where the host is emulated.
.PHONY: test-kvm-crowd
test-kvm-crowd: TEST_LIMIT = 2h
test-kvm-crowd: all kvm-host-image ## SANDBOXES (50) that start at once on a KVM host
	cd test/kvm && VMSHIM_SANDBOXES=$(SANDBOXES) $(call ON_KVM_HOST,-memory $(shell expr 2048 + $(SANDBOXES) \* 240)) -v -run '^TestKVMSandboxesAtOnce$$'

KVM_HOSTS  = bookworm trixie
# Each suite has a host of its own, and says what that is.
KVM_SUITES = test/e2e test/shim test/agent test/vm pkg/sandbox pkg/hypervisor/qemu test/kvm test/guest

# Both at a time. What fails does not keep the rest from being run.
.PHONY: test-kvm
test-kvm: all containerds nerdctl ## every test with a machine on KVM, kernel vsock and cgroups 2: Debian 12 and 13
	for host in $(KVM_HOSTS); do $(MAKE) kvm-host-image HOST=$$host SKIP_PREREQS=1 || exit; done
	$(MAKE) --no-print-directory --keep-going -j $(words $(KVM_HOSTS)) $(KVM_HOSTS:%=test-kvm-%)

.PHONY: $(KVM_HOSTS:%=test-kvm-%)
$(KVM_HOSTS:%=test-kvm-%): SHELL = /bin/bash
$(KVM_HOSTS:%=test-kvm-%): test-kvm-%:
	set -o pipefail; $(MAKE) --no-print-directory kvm-suites HOST=$* 2>&1 | sed --unbuffered 's/^/$*: /'

.PHONY: kvm-suites
kvm-suites: TEST_LIMIT = 2h # of each suite
kvm-suites:
	@for suite in $(KVM_SUITES); do \
		echo "== $$suite"; \
		(cd $$suite && $(ON_KVM_HOST) -parallel 1 -run '^Test(KVM|QEMU|Root|VM|Shim|E2E)' -skip '^TestVM(KVMHost|Image)') || failed="$$failed $$suite"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

.PHONY: bench-kvm
bench-kvm: all kvm-host-image containerds ## make bench on a KVM host: _output/bench-kvm.json
	CGO_ENABLED=0 go build -trimpath -o $(BIN)/bench ./test/bench
	$(KVM_HOST) -memory 8192 -timeout 2h -get $(OUT)/bench-kvm.json $(BIN)/bench -cycles 20 -json $(OUT)/bench-kvm.json $(BENCH)

# -- install -----------------------------------------------------------------

.PHONY: install
install: build image vhost-device-vsock ## into DESTDIR and PREFIX (/usr/local)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/vmshim $(DESTDIR)$(PREFIX)/share/doc/vmshim/configs
	install -m 755 $(BIN)/containerd-shim-vm-v2 $(BIN)/vmshim $(DESTDIR)$(PREFIX)/bin/
	[ ! -e $(BIN)/vhost-device-vsock ] || install -D -m 755 $(BIN)/vhost-device-vsock $(DESTDIR)$(PREFIX)/libexec/vmshim/vhost-device-vsock
	install -m 644 $(OUT)/guest/vmlinux $(OUT)/guest/initrd.img $(DESTDIR)$(PREFIX)/share/vmshim/
	install -m 644 README.md LICENSE docs/*.md $(DESTDIR)$(PREFIX)/share/doc/vmshim/
	install -m 644 configs/* $(DESTDIR)$(PREFIX)/share/doc/vmshim/configs/

.PHONY: clean
clean: ## remove _output; what is cached for all checkouts stays
	rm -rf $(OUT)
