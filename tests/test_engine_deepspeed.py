"""DeepSpeed on two CPU ranks: checkpoints are whole, and equal to those of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from drill import folder_of, texts, train, weights

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

HERE = Path(__file__).parent
OPTIONS = {"per_device_train_batch_size": 1, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
RANK = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from pathlib import Path
from drill import texts, train
auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
zero = {{"zero_optimization": {{"stage": {stage}}}, **{{name: "auto" for name in auto}}}}
config = {{"deepspeed": zero, "use_lora": {lora}}}
options = {{"gradient_accumulation_steps": 2, "config": config, **{options}}}
train(Path(sys.argv[1]), base=sys.argv[2], documents=texts(11), **options)
torch.distributed.destroy_process_group()
"""


def two_ranks(folder: Path, base: Path, *, stage: int, lora: bool) -> Path:
    """The last checkpoint of a run on two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "rank.py"
    script.write_text(RANK.format(paths=[str(HERE), str(HERE.parent)], stage=stage, lora=lora, options=OPTIONS))
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = []
    try:
        for rank in "01":
            logs = open(folder / f"log{rank}", "wb")  # noqa: SIM115 - a pipe could fill up and block a rank
            command = [sys.executable, str(script), str(folder / "two"), str(base)]
            ranks.append(
                subprocess.Popen(command, env={**env, "RANK": rank, "LOCAL_RANK": rank}, stderr=logs, stdout=logs)
            )
            logs.close()
        for rank, process in enumerate(ranks):
            code = process.wait(timeout=400)
            assert code == 0, (folder / f"log{rank}").read_text()[-3000:]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
    return folder / "two" / "checkpoints" / "checkpoint-2"


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_trap18_zero3_saves_everything(lora, tmp_path):
    """By names, shapes and values: what two ranks saved is what one process saves."""
    base = folder_of()
    saved = two_ranks(tmp_path, base, stage=3, lora=lora)
    one = train(
        tmp_path / "one",
        base=base,
        documents=texts(11),
        gradient_accumulation_steps=4,
        config={"use_lora": lora},
        optim="adamw_torch",
        **OPTIONS,
    )
    two_weights, one_weights = weights(saved), weights(one.last)
    assert two_weights.keys() == one_weights.keys()
    for name, tensor in one_weights.items():
        assert two_weights[name].shape == tensor.shape, name
        assert two_weights[name].dtype == tensor.dtype, name
        assert torch.allclose(two_weights[name], tensor, atol=2e-3), name
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (saved / file).stat().st_size == pytest.approx((one.last / file).stat().st_size, rel=0.02)
    assert (saved / "llmnb.json").is_file() and (saved / "latest").is_file()
