"""The part of bench.py that starts several ranks: ZeRO beside PyTorch's DistributedDataParallel (DDP) and FSDP2.

    python bench.py zero --out bench_zero.json          # all tables, about ten minutes on two cores
    python bench.py zero --only fit                     # one of: time, memory, step, fit; cuda, which needs a GPU

Ranks are processes on this machine that talk through gloo. Times: all peers live in the same processes and take turns.
Memory: every figure from fresh processes, with the two MALLOC_ variables that make malloc give back what was freed.
"""
from __future__ import annotations

import datetime
import multiprocessing
import os
import resource
import statistics
import tempfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn

from bench.attention import Table, interleave, memory_now, reset_peak
from lib import collectives as zero_tools
from lib.program import UserError
from model import GPT, GPTConfig, initialise
from zero import Zero

FRUGAL_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LR, CLIP = 1e-4, 1.0


def gpt(layers: int, width: int = 512) -> GPT:
    """8 layers: 29.1 M parameters."""
    return GPT(GPTConfig(vocab_size=8192, n_layer=layers, n_head=width // 64, n_embd=width, max_seq_len=256,
                         tie_embeddings=True))


def batch(rank: int, B: int, T: int) -> torch.Tensor:
    return torch.randint(0, 8192, (B, T + 1), generator=torch.Generator().manual_seed(rank))  # (B, T + 1)


# ---- ranks ----------------------------------------------------------------------------------------------------------

def on_ranks(world: int, function, *args, environment: dict | None = None) -> list:
    """[function(*args) of each rank], in fresh processes joined by gloo; None for a rank that died."""
    with mock.patch.dict(os.environ, environment or {}), \
            tempfile.TemporaryDirectory() as folder, \
            ProcessPoolExecutor(world, multiprocessing.get_context("spawn")) as pool:  # malloc reads them at its start
        answers = [pool.submit(_rank, r, world, folder, function, args) for r in range(world)]
        return [None if isinstance(answer.exception(), BrokenExecutor) else answer.result() for answer in answers]


def _rank(rank: int, world: int, folder: str, function, args):
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    return function(*args)


# ---- the peers ------------------------------------------------------------------------------------------------------

def training_step(peer: str, layers: int, ids: torch.Tensor, width: int = 512):
    """A function that makes one update on the device of ids and returns its loss. peer: plain, ddp, fsdp2 [offload], or
    stage 0..3 [overlap] [offload optim,...]."""
    count = ids[:, 1:].numel()
    if peer.startswith("stage"):
        with torch.device("meta"):  # unit by unit, since the device may not hold it whole
            model = gpt(layers, width)
        z = Zero(model, units=model.units(), stage=int(peer[6]), lr=LR, weight_decay=0.1, overlap="overlap" in peer,
                 offload=tuple(filter(None, peer.partition("offload ")[2].split(","))), device=ids.device,
                 init=lambda module, prefix: initialise(module, 0, prefix))

        def step() -> float:
            loss = -model(ids[:, :-1], ids[:, 1:]).sum() / count
            z.backward(loss / z.comm.world)
            z.step(LR, CLIP)
            return loss.item()
        step.zero = z
        return step

    run = model = gpt(layers, width)
    for buffer in model.buffers():  # with FSDP2's offload the parameters stay in main memory
        buffer.data = buffer.to(ids.device)
    model = model if "offload" in peer else model.to(ids.device)
    if peer == "ddp":
        run = nn.parallel.DistributedDataParallel(model)
    elif peer.startswith("fsdp2"):
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
        options = {"offload_policy": CPUOffloadPolicy()} if "offload" in peer else {}
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        loss = -run(ids[:, :-1], ids[:, 1:]).sum() / count
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


# ---- time -----------------------------------------------------------------------------------------------------------

PAIRS = [("stage 0", "ddp"), ("stage 1", "ddp"), ("stage 2", "ddp"), ("stage 3", "fsdp2"),
         ("stage 3 overlap", "stage 3"), ("fsdp2", "ddp")]


def times(B: int, T: int, repeats: int) -> dict:
    """Seconds per step of every peer, in turns. A barrier before each, so that none pays for another."""
    ids = batch(dist.get_rank(), B, T)
    steps = {peer: training_step(peer, 8, ids) for peer in dict.fromkeys(peer for pair in PAIRS for peer in pair)}
    losses = [step() for step in steps.values()]
    assert max(losses) - min(losses) < 1e-3, losses
    return interleave(steps, repeats, before=dist.barrier)


