#!/bin/bash
# Pull a model with what a shell has: an S3 client (awscli, or curl), jq and sha256sum.
#
#   retrain_models/pull.sh en-es model            # production, into ./model
#   retrain_models/pull.sh en-es model VERSION
#
# The bucket is RETRAIN_BUCKET (retrain), the store S3_ENDPOINT_URL (for curl it must be there), the key AWS_ACCESS_KEY_ID
# and AWS_SECRET_ACCESS_KEY.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 NAME DIRECTORY [VERSION]" >&2; exit 2; }
name=$1 directory=$2 version=${3:-} bucket=${RETRAIN_BUCKET:-retrain}

get() { # KEY: an object's content
  if command -v aws >/dev/null; then
    aws ${S3_ENDPOINT_URL:+--endpoint-url "$S3_ENDPOINT_URL"} s3 cp --only-show-errors "s3://$bucket/$1" -
  else
    curl --silent --show-error --fail ${AWS_CA_BUNDLE:+--cacert "$AWS_CA_BUNDLE"} --aws-sigv4 "aws:amz:${AWS_REGION:-us-east-1}:s3" \
      --config <(echo "user = \"$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY\"") "$S3_ENDPOINT_URL/$bucket/$1"
  fi
}

[ ! -e "$directory" ] || { echo "$directory is there already" >&2; exit 1; }
partial=$(mktemp -d "$directory.XXXXXX")
trap 'rm -rf "$partial"' EXIT

[ -n "$version" ] || version=$(get "models/$name/production.json" | jq -er .version)
get "models/$name/versions/$version/manifest.json" >"$partial/manifest.json"
jq -er '.files[] | [.sha256, .path] | @tsv' "$partial/manifest.json" >"$partial/files"
mkdir "$partial/model"
while IFS=$'\t' read -r sha256 path; do
  [[ "/$path/" != */../* && $path != /* && $sha256 =~ ^[0-9a-f]{64}$ ]] || { echo "the manifest names $path" >&2; exit 1; }
  mkdir -p "$(dirname "$partial/model/$path")"
  get "models/$name/files/$sha256" >"$partial/model/$path"
  (cd "$partial/model" && echo "$sha256  $path" | sha256sum --check --quiet --strict)
done <"$partial/files"
chmod 755 "$partial/model"
mv --no-target-directory "$partial/model" "$directory"
echo "$name $version is in $directory"
