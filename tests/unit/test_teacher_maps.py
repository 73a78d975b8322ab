"""The teacher's maps in a report equal the attention targets of the training."""

from __future__ import annotations

import pytest
import torch

from medalign import config as settings
from medalign import phantom, pipeline
from medalign.data.shards.index import ShardIndex
from medalign.errors import ConfigError
from medalign.run_folder import RunFolder
from medalign.teacher.loading import load_tower
from medalign.teacher.targets import teacher_targets
from medalign.teacher_maps import teacher_maps


def test_the_maps_are_the_targets_of_the_training(tmp_path):
    phantom.write_phantoms(tmp_path / "shards", 1, 2, 0)
    overrides = [f"--data.train={tmp_path / 'shards' / 'train'}", f"--run.dir={tmp_path / 'run'}"]
    config = settings.load("phantom", [*overrides, "--teacher.text_weight=0.5"])
    RunFolder(tmp_path / "run").path.mkdir()
    RunFolder(tmp_path / "run").config.write_text(settings.dump(config))
    index = ShardIndex.open(tmp_path / "shards" / "val")
    samples = [index.read(i) for i in range(len(index))]
    assert {len(sample.images) for sample in samples} == {1}

    teacher = load_tower(config.teacher, "cpu", torch.float32)
    collator, _ = pipeline.check_collator(config, teacher.view, 1)
    batch = collator(samples)
    targets = teacher_targets(teacher, batch.teachers[0], collator.grid, batch.image_questions, batch.image_reports)

    maps = torch.stack([torch.from_numpy(each) for each in teacher_maps(tmp_path / "run", samples, collator.grid)])
    # One image at a time and a batch sum in another order; the maps are about 1 / 64 per patch.
    torch.testing.assert_close(maps, targets.attention, rtol=1e-4, atol=1e-7)
    assert not torch.equal(maps[0], maps[1])


def test_a_run_without_settings_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        teacher_maps(tmp_path, [], None)
