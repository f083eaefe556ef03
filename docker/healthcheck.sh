#!/bin/sh
# Healthy while the job touches its heartbeat. No Python: importing torch would cost seconds each time.
# AMSF_HEARTBEAT (/tmp/amsf-heartbeat), AMSF_HEARTBEAT_MAX_AGE (900 seconds).
file=${AMSF_HEARTBEAT:-/tmp/amsf-heartbeat}
limit=${AMSF_HEARTBEAT_MAX_AGE:-900}
if ! then=$(stat -c %Y "$file" 2>/dev/null); then
  echo "no heartbeat yet: $file does not exist"
  exit 1
fi
age=$(($(date +%s) - then))
echo "last heartbeat $age s ago, $limit allowed"
[ "$age" -le "$limit" ]
