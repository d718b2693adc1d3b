"""Rows end to end: no row sees another, and the loss is the padded batch's."""

from __future__ import annotations

import pytest
from drill import folder_of, pairs, train
from tiny import FAMILIES

from llmnb.errors import ConfigError

# OPT makes a mask of its own, and its rows see each other: it is padded.
KEPT_APART = [family for family in FAMILIES if family != "opt"]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def loaded(family):
    return transformers.AutoModelForCausalLM.from_pretrained(folder_of(family)).eval()


def logits_of(model, ids, places):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([places]), use_cache=False).logits[0]


class Watched(transformers.TrainerCallback):
    """The gradient of each step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parts = [p.grad.detach().flatten() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(parts).clone())


def observed(folder, *, packed, family="llama", lora=False, **options):
    watched = Watched()
    drill = train(
        folder,
        base=folder_of(family),
        documents=pairs(11),
        config={"padding_free": packed, "use_lora": lora, "train_on": "answers"},
        trainer_kwargs={"callbacks": [watched]},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        **options,
    )
    return drill, watched.gradients


@pytest.mark.parametrize("family", KEPT_APART)
def test_trap11_the_second_row_of_a_pack_has_the_logits_it_has_alone(family):
    from llmnb.engine.packing import FlatCollator, leak

    model = loaded(family)
    first = {"input_ids": [5, 9, 17, 33, 2], "labels": [-100, 9, 17, 33, 2]}
    second = {"input_ids": [7, 8, 80, 11], "labels": [-100, -100, 80, 11]}
    pack = FlatCollator()([first, second])
    together = logits_of(model, pack["input_ids"][0].tolist(), pack["position_ids"][0].tolist())
    alone = logits_of(model, second["input_ids"], [0, 1, 2, 3])
    assert torch.allclose(together[5:], alone, atol=1e-5)
    assert leak(model) < 1e-4


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
@pytest.mark.parametrize("family", KEPT_APART)
def test_losses_and_gradients_are_those_of_padded_batches(family, lora, tmp_path):
    flat, mine = observed(tmp_path / "flat", packed=True, family=family, lora=lora)
    padded, theirs = observed(tmp_path / "padded", packed=False, family=family, lora=lora)
    assert flat.counts["padding_free"] is True and "padding_free" not in padded.counts
    assert flat.losses() == pytest.approx(padded.losses(), abs=1e-5)
    assert len(mine) == len(theirs) == 4
    assert torch.allclose(mine[0], theirs[0], atol=1e-5 * float(theirs[0].abs().max()) + 1e-8)
    assert flat.counts["steps"] == padded.counts["steps"]


def test_evaluations_are_as_they_were(tmp_path):
    options = {"sets": {"valid": pairs(5)}, "eval_strategy": "steps", "eval_steps": 2}
    flat, _ = observed(tmp_path / "flat", packed=True, **options)
    padded, _ = observed(tmp_path / "padded", packed=False, **options)
    assert flat.result.metrics["eval_loss"] == pytest.approx(padded.result.metrics["eval_loss"], abs=1e-5)


def test_trap11_a_model_whose_rows_see_each_other_is_padded(tmp_path):
    from llmnb.engine.packing import leak

    assert leak(loaded("opt")) > 0.1
    drill, _ = observed(tmp_path / "flat", packed=True, family="opt")
    assert drill.counts["padding_free"] is False
    assert [n for n in drill.notes if n.level == "warning" and "sees the row before it" in n.text]
    padded, _ = observed(tmp_path / "padded", packed=False, family="opt")
    assert drill.losses() == padded.losses()


def test_a_classifier_refuses(tmp_path):
    with pytest.raises(ConfigError, match="padding_free"):
        train(
            tmp_path,
            documents=[{"_id": i, "text": "one two", "label": i % 2} for i in range(6)],
            spec={"task": "text-classification"},
            config={"padding_free": True, "key": ("text", "label")},
        )
