# Everything that people and CI run. `make` alone lists the targets.

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
BIN      ?= bin/
DIST     ?= dist
# The rooms whose unit tests need nothing of the kernel that qemu does not translate (netlink, namespaces).
ARM64    ?= ./agent/config ./agent/dataplane ./agent/endpoint ./agent/event ./agent/inventory ./agent/plan ./agent/quote ./agent/ruleset ./agent/status ./plugin/conflist/... ./plugin/runtimedir
FUZZTIME ?= 10000x
MUTATE   ?= agent/plan agent/inventory agent/endpoint agent/config plugin/conflist plugin/runtimedir plugin

# The name that the chart asks for, and the first of the builders that is there.
IMAGE   ?= magic-ip-address/magic-ip-address:$(shell awk '$$1 == "appVersion:" { print $$2 }' charts/magic-ip-address/Chart.yaml)
BUILDER ?= $(shell for builder in docker podman buildah; do command -v $$builder && break; done)

# Static and without debug tables: the plugin is executed for every pod, so its size is start-up time.
# The upstream plugins are built the same way, so that benchmarks compare like with like.
STATIC  := -trimpath -buildvcs=false -ldflags "-s -w"
RELEASE := -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)"

CNI_PLUGINS := $(addprefix github.com/containernetworking/plugins/plugins/,main/bridge main/ptp ipam/host-local meta/tuning)

.PHONY: help
help: ## list the targets (default)
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## the CNI plugin, the agent and the plugin of kubectl, into bin/
	CGO_ENABLED=0 go build $(RELEASE) -o $(BIN) ./cmd/...

.PHONY: tools
tools: ## cnitool and the upstream CNI plugins that tests, demo and bench chain with
	CGO_ENABLED=0 go build -C tools $(STATIC) -o ../bin/cni/ $(CNI_PLUGINS)
	CGO_ENABLED=0 go build -C tools $(STATIC) -o ../bin/cnitool github.com/containernetworking/cni/cnitool

.PHONY: demo
demo: ## a node made of namespaces: pods, a magic IP, a rollout (needs root; DEMO=--rules shows the rules too)
	@echo "Building the agent and the CNI plugin of this project, and cnitool, bridge, ptp, host-local and tuning from upstream (a minute the first time)"
	@$(MAKE) --silent build tools
	@integration/prerequisites nft iptables conntrack ip nsenter
	@go run ./integration/demo $(DEMO)

.PHONY: test
test: build tools ## all tests with the race detector, cnitool and packets included (needs root), then short fuzzing
	integration/prerequisites nft iptables conntrack ip nsenter setpriv gcc curl python3 ipset
	go build -race -buildvcs=false -o bin/race/magic-ip-agent ./cmd/magic-ip-agent
	go test -race -count=1 $$(go list ./... | grep -v /integration$$)
	go test -C integration/plots -count=1 ./...
	go test -C integration/cluster/stream -race -count=1 ./...
	go test -C integration/conflist -count=1 ./... # with -race, go-cni swaps its locks for a detector that reports deadlocks where there are none
	MAGIC_IP_AGENT=$(CURDIR)/bin/race/magic-ip-agent go test -C integration -race -count=1 -parallel 6 -timeout 80m
	integration/fuzz $(FUZZTIME)

.PHONY: e2e-binaries
e2e-binaries: ## Kubernetes, etcd, helm and two containerds, from source (8 minutes, once), and what runs in pods
	integration/cluster/binaries
	CGO_ENABLED=0 go build $(STATIC) -o bin/pods/ ./integration/cluster/echo ./integration/cluster/multus-shim
	CGO_ENABLED=0 go build -C integration/cluster/stream $(STATIC) -o ../../../bin/pods/stream .

.PHONY: e2e
e2e: build tools e2e-binaries e2e-image ## the agent against a real API server, and in a whole cluster of two nodes (needs root)
	integration/prerequisites nft iptables conntrack ip nsenter setpriv gcc pgrep
	go build -race -buildvcs=false -o bin/race/magic-ip-agent ./cmd/magic-ip-agent
	# GOGC: the control planes, which inherit it, have small heaps and collect all the time. The agents in pods do not have it.
	GOGC=300 MAGIC_IP_AGENT=$(CURDIR)/bin/race/magic-ip-agent go test -v -p 2 -race -count=1 -parallel 16 -timeout 80m -tags e2e ./integration/cluster/release ./integration/cluster/...

