"""Rollouts by SGLang servers: what the engine adds to a server's own time, sampling ahead, syncing weights, a real small model.

    python benchmarks/rollouts.py [--case overhead|ahead|sync|smollm2] [--quick] [--json FILE]

    overhead   SGLangSampler.sample against one bare /generate of the same 32 requests, its answer parsed and dropped
    ahead      seconds of an EM iteration with rollout.ahead 1 against 0, trainer and server on one thread each
    sync       seconds of a weight sync on each path with its receipt against without, for 5 and 135 million random weights
    smollm2    SmolLM2-135M-Instruct in bfloat16: tokens a second, and how far sampler and trainer are apart

Both sides first do the same work: the same tokens with the same log-probs (overhead), as many tokens from weights as old as they
must be (ahead), weights that changed since the last sync and arrived (sync). Where they do not, the command exits with 1.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import yaml
from smollm2 import GROUP_SIZE, NO_END, SHAPE, load_smollm2, share_of_right_sums, sums
from tempo_engine.errors import Halted, UserError
from tempo_engine.mismatch import mismatch
from tempo_engine.model import Policy
from tempo_engine.packing import pack
from tempo_engine.parallel import Sharding
from tempo_engine.rollout import Prompt, Rollout, response_names
from tempo_engine.samplers.sglang import SGLangOptions, SGLangSampler
from tempo_engine.sglang.fleet import Fleet, Patience
from tempo_engine.sglang.server import Server, ServerOptions, check_can_start
from tempo_engine.weight_sync import SyncPath, WeightSync
from tempo_engine.weights import DTYPES, create_causal_lm, save_config
from tempo_kernels.bench.report import commit, device_name
from trainer import markdown, number, qwen3

PROMPT_TOKENS, NEW_TOKENS = 128, 64
# Of the log-probs of two calls with the same seeds: a server puts requests into batches as they come.
LOGPROB_LIMIT = 1e-4

Row = dict[str, Any]
Seconds = dict[str, list[float]]  # of each repeat, by side


def policy_of(config: Mapping[str, Any], dtype: str) -> Policy:
    """Random weights that never end a response."""
    model = create_causal_lm({**config, **NO_END}, dtype=torch.float32, attention="sdpa", seed=0)
    return Policy(model, sharding=Sharding(compute=DTYPES[dtype]))


def server_options(dtype: str, *, deterministic: bool = False, threads: int = 1) -> ServerOptions:
    return ServerOptions(
        dtype=dtype, max_running=32, context_length=2 * (PROMPT_TOKENS + NEW_TOKENS), deterministic=deterministic, threads=threads
    )  # fmt: skip


@contextmanager
def sampler_of(policy: Policy, server: ServerOptions) -> Iterator[SGLangSampler]:
    """On a server of its own that has the policy's weights. Responses end at their length only."""
    options = SGLangOptions(server=server, patience=Patience())
    sampler = SGLangSampler(options, stop_ids=[], decode=str, max_new_tokens=NEW_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        sampler.open(Path(folder), policy)
        try:
            sampler.load(policy)
            yield sampler
        finally:
            sampler.close()


def in_turn(
    sides: Mapping[str, Callable[[], Any]], repeats: int, *, before: Callable[[], Any] | None = None
) -> Seconds:
    """Every side again and again, A B A B: a drift of the machine's speed hits all of them. `before` is called before each."""
    seconds: Seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            if before:
                before()
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(ours: list[float], theirs: list[float]) -> Row:
    """Medians and quartiles over repeats, and the ratio of the medians."""
    low, middle, high = np.percentile([ours, theirs], (25, 50, 75), axis=1).tolist()
    return {
        "ours": middle[0], "theirs": middle[1], "ratio": middle[0] / middle[1],
        "quartiles": [[low[0], high[0]], [low[1], high[1]]], "repeats": len(ours),
    }  # fmt: skip


# --- What the engine adds to the server's time --------------------------------------------------------------------------------


def overhead(quick: bool) -> list[Row]:
    models = {"tiny": qwen3(128, 2, 320), "small": qwen3(384, 8, 16_384)}
    rows = []
    for name in ["tiny"] if quick else models:
        policy = policy_of(models[name], "float32")
        for has_seeds in (True, False) if name == "tiny" else (False,):
            with sampler_of(policy, server_options("float32", deterministic=has_seeds)) as sampler:
                rows += overhead_rows(name, sampler, 2 if quick else 20 if name == "tiny" else 5)
    return rows


def overhead_rows(model: str, sampler: SGLangSampler, repeats: int) -> list[Row]:
    """Four groups of 8, their prompts in the server's cache or not. Without seeds only the numbers of tokens can be the same."""
    assert sampler.policy is not None
    has_seeds = sampler.options.server.deterministic
    prompts = random_prompts(4, sampler.policy.vocab_size)
    server, payload = bare_payload(sampler, prompts)
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: sampler.sample(prompts, GROUP_SIZE, key="bench"),
        "theirs": lambda: post(server, "/generate", payload),
    }
    error = difference(sides["ours"](), sides["theirs"](), same_tokens=has_seeds)
    same = f"same tokens, log-probs within {error:.0e}" if has_seeds else "as many tokens"
    rows = []
    # The target is on what the engine adds; with new prompts it also spares the server work, for one of a group goes ahead.
    befores = {"cached prompts": None, "new prompts": lambda: empty_cache(server)}
    for prompts_are, before in befores.items():
        seconds = in_turn(sides, repeats, before=before)
        case = f"{model}, {prompts_are}, {'seeds' if has_seeds else 'no seeds'}"
        row: Row = {"op": "sample", "case": case, "dtype": sampler.options.server.dtype, "peer": "bare /generate"}
        row |= {"unit": "seconds", "target": None if before else 1.05}
        row |= compared(seconds["ours"], seconds["theirs"]) | {"checked": error < LOGPROB_LIMIT, "error": error}
        rows.append(row | {"note": f"server alone {4 * GROUP_SIZE * NEW_TOKENS / row['theirs']:,.0f} tokens/s; {same}"})
    return rows


