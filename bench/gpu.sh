#!/bin/sh
# Checks and the whole GPU table in one go, under ten minutes on one GPU of 40 GB or more; nothing is installed.
#   bench/gpu.sh [PYTHON]      the results: gpu.json and, from the suite, out/gpu/
set -u
cd "$(dirname "$0")/.."
python=${1:-python3}
out=${OUT:-out/gpu}
mkdir -p "$out"
timeout 330 "$python" -m bench.gpu | tee "$out/gpu.log"
timeout 240 "$python" -m bench --device cuda --dtype bfloat16 --shapes 8b --tokens 128,1024,2000 --rows 32 --rounds 3 \
    --providers hooks,batch,packed,expanded --out "$out" | tee "$out/suite.log"
