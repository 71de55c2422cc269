#!/usr/bin/env bash
# push.sh BUILDER IMAGE [FLAG...]: push IMAGE; on stdout only its name by digest.
set -euo pipefail
read -r -a builder <<<"$1"
image=$2
shift 2
repository=${image%%@*}
# A colon after the last slash is a tag's; one before it is a registry's port.
[[ ${repository##*/} == *:* ]] && repository=${repository%:*}

if [[ ${builder[0]##*/} == docker ]]; then
    "${builder[@]}" push "$@" "$image" >&2
    digest=$("${builder[@]}" inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$image" |
        sed -n "s|^$repository@||p" | head -1)
else
    file=$(mktemp)
    trap 'rm -f "$file"' EXIT
    "${builder[@]}" push --digestfile "$file" "$@" "$image" "docker://$image" >&2
    digest=$(cat "$file")
fi
[[ $digest == sha256:* ]] || { echo "push: $image was pushed, but its digest is not known" >&2; exit 1; }
echo "$repository@$digest"
