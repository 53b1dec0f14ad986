#!/usr/bin/env bash
# The quickstart: write pages of music, train three methods on two backbones, evaluate, and write a report.
# `make quickstart` calls it. SEED decides the initial weights, the order, and which two pages keep their labels.
#
#   launch/quickstart.sh [STEPS=…] [SEED=…] [OUT=runs/quickstart]
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS='' SEED=0 OUT=runs/quickstart
for setting in "$@"; do
    case $setting in STEPS=* | SEED=* | OUT=*) declare "$setting" ;; *) echo "unknown setting $setting" >&2; exit 2 ;; esac
done

maskmatch shards write scores data/scores

# Steps, labels, initialisation, weak view, schedule, teacher and evaluation are the same: only the losses differ.
declare -A methods=(
    [supervised]='method.base=supervised method.mask.keep=null method.scales=[1.0]'
    [fixmatch]='method.mask.keep=null method.scales=[1.0]'
    [maskmatch]=''
)
runs=()
for backbone in segformer vit; do
    for method in supervised fixmatch maskmatch; do
        run=$OUT/$backbone-$method
        echo "== $backbone, $method"
        # shellcheck disable=SC2086  # a method is several words
        launch/deepspeed.sh "configs/quickstart-$backbone.yaml" ${methods[$method]} \
            "run.dir=$run" "run.seed=$SEED" "data.split_seed=$SEED" ${STEPS:+"run.steps=$STEPS"}
        for split in val val_font; do
            maskmatch evaluate "$run" --split "$split" --json >/dev/null
        done
        runs+=("$run")
    done
done
maskmatch report "${runs[@]}" --out "$OUT/report.html" --json "$OUT/table.json"
