# The image of both containers of the DaemonSet: two static binaries, nft and iptables (nft and legacy), and the
# libraries of those. No shell, no package manager. Nothing of the target platform is executed while it is built, so
# amd64 builds arm64 and the other way round without emulation.
#
# The base images are pinned by the digests of their lists for all platforms; the tags are for people.
ARG GO_IMAGE=docker.io/library/golang:1.26.8-bookworm@sha256:a688600ca24f8a4d3ca77f95b0dd40704a9fc787c826660eb7ba0b641b8b175d
ARG DEBIAN_IMAGE=docker.io/library/debian:bookworm-20250520-slim@sha256:90522eeb7e5923ee2b871c639059537b30521272f10ca86fdbbbb2b75a8c40cd

FROM --platform=$BUILDPLATFORM ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY plugin plugin
COPY agent agent
ARG VERSION=dev
ARG TARGETOS=linux
ARG TARGETARCH
# As `make build` does it, without the plugin of kubectl.
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" -o /out/ ./cmd/magic-ip-agent ./cmd/magic-ip-address

FROM --platform=$BUILDPLATFORM ${DEBIAN_IMAGE} AS tools
ARG TARGETARCH
COPY image/collect /usr/local/bin/
RUN collect "$TARGETARCH" /rootfs nftables iptables

FROM scratch
ARG VERSION=dev
LABEL org.opencontainers.image.title="magic-ip-address" \
      org.opencontainers.image.description="One literal address, on every node, that leads to this node's own pod" \
      org.opencontainers.image.source="https://github.com/magic-ip-address/magic-ip-address" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION"
ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
COPY --from=tools /rootfs /
COPY LICENSE /usr/share/doc/magic-ip-address/
COPY --from=build /out/ /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/magic-ip-agent"]
