"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from medalign.planning.memory import USABLE
from medalign.planning.plan import OnCard, Plan

_GIB = 2**30


def format_plan(plan: Plan, cards: Sequence[str]) -> str:
    """Format a plan for the terminal.

    Args:
        plan: the plan.
        cards: names of the GPUs to show.
    """
    return "\n".join([*_parameters(plan), "", *_memory(plan), "", *_step(plan), "", *_cards(plan, cards)]) + "\n"


def _parameters(plan: Plan) -> Iterator[str]:
    conditions, student = plan.conditions, {k: v for k, v in plan.parameters.items() if k != "teacher"}
    whole, trained = sum(student.values()), sum(plan.trainable.values())
    yield "derived from shapes and data sheets, not measured"
    yield (
        f"{conditions.nodes} nodes x {conditions.gpus} GPUs, ZeRO stage {plan.stage}, {plan.accumulation} x "
        f"{plan.micro_batch} samples per step and GPU, {conditions.length} tokens per sample, "
        f"{conditions.supervised} of them supervised"
    )
    yield ""
    yield "parameters"
    yield from (f"  {name:<16}{count:>18,}" for name, count in plan.parameters.items())
    yield f"  {'student':<16}{whole:>18,}  of which {trained:,} are trained ({trained / whole:.2%})"


def _memory(plan: Plan) -> Iterator[str]:
    state, count = plan.state, plan.micro_batch
    stored, recomputed = plan.sample["stored"], plan.sample["checkpointed"]
    yield "memory per GPU, GiB"
    for name in ("weights", "gathered", "gradients", "optimizer", "buckets", "teacher"):
        yield f"  {name:<16}{getattr(state, name) / _GIB:>10.2f}"
    yield f"  {'activations':<16}{count * stored.activations / _GIB:>10.2f}"
    yield f"  {'  checkpointed':<16}{count * recomputed.activations / _GIB:>10.2f}"
    for name in ("logits", "losses", "towers"):
        yield f"  {name:<16}{count * getattr(stored, name) / _GIB:>10.2f}"
    used = "checkpointed" if plan.checkpointing else "stored"
    yield f"  {'this run':<16}{plan.memory / _GIB:>10.2f}  (activations {used})"
    if state.offloaded:
        yield f"  {'in CPU memory':<16}{state.offloaded / _GIB:>10.2f}  per GPU"
    stages = ", ".join(f"{level}: {total / _GIB:.2f}" for level, total in plan.states.items())
    yield f"  without activations, by ZeRO stage: {stages}"


def _step(plan: Plan) -> Iterator[str]:
    wire = plan.traffic
    yield "per step"
    yield f"  {'operations per sample':<26}{plan.operations.total:>12.3e}"
    parts = f"gather {wire.gather / 1e9:.2f}, reduce {wire.reduce / 1e9:.2f}"
    yield f"  {'received per GPU, GB':<26}{wire.total / 1e9:>12.2f}  {parts}"
    if plan.steps is None:
        yield "  the steps of the run are not known: give --samples, the number of training samples, or train.steps"
    else:
        yield f"  {'steps of the run':<26}{plan.steps:>12,}"


def _cards(plan: Plan, cards: Sequence[str]) -> Iterator[str]:
    conditions = plan.conditions
    yield (
        f"at {conditions.efficiency:.0%} of the peak, {conditions.network / 1e9:g} GB/s per GPU between nodes, tensors "
        f"in {USABLE:.0%} of the memory"
    )
    yield f"  {'card':<18}{'fits':>5}{'largest micro-batch':>21}{'checkpointed':>14}{'s per step':>12}{'days':>9}"
    for name in cards:
        yield _card(plan.cards[name])


def _card(found: OnCard) -> str:
    days = "-" if found.days is None else f"{found.days:.3g}"
    return (
        f"  {found.card.name:<18}{'yes' if found.fits else 'no':>5}{found.micro_batch['stored']:>21}"
        f"{found.micro_batch['checkpointed']:>14}{found.seconds:>12.3g}{days:>9}"
    )
