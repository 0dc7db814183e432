# make up      build and bring everything up on this machine, then try it
# make test    every test; installs the packages they need
.DEFAULT_GOAL := help
.SHELLFLAGS := -eu -c
.PHONY: help build up down status test test-race test-root vet lint generate bench fuzz clean

# The released version, if this is a tagged checkout; the sources know theirs.
VERSION  ?= $(shell git describe --tags --exact-match --match 'v[0-9]*' 2>/dev/null | sed 's/^v//')
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)
LDFLAGS  := -s -w $(if $(VERSION),-X main.version=$(VERSION)) $(if $(REVISION),-X main.revision=$(REVISION))
BINARIES := $(notdir $(wildcard cmd/*))

# Tests that need root compile as you and run through sudo.
ROOT := $(if $(filter 0,$(shell id -u)),,sudo env PATH="$(PATH)" GOMODCACHE="$(shell go env GOMODCACHE)")
# Load, stories with real programs, and containers: the race detector would only
# slow them down, what it looks for is in the packages they use.
STORIES := ./bench/... ./dev/... ./deploy/... $(if $(wildcard e2e),./e2e/...)
FUZZTIME ?= 10s
BENCH    ?= --arms l3,haproxy,haproxy-splice,nginx,ours --rounds 3
UP       ?=

help:
	@echo "make up        build and bring everything up (UP='--flag ...' for dstack dev up); asks for root once"
	@echo "make status    what is up"
	@echo "make down      remove it again, without a trace"
	@echo "make test      every test: gofmt, go vet, unit tests with the race detector, tests as root, stories"
	@echo "make build     static binaries in bin/: $(BINARIES)"
	@echo "make lint      gofmt, go vet, and golangci-lint where it is installed"
	@echo "make generate  code from .proto files, configuration reference"
	@echo "make bench     measure against HAProxy, nginx and plain forwarding (BENCH='--quick' for a short look)"
	@echo "make fuzz      every fuzz target for $(FUZZTIME) (FUZZTIME=1m)"

build: $(BINARIES:%=bin/%)

# go build knows what has changed.
bin/%: FORCE
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/$*
FORCE:

up: build
	bin/dstack dev up $(UP)
status: bin/dstack
	bin/dstack dev status
down: bin/dstack
	bin/dstack dev down

test: packages vet test-race test-root

.PHONY: packages
packages:
	@.ci/packages

vet:
	@files=$$(gofmt -l $$(git ls-files -- '*.go' 2>/dev/null || find . -name '*.go')); \
	if [ -n "$$files" ]; then echo "gofmt would change:"; echo "$$files"; exit 1; fi
	go vet ./...

test-race:
	go test -race -p 1 -timeout 20m $(if $(ROOT),-exec '$(ROOT)') $$(go list ./... | grep -vxF "$$(go list $(STORIES))")

# One after the other: they look at the machine's network and at time.
test-root:
	go test -p 1 -timeout 20m $(if $(ROOT),-exec '$(ROOT)') $(STORIES)

lint: vet
	@if command -v golangci-lint >/dev/null; then golangci-lint run ./...; \
	else echo "golangci-lint is not installed; gofmt and go vet found nothing"; fi

generate: packages
	go generate ./...
	go run ./controlplane/config/gendoc

bench: packages
	CGO_ENABLED=0 go build -trimpath -o bin/bench ./bench
	$(ROOT) bin/bench run $(BENCH)

fuzz:
	for dir in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
		for target in $$(go test -list '^Fuzz' $$dir | grep '^Fuzz'); do \
			echo "== $$dir $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$dir; \
		done; \
	done

clean:
	rm -rf bin
