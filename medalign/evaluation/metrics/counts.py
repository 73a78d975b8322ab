"""Counts of a set of predictions, apart from their scores."""

from __future__ import annotations

from collections.abc import Sequence

from medalign.evaluation.metrics.predictions import LENGTH, Prediction


def count(rows: Sequence[Prediction]) -> dict[str, int]:
    """Return the counts of the rows for scores.json.

    | key | meaning |
    | --- | --- |
    | answers_cut | answers without an end token: generation stopped at its limit |
    | answers_empty | answers without text |
    | without_image | samples without an image; only scores of text include them |
    | duplicates | samples whose key, question and answer also occur in another folder; both count |
    """
    unique = {(row.key, row.task, row.question, row.answer) for row in rows}
    return {
        "answers_cut": sum(row.finish_reason == LENGTH for row in rows),
        "answers_empty": sum(row.empty for row in rows),
        "without_image": sum(row.image_size is None for row in rows),
        "duplicates": len(rows) - len(unique),
    }
