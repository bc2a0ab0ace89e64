"""Delta tuning: every method against its formula, and as a run that is saved, resumed, merged and read."""
import contextlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from ranks import ranks
from small_chat import curve, metrics, random_model, ranked, run_script, same_metrics, save_chat_model, write
from test_zero import held

import sample
from data import collate
from lib.program import UserError
from lora import DeltaConfig, Tuned, attach, base_of, final_of, load_tuned, off
from model import GPT, generate
from zero import Zero

METHODS = ["lora", "dora", "adapter", "ladder", "prefix", "prompt", "bias", "norm", "last"]
PLAIN = ["lora", "dora", "bias", "norm", "last"]  # can be merged
AS_BASE = ["lora", "dora", "adapter", "ladder", "bias", "norm", "last"]  # start as the base, to the last bit
BORN = {"files": {"model.pt": {"sha256": "abc"}}, "head": "scalar"}
every_method = pytest.mark.parametrize("tune", METHODS)


def flags_of(tune, **more):
    return DeltaConfig(tune=tune, **{"rank": 3, "alpha": 5.0, "length": 1 if tune == "last" else 2, **more})


def base(head="lm", **shape):
    """Nothing in it is zero."""
    model = random_model(head, **{"n_head": 4, "n_kv_head": 2, "n_layer": 2, **shape})
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model


def tuned(tune, seed=0, head="lm", dtype=torch.float64, shape={}, **flags):  # noqa: B006
    """A model whose delta is random: at its start it is the base, which would hide every bug."""
    model = base(head, **shape)
    attach(model, flags_of(tune, **flags), BORN)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model.to(dtype)


def ids_of(B, T, seed=0):
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- what a delta is -------------------------------------------------------------------------------------

@every_method
@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("held, shape", [("float", {}), ("int8", {}), ("float", {
    "n_embd": 128, "bias": True, "norm": "layer", "position": "learned"})])
def test_the_start_is_the_base_and_off_always_is(tune, head, held, shape):
    """Bit for bit, also where deltas are random, inside a second off(), after an error, while a text grows.
    Prefix and prompt alone are another model from the start, and dora with biases in its last bits. (In int8
    the base is what int8 holds.)"""
    ids, fresh = ids_of(2, 9), base(head, **shape)
    attach(fresh, flags_of(tune, base=held), BORN)
    plain = base_of(fresh)(ids)
    with torch.no_grad():
        assert torch.equal(plain, base(head, **shape)(ids)) or held == "int8"
        assert torch.equal(fresh(ids), plain) == (tune in AS_BASE) or shape and tune == "dora"
        model = tuned(tune, head=head, dtype=torch.float32, base=held, shape=shape)
        before = model(ids)
        assert not torch.allclose(before, plain, atol=1e-3)
        with contextlib.suppress(ZeroDivisionError), off(model):
            with off(model):
                assert torch.equal(model(ids), plain)
            assert torch.equal(model(ids), plain)
            if head == "lm" and held == "float":
                replies = (generate(one, [[1, 2], [3]], max_new_tokens=4) for one in (model, base(**shape)))
                assert next(replies) == next(replies)
            raise ZeroDivisionError
        assert torch.equal(model(ids), before)
    with pytest.raises(RuntimeError, match="no_grad"), off(model):
        pass


