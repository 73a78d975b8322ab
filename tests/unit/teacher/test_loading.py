import open_clip
import pytest
import torch
from safetensors.torch import save_file

from medalign.errors import CheckpointError
from medalign.geometry import PatchGrid, PreprocessCfg
from medalign.teacher.loading import load_teacher
from medalign.teacher.source import WEIGHTS_NAME


def test_a_teacher_has_its_preprocessing(folder):
    teacher = load_teacher(folder)
    assert (teacher.grid, teacher.width) == (PatchGrid(6, 6), 24)
    assert teacher.preprocess_cfg == PreprocessCfg(48, (0.4,) * 3, (0.2,) * 3)


def test_frozen_and_always_in_eval_mode(folder):
    teacher = load_teacher(folder).train()
    assert not teacher.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_only_the_vision_tower_is_kept_and_the_callers_seed_is_not_changed(folder):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    teacher = load_teacher(folder)
    assert torch.equal(torch.rand(1), expected)
    assert all(name.startswith("tower.visual.") for name, _ in teacher.named_parameters())


def test_the_untrained_control_is_reproducible_and_reads_no_weights(folder, pixels):
    trained = load_teacher(folder)(pixels)[0]
    (folder / WEIGHTS_NAME).unlink()
    first, again, other = (load_teacher(folder, random_weights_seed=seed)(pixels)[0] for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other) and not torch.allclose(first, trained)


def test_half_precision_stays_close(folder, pixels):
    exact, half = load_teacher(folder)(pixels), load_teacher(folder, dtype=torch.bfloat16)(pixels)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32
    # bf16 rounds each value by up to 2**-9 of it. The largest error measured, after two blocks, is 2.3 times 2**-8.
    torch.testing.assert_close(half[1], exact[1], rtol=2**-6, atol=0)


def test_the_teachers_own_precision_has_precedence(folder, pixels):
    assert load_teacher(folder, dtype=torch.bfloat16, precision="fp32")(pixels)[0].dtype == torch.float32
    assert load_teacher(folder, precision="bf16")(pixels)[0].dtype == torch.bfloat16
    assert load_teacher(folder, dtype=torch.bfloat16, precision="auto")(pixels)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_any_open_clip_model_by_name_and_file(tmp_path, suffix):
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    file = tmp_path / f"weights{suffix}"
    save_file(model.state_dict(), file) if suffix != ".pt" else torch.save({"state_dict": model.state_dict()}, file)
    teacher = load_teacher(f"open_clip:ViT-S-32-alt/{file}", mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    pixels = torch.randn(1, 3, teacher.preprocess_cfg.size, teacher.preprocess_cfg.size)
    model.visual.eval().output_tokens = True
    torch.testing.assert_close(teacher(pixels)[0], model.visual(pixels)[1])


def test_truncated_weights_are_rejected(folder):
    file = folder / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_teacher(folder)


def test_weights_of_another_model_are_rejected(folder, make_folder):
    other = make_folder("other", conv_stem=None)
    (folder / WEIGHTS_NAME).write_bytes((other / WEIGHTS_NAME).read_bytes())
    with pytest.raises(CheckpointError, match="do not fit"):
        load_teacher(folder)
