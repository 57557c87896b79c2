#!/usr/bin/env bash
# Everything that needs a GPU, in one command that ends within a budget; no network, no installation.
#
#   bash bench/gpu.sh OUT [--budget-s 480] [--wheels DIR] [--cache FILE] [--rehearse] [part ...]
#
# Parts, the most informative first, which is also their order by default: tests step kernels attention sample smoke
# extract quickstart engines sizes small-batch epilogue ablation. At the start it prints what it will do in which second. A part that ends early
# leaves its time to the next ones; one that does not fit into the rest of the budget is left out. Each has its own time
# limit, so one that hangs or fails takes no time from the others. While the tests run, what the contestants of `step`
# compile is compiled beside them.
# --wheels: packages that the machine lacks, see bench/README.md. --cache: caches.tgz of an earlier run, which saves
# compiling what has not changed. --rehearse: tiny sizes, on the CPU if there is no GPU. LIMITS="step 300 sample 60" in
# the environment: other time limits. COMMIT=... names the commit of a checkout without .git, PYTHON=... the interpreter.
# OUT gets eight files: results.jsonl, report.md, step.png, log.txt, attention.json, oracle.json (copy it to
# bench/results/), files.tgz (each turn's results, timelines, logs) and caches.tgz.
set -uo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
OUT=${1:?usage: bench/gpu.sh OUT [--budget-s S] [--wheels DIR] [--cache FILE] [--rehearse] [part ...]}
shift
BUDGET=480 WHEELS="" CACHE="" REHEARSE="" PARTS=()
while (($#)); do
    case $1 in
        --budget-s) BUDGET=$2; shift ;;
        --wheels) WHEELS=$2; shift ;;
        --cache) CACHE=$2; shift ;;
        --rehearse) REHEARSE=1 ;;
        *) PARTS+=("$1") ;;
    esac
    shift