@every_method
@pytest.mark.parametrize("held", ["float", "int8"])
def test_the_delta_moves_and_the_base_does_not(tune, held):
    """In three steps of descent, all of the one and nothing of the other. (While B is 0, A rests.)"""
    model = base()
    attach(model, flags_of(tune, base=held), BORN)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    for _ in range(3):
        ids = ids_of(2, 12, seed=1)
        loss = -model(ids, ids.roll(-1, 1), segment_ids=torch.arange(12)[None].expand(2, -1) // 6).sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        for p, grad in zip(trained, torch.autograd.grad(loss, trained)):
            p.data -= 1e-3 * grad
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == set(model.delta.names)


def test_the_counts_are_the_formulas():
    """Trained numbers for G < H: C 32, H 4, G 2, D 8, L 2, and h, the MLP's width."""
    C, HD, GD, L, r, P = 32, 32, 16, 2, 3, 2
    h = base().config.mlp_hidden
    matrices = [(C, HD + 2 * GD), (HD, C), (C, 2 * h), (h, C)]  # in, out
    rows = sum(b for _, b in matrices)
    block = sum(a * b for a, b in matrices) + 2 * C + 2 * 8
    low = r * sum(a + b for a, b in matrices)
    counts = {"lora": L * low, "dora": L * (low + rows), "adapter": L * 2 * (2 * C * r + r + C),
              "prefix": 2 * L * P * GD, "prompt": P * C, "bias": L * rows,
              "norm": (2 * L + 1) * C + 2 * L * 8, "last": block + C}
    for tune, count in counts.items():
        model = tuned(tune)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count, tune


# ---- formulas --------------------------------------------------------------------------------------------

def layer(kind, **flags):
    """A layer of float64 with random everything, and its cfg."""
    cfg, generator = flags_of(kind, **flags), torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(7, 5, bias=kind == "dora")
    made = Tuned(linear, kind, cfg, lambda *shape: torch.randn(shape, generator=generator)).double()
    for name in made.names:
        getattr(made, name).data += torch.randn(getattr(made, name).shape, generator=generator)
    return made, cfg


def test_lora_by_hand():
    """y = W x + s B A x;  dL/dA = s B^T g x^T,  dL/dB = s g (A x)^T, with s = alpha / rank."""
    part, cfg = layer("lora")
    x, g, s = torch.randn(1, 7).double(), torch.randn(1, 5).double(), cfg.alpha / cfg.rank
    y = part(x)
    torch.testing.assert_close(y, x @ (part.weight + s * part.B @ part.A).T)
    dA, dB = torch.autograd.grad(y, (part.A, part.B), g)
    torch.testing.assert_close(dA, s * part.B.T @ g.T @ x)
    torch.testing.assert_close(dB, s * g.T @ (x @ part.A.T))
    assert torch.autograd.gradcheck(part, x.requires_grad_())


def test_dora_by_hand():
    """The weight materialised: m V / |V| per row. The gradient takes |V| for a constant: that of V is
    g (m / |V|), not its projection."""
    part, cfg = layer("dora")
    x, g, s = torch.randn(4, 7).double(), torch.randn(4, 5).double(), cfg.alpha / cfg.rank
    A, B, m = (p.detach().clone().requires_grad_() for p in (part.A, part.B, part.m))
    V = part.weight.detach() + s * B @ A
    ours = torch.autograd.grad(part(x), (part.A, part.B, part.m), g)
    for lengths, same in ((V.norm(dim=1).detach(), True), (V.norm(dim=1), False)):
        y = F.linear(x, m[:, None] * V / lengths[:, None], part.bias.detach())
        torch.testing.assert_close(part(x), y)
        theirs = torch.autograd.grad(y, (A, B, m), g, retain_graph=True)
        assert all(torch.allclose(a, b) for a, b in zip(ours, theirs)) == same


def test_int8_is_near_by_row():
    """|W - scale q| <= scale / 2, scale = max |row| / 127; a row of zeros stays one; the gradient is W's."""
    linear = torch.nn.Linear(7, 5, bias=False)
    linear.weight.data[1], linear.weight.data[2] = 0, linear.weight.data[2] * 100
    part = Tuned(linear, "", DeltaConfig(base="int8"), None)
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((part.q * part.scale - linear.weight).abs() <= scale / 2 + 1e-7).all()
    x = torch.randn(3, 7, requires_grad=True)
    torch.testing.assert_close(part(x), x @ (part.q * part.scale).T)
    grad, = torch.autograd.grad(part(x).sum(), x)
    torch.testing.assert_close(grad, (part.q * part.scale).sum(0).expand(3, -1))


def test_rank_and_alpha():
    """A stacked twice and B halved and stacked: the same at (2 rank, 2 alpha)."""
    (one, _), (two, _) = layer("lora"), layer("lora", rank=6, alpha=10.0)
    two.weight, two.A.data = one.weight, torch.cat((one.A, one.A))
    two.B.data, x = torch.cat((one.B, one.B), 1) / 2, torch.randn(2, 7).double()
    torch.testing.assert_close(one(x), two(x))


def test_adapter_by_hand():
    """y + W_up gelu(W_down y + b_down) + b_up, behind the matrix."""
    part, _ = layer("adapter")
    x = torch.randn(2, 7).double()
    y = x @ part.weight.T
    delta = F.gelu(y @ part.down.T + part.down_bias) @ part.up.T + part.up_bias
    torch.testing.assert_close(part(x), y + delta)


def test_ladder_by_hand():
    """Its formula, with the blocks themselves for oracles."""
    model, ids = tuned("ladder"), ids_of(2, 9)
    rope = [turn[None, :9, None] for turn in (model.cos, model.sin)]
    h = model.embed(ids)
    s = h @ model.blocks[0].map.weight.T
    for below, side in zip(model.blocks[::2], model.blocks[1::2]):
        h, mu = below.module(h, rope), (10 * side.a).sigmoid()
        s = side.module(mu * s + (1 - mu) * h @ side.map.weight.T, rope)
    h = model.norm.module(h + s @ model.norm.map.weight.T)
    torch.testing.assert_close(model(ids), model.head(h))


def test_weight_decay_is_of_matrices():
    """A and B shrink towards the base, DoRA's lengths do not."""
    model = tuned("dora", dtype=torch.float32, targets="qkv")
    zero = Zero(model, units=model.units())
    assert {slot.places[0][2]: len(slot.shape) for unit in zero.trained for slot in unit.slots} == {
        "A": 2, "B": 2, "m": 1}


def test_only_the_targets():
    assert {name.split(".")[-2] for name in tuned("lora", targets="qkv,up").delta.names} == {"qkv", "up"}


def test_a_delta_of_v_alone_moves_v_alone():
    """Rows of qkv: H heads of q, G of k, G of v."""
    model = tuned("lora", targets="qkv")
    part = model.blocks[0].attn.qkv
    part.B.data[:32 + 16] = 0
    x = torch.randn(2, 3, 32).double()
    q, k, v = (part(x) - F.linear(x, part.weight)).split((32, 16, 16), -1)
    assert not q.any() and not k.any() and v.all()


def test_prefix_is_two_attentions_in_one():
    """Over a prefix and the text = the two results, weighed by their sums of e^score."""
    model, x = tuned("prefix"), torch.randn(3, 4, 6, 8).double()
    prefix = model.blocks[0].attn.attend
    k, v = torch.randn(2, 3, 2, 6, 8).double()
    out = prefix(x, k, v, segment_ids=None, kv_segment_ids=None)
    K, V = (y.repeat_interleave(2, 1) for y in (k, v))  # each head of k serves two of q
    PK, PV = (own.detach().repeat_interleave(2, 0) for own in (prefix.keys, prefix.values))
    text = (x @ K.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf)
    own = x @ PK.mT / 8**0.5
    weight = (own.logsumexp(-1) - text.logsumexp(-1)).sigmoid()[..., None]
    torch.testing.assert_close(out, weight * (own.softmax(-1) @ PV) + (1 - weight) * (text.softmax(-1) @ V))


@pytest.mark.parametrize("shape", [{}, {"position": "learned", "norm": "layer"}])
def test_a_prompt_is_embeddings_in_front(shape):
    """The same as if its rows were words of the vocabulary that every text begins with."""
    model, plain, ids = tuned("prompt", shape=shape), base(**shape).double(), ids_of(2, 9)
    plain.embed.weight.data[:2] = model.prompt.rows.data
    words = torch.tensor([[0, 1]]).expand(2, -1)
    torch.testing.assert_close(model(ids), plain(torch.cat((words, ids), 1))[:, 2:])
    assert model(ids_of(1, plain.config.max_seq_len - 2)).isfinite().all()
    with pytest.raises(UserError, match="exceeds max_seq_len"):
        model(ids_of(1, plain.config.max_seq_len - 1))


@every_method
def test_packed_texts_are_texts_alone(tune):
    """Also with a prefix, which every document in a row sees for itself."""
    model, texts = tuned(tune), [ids_of(1, n, seed=n)[0].tolist() for n in (5, 9, 3)]
    ids, targets, segments = collate(texts, [[1] * len(text) for text in texts], [[0, 1], [2]])
    packed = model(ids, targets, segment_ids=segments)
    alone = sum(model(*(x for x in collate([text], [[1] * len(text)])[:2])).sum() for text in texts)
    torch.testing.assert_close(packed.sum(), alone)


@every_method
@pytest.mark.parametrize("held", ["float", "int8"])
def test_generation_is_the_forward_pass(tune, held):
    """Token by token from a cache, prompts of unequal length: the log-probabilities of one whole pass."""
    model, prompts = tuned(tune, dtype=torch.float32, base=held), [[5, 6, 7, 8], [9], [9], [1, 2]]
    new, logps = generate(model, prompts, max_new_tokens=6, return_logp=True)
    for prompt, reply, logp in zip(prompts, new, logps):
        ids = torch.tensor([prompt + reply])
        whole = model(ids[:, :-1], ids[:, 1:])[0, len(prompt) - 1:]
        torch.testing.assert_close(whole, torch.tensor(logp), rtol=1e-4, atol=1e-4)


def test_no_gradient_enters_the_base_of_a_ladder():
    """Nothing that autograd keeps is a weight of the base's blocks, and all of the side has a gradient."""
    model, kept = tuned("ladder", dtype=torch.float32), set()
    inside = {p.data_ptr() for rung in model.blocks if rung.place == "base" for p in rung.parameters()}
    ids = ids_of(2, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.data_ptr()) or x, lambda x: x):
        loss = model(ids, ids).sum()
    loss.backward()
    assert inside and not inside & kept
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


