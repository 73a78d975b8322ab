"""What may change when a run is resumed, and what may not."""

import json
import re
from dataclasses import asdict, replace

import pytest

from medalign import config
from medalign.checkpoint.state import TrainState, read_state
from medalign.errors import ConfigError
from medalign.run import _log_summary
from medalign.training.same_run import continue_state, require_same_run
from medalign.training.schedule import resolve_steps

WORDS = ["--data.train", "shards", "--student.path", "/one/models/llava", "--teacher.path", "/one/models/clip"]
CHECKPOINT = TrainState(
    step=3, samples=12, ranks=1, stage=3, data=("8 samples in 1 shards of 512 bytes, CRC-32 0000abcd",)
)


def begun(folder, *words):
    return config.load("phantom", [*WORDS, "--run.dir", str(folder), *words])


@pytest.fixture
def resume(tmp_path):
    """Resumes from a checkpoint with other words, or from another progress.json."""
    checkpoint = tmp_path / "checkpoints" / "step-000003"
    checkpoint.mkdir(parents=True)
    for folder in (tmp_path, checkpoint):
        (folder / "config.yaml").write_text(config.dump(begun(tmp_path)))

    def go(*words, before=CHECKPOINT, now=CHECKPOINT):
        (checkpoint / "progress.json").write_text(json.dumps(asdict(before)))
        require_same_run(begun(tmp_path, *words), now, checkpoint, tmp_path / "config.yaml")

    return go


@pytest.mark.parametrize(
    "word, value",
    [
        ("run.seed", "5"),
        ("train.lr", "0.5"),
        ("student.layer", "3"),
        ("optimizer.betas", "[0.9, 0.95]"),
        ("optimizer.schedule", "linear"),
        ("optimizer.min_lr_ratio", "0.1"),
        ("student.train", "full"),
        ("student.lora.dora", "True"),
        ("student.steering_rank", "2"),
        ("student.quantization", "nf4"),
        ("student.train_vision_tower", "True"),
        ("teacher.attention", "rollout"),
        ("losses.weighting", "teacher_attention"),
    ],
)
def test_what_shapes_the_run_must_stay(resume, word, value):
    said = re.escape(value.replace("[", "(").replace("]", ")"))
    with pytest.raises(ConfigError, match=rf"config\.yaml has {word} = .*this command has {said}.*--run\.dir"):
        resume(f"--{word}", value)


def test_a_list_of_one_block_equals_the_number(resume, tmp_path):
    resume("--student.layer", "[2]")
    checkpoint = tmp_path / "checkpoints" / "step-000003" / "config.yaml"
    checkpoint.write_text(checkpoint.read_text().replace("  layer: 2\n", "  layer:\n  - 2\n"))  # an earlier version
    resume()
    with pytest.raises(ConfigError, match=r"has student\.layer = 2, but this command has \[1, 2\]"):
        resume("--student.layer", "[1, 2]")


def test_what_decides_the_length_of_the_run_must_stay(resume, tmp_path):
    with pytest.raises(ConfigError, match=r"has train\.steps = 600, but this command has None"):
        resume("--train.epochs", "3")
    begun_with_epochs = resolve_steps(begun(tmp_path, "--train.epochs", "3"), 640)
    (tmp_path / "checkpoints" / "step-000003" / "config.yaml").write_text(config.dump(begun_with_epochs))
    resume("--train.epochs", "3")
    with pytest.raises(ConfigError, match=r"has train\.epochs = 3\.0, but this command has 4\.0"):
        resume("--train.epochs", "4")
    with pytest.raises(ConfigError, match=r"has train\.epochs = 3\.0, but this command has None"):
        resume("--train.steps", "60")


def test_models_may_move_with_the_folders_above_them(resume):
    resume("--student.path", "/two/llava", "--train.micro_batch_size", "8")
    with pytest.raises(ConfigError, match=r"student\.path"):
        resume("--student.path", "/two/other")


