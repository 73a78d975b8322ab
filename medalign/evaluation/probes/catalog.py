"""The names of the probes, and what each of them asks. This file imports nothing, so that help is shown at once."""

from __future__ import annotations

BLANK, SHUFFLED, OTHER, NO_IMAGE = "blank", "shuffled", "other", "no-image"
NO_QUESTION, CAPTION, PRESUPPOSED = "no-question", "caption", "presupposed"
RANDOM, POPULAR, ADVERSARIAL = "pope-random", "pope-popular", "pope-adversarial"

# The same questions, under another condition.
CHANGED = {
    BLANK: "the question on a gray image of the same size",
    SHUFFLED: "on its image with the patches in another order",
    OTHER: "on the image of another patient, or another image if the data do not name patients",
    NO_IMAGE: "without an image",
    NO_QUESTION: "the image without the question",
    CAPTION: "with the report (or caption) of the image in the place of the image",
}
# Questions about findings that the data say are present or absent, on the true image.
ASKED = {
    PRESUPPOSED: "a question that presupposes a finding which is absent; beside it, one whose finding is present",
    RANDOM: "POPE: as many questions 'Is there ...?' of present findings as of absent ones, drawn at random",
    POPULAR: "POPE: the absent ones are those most frequent in the data",
    ADVERSARIAL: "POPE: the absent ones are those that occur most with the present ones",
}
PROBES = CHANGED | ASKED

YES, NO = "yes", "no"
HERE, NOWHERE = "present", "none"  # references of questions that presuppose a finding
