#!/bin/sh
# Everything that only a GPU can answer, in order of value, in at most nine minutes on one H200.
#
#   sh benchmarks/gpu_all.sh [--rehearse] [--only "start attention"] [FOLDER]
#
# Each part has a limit of its own. Its row is in FOLDER/rows.md before the next part begins, so an end at any moment
# loses one part only. FOLDER (default: $OUT, or gpu-results) gets four files: rows.md for benchmarks/RESULTS.md,
# details.jsonl with all numbers, records.json (what the ops measured), log.txt. --rehearse runs all of it with tiny
# models, also without a GPU: it shows that the script works, and its numbers mean nothing. The limits are then longer.
# PYTHON names the interpreter (default: python3). What is not installed there is named in the row of its part.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
rehearse='' only=''
while [ $# -gt 0 ]; do
    case $1 in
    --rehearse) rehearse=--rehearse ;;
    --only) only=$2 && shift ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
    -*) echo "unknown option $1: see sh $0 --help" >&2 && exit 64 ;;
    *) OUT=$1 ;;
    esac
    shift
done
folder=${OUT:-gpu-results}
mkdir -p "$folder" || exit 1
# A rehearsal without a GPU: kernels run in Triton's interpreter, and nothing is compiled.
[ -z "$rehearse" ] || nvidia-smi -L >/dev/null 2>&1 || export TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1
"$python" -m benchmarks.gpu_parts head --folder "$folder" $rehearse </dev/null || exit 1

# number, limit in seconds, part
while read -r number limit part; do
    case " ${only:-$part} " in *" $part "*) ;; *) continue ;; esac
    [ -z "$rehearse" ] || limit=$((limit * 10))
    timeout -k 3 "$limit" "$python" -m benchmarks.gpu_parts "$part" --number "$number" --limit "$limit" \
        --folder "$folder" $rehearse </dev/null >>"$folder/log.txt" 2>&1
    code=$?
    case $code in
    0) ;;
    137) echo "| $number | $part | ended by signal 9: no memory, or more than $limit s | |" >>"$folder/rows.md" ;;
    124) echo "| $number | $part | not measured: more than $limit s | $limit |" >>"$folder/rows.md" ;;
    *) echo "| $number | $part | failed ($code): $(tail -n 1 "$folder/log.txt" | cut -c 1-200) | |" >>"$folder/rows.md" ;;
    esac
    tail -n 1 "$folder/rows.md"
done <<PARTS
1 35 start
2 75 tests
3 55 ops
4 85 race-1.3b
5 85 race-6.7b
6 50 race-125m
7 40 saves
8 20 attention
9 25 fp16
10 20 busy
11 20 profile
12 30 fairscale
PARTS
