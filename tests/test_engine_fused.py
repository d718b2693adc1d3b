"""LoRA in one piece: peft's own outputs and gradients, for every base it is fused on; and where it is not."""

from __future__ import annotations

import contextlib

import pytest
from drill import folder_of, pairs, train
from tiny import FAMILIES

torch = pytest.importorskip("torch")

LINEAR = [family for family in FAMILIES if family != "gpt2"]  # whose layers are Conv1D


def wrapped(family="llama", bits=None, **settings):
    """A model with an adapter whose B is not zero, as it is after some steps."""
    from llmnb.config import ModelSpec, TrainConfig
    from llmnb.engine.adapters import attach_lora
    from llmnb.engine.bases import load_base

    base, _ = load_base(ModelSpec(model_name_or_path=str(folder_of(family))), bits=bits, training=True)
    torch.manual_seed(0)
    model = attach_lora(base, TrainConfig(**{"lora_dropout": 0.0, "lora_r": 4, **settings}))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def computed(model, precision=None):
    """Loss and gradients of a small batch, by name."""
    ids = torch.arange(5, 45).view(2, 20)
    half = torch.autocast("cpu", dtype=precision) if precision else contextlib.nullcontext()
    with half:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def close(mine, theirs, most):
    assert mine.keys() == theirs.keys() and len(mine) > 0
    for name, gradient in theirs.items():
        assert torch.allclose(mine[name], gradient, rtol=0, atol=most * float(gradient.abs().max())), name


@pytest.mark.parametrize("family", LINEAR)
def test_every_gradient_is_peft_s(family):
    from llmnb.engine.fused import fuse

    model = wrapped(family)
    loss, theirs = computed(model)
    assert fuse(model) == sum(1 for name in theirs if "lora_A" in name) > 0
    again, mine = computed(model)
    assert float(again) == pytest.approx(float(loss), abs=1e-6)
    close(mine, theirs, 1e-5)


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_keeps_its_own_product(bits):
    from llmnb.engine.fused import fuse

    model = wrapped(bits=bits)
    loss, theirs = computed(model, torch.bfloat16 if bits == 8 else None)
    assert fuse(model) > 0
    again, mine = computed(model, torch.bfloat16 if bits == 8 else None)
    assert float(again) == pytest.approx(float(loss), rel=1e-3)
    close(mine, theirs, 0.05 if bits == 8 else 1e-4)


def test_mixed_precision_rounds_no_more_than_peft():
    from llmnb.engine.fused import fuse

    model = wrapped()
    _, exact = computed(model)
    _, theirs = computed(model, torch.bfloat16)
    fuse(model)
    _, mine = computed(model, torch.bfloat16)

    def gap(found):
        return sum(float((found[name] - exact[name]).pow(2).sum()) for name in exact) ** 0.5

    assert gap(mine) < 1.2 * gap(theirs)
    assert all(gradient.dtype == torch.float32 for gradient in mine.values())


def test_what_is_trained_beside_lora_keeps_its_gradient():
    from llmnb.engine.fused import fuse

    model = wrapped("qwen2", lora_bias="all")  # its attention has biases
    _, theirs = computed(model)
    assert fuse(model) > 0
    _, mine = computed(model)
    assert any(name.endswith("base_layer.bias") for name in theirs)
    close(mine, theirs, 1e-5)


def test_it_keeps_no_more_for_the_backward_pass():
    from llmnb.engine.fused import fuse

    def kept(model):
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.arange(5, 45).view(2, 20)
        held = [p.untyped_storage().data_ptr() for p in model.parameters()]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids).logits.sum()
        found = sum(size for place, size in seen.items() if place not in held)
        loss.backward()
        return found

    model = wrapped()
    before = kept(model)
    fuse(model)
    assert kept(model) <= before


def test_an_adapter_that_is_off_is_off():
    from llmnb.engine.fused import fuse

    model = wrapped()
    ids = torch.arange(5, 45).view(2, 20)
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    fuse(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base)
    assert not torch.allclose(model(input_ids=ids).logits, base)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_layers_that_do_more_are_left_to_peft(settings):
    from llmnb.engine.fused import fuse

    assert fuse(wrapped(**settings)) == 0


def test_runs_say_whether_it_is_on(tmp_path):
    def run(name, **config):
        return train(tmp_path / name, documents=pairs(8), config=config, max_steps=3, logging_steps=1, seed=3)

    plain, fused = run("plain", fused_lora=False), run("fused")
    assert "fused_lora" not in plain.counts and fused.counts["fused_lora"] == fused.counts["modules"]
    assert fused.losses() == pytest.approx(plain.losses(), abs=1e-5)
    quiet = run("quiet", lora_dropout=0.1)
    assert quiet.counts["fused_lora"] == 0 and not [n for n in quiet.notes if "fused_lora" in n.text]
    asked = run("asked", lora_dropout=0.1, fused_lora=True)
    assert [n for n in asked.notes if n.level == "warning" and "lora_dropout is 0.1" in n.text]
