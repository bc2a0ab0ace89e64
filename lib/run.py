"""One training run: its flags, its learning rate, its folder. The loop itself stays in the script.

    class Config(RunConfig): ...                  a stage's own flags, its own defaults of the shared ones
    run = Run(cfg, ranks, {"model": zero}, tokenizer, inputs={"data": fingerprint})
    for step in run.steps(evaluate):              evaluates, saves and stops between the turns
        ...                                       batch, forward, loss, zero.backward, zero.step
        run.log(step, tokens=n, loss=loss)
    return run.finish()                           writes out/final

Run never sees a batch, a model's output or a loss. Of the script it calls evaluate() and finish's change().
"""
import dataclasses
import datetime
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from lib.checkpoint import claim, keep_step, load_checkpoint, save_checkpoint, save_final
from lib.program import UserError, keep_lines, require_positive, writing
from lib.ranks import together


@dataclass
class RunConfig:
    # data
    data: str = ""  # what to train on
    val_data: str = ""  # what to validate on; empty: the last val_fraction of data
    val_fraction: float = 0.1  # of the records, in pretraining of the characters; 0: no validation
    strict: bool = False  # stop if a record cannot be used, instead of leaving it out
    # optimisation
    steps: int = 0  # updates; 0: as many as --epochs takes
    batch_size: int = 16  # items per update over all ranks
    micro_batch_size: int = 0  # items per rank and forward; 0: the rank's whole share at once
    seq_len: int = 0  # tokens in a row (T); 0: the longest that the model was made for
    lr: float = 1e-3  # peak learning rate
    warmup_steps: int = 10  # updates over which the rate climbs from 0; at most a tenth of all
    decay: Literal["cosine", "linear", "flat-then-linear"] = "linear"  # how it falls afterwards
    clip: float = 1.0  # largest gradient norm; 0: off
    # run
    out: str = "out/run"  # folder of this run: checkpoints, metrics.jsonl, final/
    init: str = ""  # folder of the finished model to start from (weights and tokenizer)
    resume: bool = False  # go on from the newest checkpoint in out
    eval_every: int = 100  # updates between evaluations; 0: only at the end
    save_every: int = 400  # updates between checkpoints; 0: only at the end
    keep_best: bool = False  # finish with the model of the lowest validation loss, not with the last one
    log_every: int = 20  # updates between log lines
    seed: int = 1  # of all that is random in this run
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and activations in the passes
    attention: Literal["flash", "sdpa", "naive"] = "flash"  # ours, PyTorch's C++ kernel, the ten lines
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage: what is sharded over the ranks
    offload: str = ""  # to host memory: comma list of optim, params, acts
    activation_checkpointing: bool = False  # recompute each block in backward, keep no activations
    compile: bool = False  # torch.compile each block

    betas, adam_eps, weight_decay, min_lr = (0.9, 0.95), 1e-8, 0.0, 0.0  # flags at most in single stages
    # A resumed run may change these. All others should be as they were. Of a file its content is compared.
    may_change: ClassVar[set[str]] = {
        "out", "init", "resume", "data", "val_data", "ptx_data", "strict", "steps", "epochs", "eval_every",
        "eval_prompts", "save_every", "keep_best", "log_every", "device", "zero", "offload",
        "activation_checkpointing"}

    def __post_init__(self):
        require_positive(self, "batch_size", "log_every")
        if not self.data:
            raise UserError("--data: found nothing, expected a file to train on")

    def compared(self) -> dict:
        """The flags that a resumed run should share with the one it continues, as a checkpoint holds them."""
        return {f"--{name}": value for name, value in dataclasses.asdict(self).items()
                if name not in self.may_change}

    def fit_rows(self, longest: int) -> None:
        """Fill in seq_len; UserError if a model made for rows of `longest` tokens cannot read so many."""
        self.seq_len = self.seq_len or longest
        if self.seq_len > longest:
            raise UserError(f"--seq_len {self.seq_len}: the model's rows end at {longest}; lower it")

    def fit_steps(self, items: float, most: float = math.inf) -> None:
        """Fill in steps (--epochs of `items`, `most` at most) and eval_every. UserError without any item."""
        if not items:
            raise UserError(f"{self.data}: found nothing that fits --seq_len {self.seq_len}, expected some")
        if not self.steps:
            require_positive(self, "epochs")
            self.steps = min(math.ceil(self.epochs * items / self.batch_size), most)
            self.eval_every = min(self.eval_every, max(1, self.steps // 5))

    def zero_options(self, ranks) -> dict:
        """What Zero() takes of these flags."""
        return {"stage": self.zero, "device": ranks.device, "dtype": getattr(torch, self.dtype),
                "lr": self.lr, "weight_decay": self.weight_decay, "betas": self.betas, "eps": self.adam_eps,
                "offload": tuple(filter(None, self.offload.split(","))),
                "activation_checkpointing": self.activation_checkpointing, "compile": self.compile}


def lr_at(step: int, cfg: RunConfig, peak: float = 0.0) -> float:
    """Learning rate of update `step` (1..steps): linear warmup to `peak` (0: cfg.lr), over at most a tenth of
    the steps, then decay. It would reach min_lr at update steps + 1: a rate of 0 would waste the last one."""
    peak, warmup = peak or cfg.lr, min(cfg.warmup_steps, cfg.steps // 10)
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (cfg.steps + 1 - warmup)  # 0..1
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done,
            "flat-then-linear": min(1.0, (1 - done) / 0.6)}[cfg.decay]  # flat for the first 40 %
    return cfg.min_lr + (peak - cfg.min_lr) * left


class Run:
    """The folder, the log and the checkpoints of one training run. All ranks call its methods alike.

    models: {name: Zero}, what is trained and saved; the first one becomes final/.
    inputs: {name: fingerprint} of what was read (data, frozen models). A resumed run should find the same.
    final: what final/config.json says beside the model's shape and the flags: head, chat_template.
    read: what was read and left out, in words for the screen and in numbers for metrics.jsonl.
    stopped: a signal asked this run to stop. Then finish() writes no final/."""

    def __init__(self, cfg: RunConfig, ranks, models: dict, tokenizer, *, inputs: dict, final: dict,
                 read: tuple[str, dict] = ("", {})):
        self.cfg, self.ranks, self.models, self.tokenizer = cfg, ranks, models, tokenizer
        self.stopped, self.begun = False, set()  # begun: the files of append()
        self.lock = claim(cfg.out, cfg.resume) if ranks.is_main else None  # held as long as this object lives
        ranks.barrier()
        model = next(iter(models.values())).model
        shape = dataclasses.asdict(model.config)
        self.config = {"model": shape, **final, "run": dataclasses.asdict(cfg)}
        self.same = {"model": {**shape, "attention": ""}, "tokenizer": tokenizer.fingerprint,  # else: refused
                     "delta": str(model.delta[::3]) if hasattr(model, "delta") else None}
        self.should = {**inputs, **cfg.compared()}  # else: a warning
        found = load_checkpoint(cfg.out, models, same=self.same, bitwise=self.should) if cfg.resume else None
        self.start, saved = found or (0, {})
        self.skipped = saved.get("skipped", 0)  # updates that were left out, all in all
        self.due = bool(saved.get("due"))  # it stopped at a step that was to be evaluated
        self.best = saved.get("best") or [math.inf, 0]  # lowest validation loss, and its step
        best = self.best[1] if found else -1  # of another run nothing stays
        if cfg.keep_best and not together(lambda: ranks.is_main and keep_step(f"{cfg.out}/best", best))[0]:
            self.best = [math.inf, 0]
        if self.start > cfg.steps:
            raise UserError(f"--steps {cfg.steps}: {cfg.out} is already at step {self.start}; give more")
        if read[1] and not self.start:
            self.append("metrics.jsonl", [{"step": 0, **read[1]}])
        few = [f"{cfg.steps} updates teach little; give more records, --epochs or --steps"] * (cfg.steps < 30)
        self.say("\n".join([read[0], *(f"{key}: {z.report()}" for key, z in models.items()), *few]).strip())
        self.flops = model.flops_per_token(cfg.seq_len) if len(models) == 1 else 0  # of several: no MFU
        if self.flops:
            self.peak = matmul_peak(ranks.device, getattr(torch, cfg.dtype))
            self.say(f"{self.flops / 1e6:.1f} MFLOP a token; {self.peak / 1e9:.0f} GFLOP/s in large products")
        if cfg.resume:
            self.say(f"going on after step {self.start}" if found else f"--resume: {cfg.out} is empty yet")
        if (was := saved.get("steps", cfg.steps)) != cfg.steps:
            self.say(f"--steps was {was} and is {cfg.steps}: the learning rate follows the new schedule")
        self._restart_clock()

    def steps(self, evaluate: Callable[[], dict], first: bool = False) -> Iterator[int]:
        """The steps from here to cfg.steps, counted from 1.
        After each turn of the loop: evaluation and a checkpoint where they are due and at the last step; and
        the end, if any rank was asked to stop. evaluate() returns {metric: number}. first: also evaluate
        before step 1. `continue` counts as a whole turn. After `break`, finish() writes final/ at once."""
        cfg = self.cfg
        if self.due or self.start == cfg.steps or (first and self.start == 0):
            self._evaluate(evaluate, self.start)  # start == steps: it has finished before; say how it went
        for step in range(self.start + 1, cfg.steps + 1):
            yield step
            stop = self.ranks.asked_to_stop()  # not before the body: the save would come a step late
            last = step == cfg.steps
            due = last or bool(cfg.eval_every and step % cfg.eval_every == 0)
            if due and not stop:  # whoever asks to stop may not wait for an evaluation
                self._evaluate(evaluate, step)
            if last or stop or (cfg.save_every and step % cfg.save_every == 0):
                self._save(cfg.out, step, due=due and stop)
            if stop:
                self.stopped = True
                self.say(f"asked to stop: saved after step {step}; the same command with --resume goes on")
                return
        if cfg.keep_best and self.best[0] < math.inf:
            load_checkpoint(f"{cfg.out}/best", self.models, same=self.same, bitwise={})
            self.say(f"--keep_best: final/ is the model of step {self.best[1]}")

    def log(self, step: int, *, tokens: float, skipped: int = 0, **numbers) -> None:
        """Once a step. tokens (of all ranks) and skipped updates add up. The numbers are written at every
        log_every-th step, at the first and at the last, with speed, MFU, memory and the time left."""
        self.tokens, self.counted = self.tokens + tokens, self.counted + 1
        self.skipped += skipped
        if step % self.cfg.log_every and step not in (self.start + 1, self.cfg.steps):
            return
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        left = datetime.timedelta(seconds=round((self.cfg.steps - step) * seconds / self.counted))
        speed, memory = self.tokens / seconds, peak_memory(self.ranks.device)
        machine = {"tokens_per_second": speed, "memory": memory}
        words = [f"{speed:,.0f} tok/s", f"{memory / 2**20:.0f} MiB", f"{left} left"]
        if self.flops:
            machine["mfu"] = speed * self.flops / (self.peak * self.ranks.world)
            words.insert(1, f"mfu {machine['mfu']:.0%}")
        numbers |= {"skipped": self.skipped} if self.skipped else {}
        self.event(step, machine, words, **numbers)
        self._restart_clock()

    def event(self, step: int, machine=(), words=(), **numbers) -> None:
        """Numbers for metrics.jsonl and the screen. machine: more of them, which the screen says as words."""
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x  # JSON has no NaN
                  for name, x in {"step": step, **numbers, **dict(machine)}.items()}
        self.append("metrics.jsonl", [finite])
        shown = [f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in numbers.items()]
        self.say(" | ".join([f"step {step}/{self.cfg.steps}", *shown[:12], *words]))  # all are in the file

    def say(self, text: str) -> None:
        """For the person at the screen (rank 0 only); not in metrics.jsonl."""
        if self.ranks.is_main and text:
            print(text, flush=True)

    def append(self, name: str, lines: Iterable[dict]) -> None:
        """Rank 0 adds lines, each with a "step", to out/name. A resumed run first drops those after its
        start: however often a run was killed and resumed, it leaves one curve."""
        if self.ranks.is_main:
            path = os.path.join(self.cfg.out, name)
            if name not in self.begun:
                keep_lines(path, self.start)
                self.begun.add(name)
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def finish(self, change: Callable[[dict], dict] | None = None, **config) -> int:
        """Write final/ unless the run was stopped. Returns the exit code. change(weights): a last edit of the
        weights in place, on rank 0; it returns more files. config: what else config.json says."""
        if not self.stopped:
            weights = next(iter(self.models.values())).full_state_dict()
            if self.ranks.is_main:
                files = change(weights) if change else {}
                save_final(self.cfg.out, weights, {**self.config, **config}, self.tokenizer.path, files)
            self.say(f"finished: {self.cfg.out}/final")
        self.ranks.close()
        return 130 if self.ranks.stop_signal == signal.SIGINT else 0  # as shells expect; SIGTERM was obeyed

    def _restart_clock(self) -> None:  # so that the speed is that of training alone
        self.clock, self.tokens, self.counted = time.perf_counter(), 0, 0

    def _save(self, folder: str, step: int, due: bool = False) -> None:
        extra = {**self.same, **self.should, "skipped": self.skipped, "steps": self.cfg.steps,
                 "due": due, "best": self.best if self.best[0] < math.inf else None}
        save_checkpoint(folder, step, self.models, extra, self.config, self.tokenizer.path)
        self._restart_clock()

    def _evaluate(self, evaluate, step: int) -> None:
        if numbers := evaluate():  # a script may have nothing to validate on; PPO has no loss but a score
            loss = numbers.get("eval_loss", -numbers.get("eval_score", math.nan))
            if not math.isfinite(loss):  # what has blown up is not worth saving
                raise UserError(f"the validation loss is {loss}; lower --lr, or --dtype float32 or bfloat16")
            self.event(step, **numbers)
            if loss > self.best[0] and "eval_loss" in numbers:
                self.say(f"    eval_loss was {self.best[0]:.4g} at step {self.best[1]} (see --keep_best)")
            if loss < self.best[0]:
                self.best = [loss, step]
                if self.cfg.keep_best:
                    self._save(f"{self.cfg.out}/best", step)
        self._restart_clock()


def with_error(name: str, sums, counts=None, share: bool = False) -> dict[str, float]:
    """{name: sum(sums) / sum(counts)} over items, (items,) each; counts None: 1. Of fewer than 30 also the
    standard error of this ratio (Cochran 1977, section 2.11), nan for one. share: items are right or wrong.
    Since ten of ten are no certainty, the error is that of two more of each (Agresti & Coull 1998)."""
    counts = torch.ones_like(sums) if counts is None else counts
    found, more = {name: (sums.sum() / counts.sum()).item()}, sums.new_tensor([0.0, 0.0, 1.0, 1.0] * share)
    if len(sums) < 30:
        sums, counts = torch.cat((sums, more)), torch.cat((counts, torch.ones_like(more)))
        away, n = sums - counts * sums.sum() / counts.sum(), len(sums)
        found[f"{name}_stderr"] = math.nan if n < 2 else (away.std() * n**0.5 / counts.sum()).item()
    return found


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product here and now: the yardstick behind the MFU of a run."""
    size, seconds = 1024 if device.type == "cpu" else 8192, []
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held at once: on the GPU for CUDA, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
