"""What a user's DeepSpeed JSON may add to a recipe, and what it may not contradict."""

import json
from pathlib import Path

import pytest

from maskmatch_scale.engine.zero import deepspeed_config
from maskmatch_scale.errors import UserError


@pytest.fixture
def config_of(make_recipe, tmp_path):
    """DeepSpeed's config for a file's content and overrides of the recipe's sections."""

    def make(content, world_size=2, **sections):
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        engine = {"deepspeed_json": str(file)} | sections.pop("engine", {})
        return deepspeed_config(make_recipe(engine=engine, **sections), world_size)

    return make


def test_without_a_file_the_recipe_decides_everything(make_recipe):
    recipe = make_recipe(engine={"micro_batch": 3, "accumulation": 2, "zero_stage": 2})
    config = deepspeed_config(recipe, 2)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert (config["gradient_accumulation_steps"], config["managed_gradient_accumulation"]) == (1, False)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 25_000_000}
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1


def test_bf16_gradients_are_added_and_averaged_in_fp32(make_recipe, config_of):
    config = deepspeed_config(make_recipe(engine={"precision": "bf16"}), 2)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    config = deepspeed_config(make_recipe(engine={"precision": "autocast-bf16"}), 2)
    assert config["torch_autocast"]["lower_precision_safe_modules"] == []


def test_a_file_may_choose_otherwise(config_of):
    content = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
    config = config_of(content, engine={"precision": "bf16"})
    assert config["data_types"] == content["data_types"]
    assert config["communication_data_type"] == "bf16"
    modules = {"lower_precision_safe_modules": ["torch.nn.Linear"]}
    config = config_of({"torch_autocast": modules}, engine={"precision": "autocast-bf16"})
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} | modules
    config = config_of({"zero_optimization": {"overlap_comm": False}}, engine={"zero_stage": 2})
    assert config["zero_optimization"]["overlap_comm"] is False


def test_it_adds_what_tunes(config_of):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_quantized_weights": True, "overlap_comm": True}
    content = {"zero_optimization": zero, "communication_data_type": "fp32", "comms_logger": {"enabled": True}}
    config = config_of(content, engine={"zero_stage": 3})
    assert config["zero_optimization"] == zero | {"reduce_bucket_size": 25_000_000}
    assert config["communication_data_type"] == "fp32"
    assert config["gradient_clipping"] == 0.0


def test_what_agrees_or_is_auto_may_stand_there(config_of):
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}},
    }
    config = config_of(content, engine={"micro_batch": 2, "accumulation": 2}, optim={"clip_norm": 1.0})
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert "train_batch_size" not in config


def test_details_of_offloading(config_of):
    content = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    config = config_of(content, engine={"offload_optimizer": True})
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert config["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, ["=4", "engine.micro_batch", "2"]),
        ({"train_batch_size": 16}, ["train_batch_size=16", "engine.micro_batch", "4"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "optim.clip_norm", "0.0"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage=2", "engine.zero_stage", "1"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=true", "engine.precision", "false"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled=true", "engine.precision"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            ["offload_optimizer.device", "engine.offload_optimizer"],
        ),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "engine.offload_optimizer"]),
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'", "section optim"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "optim.schedule"]),
        ({"comm_logger": {}}, ["'comm_logger'", "did you mean 'comms_logger'"]),
        ({"zero_optimization": {"overlap_com": True}}, ["zero_optimization.overlap_com"]),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, ["zero_optimization.reduce_bucket_size"]),
        ({"zero_optimization": 3}, ["zero_optimization=3", "an object"]),
        ({"bf16": True}, ["bf16=true", "an object"]),
        ({"bf16": {"bf16_optimizer_states": True}}, ["bf16.bf16_optimizer_states", "not handed on"]),
        ({"fp16": {"loss_scale": "x"}}, ["fp16.loss_scale"]),
        ({"torch_autocast": {"lower_precision_safe_module": []}}, ["torch_autocast.lower_precision_safe_module"]),
        (
            {"zero_optimization": {"load_from_fp32_weights": False}},
            ["load_from_fp32_weights", "checkpoints of DeepSpeed's own"],
        ),
        ({"communication_data_type": "fp61"}, ['communication_data_type="fp61"']),
        ({"data_types": {"grad_accum_dtype": "fp61"}}, ['data_types.grad_accum_dtype="fp61"']),
        ({"data_types": "fp32"}, ["data_types=", "an object"]),
        ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow", "not handed on"]),
        ("{", ["not readable as JSON"]),
        ("[1]", ["an object"]),
    ],
)
def test_a_conflict_names_both(config_of, content, parts):
    with pytest.raises(UserError) as caught:
        config_of(content)
    message = str(caught.value)
    assert "ds.json" in message
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_a_file_that_is_not_there(make_recipe):
    with pytest.raises(UserError, match=r"engine\.deepspeed_json=nowhere\.json: No such file"):
        deepspeed_config(make_recipe(engine={"deepspeed_json": "nowhere.json"}), 2)


@pytest.mark.parametrize("name", ["zero3-memory", "zeropp"])
def test_the_files_that_we_ship(make_recipe, name):
    file = Path(__file__).parents[2] / "configs" / "deepspeed" / f"{name}.json"
    config = deepspeed_config(make_recipe(engine={"zero_stage": 3, "deepspeed_json": str(file)}), 2)
    assert config["zero_optimization"].items() > json.loads(file.read_text())["zero_optimization"].items()


@pytest.mark.parametrize(
    ("content", "engine", "parts"),
    [
        (
            {"zero_optimization": {"overlap_comm": True}},
            {"zero_stage": 1},
            ["overlap_comm=true", "engine.zero_stage=1"],
        ),
        (
            {"zero_optimization": {"zero_quantized_gradients": True}},
            {"zero_stage": 3, "precision": "bf16"},
            ["zero_quantized_gradients=true", "engine.precision=bf16"],
        ),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, {"precision": "bf16"}, ['="fp16"', "fp32 or bf16"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, {"precision": "fp32"}, ['="bf16"', "must be fp32"]),
    ],
)
def test_gradients_that_would_be_wrong_or_fail_late_are_refused(config_of, content, engine, parts):
    with pytest.raises(UserError) as caught:
        config_of(content, engine=engine)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_auto_leaves_our_defaults(config_of):
    content = {"communication_data_type": "auto", "zero_optimization": {"overlap_comm": "auto"}}
    config = config_of(content, engine={"zero_stage": 2, "precision": "bf16"})
    assert config["communication_data_type"] == "fp32"
    assert config["zero_optimization"]["overlap_comm"] is True
