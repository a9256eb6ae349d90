#!/bin/bash
# Starts the server inside its container: passwords come as files (compose.yaml), never in the command line's sight.
set -euo pipefail

secret() { # the content of a secret's file, fit for an address
  python -c 'import sys, urllib.parse as u; print(u.quote(open(sys.argv[1]).read().strip(), safe=""))' "/run/secrets/$1"
}

MLFLOW_BACKEND_STORE_URI="postgresql://mlflow:$(secret postgres_password)@postgres:5432/mlflow"
AWS_ACCESS_KEY_ID=mlflow
AWS_SECRET_ACCESS_KEY=$(cat /run/secrets/s3_password)
export MLFLOW_BACKEND_STORE_URI AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY

# The bucket is made here, so that a new machine needs no further step.
python - <<'PYTHON'
import os, boto3
from botocore.exceptions import ClientError
s3 = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
try:
    s3.create_bucket(Bucket="mlflow")
except ClientError as error:
    if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
        raise
PYTHON

exec mlflow server --host 0.0.0.0 --port 5000 --workers 4 \
  --artifacts-destination s3://mlflow/artifacts --allowed-hosts "$MLFLOW_SERVER_ALLOWED_HOSTS"
