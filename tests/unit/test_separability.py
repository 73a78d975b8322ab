"""`medalign separability` on a tiny student."""

from __future__ import annotations

import json

from PIL import Image

from medalign import phantom
from medalign.__main__ import main
from medalign.evaluation import separability
from tests import tiny


def test_the_command_writes_scores_by_block_and_a_picture(student_folder, tmp_path, capsys, monkeypatch):
    run = tiny.save_run(tmp_path / "run", student_folder)
    phantom.write_phantoms(tmp_path, train=1, val=16, seed=0)
    words = ["separability", str(run), "--data", str(tmp_path / "val")]
    assert main(words) == 0
    found = json.loads((run / "evaluation/val/separability.json").read_text())
    places = [(one["block"], one["steered"]) for one in found["blocks"]]
    assert places == [(0, False), (1, False), (2, False), (2, True)]
    counts = found["classes"]["region"]
    assert counts["inside"] == counts["outside"] == found["tokens"] / 2 and found["images"] >= 5
    assert found["blocks"][2]["region"] != found["blocks"][3]["region"]
    assert "block 2 after W" in capsys.readouterr().out
    with Image.open(run / "evaluation/val/separability.png") as picture:
        assert picture.width > picture.height > 500  # two panels
    first = (run / "evaluation/val/separability.json").read_bytes()
    assert main(words) == 0
    assert (run / "evaluation/val/separability.json").read_bytes() == first

    assert main([*words, "--limit", "4"]) == 2
    assert "images have patches inside and outside of boxes, and 5 are needed" in capsys.readouterr().err
    monkeypatch.setattr(separability, "find_spec", lambda name: None)
    assert main(words) == 2
    assert "pip install 'medalign[separability]'" in capsys.readouterr().err
