"""A run whose files a failing disk has damaged resumes from what is whole, and ends with the same numbers."""

from __future__ import annotations

import shutil

from tests.e2e.conftest import losses, train


def test_a_damaged_run_resumes_from_the_checkpoint_before(recipe, trained, tmp_path):
    """At once: flipped bytes in the newest checkpoint, no `latest`, half a config.yaml, a torn metrics.jsonl."""
    folder = tmp_path / "damaged"
    shutil.copytree(trained, folder)
    checkpoints = folder / "checkpoints"
    shard = max((checkpoints / "step-000008" / "state").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    for index in range(len(content) // 2, len(content) // 2 + 64):
        content[index] ^= 0xFF
    shard.write_bytes(content)
    (checkpoints / "latest").unlink()
    settings = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(settings[: len(settings) // 2])
    rows = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(rows[:-100] + bytes(100))

    (output,) = train(recipe, folder)
    assert f"checkpoint {checkpoints / 'step-000008'} is damaged" in output and shard.name in output
    assert f"resuming from {checkpoints / 'step-000006'}" in output
    assert f"{folder / 'config.yaml'} is damaged" in output and f"{folder / 'metrics.jsonl'}: " in output
    assert losses(folder) == losses(trained)
    assert (folder / "config.yaml").read_text() == settings.replace(str(trained), str(folder))
    assert (checkpoints / "latest").read_text() == "step-000008\n"
