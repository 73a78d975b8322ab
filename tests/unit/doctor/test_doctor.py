"""`medalign doctor`: a sound machine passes, and each fault is found by its check, with a remedy."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from medalign import config as settings
from medalign import phantom
from medalign.cli.main import main
from medalign.config import Config
from medalign.doctor import kernels, machine, models, network, storage
from medalign.doctor.finding import Finding, examine, worst
from medalign.errors import ConfigError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    phantom.write_phantoms(folder, train=12, val=2, seed=0)
    return folder / "train"


@pytest.fixture
def words(shards, tmp_path) -> list[str]:
    copy = shutil.copytree(shards, tmp_path / "shards")
    return ["phantom", "--data.train", str(copy), "--run.dir", str(tmp_path / "runs" / "mine")]


def load(words: list[str], *more: str) -> Config:
    return settings.load(words[0], [*words[1:], *more])


def doctor(capsys, words: list[str], *more: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Run the command. Returns its status, and the findings by name."""
    status = main(["doctor", *words, *more, "--json"])
    return status, {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_a_sound_recipe_passes_every_check(words, capsys, tmp_path):
    status, found = doctor(capsys, words)
    expected = ["versions", "gpu", "attention", "communication", "run folder", "batch", "student", "space", "shards"]
    assert list(found) == [*expected, "template", "teacher", "grids", "kernels", "wandb"]
    assert {name: one for name, one in found.items() if one["status"] == "error"} == {}
    assert status == 0
    assert all(one["remedy"] for one in found.values() if one["status"] == "warning")
    assert "12 x 12" in found["teacher"]["detail"]
    assert not (tmp_path / "runs").exists()  # nothing stays


def test_the_text_names_the_check_and_the_remedy(words, capsys):
    assert main(["doctor", *words, "--student.layer", "99"]) == 1
    out = capsys.readouterr().out
    assert "error   student         student.layer is 99, but it must be between 1 and" in out
    assert "-> " in out


def test_a_recipe_that_is_not_valid_ends_with_status_2(words, capsys):
    assert main(["doctor", *words, "--train.lr", "-1"]) == 2
    assert "train.lr is -1" in capsys.readouterr().err


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600:-600] = b"\0" * (len(content) - 1200)
    path.write_bytes(content)


def faults(name: str, folder: Path) -> tuple[str, ...]:
    """Cause a fault. Returns the further words of the command."""
    if name == "run folder":
        (folder / "file").write_text("")
        return ("--run.dir", str(folder / "file" / "mine"))
    if name == "shards":
        for path in (folder / "shards").glob("*.tar"):
            damage(path)
    if name == "template":
        return ("--data.max_length", "40")
    return {
        "student": ("--student.path", str(folder)),
        "teacher": ("--teacher.path", str(folder)),
        "batch": ("--engine.deepspeed", "nothing"),
        "attention": ("--student.attention", "flash_attention_2"),
        "kernels": ("--losses.impl", "triton"),
    }.get(name, ())


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("run folder", "is a file"),
        ("shards", "cannot be read, the first: train/"),
        ("template", "data.max_length"),
        ("student", "is not a model folder"),
        ("teacher", "contains neither open_clip_config.json nor config.json"),
        ("batch", "engine.deepspeed 'nothing' is not known"),
        ("attention", "flash_attention_2, which supports half precision only"),
        ("kernels", "cannot run"),
    ],
)
def test_a_fault_is_found_by_its_check(words, tmp_path, capsys, monkeypatch, name, detail):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if name == "shards":
        detail = detail.replace("train/", "shards/")
    status, found = doctor(capsys, words, *faults(name, tmp_path))
    assert status == 1
    assert found[name]["status"] == "error"
    assert detail in found[name]["detail"]
    assert found[name]["remedy"]


def test_a_missing_shard_is_found(words, tmp_path, capsys):
    next((tmp_path / "shards").glob("*.tar")).unlink()
    status, found = doctor(capsys, words)
    assert (status, found["shards"]["status"]) == (1, "error")
    assert "is missing but" in found["shards"]["detail"]


