#!/usr/bin/env bash
# Build the real parts that the cluster tests run against, from Go modules, into .tools/.
#
#   tests/cluster/build.sh                 everything that `make test-cluster` needs
#   tests/cluster/build.sh node            what `make test-node` needs, kubelet included
#   tests/cluster/build.sh kwok registry   single tools by name
#
# Go's own caches stay where Go keeps them. What is there in the right version is not built again.
set -euo pipefail
cd "$(dirname "$0")/../.."

MINORS=(1.34.4 1.37.2) # the oldest minor that we promise, and the newest
NODE_MINOR=1.34.4      # its kubelet runs on cgroup v1 and with Debian's containerd 1.6, too
tools=$PWD/.tools
jobs=${BUILD_JOBS:-2}

say() { echo "build: $*" >&2; }
die() { say "$*"; exit 1; }

need_go() {
    command -v go >/dev/null || die "Go 1.26 or newer is not on the PATH; install it (https://go.dev/dl)," \
        "or point KUBEBUILDER_ASSETS at a folder with etcd and kube-apiserver"
    # An older Go would fetch its successor only from 1.21 on.
    local have
    have=$(go env GOVERSION)
    [[ $(printf '%s\n' go1.21 "$have" | sort -V | head -1) == go1.21 ]] || die "$have is too old; install Go 1.26"
}

# Module proxies drop connections; what was downloaded stays in Go's cache, so a retry goes on.
retry() {
    local try
    for try in 1 2 3 4; do
        "$@" && return
        say "try $try of 4 failed: $1 $2 ..."
        sleep $((try * 5))
    done
    return 1
}

# build OUT STAMP PACKAGE [LDFLAGS]: in the module that the caller wrote into the current folder.
build() {
    local out=$1 stamp=$2 package=$3 ldflags=${4:-}
    local started=$SECONDS
    say "building $package $stamp"
    retry env CGO_ENABLED=0 GOFLAGS=-mod=mod nice -n 10 \
        go build -p "$jobs" -trimpath -ldflags "-s -w $ldflags" -o "$out.partial" "$package" ||
        die "$package $stamp does not build"
    mv "$out.partial" "$out"
    echo "$stamp" >"$out.version"
    say "$(basename "$out") $stamp is there after $((SECONDS - started)) s"
}

built() { [[ -x $1 && $(cat "$1.version" 2>/dev/null) == "$2" ]]; }

# scratch COMMAND...: in a new folder that is gone afterwards.
scratch() (
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    cd "$folder"
    "$@"
)

# A module that requires one tool: what it names is what it needs.
module_and_build() {
    local out=$1 version=$2 package=$3
    printf 'module build\n\ngo 1.26.0\n' >go.mod
    GOFLAGS=-mod=mod retry nice -n 10 go get "$package@$version" 2> >(grep -v '^go: ' >&2)
    build "$out" "$version" "$package" "${4:-}"
}

tool() {
    local version=$2 package=$3 out=$tools/bin/$1
    built "$out" "$version" && return
    need_go
    mkdir -p "$tools/bin"
    scratch module_and_build "$out" "$version" "$package" "${4:-}"
}

# Kueue is built in its own module, by the sums that it ships; beside it, what its release installs.
kueue_and_build() {
    local out=$1 version=$2 from
    from=$(retry go mod download -json "sigs.k8s.io/kueue@$version" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
    [[ -d $from ]] || die "the module proxy has no sigs.k8s.io/kueue $version"
    cp -r "$from/." . && chmod -R u+w .
    "$tools/bin/kustomize" build config/default >"$out.yaml"
    build "$out" "$version" ./cmd/kueue "-X sigs.k8s.io/kueue/pkg/version.GitVersion=$version"
}

kueue() {
    local version=$1 out=$tools/bin/kueue
    built "$out" "$version" && return
    one kustomize
    need_go
    scratch kueue_and_build "$out" "$version"
}

# Kubernetes' own go.mod replaces its staging modules by folders, which a dependency cannot have:
# each is replaced by what is published of it under the matching 0.x version instead.
kubernetes_module() {
    local version=$1 mod
    mod=$(retry go mod download -json "k8s.io/kubernetes@v$version" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
    [[ -f $mod ]] || die "the module proxy has no k8s.io/kubernetes v$version"
    {
        printf 'module build\n\ngo 1.26.0\n\n'
        grep '^godebug ' "$mod" || true
        echo "require k8s.io/kubernetes v$version"
        sed -n "s|^\s*\(k8s.io/[a-z-]*\) => ./staging/.*|replace \1 => \1 v0.${version#1.}|p" "$mod"
    } >go.mod
}

kubernetes_and_build() {
    local version=$1 folder=$2 name
    shift 2
    kubernetes_module "$version"
    local flag=-X\ k8s.io/component-base/version
    local minor=${version#1.}
    for name in "$@"; do
        build "$folder/$name" "$version" "k8s.io/kubernetes/cmd/$name" \
            "$flag.gitVersion=v$version $flag.gitMajor=1 $flag.gitMinor=${minor%.*} $flag.gitTreeState=clean"
    done
}

# kubernetes VERSION NAME...: those of the named programs that are not there yet.
kubernetes() {
    local version=$1 folder=$tools/kubernetes/${1%.*} name
    shift
    local missing=()
    for name in "$@"; do
        built "$folder/$name" "$version" || missing+=("$name")
    done
    ((${#missing[@]})) || return 0
    need_go
    mkdir -p "$folder"
    scratch kubernetes_and_build "$version" "$folder" "${missing[@]}"
}

one() {
    case $1 in
    etcd) tool etcd v3.6.16 go.etcd.io/etcd/server/v3 ;;
    kustomize) tool kustomize v5.8.1 sigs.k8s.io/kustomize/kustomize/v5 ;;
    toxiproxy) tool toxiproxy v2.5.0 github.com/Shopify/toxiproxy/v2/cmd/server ;;
    kueue) kueue v0.19.2 ;;
    kwok) tool kwok v0.8.0 sigs.k8s.io/kwok/cmd/kwok ;;
    registry) tool registry v3.1.2 github.com/distribution/distribution/v3/cmd/registry ;;
    node) # everything that `make test-node` needs
        one etcd
        one toxiproxy
        one registry
        kubernetes "$NODE_MINOR" kube-apiserver kube-controller-manager kube-scheduler kubelet
        ;;
    control-plane)
        if [[ -n ${KUBEBUILDER_ASSETS:-} ]]; then
            say "KUBEBUILDER_ASSETS is set: no control plane is built"
            return
        fi
        one etcd
        local version
        for version in "${MINORS[@]}"; do
            kubernetes "$version" kube-apiserver kube-controller-manager kube-scheduler
        done
        one kueue
        ;;
    *) die "no such part: $1 (control-plane, node, etcd, kueue, kustomize, toxiproxy, kwok, registry)" ;;
    esac
}

(($#)) || set -- kustomize toxiproxy control-plane
for part in "$@"; do
    one "$part"
done
say "all there: $*"