.PHONY: e2e-cilium-binaries
e2e-cilium-binaries: e2e-binaries ## Cilium and what it needs, from source (9 minutes, once)
	integration/cluster/binaries cilium

.PHONY: e2e-cilium
e2e-cilium: build e2e-cilium-binaries e2e-image ## magic IPs on a node with Cilium, with all settings that matter (needs root; 12 minutes; CILIUM=-short for 2)
	integration/prerequisites nft iptables conntrack ip nsenter ipset pgrep
	go test -v -race -count=1 -timeout 40m -tags dataplane -skip '^TestFlannel$$' $(CILIUM) ./integration/cluster/dataplane

.PHONY: e2e-flannel-binaries
e2e-flannel-binaries: e2e-binaries ## flannel and its CNI plugin, from source (2 minutes, once)
	integration/cluster/binaries flannel

.PHONY: e2e-flannel
e2e-flannel: build e2e-flannel-binaries e2e-image ## magic IPs on two nodes with flannel: VXLAN and host-gw, with frames that pass netfilter and that do not (needs root; 4 minutes)
	integration/prerequisites nft iptables conntrack ip nsenter pgrep
	go test -v -race -count=1 -timeout 20m -tags dataplane -run '^TestFlannel$$' ./integration/cluster/dataplane

.PHONY: e2e-clients
e2e-clients: build e2e-binaries e2e-image ## the examples with real servers and SDKs, and what updates lose, into docs/benchmarks (needs root; CLIENTS=)
	integration/prerequisites nft conntrack ip nsenter
	integration/cluster/binaries clients
	go test -v -race -count=1 -timeout 40m -tags clients ./integration/cluster/clients $(if $(CLIENTS),$(CLIENTS),-update)

.PHONY: compatibility
compatibility: build tools ## observe anew what docs/compatibility.md says of networks (needs root; 18 minutes)
	COMPATIBILITY=write go test -C integration -count=1 -run '^TestCompatibility$$' .
	COMPATIBILITY=write $(MAKE) e2e-cilium e2e-flannel
	go test -count=1 ./integration/docs -run '^TestGenerated$$' -update

.PHONY: compare
compare: build e2e-cilium-binaries e2e-image ## what an update costs clients by a magic IP and by other ways, into docs/benchmarks (needs root; 35 minutes; COMPARE="-parts rolling,surge", -missing, -runs 0.2)
	integration/prerequisites nft iptables conntrack ip nsenter ipset pgrep
	go run ./integration/cluster/compare $(COMPARE)
	$(MAKE) report

.PHONY: report
report: ## the report and the charts of docs/benchmarks, from the data that are there
	go run -C integration/plots .

.PHONY: cluster
cluster: build e2e-binaries e2e-image ## a cluster of two nodes with targets, clients and the image, to try things on, until Ctrl-C (needs root)
	integration/prerequisites nft ip nsenter
	go run ./integration/cluster/up $(CLUSTER)

.PHONY: test-arm64
# Three tests start their own program again, which the kernel runs only where binfmt_misc knows qemu.
test-arm64: ## unit tests of the arm64 build under qemu's user mode (ARM64=)
	integration/prerequisites qemu-aarch64-static
	CGO_ENABLED=0 GOARCH=arm64 go test -vet=off -count=1 -skip 'TestUpdateThatCannotWriteKeepsTheOldFile|TestKilledWriter|TestParallelWriters' -exec qemu-aarch64-static $(ARM64)

.PHONY: transcripts
transcripts: build e2e-binaries e2e-image ## docs/transcripts.md: a stranger's path in a fresh clone, and five breakages (needs root; 5 minutes)
	integration/prerequisites nft ip nsenter pkill
	env -u MAKEFLAGS -u MAKELEVEL -u MFLAGS go run ./integration/cluster/transcripts

.PHONY: image
image: ## the container image, with docker, podman or buildah (BUILDER=, IMAGE=, PLATFORM=, GO_IMAGE=, DEBIAN_IMAGE=)
	$(BUILDER) build $(if $(PLATFORM),--platform $(PLATFORM)) --build-arg VERSION=$(VERSION) \
	  $(foreach base,GO_IMAGE DEBIAN_IMAGE,$(if $($(base)),--build-arg $(base)=$($(base)))) --tag $(IMAGE) .

.PHONY: dist
dist: ## what a release has besides the image: programs for amd64 and arm64, chart, checksums (VERSION=, DIST=)
	tools/release/dist $(VERSION) $(DIST)

