#!/usr/bin/env bash
# image.sh FOLDER IMAGE: build docker/Dockerfile for the node tests, push it to the registry that
# IMAGE names, and print it by digest.
#
# Its base is a debootstrapped Debian, the same as debian:bookworm-slim, so that no registry has to
# be reached; and it holds CUDA libraries that only say no (stubs.py). Everything is under FOLDER.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1 image=$2
export TMPDIR=$folder/tmp # buildah would put whole layers into /var/tmp
mkdir -p "$TMPDIR"
buildah="buildah --root $folder/storage --runroot $folder/run --storage-driver overlay"
say() { echo "image: $*" >&2; }

has() { $buildah inspect --type image "$1" >/dev/null 2>&1; }

base() {
    local root=$folder/root release mirror
    # This machine's own release, from where it gets its own packages.
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $release" | awk 'NR == 1')
    mirror=${mirror%/}
    say "a Debian base ($release) by debootstrap"
    rm -rf "$root"
    debootstrap --variant=minbase "$release" "$root" "$mirror" >"$folder/debootstrap.log" ||
        { tail -20 "$folder/debootstrap.log" >&2; return 1; }
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    # Certificate authorities that this machine trusts beside the usual ones.
    mkdir -p "$root/usr/local/share/ca-certificates"
    cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
    .venv/bin/python tests/node/stubs.py .venv/lib/python3*/site-packages "$root/usr/local/lib/stubs" >&2
    echo /usr/local/lib/stubs >"$root/etc/ld.so.conf.d/stubs.conf"
    chroot "$root" /sbin/ldconfig
    local container
    container=$($buildah from scratch)
    $buildah copy -q "$container" "$root" / >&2
    $buildah config --cmd /bin/sh "$container"
    $buildah commit -q --rm "$container" localhost/base >&2
    rm -rf "$root"
}

pause() { # what holds a pod's namespaces
    local container
    container=$($buildah from scratch)
    $buildah copy -q "$container" "$(readlink -f "$(command -v busybox)")" /busybox >&2
    $buildah config --entrypoint '["/busybox", "sleep", "2147483647"]' "$container"
    $buildah commit -q --rm "$container" "${image%/*}/pause:1" >&2
    docker/push.sh "$buildah" "${image%/*}/pause:1" --tls-verify=false >&2
}

has localhost/base || base
pause
say "docker/Dockerfile, with locked dependencies for a CPU"
make --no-print-directory image BUILDER="$buildah" BASE=localhost/base IMAGE="$image" \
    BUILD_FLAGS="--isolation chroot --layers --quiet --pull-never --build-arg REQUIREMENTS=requirements/image-cpu.txt" >&2
make --no-print-directory push BUILDER="$buildah" IMAGE="$image" PUSH_FLAGS="--tls-verify=false --quiet --compression-format zstd --compression-level 1"
