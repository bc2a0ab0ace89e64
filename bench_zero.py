"""The part of bench.py that starts several ranks: ZeRO beside PyTorch's DistributedDataParallel (DDP) and FSDP2.

    python bench.py zero --out bench_zero.json          # all tables, about ten minutes on two cores
    python bench.py zero --only fit                     # one of: time, memory, step, fit

Ranks are processes on this machine that talk through gloo. Times: all peers live in the same processes and take turns.
Memory: every figure from fresh processes, with the two MALLOC_ variables that make malloc give back what was freed.
"""
from __future__ import annotations

import datetime
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist
import torch.nn as nn

import zero_tools
from bench import Table, memory_now, milliseconds, ratio
from common import UserError
from model import GPT, GPTConfig, initialise
from zero import Zero

FRUGAL_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LR, CLIP = 1e-4, 1.0


def gpt(layers: int, width: int = 512) -> GPT:
    """8 layers of width 512: 29.1 M parameters."""
    return GPT(GPTConfig(vocab_size=8192, n_layer=layers, n_head=8, n_embd=width, max_seq_len=256, tie_embeddings=True))


def batch(rank: int, B: int, T: int) -> torch.Tensor:
    return torch.randint(0, 8192, (B, T + 1), generator=torch.Generator().manual_seed(rank))  # (B, T + 1)


# ---- ranks ----------------------------------------------------------------------------------------------------------

def on_ranks(world: int, function, *args, environment: dict | None = None) -> list:
    """[function(*args) of each rank], in fresh processes joined by gloo; None for a rank that died."""
    os.environ.update(environment or {})  # malloc reads its variables when a process starts
    with tempfile.TemporaryDirectory() as folder, \
            ProcessPoolExecutor(world, multiprocessing.get_context("spawn")) as pool:
        answers = [pool.submit(_rank, r, world, folder, function, args) for r in range(world)]
        found = [None if answer.exception() else answer.result() for answer in answers]
    for key in environment or {}:
        del os.environ[key]
    return found


def _rank(rank: int, world: int, folder: str, function, args):
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    return function(*args)


# ---- the peers ------------------------------------------------------------------------------------------------------

def adamw(model: nn.Module) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=LR,
                             betas=(0.9, 0.95), fused=True)


def training_step(peer: str, layers: int, ids: torch.Tensor):
    """A function that makes one update and returns its loss. peer: ddp, fsdp2, plain, or stage 0..3 with options."""
    model, count = gpt(layers), ids[:, 1:].numel()
    if peer.startswith("stage"):
        stage, _, options = peer[6:].partition(" ")
        z = Zero(model, units=model.units(), stage=int(stage), lr=LR, weight_decay=0.1, overlap=options == "overlap")

        def step() -> float:
            loss = -model(ids[:, :-1], ids[:, 1:]).sum() / count
            z.backward(loss / z.comm.world)
            z.step(LR, CLIP)
            return loss.item()
        step.zero = z
        return step

    run = model
    if peer == "ddp":
        run = nn.parallel.DistributedDataParallel(model)
    elif peer == "fsdp2":
        from torch.distributed.fsdp import fully_shard
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = adamw(model)

    def step() -> float:
        loss = -run(ids[:, :-1], ids[:, 1:]).sum() / count
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


# ---- time -----------------------------------------------------------------------------------------------------------

def times(peers: list[str], layers: int, B: int, T: int, repeats: int) -> dict:
    """Seconds per step and first loss of every peer, in turns. A barrier before each, so that none pays for another."""
    ids = batch(dist.get_rank(), B, T)
    steps = {peer: training_step(peer, layers, ids) for peer in peers}
    losses, seconds = {}, {peer: [] for peer in peers}
    for turn in range(repeats + 1):
        for peer, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            loss = step()
            if turn:
                seconds[peer].append(time.perf_counter() - start)
            else:
                losses[peer] = loss
    return {"losses": losses, "seconds": seconds}


