"""PathVQA from parquet files in the layout of Hugging Face."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from medalign.errors import DataError
from tests.unit.data.tiny_data import picture
from tests.unit.datasets.conversion import pack, samples, skipped
from tests.unit.datasets.parquet_files import write_parquet


def row(i: int, answer: str) -> dict[str, object]:
    image = {"bytes": picture(i, kind="jpg"), "path": None}
    return {"image": image, "question": f"where are liver stem cells {i}?", "answer": answer}


@pytest.fixture
def pathvqa(tmp_path: Path) -> Path:
    folder = tmp_path / "path-vqa"
    data = folder / "data"
    write_parquet(data / "train-00000-of-00002.parquet", [row(i, "yes") for i in range(5)])
    write_parquet(data / "train-00001-of-00002.parquet", [row(i, "in the canals of hering") for i in range(3)])
    write_parquet(data / "validation-00000-of-00001.parquet", [row(0, "no"), row(1, "")])
    write_parquet(data / "test-00000-of-00001.parquet", [row(0, "No."), {**row(1, "yes"), "image": {"bytes": None}}])
    return folder


def test_rows_become_samples(pathvqa: Path, tmp_path: Path) -> None:
    account = pack("pathvqa", pathvqa, tmp_path / "out")
    assert {name: report.written for name, report in account.splits.items()} == {"train": 8, "val": 1, "test": 1}
    assert skipped(account) == {
        "pathvqa-val-00000-00001": "answer is empty; task vqa requires text",
        "pathvqa-test-00000-00001": "row contains no image",
    }
    train = samples(tmp_path / "out" / "train")
    assert [s.answer_type for s in train] == ["closed"] * 5 + ["open"] * 3
    assert train[3].question == "where are liver stem cells 3?"
    assert train[6].question == "where are liver stem cells 1?"
    assert train[1].metadata["case"] == train[6].metadata["case"] != train[2].metadata["case"]  # one picture
    assert samples(tmp_path / "out" / "test")[0].answer_type == "closed"


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "qas").mkdir()
    (tmp_path / "qas" / "train_qa.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(DataError, match=r"data/train-\*\.parquet(?s:.*)pickles, which are not read"):
        pack("pathvqa", tmp_path, tmp_path / "out")


def test_damaged_files_are_named(pathvqa: Path, tmp_path: Path) -> None:
    write_parquet(pathvqa / "data" / "train-00001-of-00002.parquet", [{"question": "a"}])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet has no column 'image'"):
        pack("pathvqa", pathvqa, tmp_path / "out")
    (pathvqa / "data" / "train-00001-of-00002.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet cannot be read"):
        pack("pathvqa", pathvqa, tmp_path / "out")


def test_rows_without_text(pathvqa: Path, tmp_path: Path) -> None:
    path = pathvqa / "data" / "train-00001-of-00002.parquet"
    write_parquet(path, [{**row(i, "a"), "answer": value} for i, value in enumerate((2.0, float("nan"), None))])
    account = pack("pathvqa", pathvqa, tmp_path / "numbers")
    assert samples(tmp_path / "numbers" / "train")[-1].answer == "2.0"
    empty = "answer is empty; task vqa requires text"
    assert [skipped(account)[f"pathvqa-train-00001-0000{i}"] for i in (1, 2)] == [empty, empty]
    table = pyarrow.Table.from_pylist([row(i, "yes") for i in range(3)])
    bad = pyarrow.array([b"yes", b"\xff\xfe", b"no"]).view(pyarrow.string())
    pyarrow.parquet.write_table(table.set_column(2, "answer", bad), path)
    account = pack("pathvqa", pathvqa, tmp_path / "text")
    assert skipped(account)["pathvqa-train-00001-00001"].startswith("row cannot be read ('utf-8' codec")
    assert account.splits["train"].written == 7


def test_a_file_damaged_inside_is_named(pathvqa: Path, tmp_path: Path) -> None:
    path = pathvqa / "data" / "train-00001-of-00002.parquet"
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396  # in the pages of the first column; the footer is intact
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"^{path} is damaged \(.*\); download it again"):
        pack("pathvqa", pathvqa, tmp_path / "out")
