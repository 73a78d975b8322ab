"""MIMIC-CXR-JPG: the official split, frontal views, and reports by their headings."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from medalign.datasets import get_converter
from medalign.datasets.convert import convert
from medalign.datasets.hashing import Hashing
from medalign.datasets.report_text import split_sections
from medalign.errors import DataError
from tests.unit.datasets.conversion import pack, samples, skipped, write_picture

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 COMPARISON:  None.

 FINDINGS:

 There is no focal consolidation, pleural effusion or
 pneumothorax. Note: the heart is normal.

 IMPRESSION:

 No acute cardiopulmonary process.
"""


def dicom(i: int) -> str:
    return f"{i:08x}-9c3b1d6f-b2f3a1c4-5d6e7f80-91a2b3c4"


STUDIES = (  # patient, study, split, views, report
    ("10000032", "50414267", "train", ("LATERAL", "AP", "PA"), REPORT),
    ("10000032", "53189527", "train", ("AP",), "WET READ: x\n\nIMPRESSION: Stable."),
    ("10000764", "57375967", "validate", ("PA",), " CONCLUSION:\n Effusion.\n"),
    ("11000183", "51967845", "test", ("PA",), "FINDINGS AND IMPRESSION:  Clear."),
    ("11000183", "51967846", "test", ("LATERAL",), REPORT),
    ("11000183", "51967847", "test", ("PA",), "No heading at all."),
    ("11000183", "51967848", "test", ("PA",), None),
)


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    folder = tmp_path / "2.1.0"
    splits, metadata, number = ["dicom_id,study_id,subject_id,split"], ["dicom_id,subject_id,study_id,ViewPosition"], 0
    for patient, study, split, views, report in STUDIES:
        place = f"p{patient[:2]}/p{patient}"
        for view in views:
            splits.append(f"{dicom(number)},{study},{patient},{split}")
            metadata.append(f"{dicom(number)},{patient},{study},{view}")
            write_picture(folder / "files" / place / f"s{study}" / f"{dicom(number)}.jpg", number, 30 + number, 30)
            number += 1
        if report is not None:
            path = folder / "mimic-cxr-reports" / "files" / place / f"s{study}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(report)
    (folder / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress("\n".join(splits).encode()))
    (folder / "mimic-cxr-2.0.0-metadata.csv").write_text("\n".join(metadata))
    return folder


def test_frontal_views_by_the_official_split(mimic: Path, tmp_path: Path) -> None:
    account = pack("mimic-cxr-jpg", mimic, tmp_path / "out")
    assert {name: report.written for name, report in account.splits.items()} == {"train": 2, "val": 1, "test": 1}
    first, second = samples(tmp_path / "out" / "train")
    assert first.key == "p10000032-s50414267"
    assert first.images[0].size == (32, 30)  # the PA, listed third
    assert (first.metadata["view"], first.metadata["patient"]) == ("PA", "p10000032")
    findings = "There is no focal consolidation, pleural effusion or pneumothorax. Note: the heart is normal."
    assert first.metadata["findings"] == findings
    assert first.metadata["impression"] == "No acute cardiopulmonary process."
    assert first.answer == f"{findings} No acute cardiopulmonary process."
    assert (second.answer, second.metadata["findings"]) == ("Stable.", "")
    assert samples(tmp_path / "out" / "val")[0].answer == "Effusion."
    assert samples(tmp_path / "out" / "test")[0].metadata["findings"] == "Clear."
    assert account.reasons() == {
        "study has no frontal image": 1,
        "report has no findings or impression": 1,
        "report ... cannot be read": 1,
    }


def test_findings_only_and_every_view(mimic: Path, tmp_path: Path) -> None:
    account = pack("mimic-cxr-jpg", mimic, tmp_path / "out", sections="findings", views="all")
    assert {name: report.written for name, report in account.splits.items()} == {"train": 3, "val": 0, "test": 2}
    assert skipped(account)[f"p10000032-s53189527-{dicom(3)}"] == "report has no findings"
    assert {s.metadata["view"] for s in samples(tmp_path / "out" / "train")} == {"LATERAL", "AP", "PA"}
    assert not (tmp_path / "out" / "val").exists()


def test_all_views_of_a_study_in_one_sample(mimic: Path, tmp_path: Path) -> None:
    hashing = Hashing(b"0123456789abcdef")
    convert(
        get_converter("mimic-cxr-jpg"),
        mimic,
        tmp_path / "hashed",
        chosen={"views": "study"},
        workers=1,
        hashing=hashing,
    )
    account = pack("mimic-cxr-jpg", mimic, tmp_path / "out", views="study")
    assert {name: report.written for name, report in account.splits.items()} == {"train": 2, "val": 1, "test": 2}
    first = samples(tmp_path / "out" / "train")[0]
    assert first.key == "p10000032-s50414267"
    assert [image.width for image in first.images] == [32, 31, 30]
    assert first.metadata["view"] == ["PA", "AP", "LATERAL"]
    assert first.metadata["image"] == [dicom(2), dicom(1), dicom(0)]
    assert samples(tmp_path / "out" / "test")[1].metadata["view"] == ["LATERAL"]  # a study without a frontal image
    hashed = samples(tmp_path / "hashed" / "train")[0].metadata
    assert hashed["image"] == [hashing.name(dicom(i)) for i in (2, 1, 0)]
    assert hashed["view"] == ["PA", "AP", "LATERAL"]


