"""What only a GPU can show: its own products in the kernels, streams side by side, whole runs."""
import gc
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from small_chat import curve, run_script, same_weights
from test_attention import in_float64, inputs, run
from test_logp import inputs as logp_inputs
from test_logp import untiled
from test_pretrain import arguments
from test_zero import CLIP, DECAY, LARGER, LR, assert_equal, batches, gpt, loss_of, near, small_activations

import kernels
from kernels import flash_attention, sdpa_attention, target_logp
from model import GPT, generate
from zero import Zero

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TRITON = find_spec("triton")  # generates what --compile runs on a GPU
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# ---- kernels ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, H, G, Tq, Tk", [
    (2, 4, 2, 1300, 1300), (1, 2, 2, 130, 643), (3, 2, 1, 1, 600), (12, 6, 6, 129, 129)])
@pytest.mark.parametrize("how", ["causal", "all", "packed"])
def test_attention(dtype, B, H, G, Tq, Tk, how, monkeypatch):
    """Output and gradients are at most twice as far from float64's as those of PyTorch's kernel, whatever the
    number of tiles, heads in a tile and documents."""
    qkv, g = inputs(0, B, H, G, Tq, Tk, 64, dtype)
    qkv, g = [x.detach().cuda().requires_grad_() for x in qkv], g.cuda()
    ids = torch.arange(Tk, device="cuda").expand(B, -1) // 150 - 1  # -1: padding
    options = {"segment_ids": ids[:, Tk - Tq:], "kv_segment_ids": ids} if how == "packed" else {}
    options["causal"] = how != "all"
    exact = in_float64(qkv, g, **options)
    sdpa = run(sdpa_attention, qkv, g, **options)
    for at_once, block in ((kernels.SCORES_AT_ONCE["cuda"], None), (2**16, (64, 128))):
        monkeypatch.setitem(kernels.SCORES_AT_ONCE, "cuda", at_once)
        for ours, theirs, truth in zip(run(flash_attention, qkv, g, block=block, **options), sdpa, exact):
            assert ours.dtype == dtype and ours.shape == truth.shape
            rounding = 4 * torch.finfo(dtype).eps * truth.norm()
            assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"equal_weights": True}, {"with_stats": True}])
def test_logp(dtype, options, monkeypatch):
    """Results and gradients are at most twice as far off as the untiled ones, summed over fifty chunks."""
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 10 * 64)
    parameters, targets, _ = logp_inputs(5, 500, 32, 64, dtype)
    parameters, targets = [x.detach().cuda().requires_grad_() for x in parameters], targets.cuda()
    wide, n = [x.detach().double().requires_grad_() for x in parameters], 1 + ("with_stats" in options)
    found = target_logp(*parameters, targets, **options)
    found = found if "with_stats" in options else (found,)
    sides = []
    for outs, xs in ((untiled(*wide, targets), wide), (untiled(*parameters, targets), parameters),
                     (found, parameters)):
        sides.append([*outs[:n], *torch.autograd.grad(sum(x.sum() for x in outs[:n]), xs)])
    rounding = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for truth, theirs, ours in zip(*sides):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + rounding * truth.norm()


def test_a_cache_changes_nothing():
    """Tokens drawn with a KV cache, of prompts of unlike length: each is the likeliest of a whole pass."""
    model = gpt(max_seq_len=64).cuda().eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    with torch.inference_mode():
        for prompt, reply in zip(prompts, generate(model, prompts, max_new_tokens=40, temperature=0)):
            scores = model(torch.tensor([prompt + reply[:-1]], device="cuda"))[0, len(prompt) - 1:]  # (40, V)
            chosen = scores.gather(1, torch.tensor(reply, device="cuda")[:, None])[:, 0]
            assert (scores.amax(1) - chosen).max() < 1e-4


# ---- ZeRO ----------------------------------------------------------------------------------------------

