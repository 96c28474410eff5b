#!/usr/bin/env bash
# Measures the official sizes on one GPU, with random weights, in ten to thirteen minutes:
#
#     bash results/gpu/check.sh            # writes to $OUT, by default results/gpu/NAME_OF_THE_GPU
#
# Each step has a time limit and a log of its own: what has been measured is there, whatever comes
# after. Needs 60 GB on the GPU, 24 GB under $CHECKPOINTS (default: /tmp), and no network.
set -uo pipefail
cd "$(dirname "$0")/../.."
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' '-')
out=${OUT:-results/gpu/$gpu}
checkpoints=${CHECKPOINTS:-/tmp}
mkdir -p "$out"
nvidia-smi | tee "$out/gpu.txt"
export PYTHONUNBUFFERED=1

step() { # step NAME SECONDS COMMAND..: run a command, show and keep the end of what it prints
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tr '\r' '\n' | grep -v -i warn | tail -15 | tee "$out/$name.txt"
}

official="python3 policies.py --size official --device cuda --dtype bf16"
lora="--policy openvla --lora-rank 32"
step openvla 100 $official $lora --gradient-checkpointing --batch 1 8 64 --transformers
step openvla-no-checkpointing 60 $official $lora --batch 32
step pi05-expert 40 $official --policy pi05 --freeze vlm --batch 1 64
step pi05-full 40 $official --policy pi05 --gradient-checkpointing --batch 16

run="python3 rl_cotrain.py --init base --task push-cube --real-episodes 4 --eval-episodes 0"
for policy in openvla pi05; do
    folder=$checkpoints/random-$policy
    flags="--policy $folder --dtype bf16 --num-envs 16 --horizon 8 --out $folder-run"
    [ "$policy" = openvla ] && flags="$flags --lora-rank 32 --micro-batch 32"
    rm -rf "$folder-run"
    step "$policy-save" 60 $official --policy $policy --save "$folder"
    step "$policy-run" 90 $run $flags --iterations 2
    step "$policy-resume" 60 $run $flags --iterations 3 --resume
    cp "$folder-run/metrics.jsonl" "$out/$policy-metrics.jsonl"
    ls -l "$folder-run/policy" "$folder-run/resume.pt" | tee "$out/$policy-files.txt"
    rm -rf "$folder" "$folder-run"
done

tiny="--policy openvla --init base --task push-cube --real-episodes 10 --eval-episodes 0"
for device in gpu cpu; do
    rm -rf "$checkpoints/tiny-$device"
    [ $device = cpu ] && export CUDA_VISIBLE_DEVICES=
    step "tiny-$device" 70 python3 rl_cotrain.py $tiny --iterations 10 --out "$checkpoints/tiny-$device"
    cp "$checkpoints/tiny-$device/metrics.jsonl" "$out/tiny-$device-metrics.jsonl"
done
