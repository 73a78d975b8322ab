"""The DeepSpeed configuration combines a JSON file and settings; a contradiction is an error."""

from __future__ import annotations

import json

import pytest

from medalign.config import Config
from medalign.engine.engine import require_valid
from medalign.engine.settings import deepspeed_settings
from medalign.errors import ConfigError


@pytest.fixture
def config() -> Config:
    settings = Config()
    settings.train.batch_size, settings.train.micro_batch_size, settings.train.precision = 32, 4, "bf16"
    return settings


@pytest.mark.parametrize(("name", "stage"), [("zero3", 3), ("zero3_offload", 3), ("zero2", 2), ("cpu", 3)])
def test_packaged_configurations_are_filled_in(config, name, stage):
    config.engine.deepspeed = name
    settings = deepspeed_settings(config, 2)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_accumulation_steps"] == 4 and settings["train_batch_size"] == 32
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True} and settings["gradient_clipping"] == 1.0


def test_a_batch_that_three_ranks_do_not_divide(config):
    settings = deepspeed_settings(config, 3)  # 32 samples: 10, 11 and 11, in micro-batches of 3 or 4
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["train_batch_size"] == 3 * settings["train_micro_batch_size_per_gpu"] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradient_clipping": 5.0}, "gradient_clipping to 5.0.*1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled to False"),
        ({"train_batch_size": 64}, "train_batch_size to 64.*32"),
        ({"optimizer": {"type": "Adam"}}, "remove 'optimizer'"),
        ({"fp16": {"enabled": True}}, "remove 'fp16'"),
        ({"zero_optimization": {}}, r"own\.json has zero_optimization\.stage 0; set it to 1, 2 or 3"),
        ({"zero_optimization": {"stage": "x"}}, r"has zero_optimization\.stage 'x'"),
        ({"zero_optimization": 2}, r"own\.json: zero_optimization is 2, but it must be an object"),
        ({"bf16": True}, "bf16 is True, but it must be an object"),
        ({"data_types": 5}, "data_types is 5, but it must be an object"),
    ],
)
def test_a_contradiction_is_an_error(config, tmp_path, values, message):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    config.engine.deepspeed = str(path)
    with pytest.raises(ConfigError, match=message):
        deepspeed_settings(config, 1)


def test_auto_and_equal_values_are_accepted(config, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": "auto", "gradient_clipping": 1.0})
    )
    config.engine.deepspeed = str(path)
    assert deepspeed_settings(config, 1)["train_batch_size"] == 32


def test_an_unknown_name_lists_the_known_ones(config):
    config.engine.deepspeed = "zero9"
    with pytest.raises(ConfigError, match="'zero9' is not known; use cpu, zero2, zero3, zero3_offload"):
        deepspeed_settings(config, 1)


def test_gradients_are_summed_in_fp32_unless_the_json_sets_another_type(config, tmp_path):
    settings = deepspeed_settings(config, 1)
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"} and settings["communication_data_type"] == "fp32"
    path = tmp_path / "own.json"
    own = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "auto"}}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | own))
    config.engine.deepspeed = str(path)
    settings = deepspeed_settings(config, 1)
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"} and settings["communication_data_type"] == "bf16"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            r"own\.json: .*overlap_com Extra inputs are not perm",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"devic": "cpu"}}}, r"offload_optimizer\.devic"),
        ({"communication_data_type": "fp31"}, "fp31"),
        ({"activation_checkpointing": 5}, "correct the file"),
        (
            {"wall_clock_breakdwn": True},
            r"own\.json: DeepSpeed does not know 'wall_clock_breakdwn'.*'wall_clock_breakdown'",
        ),
        ({"my_note": "for the large node"}, "does not know 'my_note', and ignores it; remove it"),
    ],
)
def test_what_deepspeed_would_refuse_later_is_an_error_at_the_start(config, tmp_path, values, message):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | values))
    config.engine.deepspeed = str(path)
    with pytest.raises(ConfigError, match=message):
        require_valid(deepspeed_settings(config, 2), str(path))


SECTIONS = ("aio", "flops_profiler", "comms_logger", "tensorboard", "activation_checkpointing", "data_types", "compile")


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_of_deepspeed_are_known(config, tmp_path, section):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, section: {}}))
    config.engine.deepspeed = str(path)
    require_valid(deepspeed_settings(config, 2), str(path))


@pytest.mark.parametrize("name", ["cpu", "zero2", "zero3", "zero3_offload"])
def test_packaged_configurations_are_valid(config, name):
    config.engine.deepspeed = name
    require_valid(deepspeed_settings(config, 3), name)
