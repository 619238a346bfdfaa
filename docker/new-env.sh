#!/bin/sh
# Writes docker/.env, readable by you alone: env.example with a fresh random value for each secret.
set -eu
cd "$(dirname "$0")"
if [ -e .env ]; then
    echo "docker/.env exists and was left as it is. The databases and the store keep the secrets of their first start, so" \
        "remove it only together with the volumes (docker compose down --volumes)." >&2
    exit 1
fi
umask 077
trap 'rm -f .env.partial' EXIT

hex() { head -c "$1" /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }

while IFS= read -r line; do
    case "$line" in
        '#'*) ;;
        AIRFLOW_FERNET_KEY=) line="$line$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')" ;;
        S3_ACCESS_KEY_ID=) line="${line}GK$(hex 12)" ;;  # the form that Garage wants
        AIRFLOW_ADMIN_PASSWORD=) line="$line$(hex 12)" ;;
        *=) line="$line$(hex 32)" ;;
    esac
    printf '%s\n' "$line"
done < env.example > .env.partial
mv .env.partial .env
echo "docker/.env is written. Airflow's user is 'admin', its password AIRFLOW_ADMIN_PASSWORD in that file."
