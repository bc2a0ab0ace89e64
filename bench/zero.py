"""ZeRO beside PyTorch's DistributedDataParallel (DDP) and FSDP2, in processes that talk through gloo.

    python -m bench.zero    all parts, about ten minutes on two cores
    python -m bench.zero --only memory            one of: time, memory, cuda (one GPU)

Memory and bytes sent are the operating system's counts, in fresh processes.
"""
import datetime
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn

from bench.measure import Table, interleave, peak_memory, run
from lib.program import start
from model import GPT, GPTConfig, initialise
from zero import Zero

LR, CLIP = 1e-4, 1.0
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed is given back
PEER = {"stage 0": "ddp", "stage 1": "ddp", "stage 2": "ddp", "stage 3": "fsdp2", "fsdp2": "ddp"}


def gpt(layers: int, width: int = 512) -> GPT:
    """8 layers: 29.1 M parameters."""
    return GPT(GPTConfig(vocab_size=8192, n_layer=layers, n_head=width // 64, n_embd=width, max_seq_len=256,
                         tie_embeddings=True))


def on_ranks(world: int, function, *args, **environment: str) -> list:
    """[function(*args) of each rank], in fresh processes with these environment variables."""
    with mock.patch.dict(os.environ, environment), tempfile.TemporaryDirectory() as folder, \
            ProcessPoolExecutor(world, multiprocessing.get_context("spawn")) as pool:
        answers = [pool.submit(as_rank, rank, world, folder, function, args) for rank in range(world)]
        return [answer.result() for answer in answers]


def as_rank(rank: int, world: int, folder: str, function, args):
    torch.set_num_threads(max(1, os.cpu_count() // world))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    return function(*args)


def training(peer: str, layers: int, B: int, T: int, width: int = 512, device: str = "cpu"):
    """(backward, update): two functions that together are one training step; backward returns the loss.
    peer: plain, ddp, fsdp2, or stage 0..3 [offload optim,...]."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, 8192, (B, T + 1), generator=generator).to(device)
    z = None
    if peer.startswith("stage"):
        with torch.device("meta"):  # Zero makes the weights unit by unit: the device may not hold them whole
            model = net = gpt(layers, width)
        offload = tuple(filter(None, peer.partition("offload ")[2].split(",")))
        z = Zero(model, units=model.units(), stage=int(peer[6]), lr=LR, weight_decay=0.1, device=device,
                 offload=offload, init=lambda module, prefix: initialise(module, 0, prefix))
    else:
        model = net = gpt(layers, width).to(device)
        if peer == "ddp":
            net = nn.parallel.DistributedDataParallel(model)
        for part in (*model.blocks, model) if peer == "fsdp2" else ():
            torch.distributed.fsdp.fully_shard(part)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1,
                                      fused=True)

    def backward() -> float:
        loss = -net(ids[:, :-1], ids[:, 1:]).mean()
        if z:
            z.backward(loss / dist.get_world_size())
        else:
            loss.backward()
        return loss.item()

    def update() -> None:
        if z:
            z.step(LR, CLIP)
            return
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return backward, update


def step_times(repeats: int) -> dict:
    """Seconds per step of every peer, in turns. A barrier before each, so that none pays for another."""
    both = {peer: training(peer, 8, 2, 128) for peer in (*PEER, "ddp")}
    losses = [backward() for backward, _ in both.values()]
    assert max(losses) - min(losses) < 1e-3, losses  # else they would not do the same work
    steps = {peer: lambda parts=parts: [part() for part in parts] for peer, parts in both.items()}
    return interleave(steps, repeats, before=dist.barrier)


def time_of_step(cfg):
    for world in (2, 4):
        seconds = on_ranks(world, step_times, cfg.repeats)[0]
        table = Table(f"time of a step, 29.1 M parameters, {world} ranks, 2 x 128 tokens each (ours / peer)")
        for ours, peer in PEER.items():
            table.compare(f"{ours} / {peer}", {p: seconds[p] for p in (ours, peer)}, ours, peer)


def loopback_bytes() -> int:
    with open("/proc/net/dev") as file:
        return next(int(line.split()[9]) for line in file if line.strip().startswith("lo:"))


def count(peer: str, *options) -> dict:
    """Three steps after two of warm-up: this rank's bytes at the peak; per step, bytes sent and seconds."""
    parts, device = training(peer, *options), "cuda" if "cuda" in options else "cpu"

    def steps(n: int) -> None:
        for part in n * parts:
            part()
        dist.barrier()
    steps(2)
    sent, start = loopback_bytes(), time.perf_counter()
    peak, _ = peak_memory(lambda: steps(3), device)
    return {"peak": peak, "sent": (loopback_bytes() - sent) / 3 / dist.get_world_size(),
            "seconds": (time.perf_counter() - start) / 3}


def slopes(world: int, peer: str) -> dict:
    """Growth from 4 to 12 layers in units of 4 bytes per parameter: what does not grow with it drops out."""
    unit = 4 * (gpt(12).parameter_count() - gpt(4).parameter_count())
    small, large = (on_ranks(world, count, peer, layers, 1, 4, **FRUGAL)[0] for layers in (4, 12))
    return {name: (large[name] - small[name]) / unit for name in large}


def memory_and_traffic(cfg):
    for n in (2, 4):  # ranks
        held = {"ddp": 4, "stage 0": 4, "stage 1": 2 + 2 / n, "stage 2": 1 + 3 / n, "stage 3": 4 / n}
        held["fsdp2"] = held["stage 3"]
        sent = {peer: (3 if peer in ("fsdp2", "stage 3") else 2) * (n - 1) / n for peer in held}
        table = Table(f"memory per rank, {n} ranks, and sent: growth in units of 4 bytes per parameter")
        for peer in held:
            found = slopes(n, peer)
            table.add(peer, found["peak"], formula=held[peer], sent=found["sent"], sent_formula=sent[peer])


def one_gpu(cfg):
    """What offload saves on the device, and what it costs in time."""
    layers, B, T, width = 4, 8, 256, 1024 if cfg.quick else 2048
    table = Table(f"one GPU, {layers} layers of width {width}, {B} x {T} tokens: peak bytes per parameter")
    kinds = "", " offload acts", " offload optim", " offload optim,params", " offload optim,params,acts"
    for peer in ("plain", "fsdp2", *(f"stage 3{kind}" for kind in kinds)):
        found, = on_ranks(1, count, peer, layers, B, T, width, "cuda")
        table.add(peer, found["peak"] / gpt(layers, width).parameter_count(), ms=1e3 * found["seconds"])


if __name__ == "__main__":
    cuda = {"cuda": one_gpu} if torch.cuda.is_available() else {}
    start(lambda: run(__doc__, time=time_of_step, memory=memory_and_traffic, **cuda))
