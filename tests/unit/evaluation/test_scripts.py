"""Scores in every script: correct texts get full scores, and English text is scored as by the libraries."""

from __future__ import annotations

import re
import unicodedata

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from medalign.evaluation.metrics import Prediction, score
from medalign.evaluation.metrics.answers import ARTICLES, exact, open_recall, words
from medalign.evaluation.metrics.reports import bleu, bleu_with_interval, rouge_l
from medalign.evaluation.metrics.tokens import rouge_tokens

# A report and a version of it with one wrong word or character, far enough from its ends for a 4-gram to be left.
REPORTS = {
    "Arabic": ("الرئتان صافيتان، القلب بحجم طبيعي ولا يوجد انصباب", "الرئتان صافيتان، القلب بحجم طبيعي ولا يوجد كسر"),
    "Armenian": ("թոքերը մաքուր են, սիրտը մեծացած չէ", "թոքերը մաքուր են, սիրտը մեծացած է"),
    "Chinese": ("双肺清晰。心影正常。", "双肺清晰。心影增常。"),
    "French": ("épanchement pleural gauche très étendu", "épanchement pleural gauche très réduit"),
    "German": ("Pleuraerguß rechts, Herz nicht groß", "Pleuraerguß rechts, Herz nicht gro"),
    "Greek": ("πνεύμονες καθαροί χωρίς πλευριτική συλλογή", "πνεύμονες καθαροί χωρίς πλευριτική σκίαση"),
    "Hebrew": ("הריאות נקיות, הלב בגודל תקין", "הריאות נקיות, הלב בגודל מוגדל"),
    "Hindi": ("फेफड़े साफ हैं। हृदय का आकार सामान्य है।", "फेफड़े साफ हैं। हृदय का आकार बड़ा है।"),
    "Japanese": ("両側の肺野に異常なし。レントゲン所見正常。", "両側の肺野に異常あり。レントゲン所見正常。"),
    "Khmer": ("សួតទាំងសងខាងធម្មតា", "សួតទាំងពីរខាងធម្មតា"),
    "Korean": ("양쪽 폐는 깨끗하고 심장 크기는 정상입니다", "양쪽 폐는 깨끗하고 심장 크기는 큽니다"),
    "Persian": ("ریه‌ها پاک هستند و قلب طبیعی است", "ریه‌ها پاک هستند و قلب بزرگ است"),
    "Russian": ("легкие чистые, сердце не увеличено", "легкие чистые, сердце не расширено"),
    "Thai": ("ปอดทั้งสองข้างปกติ ไม่มีน้ำในเยื่อหุ้มปอด", "ปอดทั้งสองข้างปกติ ไม่มีลมในเยื่อหุ้มปอด"),
    "Tibetan": ("གློ་བ་གཉིས་ཀ་གཙང་མ་རེད།", "གློ་བ་གཉིས་ཀ་གཙང་མ་མིན།"),
    "Vietnamese": ("hai phổi sáng, tim không to, không tràn dịch", "hai phổi sáng, tim không to, không tràn khí"),
}
SHORT = {
    "Chinese": "积液",
    "Korean": "심장 비대",
    "Hindi": "सामान्य",
    "Russian": "норма",
    "Thai": "ปกติ",
    "Greek": "χωρίς",
}


@pytest.mark.parametrize("language", REPORTS)
def test_equal_reports_get_full_scores_and_similar_ones_partial_scores(language):
    reference, similar = REPORTS[language]
    assert rouge_l(reference, reference) == 1.0
    assert bleu([reference], [reference]) == pytest.approx(100.0)
    assert 0.5 < rouge_l(similar, reference) < 1.0
    assert 20 < bleu([similar], [reference]) < 100
    assert 0.5 < open_recall(similar, reference) < 1.0 and not exact(similar, reference)
    other = REPORTS["Greek" if language != "Greek" else "Russian"][0]
    assert rouge_l(other, reference) == 0.0 and open_recall(other, reference) == 0.0


