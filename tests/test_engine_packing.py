"""Rows end to end: no row sees another, and the loss is the padded batch's."""

from __future__ import annotations

import pytest
from drill import folder_of, gradients_of_steps, pairs, train
from tiny import FAMILIES

from llmnb.errors import ConfigError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def loaded(family):
    return transformers.AutoModelForCausalLM.from_pretrained(folder_of(family)).eval()


def logits_of(model, ids, places):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([places]), use_cache=False).logits[0]


def observed(folder, *, packed, family="llama", lora=False, base=None, more=None, **options):
    watched = gradients_of_steps()
    drill = train(
        folder,
        base=base or folder_of(family),
        documents=pairs(11),
        config={
            "padding_free": packed,
            "fused_lora": False if packed is False else None,  # plain: padded, and LoRA by peft
            "use_lora": lora,
            "train_on": "answers",
            **(more or {}),
        },
        trainer_kwargs={"callbacks": [watched]},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        **options,
    )
    return drill, [torch.cat([g.flatten() for g in step.values()]) for step in watched.gradients]


@pytest.mark.parametrize("family", FAMILIES)
def test_trap11_the_second_row_of_a_pack_has_the_logits_it_has_alone(family):
    from llmnb.engine import attention
    from llmnb.engine.packing import FlatCollator, keep_apart, leak

    model = loaded(family)
    first = {"input_ids": [5, 9, 17, 33, 2], "labels": [-100, 9, 17, 33, 2]}
    second = {"input_ids": [7, 8, 80, 11], "labels": [-100, -100, 80, 11]}
    alone = logits_of(model, second["input_ids"], [0, 1, 2, 3])
    assert keep_apart(model) is None
    pack = FlatCollator()([first, second])
    with attention.rows(pack["position_ids"]):
        together = logits_of(model, pack["input_ids"][0].tolist(), pack["position_ids"][0].tolist())
    assert torch.allclose(together[5:], alone, atol=1e-5)
    between, beside = leak(model)
    assert between == 0.0 and beside < 1e-4


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("how", ["bfloat16", 4, 8])
def test_rounding_is_no_leak(how):
    from llmnb.config import ModelSpec
    from llmnb.engine.bases import load_base
    from llmnb.engine.packing import keep_apart

    kwargs = {"dtype": "bfloat16"} if how == "bfloat16" else {}
    spec = ModelSpec(model_name_or_path=str(folder_of()), model_kwargs=kwargs)
    model, _ = load_base(spec, bits=None if how == "bfloat16" else how, training=True)
    assert keep_apart(model) is None


def test_trap11_the_label_at_each_seam_is_masked():
    from tiny import make_tokenizer

    from llmnb.config import TrainConfig
    from llmnb.engine.packing import FlatCollator
    from llmnb.engine.rows import make_rows

    rows = make_rows(pairs(6), make_tokenizer(), TrainConfig(train_on="all"))
    pack = FlatCollator()(list(rows))
    seams = pack["position_ids"][0] == 0
    assert int(seams.sum()) == 6
    assert (pack["labels"][0][seams] == -100).all()
    assert (pack["labels"][0][~seams] != -100).all()
    assert pack["input_ids"].shape == (1, sum(rows.lengths))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_padded_batches(family, lora, tmp_path):
    flat, mine = observed(tmp_path / "flat", packed=True, family=family, lora=lora)
    padded, theirs = observed(tmp_path / "padded", packed=False, family=family, lora=lora)
    assert flat.counts["padding_free"] is True and "padding_free" not in padded.counts
    assert flat.losses() == pytest.approx(padded.losses(), abs=1e-5)
    assert len(mine) == len(theirs) == 3
    assert torch.allclose(mine[0], theirs[0], atol=1e-5 * float(theirs[0].abs().max()) + 1e-8)
    assert flat.counts["steps"] == padded.counts["steps"]


