#!/bin/sh
# The object store's bucket and users, made or left as they are. Nobody but this script uses the root key.
set -eu
export MC_HOST_store="${STORE%%://*}://$MINIO_ROOT_USER:$MINIO_ROOT_PASSWORD@${STORE#*://}" MC_CONFIG_DIR=/tmp/mc
bucket=arn:aws:s3:::$RETRAIN_BUCKET

allow() { # user, key, policy: the policy is all that the user may do
    printf '{"Version": "2012-10-17", "Statement": [%s]}' "$3" >/tmp/policy.json
    mc admin policy create store "$1" /tmp/policy.json
    mc admin user add store "$1" "$2"
    mc admin user info store "$1" | grep -q "PolicyName: $1\$" || mc admin policy attach store "$1" --user "$1"
}

mc mb --ignore-existing "store/$RETRAIN_BUCKET"
allow "$PIPELINE_KEY_ID" "$PIPELINE_KEY" '
    {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": "'"$bucket"'"},
    {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
     "Resource": "'"$bucket"'/*"}'
[ -z "$READER_KEY_ID" ] || allow "$READER_KEY_ID" "$READER_KEY" '
    {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "'"$bucket"'",
     "Condition": {"StringLike": {"s3:prefix": ["models/*"]}}},
    {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "'"$bucket"'/models/*"}'
