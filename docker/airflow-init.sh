#!/bin/sh
# Before anything of Airflow starts: tables of this version, and the pool that bounds how many trainings run at a time.
set -eu
airflow db migrate
airflow pools set gpu "$PLEAT_GPU_SLOTS" "Feature extraction and training: one slot for each device"
