"""Memory comes back: after training, after answers, after an exception that somebody still holds."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref

import pytest
from drill import folder_of, texts, train

from llmnb.config import ModelSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


class Watcher(transformers.TrainerCallback):
    """Keeps weak references to what a run is made of."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.alive: dict[str, weakref.ref] = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        weight = next(p for p in model.parameters())
        trained = next(p for p in model.parameters() if p.requires_grad)
        self.alive = {"model": weakref.ref(model), "weight": weakref.ref(weight), "trained": weakref.ref(trained)}
        self.alive["moment"] = weakref.ref(next(iter(optimizer.state.values()))["exp_avg"])
        if state.global_step == self.fail_at:
            raise ValueError("in the middle")

    def left(self) -> list[str]:
        assert self.alive
        return [name for name, thing in self.alive.items() if thing() is not None]


@pytest.mark.parametrize("lora", [True, False])
def test_trap24_after_training(lora, tmp_path):
    watcher = Watcher()
    train(
        tmp_path,
        config={"use_lora": lora},
        sets={"valid": texts(3)},
        eval_strategy="steps",
        eval_steps=1,
        trainer_kwargs={"callbacks": [watcher]},
    )
    assert watcher.left() == []


@pytest.mark.parametrize("lora", [True, False])
def test_trap24_after_an_exception_that_is_still_held(lora, tmp_path):
    watcher = Watcher(fail_at=2)
    with pytest.raises(ValueError, match="in the middle") as held:
        train(tmp_path, config={"use_lora": lora}, trainer_kwargs={"callbacks": [watcher]})
    assert watcher.left() == []
    assert "on_step_end" in str(held.traceback[-1])  # where it happened is still known


def test_trap24_after_a_kill(tmp_path):
    watcher = Watcher()
    words = iter([None, None, None])
    train(tmp_path, max_steps=9, control=lambda: next(words, "kill"), trainer_kwargs={"callbacks": [watcher]})
    assert watcher.left() == []


def test_trap24_after_answers():
    from llmnb.engine.generation import Answerer

    answerer = Answerer(ModelSpec(model_name_or_path=str(folder_of())))
    weight = weakref.ref(next(answerer._model.parameters()))
    answerer.answer(["the cat"], max_new_tokens=3)
    stream = answerer.stream("the cat", max_new_tokens=50)
    next(stream)
    stream.close()
    answerer.close()
    assert weight() is None


def test_trap24_after_a_failed_answer(monkeypatch):
    from llmnb.engine.generation import Answerer

    answerer = Answerer(ModelSpec(model_name_or_path=str(folder_of())))
    weight = weakref.ref(next(answerer._model.parameters()))

    def fails(self, *args, **kwargs):
        raise RuntimeError("while computing")

    monkeypatch.setattr(transformers.LlamaModel, "forward", fails)
    held = []
    for ask in (lambda: answerer.answer(["x"]), lambda: list(answerer.stream("x"))):
        try:
            ask()
        except RuntimeError as error:
            held.append(error)
    assert len(held) == 2
    answerer.close()
    gc.collect()
    assert weight() is None


def test_trap24_an_answerer_that_cannot_be_made(tmp_path, monkeypatch):
    from llmnb.engine import bases, generation
    from llmnb.errors import ModelError

    made = []
    real = bases.load_base

    def watched(*args, **kwargs):
        model, tokenizer = real(*args, **kwargs)
        made.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(bases, "load_base", watched)
    run = train(tmp_path / "a", max_steps=1)
    (run.last / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError) as held:
        generation.Answerer(ModelSpec(model_name_or_path=str(folder_of())), run.last)
    assert held and len(made) == 2 and all(model() is None for model in made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_trap24_on_a_gpu(tmp_path):
    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    train(tmp_path / "a", max_steps=2)
    with pytest.raises(ValueError):
        train(tmp_path / "b", trainer_kwargs={"callbacks": [Watcher(fail_at=2)]})
    assert torch.cuda.memory_allocated() - before < 1_000_000


FAULTS = """
import resource, torch
from llmnb.engine.memory import give_back, kept_pages
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(12_000_000).fill_(1.0)  # 48 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
with kept_pages(torch.device("cpu")):
    faults()
    kept = faults()
give_back()
print(before, kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_pages_are_kept_between_steps_and_not_afterwards():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, kept, after = map(int, done.stdout.split())
    assert kept * 5 < min(before, after)
