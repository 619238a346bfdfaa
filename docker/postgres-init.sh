#!/bin/bash
# Run once by the postgres image, on an empty volume: a database and its owner for each of Airflow, Celery and MLflow.
set -euo pipefail
for name in airflow celery mlflow; do
    password="${name^^}_DB_PASSWORD"
    # Through the environment, since everybody on the machine can read a command line.
    DB_NAME="$name" DB_PASSWORD="${!password}" psql --quiet --no-psqlrc --set ON_ERROR_STOP=1 \
        --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv name DB_NAME
\getenv password DB_PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name" ENCODING 'UTF8' TEMPLATE template0;
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