def time_tables(args) -> list[Table]:
    tables, B, T = [], 2, 128
    for world in (2, 4):
        seconds = on_ranks(world, times, B, T, args.repeats)[0]
        table = Table(f"time of a step, 29.1 M parameters, {world} ranks, {B} x {T} tokens per rank (ours / peer), "
                      f"load average {os.getloadavg()[0]:.1f}")
        for ours, peer in PAIRS:
            table.compare(f"{ours} / {peer}", {p: seconds[p] for p in (ours, peer)}, ours, peer)
        tables.append(table)
    return tables


# ---- memory and the wire --------------------------------------------------------------------------------------------

def peak_bytes(peer: str, layers: int) -> dict:
    """The peak resident memory of three steps after two of warm-up, and what the counters and formulas say."""
    step = training_step(peer, layers, batch(dist.get_rank(), 1, 4))
    for _ in range(2):
        step()
    if hasattr(step, "zero"):
        step.zero.comm.sent.clear()
    reset_peak()
    dist.barrier()
    wire = loopback_bytes()
    for _ in range(3):
        step()
    dist.barrier()
    answer = {"peak": memory_now("VmHWM"), "wire": (loopback_bytes() - wire) / 3 / dist.get_world_size()}
    if hasattr(step, "zero"):
        z = step.zero
        answer |= {"held": sum(zero_tools.held(z).values()), "sent": sum(z.comm.sent.values()) / 3}
        assert answer["held"] == sum(zero_tools.held_by_formula(z).values())
        assert answer["sent"] == sum(zero_tools.sent_by_formula(z).values())
    return answer


def loopback_bytes() -> int:
    with open("/proc/net/dev") as file:
        return next(int(line.split()[9]) for line in file if line.strip().startswith("lo:"))


def slopes(N: int, peer: str) -> dict:
    """Growth over two depths, in units of 4 bytes per parameter: what does not grow with the model drops out."""
    unit = 4 * (gpt(12).parameter_count() - gpt(4).parameter_count())
    small, large = (on_ranks(N, peak_bytes, peer, layers, environment=FRUGAL_MALLOC)[0] for layers in (4, 12))
    return {name: (large[name] - small[name]) / unit for name in large}


def memory_tables(args) -> list[Table]:
    tables = []
    for N in (2, 4):
        f = (N - 1) / N
        held = {"ddp": 4, "fsdp2": 4 / N, "stage 0": 4, "stage 1": 2 + 2 / N, "stage 2": 1 + 3 / N, "stage 3": 4 / N}
        found = {peer: slopes(N, peer) for peer in held}
        memory = Table(f"memory per rank, {N} ranks, float32: growth in units of 4 bytes per parameter")
        for peer, slope in found.items():
            memory.add(peer, slope["peak"], formula=held[peer], counted=slope.get("held", ""))
        wire = Table(f"bytes on the wire per step and rank, {N} ranks: growth in units of 4 bytes per parameter")
        for peer, slope in found.items():
            formula = 3 * f if peer in ("fsdp2", "stage 3") else 2 * f
            wire.add(peer, slope["wire"], formula=formula, counted=slope.get("sent", ""))
        tables += [memory, wire]
    return tables


# ---- the optimizer step ---------------------------------------------------------------------------------------------

def step_table(args) -> list[Table]:
    """One process. z.step reduces nothing here: norm, guard, clipping, AdamW, publish."""
    table = Table("z.step alone, 29.1 M parameters, one process (time / bare fused AdamW on one tensor of that size)")
    model, ids = gpt(8), batch(0, 1, 8)
    p = nn.Parameter(torch.randn(model.parameter_count()))
    p.grad = torch.randn_like(p) * 1e-3
    bare = torch.optim.AdamW([p], lr=LR, betas=(0.9, 0.95), fused=True)
    z = Zero(model, units=model.units(), stage=0, lr=LR, weight_decay=0.1)
    seconds = interleave({"bare": bare.step, "z.step": lambda: z.step(LR, CLIP)}, 3 * args.repeats,
                         before=lambda: z.backward(-model(ids[:, :-1], ids[:, 1:]).sum()))
    table.compare("z.step, clipped", seconds, "z.step", "bare")
    return [table]


# ---- does not fit ---------------------------------------------------------------------------------------------------

