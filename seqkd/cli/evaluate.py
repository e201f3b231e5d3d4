"""Evaluate a run's student, or any model, and its teacher: divergences, text, curves."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqkd.cli.arguments import add_overrides, add_path, add_verbose, at_least_one
from seqkd.console import Progress, print_message, quiet, run_command, show
from seqkd.errors import ConfigError
from seqkd.escaping import as_json

if TYPE_CHECKING:
    from seqkd.checks.preflight import Checked
    from seqkd.config.run import Config
    from seqkd.evaluation.table import ModelOutputs
    from seqkd.workers import Workers

CHUNK = 32
"""Number of prompts that are answered and scored together. Results are saved after each chunk."""
CACHE = "cache"
"""Subdirectory of the output directory for the completions and scores so far."""
ALL = 100_000
"""``evaluation.prompts`` when all prompts of a file are evaluated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``seqkd evaluate``."""
    parser.epilog = (
        "Example: seqkd evaluate runs/quickstart --prompts dolly_eval.jsonl "
        "--bart facebook/bart-large-cnn rollout.max_tokens=128"
    )
    add_path(parser, "what", metavar="RUN|MODEL", help="a run directory, or a model")
    add_overrides(parser, "rollout.cpus=2")
    add_path(parser, "--config", help="for a model: YAML file with its teacher and data")
    add_path(
        parser,
        "--prompts",
        help="other prompts, with or without answers, in any format of data.path",
    )
    parser.add_argument("--limit", type=at_least_one, help="maximum number of prompts")
    parser.add_argument(
        "--samples", type=at_least_one, default=1, help="completions per prompt (1)"
    )
    parser.add_argument("--no-initial", action="store_true", help="skip the initial student")
    parser.add_argument("--bart", help="BART model for BARTScore")
    add_path(
        parser, "--out", type=Path, help="output directory (RUN/evaluation/<name of the prompts>)"
    )
    add_verbose(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``seqkd evaluate``."""

    def action() -> int:
        if not args.verbose:
            quiet()
        return evaluate(read_request(args), args.verbose)

    return run_command(action, "run the same command again to continue")


@dataclass(frozen=True)
class Request:
    """Models and prompts to evaluate."""

    config: Config
    """Student, teachers and prompts."""
    models: dict[str, str]
    """Directories or hub names of the students, by the name of their column."""
    out: Path
    """Output directory."""
    bart: str | None
    """BART model for BARTScore."""
    run: Path | None = None
    """Run whose report shows the result."""
    problems: list[str] = field(default_factory=list)
    """Errors that did not prevent the evaluation."""


def read_request(args: argparse.Namespace) -> Request:
    """Find the models and read the configuration. Raises ConfigError."""
    from seqkd.config.run import load

    run = Path(args.what).expanduser()
    file = run / "config.yaml"
    if not file.is_file() and args.config is None:
        raise ConfigError(
            f"{args.what}: is not a run directory (it has no config.yaml). Pass a run directory, "
            "or a model and --config with the YAML file that names its teacher."
        )
    for override in args.overrides:
        if override.startswith(("rollout.temperature=", "rollout.top_p=")):
            key, _, value = override.partition("=")
            raise ConfigError(
                f"{key} {value} applies to training only. Remove it: seqkd evaluate samples at "
                "temperature 1 and top-p 1, because divergences are expectations under the model's "
                "own distribution."
            )
    overrides = [f"evaluation.samples_per_prompt={args.samples}"]
    if args.prompts:
        overrides += ["data.heldout_split=null", "data.heldout_fraction=null"]
        overrides += [f"data.heldout_path={as_json(args.prompts)}"]
    if args.limit or args.prompts:
        overrides.append(f"evaluation.prompts={args.limit or ALL}")
    if args.config:
        overrides.append(f"student={{model: {as_json(args.what)}, init: {{kind: checkpoint}}}}")
    config = load(args.config or file, [*overrides, *args.overrides])
    if not config.evaluation.prompts:
        raise ConfigError("evaluation.prompts: is 0. Set it to at least 1, or pass --prompts.")
    name = Path(args.prompts).stem if args.prompts else "heldout"
    home = Path(config.runs_dir) / Path(args.what).name if args.config else run
    out = args.out or home / "evaluation" / name
    reported = None if args.config or args.out else run
    request = Request(for_evaluation(config, out), {}, out, args.bart, reported)
    if args.config:
        request.models["student"] = args.what
        return request
    initial = run / "student_initial"
    if not args.no_initial:
        request.models["initial"] = str(initial) if initial.is_dir() else config.student.model
    if (run / "student").is_dir():
        request.models["student"] = str(run / "student")
    else:
        request.problems.append(
            f"{run}: has no trained student yet, so only the initial student was evaluated. Finish "
            "a phase with seqkd train --resume."
        )
    return request


