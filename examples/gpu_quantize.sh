#!/bin/sh
# How long a layer of Qwen3-30B-A3B takes to quantize on a GPU, in at most 6 minutes: method="fast" beside GPTQ with
# and without its search for scales (4 experts of 128, scaled up), then the default method. From the root of the
# repository, in an environment of `make install install-gptq` with a torch for CUDA; results in the folder $OUT, by
# default gpu_quantize. Further arguments go to `bitsmoe bench quantize` (`--device cpu --shape moe-tiny` tries the
# script itself).
set -u
OUT=${OUT:-gpu_quantize}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$OUT"
status=0
for method in "fast 4 220" "default 0 140"; do
	set -- $method -- "$@"
	name=$1 gptq_experts=$2 limit=$3
	shift 4
	timeout "$limit" "$PYTHON" -m bitsmoe_plugin bench quantize --device cuda --tokens 8192,131072 --method "$name" \
		--gptq-experts "$gptq_experts" "$@" --json > "$OUT/$name.json" 2> "$OUT/$name.txt"
	code=$?
	echo "$name: $code" | tee -a "$OUT/summary.txt"
	[ "$code" -eq 0 ] || status=1
done
exit "$status"
