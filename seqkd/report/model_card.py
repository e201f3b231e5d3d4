"""The model card of a distilled student: README.md beside its weights, in the hub's format."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from seqkd.config.phases import PhaseConfig, TermConfig
from seqkd.config.run import Config
from seqkd.config.student import PruneInitConfig
from seqkd.config.teacher import EndpointTeacherConfig, SingleTeacherConfig
from seqkd.data.readers import JSON, TABLES
from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.summary import LABELS
from seqkd.files import disk_errors
from seqkd.models.loading import expand
from seqkd.storage.run_directory import EXECUTION_KEYS, SECTIONS

SAMPLES = {
    "student": "its own samples",
    "mixture": "a mixture of its own and the teacher's samples",
    "teacher": "the teacher's samples",
    "dataset": "the data set's answers",
    "corpus": "plain text",
    "journal": "recorded completions",
}
LICENSE = ("license", "license_name", "license_link")


def write(run: Path, config: Config, evaluation: Mapping[str, Any] | None) -> None:
    """``student/README.md`` of the run in ``run``; ``evaluation`` as in evaluation.json, None where
    nothing was measured. StorageError where it cannot be written."""
    file = run / "student" / "README.md"
    tokens = learnt_tokens(run / "metrics.jsonl")
    license_ = license_of(config.student.model)
    sections = (
        _head(config, license_),
        _how(config, tokens),
        _evaluation(config, evaluation),
        _use(config),
        _configuration(config),
    )
    front = metadata(config, license_).to_yaml()
    card = ModelCard(f"---\n{front}\n---\n\n" + "\n".join(sections))
    with disk_errors(file):
        card.save(file)


def metadata(config: Config, license_: Mapping[str, str]) -> ModelCardData:
    """The front matter. The hub knows no relation for pruning: a pruned student is a finetune of
    its source with a tag."""
    base = hub_name(config.student.model)
    data = config.data
    paths = (data.path, data.heldout_path, data.corpus_path)
    datasets = dict.fromkeys(filter(None, (hub_name(path) for path in paths if path)))
    pruned = ["pruned"] if isinstance(config.student.init, PruneInitConfig) else []
    more: dict[str, Any] = {"base_model_relation": "finetune"} if base else {}
    more |= license_
    return ModelCardData(
        base_model=base,
        datasets=list(datasets) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", *pruned, "seqkd"],
        **more,
    )


def hub_name(name: str) -> str | None:
    """``name`` where it is one of the hub's, None where it is a path of this machine."""
    local = Path(name).expanduser().exists() or Path(name).suffix in (*JSON, *TABLES)
    return name if re.fullmatch(r"([\w.-]+/)?\w[\w.-]*", name) and not local else None