def for_evaluation(config: Config, out: Path) -> Config:
    """Return ``config`` without its training terms and with a teacher cache in ``out``."""
    data = config.model_dump(mode="json", exclude={"warmup", "extra_terms", "weight", "objective"})
    return type(config).model_validate(
        data | {"sampler": "teacher", "teacher_cache": {"path": str(out / CACHE / "teacher")}}
    )


def evaluate(request: Request, verbose: bool) -> int:
    """Generate, measure, write and print. Return 2 if a part had to be skipped, else 0."""
    from actors import build
    from seqkd import report
    from seqkd.data.content import ContentTokenizer
    from seqkd.evaluation import offline
    from seqkd.evaluation.bartscore import BartScorer
    from seqkd.evaluation.tasks import Tasks
    from seqkd.files import disk_errors
    from seqkd.models.model_files import load_complete

    for path in request.models.values():
        load_complete(path, "student.model")
    bart = BartScorer(request.bart) if request.bart else None
    config, checked, with_teacher = check(request)
    for problem in request.problems:
        print_message("warning", problem)
    content = ContentTokenizer(checked.tokenizer, checked.content_tokens)
    held_out = offline.PromptSet(
        list(checked.heldout),
        [checked.references.get(p.prompt_id, ()) for p in checked.heldout],
        checked.decode,
        lambda text: len(content.content([text])[0]),
        config.rollout.max_tokens,
        Tasks(config.evaluation.tasks, checked.references, checked.decode),
    )
    if not any(held_out.references):
        text = (
            "no prompt has a reference answer, so ROUGE and BARTScore do not apply. Pass prompts "
            "with answers, or set data.reference_key to the column of the answers."
        )
        if bart:
            raise ConfigError(f"--bart: {text}")
        print_message("warning", text)
    with disk_errors(request.out):
        request.out.mkdir(parents=True, exist_ok=True)
    show(f"{len(checked.heldout)} prompts; results: {request.out}")
    outputs: dict[str, ModelOutputs] = {}
    warned = set[str]()
    with closing(Progress()) as progress, build.connect(config, verbose):
        for name, path in request.models.items():
            progress.wait(f"{name}: starting the actors")
            started = start_workers(config, path, checked, with_teacher, warned, progress.status)
            with started as workers:
                outputs |= generate(
                    config, name, workers, checked, with_teacher, request.out, progress
                )
    evaluation = {
        "source": request.config.data.heldout_path or request.config.data.path,
        "samples_per_prompt": request.config.evaluation.samples_per_prompt,
        "models": request.models,
        **offline.figures_json(outputs, held_out, bart),
        "problems": request.problems,
    }
    offline.write(request.out, evaluation, outputs, held_out)
    shutil.rmtree(request.out / CACHE)
    if request.run is not None:
        report.write([request.run], request.run / "report.html")
    show("", *offline.render(evaluation))
    show(f"\n{request.out / 'evaluation.json'}", str(request.out / "generations.jsonl"))
    for problem in request.problems:
        print_message("error", problem)
    return 2 if request.problems else 0


