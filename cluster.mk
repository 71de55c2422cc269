##@ Cluster
# docker where its daemon answers, else buildah; both read docker/Dockerfile.
BUILDER ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo buildah)
IMAGE ?= localhost/lora-job:latest
BASE ?= docker.io/library/debian:bookworm-slim
BUILD_FLAGS ?=
PUSH_FLAGS ?=

submit: setup ## Run JOB=job.yaml on CLUSTER=cluster.yaml (FLAGS=--follow shows it to the end)
	$(RUN)/lora-job submit $(JOB) --cluster $(CLUSTER) $(FLAGS)

image: ## Build the image (IMAGE=registry/name:tag, BASE=another Debian)
	$(BUILDER) build $(BUILD_FLAGS) --build-arg BASE=$(BASE) --file docker/Dockerfile --tag $(IMAGE) .

push: ## Push IMAGE and print it by digest, as cluster files name it
	@docker/push.sh "$(BUILDER)" "$(IMAGE)" $(PUSH_FLAGS)

control-plane: ## Build Kubernetes' control plane (two minors) and the other real parts, from Go modules
	tests/cluster/build.sh

test-cluster: setup control-plane ## Manifests and submitter against real control planes, two minors
	$(PYTEST) -n 2 --dist loadgroup tests/cluster

node-tools: ## Install what a real node needs (apt, as root) and build its kubelet and registry
	tests/node/tools.sh

test-node: setup node-tools ## The whole mission on a real node (needs root)
	$(PYTEST) --durations 20 tests/node

bench-cluster: setup control-plane ## The verbs of a cluster among 5,000 finished runs (kwok)
	tests/cluster/build.sh kwok
	PYTHONPATH=tests $(RUN)/python tests/bench/bench_cluster.py

lock-image: .tools/uv/.installed ## Compile the image's locks anew, within the versions of dev.txt
	docker/lock.sh $(UV)

.PHONY: submit image push control-plane test-cluster node-tools test-node bench-cluster lock-image