# ---- merged, saved, read ---------------------------------------------------------------------------------

@pytest.mark.parametrize("tune", PLAIN)
@pytest.mark.parametrize("held", ["float", "int8"])
@pytest.mark.parametrize("shape", [{}, {"bias": True, "norm": "layer", "tie_embeddings": True}])
def test_merged_is_tuned(tune, held, shape):
    """A plain model of the same logits, whatever its head; its delta apart. int8 is merged as it was held."""
    for head in ("lm", "scalar"):
        model = tuned(tune, head=head, dtype=torch.float32, base=held, shape=shape, targets="qkv,down")
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        file = final_of(model)(weights)["delta.pt"]
        plain = GPT(model.config, head)
        plain.load_state_dict(weights)
        ids = ids_of(2, 11)
        with torch.no_grad():
            torch.testing.assert_close(plain(ids), model(ids), rtol=1e-5, atol=1e-5)
        assert file["weights"].keys() == {*model.delta.names} and file["base"] == "abc"
        if shape.get("tie_embeddings") and head == "lm":
            assert weights["embed.weight"] is weights["head.weight"] or torch.equal(
                weights["embed.weight"], weights["head.weight"])
    assert final_of(base())({}) == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save_chat_model(folder / "base")
    save_chat_model(folder / "other", seed=2)
    save_chat_model(folder / "rm", head="scalar")
    write(folder / "ranked.jsonl", ranked())
    write(folder / "chats.jsonl", [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in range(40)])
    return folder