done
((${#PARTS[@]})) || PARTS=(tests step kernels attention sample smoke extract quickstart engines sizes small-batch epilogue ablation)
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
PYTHON=${PYTHON:-python3}
$PYTHON -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' ||
    { echo "PYTHON=$PYTHON has no torch; set PYTHON to an interpreter that has it" >&2; exit 1; }
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$WORK/caches/inductor TRITON_CACHE_DIR=$WORK/caches/triton
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
mkdir "$WORK/caches" "$WORK/site"
[[ -n $CACHE ]] && { tar -xzf "$CACHE" -C "$WORK/caches" || exit 1; }

# fastdit and fastdit.kernels from the checkout, mapped as in setup.py, from any working directory
cat >"$WORK/site/sitecustomize.py" <<MAP
import importlib.util, sys
class Kernels:
    def find_spec(self, name, path=None, target=None):
        if name == "fastdit.kernels":
            return importlib.util.spec_from_file_location(name, "$ROOT/kernels/__init__.py")
sys.meta_path.append(Kernels())
MAP
export PYTHONPATH=$WORK/site:$ROOT${PYTHONPATH:+:$PYTHONPATH}
if [[ -n $WHEELS ]]; then
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --target "$WORK/wheels" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH=$PYTHONPATH:$WORK/wheels
fi

# ---- what each part runs

STEP=(--contestants fastdit-all-on fastdit-fp8 strong fast-dit official fastdit-fp8-attention)
ON_DEVICE=tests/data/test_shards.py::test_on_a_device_the_batches_are_the_same_and_closing_ends_them_too
CONTEST=(--contestants fastdit-all-on fastdit-cublaslt fastdit-triton)
SMALL=(--batch 32 --contestants fastdit-all-on strong fastdit-fp8 --profile)
KERNELS=(bench.kernels)
if [[ -n $REHEARSE ]]; then
    TINY=(--size tiny --rounds 1 --steps 2) SIZES=(tiny small)
    STEP+=("${TINY[@]}" --profile) ABLATION=("${TINY[@]}") ENGINES=("${TINY[@]}") SMALL+=("${TINY[@]}" --batch 2)
    CONTEST+=("${TINY[@]}")
    SAMPLE=(--size tiny --share 0.05 --rounds 1 --batch 2)
    EXTRACT=(--count 48 --rounds 1 --ways fastdit-fp32 fastdit-bf16-compiled loader)
    QUICKSTART=(training.steps=20 sampling.steps=2)
    $PYTHON -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || KERNELS=(bench.static.kernels)
    KERNELS+=(--ops adaln)
    TESTS=(tests/models/test_dit.py $ON_DEVICE) TRAINED=()
    LIMIT=(tests 120 step 300 kernels 90 attention 30 sample 90 smoke 300 extract 120 quickstart 200 engines 300 sizes 400 small-batch 200 epilogue 300 ablation 300)
else
    STEP+=(--rounds 2 --steps 12 --profile) ABLATION=(--rounds 1 --steps 8) ENGINES=(--rounds 2 --steps 10)
    EXTRACT=(--count 1024 --rounds 2) QUICKSTART=()
    SAMPLE=(--rounds 2) SMALL+=(--rounds 2 --steps 30) CONTEST+=(--rounds 1 --steps 12) KERNELS+=(--budget-s 40) SIZES=(S/2 B/2 L/2 XL/2-512)
    # tests that behave differently on a GPU; the long ones last, in case time runs out. -k: those that never use it
    TESTS=(tests/kernels/test_fp8.py tests/kernels/test_attention.py tests/kernels/test_kernels.py tests/training/test_engine.py
        tests/models/test_attention.py tests/models/test_fp8.py::test_the_kernels_compute_what_the_definitions_do
        tests/models/test_fp8.py::test_recomputed_activations_give_the_same_gradients
        tests/diffusion/test_guidance.py::test_every_wrapper_serves_every_sampler $ON_DEVICE tests/bench/test_gpu.py
        -k "not gpu_run and not by_default and not [cpu and not planted and not without and not gradient_of_the_definition")
    TRAINED=(tests/training/test_train.py::test_a_cuda_graph_replays_the_very_same_steps
        tests/training/test_train.py::test_fused_kernels_give_the_eager_definitions_losses
        tests/test_sampling.py::test_a_graph_replays_what_the_compiled_network_computes
        tests/autoencoder/test_train_vae.py::test_the_optimizers_one_pass_takes_the_channels_last_weights)
    LIMIT=(tests 90 step 170 kernels 50 attention 45 sample 60 smoke 90 extract 60 quickstart 70 engines 150 sizes 170 small-batch 120 epilogue 140 ablation 530)
fi
read -ra OTHER <<<"${LIMITS:-}"
LIMIT=("${OTHER[@]}" "${LIMIT[@]}")
LEAST=(tests 30 step 60 kernels 20 attention 15 sample 30 smoke 60 extract 40 quickstart 50 engines 60 sizes 60 small-batch 60 epilogue 50 ablation 100)

number() {  # of the part $1 in the list of pairs that follows
    local part=$1
    shift
    while (($#)); do
        [[ $1 == "$part" ]] && echo "$2" && return
        shift 2
    done
}

share() {  # sets MOST and LEAST_NOW: the seconds that part $1 may have and must have, at second $2
    MOST=$(number "$1" "${LIMIT[@]}") LEAST_NOW=$(number "$1" "${LEAST[@]}")
    ((LEAST_NOW > MOST)) && LEAST_NOW=$MOST
    ((MOST > BUDGET - $2)) && MOST=$((BUDGET - $2))
}

ALL_SIZES='total=$1 sizes=$2  # what they compile is compiled at once
shift 2
for size in $sizes; do "$@" --size $size --label size-${size//\//-} --fill-caches --budget-s $((total / 2)) & done
wait
for size in $sizes; do "$@" --size $size --label size-${size//\//-} --budget-s $((total - SECONDS)); done'

EPILOGUE='total=$1  # the products alone, then training steps with them
shift
"$@" -m bench.epilogue --out "$OUT" || exit
"$@" -m bench.step $CONTEST --label epilogue --out "$OUT" --turn-s 25 --budget-s $((total - SECONDS))'

command_of() {  # sets COMMAND, for a part that has $2 seconds; the programs stop by themselves, and write what they have
    local inner=$(($2 > 20 ? $2 - 10 : $2))
    local common=(--out "$OUT" --budget-s "$inner")
    case $1 in
        step) COMMAND=(-m bench.step "${STEP[@]}" "${common[@]}" --turn-s 25) ;;
        small-batch) COMMAND=(-m bench.step "${SMALL[@]}" "${common[@]}" --turn-s 25 --label "$1") ;;
        ablation) COMMAND=(-m bench.step --ablation "${ABLATION[@]}" "${common[@]}" --turn-s 25) ;;
        engines) COMMAND=(-m bench.step --engines "${ENGINES[@]}" "${common[@]}" --turn-s 25) ;;
        sizes)
            COMMAND=(bash -c "$ALL_SIZES" sizes "$inner" "${SIZES[*]}" "$PYTHON" -m bench.step
                --contestants fastdit-all-on --rounds 1 --steps 12 --turn-s 15 --out "$OUT")
            return ;;
        epilogue)
            COMMAND=(env OUT="$OUT" CONTEST="${CONTEST[*]}" bash -c "$EPILOGUE" epilogue "$inner" "$PYTHON")
            return ;;
        attention) COMMAND=(-m bench.kernels.attention "${common[@]}") ;;
        sample) COMMAND=(-m bench.sample "${SAMPLE[@]}" "${common[@]}") ;;
        smoke) COMMAND=(-m bench.smoke "${common[@]}") ;;
        extract) COMMAND=(-m bench.io.extract "${common[@]}" "${EXTRACT[@]}") ;;
        quickstart) COMMAND=(-m bench.quality.quickstart --out "$OUT" "${QUICKSTART[@]}" --seeds 0) ;;
        kernels) COMMAND=(-m "${KERNELS[@]}" --out "$OUT") ;;
        tests)
            has diffusers && TESTS=("${TRAINED[@]}" "${TESTS[@]}")  # they make an autoencoder
            ((inner > 60)) && [[ -z $REHEARSE ]] && inner=60
            COMMAND=(-m pytest -q -rfEs --tb=short --durations=0 -p no:cacheprovider "${TESTS[@]}")
            has xdist && [[ -z $REHEARSE ]] && COMMAND+=(-n 6)
            has pytest_timeout && [[ -z $REHEARSE ]] && COMMAND+=(--timeout 50)  # compiling for a CPU takes longer
            COMMAND=(timeout --signal=INT "$inner" "$PYTHON" "${COMMAND[@]}")  # interrupted, it reports what failed
            return ;;
    esac
    COMMAND=("$PYTHON" "${COMMAND[@]}")
}