def time_table(world: int, repeats: int) -> Table:
    B, T = 2, 128
    peers = ["ddp", "fsdp2", *(f"stage {stage}" for stage in range(4)), "stage 3 overlap"]
    found = on_ranks(world, times, peers, 8, B, T, repeats)[0]
    seconds, losses = found["seconds"], found["losses"]
    table = Table(f"time of a step, 29.1 M parameters, {world} ranks, {B} x {T} tokens per rank (ours / peer), "
                  f"load average {os.getloadavg()[0]:.1f}")
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    for stage in range(4):
        peer, bound = ("ddp", 1.2) if stage < 3 else ("fsdp2", 1.0)
        ours = seconds[f"stage {stage}"]
        table.add(f"stage {stage} / {peer}", *ratio(ours, seconds[peer]), at_least=bound,
                  **milliseconds({"ours": ours, "peer": seconds[peer]}))
    table.add("stage 3, overlap / not", *ratio(seconds["stage 3 overlap"], seconds["stage 3"]))
    table.add("fsdp2 / ddp", *ratio(seconds["fsdp2"], seconds["ddp"]))
    return table


# ---- memory and the wire --------------------------------------------------------------------------------------------

def peak_bytes(peer: str, layers: int) -> dict:
    """The peak resident memory of three steps after two of warm-up, and what the counters and formulas say."""
    step = training_step(peer, layers, batch(dist.get_rank(), 1, 4))
    for _ in range(2):
        step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    dist.barrier()
    wire = loopback_bytes()
    for _ in range(3):
        step()
    dist.barrier()
    answer = {"peak": memory_now("VmHWM"), "wire": (loopback_bytes() - wire) / 3 / dist.get_world_size()}
    if hasattr(step, "zero"):
        z = step.zero
        answer |= {"held": sum(zero_tools.held(z).values()), "formula": sum(zero_tools.held_by_formula(z).values()),
                   "sent": sum(z.comm.sent.values()) / 5, "sent_formula": sum(zero_tools.sent_by_formula(z).values())}
    return answer


def loopback_bytes() -> int:
    with open("/proc/net/dev") as file:
        return next(int(line.split()[9]) for line in file if line.strip().startswith("lo:"))


def memory_tables(world: int) -> list[Table]:
    """Slopes over two depths, in units of 4 bytes per parameter: what does not grow with the model drops out."""
    N, low, high = world, 4, 12
    psi = {layers: gpt(layers).parameter_count() for layers in (low, high)}
    unit = 4 * (psi[high] - psi[low])
    held = {"ddp": 4.0, "fsdp2": 4 / N, "stage 0": 4.0, "stage 1": 2 + 2 / N, "stage 2": 1 + 3 / N, "stage 3": 4 / N}
    f = (N - 1) / N
    sent = {"ddp": 2 * f, "fsdp2": 3 * f, "stage 0": 2 * f, "stage 1": 2 * f, "stage 2": 2 * f, "stage 3": 3 * f}
    memory = Table(f"memory per rank, {N} ranks, float32: growth in units of 4 bytes per parameter")
    wire = Table(f"bytes on the wire per step and rank, {N} ranks: growth in units of 4 bytes per parameter")
    for peer in held:
        found = {layers: on_ranks(N, peak_bytes, peer, layers, environment=FRUGAL_MALLOC)[0] for layers in (low, high)}
        slope = (found[high]["peak"] - found[low]["peak"]) / unit
        detail = {"formula": held[peer], "peak_MB": found[high]["peak"] / 1e6}
        if "held" in found[high]:
            assert [found[high][k] for k in ("held", "sent")] == [found[high][k] for k in ("formula", "sent_formula")]
            detail["counted"] = (found[high]["held"] - found[low]["held"]) / unit
        memory.add(peer, slope, at_least=f"{held[peer]:.2f} + 3 %", **detail)
        detail = {"formula": sent[peer]}
        if "sent" in found[high]:
            detail["counted"] = (found[high]["sent"] - found[low]["sent"]) / unit
        wire.add(peer, (found[high]["wire"] - found[low]["wire"]) / unit, at_least=f"{sent[peer]:.2f} + 3 %", **detail)
    return [memory, wire]


