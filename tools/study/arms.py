"""The arms of the study and its runs in their fixed order, as protocol.md registers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

RATES = (3e-3, 1.5e-3)  # the two trials of every arm; the first one is the recipe's
TUNING_SEED = 9
FIRST_SEED = 10
SMALLER = (250, 1000)  # films of the other sizes of the training set
FILMS = 2000

_SHUFFLED = "[tools.study.terms.shuffled_similarity,tools.study.terms.shuffled_attention]"
_TEXT = (  # "whole, beta 0.3" of text_tuning.json
    "--teacher.text_weight=1",
    "--teacher.text_temperature=0.05",
    "--teacher.text_absent_weight=1",
    "--losses.beta=0.3",
)
_WITHOUT_TEACHER = ("--losses.alpha=0", "--losses.beta=0")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        title: what it is, for tables.
        settings: its words on the command line of `medalign train`; {seed} is the seed of the run.
        seeds: number of its seeds.
    """

    title: str
    settings: tuple[str, ...]
    seeds: int


ARMS: dict[str, Arm] = {
    "L": Arm("language loss", _WITHOUT_TEACHER, 8),
    "B": Arm("both losses: MedAlign", (), 8),
    "U": Arm("both, untrained teacher", ("--teacher.random_weights_seed={seed}",), 8),
    "T": Arm("both, text-conditioned", _TEXT, 8),
    "V": Arm("L_vis only", ("--losses.beta=0",), 5),
    "A": Arm("L_att only", ("--losses.alpha=0",), 5),
    "X": Arm("true boxes", (*_WITHOUT_TEACHER, "--losses.extra=[tools.study.terms.box_attention]"), 5),
    "S": Arm("both, shuffled patches", (*_WITHOUT_TEACHER, f"--losses.extra={_SHUFFLED}"), 5),
}
BASE = "base"  # the student before training
STAGES = (("L", "B"), ("U",), ("T",), ("V", "A", "X", "S"))  # arms whose runs alternate seed by seed


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        arm: a key of ARMS, or BASE.
        seed: seed of the films, of their order and of the adapters.
        rate: peak learning rate.
        films: films of the training set.
        trial: whether it is a trial, which is scored on the development set.
    """

    arm: str
    seed: int
    rate: float = RATES[0]
    films: int = FILMS
    trial: bool = False

    @property
    def name(self) -> str:
        """Its name, without the learning rate of runs that are not trials."""
        if self.trial:
            return f"trial-{self.arm}-{self.rate:g}"
        return f"{self.arm}-{self.seed}" if self.films == FILMS else f"{self.arm}-{self.films}-{self.seed}"

    @property
    def held_out(self) -> str:
        """The set that it is scored on, which is also the name of its evaluation."""
        return "development" if self.trial else "test"

    @property
    def settings(self) -> list[str]:
        """What it sets besides the folders: the words of its arm, the seed and the learning rate."""
        if self.arm == BASE:
            return ["--train.steps=0", f"--run.seed={self.seed}"]
        words = [word.format(seed=self.seed) for word in ARMS[self.arm].settings]
        return [*words, f"--run.seed={self.seed}", f"--train.lr={self.rate:g}"]


def trials(arm: str) -> list[Run]:
    """Return the trials of an arm."""
    return [Run(arm, TUNING_SEED, rate, trial=True) for rate in RATES]


def runs(arm: str) -> list[Run]:
    """Return the runs of an arm with the recipe's learning rate; `chosen` replaces it."""
    return [Run(arm, FIRST_SEED + place) for place in range(ARMS[arm].seeds)]


def plan() -> Iterator[Run]:
    """Yield all runs in their order. Those that are not trials have the recipe's rate until `chosen` replaces it."""
    yield Run(BASE, FIRST_SEED)
    for stage in STAGES:
        for arm in stage:
            yield from trials(arm)
        seeds = max(ARMS[arm].seeds for arm in stage)
        yield from (Run(arm, FIRST_SEED + place) for place in range(seeds) for arm in stage)
    yield from (Run(arm, FIRST_SEED + place, films=films) for films in SMALLER for place in range(3) for arm in "LB")


def chosen(run: Run, trial_scores: Mapping[str, float]) -> Run | None:
    """Return the run with the learning rate that its arm's trials chose, or None while one of them is missing.

    Args:
        run: a run; a trial and the base student are returned as they are.
        trial_scores: the primary metric of each finished trial, by its name.
    """
    if run.trial or run.arm == BASE:
        return run
    found = [trial_scores.get(one.name) for one in trials(run.arm)]
    if any(score is None for score in found):
        return None
    best = max(range(len(RATES)), key=lambda place: (found[place], -place))
    return replace(run, rate=RATES[best])
