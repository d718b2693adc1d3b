"""Two CPU ranks that share a model: every way of doing it learns what one rank learns, saves it whole, and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from drill import folder_of, weights
from ranks import carry_out

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
CPU = {"device": "cpu"}


def zero(stage: int, **settings) -> dict:
    return {"deepspeed": {"zero_optimization": {"stage": stage, **settings}, **{name: "auto" for name in AUTO}}}


# Way → (settings of TrainConfig, options of TrainingArguments).
WAYS = {
    "DDP": ({}, {}),
    "ZeRO-0": (zero(0), {}),
    "ZeRO-1": (zero(1), {}),
    "ZeRO-2": (zero(2), {}),
    "ZeRO-2 offload": (zero(2, offload_optimizer=CPU), {}),
    # Every weight is shared out: left to itself DeepSpeed keeps tensors as small as ours whole on each rank.
    "ZeRO-3": (zero(3, stage3_param_persistence_threshold=0), {}),
    "ZeRO-3 offload": (zero(3, offload_optimizer=CPU, offload_param=CPU), {}),
    "FSDP": ({}, {"fsdp": True}),
}
WHOLE = ("LoRA", "full")
BITS = [(way, kind) for way in ("DDP", "ZeRO-2", "FSDP") for kind in ("8-bit", "4-bit")]
BITS.remove(("FSDP", "8-bit"))
CASES = [(way, kind) for kind in WHOLE for way in WAYS] + BITS
RESUMED = [(way, kind) for way in ("ZeRO-2", "ZeRO-3", "FSDP") for kind in WHOLE] + [("DDP", "LoRA"), ("FSDP", "4-bit")]
APART = ("ZeRO-2", "FSDP")
STEPS, HALF = 10, 5


def task(name: str, kind: str, *, ranks: int, config: dict, options: dict) -> dict:
    """35 rows of uneven length, 8 in a step: the last window of an epoch is partial, with accumulation."""
    own = {"use_lora": kind != "full", "bits": int(kind[0]) if kind[0].isdigit() else None}
    return {
        "name": name,
        "ranks": ranks,
        "documents": 35,
        "sets": {"valid": [{"_id": i, "text": "the cat sat " * (1 + i % 3)} for i in range(5)]},
        "per_device_train_batch_size": 4 // ranks,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-3 if kind == "full" else 1e-2,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": HALF,
        "eval_strategy": "steps",
        "eval_steps": HALF,
        "config": {**own, **config},
        **options,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every run said, by (way, kind); way None is one rank alone, and "… again" went on from half."""
    folder, base = tmp_path_factory.mktemp("ranks"), str(folder_of())
    wanted = {}
    for kind in dict.fromkeys(kind for _, kind in CASES):
        wanted[None, kind] = task(f"one {kind}", kind, ranks=1, config={}, options={})
    for way, kind in CASES:
        config, options = WAYS[way]
        wanted[way, kind] = task(f"{way} {kind}", kind, ranks=2, config=config, options=options)
    for way, kind in RESUMED:
        half = str(folder / f"{way} {kind}" / "checkpoints" / f"checkpoint-{HALF}")
        wanted[f"{way} again", kind] = {**wanted[way, kind], "name": f"{way} {kind} again", "resume": half}
    for way in APART:  # as on two machines that share no folder; it goes on from what rank 0's machine has
        name, best = f"{way} apart", {"load_best_model_at_end": True, "save_total_limit": 1}
        half = str(folder / name / "rank0" / "checkpoints" / f"checkpoint-{STEPS}")
        more = {"max_steps": STEPS + 2, "resume": half, "save_steps": STEPS + 2, "eval_steps": STEPS + 2}
        wanted[name, "LoRA"] = {**wanted[way, "LoRA"], "name": name, "apart": True, **best}
        wanted[f"{name} again", "LoRA"] = {**wanted[way, "LoRA"], "name": f"{name} again", "apart": True, **more}
    said = carry_out([{**one, "base": base} for one in wanted.values()], folder)
    return {case: said[one["name"]] for case, one in wanted.items()}