def on_cuda(offload=(), dtype=torch.float32, nap=0):
    """Two updates of the small model on the GPU, all of its activations parked if any. nap: cycles that each
    stream sleeps before what the other one should wait for."""
    model = gpt().cuda()
    zero = Zero(model, units=model.units(), stage=3, offload=offload, dtype=dtype, lr=LR, weight_decay=DECAY)
    real = zero.memory.put

    def late(*args, **options):
        with torch.cuda.stream(zero.memory.side):
            torch.cuda._sleep(nap)  # the copy comes late: who reads the host's memory must wait for it
        return real(*args, **options)

    with small_activations(), mock.patch.object(zero.memory, "put", late):
        for step in batches(zero.comm.world, 2):
            for ids in step[zero.comm.rank].cuda():
                loss = loss_of(model, ids, zero.comm.world * 48)
                torch.cuda._sleep(nap)  # the gradients come late: who copies them must wait for them
                zero.backward(loss)
            zero.step(LR, CLIP)
    return zero.full_state_dict()


def test_bytes_and_offload():
    """torch.cuda.memory_allocated grows by what stays on the device (each tensor in whole 512 bytes). Parking
    activations changes no bit; the CPU's AdamW rounds otherwise than the GPU's, in the last bits."""
    states = []
    for offload in ((), ("acts",), ("optim",), ("optim", "params"), ("optim", "params", "acts")):
        gc.collect()  # a Zero and its model refer to each other: the one before may still be there
        before, large = torch.cuda.memory_allocated(), GPT(LARGER).cuda()
        zero = Zero(large, units=large.units(), stage=3, offload=offload)
        on_device = torch.cuda.memory_allocated() - before - sum(buffer.nbytes for buffer in large.buffers())
        per_parameter = 0 if "params" in offload else 4 if "optim" in offload else 16
        expected = per_parameter * sum(unit.length for unit in zero.units)
        assert abs(on_device - expected) < 512 * 5 * len(zero.units) + 4096
        del large, zero
        states.append(on_cuda(offload))
    assert_equal(states[1], states[0])
    assert all(near(state, states[0], 1e-5) for state in states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_do_not_race(dtype):
    """The copies run on a stream of their own. When either stream is late: the same bits."""
    quick, late = (on_cuda(("optim", "params", "acts"), dtype=dtype, nap=nap) for nap in (0, 10**6))
    assert_equal(late, quick)


# ---- runs ------------------------------------------------------------------------------------------------

def train(text, out, flags):
    run_script("train_pretrain", [*arguments(text, out, flags), "--device", "cuda"])
    return [loss for _, loss in curve(out)]


@pytest.fixture(scope="module")
def on_cpu(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("cpu")
    run_script("train_pretrain", arguments(text, out, ""))
    return [loss for _, loss in curve(out)]


@pytest.mark.parametrize("flags, rel", [
    ("", 1e-4), ("--micro_batch_size 5", 1e-4), ("--attention sdpa", 1e-4), ("--dtype bfloat16", 0.03),
    ("--activation_checkpointing", 1e-4), ("--offload optim,acts --zero 3", 1e-4),
    ("--dtype bfloat16 --offload optim,params,acts --zero 3", 0.03),
    pytest.param("--compile", 1e-4, marks=pytest.mark.skipif(not TRITON, reason="needs Triton"))])
def test_a_run_is_the_cpus(on_cpu, text, tmp_path, flags, rel):
    """The same losses, however the step is computed. In bfloat16 about the same."""
    assert train(text, tmp_path, flags) == pytest.approx(on_cpu, rel=rel)


@pytest.mark.parametrize("flags", ["", "--dtype bfloat16 --offload optim,params,acts --zero 3"])
def test_resume_is_exact(text, tmp_path, flags):
    """From step 10 on: every weight to its last bit."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    part.mkdir()
    train(text, whole, f"{flags} --save_every 10")
    (part / "step-00000010").symlink_to(whole / "step-00000010")
    train(text, part, f"{flags} --save_every 10 --resume")
    assert same_weights(whole, part)