def test_evaluations_are_as_they_were(tmp_path):
    options = {"sets": {"valid": pairs(5)}, "eval_strategy": "steps", "eval_steps": 2}
    flat, _ = observed(tmp_path / "flat", packed=True, **options)
    padded, _ = observed(tmp_path / "padded", packed=False, **options)
    assert flat.result.metrics["eval_loss"] == pytest.approx(padded.result.metrics["eval_loss"], abs=1e-5)


@pytest.fixture
def convolutions(tmp_path):
    """A model whose convolutions run on from one row into the next."""
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    config = transformers.Lfm2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    transformers.Lfm2ForCausalLM(config).save_pretrained(tmp_path / "lfm2")
    tokenizer.save_pretrained(tmp_path / "lfm2")
    return tmp_path / "lfm2"


def test_trap11_a_model_whose_rows_see_each_other_is_padded(convolutions, tmp_path, monkeypatch):
    drill, _ = observed(tmp_path / "flat", packed=True, base=convolutions)
    assert drill.counts["padding_free"] is False
    assert [n for n in drill.notes if n.level == "warning" and "sees the row before it" in n.text]
    padded, _ = observed(tmp_path / "padded", packed=False, base=convolutions)
    assert drill.losses() == padded.losses()


def test_attention_by_row_sees_a_window_of_it(tmp_path):
    """Mistral's window: rows that are longer than it."""
    base = folder_of("mistral", sliding_window=3)
    flat, mine = observed(tmp_path / "flat", packed=True, base=base)
    padded, theirs = observed(tmp_path / "padded", packed=False, base=base)
    assert flat.counts["padding_free"] is True
    assert flat.losses() == pytest.approx(padded.losses(), abs=1e-5)
    assert torch.allclose(mine[0], theirs[0], atol=1e-5 * float(theirs[0].abs().max()) + 1e-8)


def test_checkpointed_layers_are_computed_again_by_row(tmp_path):
    flat, _ = observed(tmp_path / "flat", packed=True, gradient_checkpointing=True)
    padded, _ = observed(tmp_path / "padded", packed=False)
    assert flat.losses() == pytest.approx(padded.losses(), abs=1e-5)


def test_a_classifier_refuses(tmp_path):
    with pytest.raises(ConfigError, match="padding_free"):
        train(
            tmp_path,
            documents=[{"_id": i, "text": "one two", "label": i % 2} for i in range(6)],
            spec={"task": "text-classification"},
            config={"padding_free": True, "key": ("text", "label")},
        )


