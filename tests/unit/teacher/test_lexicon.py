import pytest
import yaml

from medalign.errors import ConfigError
from medalign.phantom import KINDS, stream, study
from medalign.teacher.lexicon import Finding, Lexicon, read_lexicon
from tools.phantom_models.teacher_evaluation import ABSENT, PRESENT

NAMES = {"effusion": "pleural effusion"}  # findings that the lexicon calls otherwise than the phantoms


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Is there a NODULE in the left lung?", {"nodule"}),
        ("Is there a pleural  effusion or\npneumothorax?", {"pleural effusion", "pneumothorax"}),
        ("Is the heart enlarged?", {"cardiomegaly"}),
        ("Is this study normal?", set()),
        ("Is there nodularity?", set()),  # whole words only
        ("", set()),
    ],
)
def test_a_question_names_findings_by_whole_words(question, found):
    assert read_lexicon().named(question) == found


def test_a_longer_phrase_hides_a_shorter_one():
    lexicon = Lexicon({"a": Finding(("mass",), ("x",), ("y",)), "b": Finding(("lung mass",), ("x",), ("y",))})
    assert lexicon.named("Is there a lung mass?") == {"b"}
    assert lexicon.named("Is there a lung mass or a mass elsewhere?") == {"a", "b"}


def test_every_question_about_one_finding_of_a_phantom_names_it():
    lexicon = read_lexicon()
    asked = [q.question for i in range(150) for q in study(stream(0, "test"), i).questions]
    words = {"nodule", "effusion", "consolidation", "pneumothorax", "cardiomegaly", "heart"}
    about = [q for q in asked if words & set(q.lower().strip("?").split())]
    assert len(about) > 200 and all(len(lexicon.named(question)) == 1 for question in about)
    assert all(not lexicon.named(question) for question in asked if question not in about)


def test_the_packaged_prompts_are_those_of_the_packaged_teachers_evaluation():
    findings = read_lexicon().findings
    for kind in KINDS:
        finding = findings[NAMES.get(kind, kind)]
        assert set(finding.present) == set(PRESENT[kind]) and set(finding.absent) == set(ABSENT[kind])


ENTRY = {"words": ["mass"], "present": ["A {size} mass."], "absent": ["No mass."]}


def test_slots_are_filled(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"slots": {"size": ["small", "large"]}, "findings": {"mass": ENTRY}}))
    assert read_lexicon(file).findings["mass"].present == ("A small mass.", "A large mass.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ({"findings": {}}, "it has no findings"),
        ({"findings": {"mass": ENTRY}}, "cannot be used .*size"),  # a slot without fillings
        (
            {"findings": {"mass": {"words": ["mass"], "present": ["A mass."]}}},
            "mass must have lists of texts for words",
        ),
        ({"findings": {"mass": ENTRY | {"present": "A mass."}}}, "mass must have lists of texts"),
        (
            {"slots": {"size": ["small"]}, "findings": {"a": ENTRY, "b": ENTRY | {"words": ["Mass"]}}},
            "several findings have the words mass",
        ),
    ],
)
def test_a_lexicon_that_cannot_be_used_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "own.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=rf"teacher\.lexicon .*own\.yaml.*{message}"):
        read_lexicon(file)
    with pytest.raises(ConfigError, match="absent.yaml"):
        read_lexicon(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("report", "stated"),
    [
        ("There is a small nodule in the left lower zone. No pleural effusion.", {"nodule"}),
        ("No pneumothorax, but a right effusion.", {"pleural effusion"}),
        ("No pneumothorax or effusion; consolidation on the left", {"consolidation"}),
        ("Heart size is normal. The heart is not enlarged. The lungs are clear.", set()),
        ("The heart is enlarged.", {"cardiomegaly"}),
        ("There isn't any nodule. Resolved edema. Pneumonia is unlikely.", set()),
        ("FINDINGS: 1.5 cm nodule. IMPRESSION: negative for pneumonia", {"nodule"}),
        ("", set()),
    ],
)
def test_what_a_report_states(report, stated):
    assert read_lexicon().stated(report) == stated


def test_phantom_reports_state_their_findings():
    """Every wording that the lexicon names; a blunted angle and an area of opacity are named by their noun."""
    for index in range(200):
        item = study(stream(3, "test"), index)
        assert read_lexicon().stated(item.report) == {NAMES.get(found.kind, found.kind) for found in item.findings}
