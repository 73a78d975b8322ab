"""A plan as a whole: what it adds up, how it depends on GPUs and micro-batch, and the command."""

from __future__ import annotations

import json
import shutil

import pytest

from medalign import config as settings
from medalign.cli.main import main
from medalign.config import Config
from medalign.errors import ConfigError
from medalign.planning import memory
from medalign.planning.plan import Plan, make_plan
from medalign.student.quantization import stored_bytes
from tests import tiny


@pytest.fixture
def words(student_folder, teacher_folder, tmp_path) -> list[str]:
    """A recipe whose folders have no weights."""
    for name, folder, file in (
        ("student", student_folder, "config.json"),
        ("teacher", teacher_folder, "open_clip_config.json"),
    ):
        (tmp_path / name).mkdir()
        shutil.copy(folder / file, tmp_path / name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"student: {{path: {tmp_path}/student, layer: 1, lora: {{rank: 4}}}}\n"
        f"teacher: {{path: {tmp_path}/teacher}}\n"
        "data: {max_length: 64}\n"
        "train: {batch_size: 64, micro_batch_size: 4, steps: 1000}\n"
    )
    return [str(recipe)]


def plan(words: list[str], *overrides: str, nodes: int = 1, gpus: int = 2, **more) -> Plan:
    config: Config = settings.load(words[0], overrides, data=False)
    return make_plan(config, nodes=nodes, gpus=gpus, **more)


def test_the_parts_add_up_to_the_student(words):
    found = plan(words)
    student = sum(count for name, count in found.parameters.items() if name != "teacher")
    assert found.state.weights >= student * 2 // 2
    assert found.parameters["adapters"] == found.trainable["adapters"]
    assert sum(found.trainable.values()) < student
    lora = 3 * 4 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 64))  # rank (in + out): q and o, k and v, three of the MLP
    assert found.trainable == {"adapters": lora, "steering": 32 * 32}


def test_memory_of_a_run_is_the_sum_of_its_kinds(words):
    found, bigger = plan(words), plan(words, "--train.micro_batch_size", "8")
    each = found.sample["stored"]
    assert found.memory == found.state.total + 4 * each.total
    assert bigger.memory - found.memory == 4 * each.total
    assert plan(words, "--student.gradient_checkpointing", "true").memory < found.memory


