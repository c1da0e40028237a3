# Everything that people and CI run. `make` alone lists the targets.

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZTIME ?= 3s

# Static and without debug tables: the plugin is executed for every pod, so its size is start-up time.
# The upstream plugins are built the same way, so that benchmarks compare like with like.
STATIC  := -trimpath -buildvcs=false -ldflags "-s -w"
RELEASE := -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)"

# What the end-to-end tests run against: KUBERNETES is the version in integration/cluster/k8s/go.mod.
KUBERNETES := 1.36.3
K8S_INFO   := gitVersion=v$(KUBERNETES) gitMajor=1 gitMinor=36 gitTreeState=clean gitCommit=0000000000000000000000000000000000000000 buildDate=2026-01-01T00:00:00Z
K8S_LDFLAGS := -s -w $(foreach package,component-base client-go/pkg,$(foreach info,$(K8S_INFO),-X k8s.io/$(package)/version.$(info)))

CNI_PLUGINS := $(addprefix github.com/containernetworking/plugins/plugins/,main/bridge main/ptp ipam/host-local meta/tuning)

.PHONY: help
help: ## list the targets (default)
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## the CNI plugin and the agent, into bin/
	CGO_ENABLED=0 go build $(RELEASE) -o bin/ ./cmd/...

.PHONY: tools
tools: ## cnitool and the upstream CNI plugins that tests, demo and bench chain with
	CGO_ENABLED=0 go build -C tools $(STATIC) -o ../bin/cni/ $(CNI_PLUGINS)
	CGO_ENABLED=0 go build -C tools $(STATIC) -o ../bin/cnitool github.com/containernetworking/cni/cnitool

.PHONY: demo
demo: build tools ## a node made of namespaces: pods, a magic IP, a rollout (needs root)
	integration/prerequisites nft iptables conntrack ip nsenter
	go run ./integration/demo

.PHONY: test
test: build tools ## all tests with the race detector, cnitool and packets included (needs root), then short fuzzing
	integration/prerequisites nft iptables conntrack ip nsenter gcc
	go build -race -buildvcs=false -o bin/race/magic-ip-agent ./cmd/magic-ip-agent
	go test -race -count=1 $$(go list ./... | grep -v /integration$$)
	MAGIC_IP_AGENT=$(CURDIR)/bin/race/magic-ip-agent go test -C integration -race -count=1 -parallel 3
	integration/fuzz $(FUZZTIME)

.PHONY: e2e-binaries
e2e-binaries: ## kube-apiserver and etcd from source, into bin/e2e/ (minutes with a cold cache)
	CGO_ENABLED=0 go build -C integration/cluster/k8s $(STATIC) -o ../../../bin/e2e/etcd go.etcd.io/etcd/server/v3
	CGO_ENABLED=0 go build -C integration/cluster/k8s -trimpath -buildvcs=false -ldflags "$(K8S_LDFLAGS)" -o ../../../bin/e2e/ k8s.io/kubernetes/cmd/kube-apiserver

.PHONY: e2e
e2e: build tools e2e-binaries ## the agent against a real Kubernetes API server (needs root)
	integration/prerequisites nft iptables conntrack ip nsenter gcc
	go build -race -buildvcs=false -o bin/race/magic-ip-agent ./cmd/magic-ip-agent
	MAGIC_IP_AGENT=$(CURDIR)/bin/race/magic-ip-agent go test -race -count=1 -parallel 16 -tags e2e ./integration/cluster/...

.PHONY: e2e-bench
e2e-bench: build tools e2e-binaries ## measure the agent and the API server, each against the other (needs root; 15 minutes)
	integration/prerequisites nft ip nsenter
	go test -count=1 -tags e2e -run '^$$' -bench . -benchtime 1x -timeout 30m ./integration/cluster

.PHONY: lint
lint: ## golangci-lint with .golangci.yml
	go build -C tools -o ../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	bin/golangci-lint run --build-tags e2e ./...

.PHONY: bench
bench: build tools ## measure the plugin, the agent and the data path (needs root; 4 minutes)
	integration/prerequisites nft ip nsenter
	CGO_ENABLED=0 go build $(STATIC) -o bin/echo ./integration/bench/echo
	go run ./integration/bench

.PHONY: generate
generate: ## tidy the modules and format the code
	go mod tidy && go -C tools mod tidy && go -C integration/cluster/k8s mod tidy
	gofmt -l -w .
