"""Training: every family, gradients, steps, stop and resume, best checkpoints, faults."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from drill import Drill, chats, folder_of, pairs, texts, train, weights
from tiny import FAMILIES

from llmnb.errors import AdapterMismatch, ConfigError, DataError, ModelError, RunError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HERE = Path(__file__).parent


class Gradients(transformers.TrainerCallback):
    """Keeps the gradient of each step as one vector, before it is clipped away."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.evaluations: list[float] = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.evaluations.append(metrics["eval_loss"])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parts = [p.grad.detach().flatten() for p in model.parameters() if p.grad is not None]
        self.steps.append(torch.cat(parts).clone())


def gradients(workdir, **options):
    """Gradients of each step at learning rate 0, so that every step sees the same weights."""
    return observed(workdir, **options).steps


def observed(workdir, *, batch, window, documents=None, config=None, base=None, trainer_kwargs=None, **arguments):
    """The same, and the losses of evaluations."""
    keep = Gradients()
    train(
        workdir,
        base=base,
        documents=documents if documents is not None else pairs(11),
        config={"use_lora": False, **(config or {})},
        trainer_kwargs={"callbacks": [keep], **(trainer_kwargs or {})},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=window,
        max_steps=None,
        num_train_epochs=1,
        learning_rate=1e-30,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        **arguments,
    )
    return keep


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance."""
    return float((a - b).norm() / b.norm())


# --- every family -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_every_family_learns(family, lora, tmp_path):
    run = train(
        tmp_path, base=folder_of(family), documents=chats(), config={"use_lora": lora}, max_steps=6, learning_rate=5e-3
    )
    losses = run.losses()
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.1, losses
    assert run.result.kind == ("adapter" if lora else "model")
    assert run.saved[-1]["step"] == 6 and run.saved[-1]["kind"] == run.result.kind
    assert run.counts["steps"] == run.result.last_step == 6


# --- gradients ----------------------------------------------------------------------------------------------


class Deaf(transformers.LlamaForCausalLM):
    """Takes keyword arguments and drops them: its loss is a mean over its own micro-batch, whatever it is told."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            scores, target = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            out["loss"] = torch.nn.functional.cross_entropy(scores, target, ignore_index=-100)
        return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "phi"])
def test_trap01_accumulation_is_normalised_by_trained_tokens(family, tmp_path):
    base = folder_of(family)
    whole = gradients(tmp_path / "8x1", batch=8, window=1, base=base)
    parts = gradients(tmp_path / "1x8", batch=1, window=8, base=base)
    assert len(whole) == len(parts) == 2  # the second window is partial: 3 rows
    for step, (a, b) in enumerate(zip(whole, parts), 1):
        assert close(b, a) < 1e-5, f"step {step}"
    assert close(whole[1], whole[0]) > 0.1  # the windows are different, so equal gradients are no accident


def test_trap01_equals_the_gradient_by_hand(tmp_path):
    documents = texts(8)
    (got,) = gradients(tmp_path, batch=2, window=4, documents=documents)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of())
    total, count = 0, 0
    for document in documents:
        ids = torch.tensor([tokenizer(document["text"])["input_ids"] + [tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    (total / count).backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert close(got, want) < 1e-5


def test_trap01_a_model_that_drops_the_count(tmp_path, monkeypatch):
    from llmnb.engine.loop import counts_tokens

    assert not counts_tokens(Deaf(transformers.AutoConfig.from_pretrained(folder_of())))
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **kw: Deaf.from_pretrained(name, **kw)
    )
    whole = gradients(tmp_path / "8x1", batch=8, window=1)
    parts = gradients(tmp_path / "1x8", batch=1, window=8)
    for a, b in zip(whole, parts):
        assert close(b, a) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_trap01_every_family_is_known_to_divide_by_the_count(family):
    from llmnb.engine.loop import counts_tokens

    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of(family)).eval()
    ids = torch.tensor([[1, 30, 40, 50, 60]])
    with torch.no_grad():
        mean = model(input_ids=ids, labels=ids).loss
        asked = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(8)).loss
    honours = bool(torch.isclose(asked, mean * 4 / 8))
    assert counts_tokens(model) == honours


