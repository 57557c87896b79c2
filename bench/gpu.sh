#!/usr/bin/env bash
# Every measurement that needs a GPU, in one command under 9 minutes, into one folder; no network, nothing installed.
#
#   bash bench/gpu.sh OUT [--wheels DIR] [--rehearse] [part ...]      parts: attention step tests kernels sample ablation
#
# OUT gets results.jsonl, report.md, step.png, ablation.png, log.txt, traces.tar, attention.json. --wheels: packages that
# the machine lacks, unpacked beside the checkout (pip download --no-deps -d DIR NAME==VERSION where there is a network).
# --rehearse: tiny sizes, on the CPU where there is no GPU. Each part has its own time limit: one that hangs or fails
# leaves the others their time. COMMIT=... names the commit where the checkout came without .git.
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
((${#PARTS[@]})) || PARTS=(attention step tests kernels sample ablation)
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TRITON_CACHE_DIR=$WORK/triton PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore

# fastdit and fastdit.kernels from the checkout, as setup.py maps them, wherever Python is started from
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

if [[ -n $REHEARSE ]]; then
    LIMIT=(attention 30 step 300 tests 120 kernels 90 sample 90 ablation 300)
    STEP=(--size tiny --fresh --turns 1 --steps 2 --profile) ABLATION=(--size tiny --fresh --turns 1 --steps 2)
    SAMPLE=(--size tiny --share 0.05 --turns 1 --batch 2)
    $PYTHON -c "import sys, torch; sys.exit(not torch.cuda.is_available())" && KERNELS=(--ops adaln) || KERNELS=(--static --ops adaln)
    TESTS=(tests/test_dit.py)
else
    LIMIT=(attention 25 step 250 tests 60 kernels 60 sample 80 ablation 55)
    STEP=(--turns 2 --steps 10 --profile) ABLATION=(--turns 1 --steps 8) SAMPLE=(--turns 2)
    KERNELS=(--budget-s 42)
    TESTS=(-m "not slow" tests/test_kernels.py tests/test_attention.py tests/test_dit.py tests/test_diffusion_guidance.py)
fi

read -ra OTHER <<<"${LIMITS:-}"  # LIMITS="step 300 sample 60" in the environment: other time limits, in seconds
LIMIT=("${OTHER[@]}" "${LIMIT[@]}")

COMMON=(--truth "$WORK/truth.pt" --out "$OUT")

limit() {
    for ((i = 0; i < ${#LIMIT[@]}; i += 2)); do
        [[ ${LIMIT[i]} == "$1" ]] && echo "${LIMIT[i + 1]}" && return
    done
}

command_of() {  # fills COMMAND
    local inner=$(($(limit "$1") - 15))  # the programs stop by themselves and write what they have
    case $1 in
        attention) COMMAND=("$PYTHON" bench/attention.py --out "$OUT" --budget-s "$inner") ;;  # first: `model.attention=auto` then reads its table
        step) COMMAND=("$PYTHON" bench/step.py "${STEP[@]}" "${COMMON[@]}" --budget-s "$inner") ;;
        ablation) COMMAND=("$PYTHON" bench/step.py --ablation "${ABLATION[@]}" "${COMMON[@]}" --budget-s "$inner") ;;
        sample) COMMAND=("$PYTHON" bench/sample.py "${SAMPLE[@]}" --out "$OUT" --budget-s "$inner") ;;
        kernels) COMMAND=("$PYTHON" bench/kernels.py "${KERNELS[@]}" --out "$OUT/kernels") ;;
        tests) COMMAND=("$PYTHON" -m pytest -q -x -p no:cacheprovider "${TESTS[@]}") ;;
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
cat "$OUT"/kernels/*.jsonl >>"$OUT/results.jsonl" 2>/dev/null && rm -r "$OUT/kernels"
cat "$OUT"/{step,ablation,sample}.md >"$OUT/report.md" 2>/dev/null
rm -f "$OUT"/{step,ablation,sample}.md
[[ " ${PARTS[*]} " == *" attention "* ]] && cp fastdit/models/attention.json "$OUT" 2>/dev/null
(cd "$OUT" && tar -cf traces.tar trace-*.json.gz 2>/dev/null && rm -f trace-*.json.gz || rm -f traces.tar)
exit ${#failed[@]}
