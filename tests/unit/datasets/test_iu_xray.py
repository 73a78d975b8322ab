"""IU-Xray, in OpenI's XML and PNG and in R2Gen's format."""

from __future__ import annotations

from pathlib import Path

import pytest

from medalign.errors import DataError
from tests.unit.datasets.conversion import pack, samples, skipped, write_json, write_picture

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<eCitation>
  <meta type="rr"/>
  <uId id="CXR{n}"/>
  <MedlineCitation Owner="Indiana University" Status="supplied by publisher">
    <Article PubModel="Electronic">
      <Abstract>
        <AbstractText Label="COMPARISON">None.</AbstractText>
        <AbstractText Label="INDICATION">Positive TB test</AbstractText>
        <AbstractText Label="FINDINGS">{findings}</AbstractText>
        <AbstractText Label="IMPRESSION">{impression}</AbstractText>
      </Abstract>
    </Article>
  </MedlineCitation>
  <MeSH><major>Cardiomegaly/mild</major><minor>heart</minor></MeSH>
  {pictures}
</eCitation>
"""
BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><eCitation><uId id="CXR9"/>&b;</eCitation>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><eCitation><uId id="CXR9"/>&a;</eCitation>'


def write_study(folder: Path, n: int, findings: str = "Clear   lungs.", impression: str = "Normal.", views: int = 2):
    names = [f"CXR{n}_IM-0001-{view}001" for view in range(1, views + 1)]
    pictures = "".join(f'<parentImage id="{name}"><figureId>F1</figureId></parentImage>' for name in names)
    text = REPORT.format(n=n, findings=findings, impression=impression, pictures=pictures)
    (folder / "ecgen-radiology").mkdir(parents=True, exist_ok=True)
    (folder / "ecgen-radiology" / f"{n}.xml").write_text(text, encoding="utf-8")
    for view, name in enumerate(names):
        write_picture(folder / "NLMCXR_png" / f"{name}.png", 10 * n + view, 30 + view, 30)


def test_a_study_becomes_its_first_image_with_the_report(tmp_path: Path) -> None:
    for n in range(1, 13):
        write_study(tmp_path / "in", n)
    account = pack("iu-xray", tmp_path / "in", tmp_path / "out", test_share=0.4)
    train, test = samples(tmp_path / "out" / "train"), samples(tmp_path / "out" / "test")
    assert account.written == 12 == len(train) + len(test)
    assert {s.metadata["case"] for s in train + test} == {f"CXR{n}" for n in range(1, 13)}
    one = next(s for s in train + test if s.key == "CXR10-0")
    assert (one.task, one.answer) == ("report", "Clear lungs. Normal.")
    assert one.images[0].size == (30, 30)
    assert one.metadata["findings"] == "Clear lungs."
    assert one.metadata["indication"] == "Positive TB test"
    assert one.metadata["labels"] == ["Cardiomegaly/mild"]


def test_all_views_of_a_study_are_in_one_split(tmp_path: Path) -> None:
    for n in range(1, 9):
        write_study(tmp_path / "in", n)
    pack("iu-xray", tmp_path / "in", tmp_path / "out", views="all", test_share=0.5, sections="impression")
    sides = [{s.metadata["case"] for s in samples(tmp_path / "out" / side)} for side in ("train", "test")]
    assert sides[0].isdisjoint(sides[1])
    train = samples(tmp_path / "out" / "train")
    assert [s.key[-2:] for s in train[:2]] == ["-0", "-1"]
    assert {s.answer for s in train} == {"Normal."}


def test_projections_determine_which_image_is_frontal(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for n in (1, 2, 3):
        write_study(folder, n)
    rows = ["uid,filename,projection", "1,1_IM-0001-1001.dcm.png,Lateral", "1,1_IM-0001-2001.dcm.png,Frontal"]
    rows += ["2,2_IM-0001-1001.dcm.png,Frontal", "3,3_IM-0001-2001.dcm.png,Lateral"]
    (folder / "indiana_projections.csv").write_text("\n".join(rows))
    account = pack("iu-xray", folder, tmp_path / "out", test_share=0.0)
    chosen = {s.metadata["case"]: s.metadata["image"] for s in samples(tmp_path / "out" / "train")}
    assert chosen == {"CXR1": "CXR1_IM-0001-2001.png", "CXR2": "CXR2_IM-0001-1001.png"}
    assert skipped(account) == {"CXR3": "report names no image, or no frontal one"}


def test_a_study_becomes_one_sample_with_all_its_images(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for n, views in ((1, 3), (2, 1), (3, 0)):
        write_study(folder, n, views=views)
    plain = pack("iu-xray", folder, tmp_path / "plain", test_share=0.0, views="study")
    assert [[image.width for image in s.images] for s in samples(tmp_path / "plain" / "train")] == [[30, 31, 32], [30]]
    assert list(skipped(plain)) == ["CXR3"]
    rows = ["uid,filename,projection", "1,1_IM-0001-1001.dcm.png,Lateral", "1,1_IM-0001-2001.dcm.png,Frontal"]
    (folder / "indiana_projections.csv").write_text("\n".join([*rows, "2,2_IM-0001-1001.dcm.png,Lateral"]))
    pack("iu-xray", folder, tmp_path / "out", test_share=0.0, views="study")
    first, second = samples(tmp_path / "out" / "train")
    assert (first.key, [image.width for image in first.images]) == ("CXR1-0", [31, 30, 32])  # the frontal one first
    assert first.metadata["image"] == [f"CXR1_IM-0001-{view}001.png" for view in (2, 1, 3)]
    assert [image.width for image in second.images] == [30]


def test_what_is_skipped_and_hostile_xml(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_study(folder, 1)
    write_study(folder, 2, findings="", impression="")
    write_study(folder, 3, views=0)
    write_study(folder, 4)
    (folder / "NLMCXR_png" / "CXR4_IM-0001-1001.png").unlink()
    reports = folder / "ecgen-radiology"
    (reports / "5.xml").write_text("<eCitation>")
    (reports / "8.xml").write_text(BOMB)
    (reports / "9.xml").write_text(OUTSIDE)
    account = pack("iu-xray", folder, tmp_path / "out", test_share=0.0)
    assert account.written == 1
    found = skipped(account)
    assert found["CXR2-0"] == "report has no findings or impression"
    assert found["CXR3"] == "report names no image, or no frontal one"
    assert found["CXR4-0"].startswith("image 'CXR4_IM-0001-1001.png' cannot be read")
    assert found["ecgen-radiology/5.xml"].startswith("XML cannot be read")
    for name in ("8.xml", "9.xml"):
        assert found[f"ecgen-radiology/{name}"].startswith("XML has a document type or entities")


def test_files_from_other_tools(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_study(folder, 1, findings="NaN")
    write_study(folder, 2, findings="nan", impression="nan")
    rows = ["uid,filename,projection", "1,1_IM-0001-1001.dcm.png,Frontal", "2", ",,Frontal"]
    (folder / "indiana_projections.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    (folder / "ecgen-radiology" / "3.xml").write_text('<?xml version="1.0" encoding="klingon"?><eCitation/>')
    account = pack("iu-xray", folder, tmp_path / "out", test_share=0.0, views="study")
    assert [s.answer for s in samples(tmp_path / "out" / "train")] == ["Normal."]
    found = skipped(account)
    assert found["CXR2-0"] == "report has no findings or impression"
    assert found["ecgen-radiology/3.xml"].startswith("XML cannot be read (")


def test_missing_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ecgen-radiology: .*\n  NLMCXR_png or images: .*\n.*openi\.nlm\.nih\.gov"):
        pack("iu-xray", tmp_path, tmp_path / "out")
    (tmp_path / "ecgen-radiology").mkdir()
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"ecgen-radiology/\*\.xml"):
        pack("iu-xray", tmp_path, tmp_path / "out")


def test_r2gen(tmp_path: Path) -> None:
    folder = tmp_path / "iu_xray"
    cases = {"train": ["CXR1_IM-0001", "CXR2_IM-0002"], "val": ["CXR3_IM-0003"], "test": ["CXR4_IM-0004"]}
    annotation: dict[str, list[object]] = {
        split: [
            {
                "id": case,
                "report": f"Report of {case}.",
                "image_path": [f"{case}/0.png", f"{case}/1.png"],
                "split": split,
            }
            for case in names
        ]
        for split, names in cases.items()
    }
    annotation["val"] += [{"id": 3, "report": 12, "image_path": "images/CXR1_IM-0001/0.png"}]
    annotation["test"] += [{"id": "CXR5"}, {"id": "CXR6", "report": " ", "image_path": ["CXR1_IM-0001/0.png"]}]
    write_json(folder / "annotation.json", annotation)
    for case in sum(cases.values(), []):
        for view in (0, 1):
            write_picture(folder / "images" / case / f"{view}.png", view, 20 + view, 20)
    account = pack("r2gen", folder, tmp_path / "out")
    assert {name: report.written for name, report in account.splits.items()} == {"train": 2, "val": 2, "test": 1}
    assert skipped(account) == {
        "annotation.json test entry 1": "it is not a study with id and image_path",
        "CXR6-0": "report is empty",
    }
    first = samples(tmp_path / "out" / "train")[0]
    assert (first.key, first.answer, first.images[0].size) == ("CXR1_IM-0001-0", "Report of CXR1_IM-0001.", (20, 20))
    number = samples(tmp_path / "out" / "val")[1]
    assert (number.key, number.answer, len(number.images)) == ("3-0", "12", 1)
    every = pack("r2gen", folder, tmp_path / "all", views="all")
    assert every.splits["train"].written == 4
    assert [s.images[0].width for s in samples(tmp_path / "all" / "train")] == [20, 21, 20, 21]
    pack("r2gen", folder, tmp_path / "study", views="study")
    both = samples(tmp_path / "study" / "train")
    assert [s.key for s in both] == ["CXR1_IM-0001-0", "CXR2_IM-0002-0"]
    assert [[image.width for image in s.images] for s in both] == [[20, 21]] * 2
    assert both[0].metadata["image"] == ["CXR1_IM-0001/0.png", "CXR1_IM-0001/1.png"]
    write_json(folder / "annotation.json", {"train": {"id": 1}})
    with pytest.raises(DataError, match="train is a JSON dict; it must be a list"):
        pack("r2gen", folder, tmp_path / "none")
    write_json(folder / "annotation.json", [])
    with pytest.raises(DataError, match="lists train, val and test"):
        pack("r2gen", folder, tmp_path / "none")