def license_of(model: str) -> dict[str, str]:
    """The license that the model's own card states; empty where there is no card, or none in it."""
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(
            expand(model),
            "README.md",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:  # a directory that was moved while the run went on
        return {}
    if file is None:
        return {}
    try:
        known = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # a page that is no card says nothing
        return {}
    return {key: str(known[key]) for key in LICENSE if known.get(key)}


def learnt_tokens(metrics: Path) -> Counter[str]:
    """Completion tokens that the loss was taken over, by sampler, of every step that was taken."""
    tokens: Counter[str] = Counter()
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("skipped"):
            continue
        for key, value in row.items():
            sampler, _, last = key.rpartition("/")
            if last == "tokens":
                tokens[sampler or row["sampler"]] += value
    return tokens


def _head(config: Config, license_: Mapping[str, str]) -> str:
    init = config.student.init
    pruned = ""
    if isinstance(init, PruneInitConfig):
        first, last = init.drop_layers
        pruned = f" without decoder layers [{first}, {last})"
    teachers = " and ".join(_teacher(teacher) for teacher in config.teachers.values())
    terms = (
        f"License: {license_['license']}, as the student's own card states; the teacher's terms "
        "and those of the data may add to it."
        if "license" in license_
        else "License: not stated by the student's own card. Set it by the terms of the student, "
        "the teacher and the data."
    )
    return (
        f"# {config.name}\n\n{_model(config.student.model)}{pruned}, distilled from {teachers} "
        f"with seqkd {version('seqkd')}.\n\n{terms}\n"
    )


def _model(name: str) -> str:
    if hub := hub_name(name):
        return f"[{hub}](https://huggingface.co/{hub})"
    return f"`{Path(name).name}` (a local directory)"


def _teacher(teacher: SingleTeacherConfig) -> str:
    if isinstance(teacher, EndpointTeacherConfig):
        return f"`{teacher.model}` (behind an OpenAI-compatible endpoint)"
    return _model(teacher.model)


def _how(config: Config, tokens: Mapping[str, int]) -> str:
    data, rollout, learner = config.data, config.rollout, config.learner
    hub = hub_name(data.path)
    source = f"`{hub}`, split `{data.split}`" if hub else f"`{Path(data.path).name}`"
    rows = f", at most {data.rows:,} rows" if data.rows else ""
    lines = [f"- {name}: {_phase(config, phase)}" for name, phase in config.phases]
    counts = "; ".join(f"{count:,} of {SAMPLES[sampler]}" for sampler, count in tokens.items())
    lines += [
        f"- tokens learnt from: {counts}",
        f"- data: {source}{rows}; prompts of at most {data.max_prompt_tokens} tokens",
        f"- completions: at most {rollout.max_tokens} tokens; sampled at temperature "
        f"{rollout.temperature:g}, top-p {rollout.top_p:g}",
        f"- optimizer: AdamW, {learner.schedule} schedule, gradient norm at most "
        f"{learner.max_grad_norm:g}, {learner.precision}; seed {config.seed}",
    ]
    return "## How\n\n" + "\n".join(lines) + "\n"


def _phase(config: Config, phase: PhaseConfig) -> str:
    terms = " + ".join(map(_term, phase.terms))
    samples = config.samples_per_prompt(phase)
    many = f", {samples} samples each" if samples > 1 and phase.sampler != "dataset" else ""
    return (
        f"{config.extent(phase)} of {terms}; {phase.prompts_per_step} prompts a step{many}, "
        f"learning rate {config.lr(phase):g}"
    )


def _term(term: TermConfig) -> str:
    given = term.objective.model_dump(exclude={"kind"}, exclude_none=True)
    options = ", ".join(f"{key} {value}" for key, value in given.items())
    weight = "" if term.weight == 1 else f"{term.weight:g} "
    brackets = f" ({options})" if options else ""
    return f"{weight}`{term.objective.kind}`{brackets} on {SAMPLES[term.sampler]}"


def _evaluation(config: Config, evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return "## Evaluation\n\nNone was made.\n"
    figures = evaluation["figures"]
    stages = ["before" if stage == "initial" else f"after {stage}" for stage in figures]
    rows = [
        f"| {label} | "
        + " | ".join(str(Interval(**known[figure])) for known in figures.values())
        + " |"
        for figure, label in LABELS.items()
        if all(figure in known for known in figures.values())
    ]
    return (
        f"## Evaluation\n\nOn {evaluation['prompts']} held-out prompts, "
        f"{config.evaluation.samples_per_prompt} sample each; mean "
        f"[{evaluation['interval']}]. A divergence counts only beside length and end rate: it can "
        "be lowered by falling silent.\n\n"
        f"| | {' | '.join(stages)} |\n|---|{'---|' * len(stages)}\n" + "\n".join(rows) + "\n"
    )


def _use(config: Config) -> str:
    thinking = config.data.thinking
    option = "" if thinking is None else f",\n    enable_thinking={thinking}"
    ids = (
        'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "What is rain for?"}],\n'
        f'    add_generation_prompt=True, return_tensors="pt", return_dict=True{option},\n)'
        if config.data.chat
        else 'tokenizer("What is rain for?", return_tensors="pt")'
    )
    return f"""## Use

`generation_config.json` has the tokens at which completions ended in training, and the student's
own defaults of sampling.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the hub
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
inputs = {ids}
output = model.generate(**inputs, max_new_tokens={config.rollout.max_tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

```bash
vllm serve . --host 127.0.0.1
```
"""


def _configuration(config: Config) -> str:
    """All that shapes the student; not where and how the run was carried out."""

    def shaping(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: shaping(below) for key, below in value.items() if key not in EXECUTION_KEYS
            }
        return [shaping(below) for below in value] if isinstance(value, list) else value

    known = {k: v for k, v in config.model_dump(mode="json").items() if k not in SECTIONS}
    text = yaml.safe_dump(shaping(known), sort_keys=False, allow_unicode=True)
    return f"## Configuration\n\nOf seqkd {version('seqkd')}:\n\n```yaml\n{text}```\n"
