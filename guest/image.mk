# The guest image: kernel, initramfs and the agent in it. See guest/README.md.

GUEST_CACHE  ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vmshim
GUEST_KERNEL ?=
AGENT_FLAGS   = -trimpath -tags 'netgo osusergo seccomp' \
	-ldflags '-s -w -X github.com/vmshim/vmshim/internal/version.Version=$(or $(VERSION),unknown) -linkmode external -extldflags -static'

.PHONY: agent image kernel kernel-cached

agent: ## build the guest's agent (static, with cgo for libcontainer)
	CGO_ENABLED=1 go build $(AGENT_FLAGS) -o _output/bin/vmshim-agent ./cmd/vmshim-agent

image: agent ## build the guest image from Debian packages
	go run ./guest/mkimage -agent _output/bin/vmshim-agent -cache $(GUEST_CACHE)/debs -out _output/guest -kernel '$(GUEST_KERNEL)'

TUNED_IMAGE = go run ./guest/mkimage -agent _output/bin/vmshim-agent -cache $(GUEST_CACHE)/debs -out _output/guest-tuned -kernel

kernel: prereqs prereqs-kernel agent ## the image with a tuned kernel of our own, into _output/guest-tuned
	kernel=$$(guest/mkkernel) && $(TUNED_IMAGE) "$$kernel"

# For tests that use it where it costs nothing.
kernel-cached: agent
	@kernel=$$(guest/mkkernel --cached 2>/dev/null) || exit 0; $(TUNED_IMAGE) "$$kernel"
