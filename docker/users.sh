#!/bin/sh
# The object store's bucket and users, made or left as they are. Nobody but this script uses the root key.
set -eu
export MC_HOST_store="${STORE%%://*}://$MINIO_ROOT_USER:$MINIO_ROOT_PASSWORD@${STORE#*://}" MC_CONFIG_DIR=/tmp/mc

allow() { # user, key, roles: the roles' policies together are all that the user may do
    user=$1 key=$2
    shift 2
    mc admin user add store "$user" "$key"
    for role; do
        sed "s/BUCKET/$RETRAIN_BUCKET/g" "/policies/$role.json" >/tmp/policy.json
        mc admin policy create store "$role" /tmp/policy.json
        mc admin user info store "$user" --json | grep -q "\"policyName\".*\b$role\b" ||
            mc admin policy attach store "$role" --user "$user"
    done
}

mc mb --ignore-existing "store/$RETRAIN_BUCKET"
allow "$PIPELINE_KEY_ID" "$PIPELINE_KEY" trainer promoter pruner
[ -z "$READER_KEY_ID" ] || allow "$READER_KEY_ID" "$READER_KEY" reader