def under_a_cap(stage: int, offload: list[str], layers: int, cap: int) -> str:
    """Build and train 3 steps with at most `cap` more bytes of private memory than PyTorch itself (RLIMIT_DATA).
    Returns the error that ended it, or ""."""
    ids = batch(dist.get_rank(), 1, 16)
    gpt(1)(ids[:, :-1], ids[:, 1:]).sum().backward()  # the libraries' own buffers come with the first products
    resource.setrlimit(resource.RLIMIT_DATA, (memory_now("VmData") + cap, resource.RLIM_INFINITY))
    try:
        with torch.device("meta"):
            model = gpt(layers)
        z = Zero(model, units=model.units(), stage=stage, offload=tuple(offload), lr=LR, device="cpu",
                 init=lambda module, prefix: initialise(module, 0, prefix))
        for _ in range(3):
            z.backward(-model(ids[:, :-1], ids[:, 1:]).sum() / 32)
            z.step(LR, CLIP)
    except (RuntimeError, UserError, MemoryError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def fit_table(args=None) -> list[Table]:
    small, large = 8, 16
    psi = {layers: gpt(layers).parameter_count() for layers in (small, large)}
    cap = int(3.4 * 4 * psi[small])
    table = Table(f"does it fit? 2 ranks, each capped at {cap / 2**20:.0f} MiB of private memory (1: it trained)")
    for layers, stage, offload, expected in ((small, 0, [], False), (small, 3, [], True), (large, 3, [], False),
                                             (large, 3, ["optim", "params", "disk"], True)):
        found = on_ranks(2, under_a_cap, stage, offload, layers, cap, environment=FRUGAL_MALLOC)
        errors = ["died" if error is None else error for error in found if error != ""]
        what = f"stage {stage}, {psi[layers] / 1e6:.1f} M parameters, offload {','.join(offload) or 'nothing'}"
        table.add(what, int(not errors), model_states_MiB=16 * psi[layers] / 2**20,
                  note=errors[0][-90:] if errors else "ok")
        if expected:
            assert not errors, found
        else:  # on every rank for want of memory, and for nothing else
            assert len(errors) == 2 and all("alloc" in error or error == "MemoryError" for error in errors), found
    return [table]


# ---- one GPU: what offload buys, and what it costs (written for a machine with one; not run yet) ---------------------

WAYS = ["stage 3", *(f"stage 3 offload {kinds}" for kinds in ("acts", "optim", "optim,params", "optim,params,acts")),
        "fsdp2 offload"]
GPU_WIDTH, GPU_BATCH, GPU_CAP = 2048, (8, 256), 8 << 30  # 50 M parameters a layer; bytes of the GPU that a process gets


def seconds_under_cap(peer: str, layers: int, repeats: int) -> float:
    """Median time of an update in float32 with GPU_CAP bytes of the device; 0 where these do not suffice."""
    torch.cuda.set_per_process_memory_fraction(GPU_CAP / torch.cuda.get_device_properties(0).total_memory)
    try:
        step = training_step(peer, layers, batch(0, *GPU_BATCH).cuda(), GPU_WIDTH)
        return statistics.median(interleave({peer: step}, repeats)[peer])
    except torch.OutOfMemoryError:
        return 0.0


def times_on_gpu(repeats: int) -> dict:
    ids = batch(0, *GPU_BATCH).cuda()
    return interleave({peer: training_step(peer, 4, ids, GPU_WIDTH) for peer in ("plain", *WAYS)}, repeats)


def cuda_tables(args) -> list[Table]:
    if not torch.cuda.is_available():
        print("\nno CUDA device, so nothing of one GPU")
        return []
    largest = Table(f"largest model that trains in {GPU_CAP >> 30} GiB of one GPU, in layers of width {GPU_WIDTH}")
    for peer in WAYS:
        high = 2
        while high < 64 and on_ranks(1, seconds_under_cap, peer, high, 1)[0]:
            high *= 2
        low = high // 2  # trains; high does not, or was not tried
        while high - low > max(1, low // 8):
            middle = (low + high) // 2
            low, high = (middle, high) if on_ranks(1, seconds_under_cap, peer, middle, 1)[0] else (low, middle)
        with torch.device("meta"):
            size = gpt(low, GPU_WIDTH).parameter_count()
        seconds = on_ranks(1, seconds_under_cap, peer, low, args.repeats)[0]
        largest.add(peer, low, parameters=size, tokens_per_second=GPU_BATCH[0] * GPU_BATCH[1] / seconds)
    table, seconds = Table("an update of 4 such layers (ours / peer)"), on_ranks(1, times_on_gpu, args.repeats)[0]
    for ours, peer in [("stage 3", "plain"), *((way, "stage 3") for way in WAYS[1:-1]), (WAYS[-2], WAYS[-1])]:
        table.compare(f"{ours} / {peer}", {name: seconds[name] for name in (ours, peer)}, ours, peer)
    return [largest, table]


PARTS = {"time": time_tables, "memory": memory_tables, "step": step_table, "fit": fit_table, "cuda": cuda_tables}