def test_reports_next_to_the_images(mimic: Path, tmp_path: Path) -> None:
    for path in (mimic / "mimic-cxr-reports").rglob("*.txt"):
        path.rename(mimic / "files" / path.relative_to(mimic / "mimic-cxr-reports" / "files"))
    assert pack("mimic-cxr-jpg", mimic, tmp_path / "out").written == 4


def test_missing_files_are_listed(tmp_path: Path, mimic: Path) -> None:
    with pytest.raises(DataError, match=r"files: the images.*\n.*split\.csv\.gz or .*split\.csv: the official split"):
        pack("mimic-cxr-jpg", tmp_path, tmp_path / "out")
    (mimic / "mimic-cxr-2.0.0-metadata.csv").write_text("dicom_id,view\n")
    with pytest.raises(DataError, match="has no column 'ViewPosition'"):
        pack("mimic-cxr-jpg", mimic, tmp_path / "out")
    (mimic / "mimic-cxr-reports").rename(mimic / "elsewhere")
    with pytest.raises(DataError, match=r"unpack mimic-cxr-reports\.zip of MIMIC-CXR\n.*physionet\.org"):
        pack("mimic-cxr-jpg", mimic, tmp_path / "out")


def test_tables_and_reports_of_other_tools(mimic: Path, tmp_path: Path) -> None:
    lines = gzip.decompress((mimic / "mimic-cxr-2.0.0-split.csv.gz").read_bytes()).decode().split("\n")
    lines[1:1] = [f"{dicom(90)},,10000032,train", "NaN,50414267,10000032,train", f"{dicom(91)},5", f"{dicom(92)},5,6,"]
    (mimic / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(("\ufeff" + "\n".join(lines)).encode()))
    table = mimic / "mimic-cxr-2.0.0-metadata.csv"
    table.write_text("\ufeff" + table.read_text().replace("LATERAL", "nan") + f"\n{dicom(4)}\n")
    reports = mimic / "mimic-cxr-reports" / "files"
    (reports / "p10" / "p10000032" / "s53189527.txt").write_bytes("IMPRESSION: Größe.".encode("cp1252"))
    (reports / "p10" / "p10000764" / "s57375967.txt").write_bytes("IMPRESSION: Clear.".encode("utf-16"))
    account = pack("mimic-cxr-jpg", mimic, tmp_path / "out", views="study")
    found = skipped(account)
    place = "mimic-cxr-2.0.0-split.csv.gz row"
    assert [found[f"{place} {i}"] for i in (1, 2, 3)] == [
        "study_id is empty",
        "dicom_id is empty",
        "subject_id is empty",
    ]
    assert found["p6-s5"] == "split is ''; it must be train, validate or test"
    assert found["p10000032-s53189527"].startswith("report is not UTF-8 (byte 0xf6 at position 14)")
    assert found["p10000764-s57375967"].startswith("report is UTF-16; convert it to UTF-8")
    first = samples(tmp_path / "out" / "train")[0]
    assert (first.key, first.metadata["view"]) == ("p10000032-s50414267", ["PA", "AP", ""])


@pytest.mark.parametrize(
    ("report", "findings", "impression"),
    [
        ("FINDINGS: A.\n\nIMPRESSION: B.\n\nADDENDUM: C.", "A.", "B."),
        ("FINDINGS:\nA: b.\nC.\n", "A: b. C.", ""),
        ("FINDINGS: A.\nIMPRESSION:\n\nRECOMMENDATION(S): B.", "A.", ""),
        ("  IMPRESSION:  B.\nIMPRESSION: again", "", "B. again"),
        ("FINDINGS:\nLUNGS: Clear.\nHEART: Normal.\nIMPRESSION: B.", "LUNGS: Clear. HEART: Normal.", "B."),
        ("HISTORY: Cough.\n\nPA AND LATERAL VIEWS OF THE CHEST:  Clear.\n\nIMPRESSION: B.", "Clear.", "B."),
        ("EXAM: CHEST\nCHEST, PA AND LATERAL:\nFINDINGS: A.\nCOMPARISON: None.\nLUNGS: no", "A.", ""),
        ("findings: lower case is no heading", "", ""),
        ("", "", ""),
    ],
)
def test_sections(report: str, findings: str, impression: str) -> None:
    assert split_sections(report) == {"findings": findings, "impression": impression}