def test_trap01_label_smoothing_and_lora(tmp_path):
    options = {"label_smoothing_factor": 0.1, "config": {"use_lora": True}}
    whole = gradients(tmp_path / "8x1", batch=8, window=1, **options)
    parts = gradients(tmp_path / "1x8", batch=1, window=8, **options)
    for a, b in zip(whole, parts):
        assert close(b, a) < 1e-5


RANK = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from pathlib import Path
work, base, rank = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
import test_engine_training as here
torch.save(here.{function}(work / "two", base, **{options!r}), work / f"seen{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


def two_ranks(tmp_path: Path, base: Path, function: str, **options):
    """What a function of this module gives on rank 0 of two processes over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(paths=[str(HERE), str(HERE.parent)], function=function, options=options))
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = []
    try:
        for rank in "01":
            env = {**os.environ, **meet, "RANK": rank, "LOCAL_RANK": rank}
            with open(tmp_path / f"log{rank}", "wb") as log:
                command = [sys.executable, str(script), str(tmp_path), str(base), rank]
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        for rank, process in enumerate(ranks):
            assert process.wait(timeout=400) == 0, (tmp_path / f"log{rank}").read_text()[-3000:]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
    return torch.load(tmp_path / "seen0.pt")


def seen_by_a_rank(workdir, base, **options):
    keep = observed(workdir, batch=1, window=4, base=base, **options)
    return keep.steps, keep.evaluations


def resumed_by_a_rank(workdir, base, *, cut, **options):
    """Losses of a whole run, and of one that goes on from ``cut``; the weights of both."""
    options = {"base": base, "documents": texts(12), "save_strategy": "steps", "save_steps": cut, **options}
    config = {"lora_dropout": 0.1}
    whole = train(workdir / "whole", config=config, **options)
    rest = train(workdir / "rest", config=config, resume=workdir / "whole/checkpoints" / f"checkpoint-{cut}", **options)
    last = f"checkpoints/checkpoint-{options['max_steps']}"
    return whole.losses(), rest.losses(), weights(workdir / "whole" / last), weights(workdir / "rest" / last)


@pytest.mark.slow
def test_trap01_on_two_ranks(tmp_path):
    base = folder_of()
    # 11 rows over 2 ranks: the last window has 3 rows, and one rank has fewer than the other. The same for the
    # evaluation's 5 rows.
    options = {"sets": {"valid": pairs(5)}, "eval_strategy": "steps", "eval_steps": 1}
    whole = observed(tmp_path / "one", batch=8, window=1, base=base, **options)
    steps, evaluations = two_ranks(tmp_path, base, "seen_by_a_rank", per_device_eval_batch_size=2, **options)
    assert len(steps) == len(whole.steps) == 2
    for step, (a, b) in enumerate(zip(whole.steps, steps), 1):
        assert close(b, a) < 1e-5, f"step {step}"
    assert len(evaluations) == 2
    assert evaluations == pytest.approx(whole.evaluations, abs=1e-5)


# --- steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "batch", "window", "epochs", "more", "steps"),
    [
        (11, 2, 2, 2, {}, 6),
        (11, 3, 4, 1, {}, 1),
        (13, 2, 3, 3, {}, 9),
        (7, 8, 1, 2, {}, 2),
        (11, 2, 2, 1.5, {}, 5),
        (11, 2, 2, 2, {"dataloader_drop_last": True}, 6),
        (11, 2, 2, 5, {"max_steps": 4}, 4),
        (5, 1, 8, 2, {}, 2),
    ],
)
def test_trap02_the_steps_said_are_the_steps_done(rows, batch, window, epochs, more, steps, tmp_path):
    done = []

    class Count(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            done.append(state.global_step)

    run = train(
        tmp_path,
        documents=texts(rows),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=window,
        num_train_epochs=epochs,
        trainer_kwargs={"callbacks": [Count()]},
        **{"max_steps": None, **more},
    )
    assert run.counts["steps"] == len(done) == run.result.steps == steps
    assert run.counts["rows"] == rows


# --- what is saved for chats --------------------------------------------------------------------------------


def test_trap03_a_training_saves_the_template_with_the_bos_of_its_rows(tmp_path):
    from llmnb.engine.templates import chat_ids

    base = transformers.AutoTokenizer.from_pretrained(folder_of())
    run = train(tmp_path, documents=chats(), config={"key": "messages"}, max_steps=1)
    saved = transformers.AutoTokenizer.from_pretrained(run.last)
    ask = [{"role": "user", "content": "hello"}]
    plain = saved.apply_chat_template(ask, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert plain == chat_ids(ask, base) and plain.count(base.bos_token_id) == 1
    assert any("saved with the BOS" in note.text for note in run.notes)


# --- NaN ----------------------------------------------------------------------------------------------------


class Poison(transformers.TrainerCallback):
    """Weights are not finite during one step only."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            self.kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            name = next(n for n in self.kept if "lora_B" in n)
            dict(model.named_parameters())[name].data.fill_(self.value)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            for name, value in self.kept.items():
                dict(model.named_parameters())[name].data.copy_(value)
            optimizer.state.clear()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("every", [1, 2])
def test_trap10_nan_is_kept_and_its_step_is_named(value, every, tmp_path):
    run = train(
        tmp_path,
        max_steps=6,
        logging_steps=every,
        logging_first_step=False,
        trainer_kwargs={"callbacks": [Poison(3, value)]},
    )
    losses = run.losses()
    bad = 3 if every == 1 else 4  # the window of steps 3 and 4
    assert not math.isfinite(losses[bad])
    assert all(math.isfinite(loss) for step, loss in losses.items() if step != bad), losses  # it went away again
    (note,) = [n for n in run.notes if n.level == "warning" and "NaN" in n.text]
    assert note.data["step"] == 3 and "step 3" in note.text and note.data["causes"]
    assert "loss" in note.data["what"]


def test_trap10_loss_zero_is_kept(tmp_path):
    run = train(
        tmp_path, trainer_kwargs={"compute_loss_func": lambda out, labels, num_items_in_batch: out.logits.sum() * 0}
    )
    assert set(run.losses().values()) == {0.0}
    assert not [n for n in run.notes if "NaN" in n.text]


# --- checkpoints --------------------------------------------------------------------------------------------

WHOLE = {"llmnb.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4, 5]),
        ({"save_strategy": "no"}, [5]),
        ({"save_strategy": "epoch", "num_train_epochs": 1, "max_steps": None}, [6]),
        ({"save_strategy": "steps", "save_steps": 5}, [5]),
    ],
)
def test_a_run_leaves_complete_checkpoints(more, steps, tmp_path):
    run = train(tmp_path, **{"max_steps": 5, **more})
    assert [saved["step"] for saved in run.saved] == steps
    for saved in run.saved:
        assert set(saved["files"]) > WHOLE
        card = json.loads((saved["folder"] / "llmnb.json").read_text())
        assert card["step"] == saved["step"] and card["base_fingerprint"] == saved["base"]
        assert card["base"] == str(folder_of()) and card["versions"]["transformers"]