def furthest(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys() and ours
    return max(abs(ours[step] - theirs[step]) for step in ours)


# The first test waits for all runs, and for DeepSpeed's optimizer to be compiled where it is not yet.
pytestmark = [pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(("way", "kind"), CASES)
def test_two_ranks_learn_what_one_does(found, way, kind):
    one, two = found[None, kind], found[way, kind]
    assert two["error"] is None, two["error"]
    assert len(one["losses"]) == STEPS and two["counts"]["ranks"] == 2 and two["counts"]["rows_per_step"] == 8
    assert furthest(two["losses"], one["losses"]) < 1e-4
    assert furthest(two["evals"], one["evals"]) < 1e-4
    if way != "ZeRO-0":  # DeepSpeed without ZeRO knows no norm
        assert furthest(two["norms"], one["norms"]) < 1e-3


@pytest.mark.parametrize(("way", "kind"), CASES)
def test_trap18_what_is_saved_is_whole(found, way, kind):
    """By names, shapes, types, values and bytes: what two ranks saved is what one saves."""
    saved, alone = Path(found[way, kind]["saved"][-1]), Path(found[None, kind]["saved"][-1])
    two, one = weights(saved), weights(alone)
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        assert (two[name].shape, two[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.allclose(two[name], tensor, atol=2e-3), name
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    assert (saved / file).stat().st_size == pytest.approx((alone / file).stat().st_size, rel=0.02)
    assert (saved / "llmnb.json").is_file()


@pytest.mark.parametrize(("way", "kind"), RESUMED)
def test_a_run_on_two_ranks_goes_on_where_it_was(found, way, kind):
    whole, rest = found[way, kind], found[f"{way} again", kind]
    assert rest["error"] is None, rest["error"]
    assert list(rest["losses"]) == [str(step) for step in range(HALF + 1, STEPS + 1)]
    assert max(abs(rest["losses"][step] - whole["losses"][step]) for step in rest["losses"]) < 1e-6
    last, again = weights(Path(whole["saved"][-1])), weights(Path(rest["saved"][-1]))
    assert all(torch.allclose(again[name], tensor, atol=1e-6) for name, tensor in last.items())


@pytest.mark.parametrize("way", APART)
def test_ranks_that_share_no_folder(found, way):
    """Rank 0's folder holds what every rank wrote, the other's nothing; and a run goes on from it."""
    apart, again = found[f"{way} apart", "LoRA"], found[f"{way} apart again", "LoRA"]
    assert apart["error"] is None, apart["error"]
    saved, together = Path(apart["saved"][-1]), Path(found[way, "LoRA"]["saved"][-1])
    assert {p.relative_to(saved) for p in saved.rglob("*")} == {p.relative_to(together) for p in together.rglob("*")}
    assert list((saved.parents[2] / "rank1" / "checkpoints").iterdir()) == []
    assert again["error"] is None, again["error"]
    assert list(again["losses"]) == [str(STEPS + 1), str(STEPS + 2)]


def test_fsdp_shares_the_model_out_and_ddp_does_not(found):
    files = {way: {path.name for path in Path(found[way, "full"]["saved"][-1]).iterdir()} for way in ("DDP", "FSDP")}
    assert "pytorch_model_fsdp.bin" in files["FSDP"] and "optimizer.pt" in files["DDP"] - files["FSDP"]


def test_a_model_that_was_not_shared_out_is_an_error():
    from llmnb.engine.sharding import check_shared
    from llmnb.errors import RunError

    with pytest.raises(RunError, match="not shared out"):
        check_shared(torch.nn.Linear(2, 2))


def test_a_builder_that_was_killed_is_not_waited_for(tmp_path):
    from llmnb.engine.building import _forget_dead_builders

    dead, alive = tmp_path / "cpu_adam" / "lock", tmp_path / "other" / "lock"
    for path in (dead, alive):
        path.parent.mkdir()
        path.touch()
    with open(alive, "rb"):
        _forget_dead_builders(tmp_path)
        assert alive.exists() and not dead.exists()
