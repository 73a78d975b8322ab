import pickle
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from medalign.errors import CheckpointError, ConfigError
from medalign.teacher.loading import load_teacher
from medalign.teacher.weights import read_weights

OPENAI = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
ARCHITECTURE = "ViT-S-32-alt"  # the smallest that open_clip knows by name


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (print, ("ran",))


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return open_clip.create_model(ARCHITECTURE, pretrained=None)


def unimed_checkpoint(clip: torch.nn.Module) -> dict:
    """A training checkpoint as UniMed-CLIP publishes it, of a small tower."""
    visual = {f"module.visual.{key}": value for key, value in clip.visual.state_dict().items()}
    text = {"module.text_encoder.proj.0.weight": torch.zeros(4, 4), "module.logit_scale": torch.zeros(())}
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 4)}}
    groups = [{"lr": np.float64(1e-5) * np.cos(0.3), "betas": (0.9, 0.98), "params": [0]}]
    return {
        "epoch": 3,
        "name": "run",
        "state_dict": visual | text,
        "optimizer": {"state": moments, "param_groups": groups},
        "scaler": {"scale": 65536.0},
    }


def rename_in_pickle(file: Path, old: bytes, new: bytes) -> None:
    """Change the names in the pickle of a torch file, as an older NumPy would have written them."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_a_training_checkpoint_with_numpy_scalars_is_read(tmp_path, clip, module):
    file = tmp_path / "unimed.pt"
    torch.save(unimed_checkpoint(clip), file)
    rename_in_pickle(file, b"numpy._core.multiarray", module)
    assert module in zipfile.ZipFile(file).read("unimed/data.pkl")
    state = read_weights(file)
    assert {key for key in state if key.startswith("visual.")} == {f"visual.{key}" for key in clip.visual.state_dict()}
    assert torch.equal(state["visual.proj"], clip.visual.proj)


def test_unimed_clip_needs_quick_gelu(tmp_path, clip, monkeypatch):
    file = tmp_path / "unimed.pt"
    torch.save(unimed_checkpoint(clip), file)
    with pytest.raises(ConfigError, match=f"trained with quick GELU.* give open_clip:{ARCHITECTURE}-quickgelu/"):
        load_teacher(f"open_clip:{ARCHITECTURE}/{file}", **OPENAI)
    config = open_clip.get_model_config(ARCHITECTURE) | {"quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: config)  # no small model has a name with quick GELU
    teacher = load_teacher(f"open_clip:{ARCHITECTURE}-quickgelu/{file}", **OPENAI)
    pixels = torch.randn(1, 3, 224, 224)
    quick = open_clip.CLIP(**config).eval()
    quick.visual.load_state_dict(clip.visual.state_dict())
    quick.visual.output_tokens = True
    torch.testing.assert_close(teacher(pixels)[0], quick.visual(pixels)[1])
    clip.visual.eval().output_tokens = True
    assert not torch.allclose(teacher(pixels)[0], clip.visual(pixels)[1], rtol=1e-3)  # the activation matters


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_rejected_and_not_run(tmp_path, capsys, clip, zipped):
    file = tmp_path / "weights.pt"
    if zipped:
        torch.save(unimed_checkpoint(clip) | {"scaler": Hostile()}, file)
    else:
        file.write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(CheckpointError, match=r"cannot be read: .*print.*Code in a file is never run") as caught:
        load_teacher(f"open_clip:{ARCHITECTURE}/{file}", **OPENAI)
    assert "weights_only=False" not in str(caught.value) and "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def test_only_scalars_of_numpy_are_safe(tmp_path):
    torch.save({"state_dict": {"visual.proj": torch.zeros(1)}, "extra": np.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="_reconstruct"):
        read_weights(tmp_path / "weights.pt")


def test_a_torchscript_archive_is_refused_with_the_remedy(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    file = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(Model()), file)
    with pytest.raises(CheckpointError, match=r"TorchScript archive.*torch\.jit\.load\('OLD\.pt', 'cpu'\)\.state_dict"):
        load_teacher(f"open_clip:{ARCHITECTURE}/{file}", **OPENAI)


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.zeros(1)], "hold a list"), ({"model": torch.zeros(1)}, "no name begins with 'visual.'; they are named")],
)
def test_a_file_without_a_clip_is_refused(tmp_path, content, message):
    file = tmp_path / "weights.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        load_teacher(f"open_clip:{ARCHITECTURE}/{file}", **OPENAI)


def test_a_training_checkpoint_is_mapped_into_memory(tmp_path, clip, monkeypatch):
    """Only then are the optimizer's moments, two thirds of a published file, not read by every rank."""
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: seen.append(kwargs) or load(*args, **kwargs))
    torch.save(unimed_checkpoint(clip), tmp_path / "zipped.pt")
    torch.save(clip.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "zipped.pt").keys() >= {"visual.proj"}
    assert read_weights(tmp_path / "old.pt").keys() >= {"visual.proj"}
    assert [call["mmap"] for call in seen] == [True, False]  # the format from before torch 1.6 cannot be mapped
    assert all(call["weights_only"] is True for call in seen)
