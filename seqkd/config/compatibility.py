"""Checks for combinations of configuration keys that cannot work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seqkd.config.objectives import ObjectiveConfig, SequenceReverseKLConfig
from seqkd.config.phases import TermConfig
from seqkd.config.samplers import SAMPLERS
from seqkd.config.teacher import TeacherConfig

if TYPE_CHECKING:
    from seqkd.config.run import Config


def check(config: Config) -> None:
    """Reject combinations of keys that cannot work. Raises ValueError with field, value and fix."""
    for name, phase in config.phases:
        where = "warmup." if name == "warmup" else ""
        if phase.prompts_per_step < config.learner.ranks:
            raise ValueError(
                f"{where}prompts_per_step is {phase.prompts_per_step}, fewer than the "
                f"{config.learner.ranks} learner.ranks. Set it to {config.learner.ranks} or more, "
                "or lower learner.ranks."
            )
        for index, term in enumerate(phase.terms):
            field = f"{where}extra_terms.{index - 1}." if index else where
            _check_teacher(config.teacher, term.objective, field)
            _check_samples(config, term, config.samples_per_prompt(phase), field)
    _check_staleness(config)
    _check_budget(config)
    if config.learner.compile and config.student.lora:
        raise ValueError(
            "learner.compile is true, but layers with student.lora adapters do not compile in "
            "reasonable time. Set learner.compile to false."
        )
    if config.teacher.tagged and config.data.tag_key is None:
        raise ValueError(
            "teacher.teachers have tags, but data.tag_key is not set. Set it to the column with "
            "the tags."
        )
    if config.evaluation.prompts and not config.data.holds_out:
        raise ValueError(
            f"evaluation.prompts is {config.evaluation.prompts}, but no prompts are held out. "
            "Set data.heldout_path, data.heldout_split or data.heldout_fraction, or "
            "evaluation.prompts to 0."
        )
    if config.evaluation.tasks and not config.evaluation.prompts:
        raise ValueError(
            f"evaluation.tasks has {', '.join(config.evaluation.tasks)}, but evaluation.prompts is "
            "0. Set evaluation.prompts to at least 1, or remove evaluation.tasks."
        )


def _check_staleness(config: Config) -> None:
    if not config.rollout.max_off_policy_steps:
        return
    if config.placement != "split":
        raise ValueError(
            "rollout.max_off_policy_steps is 1, which samples while the learner is running, but "
            "with placement colocated the two alternate on the same cores. Set placement to split, "
            "or rollout.max_off_policy_steps to 0."
        )
    if any(phase.weighs_a_mixture for _, phase in config.phases):
        raise ValueError(
            "rollout.max_off_policy_steps is 1, which trains on samples of an older student, but "
            "sampler 'mixture' computes importance weights with the current student. Set "
            "rollout.max_off_policy_steps to 0."
        )


def _check_budget(config: Config) -> None:
    if config.budget is None:
        return
    kind, samplers = config.budget.kind, config.by_sampler
    sources = [SAMPLERS[config.source(sampler)] for sampler in samplers]
    sampled = any(not source.from_data for source in sources)
    asked = any(source.on_teacher for source in sources) or any(
        term.objective.teacher_need != "nothing" for term in config.terms
    )
    if (kind == "sampled_tokens" and not sampled) or (kind == "teacher_tokens" and not asked):
        raise ValueError(
            f"budget.kind is {kind!r}, but objective {config.objective.kind!r} with sampler "
            f"{config.sampler!r} never uses such a budget, so it would not end the run. Set "
            "budget.kind to another kind, such as learner_tokens."
        )
    if config.warmup and kind == "prompts":
        warmup = config.warmup
        drawn = warmup.steps * warmup.prompts_per_step * len(warmup.by_sampler)
        if drawn >= config.budget.amount:
            raise ValueError(
                f"budget.amount is {config.budget.amount:g} prompts, but the warm-up alone uses "
                f"{drawn}. Raise it, or lower warmup.steps."
            )


def _check_teacher(teacher: TeacherConfig, objective: ObjectiveConfig, where: str) -> None:
    scores, need = teacher.scores, objective.teacher_need
    if need == "distribution" and not teacher.distribution:
        hint = next(iter(teacher.named.values())).distribution_hint
        raise ValueError(
            f"{where}objective {objective.kind!r} needs the teacher's distribution, but "
            f"teacher.scores is {scores!r}. {hint}"
        )
    if need == "logprobs" and scores == "none":
        raise ValueError(
            f"{where}objective {objective.kind!r} needs the teacher's log-probs, but "
            "teacher.scores is 'none'. Set it to logprobs if the endpoint returns log-probs and "
            "has the student's tokenizer. Otherwise set sampler to teacher, or use a local "
            "teacher (kind vllm or hf)."
        )
    sampled = "teacher_logprob" in objective.stats() and objective.running
    if sampled and scores == "top_k":
        raise ValueError(
            f"{where}objective.estimator uses log-ratios of the full distribution, but with "
            "teacher.scores 'top_k' its running costs are truncated divergences, which are lower. "
            "Set objective.estimator to rao_blackwell, or teacher.scores to logprobs or hidden."
        )
    if objective.end_stats() and scores == "top_k":
        raise ValueError(
            f"{where}objective.stop is 'graded', which needs the teacher's probability of the end "
            "at every state, but teacher.scores is 'top_k'. Set objective.stop to future, or "
            "teacher.scores to hidden (a teacher of kind vllm or hf)."
        )
    wanted = objective.divergence()
    if wanted and wanted[2] != 1 and scores == "top_k":
        raise ValueError(
            f"{where}objective.temperature is {wanted[2]:g}, but teacher.scores 'top_k' contains "
            "the probability of the tail only at temperature 1. Set it to 1, or teacher.scores to "
            "hidden (a teacher of kind vllm or hf)."
        )


def _check_samples(config: Config, term: TermConfig, samples: int, where: str) -> None:
    objective, rollout, traits = term.objective, config.rollout, SAMPLERS[term.sampler]
    by_text = any(teacher.by_text for teacher in config.teachers.values())
    if traits.weighted and by_text:
        raise ValueError(
            f"{where}sampler {term.sampler!r} needs the teacher's probability of every completion, "
            "but this teacher returns text only. Set teacher.api to completions and teacher.scores "
            "to logprobs or top_k, or sampler to teacher or student."
        )
    tempered = rollout.temperature != 1 or rollout.top_p != 1
    if tempered and (objective.on_policy or traits.weighted):
        raise ValueError(
            f"{where}objective {objective.kind!r} is an expectation under the student's own "
            f"distribution, but rollout.temperature is {rollout.temperature:g} and rollout.top_p "
            f"is {rollout.top_p:g}. Set both to 1."
        )
    corrected = [n for n in ("clip_ratio", "importance_ratio_cap") if getattr(objective, n, None)]
    if corrected and traits.weighted:
        raise ValueError(
            f"{where}objective.{corrected[0]} corrects for samples of an older student, but with "
            f"sampler {term.sampler!r} some tokens are sampled by the teacher. Set sampler to "
            f"student, or remove {corrected[0]}."
        )
    if (
        isinstance(objective, SequenceReverseKLConfig)
        and objective.baseline == "leave_one_out"
        and samples < 2
    ):
        raise ValueError(
            f"{where}objective.baseline 'leave_one_out' averages over the other samples of a "
            f"prompt, but samples_per_prompt is {samples}. Set it to at least 2, or baseline to "
            "none."
        )
    if traits.recorded and config.teacher_cache is None:
        raise ValueError(
            f"{where}sampler {term.sampler!r} reads completions from the teacher cache, but "
            "teacher_cache is not set. Record a cache with seqkd precompute and set "
            "teacher_cache.path to its directory."
        )
    source = config.source(term.sampler)
    if source not in objective.samplers:
        raise ValueError(
            f"{where}objective {objective.kind!r} is defined on samples of the "
            f"{' or '.join(objective.samplers)}, but teacher_cache.records is "
            f"{source!r}. Set objective.kind to {SAMPLERS[source].objective} or to a token-level "
            "objective."
        )
    if traits.plain_text and config.data.corpus_path is None:
        raise ValueError(
            f"{where}sampler {term.sampler!r} reads plain text, but data.corpus_path is not set. "
            "Set it to a file of texts."
        )