def test_packs_are_on_where_the_model_allows_and_off_when_told(tmp_path, convolutions):
    unasked, _ = observed(tmp_path / "unasked", packed=None)
    assert unasked.counts["padding_free"] is True and unasked.counts["chunked_loss"] is True
    off, _ = observed(tmp_path / "off", packed=False)
    assert "padding_free" not in off.counts
    assert unasked.losses() == pytest.approx(off.losses(), abs=1e-5)
    cannot, _ = observed(tmp_path / "cannot", packed=None, base=convolutions)
    said = [n for n in cannot.notes if "padding_free is off" in n.text]
    assert cannot.counts["padding_free"] is False and [n.level for n in said] == ["info"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_in_parts_is_the_same_batch(family, tmp_path):
    whole, mine = observed(tmp_path / "whole", packed=True, family=family)
    parts, theirs = observed(tmp_path / "parts", packed=True, family=family, more={"max_tokens_per_batch": 20})
    assert parts.losses() == pytest.approx(whole.losses(), abs=1e-5)
    assert torch.allclose(mine[0], theirs[0], atol=1e-5 * float(theirs[0].abs().max()) + 1e-8)


def test_on_a_cpu_a_batch_goes_through_the_model_in_parts_unless_told(tmp_path, monkeypatch):
    from llmnb.engine import packing, training

    seen = []
    real = packing.divide
    monkeypatch.setattr(packing, "divide", lambda pack, most: seen.append(most) or real(pack, most))
    whole, _ = observed(tmp_path / "whole", packed=True)
    assert set(seen) == {training._CPU_TOKENS} == {whole.counts["max_tokens_per_batch"]}
    monkeypatch.setattr(training, "_CPU_TOKENS", 20)
    parts, _ = observed(tmp_path / "parts", packed=True)
    assert parts.losses() == pytest.approx(whole.losses(), abs=1e-5) and parts.counts["max_tokens_per_batch"] == 20
    told, _ = observed(tmp_path / "told", packed=True, more={"max_tokens_per_batch": 100_000})
    assert told.counts["max_tokens_per_batch"] == 100_000 and set(seen) == {1024, 20, 100_000}


@pytest.mark.parametrize(
    ("lengths", "most", "parts"),
    [([3, 4, 2], 9, [9]), ([3, 4, 2], 8, [7, 2]), ([3, 4, 2], 4, [3, 4, 2]), ([3, 9, 2], 4, [3, 9, 2]), ([5], 2, [5])],
)
def test_a_pack_is_divided_at_rows(lengths, most, parts):
    from llmnb.engine.packing import FlatCollator, divide

    pack = FlatCollator()([{"input_ids": [7] * n, "labels": [-100] * n} for n in lengths])
    found = divide(pack, most)
    assert [part["input_ids"].shape[1] for part in found] == parts
    assert torch.equal(torch.cat([part["position_ids"] for part in found], 1), pack["position_ids"])


def test_parts_are_told_of_when_there_are_none(tmp_path):
    drill, _ = observed(tmp_path, packed=False, more={"max_tokens_per_batch": 20})
    assert [n for n in drill.notes if n.level == "warning" and "max_tokens_per_batch has no effect" in n.text]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("window", [None, 3])
def test_all_rows_at_once_on_a_gpu_are_the_rows_one_by_one(window):
    """Outputs and gradients of ``varlen_attn``, fewer key-value heads than heads, against the loop over rows."""
    from llmnb.engine import attention

    torch.manual_seed(0)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]], device="cuda")
    made = [torch.randn(1, heads, 10, 16, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    found = []
    for kind in (torch.bfloat16, torch.float32):
        given = [part.to(kind).requires_grad_() for part in made]
        with attention.rows(places):
            out, _ = attention._attend(torch.nn.Module(), *given, None, sliding_window=window)
        out.float().pow(2).sum().backward()
        found.append([out.float(), *(part.grad.float() for part in given)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, atol=0.05, rtol=0.05)


def test_all_rows_at_once_asks_for_the_rows_as_they_are(monkeypatch):
    """What ``varlen_attn`` is asked for; a reference in its place answers, for it runs on GPUs only."""
    from torch.nn.attention import varlen

    from llmnb.engine import attention

    def reference(query, key, value, ends, ends_too, longest, longest_too, *, scale, window_size, enable_gqa):
        assert enable_gqa and longest == longest_too == 5 and ends.tolist() == ends_too.tolist() == [0, 5, 7, 10]
        assert ends.dtype == torch.int32 and window_size[1] == 0
        out = []
        for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            q, k, v = (part[begin:end].transpose(0, 1)[None] for part in (query, key, value))
            at = torch.arange(end - begin)
            back = at[:, None] - at[None, :]
            seen = (back >= 0) & (back <= (window_size[0] if window_size[0] >= 0 else 99))
            row = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
            )
            out.append(row[0].transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", reference)
    torch.manual_seed(0)
    made = [torch.randn(1, heads, 10, 16) for heads in (4, 2, 2)]
    for window in (None, 3):
        with attention.rows(torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]])):
            one_by_one, _ = attention._attend(torch.nn.Module(), *made, None, sliding_window=window)
            at_once = attention._at_once(*made, None, window)
        assert torch.allclose(at_once, one_by_one, atol=1e-6)