def random_prompts(count: int, vocab_size: int) -> list[Prompt]:
    rng = random.Random(0)
    rows = [tuple(rng.randrange(vocab_size) for _ in range(PROMPT_TOKENS)) for _ in range(count)]
    return [Prompt(str(i), "", row) for i, row in enumerate(rows)]


def bare_payload(sampler: SGLangSampler, prompts: list[Prompt]) -> tuple[Server, bytes]:
    """The very requests of `sampler.sample(prompts, GROUP_SIZE, key="bench")` in one, and the server to send it to."""
    assert sampler._fleet is not None
    request = {
        "input_ids": [list(p.token_ids) for p in prompts for _ in range(GROUP_SIZE)],
        "sampling_params": [
            sampler._parameters(name, sampler.max_new_tokens)
            for name in response_names(prompts, GROUP_SIZE, f"{sampler.seed}/bench")
        ],
        "return_logprob": True,
    }
    return sampler._fleet.servers[0], json.dumps(request).encode()


def empty_cache(server: Server) -> None:
    """As soon as nothing of the last call is left in the server, which refuses until then."""
    for _ in range(100):
        try:
            post(server, "/flush_cache", b"{}")
            return
        except urllib.error.HTTPError:
            time.sleep(0.05)
    raise RuntimeError("the server does not empty its cache")


