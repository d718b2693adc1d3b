"""The loss of a pack, a chunk of trained tokens at a time: the padded batch's loss and gradients, for every head."""

from __future__ import annotations

import pytest
from drill import folder_of, gradients_of_steps, pairs, train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
)
HEADS = {
    "tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "bias": lambda: transformers.PhiConfig(**SMALL),
    "capped": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "divided": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=8.0),
    "multiplied": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
}


def made(head, folder):
    """A folder with a model whose logits come about in one of the ways there are."""
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(HEADS[head]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # so that caps and scales matter
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder_of()).save_pretrained(folder)
    return folder


def observed(folder, base, packed, **arguments):
    watched = gradients_of_steps()
    drill = train(
        folder,
        base=base,
        documents=pairs(11),
        config={"padding_free": packed, "use_lora": False, "train_on": "answers"},
        trainer_kwargs={"callbacks": [watched]},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        **arguments,
    )
    return drill, watched.gradients[0]


@pytest.mark.parametrize(("head", "smoothing"), [*((head, 0.0) for head in HEADS), ("tied", 0.1)])
def test_loss_and_every_gradient_are_the_padded_batch_s(head, smoothing, tmp_path, monkeypatch):
    base = made(head, tmp_path / "base")
    monkeypatch.setattr("llmnb.engine.losses._CHUNK", 1)  # 16 tokens at a time: several chunks, the last one short
    flat, mine = observed(tmp_path / "flat", base, True, label_smoothing_factor=smoothing)
    padded, theirs = observed(tmp_path / "padded", base, False, label_smoothing_factor=smoothing)
    assert flat.counts["chunked_loss"] is True and "chunked_loss" not in padded.counts
    assert flat.losses() == pytest.approx(padded.losses(), abs=1e-5)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(mine[name], gradient, atol=1e-5 * max(float(gradient.abs().max()), 1e-3)), name


def test_whole_logits_never_exist(tmp_path, monkeypatch):
    """The output layer sees trained tokens only, and no more than a chunk of them."""
    seen = []
    forward = torch.nn.Linear.forward

    def watched(self, x):
        if self.out_features == 512:
            seen.append(x.shape[-2] if x.dim() > 1 else 0)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    monkeypatch.setattr("llmnb.engine.losses._CHUNK", 1)
    drill, _ = observed(tmp_path, folder_of(), True)
    assert drill.counts["chunked_loss"] is True
    assert max(seen[4:]) <= 16  # before: the comparison with the model's own loss
    # Each row is seen once, but for the rows that the last window of an epoch lacks.
    assert sum(seen[4:]) <= 2 * drill.counts["trained_tokens"]


def test_a_loss_of_ones_own_is_used(tmp_path):
    asked = []

    def loss(outputs, labels, num_items_in_batch=None):
        asked.append(tuple(outputs["logits"].shape))
        return outputs["logits"].float().pow(2).mean()

    drill = train(
        tmp_path,
        documents=pairs(8),
        config={"padding_free": True},
        trainer_kwargs={"compute_loss_func": loss},
        max_steps=2,
    )
    assert "chunked_loss" not in drill.counts and len(asked) == 2 and asked[0][0] == 1


def test_a_head_that_does_something_else_is_left_alone(tmp_path, monkeypatch):
    """What ``HeadLoss`` does not know shows in the comparison, and the model's own loss is kept."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaForCausalLM.forward

    def odd(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", odd)
    drill, _ = observed(tmp_path, folder_of(), True)
    assert drill.counts["chunked_loss"] is False and drill.counts["padding_free"] is True