# ---- what is missing, and the plan

has() { [[ " $MISSING " != *" $1 "* ]]; }
DEEPSPEED="deepspeed hjson pydantic pydantic_core annotated_types typing_inspection"
DATA="diffusers importlib_metadata webdataset braceexpand"
NEEDS=(tests "$DATA" kernels liger_kernel smoke "$DEEPSPEED $DATA" extract "$DATA" quickstart "$DATA sklearn"
    engines "$DEEPSPEED")
MISSING=$($PYTHON -c "
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))" \
    $DEEPSPEED $DATA sklearn liger_kernel xdist pytest_timeout) || exit 1

plan() {  # sets KEPT
    local at=$SECONDS needed absent
    KEPT=()
    echo "plan for $BUDGET s, the time of each part at most:"
    for part in "${PARTS[@]}"; do
        share "$part" "$at"
        [[ -z $(number "$part" "${LEAST[@]}") ]] && echo "unknown part $part; use some of tests step kernels attention sample smoke" \
            "extract quickstart engines sizes small-batch epilogue ablation" && exit 2
        absent=""
        for needed in $(number "$part" "${NEEDS[@]}"); do
            has "$needed" || absent+=" $needed"
        done
        [[ -n $absent ]] && echo "  WARNING: $part lacks$absent; carry them with --wheels (bench/README.md)"
        [[ $part =~ ^(smoke|extract|quickstart)$ && -n $absent ]] && echo "  $part: left out" && continue
        KEPT+=("$part")
        if ((MOST < LEAST_NOW)); then
            printf '  %-12s if %s s are left\n' "$part" "$LEAST_NOW"
        else
            printf '  %-12s from second %3d to %3d\n' "$part" "$at" $((at + MOST))
            at=$((at + MOST))
        fi
    done
}

cd "$ROOT" || exit 1
failed=()
{
    date -u
    nvidia-smi 2>/dev/null | head -15
    plan
    for part in "${KEPT[@]}"; do
        begin=$SECONDS
        share "$part" "$begin"
        most=$MOST
        ((most < LEAST_NOW)) && echo "=== $part: left out, $most s are left" && continue
        command_of "$part" "$most"
        echo "=== $part (second $begin, at most $most s): ${COMMAND[*]}"
        beside=""
        if [[ $part == tests && " ${KEPT[*]} " == *" step "* ]]; then
            timeout --kill-after=5 "$most" "$PYTHON" -m bench.step "${STEP[@]}" --fill-caches --budget-s $((most - 5)) \
                </dev/null >"$OUT/caches.log" 2>&1 &
            beside=$!
        fi
        if [[ $part == tests ]]; then
            timeout --kill-after=5 "$most" "${COMMAND[@]}" </dev/null >"$OUT/tests.log" 2>&1
        else
            timeout --kill-after=5 "$most" "${COMMAND[@]}" </dev/null 2>&1
        fi
        code=$?
        ((code)) && failed+=("$part($code)")
        [[ $part == tests ]] && { grep -aE '^(FAILED|ERROR|SKIPPED)' "$OUT/tests.log"; tail -n 1 "$OUT/tests.log"; }
        [[ -n $beside ]] && { wait "$beside"; grep -a "beside other work" "$OUT/caches.log"; }
        echo "=== $part took $((SECONDS - begin)) s"
    done
    echo "=== all took $SECONDS s; failed: ${failed[*]:-none}"
} > >(tee "$OUT/log.txt") 2>&1
TABLES=$(cd "$OUT" && ls -- {step,kernels,sample,extract,engines,size-*,small-batch,epilogue,products,ablation}.md 2>/dev/null)
(cd "$OUT" && cat $TABLES /dev/null >report.md && rm -f $TABLES)
[[ " ${KEPT[*]} " == *" attention "* ]] && cp fastdit/models/attention.json "$OUT" 2>/dev/null
[[ -d $WORK/caches/inductor ]] && tar -czf "$OUT/caches.tgz" -C "$WORK/caches" .
cd "$OUT" || exit 1
OTHERS=$(find . -mindepth 1 -maxdepth 1 ! -name results.jsonl ! -name report.md ! -name step.png ! -name log.txt \
    ! -name attention.json ! -name oracle.json ! -name caches.tgz)
[[ -n $OTHERS ]] && tar -czf files.tgz $OTHERS && rm -rf $OTHERS
exit ${#failed[@]}