def post(server: Server, path: str, payload: bytes) -> Any:
    """What a script of ten lines does: send, wait for everything, parse."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(server.client.url + path, payload, headers)) as response:
        text = response.read()
    return json.loads(text) if text.startswith((b"[", b"{")) else text


def difference(rollouts: list[Rollout], answers: list[dict[str, Any]], *, same_tokens: bool) -> float:
    """Largest difference of any log-prob; infinite when tokens, or, if they need not be the same, their numbers differ."""
    ours, theirs = [r.response_ids for r in rollouts], [answer["output_ids"] for answer in answers]
    if [len(ids) for ids in ours] != [len(ids) for ids in theirs] or (same_tokens and ours != theirs):
        return float("inf")
    if not same_tokens:
        return 0.0
    logprobs = [[x[0] for x in answer["meta_info"]["output_token_logprobs"]] for answer in answers]
    return float(np.abs(np.array([r.logprobs for r in rollouts]) - np.array(logprobs)).max())


# --- Ahead of training --------------------------------------------------------------------------------------------------------

# A fresh model with a vocabulary so large that hardly any response ends early, and steps so small that none learns to. It solves
# nothing, so outcomes are coins: gradients must not be zero.
AHEAD: dict[str, Any] = {
    "method": "tempo", "seed": 0, "threads": 1, "micro_batch_tokens": 4096,
    "model": {"create": {**qwen3(256, 4, 8192), "max_position_embeddings": 128}},
    "data": {
        "labelled": {"generator": "signs", "count": 256, "terms": [4]},
        "unlabelled": {"generator": "signs", "count": 32, "terms": [4]},
    },
    "rollout": {
        "backend": "sglang", "max_prompt_tokens": 16, "max_new_tokens": NEW_TOKENS, "max_running": 64,
        "sglang": {"threads": 1, "sync": "disk"}, "mismatch": {"every": 0},
    },
    "initialisation": {"critic_warmup": 1},
    "em": {"iterations": 12, "rollouts": 32, "posterior": "random"},
    "estep": {"epochs": 1}, "mstep": {"importance": "token"},
    "evaluation": {"every": 0, "samples": 1}, "checkpoint": {"every": 0, "export": False},
}  # fmt: skip


def ahead(quick: bool) -> list[Row]:
    """Runs of both kinds in turn, each in a process of its own."""
    runs: dict[int, list[list[Row]]] = {1: [], 0: []}
    for _ in range(1 if quick else 3):
        for depth, found in runs.items():
            found.append(em_iterations(depth, 3 if quick else AHEAD["em"]["iterations"]))
    return [ahead_row(runs[1], runs[0])]


def em_iterations(depth: int, iterations: int) -> list[Row]:
    """Metrics of each EM iteration of a run with `rollout.ahead` = depth."""
    with tempfile.TemporaryDirectory() as name:
        recipe, run = Path(name) / "ahead.yaml", Path(name) / "run"
        recipe.write_text(yaml.safe_dump(AHEAD), encoding="utf-8")
        settings = [f"rollout.ahead={depth}", f"em.iterations={iterations}"]
        command = [sys.executable, "-m", "tempo_em", "train", str(recipe), "--run-dir", str(run)]
        command += [argument for setting in settings for argument in ("--set", setting)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for line in lines if (row := json.loads(line)).get("stage") == "em"]


def ahead_row(ours: list[list[Row]], theirs: list[list[Row]]) -> Row:
    """A run's figure is the mean over all its iterations, the first one, which nothing was sampled ahead for, included."""

    def means(runs: list[list[Row]], metric: str) -> list[float]:
        return [float(np.mean([row[metric] for row in run])) for run in runs]

    tokens = [float(np.mean(means(runs, "tokens/generated"))) for runs in (ours, theirs)]
    staleness = float(np.mean(means(ours, "rollout/staleness_max")))
    oldest = max(row["rollout/staleness_max"] for run in ours for row in run)
    seconds = means(theirs, "timing_s/step")
    sampling = float(np.median(means(theirs, "timing_s/rollout")))
    training = float(np.median(seconds)) - sampling
    best = max(sampling, training) / (sampling + training)
    row: Row = {"op": "em_iteration", "case": "rollout.ahead 1", "dtype": "float32", "peer": "rollout.ahead 0"}
    row |= {"unit": "seconds", "target": 1.0} | compared(means(ours, "timing_s/step"), seconds)
    is_fresh = all(row["rollout/staleness_max"] == 0 for run in theirs for row in run)
    row |= {"checked": is_fresh and oldest <= 1 and abs(tokens[0] / tokens[1] - 1) < 0.02, "tokens": tokens}
    row |= {"staleness": staleness, "sampling": sampling, "training": training, "best_ratio": best}
    return row | {
        "note": f"one after the other: sampling {sampling:.2f} s, training {training:.2f} s, so {best:.2f} at best; "
        f"staleness {staleness:.2f} in the mean, {oldest:.0f} at most"
    }


# --- Weight sync --------------------------------------------------------------------------------------------------------------

Verify = Literal["checksum", "off"]


def sync(quick: bool) -> list[Row]:
    models = {"5M": qwen3(256, 4, 8192), "135M": SHAPE}
    rows = []
    for name in ["5M"] if quick else models:
        policy = policy_of(models[name], "bfloat16")
        with tempfile.TemporaryDirectory() as folder, fleet_of(policy, Path(folder)) as fleet:
            rows += sync_rows(name, policy, fleet, Path(folder), 2 if quick else 9)
    return rows


@contextmanager
def fleet_of(policy: Policy, folder: Path) -> Iterator[Fleet]:
    save_config(policy.model, folder / "config")
    fleet = Fleet(server_options("bfloat16"), Patience(), folder=folder)
    try:
        fleet.start(folder / "config")
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.close()


def sync_rows(model: str, policy: Policy, fleet: Fleet, folder: Path, repeats: int) -> list[Row]:
    """Each path with its receipt and without, in turn. The first round, in which a process group is made, does not count."""
    each = itertools.product(get_args(SyncPath), get_args(Verify))
    syncs = {(p, verify): WeightSync(fleet, p, folder / f"{p}-{verify}", verify=verify) for p, verify in each}
    found: dict[tuple[SyncPath, Verify], list[dict[str, float]]] = {which: [] for which in syncs}
    for _ in range(repeats + 1):
        for which, one in syncs.items():
            change(policy)
            one.push(policy)
            found[which].append(dict(one.metrics))
    rows = []
    for path in get_args(SyncPath):
        ours, theirs = ([m["seconds"] for m in found[path, verify][1:]] for verify in get_args(Verify))
        row: Row = {"op": "weight_sync", "case": f"{model}, {path}", "dtype": "bfloat16", "peer": "without receipt"}
        row |= {"unit": "seconds", "target": None} | compared(ours, theirs)
        # A receipt that the server's tensors cannot have turns into a probe.
        was_checked = syncs[path, "checksum"].verify == "checksum"
        repeated = sum(m["repeats"] for runs in found.values() for m in runs)
        num_bytes, share = found[path, "checksum"][0]["bytes"], 1 - 1 / row["ratio"]
        row |= {"checked": was_checked and not repeated, "bytes": num_bytes, "receipt_share": share}
        rows.append(
            row
            | {
                "note": f"{num_bytes / 1e6:,.1f} MB, {num_bytes / row['ours'] / 1e6:,.0f} MB/s; receipt {share:.0%} of it"
            }
        )
    return rows


