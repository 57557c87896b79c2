#!/usr/bin/env bash
# Everything that needs a GPU, in commands under 9 minutes, each writing into one folder; no network, no installation.
#
#   bash bench/gpu.sh OUT [--wheels DIR] [--rehearse] [part ...]
#
# Parts: attention step tests kernels sample, the default, at most 535 s together; ablation (530 s); small-batch (the
# step at batch 32, 230 s) and engines (200 s). bench/README.md has a plan of three calls.
# OUT gets results.jsonl, report.md, step.png, a folder of raw results per step part, log.txt, traces.tar and
# attention.json. --wheels: packages that the machine lacks, unpacked beside the checkout (pip download --no-deps -d DIR
# NAME==VERSION on a machine with a network). --rehearse: tiny sizes, on the CPU if there is no GPU. Each part has its
# own time limit: one that hangs or fails does not take time from the others. COMMIT=... names the commit of a checkout
# without .git.
set -uo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
OUT=${1:?usage: bench/gpu.sh OUT [--wheels DIR] [--rehearse] [part ...]}
shift
WHEELS="" REHEARSE="" PARTS=()
while (($#)); do
    case $1 in
        --wheels) WHEELS=$2; shift ;;
        --rehearse) REHEARSE=1 ;;
        *) PARTS+=("$1") ;;
    esac
    shift
done
((${#PARTS[@]})) || PARTS=(attention step tests kernels sample)
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TRITON_CACHE_DIR=$WORK/triton PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore

# fastdit and fastdit.kernels from the checkout, mapped as in setup.py, from any working directory
mkdir "$WORK/site"
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

has() { "$PYTHON" -c "import importlib.util as i, sys; sys.exit(i.find_spec('$1') is None)"; }

ON_DEVICE=tests/data/test_shards.py::test_on_a_device_the_batches_are_the_same_and_closing_ends_them_too
SMALL=(--batch 32 --contestants fastdit fastdit-all-on strong --profile)
KERNELS=(bench.kernels)
if [[ -n $REHEARSE ]]; then
    LIMIT=(attention 30 step 300 tests 120 kernels 90 sample 90 ablation 300 small-batch 200 engines 200)
    TINY=(--size tiny --rounds 1 --steps 2)
    STEP=("${TINY[@]}" --profile) ABLATION=("${TINY[@]}") ENGINES=("${TINY[@]}") SMALL+=("${TINY[@]}" --batch 2)
    SAMPLE=(--size tiny --share 0.05 --rounds 1 --batch 2)
    $PYTHON -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || KERNELS=(bench.static.kernels)
    KERNELS+=(--ops adaln)
    TESTS=(tests/models/test_dit.py tests/bench/test_gpu.py $ON_DEVICE)
else
    LIMIT=(attention 60 step 280 tests 65 kernels 60 sample 70 ablation 530 small-batch 230 engines 200)
    STEP=(--rounds 2 --steps 10 --profile) ABLATION=(--rounds 1 --steps 8) ENGINES=(--rounds 2 --steps 10)
    SAMPLE=(--rounds 2) SMALL+=(--rounds 3 --steps 30) KERNELS+=(--budget-s 42)
    # tests that behave differently on a GPU; quick ones first, in case time runs out
    TESTS=(-m "not slow" $ON_DEVICE
        tests/bench/test_gpu.py::test_a_network_built_on_the_gpu_has_the_same_tables
        tests/bench/test_gpu.py::test_a_graphed_step_is_the_step_that_it_captured
        tests/bench/test_gpu.py::test_a_graphed_evaluation_is_the_networks)
    # tests that train or sample in tests/helpers/runs.py's world, whose autoencoder is diffusers'
    has diffusers && TESTS+=(tests/training/test_train.py::test_a_cuda_graph_replays_the_very_same_steps
        tests/training/test_train.py::test_fused_kernels_give_the_eager_definitions_losses
        tests/test_sampling.py::test_a_graph_replays_what_the_compiled_network_computes)
    TESTS+=(tests/models/test_attention.py tests/models/test_dit.py tests/diffusion/test_guidance.py tests/kernels/test_kernels.py
        tests/bench/test_gpu.py::test_predicted_memory_is_within_a_tenth_of_the_peak)
fi

read -ra OTHER <<<"${LIMITS:-}"  # LIMITS="step 300 sample 60" in the environment: other time limits, in seconds
LIMIT=("${OTHER[@]}" "${LIMIT[@]}")

COMMON=(--truth "$WORK/truth.json" --out "$OUT")

limit() {
    for ((i = 0; i < ${#LIMIT[@]}; i += 2)); do
        [[ ${LIMIT[i]} == "$1" ]] && echo "${LIMIT[i + 1]}" && return
    done
}

command_of() {  # sets COMMAND
    local inner=$(($(limit "$1") - 15))  # the programs stop by themselves and write what they have
    case $1 in  # attention comes first: `model.attention=auto` then reads its table
        attention) COMMAND=("$PYTHON" -m bench.kernels.attention --out "$OUT" --budget-s "$inner") ;;
        step) COMMAND=("$PYTHON" -m bench.step "${STEP[@]}" "${COMMON[@]}" --budget-s "$inner") ;;
        small-batch) COMMAND=("$PYTHON" -m bench.step "${SMALL[@]}" "${COMMON[@]}" --label "$1" --budget-s "$inner") ;;
        ablation) COMMAND=("$PYTHON" -m bench.step --ablation "${ABLATION[@]}" "${COMMON[@]}" --budget-s "$inner") ;;
        engines) COMMAND=("$PYTHON" -m bench.step --engines "${ENGINES[@]}" "${COMMON[@]}" --budget-s "$inner") ;;
        sample) COMMAND=("$PYTHON" -m bench.sample "${SAMPLE[@]}" --out "$OUT" --budget-s "$inner") ;;
        kernels) COMMAND=("$PYTHON" -m "${KERNELS[@]}" --out "$OUT") ;;
        tests)  # interrupted, pytest reports what failed
            COMMAND=(timeout --signal=INT "$inner" "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider "${TESTS[@]}") ;;
        *) echo "unknown part $1"; exit 2 ;;
    esac
}

cd "$ROOT" || exit 1
failed=()
{
    date -u
    nvidia-smi 2>/dev/null | head -15
    for part in "${PARTS[@]}"; do
        command_of "$part"
        echo "=== $part (at most $(limit "$part") s): ${COMMAND[*]}"
        start=$SECONDS
        timeout --kill-after=5 "$(limit "$part")" "${COMMAND[@]}" </dev/null 2>&1 || failed+=("$part($?)")
        echo "=== $part took $((SECONDS - start)) s"
    done
    echo "=== all took $SECONDS s; failed: ${failed[*]:-none}"
} > >(tee "$OUT/log.txt") 2>&1
cat "$OUT"/{step,small-batch,ablation,engines,sample}.md >"$OUT/report.md" 2>/dev/null
rm -f "$OUT"/{step,small-batch,ablation,engines,sample}.md
[[ " ${PARTS[*]} " == *" attention "* ]] && cp fastdit/models/attention.json "$OUT" 2>/dev/null
(cd "$OUT" && tar -cf traces.tar */trace-*.json.gz 2>/dev/null && rm -f */trace-*.json.gz || rm -f traces.tar)
exit ${#failed[@]}
