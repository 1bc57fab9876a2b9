#!/bin/sh
# Tests this machine with everything in this folder: the doctor, every kernel against the CPU, the whole
# executor against the CPU, a lost device, a hung kernel, the models in models/ against another engine, and a server under
# load. Needs the NVIDIA driver and nothing else; without a GPU what needs one says so and is skipped.
set -u
cd "$(dirname "$0")" || exit 1
failed=0
url=http://127.0.0.1:${PORT:-18080}

check() {
    echo
    echo "== $*"
    "$@" || { echo "FAILED: $*"; failed=1; }
}

# serve MODEL OPTION...: starts a server, measures it, stops it.
serve() {
    echo
    echo "== ./spate serve $*"
    ./spate serve --port "${PORT:-18080}" --log-level warn "$@" &
    server=$!
    until ./spate bench --url "$url" --requests 1 --output-len 1 >/dev/null 2>&1; do
        if ! kill -0 $server 2>/dev/null; then
            echo "FAILED: the server ended"
            failed=1
            return
        fi
        sleep 0.2
    done
    check ./spate bench --url "$url" --concurrency 1 --requests 8 --prompt-len 16 --output-len 128 --seed 1
    check ./spate bench --url "$url" --concurrency 32 --requests 128 --prompt-len 256 --output-len 64 --seed 2
    kill -TERM $server
    wait $server || { echo "FAILED: it did not stop well"; failed=1; }
}

check sh -c './spate doctor > doctor.txt'
cat doctor.txt
check ./kernels
check ./oracle
check ./oracle --portable
check ./steps check
check ./lost_device
check ./hung_kernel
for model in models/*.gguf; do
    [ -e "$model" ] || continue
    if [ -e "${model%.gguf}.json" ]; then
        check ./golden "$model" "${model%.gguf}.json"
    fi
    serve "$model"
done
if grep -q 'cuda:0' doctor.txt; then
    serve llama-3.1-8b --load-format dummy --max-model-len 8192
fi

echo
[ $failed -eq 0 ] && echo "all passed" || echo "something FAILED, see above"
exit $failed