@torch.no_grad()
def change(policy: Policy) -> None:
    """Every weight gets the other sign, so that a server that kept the old ones would be noticed."""
    for weight in policy.model.parameters():
        weight.neg_()
    policy.version += 1


# --- SmolLM2 ------------------------------------------------------------------------------------------------------------------


def smollm2(quick: bool) -> list[Row]:
    policy, tokenizer = load_smollm2()
    rows = []
    for threads in [1] if quick else sorted({1, os.cpu_count() or 1}):
        with sampler_of(policy, server_options("bfloat16", threads=threads)) as sampler:
            correct = share_of_right_sums(sampler, tokenizer, 4 if quick else 24)
            for batch in (8, 32):
                prompts = sums(tokenizer, batch // GROUP_SIZE)[0]
                rows.append(smollm2_row(sampler, prompts, 1 if quick else 7) | {"correct": correct})
                rows[-1]["note"] += f"; {correct:.0%} of sums right"
                rows[-1]["checked"] &= correct > 0
    return rows


def smollm2_row(sampler: SGLangSampler, prompts: list[Prompt], repeats: int) -> Row:
    """Tokens a second of groups of 8, and the mismatch of the first ones with the trainer in the same dtype."""
    policy, batch = sampler.policy, GROUP_SIZE * len(prompts)
    assert policy is not None
    packed = pack(sampler.sample(prompts, GROUP_SIZE, key="bench"), policy.device)
    logprob_T = policy.token_logprobs(packed, 4096)
    apart = mismatch(packed.sampler_logprob_T, logprob_T, packed.cu_responses_S1, band=0.1)
    seconds = in_turn({"ours": lambda: sampler.sample(prompts, GROUP_SIZE, key="bench")}, repeats)["ours"]
    low, middle, high = np.percentile(batch * NEW_TOKENS / np.array(seconds), (25, 50, 75)).tolist()
    threads, kl = sampler.options.server.threads, apart["rollout/mismatch_kl"]
    return {
        "op": "sample", "case": f"SmolLM2-135M, batch {batch}, threads {threads}", "dtype": "bfloat16", "peer": None,
        "unit": "tokens per second", "ours": middle, "quartiles": [[low, high]], "repeats": repeats, "target": None,
        "checked": kl < 0.05, "mismatch": apart,
        "note": f"log-probs {apart['rollout/logprob_diff_mean']:.3f} apart in the mean, {apart['rollout/logprob_diff_max']:.2f} "
        f"at most, KL {kl:.1e}, effective sample size of sequences {apart['rollout/ess_sequence']:.3f}",
    }  # fmt: skip


# --- What a person reads ------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Medians with quartiles. Of seconds, and so of ratios, less is better."""
    head = ["case", "dtype", "unit", "ours", "peer", "peer's", "ratio", "target", "checked", "note"]
    cells = []
    for row in rows:
        figures = [with_quartiles(row, "ours", 0), row["peer"] or "", with_quartiles(row, "theirs", 1)]
        ratio = [number(row.get("ratio"), ".3f"), number(row["target"], ".2f"), "yes" if row["checked"] else "NO"]
        cells.append([row["case"], row["dtype"], row["unit"], *figures, *ratio, row["note"]])
    return markdown(head, cells)


def with_quartiles(row: Row, side: str, place: int) -> str:
    if side not in row:
        return ""
    low, high = row["quartiles"][place]
    return f"{row[side]:.4g} ({low:.4g} to {high:.4g})"


CASES: dict[str, Callable[[bool], list[Row]]] = {"overhead": overhead, "ahead": ahead, "sync": sync, "smollm2": smollm2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one case; all when not given")
    parser.add_argument("--quick", action="store_true", help="whether the script works: figures mean nothing")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        check_can_start(1, None)
        for case in [args.case] if args.case else CASES:
            found = CASES[case](args.quick)
            print(table(found), end="\n\n", flush=True)
            rows += found
    except (UserError, Halted) as error:
        print(f"benchmarks/rollouts.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else error.code
    if args.json:
        args.json.write_text(json.dumps({"device": device_name(), "commit": commit(), "rows": rows}, indent=1) + "\n")
    return 0 if all(row["checked"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
