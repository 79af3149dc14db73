#!/usr/bin/env bash
# The secrets of the development stores, with random passwords. Both namespaces must exist.
set -euo pipefail

postgres=$(openssl rand -hex 16) minio=$(openssl rand -hex 16) redis=$(openssl rand -hex 16)

kubectl -n reft-stores create secret generic stores \
    --from-literal=postgres="$postgres" --from-literal=minio="$minio" --from-literal=redis="$redis"
kubectl -n reft-ray create secret generic reft-ray-auth --from-literal=auth_token="$(openssl rand -hex 32)"
kubectl -n reft-ray create secret generic reft-ray-redis --from-literal=password="$redis"
kubectl -n reft-ray create secret generic reft-ray-object-store \
    --from-literal=AWS_ACCESS_KEY_ID=reft --from-literal=AWS_SECRET_ACCESS_KEY="$minio" \
    --from-literal=AWS_REGION=us-east-1 --from-literal=AWS_ENDPOINT_URL=http://minio.reft-stores:9000
kubectl -n reft-ray create secret generic reft-ray-service \
    --from-literal=REFT_DATABASE="postgresql+psycopg://reft:$postgres@postgres.reft-stores/reft" \
    --from-literal=REFT_METRICS_TOKEN="$(openssl rand -hex 32)"
