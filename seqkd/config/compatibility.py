"""Combinations of configuration keys that cannot work together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seqkd.config.objectives import NATURAL_OBJECTIVE, ObjectiveConfig, SequenceReverseKLConfig
from seqkd.config.phases import TermConfig
from seqkd.config.teacher import MultiTeacherConfig

if TYPE_CHECKING:
    from seqkd.config.run import Config


def check(config: Config) -> None:
    """Refuse combinations of keys that cannot work. Raises ValueError with field, value and fix."""
    for name, phase in config.phases:
        where = "warmup." if name == "warmup" else ""
        if phase.prompts_per_step < config.learner.ranks:
            raise ValueError(
                f"{where}prompts_per_step {phase.prompts_per_step} leaves some of the "
                f"{config.learner.ranks} learner.ranks with nothing to learn. Set it to "
                f"{config.learner.ranks} or more."
            )
        for index, term in enumerate(phase.terms):
            field = f"{where}plus.{index - 1}." if index else where
            _check_teacher(config, term.objective, field)
            _check_samples(config, term, config.samples_per_prompt(phase), field)
    _check_staleness(config)
    _check_budget(config)
    if config.learner.compile and config.student.lora:
        raise ValueError(
            "learner.compile is true, but student.lora puts adapters into the layers, which do "
            "not compile in reasonable time. Set learner.compile to false."
        )
    tagged = isinstance(config.teacher, MultiTeacherConfig) and any(
        member.tags for member in config.teacher.members.values()
    )
    if tagged and config.data.tag_key is None:
        raise ValueError(
            "teacher.members have tags, but data.tag_key is not set. Name the column of the "
            "data set that holds them."
        )
    if config.evaluation.prompts and not config.data.holds_out:
        raise ValueError(
            f"evaluation.prompts is {config.evaluation.prompts}, but no prompts are held out. "
            "Set data.heldout_path, data.heldout_split or data.heldout_fraction, or "
            "evaluation.prompts to 0."
        )


def _check_staleness(config: Config) -> None:
    if not config.rollout.max_staleness:
        return
    if config.placement != "split":
        raise ValueError(
            "rollout.max_staleness 1 samples while the learner is at work, but with placement "
            "colocated they take turns on the same cores. Set placement to split, or "
            "rollout.max_staleness to 0."
        )
    if any(phase.weighs_a_mixture for _, phase in config.phases):
        raise ValueError(
            "rollout.max_staleness 1 learns from samples of an older student, but the weights "
            "of sampler 'mixture' are those of today's. Set rollout.max_staleness to 0."
        )


def _check_budget(config: Config) -> None:
    if config.budget is None:
        return
    kind, samplers = config.budget.kind, config.by_sampler
    sampled = {config.source(s) for s in samplers} - {"dataset", "corpus"}
    asked = {"teacher", "mixture"} & sampled or any(
        term.objective.teacher_need != "nothing" for term in config.terms
    )
    if (kind == "sampled_tokens" and not sampled) or (kind == "teacher_tokens" and not asked):
        raise ValueError(
            f"budget.kind {kind!r} is not spent by objective {config.objective.kind!r} on "
            f"samples of the {config.sampler}, so it would never end the run. Choose another "
            "kind, such as learner_tokens."
        )
    if config.warmup and kind == "prompts":
        of = config.warmup
        drawn = of.steps * of.prompts_per_step * len(of.by_sampler)
        if drawn >= config.budget.amount:
            raise ValueError(
                f"budget.amount {config.budget.amount:g} prompts is spent by the warm-up, which "
                f"draws {drawn}. Set it higher, or warmup.steps lower."
            )


def _check_teacher(config: Config, objective: ObjectiveConfig, where: str) -> None:
    scores, need = config.teacher.scores, objective.teacher_need
    if need == "distribution" and not config.teacher.distribution:
        raise ValueError(
            f"{where}objective {objective.kind!r} needs the teacher's distribution, but "
            f"teacher.scores is {scores!r}. "
            + (
                "Set it to top_k, where the endpoint gives log-probs and has the student's "
                "tokenizer. Else set sampler to teacher, or use a local teacher (kind vllm or "
                "hf)."
                if any(t.kind == "openai" for t in config.teachers.values())
                else "Set teacher.scores to hidden or top_k."
            )
        )
    if need == "logprobs" and scores == "none":
        raise ValueError(
            f"{where}objective {objective.kind!r} needs the teacher's log-probs, but "
            "teacher.scores is 'none'. Set it to logprobs, where the endpoint gives them and "
            "has the student's tokenizer. Else set sampler to teacher, or use a local teacher "
            "(kind vllm or hf)."
        )
    sampled = "teacher_logprob" in objective.stats() and objective.running
    if sampled and scores == "top_k":
        raise ValueError(
            f"{where}objective.estimator charges log-ratios of the whole distribution, but its "
            "running costs would be those of teacher.scores 'top_k', which are lower. Set "
            "objective.estimator to rao_blackwell, or teacher.scores to logprobs or hidden."
        )
    wanted = objective.divergence()
    if wanted and wanted[2] != 1 and scores == "top_k":
        raise ValueError(
            f"{where}objective.temperature {wanted[2]:g} changes the share of the tail, which "
            "teacher.scores 'top_k' knows at temperature 1 only. Set it to 1, or "
            "teacher.scores to hidden (a teacher of kind vllm or hf)."
        )


def _check_samples(config: Config, term: TermConfig, samples: int, where: str) -> None:
    objective, rollout = term.objective, config.rollout
    chat = any(getattr(t, "api", "") == "chat" for t in config.teachers.values())
    by_text = config.teacher.scores == "none" or chat
    if term.sampler == "mixture" and by_text:
        raise ValueError(
            f"{where}sampler 'mixture' weighs each completion by the teacher's probability of "
            "it, which is not known of text. Set teacher.api to completions and "
            "teacher.scores to logprobs or top_k, or sampler to teacher or student."
        )
    tempered = rollout.temperature != 1 or rollout.top_p != 1
    if tempered and (objective.on_policy or term.sampler == "mixture"):
        raise ValueError(
            f"{where}objective {objective.kind!r} is an expectation under the student "
            f"itself, but rollout draws with temperature {rollout.temperature:g} and "
            f"top_p {rollout.top_p:g}. Set both to 1."
        )
    corrected = [n for n in ("clip_ratio", "truncated_is") if getattr(objective, n, None)]
    if corrected and term.sampler == "mixture":
        raise ValueError(
            f"{where}objective.{corrected[0]} compares a token with the student that drew it, "
            "but sampler 'mixture' has tokens that the teacher drew. Set sampler to student."
        )
    if (
        isinstance(objective, SequenceReverseKLConfig)
        and objective.baseline == "leave_one_out"
        and samples < 2
    ):
        raise ValueError(
            f"{where}objective.baseline 'leave_one_out' compares the samples of a prompt, "
            f"but samples_per_prompt is {samples}. Set it to at least 2, or baseline to none."
        )
    if term.sampler == "journal" and config.journal is None:
        raise ValueError(
            f"{where}sampler 'journal' reads what seqkd precompute wrote, but journal is "
            "not set. Set journal.path to its directory."
        )
    if config.source(term.sampler) not in objective.samplers:
        raise ValueError(
            f"{where}objective {objective.kind!r} is defined on samples of the "
            f"{' or '.join(objective.samplers)}, but journal.records is "
            f"{config.source(term.sampler)!r}. Set objective.kind to "
            f"{NATURAL_OBJECTIVE[config.source(term.sampler)]}, or to a token-level one."
        )
    if term.sampler == "corpus" and config.data.corpus_path is None:
        raise ValueError(
            f"{where}sampler 'corpus' reads plain text, but data.corpus_path is not set. Name "
            "a file of texts."
        )
