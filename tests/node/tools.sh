#!/usr/bin/env bash
# What a real node needs on this machine: Debian's containerd and friends, our kubelet and registry.
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { echo "node tools: $*" >&2; }
[[ $(id -u) == 0 ]] || { say "a real node needs root (kubelet, containerd); run as root, or leave test-node out"; exit 1; }
command -v apt-get >/dev/null || { say "needs Debian or Ubuntu: containerd and runc come from apt"; exit 1; }

declare -A packages=(
    [containerd]=containerd [runc]=runc [buildah]=buildah [debootstrap]=debootstrap
    [iptables]=iptables [ip]=iproute2 [mount]=mount [gcc]=gcc [nm]=binutils
)
missing=()
for program in "${!packages[@]}"; do
    command -v "$program" >/dev/null || missing+=("${packages[$program]}")
done
[[ -x /usr/lib/cni/bridge ]] || missing+=(containernetworking-plugins)
# Dynamic, it would find no libraries in an image of its own.
{ [[ -x /bin/busybox ]] && ! ldd /bin/busybox >/dev/null 2>&1; } || missing+=(busybox-static)
if ((${#missing[@]})); then
    say "installing ${missing[*]} by apt"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
tests/cluster/build.sh node
say "all there"
