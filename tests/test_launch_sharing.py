"""How workers share a model: what is possible, and what is refused before anything is recorded or started."""

from __future__ import annotations

import json

import pytest

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.config import TrainConfig
from llmnb.errors import ConfigError
from llmnb.launch import sharing
from llmnb.launch.layout import plan
from llmnb.launch.sharing import KINDS, WAYS, impossible, way_of, with_files_read

AUTO = {"train_micro_batch_size_per_gpu": "auto"}


def zero(stage: int, **settings) -> dict:
    return {"zero_optimization": {"stage": stage, **settings}, **AUTO}


def config_of(way: str, kind: str) -> TrainConfig:
    settings = {"num_gpus": 2, "use_lora": kind != "full", "bits": int(kind[0]) if kind[0].isdigit() else None}
    if way.startswith("ZeRO"):
        return TrainConfig(**settings, deepspeed=zero(int(way[-1])))
    return TrainConfig(**settings, arguments={"fsdp": True} if way == "FSDP" else {})


def planned(config: TrainConfig, *, gpus=0):
    return plan(config, {}, bits=config.bits, gpus=gpus, background=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_table(way, kind):
    config = config_of(way, kind)
    assert way_of(config) == way
    refused = {("ZeRO-3", "8-bit"), ("ZeRO-3", "4-bit"), ("FSDP", "8-bit")}
    assert (impossible(way, kind) is not None) == ((way, kind) in refused)
    if (way, kind) in refused:
        with pytest.raises(ConfigError) as caught:
            planned(config)
        (fault,) = caught.value.faults
        assert kind in fault.what and ("bits" in fault.todo)
    else:
        found = planned(config)
        assert (found.workers, found.on_ray) == (2, True)


CPU, NVME = {"device": "cpu"}, {"device": "nvme"}


@pytest.mark.parametrize(
    ("deepspeed", "said"),
    [
        (zero(0, offload_optimizer=CPU), "offload_optimizer needs ZeRO stage 1, and the stage is 0"),
        (zero(2, offload_param=CPU), "offload_param needs ZeRO stage 3, and the stage is 2"),
        (zero(3, offload_param={"device": "disk"}), "offload_param.device is 'disk'.*'cpu', 'nvme'"),
        (zero(2, offload_optimizer=NVME), "to nvme needs ZeRO stage 3 and an nvme_path"),
        (zero(3, stage3_gather_16bit_weights_on_model_save=False), "would hold no whole model"),
        (zero(4), "stage is 4"),
        ('{"zero_optimization": {"stage": 5}}', "stage is 5"),
        ({"bf16": {"enabled": True}}, "bf16 is on, and this machine has no GPU"),
    ],
)
def test_what_deepspeed_would_not_heed_is_refused(deepspeed, said):
    with pytest.raises(ConfigError, match=said):
        planned(TrainConfig(num_gpus=2, deepspeed=deepspeed))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_needs_a_compiler(monkeypatch, stage):
    offload = zero(stage, offload_optimizer=CPU)
    assert planned(TrainConfig(num_gpus=2, deepspeed=offload)).on_ray
    monkeypatch.setattr(sharing.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"compiler.*zero_force_ds_cpu_optimizer: false"):
        planned(TrainConfig(num_gpus=2, deepspeed=offload))
    assert planned(TrainConfig(num_gpus=2, deepspeed=offload), gpus=None).on_ray  # another machine may have one
    assert planned(TrainConfig(num_gpus=2, deepspeed={**offload, "zero_force_ds_cpu_optimizer": False})).on_ray
    assert planned(TrainConfig(num_gpus=2, deepspeed=zero(stage))).on_ray


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        ({"fsdp": True}, {"num_gpus": 1}, "shares a model among workers, and there is 1"),
        ({"fsdp": True}, {"num_gpus": None}, "num_gpus=2 or more"),
        ({"fsdp": True}, {"deepspeed": {}}, "fsdp: and deepspeed both share the model out"),
        ({"fsdp_config": {"version": 2}}, {}, "fsdp_config: is given, and fsdp is off"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "version 1 needs GPUs"),
        ({"fsdp": True, "fsdp_config": {"version": 3}}, {}, "version is 3"),
        ({"fsdp": True, "fsdp_config": {"fsdp_cpu_offload": True}}, {}, "moves weights off GPUs, and this machine"),
        ({"fsdp": "full_shard offload"}, {}, "moves weights off GPUs"),
        ({"fsdp": "hybrid_shard"}, {}, "'hybrid_shard' is not known to FSDP 2"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, {}, "would hold no whole model"),
        ({"fsdp": True, "fsdp_config": {"use_orig_params": True}}, {}, "use_orig_params belongs to FSDP 1"),
        ({"fsdp": True, "fsdp_config": {"reshard_after": True}}, {}, "did you mean reshard_after_forward"),
        ({"fsdp": True, "fsdp_config": "nowhere.json"}, {}, "nowhere.json cannot be read"),
    ],
)
def test_what_fsdp_would_not_heed_is_refused(arguments, settings, said):
    with pytest.raises(ConfigError, match=said):
        planned(TrainConfig(**{"num_gpus": 2, **settings}, arguments=arguments))


def test_fsdp_1_and_offloading_on_gpus():
    arguments = {"fsdp": "full_shard auto_wrap offload", "fsdp_config": {"version": 1, "use_orig_params": True}}
    assert planned(TrainConfig(num_gpus=2, arguments=arguments), gpus=2).workers == 2


def test_a_file_is_read_where_it_is(tmp_path):
    for name, content in (("ds", zero(2)), ("fsdp", {"version": 2})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    read = with_files_read(TrainConfig(deepspeed=str(tmp_path / "ds.json")))
    assert read.deepspeed == zero(2)
    given = {"fsdp": True, "fsdp_config": str(tmp_path / "fsdp.json"), "max_steps": 3}
    assert with_files_read(TrainConfig(arguments=given)).arguments["fsdp_config"] == {"version": 2}
    plain = TrainConfig(arguments={"max_steps": 3})
    assert with_files_read(plain) == plain


def test_nothing_is_recorded_of_what_cannot_be(tmp_path):
    db = connect("mongomock://sharing", home=tmp_path / "home")
    db.execute(Collection("sums").insert_many([{"text": "1+1=2"}]))
    model = LLM("sums", "nowhere", bits=4, trainer=LLMTrainer(select=Collection("sums").find(), key="text"))
    model.trainer.num_gpus, model.trainer.deepspeed = 2, zero(3)
    with pytest.raises(ConfigError, match="4-bit weights cannot be"):
        db.apply(model)
    model.trainer.deepspeed, model.trainer.fsdp = None, True
    model.trainer.fsdp_config = {"cpu_offload": True}
    with pytest.raises(ConfigError, match="off GPUs"):
        db.apply(model)
    assert db.store.runs.list() == []
    db.close()
