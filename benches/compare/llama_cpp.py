#!/usr/bin/env python3
"""Spate and llama.cpp side by side on one machine's CPU: same file, threads, prompt and output.

    pip install llama-cpp-python==0.3.36        # builds llama.cpp for this machine
    cargo bench -p spate-cpu --bench streams --no-run
    benches/compare/llama_cpp.py MODEL.gguf [--threads 2] [--rounds 3]

The two take turns, each time in a new process; what is printed are medians over all runs. Memory is
the peak resident set of the process; for llama.cpp what Python took before it loaded the library is
subtracted.

On a CPU with AMX a plain build of llama.cpp is not its best. GCC 12 builds code that crashes at
`ldtilecfg`: the script then turns llama.cpp's "extra buffer types" (AMX and repacked weights) off, and
says so. Clang up to 16 leaves AMX out: it names the macros that llama.cpp asks for differently. What
works, with the other instruction sets of the CPU switched on by hand:

    export CC=clang CXX=clang++ CFLAGS="-D__AMX_TILE__ -D__AMX_INT8__ -D__AMX_BF16__"
    export CXXFLAGS="$CFLAGS"
    export CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON \\
        -DGGML_AVX512_BF16=ON -DGGML_AVX_VNNI=ON -DGGML_AMX_TILE=ON -DGGML_AMX_INT8=ON -DGGML_AMX_BF16=ON"
    pip install llama-cpp-python==0.3.36
"""

import argparse
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = 3


def prompt(length):
    """The same tokens as crates/cpu/benches/streams.rs has."""
    return [(i * 97 + 5) % 40_000 for i in range(length)]


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def llama_cpp(args):
    """Runs in its own process; prints the same line of JSON as the `streams` benchmark."""
    before = peak_mb()
    sys.path.pop(0)  # this script's folder: the script has the library's name
    import llama_cpp

    llama_cpp.llama_backend_init()
    start = time.perf_counter()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = not args.plain_buffers
    model = llama_cpp.llama_model_load_from_file(args.model.encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = args.prompt + args.output
    params.n_batch = params.n_ubatch = args.prompt
    params.n_threads = params.n_threads_batch = args.threads
    context = llama_cpp.llama_init_from_model(model, params)
    load = time.perf_counter() - start
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def decode(tokens):
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(context, batch) != 0:
            sys.exit("llama_decode failed")
        return llama_cpp.llama_get_logits_ith(context, -1)

    sampler = llama_cpp.llama_sampler_init_greedy()
    system = llama_cpp.llama_print_system_info().decode()
    features = re.findall(r"(\w+) = 1", system)
    result = {"simd": " ".join(features), "prompt_tok_s": [], "decode_tok_s": [], "load_s": load}
    for _ in range(RUNS):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        decode(prompt(args.prompt))
        token = llama_cpp.llama_sampler_sample(sampler, context, -1)
        result["prompt_tok_s"].append(args.prompt / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(args.output - 1):
            decode([token])
            token = llama_cpp.llama_sampler_sample(sampler, context, -1)
        result["decode_tok_s"].append((args.output - 1) / (time.perf_counter() - start))
    assert 0 <= token < vocab
    result["peak_mb"] = peak_mb() - before
    print(json.dumps(result))


def streams_binary():
    """The benchmark that cargo built last."""
    built = subprocess.run(
        ["cargo", "bench", "-p", "spate-cpu", "--bench", "streams", "--no-run", "--message-format=json"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    messages = [json.loads(line) for line in built.splitlines()]
    return next(m["executable"] for m in messages if m.get("target", {}).get("name") == "streams")


def spate(args, binary, streams=1):
    command = [binary, args.model, "--threads", str(args.threads), "--runs", str(RUNS)]
    command += ["--prompt", str(args.prompt), "--output", str(args.output), "--streams", str(streams)]
    return json.loads(subprocess.check_output(command))


def other(args):
    """llama.cpp with its defaults; where these crash, without AMX and repacked weights from then on."""
    command = [sys.executable, __file__, args.model, "--threads", str(args.threads), "--llama-cpp"]
    command += ["--prompt", str(args.prompt), "--output", str(args.output)]
    if not args.plain_buffers:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if run.returncode == 0:
            return json.loads(run.stdout)
        print(f"llama.cpp fails with its defaults (status {run.returncode}): measured with "
              "use_extra_bufts = False, that is without AMX and repacked weights")
        args.plain_buffers = True
    return json.loads(subprocess.check_output([*command, "--plain-buffers"], stderr=subprocess.DEVNULL))


def medians(results):
    rates = {key: [r for result in results for r in result[key]] for key in ("prompt_tok_s", "decode_tok_s")}
    rates = {key: statistics.median(values) for key, values in rates.items()}
    rates |= {key: statistics.median(r[key] for r in results) for key in ("load_s", "peak_mb")}
    return rates | {"simd": results[0]["simd"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--binary", help="the `streams` benchmark, if cargo shall not be asked for it")
    parser.add_argument("--plain-buffers", action="store_true", help="llama.cpp without AMX and repacked weights")
    parser.add_argument("--llama-cpp", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.llama_cpp:
        return llama_cpp(args)

    binary = args.binary or streams_binary()
    ours, theirs, eight = [], [], []
    for _ in range(args.rounds):
        ours.append(spate(args, binary))
        theirs.append(other(args))
        eight.append(spate(args, binary, streams=8))
    ours, theirs, eight = medians(ours), medians(theirs), medians(eight)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{pathlib.Path(args.model).name}: prompt {args.prompt}, output {args.output}, "
          f"{args.threads} threads, load averages {load}")
    print(f"Spate: {ours['simd']}; llama.cpp: {theirs['simd']}")
    for key, name, unit in [
        ("prompt_tok_s", "prompt", "tokens/s"),
        ("decode_tok_s", "decode, one stream", "tokens/s"),
        ("peak_mb", "peak memory", "MB"),
        ("load_s", "load", "s"),
    ]:
        a, b = ours[key], theirs[key]
        print(f"{name:20} Spate {a:8.2f} {unit:9} llama.cpp {b:8.2f}   {a / b:5.2f}x")
    rate, one = eight["decode_tok_s"], ours["decode_tok_s"]
    print(f"{'decode, 8 streams':20} Spate {rate:8.2f} tokens/s  {rate / one:.2f}x one stream")


if __name__ == "__main__":
    main()
