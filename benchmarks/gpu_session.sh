#!/usr/bin/env bash
# All that a CUDA machine without a network is asked, in a few calls for one that is lent for minutes.
#   benchmarks/gpu_session.sh OUT SECONDS checks   tests, those first that failed or never ran, beside them configurations
#                                                  and killed runs
#   benchmarks/gpu_session.sh OUT SECONDS speed    peers, streaming with its timeline, experts together, where a step's time
#                                                  goes
#   benchmarks/gpu_session.sh OUT SECONDS limits   the smallest budgets, speeds in budgets, the longest sequences
# What this project needs is installed before, or lies where PYTHONPATH says; and Unsloth with TRL (unsloth_wheels.sh) in
# the folder that $UNSLOTH names. The project itself need not be installed.
set -u
out=$1 seconds=$2 what=$3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
begin=$(date +%s)
left() { echo $((seconds - $(date +%s) + begin)); }
at() { echo "[$(($(date +%s) - begin)) s] $*"; }
folder=/dev/shm/lowmem-ft  # the quickest place, but that of a machine whose RAM grows as it is used may be small
[ "$(df -P --block-size=1G /dev/shm | awk 'END { print $4 }')" -ge 50 ] || folder=/var/tmp/lowmem-ft
rm -rf "$folder"  # the same model lies there in other types after the other call, where the machine was kept
mkdir -p "$folder/tmp" "$out"
export TMPDIR=$folder/tmp HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
ulimit -c 0

limited() { # [-s SIGNAL] SECONDS COMMAND...: killed where it does not end then, or nothing would come after it
  timeout -k 20 "$@"
}

run_tests() { # SECONDS NAME PYTEST_ARGUMENT...
  local limit=$1 name=$2
  shift 2
  # an interrupt lets pytest print its summary
  OMP_NUM_THREADS=1 limited -s INT "$limit" python3 -m pytest -m gpu --timeout 90 -v --tb=short -p no:cacheprovider \
    -o addopts="--strict-markers -ra" "$@" >"$out/$name.txt" 2>&1
  at "$name: $?, $(tail -1 "$out/$name.txt")"
}

if [ "$what" = checks ]; then
  limit=$((seconds - 30))
  run_tests "$limit" failing -n 3 --maxprocesses=3 tests/gpu/test_below.py tests/gpu/test_planned.py \
    tests/gpu/test_lengths.py &
  run_tests "$limit" others -n 4 --maxprocesses=4 --dist load --maxschedchunk 1 \
    tests/gpu/test_experts.py tests/gpu/test_attention_capped.py tests/gpu/test_attention.py \
    tests/gpu/test_streaming.py tests/gpu/test_allocator.py tests/gpu/test_export.py tests/gpu/test_budget.py \
    tests/gpu/test_cuda.py tests/gpu/test_norms.py tests/gpu/test_mlp_act.py &
  (
    OMP_NUM_THREADS=1 limited "$limit" python3 benchmarks/resume.py --device cuda --kills 5 --steps 8 \
      --out "$out/resume_cuda.json" >/dev/null 2>"$out/resume.txt"
    at "killed runs: $?"
  ) &
  (
    OMP_NUM_THREADS=1 limited "$limit" python3 benchmarks/gpu_kernels.py --jobs 3 --seconds $((limit - 40)) \
      --out "$out/gpu_kernels.json" >/dev/null 2>"$out/kernels.txt"
    at "kernels: $?"
  ) &
  (
    PYTORCH_ALLOC_CONF=expandable_segments:True OMP_NUM_THREADS=1 limited "$limit" python3 benchmarks/plan_accuracy.py \
      --device cuda --count 360 --jobs 6 --threads 1 --seconds $((limit - 25)) \
      --known benchmarks/results/recorded_h200.jsonl.gz --record "$TMPDIR/recorded.jsonl" >/dev/null 2>"$out/accuracy.txt"
    at "configurations: $?"
  ) &
  wait
  tail -n 40 "$out"/{resume,kernels,accuracy}.txt >"$out/said.txt" 2>/dev/null  # so few files come back from the machine
  rm -f "$out"/{resume,kernels,accuracy}.txt
  grep -h '}$' "$TMPDIR"/recorded.jsonl* 2>/dev/null | gzip -6 >"$out/recorded.jsonl.gz"
  grep -hE "^(FAILED|ERROR)" "$out"/failing.txt "$out"/others.txt | cut -c1-200 | sort -u
elif [ "$what" = limits ]; then
  limited "$(left)" python3 benchmarks/gpu_limits.py --folder "$folder" --seconds $(($(left) - 10)) \
    --out "$out/gpu_limits.json" >/dev/null 2>"$out/limits.txt"
  at "limits: $?"
  cut -c1-600 "$out/limits.txt"
else
  # experts have never run there; and the seconds that are left to those behind it
  for part in experts:230 peers:80 streaming:30 steps:0; do
    limit=$(($(left) - ${part#*:})) part=${part%:*}
    [ "$limit" -gt 15 ] || continue
    limited "$limit" python3 benchmarks/gpu.py --folder "$folder" --parts $part ${UNSLOTH:+--unsloth "$UNSLOTH"} \
      --sides "ours, recompute" TRL "TRL with Liger" Unsloth "ours, fastest" \
      --out "$out/gpu_$part.json" >/dev/null 2>>"$out/speed.txt"
    at "$part: $?"
  done
  cut -c1-1200 "$out/speed.txt"
fi
