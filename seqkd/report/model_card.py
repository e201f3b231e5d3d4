"""Model card of a distilled student: README.md next to its weights, in the hub's format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from seqkd.config.run import Config, as_yaml
from seqkd.config.samplers import SAMPLERS
from seqkd.config.student import PruneInitConfig
from seqkd.data.readers import JSON, TABLES
from seqkd.escaping import markdown_block, markdown_code, printable
from seqkd.evaluation.catalog import labeled
from seqkd.evaluation.heldout import FIGURES
from seqkd.evaluation.intervals import Interval
from seqkd.evaluation.tasks import with_tasks
from seqkd.files import atomic_write
from seqkd.models.loading import expand
from seqkd.storage.metrics_file import read_rows
from seqkd.storage.run_directory import EXECUTION_KEYS, SECTIONS

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
LICENSE = ("license", "license_name", "license_link")


def write(run: Path, config: Config, evaluation: Mapping[str, Any] | None) -> None:
    """Write ``student/README.md`` in the run directory ``run``. ``evaluation`` is the content of
    evaluation.json, or None if nothing was measured. Raises StorageError."""
    file = run / "student" / "README.md"
    stages = list(evaluation["figures"].values()) if evaluation else []
    license_ = license_of(config.student.model)
    card = ModelCard.from_template(
        metadata(config, license_),
        template_path=str(TEMPLATE),
        config=config,
        evaluation=evaluation,
        figures=[
            (labeled(figure), [Interval(**stage[figure]) for stage in stages])
            for figure in with_tasks(FIGURES, *stages)
            if all(figure in stage for stage in stages)
        ],
        file_name=lambda path: Path(path).name,
        hub_name=hub_name,
        license=license_.get("license"),
        pruned=isinstance(config.student.init, PruneInitConfig),
        samplers=SAMPLERS,
        tokens=trained_tokens(run / "metrics.jsonl"),
        version=version("seqkd"),
        code=markdown_code,
        configuration=markdown_block(as_yaml(_shaping_options(config)), "yaml"),
    )
    atomic_write(file, card.content + "\n")


def metadata(config: Config, license_: Mapping[str, Any]) -> ModelCardData:
    """Return the front matter of the card. The hub has no relation for pruning, so a pruned student
    is a finetune of its source with the tag "pruned"."""
    base = hub_name(config.student.model)
    data = config.data
    paths = (data.path, data.heldout_path, data.corpus_path)
    datasets = dict.fromkeys(filter(None, (hub_name(path) for path in paths if path)))
    pruned = ["pruned"] if isinstance(config.student.init, PruneInitConfig) else []
    return ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=list(datasets) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", *pruned, "seqkd"],
        **license_,
    )


def hub_name(name: str) -> str | None:
    """Return ``name`` if it names a repository of the hub, None if it is a path."""
    local = Path(name).expanduser().exists() or Path(name).suffix in (*JSON, *TABLES)
    return name if re.fullmatch(r"([\w.-]+/)?\w[\w.-]*", name) and not local else None


def license_of(model: str) -> dict[str, str]:
    """Return the license fields of the model's own card; empty if there is no card or license."""
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(
            expand(model),
            "README.md",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:  # the directory was moved during the run
        return {}
    if file is None:
        return {}
    try:
        fields = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # a page that is not a card
        return {}
    return {key: printable(str(fields[key])) for key in LICENSE if fields.get(key)}


def trained_tokens(metrics: Path) -> Counter[str]:
    """Count the completion tokens in the loss by sampler, excluding skipped steps."""
    tokens: Counter[str] = Counter()
    for row in read_rows(metrics)[0]:
        if row.get("skipped"):
            continue
        for key, value in row.items():
            sampler, _, last = key.rpartition("/")
            if last == "tokens":
                tokens[sampler or row["sampler"]] += value
    return tokens


def _shaping_options(config: Config) -> dict[str, Any]:
    """Return every option that affects the student, without the options that only affect
    execution."""

    def shaping(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: shaping(below) for key, below in value.items() if key not in EXECUTION_KEYS
            }
        return [shaping(below) for below in value] if isinstance(value, list) else value

    options = config.model_dump(mode="json")
    return {key: value for key, value in shaping(options).items() if key not in SECTIONS}