def flags(folder, out, *more):
    return ["--init", f"{folder}/base", "--out", f"{folder}/{out}", "--device", "cpu", "--batch_size", "4",
            "--steps", "4", "--lr", "1e-2", "--rank", "2", "--length", "1", "--log_every", "1", *more]


def start_again(folder, out):
    """Resume a copy of the run from its checkpoint before the last."""
    shutil.copytree(folder / out, folder / f"{out}-resumed")
    for name in ("final", "step-00000004"):
        shutil.rmtree(folder / f"{out}-resumed" / name)
    return ["--out", f"{folder}/{out}-resumed", "--resume"]


@every_method
def test_a_run_and_its_reader(folder, tune, capsys):
    """SFT stopped and resumed = unbroken, to the last bit. The delta on its base says what the merged model
    says; where there is none, it is refused without its base. So is the delta of another base."""
    data = flags(folder, tune, "--data", f"{folder}/chats.jsonl", "--tune", tune, "--save_every", "2")
    run_script("train_sft", data)
    run_script("train_sft", data + start_again(folder, tune))
    same_metrics(folder / tune, folder / f"{tune}-resumed", 0.0)
    deltas = [torch.load(folder / out / "final" / "delta.pt")["weights"] for out in (tune, f"{tune}-resumed")]
    assert all(torch.equal(x, deltas[1][name]) for name, x in deltas[0].items())
    if tune in PLAIN:
        with pytest.raises(UserError, match="has another delta"):
            run_script("train_sft", [*data, "--resume", "--alpha", "3", "--steps", "5"])
    assert curve(folder / tune)[-1][1] < curve(folder / tune)[0][1] or tune not in AS_BASE
    model, tokenizer, config = load_tuned(f"{folder}/base", f"{folder}/{tune}", head="lm")
    assert config["run"]["tune"] == tune and config["chat_template"]
    ids = ids_of(1, 8)
    if tune in PLAIN:
        torch.testing.assert_close(load_tuned(f"{folder}/{tune}")[0](ids), model(ids), rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(UserError, match="holds a delta alone"):
            load_tuned(f"{folder}/{tune}")
    with pytest.raises(UserError, match="delta of another model"):
        load_tuned(f"{folder}/other", f"{folder}/{tune}")
    sample.main(["--model", f"{folder}/base", "--delta", f"{folder}/{tune}", "--chat", "--prompt", "Say 1",
                 "--temperature", "0", "--max_new_tokens", "5"])
    assert capsys.readouterr().out


@pytest.mark.parametrize("tune", PLAIN)
def test_a_run_in_16_bits_leaves_the_base_as_it_was(folder, tune):
    """The merged model is the float32 base with the delta, not the base as 16 bits had rounded it."""
    out = f"{folder}/16-{tune}"
    run_script("train_sft", flags(folder, f"16-{tune}", "--data", f"{folder}/chats.jsonl", "--tune", tune,
                                  "--dtype", "bfloat16"))
    merged, apart = load_tuned(out)[0], load_tuned(f"{folder}/base", out)[0]
    torch.testing.assert_close(merged(ids_of(2, 9)), apart(ids_of(2, 9)), rtol=1e-4, atol=1e-4)


@every_method
def test_dpo_has_its_reference_inside(folder, tune):
    """The same numbers as with a second model for the reference. Where the start is the base, h begins 0."""
    data = flags(folder, f"dpo-{tune}", "--data", f"{folder}/ranked.jsonl", "--tune", tune)
    run_script("train_dpo", data)
    run_script("train_dpo", [*data, "--ref", f"{folder}/base", "--out", f"{folder}/dpo-{tune}-2"])
    same_metrics(folder / f"dpo-{tune}", folder / f"dpo-{tune}-2", 0.0)
    first = metrics(folder / f"dpo-{tune}")[0]
    assert (first["rewards/margins"] == 0.0) == (tune in AS_BASE)


@pytest.mark.parametrize("tune", ["lora", "last", "prompt"])
def test_reward_models_and_ppo(folder, tune):
    """PPO's KL starts at 0 where the start is the base, and the sampler sees the model that is trained. The
    mean reward is taken off the head of a reward model, in both of its files."""
    ppo, data = f"{folder}/ppo-{tune}", ["--data", f"{folder}/ranked.jsonl", "--tune", tune]
    run_script("train_ppo", flags(folder, f"ppo-{tune}", *data, "--reward_model", f"{folder}/rm",
                                  "--steps", "2", "--minibatches", "2", "--max_new_tokens", "8"))
    assert (metrics(ppo)[0]["eval_kl"] == 0.0) == (tune in AS_BASE)
    assert max(event.get("val/sampler_gap", 0.0) for event in metrics(ppo)) < 1e-4
    if tune in PLAIN:
        run_script("train_rm", flags(folder, f"rm-{tune}", *data))
        model, _, config = load_tuned(f"{folder}/rm-{tune}", head="scalar")
        delta = torch.load(folder / f"rm-{tune}" / "final" / "delta.pt")["weights"]
        assert config["head"] == "scalar" and torch.equal(model.head.bias, delta["head.tuned.bias"])
        assert any(event.get("reference_mean") for event in metrics(folder / f"rm-{tune}"))
        assert model.head.bias != 0
        with pytest.raises(UserError, match="delta of another model"):
            load_tuned(f"{folder}/base", f"{folder}/rm-{tune}", head="lm")


@pytest.mark.parametrize("tune", ["lora", "dora", "ladder", "prefix", "prompt", "norm", "last"])
def test_every_stage_of_zero(folder, tune):
    """Two ranks, sharded, offloaded, blocks computed again in backward: the numbers of one process. Stage 3
    computes nothing again, so that it must fetch the weights of both halves of a block."""
    data = flags(folder, f"zero-{tune}", "--data", f"{folder}/chats.jsonl", "--tune", tune,
                 *["--base", "int8"] * (tune in ("lora", "ladder")))
    run_script("train_sft", data)
    for stage, more in enumerate(([], [], ["--offload", "optim"], ["--offload", "optim,params,acts"])):
        out = f"{folder}/zero-{tune}-{stage}"
        again = ["--activation_checkpointing"] if tune != "prompt" and stage != 3 else []
        run_script("train_sft", [*data, "--out", out, "--zero", str(stage), *again, *more], world=2)
        same_metrics(folder / f"zero-{tune}", out, 1e-5)


def bytes_of(stages, tune):
    found = []
    for stage in stages:
        model = base(n_embd=64)
        attach(model, DeltaConfig(tune=tune, rank=4), BORN)
        numbers = [0, 0]
        for p in model.parameters():
            numbers[not p.requires_grad] += p.numel()
        found.append((held(Zero(model, units=model.units(), stage=stage)), *numbers))
    return found


@pytest.mark.parametrize("tune", ["lora", "norm"])
def test_what_is_frozen_has_no_gradients_and_no_moments(tune):
    """Bytes held by each of two ranks: by zero.py's table of what is trained, of the rest the weights."""
    per_weight = [(16, 4), (4 + 4 + 8 / 2, 4), (4 + (4 + 8) / 2, 4), (16 / 2, 4 / 2)]  # trained, frozen
    for (found, trained, frozen), (a, b) in zip(ranks().run(2, bytes_of, range(4), tune)[0], per_weight):
        assert found == pytest.approx(a * trained + b * frozen, rel=0.01)


@pytest.mark.parametrize("script, tune, bad", [
    ("train_sft", "lora", "--targets qkv,head"), ("train_sft", "lora", "--rank 0"),
    ("train_sft", "", "--base int8"), ("train_sft", "prompt", "--activation_checkpointing"),
    ("train_sft", "adapter", "--targets qkv"), ("train_sft", "last", "--length 2"),
    ("train_sft", "prompt", "--length 96"), ("train_rm", "adapter", "")])
def test_flags_that_do_not_fit(folder, script, tune, bad):
    """One line that names them, before anything is written."""
    data = ["--data", f"{folder}/ranked.jsonl", "--tune", tune, *bad.split()]
    with pytest.raises(UserError, match=bad or "--tune adapter"):
        run_script(script, flags(folder, "bad", *data))
    assert not (folder / "bad").exists()