class TestMachine:
    def test_a_version_out_of_range(self, monkeypatch):
        monkeypatch.setattr(metadata, "requires", lambda name: ["torch<1", "unknown>=2", "pytest; extra == 'dev'"])
        found = machine.check_versions()
        assert found.status == "error"
        assert found.detail == f"torch {metadata.version('torch')} (needed: <1), unknown is missing (needed: >=2)"

    def test_a_driver_without_a_usable_torch(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(machine, "driver_version", lambda: "550.1")
        found = machine.check_gpu(None)
        assert found.status == "error" and "driver 550.1 is there" in found.detail

    def test_no_gpu_is_a_warning(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(machine, "driver_version", lambda: None)
        assert machine.check_gpu(8).status == "warning"

    @pytest.mark.parametrize(
        ("capability", "wanted", "status"), [((9, 0), 2, "ok"), ((9, 0), 4, "error"), ((7, 0), 2, "warning")]
    )
    def test_gpus(self, monkeypatch, capability, wanted, status):
        class Properties:
            total_memory = 80 * 2**30

        for name, value in {
            "is_available": True,
            "device_count": 2,
            "get_device_name": "NVIDIA H100",
            "get_device_properties": Properties,
            "get_device_capability": capability,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        assert machine.check_gpu(wanted).status == status

    def test_a_hanging_driver_ends(self, monkeypatch):
        def hang(*_, **__):
            raise subprocess.TimeoutExpired("nvidia-smi", 10)

        monkeypatch.setattr(shutil, "which", lambda name: name)
        monkeypatch.setattr(subprocess, "run", hang)
        assert machine.driver_version() is None

    def test_a_torch_without_nccl(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
        assert machine.check_communication().status == "error"


class TestStorage:
    @pytest.mark.parametrize(("share", "status"), [(0.9, "error"), (1.5, "warning"), (3.0, "ok")])
    def test_free_space_against_checkpoints(self, words, share, status):
        """Phantom keeps 1 checkpoint, and writes another one: 2 x 16 bytes x 180,480 trainable parameters."""
        found = storage.check_space(load(words), free=lambda _: int(share * 2 * 16 * 180_480))
        assert found.status == status

    def test_checkpoints_that_are_kept_for_good_count(self, words):
        settings = load(words)
        settings.train.steps, settings.checkpoint.keep_interval = 600, 300
        assert "4 checkpoints need" in storage.check_space(settings, free=lambda _: 10**12).detail

    def test_a_folder_that_cannot_be_written(self, words, monkeypatch):
        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(storage.tempfile, "NamedTemporaryFile", refuse)
        found = storage.check_run_folder(load(words))
        assert found.status == "error" and found.detail.endswith("cannot be written: Permission denied")


def test_more_ranks_than_samples(words):
    found = models.check_batch(load(words), 40)
    assert found.status == "warning" and "8 ranks have none" in found.detail


def test_a_much_coarser_teacher(words, monkeypatch):
    class Tower:
        class grid:  # noqa: N801 (an attribute of towers)
            rows, columns, size = 2, 2, 4

    monkeypatch.setattr(models, "teacher_on_meta", lambda config: Tower)
    assert models.check_grids(load(words)).status == "warning"


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_a_kernel_with_wrong_values(words, monkeypatch, value):
    right = kernels.attention_map

    def wrong(*inputs, impl):
        return right(*inputs, impl=impl) * (1 if impl == "reference" else value)

    monkeypatch.setattr(kernels, "attention_map", wrong)
    found = kernels.check_kernels(load(words))
    assert found.status == "error" and "do not train on this device" in found.remedy


class TestWandb:
    def test_it_is_asked_only_if_it_is_online(self, words, monkeypatch):
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it was asked"))
        assert network.check_wandb(load(words, "--log.wandb", "offline")).status == "ok"

    def test_a_server_that_listens_and_one_that_does_not(self, words, monkeypatch):
        online = load(words, "--log.wandb", "online")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
            assert network.check_wandb(online).status == "ok"
        found = network.check_wandb(online)
        assert found.status == "warning" and f"127.0.0.1:{port} cannot be reached" in found.detail


class TestFinding:
    @pytest.mark.parametrize(
        ("error", "detail", "remedy"),
        [
            (ConfigError("a is 1; b is 2; set c"), "a is 1; b is 2", "set c"),
            (ConfigError("a is 1"), "a is 1", ""),
            (FileNotFoundError(2, "No such file", "x"), "x: No such file", "make the file or the service available"),
            (KeyError("x"), "KeyError: 'x'", "report it with the versions above"),
        ],
    )
    def test_what_a_check_raises_is_a_finding(self, error, detail, remedy):
        def check() -> Finding:
            raise error

        assert examine("name", check) == Finding("name", "error", detail, remedy)

    def test_the_worst_status(self):
        assert worst([]) == "ok"
        assert worst([Finding("a", "warning", ""), Finding("b", "ok", "")]) == "warning"
