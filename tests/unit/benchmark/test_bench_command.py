"""`medalign bench kernels` end to end: compilation for absent GPUs; measurement and tuning in the interpreter."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from medalign.__main__ import main
from medalign.benchmark.kernels import commands, registry, tuning
from medalign.benchmark.kernels.token_similarity import cases
from medalign.errors import ConfigError, KernelError
from medalign.kernels import gpu
from medalign.kernels.attention_map import tile_table as maps
from medalign.kernels.token_similarity import tile_table, token_similarity

# torch.compile builds C++ for minutes on the CPU. The eager form, which it compiles, is among the paths.
SMALL = ["bench", "kernels", "--kernel", "token_similarity", "--repeats", "2", "--skip", "torch.compile"]


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def compiled(request, tmp_path_factory):
    """The tables for one architecture, from a separate process, because Triton interprets its kernels in this one."""
    output = tmp_path_factory.mktemp("bench") / "compiled.json"
    command = [sys.executable, "-m", "medalign", "bench", "kernels", "--compile", "--architecture", request.param]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True, check=False, env=environment)
    assert output.exists(), done.stderr
    binaries, account = json.loads(output.read_text()).values()
    return request.param, done, binaries, account


def test_every_configuration_compiles_well(compiled):
    architecture, done, binaries, _ = compiled
    assert done.returncode == 0, done.stderr
    card = gpu.ARCHITECTURES[architecture]
    tables = {case.name for case in registry.CASES}
    assert {row["operation"] for row in binaries} == tables
    assert len({(row["operation"], row["kernel"]) for row in binaries}) == len(binaries)
    for row in binaries:
        name = row["kernel"]
        assert row["spills"] == 0 and row["stack"] == 0 and 0 < row["registers"] <= 255, name
        assert row["shared_memory"] <= card.shared_memory, name
        assert row["complaint"] == "" and row["kernel"] in done.stdout
    products = [row for row in binaries if row["operation"] == "token_similarity" and "prepare" not in row["kernel"]]
    assert len(products) > 10 and all(row["tensor_cores"].startswith(card.tensor_core) for row in products)
    maps = [row for row in binaries if row["operation"] == "attention_map"]
    assert len(maps) == 4 * 2 * 3 + 4 + 4 + 1  # kernels x types x widths; float16; a width of 80; no query gradient
    for row in maps:  # float32 has tiles too small for the newer cards' instructions
        wanted = "mma.sync" if "fp32" in row["kernel"] else card.tensor_core
        assert row["tensor_cores"].startswith(wanted), row["kernel"]


def test_shared_memory_is_what_the_tile_tables_assume(compiled):
    architecture, _, binaries, _ = compiled
    for row in binaries:
        if row["operation"] == "token_similarity":
            dtype = torch.float32 if "single" in row["kernel"] or "fp32" in row["kernel"] else torch.bfloat16
            assert row["shared_memory"] <= tile_table.shared_memory(architecture, dtype, dtype), row["kernel"]


def test_the_costs_are_labeled_as_derived(compiled):
    _, done, _, account = compiled
    assert "not measured" in done.stdout and "H100 us (derived)" in account[0]
    rows = {(row["problem"], row["method"]): row for row in account if row["operation"] == "token_similarity"}
    for problem, method in rows:
        assert rows[problem, method]["op/least"] >= rows[problem, "least"]["op/least"] == 1
        assert rows[problem, method]["bytes/least"] >= rows[problem, "least"]["bytes/least"] == 1


def test_operations_by_hand():
    """B = 2 of one tile: 4 x 4 pairs, 3 and 2 channels, two operations each, half of them mirrored."""
    assert cases.least_cost(2, 4, 3, 2).operations == 2 * 16 * (3 * 3 + 2)
    assert cases.eager_cost(2, 4, 3, 2).operations == 2 * cases.least_cost(2, 4, 3, 2).operations
    # 128 tokens: three of four 64 x 64 tiles of D, and the whole product with the features.
    assert cases.triton_cost(1, 128, 32, 16).operations == 3 * 2 * 64 * 64 * 48 + 2 * 128 * 128 * 32


def test_measured_on_the_interpreter(tmp_path, capsys):
    output = tmp_path / "folder" / "measured.json"
    assert main([*SMALL, "--tokens", "20", "--output", str(output)]) == 0
    (rows,) = json.loads(output.read_text()).values()
    assert [row["path"] for row in rows] == ["eager", "chunked", "triton"]
    for row in rows:
        assert row["p20"] <= row["ms"] <= row["p80"] and row["ms"] > 0
        assert row["value error"] < 1e-5 and row["gradient error"] < 1e-4
    assert "gradient error" in capsys.readouterr().out


def test_a_wrong_kernel_is_an_error(monkeypatch):
    wrong = lambda *inputs, impl: token_similarity(*inputs, impl=impl) * 1.01  # noqa: E731
    monkeypatch.setattr(cases, "token_similarity", wrong)
    with pytest.raises(KernelError, match="chunked is wrong on B=4 N=5.*relative error 1.0e-02 of the value"):
        commands.measurement("token_similarity", "cpu", None, [5], 2, ["torch.compile"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_an_error(capsys):
    assert main([*SMALL, "--device", "cuda"]) == 2
    assert "no CUDA device found" in capsys.readouterr().err


def test_tuning_writes_the_table(tmp_path, monkeypatch):
    table = shutil.copy(tile_table.TABLE, tmp_path / "table.json")
    before = json.loads(table.read_text())
    monkeypatch.setattr(tile_table, "TABLE", table)
    monkeypatch.setattr(cases, "SMALL_WIDTHS", (16, 16))
    monkeypatch.setattr(cases, "samples_of", lambda tokens: 1)
    tile_table.table.cache_clear()
    try:
        assert main(["bench", "kernels", "--tune", "--repeats", "1", "--kernel", "token_similarity"]) == 0
    finally:
        tile_table.table.cache_clear()
    after = json.loads(table.read_text())
    assert after["sm_80"] == before["sm_80"]
    for kinds in after["sm_90"].values():
        for entry in kinds.values():
            assert re.search("the fastest of [23] on the interpreter", entry["reason"])  # two, and the table's own


def test_a_short_search_writes_into_a_folder_and_never_selects_a_slower_tile(tmp_path, monkeypatch):
    """One candidate per entry: the table's own, which is tried first."""
    packaged = maps.TABLE.read_text()
    words = ["bench", "kernels", "--tune", "--repeats", "1", "--kernel", "attention_map", "--seconds", "1"]
    monkeypatch.setattr(tuning.time, "monotonic", itertools.count(step=2).__next__)
    try:
        assert main([*words, "--tables", str(tmp_path / "new"), "--output", str(tmp_path / "rows.json")]) == 0
    finally:
        maps.table.cache_clear()
    assert maps.TABLE.read_text() == packaged
    before, after = json.loads(packaged), json.loads((tmp_path / "new" / "attention_map.json").read_text())
    assert after["sm_80"] == before["sm_80"] and after["sm_90"] != before["sm_90"]
    (rows,) = json.loads((tmp_path / "rows.json").read_text()).values()
    assert len(rows) == len(before["sm_90"])
    for row in rows:
        kind = row["entry"].partition(" / ")[2]
        assert row["tried"] == 1 < row["of"] and row["ms"] == row["before"]
        assert f"the fastest of 1 ({row['of'] - 1} not tried)" in after["sm_90"][kind]["reason"]
        assert maps.Tiles(*(after["sm_90"][kind][name] for name in maps.Tiles._fields)) == maps.table()["sm_90"][kind]


def test_an_unknown_kernel():
    with pytest.raises(ConfigError, match="softmax: no such kernel; choose one of token_similarity"):
        registry.select_cases("softmax")


def test_an_interpreted_kernel_is_not_compiled():
    with pytest.raises(KernelError, match="unset TRITON_INTERPRET"):
        commands.compilation("token_similarity", ["sm_90"])
