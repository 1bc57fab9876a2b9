#!/usr/bin/env python3
"""Spate beside any other OpenAI servers on one machine: the same client, the same requests, one table.

    cargo build --release -p spate
    benches/compare/serving.py                                   # Spate alone, Llama-3.1-8B's shape
    benches/compare/serving.py --model DIR_OR_FILE               # Spate alone, a real model
    benches/compare/serving.py --peer vllm=http://localhost:8001 # and a server that runs already
    benches/compare/serving.py --peer vllm=http://localhost:8001 --start vllm='vllm serve … --port 8001'

Servers that are started take turns, each with the GPU to itself, and are stopped afterwards; the time
to ready and the memory of their processes are measured. Prompts are random token ids, decoding is
greedy, answers have exactly the length that was asked for. What each run gave goes to --out as JSON,
with plots as SVG (throughput over concurrency; inter-token latency under a flood of long prompts).
Needs nothing but Python 3.10. benches/README.md says what the figures mean.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
PORT = 8123
SHAPE = ROOT / "benches/shapes/llama-3.1-8b"


@dataclasses.dataclass(frozen=True)
class Workload:
    """A closed loop: so many requests, so many at a time."""

    name: str
    prompt: int
    output: int
    concurrency: int
    requests: int
    flags: tuple = ()
    warmup: int = 64

    def arguments(self):
        sizes = ["--prompt-len", self.prompt, "--output-len", self.output]
        load = ["--concurrency", self.concurrency, "--requests", self.requests]
        # Requests that do not count: caches, clocks and allocators settle.
        return [*sizes, *load, "--warmup", min(self.concurrency, self.warmup), *self.flags]


SHARED = ("--shared-prefix", 2048, "--shared-share", 0.8)
# Several times as many requests as run at a time: at a run's beginning and end fewer run.
WORKLOADS = [
    Workload("16/128, c=1", 16, 128, 1, 12),
    Workload("512/128, c=1", 512, 128, 1, 6),
    Workload("512/128, c=8", 512, 128, 8, 64),
    Workload("512/256, c=64", 512, 256, 64, 512),
    Workload("512/256, c=256", 512, 256, 256, 1536),
    Workload("2112/128, c=64, 80 % share 2048", 2112, 128, 64, 384, SHARED),
    Workload("8192/64, c=4", 8192, 64, 4, 32),
]
UNSHARED = Workload("the same, prefix cache off", 2112, 128, 64, 256, SHARED)
CURVE = [1, 4, 16, 64, 256]
FLOOD = "16 streams (64/700), prompts of 8192 at 2/s"


class Failed(Exception):
    """What the user has to know."""


def get(url, timeout=5):
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read().decode()


class Server:
    """An OpenAI server; started and stopped here, or not."""

    def __init__(self, name, url, command=None, log=None):
        self.name, self.url, self.command, self.log = name, url, command, log
        self.process = None
        self.ready_s = None

    def __enter__(self):
        start = time.monotonic()
        if self.command is not None:
            with open(self.log, "wb") as log:
                self.process = subprocess.Popen(
                    self.command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
                )
        try:
            self.wait_until_ready(start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_ready(self, start):
        while True:
            try:
                if json.loads(get(f"{self.url}/v1/models"))["data"]:
                    break
            except (OSError, ValueError, KeyError):
                pass
            ended = self.process and self.process.poll() is not None and self.process.returncode != 0
            if ended or time.monotonic() - start > 600:
                raise Failed(f"{self.name} does not serve at {self.url}; its output is in {self.log}")
            time.sleep(0.05)
        if self.command is not None:
            self.ready_s = time.monotonic() - start

    def __exit__(self, *_):
        if self.process is None:
            return
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
            except ProcessLookupError:
                break
            try:
                self.process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                continue
            # Children of a shell may still hold the GPU's memory.
            for _ in range(100):
                if not self.members():
                    return
                time.sleep(0.1)

    def members(self):
        """Processes of its session."""
        found = []
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z" and int(fields[3]) == self.process.pid:
                found.append(int(stat.parent.name))
        return found

    def resident_mb(self):
        """Memory of all its processes, in MB; pages that they share count each time."""
        total = 0
        for pid in self.members() if self.process else []:
            try:
                status = pathlib.Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            found = re.search(r"VmRSS:\s+(\d+) kB", status)
            total += int(found[1]) * 1024 / 1e6 if found else 0
        return total or None

    def kv_usage(self):
        """Share of the KV cache that sequences use, 0 to 1, from its metrics."""
        try:
            metrics = get(f"{self.url}/metrics")
        except OSError:
            return None
        found = re.search(r"^\w+:kv_cache_usage_perc(?:\{.*\})? (\S+)$", metrics, re.MULTILINE)
        return float(found[1]) if found else None


class Bench:
    """Runs the client."""

    def __init__(self, args):
        self.binary, self.out = args.spate, args.out
        self.vocab, self.scale = args.vocab, args.scale
        self.seed = 0

    def command(self, server, arguments, json_file):
        self.seed += 1  # no two runs have a prompt in common
        common = ["--url", server.url, "--vocab", self.vocab, "--seed", self.seed, "--json", json_file]
        return [str(a) for a in [self.binary, "bench", *common, *arguments]]

    def start(self, server, name, arguments):
        file = self.out / (re.sub(r"\W+", "-", f"{server.name}-{name}") + ".json")
        command = self.command(server, arguments, file)
        log = open(file.with_suffix(".log"), "wb")
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log), file

    def finish(self, started):
        process, file = started
        if process.wait() != 0:
            raise Failed(f"a run failed: {file.with_suffix('.log').read_text().strip()}")
        result = json.loads(file.read_text())["result"]
        if result["failed"]:
            raise Failed(f"{result['failed']} requests failed, see {file}")
        return result

    def run(self, server, workload):
        if self.scale != 1:
            requests = max(workload.concurrency, round(workload.requests * self.scale))
            workload = dataclasses.replace(workload, requests=requests)
        started = self.start(server, workload.name, workload.arguments())
        peak, stop = [0.0], threading.Event()

        def watch():
            while not stop.wait(0.1):
                peak[0] = max(peak[0], server.kv_usage() or 0)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            result = self.finish(started)
        finally:
            stop.set()
            watcher.join()
        result["kv_usage"] = peak[0] or None
        return result

    def flood(self, server):
        """Long prompts that arrive at their own pace while streams run."""
        streams = Workload("flood: streams", 64, 700, 16, 32)
        arguments = streams.arguments()
        started = self.start(server, streams.name, arguments)
        time.sleep(5)  # the warm-up, and the streams' start
        prompts = ["--prompt-len", 8192, "--output-len", 16, "--rate", 2, "--requests", 16]
        begin = time.monotonic()
        flood = self.finish(self.start(server, "flood: prompts", prompts))
        return {"streams": self.finish(started), "prompts": flood, "seconds": time.monotonic() - begin}


def measure(server, bench, args):
    """All workloads against one server."""
    results = {"workloads": {}, "curve": {}}
    with server:
        results["ready_s"] = server.ready_s
        for workload in WORKLOADS:
            if args.only and not re.search(args.only, workload.name):
                continue
            results["workloads"][workload.name] = show(server, workload.name, bench.run(server, workload))
        for concurrency in CURVE if args.curve else []:
            workload = Workload(f"curve 512/128, c={concurrency}", 512, 128, concurrency, 2 * concurrency + 4, warmup=0)
            results["curve"][concurrency] = show(server, workload.name, bench.run(server, workload))
        if args.flood:
            results["flood"] = flood = bench.flood(server)
            show(server, f"{FLOOD}: the streams", flood["streams"])
            show(server, f"{FLOOD}: the prompts", flood["prompts"])
        results["resident_mb"] = server.resident_mb()
    return results


def figures(r):
    """A line of a result."""
    of = lambda name, at: r[name][at] if r.get(name) else math.nan  # noqa: E731
    line = f"{r['output_tokens_per_s']:9.1f} {r['total_tokens_per_s']:9.0f}"
    line += f" {of('ttft_ms', 'p50'):8.1f} {of('ttft_ms', 'p99'):8.1f} {of('tpot_ms', 'p50'):7.2f}"
    line += f" {of('itl_ms', 'p50'):7.2f} {of('itl_ms', 'p99'):7.1f}"
    line += f" {100 * r['cached_tokens'] / max(r['prompt_tokens'], 1):6.1f}"
    return line + (f" {100 * r['kv_usage']:5.1f}" if r.get("kv_usage") else "")


HEAD = f"{'':59} out tok/s total/s TTFT p50      p99    TPOT ITL p50     p99 cached%   KV%"


def show(server, name, result):
    print(f"{server.name:12} {name:46} {figures(result)}", flush=True)
    return result


def ratios(all_results, first):
    """Each workload of the first server over each other one's."""
    others = [name for name in all_results if name != first]
    if not others:
        return
    print(f"\n{first} / each other: output tokens/s, TTFT p50, TPOT p50, ITL p99")
    ratio = lambda a, b, key, at: a[key][at] / b[key][at] if a.get(key) and b.get(key) else math.nan  # noqa: E731
    for other in others:
        ours, theirs = all_results[first], all_results[other]
        pairs = [(n, r, theirs["workloads"].get(n)) for n, r in ours["workloads"].items()]
        for part in ("streams", "prompts"):
            if "flood" in ours and "flood" in theirs:
                pairs.append((f"flood: {part}", ours["flood"][part], theirs["flood"][part]))
        for name, a, b in pairs:
            if b is None:
                continue
            rate = a["output_tokens_per_s"] / b["output_tokens_per_s"]
            times = [ratio(a, b, k, at) for k, at in (("ttft_ms", "p50"), ("tpot_ms", "p50"), ("itl_ms", "p99"))]
            print(f"{other:12} {name:46} {rate:6.2f}x   " + "  ".join(f"{t:5.2f}x" for t in times))