def test_save_total_limit_prunes_local_folders(tmp_path):
    run = train(tmp_path, max_steps=6, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert len(run.saved) == 6
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-5", "checkpoint-6"]


def scripted(values: list[float]):
    """compute_metrics whose score is told beforehand."""
    rest = iter(values)
    return lambda prediction: {"score": next(rest)}


BY_SCORE: dict = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


def test_trap20_best_checkpoint_with_peft(tmp_path):
    run = train(
        tmp_path,
        sets={"valid": texts(4)},
        max_steps=8,
        **BY_SCORE,
        eval_steps=2,
        save_total_limit=1,
        trainer_kwargs={"compute_metrics": scripted([0.1, 0.9, 0.3, 0.2])},
    )
    assert run.result.best_step == 4
    assert [saved["best"] for saved in run.saved] == [True, True, False, False]
    assert [saved["metrics"]["eval_score"] for saved in run.saved] == [0.1, 0.9, 0.3, 0.2]
    best = tmp_path / "checkpoints" / "checkpoint-4"
    assert best.is_dir()  # spared although it is old
    assert "lora_B" in " ".join(weights(best))


def test_trap20_best_is_among_the_saved(tmp_path):
    """Evaluated at 1, 2, 3, 4 and saved at 2 and 4: step 3 is better than both, and cannot be loaded."""
    run = train(
        tmp_path,
        sets={"valid": texts(4)},
        max_steps=4,
        **BY_SCORE,
        eval_steps=1,
        trainer_kwargs={"compute_metrics": scripted([0.1, 0.5, 0.9, 0.2])},
    )
    assert run.result.best_step == 2
    assert [saved["best"] for saved in run.saved] == [True, False]


def test_trap20_the_best_of_the_saved_is_spared_where_the_best_of_all_was_not_saved(tmp_path):
    run = train(
        tmp_path,
        sets={"valid": texts(4)},
        max_steps=6,
        **BY_SCORE,
        eval_steps=1,
        save_total_limit=1,
        trainer_kwargs={"compute_metrics": scripted([0.9, 0.5, 0.4, 0.3, 0.2, 0.1])},
    )
    assert run.result.best_step == 2
    assert (tmp_path / "checkpoints" / "checkpoint-2").is_dir()


def test_lower_loss_is_better(tmp_path):
    run = train(
        tmp_path, sets={"valid": texts(6)}, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, metric_for_best_model="eval_loss",
    )  # fmt: skip
    losses = run.series("eval_loss")
    assert run.result.best_step == min(losses, key=losses.get)


def test_no_choice_means_no_best(tmp_path):
    run = train(tmp_path, sets={"valid": texts(4)}, eval_strategy="steps", eval_steps=1)
    assert run.result.best_step is None and not any(saved["best"] for saved in run.saved)


def test_early_stopping(tmp_path):
    run = train(
        tmp_path,
        sets={"valid": texts(4)},
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="score",
        greater_is_better=True,
        config={"early_stopping_patience": 2, "early_stopping_threshold": 0.05},
        trainer_kwargs={"compute_metrics": scripted([0.1, 0.5, 0.52, 0.51, 0.9])},
    )
    assert run.result.last_step == 4 and not run.result.stopped
    assert run.saved[-1]["step"] == 4


def test_early_stopping_by_epoch_leaves_a_checkpoint(tmp_path):
    run = train(
        tmp_path,
        sets={"valid": texts(4)},
        max_steps=None,
        num_train_epochs=9,
        eval_strategy="epoch",
        metric_for_best_model="score",
        greater_is_better=True,
        config={"early_stopping_patience": 1},
        trainer_kwargs={"compute_metrics": scripted([0.5, 0.4])},
    )
    assert run.result.last_step == 12 == run.saved[-1]["step"]


def test_early_stopping_needs_evaluations(tmp_path):
    with pytest.raises(ConfigError, match="eval_strategy"):
        train(tmp_path, sets={"valid": texts(4)}, eval_strategy="no", config={"early_stopping_patience": 2})
    with pytest.raises(DataError, match="no rows"):
        train(tmp_path, config={"early_stopping_patience": 2})


# --- evaluation ---------------------------------------------------------------------------------------------


def test_named_evaluation_sets(tmp_path):
    run = train(tmp_path, sets={"easy": texts(4), "hard": texts(7)}, eval_strategy="steps", eval_steps=3)
    assert run.series("eval_easy_loss") and run.series("eval_hard_loss") and not run.series("eval_loss")
    assert run.saved[-1]["metrics"].keys() == {"eval_easy_loss", "eval_hard_loss"}
    assert run.counts["eval_rows"] == {"easy": 4, "hard": 7}


def test_the_first_named_set_decides(tmp_path):
    run = train(
        tmp_path,
        sets={"easy": texts(4), "hard": texts(7)},
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    losses = run.series("eval_easy_loss")
    assert run.result.best_step == min(losses, key=losses.get)


def test_evaluation_loss_is_a_mean_over_tokens(tmp_path):
    """It does not depend on the batch size, and equals the one by hand."""
    documents = pairs(7)
    seen = {}
    for size in (1, 3, 8):
        run = train(
            tmp_path / str(size),
            documents=documents,
            sets={"valid": documents},
            max_steps=1,
            learning_rate=1e-30,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=size,
        )
        seen[size] = run.series("eval_loss")[1]
    assert max(seen.values()) - min(seen.values()) < 1e-5, seen


def test_trap19_no_cache_in_training_and_no_logits_kept(tmp_path, monkeypatch):
    from llmnb.engine.loop import Loop

    kept, cached = [], []
    step = Loop.prediction_step

    def watched(self, model, inputs, *args, **kwargs):
        out = step(self, model, inputs, *args, **kwargs)
        kept.append(out[1] is not None)
        return out

    monkeypatch.setattr(Loop, "prediction_step", watched)
    forward = transformers.LlamaModel.forward

    def looked(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        cached.append(out.past_key_values is not None)
        return out

    monkeypatch.setattr(transformers.LlamaModel, "forward", looked)
    options = {"sets": {"valid": texts(4)}, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    for lora in (True, False):
        run = train(tmp_path / f"{lora}", config={"use_lora": lora}, **options)
        assert kept and not any(kept)
        assert cached and not any(cached)
    # what is saved is for generation
    assert json.loads((run.last / "config.json").read_text())["use_cache"] is True
    kept.clear()
    train(tmp_path / "m", trainer_kwargs={"compute_metrics": lambda p: {"n": p.predictions.shape[0]}}, **options)
    assert all(kept)


# --- stop, kill, resume -------------------------------------------------------------------------------------


def test_stop_saves_and_ends(tmp_path):
    words = iter([None, None, None])
    run = train(tmp_path, max_steps=50, control=lambda: next(words, "stop"))
    assert run.result.stopped and run.result.last_step < 50
    assert run.saved[-1]["step"] == run.result.last_step
    assert set(run.saved[-1]["files"]) > WHOLE


def test_kill_ends_at_once(tmp_path):
    words = iter([None] * 6)
    run = train(tmp_path, max_steps=50, gradient_accumulation_steps=2, control=lambda: next(words, "kill"))
    assert run.result.stopped and run.result.last_step < 10 and not run.saved


@pytest.mark.parametrize(("lora", "cut"), [(True, 4), (True, 8), (False, 8), (True, 6)])
def test_trap21_resume_is_exact_on_one_worker(lora, cut, tmp_path):
    """12 rows in batches of 2: step 6 is an epoch's end, 8 lies in the second one."""
    options = dict(
        config={"use_lora": lora, "lora_dropout": 0.1}, max_steps=11, save_strategy="steps", lr_scheduler_type="cosine"
    )
    whole = train(tmp_path / "whole", save_steps=cut, **options)
    part = next(saved["folder"] for saved in whole.saved if saved["step"] == cut)
    rest = train(tmp_path / "rest", save_steps=100, resume=part, **options)
    assert rest.result.steps == 11 - cut and rest.result.last_step == 11
    a, b = weights(whole.last), weights(rest.last)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    late = {step: loss for step, loss in whole.losses().items() if step > cut}
    assert rest.losses() == late
    assert rest.series("tokens")[11] == whole.series("tokens")[11]
    first, second = (torch.load(r.last / "optimizer.pt") for r in (whole, rest))
    assert str(first) == str(second)


@pytest.mark.slow
def test_trap21_resume_on_two_ranks(tmp_path):
    """Step 8 lies in the second epoch of 6 steps; dropout is on. Tolerance: 1e-6 of losses and weights."""
    options = {"cut": 8, "max_steps": 11, "per_device_train_batch_size": 1}
    whole, rest, one, two = two_ranks(tmp_path, folder_of(), "resumed_by_a_rank", **options)
    assert rest == pytest.approx({step: loss for step, loss in whole.items() if step > 8}, abs=1e-6)
    assert len(rest) == 3
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_trap21_a_log_window_that_a_checkpoint_cut_is_whole_again(tmp_path):
    """The loss of step 8 is the mean of steps 5 to 8; the checkpoint lies after step 6."""
    options = {"max_steps": 8, "save_strategy": "steps", "logging_steps": 4, "logging_first_step": False}
    whole = train(tmp_path / "whole", save_steps=3, **options)
    rest = train(tmp_path / "rest", save_steps=3, resume=whole.saved[1]["folder"], **options)
    assert rest.losses() == {8: whole.losses()[8]} and whole.saved[1]["step"] == 6


def test_a_longer_plan_has_the_learning_rates_that_it_would_have_had(tmp_path):
    options = {"save_strategy": "steps", "lr_scheduler_type": "linear"}
    short = train(tmp_path / "short", max_steps=4, save_steps=4, **options)
    planned = train(tmp_path / "planned", max_steps=8, save_steps=8, **options)
    longer = train(tmp_path / "longer", max_steps=8, save_steps=1, resume=short.last, **options)
    rates = {step: rate for step, rate in planned.series("learning_rate").items() if step > 4}
    assert longer.series("learning_rate") == rates and len(rates) == 4
    assert [saved["step"] for saved in longer.saved] == [5, 6, 7, 8], "the steps between saves are those of today"
    before, after = weights(short.last), weights(longer.saved[0]["folder"])
    assert not all(torch.equal(before[name], after[name]) for name in before), "step 5 moved; the short plan ended at 0"
    nothing = train(tmp_path / "nothing", max_steps=4, save_steps=4, resume=short.last, **options)
    assert (nothing.result.steps, nothing.result.last_step, nothing.losses(), nothing.saved) == (0, 4, {}, [])


def test_resume_needs_its_state_and_its_base(tmp_path):
    run = train(tmp_path / "a", save_only_model=False)
    with pytest.raises(AdapterMismatch, match="another base"):
        train(tmp_path / "b", base=folder_of(seed=7), resume=run.last)
    (run.last / "trainer_state.json").unlink()
    with pytest.raises(ModelError, match="cannot be resumed"):
        train(tmp_path / "c", resume=run.last)


def test_best_and_patience_survive_a_resume(tmp_path):
    options = dict(
        sets={"valid": texts(4)},
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    whole = train(tmp_path / "a", trainer_kwargs={"compute_metrics": scripted([0.9, 0.5, 0.4, 0.3])}, **options)
    rest = train(
        tmp_path / "b",
        resume=whole.saved[1]["folder"],
        trainer_kwargs={"compute_metrics": scripted([0.4, 0.3])},
        config={"early_stopping_patience": 5},
        **options,
    )
    assert whole.result.best_step == rest.result.best_step == 2
    assert not any(saved["best"] for saved in rest.saved)


def test_an_adapter_is_trained_further(tmp_path):
    first = train(tmp_path / "a", documents=chats(), max_steps=6, learning_rate=5e-3)
    second = train(tmp_path / "b", documents=chats(), max_steps=2, adapter=first.last)
    assert second.losses()[1] < first.losses()[1] - 0.01
    assert second.result.last_step == 2
    full = train(tmp_path / "c", documents=chats(), max_steps=2, adapter=first.last, config={"use_lora": False})
    assert abs(full.losses()[1] - second.losses()[1]) < 1e-3 and full.result.kind == "model"
    third = train(tmp_path / "d", documents=chats(), max_steps=1, adapter=full.last)
    assert third.losses()[1] < second.losses()[1]
    assert third.result.base_fingerprint != first.result.base_fingerprint


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can do it")
@pytest.mark.parametrize("name", ["fp16", "bf16", "tf32"])
def test_a_precision_this_machine_cannot_do_is_said(name, tmp_path):
    run = train(tmp_path, **{name: True})
    (note,) = [n for n in run.notes if n.level == "warning"]
    assert name in note.text and "float32" in note.text and note.data == {"asked": [name], "used": "float32"}
    assert run.counts["precision"] == "float32"
    assert json.loads((run.last / "llmnb.json").read_text())["precision"] == "float32"


def test_bf16_on_the_cpu_when_the_cpu_is_named(tmp_path):
    run = train(tmp_path, bf16=True, use_cpu=True)
    assert run.counts["precision"] == "bfloat16" and not [n for n in run.notes if n.level == "warning"]
    assert run.counts["trained_dtype"] == "float32"


def test_trainer_kwargs_are_checked(tmp_path):
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, trainer_kwargs={"model": 1, "train_dataset": 2, "compute_metric": 3})
    assert len(caught.value.faults) == 3
    assert "compute_metrics" in str(caught.value)


def test_optimizers_of_ones_own(tmp_path):
    made = []

    def build(model):
        made.append(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5))
        return made[0], None

    train(tmp_path, trainer_kwargs={"optimizers": build})
    assert isinstance(made[0], torch.optim.SGD)


def test_unknown_arguments_are_named(tmp_path):
    with pytest.raises(ConfigError, match="learning_rate"):
        train(tmp_path, learning_rat=1)
    with pytest.raises(ConfigError, match="zigzag"):
        train(tmp_path, lr_scheduler_type="zigzag")


def test_bits_need_lora(tmp_path):
    with pytest.raises(ConfigError, match="use_lora"):
        train(tmp_path, config={"use_lora": False, "bits": 4})


def test_a_metric_has_all_its_numbers(tmp_path):
    run = train(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3, sets={"valid": texts(3)})
    values = run.metrics[0].values
    assert values.keys() >= {"loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens", "memory"}
    assert values["memory"] > 10_000_000 and values["tokens_per_second"] > 0
    tokens = run.series("tokens")
    assert tokens[1] < tokens[2] < tokens[3]
    full = train(tmp_path / "e", max_steps=None, num_train_epochs=1)
    assert full.series("tokens")[6] == full.counts["tokens"]  # real tokens: padding is not counted


def test_a_run_that_fails_says_so_and_saves_nothing(tmp_path):
    class Breaks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ValueError("no")

    run = Drill()
    with pytest.raises(ValueError, match="no"):
        train(tmp_path, drill=run, trainer_kwargs={"callbacks": [Breaks()]})
    assert not run.saved


def test_out_of_memory_is_explained(tmp_path):
    class Full(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(RunError, match="out of memory") as caught:
        train(tmp_path, trainer_kwargs={"callbacks": [Full()]})
    assert "gradient_accumulation_steps" in str(caught.value) and "bits=4" in str(caught.value)


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("basic_ios::clear: iostream error")  # torch.save's own words for it

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(RunError, match="disk of the run's folder is full") as caught:
        train(tmp_path, save_strategy="steps", save_steps=2)
    assert "run.resume()" in caught.value.todo


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_every_sampling_strategy_sees_every_row(strategy, tmp_path):
    run = train(tmp_path, train_sampling_strategy=strategy, max_steps=None, num_train_epochs=1)
    assert run.series("tokens")[run.result.last_step] == run.counts["tokens"]


def test_the_order_is_the_one_of_trainer(tmp_path):
    """Same seed, same rows in the same order as transformers.Trainer on one process."""
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import RandomSampler

    from llmnb.engine.order import Order

    ours = Order([1] * 17, "random", seed=42)
    theirs = SeedableRandomSampler(RandomSampler(range(17)).data_source, data_seed=42)
    for epoch in (0, 1, 5):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs)


def test_a_long_run_keeps_few_logs_and_says_all(tmp_path, monkeypatch):
    monkeypatch.setattr("llmnb.engine.loop._KEPT_LOGS", 3)
    drill = train(
        tmp_path,
        documents=pairs(8),
        sets={"valid": pairs(4)},
        max_steps=12,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=12,
    )
    assert len(drill.losses()) == 12
    kept = json.loads((drill.last / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in kept if "eval_loss" in entry] == [2, 4, 6, 8, 10, 12]
    assert len([entry for entry in kept if "loss" in entry]) <= 6
    assert drill.result.metrics["eval_loss"] == kept[-1]["eval_loss"]
