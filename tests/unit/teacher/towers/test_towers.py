"""What holds for every kind of tower. A new kind gets all of it by one line in `cases.CASES`."""

import functools
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from medalign.errors import CheckpointError, ConfigError
from medalign.geometry import PatchGrid, PreprocessCfg
from medalign.teacher.loading import load_teacher, read_preprocess_cfg
from medalign.teacher.source import CONFIG_NAME
from medalign.teacher.towers import TOWERS
from tests.unit.teacher.towers.cases import CASES, MEAN, SIZE, STD, Case, write_open_clip

every_kind = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def draw_pixels(size: int = SIZE) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def change_weights(file: Path, change) -> None:
    """Write the weights of a file again, changed."""
    if file.suffix == ".bin":
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)
    else:
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})


def test_every_kind_is_tested(tmp_path):
    kinds = set()
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        case.write(folder)
        config = json.loads(next(folder.glob("*config.json")).read_text()) if (folder / CONFIG_NAME).is_file() else {}
        vision = config.get("model_cfg", {}).get("vision_cfg")
        if vision is None:
            kinds.add(json.loads((folder / "config.json").read_text())["model_type"])
        else:
            native = "resnet" if isinstance(vision.get("layers"), list) else "open_clip"
            kinds.add("timm" if "timm_model_name" in vision else native)
    assert kinds == set(TOWERS) - {"biovil", "pmc_clip"}  # have no configuration file; see test_biovil, test_pmc_clip


@every_kind
@torch.no_grad()
def test_features_and_attention_equal_an_eager_computation(case: Case, tmp_path):
    pixels = draw_pixels(case.size)
    features, attention = case.eager(case.write(tmp_path / "teacher"), pixels)
    teacher = load_teacher(tmp_path / "teacher")
    found_features, found_attention = teacher(pixels)
    assert (teacher.grid, teacher.width) == (PatchGrid(case.grid, case.grid), case.width)
    assert found_features.shape == (3, case.grid**2, case.width) and found_attention.shape == (3, case.grid**2)
    assert found_attention.dtype == torch.float32
    # Fused and unfused attention add in another order: some float32 roundings, relative to the largest value.
    torch.testing.assert_close(found_features, features, rtol=1e-4, atol=1e-5 * float(features.abs().max()))
    torch.testing.assert_close(found_attention, attention, rtol=1e-4, atol=1e-6)
    assert attention.max() > 2 * attention.mean()  # not a uniform map, which many wrong computations would give too


@pytest.mark.parametrize("case", [c for c in CASES if c.values], ids=[c.name for c in CASES if c.values])
@torch.no_grad()
def test_the_value_path_is_attention_of_each_patch_to_itself(case: Case, tmp_path):
    pixels = draw_pixels(case.size)
    expected = case.values(case.write(tmp_path / "teacher"), pixels)
    tower = load_teacher(tmp_path / "teacher").tower
    torch.testing.assert_close(tower.values(tower.encode(pixels)), expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_a_tower_compiles_in_one_piece(case: Case, tmp_path, monkeypatch):
    """Traced as torch.compile does it, without the compiler: a break in the graph would be an error."""
    case.write(tmp_path / "teacher")
    plain, pixels = load_teacher(tmp_path / "teacher"), draw_pixels(case.size)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    compiled = load_teacher(tmp_path / "teacher", compile=True)
    assert compiled.encode != compiled.tower.encode
    for found, expected in zip(compiled(pixels), plain(pixels), strict=True):
        torch.testing.assert_close(found, expected)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@every_kind
@torch.no_grad()
def test_the_order_of_channels_does_not_change_the_targets(case: Case, tmp_path):
    case.write(tmp_path / "teacher")
    plain, pixels = load_teacher(tmp_path / "teacher"), draw_pixels(case.size)
    teacher = load_teacher(tmp_path / "teacher", channels_last=True)
    kernels = [m.weight for m in teacher.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.shape[1] > 1]
    assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    for found, expected in zip(teacher(pixels), plain(pixels), strict=True):
        # Another order of the sums in each convolution: some float32 roundings, relative to the largest value.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@every_kind
def test_pixels_are_normalized_as_the_folder_says_or_as_the_user_says(case: Case, tmp_path):
    case.write(tmp_path / "teacher")
    expected = PreprocessCfg(case.size, tuple(MEAN), tuple(STD))
    assert load_teacher(tmp_path / "teacher").preprocess_cfg == expected
    assert read_preprocess_cfg(tmp_path / "teacher") == expected
    given = read_preprocess_cfg(tmp_path / "teacher", mean=(0.1, 0.2, 0.3))
    assert given == PreprocessCfg(case.size, (0.1, 0.2, 0.3), tuple(STD))


@every_kind
def test_a_folder_without_normalization_is_refused(case: Case, tmp_path):
    folder = tmp_path / "teacher"
    case.write(folder)
    if (folder / CONFIG_NAME).is_file():
        config = json.loads((folder / CONFIG_NAME).read_text())
        del config["preprocess_cfg"]
        (folder / CONFIG_NAME).write_text(json.dumps(config))
    else:
        (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"set teacher\.mean and teacher\.std to what it was trained with"):
        load_teacher(folder)
    assert load_teacher(folder, mean=MEAN, std=STD).preprocess_cfg == PreprocessCfg(case.size, tuple(MEAN), tuple(STD))


@every_kind
@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_weights_must_fit_exactly(case: Case, tmp_path, fault):
    folder, name = tmp_path / "teacher", case.a_weight
    case.write(folder)

    def spoil(state: dict) -> None:
        weight = state.pop(name)
        state[name.replace(".1.", ".7.") if fault == "unexpected" else name] = weight[1:].clone()
        if fault == "unexpected":
            state["visual.spare" if "visual." in name else "spare.weight"] = torch.zeros(2)
        if fault != "of another shape":
            state.pop(name, None)

    change_weights(folder / case.weights, spoil)
    with pytest.raises(CheckpointError, match=rf"do not fit.* \d+ {fault}: "):
        load_teacher(folder)


def test_timm_loads_no_weights_where_the_training_began_from_its_own(tmp_path, monkeypatch):
    """Otherwise timm would download them."""
    vision = {"timm_model_name": "medalign_tiny_vit", "timm_model_pretrained": True, "timm_pool": ""}
    write_open_clip(tmp_path / "teacher", vision | {"timm_proj": "linear", "image_size": SIZE})
    create, asked = timm.create_model, []
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append(k["pretrained"]) or create(*a, **k))
    load_teacher(tmp_path / "teacher")
    assert asked and not any(asked)