.PHONY: push-image
push-image: ## the image for amd64 and arm64, with SBOM and provenance, to its registry, with docker buildx (IMAGE=, VERSION=, DIST=)
	docker buildx build --platform linux/amd64,linux/arm64 --build-arg VERSION=$(VERSION) --build-arg SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) \
	  --sbom=true --provenance=mode=max --metadata-file $(DIST)/image.json --output type=image,name=$(IMAGE),push=true,rewrite-timestamp=true .

.PHONY: reproducible
reproducible: ## build the same commit twice, and compare the digests of programs and chart (5 minutes of processor time)
	tools/release/reproducible

.PHONY: e2e-image
e2e-image: ## the same image without a registry, into bin/image.tar (needs root)
	integration/cluster/image

.PHONY: chart
chart: build chart-tools ## the chart: lint, schema, unit tests, its README, and whether the agent takes what it renders
	bin/chart/helm-unittest --strict charts/magic-ip-address
	go test -C integration/chart -count=1 ./...
	go test -C integration/monitoring -count=1 ./...

.PHONY: chart-tools
chart-tools: ## helm-unittest and helm-docs, into bin/chart/
	CGO_ENABLED=0 go build -C integration/chart $(STATIC) -o ../../bin/chart/ github.com/helm-unittest/helm-unittest/cmd/helm-unittest github.com/norwoodj/helm-docs/cmd/helm-docs

.PHONY: e2e-bench
e2e-bench: build tools e2e-binaries ## measure the agent and the API server, each against the other (needs root; 15 minutes)
	integration/prerequisites nft ip nsenter
	go test -count=1 -tags e2e -run '^$$' -bench . -benchtime 1x -timeout 30m ./integration/cluster

.PHONY: lint
lint: ## golangci-lint with .golangci.yml, and actionlint
	go build -C tools -o ../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	bin/golangci-lint run --build-tags e2e,dataplane,clients ./...
	cd integration/chart && ../../bin/golangci-lint run --config ../../.golangci.yml ./...
	cd integration/monitoring && ../../bin/golangci-lint run --config ../../.golangci.yml ./...
	cd integration/cluster/sdk && ../../../bin/golangci-lint run --config ../../../.golangci.yml ./...
	cd integration/cluster/coredns && ../../../bin/golangci-lint run --config ../../../.golangci.yml ./...
	go test -count=1 -v -run '^TestHouse$$' ./integration
	cd integration/conflist && ../../bin/golangci-lint run --config ../../.golangci.yml ./...
	cd integration/plots && ../../bin/golangci-lint run --config ../../.golangci.yml ./...
	cd integration/cluster/stream && ../../../bin/golangci-lint run --config ../../../.golangci.yml ./...
	go build -C tools -modfile=actionlint.mod -o ../bin/actionlint github.com/rhysd/actionlint/cmd/actionlint
	bin/actionlint

.PHONY: mutate
mutate: ## change the operators of some packages one by one, and see that a test fails each time (MUTATE=; an hour or more)
	go build -C tools -o ../bin/gremlins github.com/go-gremlins/gremlins/cmd/gremlins
	integration/mutate/rooms $(MUTATE)

.PHONY: bench
bench: build tools ## measure the plugin, the agent and the data path (needs root; 5 minutes)
	integration/prerequisites nft ip nsenter
	CGO_ENABLED=0 go build $(STATIC) -o bin/echo ./integration/bench/echo
	go run ./integration/bench

.PHONY: docs
docs: build tools ## write what comes from programs in the documents: keys, command lines, screens (needs root)
	integration/prerequisites nft ip nsenter curl python3
	go test -count=1 ./integration/docs -update
	go test -C integration/monitoring -count=1 . -update

.PHONY: generate
generate: chart-tools ## tidy the modules, format the code, write the chart's README
	go mod tidy && go -C tools mod tidy && go -C tools mod tidy -modfile=actionlint.mod && go -C integration/cluster/k8s mod tidy && go -C integration/cluster/containerd mod tidy && go -C integration/cluster/cilium mod tidy && go -C integration/cluster/sdk mod tidy && go -C integration/cluster/coredns mod tidy && go -C integration/cluster/stream mod tidy && go -C integration/plots mod tidy && go -C integration/chart mod tidy && go -C integration/monitoring mod tidy && go -C integration/conflist mod tidy
	gofmt -l -w .
	bin/chart/helm-docs --chart-search-root charts --log-level warning
