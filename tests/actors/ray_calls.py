"""Functions shared by the tests of actors."""

from __future__ import annotations

import ray
from ray.exceptions import RayTaskError

from seqkd.config.run import Config
from seqkd.errors import SeqkdError

PROMPT, COMPLETION = 64, 32


def wait(ref):
    """Return the result of a call. Errors of seqkd in the actor are raised unchanged."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, SeqkdError):
            raise error.cause from None
        raise


def completions(call):
    """Return the completions of one call of an engine's ``sample``, in the order of prompts."""
    drawn = sorted((wait(ref) for ref in call), key=lambda completion: completion[:2])
    return [rollout for _, _, rollout in drawn]


def small_config(models, folder, teacher=None, scores="hidden"):
    """Return a config with two prompts, a teacher of kind hf and no held-out prompts."""
    file = folder / "train.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two and three"}\n')
    model = teacher or models["teacher"]
    return Config.model_validate(
        {
            "name": "x",
            "student": {"model": models["student"]},
            "teacher": {"kind": "hf", "model": model, "scores": scores},
            "data": {"path": str(file), "max_prompt_tokens": PROMPT},
            "rollout": {"max_tokens": COMPLETION},
            "objective": {"kind": "sampled_token"},
            "prompts_per_step": 2,
            "evaluation": {"prompts": 0},
            "steps": 1,
        }
    )
