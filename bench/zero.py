"""ZeRO beside PyTorch's DistributedDataParallel (DDP) and FSDP2, in processes that talk through gloo.

    python -m bench.zero    all parts, about ten minutes on two cores
    python -m bench.zero --only memory            one of: time, memory, cuda (one GPU)

Memory is the operating system's count, in fresh processes.
"""
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import fully_shard

from bench.measure import compare, head, interleave, peak_memory, row, run
from lib.program import start
from model import GPT, GPTConfig, initialise
from zero import Zero

LR, CLIP = 1e-4, 1.0
PEER = {"stage 0": "ddp", "stage 1": "ddp", "stage 2": "ddp", "stage 3": "fsdp2", "fsdp2": "ddp"}


def gpt(layers: int, width: int = 512) -> GPT:
    return GPT(GPTConfig(vocab_size=8192, n_layer=layers, n_head=width // 64, n_embd=width, max_seq_len=256,
                         tie_embeddings=True))


def on_ranks(world: int, function, *args):
    """function(*args) on every rank, in fresh processes; returns the answer of rank 0."""
    with tempfile.TemporaryDirectory() as folder, \
            ProcessPoolExecutor(world, multiprocessing.get_context("spawn")) as pool:
        rank = partial(as_rank, world, f"file://{folder}/store", function, args)
        return list(pool.map(rank, range(world)))[0]


def as_rank(world: int, store: str, function, args, rank: int):
    torch.set_num_threads(max(1, os.cpu_count() // world))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    return function(*args)


def training(peer: str, layers: int, B: int, T: int, width: int = 512, offload=(), device: str = "cpu"):
    """A function that makes one training step and returns its loss. peer: plain, ddp, fsdp2 or stage 0..3."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, 8192, (B, T + 1), generator=generator).to(device)
    if peer.startswith("stage"):
        with torch.device("meta"):  # Zero makes the weights unit by unit: the device may not hold them whole
            net = gpt(layers, width)
        z = Zero(net, units=net.units(), stage=int(peer[6]), lr=LR, weight_decay=0.1, device=device,
                 offload=offload, init=lambda module, prefix: initialise(module, 0, prefix))

        def update(loss):
            z.backward(loss / dist.get_world_size())
            z.step(LR, CLIP)
    else:
        net = gpt(layers, width).to(device)
        for part in (*net.blocks, net) if peer == "fsdp2" else ():
            fully_shard(part)
        net = nn.parallel.DistributedDataParallel(net) if peer == "ddp" else net
        optimizer = torch.optim.AdamW(net.parameters(), LR, (0.9, 0.95), weight_decay=0.1, fused=True)

        def update(loss):
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    def step() -> float:
        loss = -net(ids[:, :-1], ids[:, 1:]).mean()
        update(loss)
        return loss.item()
    return step


def step_times(repeats: int) -> dict:
    """Seconds per step of every peer, in turns. A barrier before each, so that none pays for another."""
    steps = {peer: training(peer, 8, 2, 128) for peer in (*PEER, "ddp")}
    losses = [step() for step in steps.values()]
    assert max(losses) - min(losses) < 1e-3, losses  # else they would not do the same work
    return interleave(steps, repeats, before=dist.barrier)


def time_of_step(cfg):
    for world in (2, 4):
        seconds = on_ranks(world, step_times, cfg.repeats)
        head(f"time of a step, 29.1 M parameters, {world} ranks, 2 x 128 tokens each")
        for ours, peer in PEER.items():
            compare("step", seconds, ours, peer)


def count(*options, device: str = "cpu") -> tuple[int, float]:
    """Three steps after two of warm-up: bytes that this rank holds at the peak, and seconds per step."""
    step = training(*options, device=device)
    step(), step()
    start = time.perf_counter()
    peak, _ = peak_memory(lambda: (step(), step(), step()), device)
    return peak, (time.perf_counter() - start) / 3


def memory(cfg):
    """Growth from 4 to 12 layers in units of 4 bytes per parameter: what does not grow with it drops out."""
    # what a rank frees is given back at once; the ranks start later
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    unit = 4 * (gpt(12).parameter_count() - gpt(4).parameter_count())
    for n in (2, 4):  # ranks
        head(f"memory per rank, {n} ranks: growth in units of 4 bytes per parameter")
        for peer, formula in (("ddp", 4), ("fsdp2", 4 / n), ("stage 0", 4), ("stage 1", 2 + 2 / n),
                              ("stage 2", 1 + 3 / n), ("stage 3", 4 / n)):
            small, large = (on_ranks(n, count, peer, layers, 1, 4)[0] for layers in (4, 12))
            row(peer, (large - small) / unit, formula=formula)


def one_gpu(cfg):
    """What offload saves on the device, and what it costs in time."""
    layers, B, T, width = 4, 8, 256, 1024 if cfg.quick else 2048
    head(f"one GPU, {layers} layers of width {width}, {B} x {T} tokens: peak bytes per parameter")
    offloads = (), ("acts",), ("optim",), ("optim", "params"), ("optim", "params", "acts")
    for peer, offload in [("plain", ()), ("fsdp2", ()), *(("stage 3", some) for some in offloads)]:
        peak, seconds = on_ranks(1, partial(count, device="cuda"), peer, layers, B, T, width, offload)
        row(f"{peer} {','.join(offload)}", peak / gpt(layers, width).parameter_count(), ms=1e3 * seconds)


if __name__ == "__main__":
    cuda = {"cuda": one_gpu} if torch.cuda.is_available() else {}
    start(lambda: run(__doc__, time=time_of_step, memory=memory, **cuda))
