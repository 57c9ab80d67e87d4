#!/usr/bin/env bash
# Everything that is measured on a GPU, at most 20 minutes: one command on a bare CUDA machine that has torch.
#
#     benchmarks/on_gpu.sh [--dry-run] WHEELS
#
# WHEELS: a folder with wheels of what this project needs besides torch (pyproject.toml: the core, the extra models,
# peft, faiss-gpu, pytest and setuptools); nothing is downloaded. On a machine like it but with a network:
# pip download -d WHEELS ...
# Everything is installed into .venv-gpu, which sees the machine's own packages. Each step has a limit of time, and the
# next one follows whether it succeeds or not; a table of all steps comes last, output in gpu-results/. The exit status
# is 1 where a step failed, 2 for wrong arguments. --dry-run prints the commands. PYTHON: the interpreter with torch.
set -u

dry=0
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
if [ $# -ne 1 ]; then echo "usage: benchmarks/on_gpu.sh [--dry-run] WHEELS" >&2; exit 2; fi
if [ $dry = 0 ] && ! compgen -G "$1/*.whl" > /dev/null; then
  echo "error: $1 has no wheels (*.whl): give the folder that \`pip download -d\` filled" >&2
  exit 2
fi
wheels=$1
[ $dry = 1 ] || wheels=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
env=.venv-gpu
py=$env/bin/python
results=gpu-results
[ $dry = 1 ] || mkdir -p $results
rows=()
failed=0

# step NAME SECONDS COMMAND...: runs the command for so long at most, keeps its output, adds a row to the table.
step() {
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  if [ $dry = 1 ]; then
    printf 'timeout %s' "$limit"; printf ' %q' "$@"; printf '\n'
    return
  fi
  printf '\n== %s\n' "$name"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$results/$name.txt"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || failed=1
  rows+=("$(printf '%-22s %8d %6d' "$name" $((SECONDS - started)) "$status")")
}

# The limits add up to 20 minutes. torch and its CUDA libraries are the machine's: their wheels are passed over.
step environment 30 "${PYTHON:-python3}" -m venv --system-site-packages $env
step install 120 bash -c 'find "$0" -name "*.whl" ! -name "torch-*" ! -name "nvidia_*" ! -name "triton-*" -print0 |
  xargs -0 "$1" -m pip install --quiet --no-index --no-deps' "$wheels" $py
step install-this 40 $py -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
step device 20 $py -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
step tests 100 $py -m pytest -m gpu -p no:cacheprovider
step sketch-1.5b 200 $py -m benchmarks.sketch --device cuda --shape qwen2.5-1.5b --repeats 3
step sketch-moe 100 $py -m benchmarks.sketch --device cuda --shape qwen3-moe --repeats 3
step fidelity 180 $py -m benchmarks.fidelity --pool 200 --only "both, int8, 480"
step overhead-1.5b 200 $py -m benchmarks.overhead --shape qwen2.5-1.5b --device cuda --rounds 1 --repeats 2
step faiss 60 $py -m benchmarks.indexes --dims 1024 --kinds flat --scale 0.25 --repeats 3
# What is held beside the model, and what `plan` says of the same shape.
step memory-1.5b 120 $py -m benchmarks.sketch --memory --device cuda --shape qwen2.5-1.5b
step plan-1.5b 30 $py -m gradstore plan --model Qwen2.5-1.5B --pool 4 --rollouts 16 --tokens 800 --device h100 --gpus 1

[ $dry = 0 ] || exit 0
printf '\n%-22s %8s %6s\n' step seconds status
printf '%s\n' "${rows[@]}"
exit $failed
