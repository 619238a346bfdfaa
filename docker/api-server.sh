#!/bin/sh
# SimpleAuthManager takes passwords from a file; here it lies in memory and is made of AIRFLOW_ADMIN_PASSWORD.
set -eu
file="$AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"
umask 077
mkdir -p "$(dirname "$file")"
python -c 'import json, os; print(json.dumps({"admin": os.environ["AIRFLOW_ADMIN_PASSWORD"]}))' > "$file"
unset AIRFLOW_ADMIN_PASSWORD
exec airflow api-server
