##@ Cluster
# docker where its daemon answers, else buildah; both read docker/Dockerfile.
BUILDER ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo buildah)
IMAGE ?= lora-job:latest
BASE ?= docker.io/library/debian:bookworm-slim

control-plane: ## Build Kubernetes' control plane (two minors) and the other real parts, from Go modules
	tests/cluster/build.sh

test-cluster: setup control-plane ## Manifests and submitter against real control planes, two minors
	$(PYTEST) -n 2 --dist loadgroup tests/cluster

.PHONY: control-plane test-cluster