def test_qlora_has_4_bits_and_scales_in_the_linear_layers_of_the_blocks(words):
    """By hand: 7 matrices in each of 3 blocks; the largest, 32 x 64, is unpacked to 2 bytes per weight."""
    zero2 = ("--engine.deepspeed", "zero2")
    plain, packed = plan(words, *zero2), plan(words, *zero2, "--student.quantization", "nf4")
    sizes = 3 * [32 * 32, 32 * 32, 32 * 16, 32 * 16, 32 * 64, 32 * 64, 32 * 64]
    held = sum(size // 2 + size // 64 + 4 for size in sizes)  # at most 32 blocks of 64 weights: one scale of scales
    assert packed.state.weights == plain.state.weights - 2 * sum(sizes) + held
    assert packed.state.gathered == 2 * 32 * 64
    assert packed.parameters == plain.parameters and packed.state.optimizer == plain.state.optimizer
    assert packed.states["2"] == packed.state.total and list(packed.states) == ["1", "2"]
    with pytest.raises(ConfigError, match="nf4, but engine.deepspeed zero3 is ZeRO stage 3"):
        plan(words, "--engine.deepspeed", "zero3", "--student.quantization", "nf4")


def test_4_bits_take_4_127_bits_per_weight():
    """0.127 bits of scales per weight are those of the QLoRA paper."""
    assert 8 * stored_bytes(4096 * 14336) / (4096 * 14336) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


def test_more_ranks_shard_the_optimizer_and_gradients(words):
    two, eight = plan(words, gpus=2).state, plan(words, nodes=2, gpus=4).state
    assert eight.optimizer == -(-two.optimizer // 4)
    assert eight.gradients == -(-two.gradients // 4)
    assert eight.teacher == two.teacher


def test_the_teacher_has_a_precision_of_its_own(words):
    assert plan(words, "--teacher.precision", "fp32").state.teacher == 2 * plan(words).state.teacher


def test_offloading_moves_state_to_the_cpu(words):
    state = plan(words, "--engine.deepspeed", "zero3_offload").state
    kept = plan(words).state
    assert (state.weights, state.optimizer, state.gradients) == (0, 0, 0)
    assert state.offloaded == kept.weights + kept.optimizer + kept.gradients


def test_bytes_on_the_wire(words):
    """By hand, for ZeRO-2 with T trainable parameters on N ranks and 8 micro-batches: (N - 1) / N (2 T + 8 * 4 T)."""
    found = plan(words, "--engine.deepspeed", "zero2")
    trained = sum(found.trainable.values())
    assert found.accumulation == 8
    assert found.traffic.gather == pytest.approx(trained * 2 / 2)
    assert found.traffic.reduce == pytest.approx(trained * 4 * 8 / 2)
    assert plan(words, gpus=1).traffic.total == 0


def test_sharded_weights_are_gathered_twice_and_three_times_with_checkpointing(words, tmp_path):
    zero3 = tmp_path / "zero3.json"
    zero3.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    engine = ("--engine.deepspeed", str(zero3))
    twice = plan(words, *engine).traffic.gather
    thrice = plan(words, *engine, "--student.gradient_checkpointing", "true").traffic.gather
    blocks = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
    assert thrice - twice == pytest.approx((blocks + plan(words).trainable["adapters"]) * 2 / 2 * 8)


def test_the_head_is_gathered_twice_and_small_weights_once_per_step(words, tmp_path):
    """Measured on two ranks by tools/benchmarks/traffic.py: the gradient passes through the head, which is frozen."""

    def gathered(threshold: int) -> float:
        zero3 = tmp_path / f"{threshold}.json"
        zero3.write_text(f'{{"zero_optimization": {{"stage": 3, "stage3_param_persistence_threshold": {threshold}}}}}')
        return plan(words, "--engine.deepspeed", str(zero3)).traffic.gather

    # With 2 ranks and 2 bytes per weight, N weights gathered once are N bytes. 8 micro-batches; embedding and head have
    # the same size, and are the largest weights.
    parameters = plan(words).parameters
    assert gathered(10**9) == pytest.approx(sum(parameters.values()) - parameters["teacher"])  # nothing is sharded
    size = len(tiny.tokenizer()) * 32
    assert gathered(size) - gathered(size + 1) == pytest.approx(8 * (1 + 2) * size - 2 * size)


def test_time_and_days_follow_the_efficiency_and_the_gpus(words):
    slow, fast = (plan(words, efficiency=share, gpus=1).cards["h100"] for share in (0.2, 0.4))
    assert slow.seconds == pytest.approx(2 * fast.seconds)
    assert slow.days == pytest.approx(1000 * slow.seconds / 86_400)
    work = plan(words, gpus=1).operations.total
    assert fast.seconds == pytest.approx(work * 64 / (989e12 * 0.4))


def test_the_steps_of_epochs_need_the_number_of_samples(words):
    epochs = ("--train.epochs", "2")
    assert plan(words, *epochs).cards["h100"].days is None
    assert plan(words, *epochs, samples=320).steps == 10


@pytest.mark.parametrize(("fixed", "expected"), [(0, 9), (50, 4), (92, 0), (1000, 0)])
def test_the_largest_micro_batch_that_fits(fixed, expected):
    assert memory.largest_micro_batch(100, fixed, 10, 64) == expected
    assert memory.largest_micro_batch(100, fixed, 10, 2) == min(2, expected)


def test_a_sample_without_room_for_an_image_is_an_error(words):
    with pytest.raises(ConfigError, match="16 tokens has no room for an image of 16; raise --length"):
        plan(words, length=16)


def test_the_command_prints_text_and_json(words, capsys):
    assert main(["plan", *words, "--gpus", "2", "--card", "h100"]) == 0
    text = capsys.readouterr().out
    assert "derived from shapes and data sheets, not measured" in text
    assert "H100 SXM 80 GB" in text and "A100" not in text
    assert main(["plan", *words, "--gpus", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["cards"]) == ["a100", "h100", "h200", "b200"]
    assert found["memory"] == plan(words).memory


def test_a_missing_folder_ends_with_status_2(words, capsys):
    assert main(["plan", *words, "--student.path", "nowhere"]) == 2
    assert "error: student.path nowhere is not a model folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--efficiency=1.5", "--efficiency=0", "--network=-1", "--gpus=0"])
def test_options_out_of_range_are_refused(words, option):
    with pytest.raises(SystemExit) as end:
        main(["plan", *words, option])
    assert end.value.code == 2


def test_a_published_model_has_its_published_number_of_parameters(tmp_path):
    """LLaVA-Med 1.5 has 15,132,438,528 bytes of bf16 weights in its published files."""
    text = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": None}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    values = {"model_type": "llava", "text_config": text, "vision_config": vision, "image_token_id": 31999}
    (tmp_path / "config.json").write_text(json.dumps(values))
    overrides = ["--student.path", str(tmp_path), "--losses.alpha", "0", "--losses.beta", "0"]
    found = make_plan(settings.load("llava_vqa", overrides, data=False), nodes=1, gpus=8).parameters
    assert sum(found[name] for name in ("vision tower", "projector", "language model")) * 2 == 15_132_438_528