# ---- plots

COLOURS = ["#0b6e99", "#c4472b", "#5b8c2a", "#8a5bb0"]


def svg(title, x_label, y_label, series, x_log=False, y_log=False):
    """A line chart. `series`: name to a list of (x, y)."""
    width, height, left, right, top, bottom = 720, 420, 70, 20, 40, 55
    points = [p for line in series.values() for p in line]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low_x, high_x = min(xs), max(xs)
    low_y, high_y = (min(ys) * 0.8, max(ys) * 1.25) if y_log else (0, max(ys) * 1.08)

    def scale(value, low, high, log):
        if log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / ((high - low) or 1)

    at_x = lambda x: left + (width - left - right) * scale(x, low_x, high_x, x_log)  # noqa: E731
    at_y = lambda y: height - bottom - (height - top - bottom) * scale(y, low_y, high_y, y_log)  # noqa: E731

    def steps(low, high, log):
        if log:
            tens = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5)]
            return [t for t in tens if low <= t <= high]
        step = 10 ** math.floor(math.log10(high / 4))
        step *= next(m for m in (1, 2, 5, 10) if high / (step * m) <= 6)
        return [i * step for i in range(int(high / step) + 1)]

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">{title}</text>',
    ]
    for y in steps(low_y, high_y, y_log):
        parts.append(f'<path d="M{left} {at_y(y):.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:,g}</text>')
    for x in sorted(set(xs)) if len(set(xs)) <= 10 else steps(max(low_x, 1e-9), high_x, x_log):
        parts.append(f'<text x="{at_x(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>')
    for i, (name, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(line) <= 12:
            parts += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in line]
        parts.append(f'<rect x="{left + 12}" y="{top + 4 + 20 * i}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 32}" y="{top + 11 + 20 * i}">{name}</text>')
    middle = (top + height - bottom) / 2
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 14}" text-anchor="middle">{x_label}</text>')
    parts.append(f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{y_label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def plots(all_results, out):
    curve = {
        name: [(c, r["output_tokens_per_s"]) for c, r in results["curve"].items()]
        for name, results in all_results.items()
        if results["curve"]
    }
    if curve:
        text = svg("Prompts of 512 tokens, answers of 128", "requests at a time", "output tokens/s", curve, x_log=True)
        (out / "throughput.svg").write_text(text)
    floods = {
        name: list(enumerate(results["flood"]["streams"]["itl_percentiles_ms"]))
        for name, results in all_results.items()
        if "flood" in results
    }
    if floods:
        floods = {name: [(p, max(ms, 0.1)) for p, ms in line] for name, line in floods.items()}
        text = svg(FLOOD, "percentile", "time between tokens of the streams, ms", floods, y_log=True)
        (out / "flood.svg").write_text(text)


def named(text):
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name, value


def servers(args):
    """In the order in which they are measured."""
    dummy = ["--load-format", "dummy", "--max-model-len", "16384"]
    model = [str(args.model)] + (dummy if args.model == SHAPE else [])
    flags = shlex.split(args.spate_flags)
    serve = [str(args.spate), "serve", *model, "--port", str(PORT), *flags]
    starts, found = dict(args.start), []
    for name, url in args.peer:
        command = starts.pop(name, None)
        found.append(Server(name, url, command and ["bash", "-c", command], args.out / f"{name}.log"))
    if starts:
        raise Failed(f"--start {next(iter(starts))}: there is no --peer of that name, which would say its address")
    own = lambda name, more: Server(name, f"http://127.0.0.1:{PORT}", serve + more, args.out / f"{name}.log")  # noqa: E731
    return own, [own("spate", []), *found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spate", type=pathlib.Path, default=ROOT / "target/release/spate", help="the binary")
    parser.add_argument("--spate-flags", default="", help="further flags of spate serve")
    parser.add_argument("--model", type=pathlib.Path, default=SHAPE, help="what spate serves")
    parser.add_argument("--vocab", type=int, default=30_000, help="token ids of prompts stay below it")
    parser.add_argument("--peer", type=named, action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--start", type=named, action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--only", metavar="REGEX", help="workloads whose name it matches")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of requests")
    parser.add_argument("--curve", action="store_true", help="also throughput over concurrency")
    parser.add_argument("--flood", action="store_true", help="also long prompts beside running streams")
    parser.add_argument("--sharing", action="store_true", help="also without the prefix cache")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target/serving", help="folder for results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # So that servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("serving.py: terminated"))
    if not args.spate.exists():
        raise Failed(f"{args.spate} is not there: cargo build --release -p spate")
    own, all_servers = servers(args)
    bench, all_results = Bench(args), {}
    print(HEAD)
    for server in all_servers:
        bench.seed = 0  # the same requests for each
        all_results[server.name] = measure(server, bench, args)
    if args.sharing:
        with own("spate-unshared", ["--enable-prefix-caching", "false"]) as server:
            all_results["spate"]["unshared"] = show(server, UNSHARED.name, bench.run(server, UNSHARED))
    for name, results in all_results.items():
        if results["ready_s"] is not None:
            print(f"{name}: ready after {results['ready_s']:.1f} s, {results['resident_mb'] or 0:.0f} MB resident")
    ratios(all_results, "spate")
    plots(all_results, args.out)
    (args.out / "results.json").write_text(json.dumps(all_results, indent=1))


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"serving.py: {error}")
    except urllib.error.URLError as error:
        sys.exit(f"serving.py: {error}")