def test_the_architecture_of_a_teacher_must_stay(resume, tmp_path):
    """Quick and exact GELU are two architectures that take the same file."""
    checkpoint = tmp_path / "checkpoints" / "step-000003" / "config.yaml"
    checkpoint.write_text(config.dump(begun(tmp_path, "--teacher.path", "open_clip:ViT-B-32-quickgelu//one/b32.pt")))
    resume("--teacher.path", "open_clip:ViT-B-32-quickgelu//two/b32.pt")
    with pytest.raises(ConfigError, match=r"has teacher\.path = open_clip:ViT-B-32-quickgelu//one/b32\.pt, but"):
        resume("--teacher.path", "open_clip:ViT-B-32//one/b32.pt")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ("[{path: /two/dino, cache: elsewhere}]", None),
        ("[{path: /one/other}]", r"teacher\.also\[0\]\.path = /one/dino, but this command has /one/other"),
        ("[{path: /one/dino, features: before_norm}]", r"teacher\.also\[0\]\.features = after_norm, but"),
        ("[{path: /one/dino}, {path: b}]", r"teacher\.also\[1\]\.path = none, but this command has b"),
        ("[]", r"teacher\.also\[0\]\.path = /one/dino, but this command has none"),
    ],
)
def test_further_teachers_are_compared_one_by_one(resume, tmp_path, now, message):
    checkpoint = tmp_path / "checkpoints" / "step-000003" / "config.yaml"
    checkpoint.write_text(config.dump(begun(tmp_path, "--teacher.also", "[{path: /one/dino}]")))
    if message is None:
        resume("--teacher.also", now)
        return
    with pytest.raises(ConfigError, match=message):
        resume("--teacher.also", now)


def test_shards_may_move_but_not_change(resume):
    resume("--data.train", "elsewhere")
    other = replace(CHECKPOINT, data=("7 samples in 1 shards of 512 bytes, CRC-32 0000abcd",))
    with pytest.raises(
        ConfigError, match=r"data\.train is not what .*step-000003 was trained on: 8 samples.*7 samples"
    ):
        resume(now=other)


def test_an_old_checkpoint_is_resumed_with_a_warning(resume, caplog):
    resume(before=replace(CHECKPOINT, data=(), stage=None))
    assert "step-000003 does not record its training data" in caplog.text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: text.index("optimizer:")], "config.yaml is damaged (it lacks checkpoint.asynchronous, "),
        (lambda text: text[:100] + "\0" * 100, "config.yaml is damaged (recipe "),
        (lambda text: text[:50], "config.yaml is damaged ("),
        (lambda text: "", "config.yaml is damaged ("),
    ],
)
def test_damaged_settings_of_the_run_are_named_and_do_not_stop_it(resume, tmp_path, caplog, damage, reason):
    path = tmp_path / "config.yaml"
    path.write_text(damage(path.read_text()))
    resume()
    assert reason in caplog.text and "this start writes it again" in caplog.text


def test_whole_settings_of_the_run_are_not_complained_about(resume, caplog):
    resume("--data.workers", "3")
    assert not caplog.text


def test_another_zero_stage_is_refused(resume):
    with pytest.raises(
        ConfigError,
        match=r"step-000003 has ZeRO stage 3, but engine\.deepspeed zero2 has stage 2.*restore --engine\.deepspeed cpu",
    ):
        resume("--engine.deepspeed", "zero2", now=replace(CHECKPOINT, stage=2))


def test_the_last_line_counts_replaced_and_cut_samples(tmp_path, caplog):
    progress = TrainState(step=8, samples=32, ranks=1, skipped=3, truncated=5)
    with caplog.at_level("INFO", logger="medalign"):
        _log_summary(begun(tmp_path), tmp_path, progress)
    assert "8 steps, 32 samples; 3 bad samples replaced, 5 cut to 160 tokens" in caplog.text


def test_the_best_loss_is_forgotten_if_the_held_out_samples_have_changed(caplog):
    """Losses on different samples cannot be compared. The step is evaluated again if it is due."""
    loaded = replace(CHECKPOINT, held_out=("a",), best_step=2, best_loss=0.5, evaluated_step=3)
    now = TrainState(step=0, samples=0, ranks=1, stage=3, data=("new",))
    assert continue_state(loaded, replace(now, held_out=("a",))) == replace(loaded, data=("new",))
    assert continue_state(loaded, now) == replace(loaded, data=("new",))  # this start evaluates nothing
    assert not caplog.text
    expected = replace(CHECKPOINT, data=("new",), held_out=("b",))
    assert continue_state(loaded, replace(now, held_out=("b",))) == expected
    assert "that of step 2, was chosen by (a then, b now)" in caplog.text


def test_a_best_loss_without_a_record_of_the_held_out_samples_is_kept(tmp_path, caplog):
    """Checkpoints of earlier versions lack the field."""
    before = asdict(replace(CHECKPOINT, best_step=2, best_loss=0.5))
    del before["held_out"]
    (tmp_path / "progress.json").write_text(json.dumps(before))
    found = continue_state(read_state(tmp_path), replace(CHECKPOINT, held_out=("b",)))
    assert (found.best_step, found.best_loss, found.held_out) == (2, 0.5, ("b",))
    assert "does not record its held-out data" in caplog.text
