#!/bin/sh
# Everything that only a GPU can tell, in at most 8 minutes: that the kernels compute what they should, what a
# layer takes beside bfloat16, and which block sizes are best. From the root of the repository, in an
# environment with torch, Triton, transformers and pytest; results in the folder $OUT, by default gpu_check.
set -u
OUT=${OUT:-gpu_check}
PYTHON=${PYTHON:-python3}
PYTHONPATH=$PWD
export PYTHONPATH HF_HUB_OFFLINE=1
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > "$OUT/gpu.txt"
"$PYTHON" -c "import torch, triton; print(torch.__version__, triton.__version__)" >> "$OUT/gpu.txt"
"$PYTHON" -c "from setuptools import setup; setup()" -q build_ext --inplace > "$OUT/build.txt" 2>&1

TRITON_INTERPRET=0 timeout 200 "$PYTHON" -m pytest -x tests/runtime/test_gpu_triton_layer.py > "$OUT/tests.txt" 2>&1
echo "tests: $?" | tee -a "$OUT/summary.txt"
timeout 130 "$PYTHON" -m bitsmoe_plugin bench layer --device cuda --bits 2 --repeats 9 \
	--tokens 1,4,16,64,256,1024,4096 --json > "$OUT/layer.json" 2> "$OUT/layer.txt"
echo "layer: $?" | tee -a "$OUT/summary.txt"
timeout 140 "$PYTHON" examples/gpu_sweep.py "$OUT/sweep.jsonl" > "$OUT/sweep.txt" 2>&1
echo "sweep: $?" | tee -a "$OUT/summary.txt"