def check(request: Request) -> tuple[Config, Checked, bool]:
    """Run the checks of ``seqkd train``. If only the teacher fails them, evaluate without it.

    Returns:
        The configuration, the checked models and data, and whether there is a teacher.
    """
    from seqkd.checks import preflight

    try:
        checked = preflight.check(request.config)
    except ConfigError as error:
        stand_in = {"kind": "hf", "model": request.config.student.model}
        data = request.config.model_dump(mode="json", exclude={"teacher"})
        config = type(request.config).model_validate(data | {"teacher": stand_in})
        try:
            checked = preflight.check(config)
        except ConfigError:
            raise error from None
        request.problems.append(
            f"{error}\nteacher: all figures that need the teacher were skipped."
        )
        return config, checked, False
    for warning in checked.warnings:
        if not warning.endswith(f"fewer than evaluation.prompts = {ALL}; all of them are used."):
            print_message("warning", warning)
    return request.config, checked, True


@contextmanager
def start_workers(
    config: Config,
    path: str,
    checked: Checked,
    with_teacher: bool,
    warned: set[str],
    status: Callable[[str], None],
) -> Iterator[Workers]:
    """Start all actors for the student at ``path``, and stop them at the end of the block. Warnings
    in ``warned`` are not printed again. For ``status`` see :func:`actors.build.workers`."""
    from actors import build
    from seqkd.checks.startup import check_workers
    from seqkd.models.loading import expand
    from seqkd.training.control import Control

    roles: set[Any] = {"rollout"}
    if with_teacher:
        roles |= {"learner", "teacher_sampler"}
        roles |= {"teacher"} if config.teacher.distribution else set()
    control = Control(config.recovery, show)
    build.check_resources(config, roles)
    with (
        control.signals(),
        build.workers(config, expand(path), checked, roles, control, status) as workers,
    ):
        if with_teacher:
            for warning in check_workers(config, checked, workers, roles):
                if warning not in warned:
                    print_message("warning", warning)
                warned.add(warning)
        yield workers


def generate(
    config: Config,
    name: str,
    workers: Workers,
    checked: Checked,
    with_teacher: bool,
    out: Path,
    progress: Progress,
) -> dict[str, ModelOutputs]:
    """Generate and score the completions of one student and its teacher, and return them by model.
    Completed chunks are kept in ``out`` until the evaluation is done."""
    from seqkd.evaluation.heldout import Answers, HeldOut, prompt_seeds
    from seqkd.evaluation.table import ModelOutputs
    from seqkd.teachers.cache import open_caches, with_caches
    from seqkd.training.replay_log import ReplayLog

    if with_teacher:
        _, caches = open_caches(config, teacher_here=True)
        workers = with_caches(workers, config, checked.stop_ids, checked.vocabulary, caches)
    workers = ReplayLog(out / CACHE / name, config).wrap(workers, config, checked.vocabulary)
    samples, prompts = config.evaluation.samples_per_prompt, checked.heldout
    student, teacher = Answers([], {}), Answers([], {})
    for low in range(0, len(prompts), CHUNK):
        start = time.perf_counter()
        chunk = prompts[low : low + CHUNK]
        seeds = prompt_seeds(chunk, config.seed)
        if with_teacher:
            both = HeldOut(workers, chunk, samples, seeds).answers(checked.stop_ids)
        else:
            drawn = workers.student.sample(chunk, [samples] * len(chunk), seeds)
            both = Answers(drawn, {r.sample_id: {} for r in drawn}), Answers([], {})
        for total, part in zip((student, teacher), both, strict=True):
            total.rollouts.extend(part.rollouts)
            total.measured.update(part.measured)
        seconds = (time.perf_counter() - start) / len(chunk)
        tokens = sum(len(rollout.completion_ids) for rollout in student.rollouts)
        progress.step(name, low + len(chunk), len(prompts), f"{tokens} tokens", seconds)
    if not with_teacher:
        return {name: ModelOutputs(student)}
    return {"teacher": ModelOutputs(teacher), name: ModelOutputs(student, teacher)}
