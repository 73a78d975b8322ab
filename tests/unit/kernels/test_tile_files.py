"""Tables of tile sizes: the packaged files have the form in which tuning writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from medalign.kernels.attention_map import tile_table as attention_map
from medalign.kernels.tile_files import format_table, write_entry
from medalign.kernels.token_similarity import tile_table as token_similarity


@pytest.mark.parametrize("path", [attention_map.TABLE, token_similarity.TABLE])
def test_packaged_tables_have_the_form_of_the_writer(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert format_table(json.loads(text)) + "\n" == text


def test_one_entry_is_replaced(tmp_path: Path) -> None:
    path = shutil.copy(token_similarity.TABLE, tmp_path)
    before = Path(path).read_text(encoding="utf-8").splitlines()
    write_entry(("sm_90", "gradients", "single"), {"rows": 1}, "a test", Path(path))
    after = Path(path).read_text(encoding="utf-8").splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert [line.strip().rstrip(",") for line in changed] == ['"single": {"rows": 1, "reason": "a test"}']
    assert json.loads("\n".join(after))["sm_90"]["gradients"]["single"]["rows"] == 1