# ---- the optimizer step ---------------------------------------------------------------------------------------------

def step_table(repeats: int) -> Table:
    """One process. z.step reduces nothing here: norm, guard, clipping, AdamW, publish."""
    table = Table("z.step alone, 29.1 M parameters, one process (time / bare fused AdamW on one tensor of that size)")
    model, ids = gpt(8), batch(0, 1, 8)
    p = nn.Parameter(torch.randn(model.parameter_count()))
    p.grad = torch.randn_like(p) * 1e-3
    bare = torch.optim.AdamW([p], lr=LR, betas=(0.9, 0.95), fused=True)
    z = Zero(model, units=model.units(), stage=0, lr=LR, weight_decay=0.1)
    seconds = {"bare": [], "z.step": []}
    for turn in range(3 * repeats + 1):
        z.backward(-model(ids[:, :-1], ids[:, 1:]).sum())
        for name, function in (("bare", bare.step), ("z.step", lambda: z.step(LR, CLIP))):
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    table.add("z.step, clipped", *ratio(seconds["z.step"], seconds["bare"]), at_least=1.25, **milliseconds(seconds))
    return table


# ---- does not fit ---------------------------------------------------------------------------------------------------

def under_a_cap(stage: int, offload: list[str], layers: int, cap: int) -> dict:
    """Build and train 3 steps with at most `cap` more bytes of private memory than PyTorch itself (RLIMIT_DATA)."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory_now("VmData") + cap, resource.RLIM_INFINITY))
    ids = batch(dist.get_rank(), 1, 16)
    try:
        with torch.device("meta"):
            model = gpt(layers)
        z = Zero(model, units=model.units(), stage=stage, offload=tuple(offload), lr=LR, device="cpu",
                 init=lambda module, prefix: initialise(module, 0, prefix))
        norms = []
        for _ in range(3):
            z.backward(-model(ids[:, :-1], ids[:, 1:]).sum() / 32)
            norms.append(z.step(LR, CLIP).norm)
    except (RuntimeError, UserError, MemoryError) as error:
        return {"trained": False, "error": str(error).splitlines()[0]}
    return {"trained": True, "norms": norms, "peak": memory_now("VmHWM")}


def fit_table(world: int = 2) -> Table:
    small, large = 8, 16
    psi = {layers: gpt(layers).parameter_count() for layers in (small, large)}
    cap = int(3.4 * 4 * psi[small])
    table = Table(f"does it fit? {world} ranks, each capped at {cap / 2**20:.0f} MiB of private memory (1: it trained)")
    for layers, stage, offload, expected in ((small, 0, [], False), (small, 3, [], True), (large, 3, [], False),
                                             (large, 3, ["optim", "params", "disk"], True)):
        found = on_ranks(world, under_a_cap, stage, offload, layers, cap, environment=FRUGAL_MALLOC)
        trained = all(answer and answer["trained"] for answer in found)
        note = next((answer["error"] for answer in found if answer and not answer["trained"]), "")
        what = f"stage {stage}, {psi[layers] / 1e6:.1f} M parameters, offload {','.join(offload) or 'nothing'}"
        table.add(what, int(trained), at_least=int(expected), model_states_MiB=16 * psi[layers] / 2**20,
                  note=note[-90:] or "ok")
        assert trained == expected, found
    return table


def bench_zero(args) -> dict:
    parts = {"time": lambda: [time_table(n, args.repeats) for n in (2, 4)],
             "memory": lambda: [t for n in (2, 4) for t in memory_tables(n)],
             "step": lambda: [step_table(args.repeats)], "fit": lambda: [fit_table()]}
    tables = [table for name, part in parts.items() if args.only in ("", name) for table in part()]
    return {"title": "zero", "torch": torch.__version__, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg(),
            "tables": {table.title: table.rows for table in tables}}