@every_kind
def test_the_untrained_control_reads_no_weights(case: Case, tmp_path):
    case.write(tmp_path / "teacher")
    (tmp_path / "teacher" / case.weights).unlink()
    pixels = draw_pixels(case.size)
    first, again, other = (load_teacher(tmp_path / "teacher", random_weights_seed=s)(pixels)[0] for s in (4, 4, 5))
    assert torch.equal(first, again) and not torch.allclose(first, other)


@every_kind
def test_the_last_block_runs_once_and_features_before_the_norm_are_its_output(case: Case, tmp_path):
    case.write(tmp_path / "teacher")
    raw, normed = (load_teacher(tmp_path / "teacher", features=name) for name in ("before_norm", "after_norm"))
    pixels = draw_pixels(case.size)
    features, attention = raw(pixels)
    torch.testing.assert_close(normed.tower.final_norm(features), normed(pixels)[0])
    assert torch.equal(normed(pixels)[1], attention)
    assert torch.allclose(features, normed(pixels)[0], rtol=0.1) == (not case.has_norm)


def test_an_unknown_kind_is_refused_with_those_supported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    with pytest.raises(ConfigError, match="kind 'bert'; supported kinds: biovil, clip, .*siglip"):
        load_teacher(tmp_path)


def test_a_pooling_that_was_not_trained_is_refused(tmp_path):

    vision = {
        "timm_model_name": "medalign_tiny_averaged",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": SIZE,
    }
    write_open_clip(tmp_path / "teacher", vision)
    with pytest.raises(ConfigError, match="medalign_tiny_averaged has global_pool 'avg'"):
        read_preprocess_cfg(tmp_path / "teacher")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 50}, "image size 50 is not a multiple of its patch size 8"),
        ({"image_size": [48, 64]}, r"image_size is \[48, 64\]; supported: a positive integer"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1; the tower must have at least two blocks"),
    ],
)
def test_a_configuration_of_transformers_is_checked_before_its_weights(tmp_path, changes, message):
    case = next(case for case in CASES if case.name == "transformers CLIP vision model")
    case.write(tmp_path / "teacher")
    file = tmp_path / "teacher" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        read_preprocess_cfg(tmp_path / "teacher")


@pytest.mark.parametrize("hostile", [False, True])
def test_a_folder_of_transformers_with_torch_weights_is_read_without_code(tmp_path, capsys, hostile):
    class Hostile:
        def __reduce__(self):
            return (print, ("ran",))

    folder = tmp_path / "teacher"
    model = next(case for case in CASES if case.name == "transformers CLIP").write(folder)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    torch.save(state | {"extra": Hostile()} if hostile else state, folder / "pytorch_model.bin")
    if hostile:
        with pytest.raises(CheckpointError, match=r"cannot be read .*print.*Code in a file is never run"):
            load_teacher(folder)
        assert "ran" not in capsys.readouterr().out
    else:
        pixels = draw_pixels()
        expected = model.vision_model.post_layernorm(model.vision_model(pixels).last_hidden_state[:, 1:])
        torch.testing.assert_close(load_teacher(folder)(pixels)[0], expected)