@pytest.mark.parametrize("language", REPORTS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_text_are_equal(language, form):
    reference, similar = REPORTS[language]
    assert rouge_l(unicodedata.normalize(form, reference), reference) == 1.0
    assert bleu([unicodedata.normalize(form, reference)], [reference]) == pytest.approx(100.0)
    assert exact(unicodedata.normalize(form, reference), reference)
    assert rouge_l(unicodedata.normalize(form, similar), reference) == rouge_l(similar, reference)
    assert bleu([unicodedata.normalize(form, similar)], [reference]) == bleu([similar], [reference])


@pytest.mark.parametrize("text", SHORT.values(), ids=SHORT)
def test_a_text_shorter_than_four_words_gets_full_scores(text):
    assert rouge_l(text, text) == 1.0 and bleu([text], [text]) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("双肺，CT 3级", ["双", "肺", "ct", "3", "级"]),
        ("ไม่มีน้ำ", ["ไ", "ม่", "มี", "น้ำ"]),  # vowel signs and tone marks stay with their letter
        ("レントゲン", ["レ", "ン", "ト", "ゲ", "ン"]),
        ("हृदय का आकार।", ["हृदय", "का", "आकार"]),
        ("폐는 깨끗", ["폐는", "깨끗"]),
        ("Herz groß, 5 µg/m²", ["herz", "groß", "5", "µg", "m"]),
        ("snake_case it\N{RIGHT SINGLE QUOTATION MARK}s", ["snake", "case", "it", "s"]),
        ("ＣＴ　Ⅲ级", ["ct", "iii", "级"]),  # full width, and a single-character numeral
        (":-)", [":-)"]),
        (" ", []),
    ],
)
def test_tokens_of_rouge_l(text, tokens):
    assert rouge_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("右侧胸腔积液", list("右侧胸腔积液")),
        ("约3.5厘米", ["约", "3.5", "厘", "米"]),
        ("फेफड़े में", ["फेफड़े", "में"]),
        ("ＣＴ", ["ct"]),
    ],
)
def test_words_of_answers(text, expected):
    assert words(text) == [unicodedata.normalize("NFC", word) for word in expected]


def test_a_letter_that_is_not_ascii_is_part_of_its_word():
    assert rouge_l("gro", "groß") == rouge_l("caf", "café") == rouge_l("g", "µg") == 0.0
    assert open_recall("左侧胸腔积液", "右侧胸腔积液") == pytest.approx(5 / 6)
    assert rouge_l("双肺清晰。心影增常。", "双肺清晰。心影正常。") == pytest.approx(7 / 8)


def test_chinese_is_scored_as_by_the_tokenizer_of_sacrebleu():
    pairs = [
        REPORTS["Chinese"],
        ("右肺上叶见结节，直径约3.5厘米。", "右肺下叶见结节，直径约3厘米。"),
        ("CT平扫未见异常", "未见异常"),
    ]
    references, predictions = zip(*pairs, strict=True)
    expected = sacrebleu.corpus_bleu(list(predictions), [list(references)], tokenize="zh").score
    assert bleu(predictions, references) == pytest.approx(expected)


OLD_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:'[^\W_]+)*")
TYPOGRAPHY = "\N{RIGHT SINGLE QUOTATION MARK}\N{LEFT DOUBLE QUOTATION MARK}\N{EN DASH}\N{DEGREE SIGN}\N{BULLET}²½×±"
ENGLISH = st.text(st.sampled_from([*map(chr, range(32, 127)), "\n", *TYPOGRAPHY]), max_size=60)


@settings(deadline=None)
@given(ENGLISH, ENGLISH)
def test_english_is_scored_as_before(prediction, reference):
    """The expected values are those of the libraries without the tokenizers of this project.

    Only a text that equals its reference has 100 points here, even if it is shorter than the four tokens of BLEU-4.
    """
    default = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    if re.search("[A-Za-z0-9]", prediction + reference):
        assert rouge_l(prediction, reference) == default
    bare = sacrebleu.corpus_bleu([prediction], [[reference]])
    if bare.sys_len and bare.sys_len == bare.ref_len and bare.counts == bare.totals:  # equal, and perhaps too short
        assert bleu([prediction], [reference]) == pytest.approx(100)
    else:
        assert bleu([prediction], [reference]) == bare.score
    found = OLD_WORD.findall(reference.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    assert words(reference) == ([word for word in found if word not in ARTICLES] or found)


def test_signatures_contain_the_tokenization():
    english, chinese = "the lungs are clear", "双肺清晰"
    assert bleu_with_interval([english], [english]).signature == str(sacrebleu_signature())
    assert "|tok:13a|" in bleu_with_interval([chinese], [english]).signature  # it depends only on the references
    assert "|eff:yes|tok:13a+characters|" in bleu_with_interval([english], [chinese]).signature
    scores = score(
        [Prediction("k", "report", "q", chinese, "", chinese), Prediction("l", "vqa", "q", "yes", "", "yes")]
    )
    assert "tok:13a+characters" in scores["bleu_signature"]
    assert "tok:unicode" in scores["rouge_l_signature"] and "tok:unicode" in scores["answers_signature"]


def sacrebleu_signature():
    metric = sacrebleu.BLEU()
    metric.corpus_score(["a"], [["a"]])
    return metric.get_signature()
