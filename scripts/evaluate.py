"""How good is a student? Text, divergences and curves of a run or of any model, beside its teacher:
python scripts/evaluate.py RUN|MODEL [key=value ...]"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import quiet

from seqkd.config import run as configuration
from seqkd.config.run import Config
from seqkd.console import print_message, run_command
from seqkd.errors import ConfigError, SeqkdError

if TYPE_CHECKING:
    from seqkd.checks.preflight import Checked
    from seqkd.evaluation.bartscore import BartScorer
    from seqkd.evaluation.table import ModelOutputs
    from seqkd.workers import Workers

CHUNK = 32
"""Prompts that are answered and scored at once; after each the work so far is kept."""
ALL = 100_000


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all was measured; 2 a message says what could not be; 1 a traceback."""
    parser = argparse.ArgumentParser(
        description="Evaluate the student of a run, or any model, on held-out or other prompts.",
        epilog="Example: python scripts/evaluate.py runs/quickstart --prompts dolly_eval.jsonl "
        "--bart facebook/bart-large-cnn rollout.max_tokens=128",
    )
    parser.add_argument("what", metavar="RUN|MODEL", help="a run directory, or a model")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    parser.add_argument("--config", help="of a model: the YAML file with its teacher and its data")
    parser.add_argument("--prompts", help="other prompts, with or without answers; as data.path")
    parser.add_argument("--limit", type=int, help="at most so many prompts")
    parser.add_argument("--samples", type=int, default=1, help="completions of each prompt")
    parser.add_argument(
        "--no-initial", action="store_true", help="leave out what the student began with"
    )
    parser.add_argument("--bart", help="checkpoint for BARTScore")
    parser.add_argument("--out", type=Path, help="where to; RUN/evaluation/<name of the prompts>")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' own logs")
    args = parser.parse_intermixed_args(argv)

    def run() -> int:
        if not args.verbose:
            quiet()
        return evaluate(request(args), args.verbose)

    return run_command(run, "the same command goes on")


@dataclass(frozen=True)
class Request:
    """What to evaluate, on what."""

    config: Config
    """Whatever it trains on, here it only says who the student and the teachers are."""
    models: dict[str, str]
    """Directories or hub names of students, by the name of their column."""
    out: Path
    bart: str | None
    run: Path | None = None
    """Whose page shows it."""
    problems: list[str] = field(default_factory=list)


def request(args: argparse.Namespace) -> Request:
    """Raises ConfigError where it cannot be."""
    run = Path(args.what).expanduser()
    file = run / "config.yaml"
    if not file.is_file() and args.config is None:
        raise ConfigError(
            f"{args.what}: is no run directory (it has no config.yaml). Name one; or a model, with "
            "--config and the file that says who its teacher is."
        )
    changed = [f"evaluation.samples_per_prompt={args.samples}"]
    if args.prompts:
        changed += ["data.heldout_split=null", "data.heldout_fraction=null"]
        changed += [f"data.heldout_path={json.dumps(args.prompts)}"]
    if args.limit or args.prompts:
        changed.append(f"evaluation.prompts={args.limit or ALL}")
    if args.config:
        changed.append(f"student={{model: {json.dumps(args.what)}, init: {{kind: checkpoint}}}}")
    config = configuration.load(args.config or file, [*changed, *args.overrides])
    if not config.evaluation.prompts:
        raise ConfigError("evaluation.prompts: is 0. Set it, or name prompts with --prompts.")
    name = Path(args.prompts).stem if args.prompts else "heldout"
    home = Path(config.runs_dir) / Path(args.what).name if args.config else run
    out = args.out or home / "evaluation" / name
    of_run = None if args.config or args.out else run
    found = Request(only_evaluated(config, out), {}, out, args.bart, of_run)
    if args.config:
        found.models["student"] = args.what
        return found
    initial = run / "student_initial"
    if not args.no_initial:
        found.models["initial"] = str(initial) if initial.is_dir() else config.student.model
    if (run / "student").is_dir():
        found.models["student"] = str(run / "student")
    else:
        found.problems.append(
            f"{run}: has no student yet, so only what it began with is evaluated. Go on with "
            "scripts/train.py --resume to the end of a phase."
        )
    return found


def only_evaluated(config: Config, out: Path) -> Config:
    """The same models and data without what they are trained with, and a journal in ``out`` for
    what the teacher says."""
    data = config.model_dump(mode="json", exclude={"warmup", "extra_terms", "weight", "objective"})
    return Config.model_validate(
        data | {"sampler": "teacher", "teacher_cache": {"path": str(out / "journal" / "teacher")}}
    )


def evaluate(asked: Request, verbose: bool) -> int:
    """Generate, measure, write and show."""
    from actors import build
    from seqkd import report

    bart = scorer(asked)
    config, checked, with_teacher = checks(asked)
    asked.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(checked.heldout)} prompts; results: {asked.out}", flush=True)
    written: dict[str, ModelOutputs] = {}
    with build.connect(config, verbose):
        for name, path in asked.models.items():
            with started(config, path, checked, with_teacher) as workers:
                written |= answers(config, name, workers, checked, with_teacher, asked.out)
    evaluation = measured(written, checked, asked, bart)
    write(asked.out, evaluation, written, checked)
    shutil.rmtree(asked.out / "journal")
    if asked.run is not None:
        report.write([asked.run], asked.run / "report.html")
    show(evaluation, asked)
    return 2 if asked.problems else 0


def scorer(asked: Request) -> BartScorer | None:
    """The BARTScore model, if one is wanted and there."""
    from seqkd.evaluation.bartscore import BartScorer

    if asked.bart is None:
        return None
    try:
        return BartScorer(asked.bart)
    except SeqkdError as error:
        asked.problems.append(f"{error} BARTScore is left out.")
        return None


def checks(asked: Request) -> tuple[Config, Checked, bool]:
    """As before training. Where the teacher is what stands in the way, the student is evaluated
    without it."""
    from seqkd.checks import preflight

    try:
        checked, alone = preflight.check(asked.config), False
    except ConfigError as error:
        itself = {"kind": "hf", "model": asked.config.student.model}
        data = asked.config.model_dump(mode="json", exclude={"teacher"})
        config = Config.model_validate(data | {"teacher": itself})
        try:
            checked, alone = preflight.check(config), True
        except ConfigError:
            raise error from None
        asked.problems.append(f"{error}\nEverything that needs the teacher is left out.")
        return config, checked, False
    for warning in checked.warnings:
        if not warning.endswith(f"fewer than evaluation.prompts = {ALL}; all of them are used."):
            print_message("warning", warning)
    return asked.config, checked, not alone


@contextmanager
def started(config: Config, path: str, checked: Checked, with_teacher: bool) -> Iterator[Workers]:
    """All actors of one student."""
    from actors import build
    from seqkd.checks.startup import check_workers
    from seqkd.models.loading import expand
    from seqkd.training.control import Control

    roles: set[Any] = {"rollout"}
    if with_teacher:
        roles |= {"learner", "teacher_sampler"}
        roles |= {"teacher"} if config.teacher.distribution else set()
    control = Control(config.recovery, lambda text: print(text, flush=True))
    build.check_resources(config, roles)
    with control.signals(), build.workers(config, expand(path), checked, roles, control) as workers:
        if with_teacher:
            for warning in check_workers(config, checked, workers, roles):
                print_message("warning", warning)
        yield workers


def answers(
    config: Config, name: str, workers: Workers, checked: Checked, with_teacher: bool, out: Path
) -> dict[str, ModelOutputs]:
    """What one student wrote, and its teacher; piece by piece, each kept until all is done."""
    from seqkd.evaluation.heldout import Answers, HeldOut
    from seqkd.evaluation.table import ModelOutputs
    from seqkd.teachers.cache import open_caches, with_caches
    from seqkd.training.replay_log import ReplayLog

    if with_teacher:
        _, caches = open_caches(config, teacher_here=True)
        workers = with_caches(workers, config, checked.stop_ids, checked.vocabulary, caches)
    workers = ReplayLog(out / "journal" / name, config).wrap(workers, config, checked.vocabulary)
    samples, prompts = config.evaluation.samples_per_prompt, checked.heldout
    student, teacher = Answers([], {}), Answers([], {})
    for low in range(0, len(prompts), CHUNK):
        some = prompts[low : low + CHUNK]
        if with_teacher:
            both = HeldOut(workers, some, samples, config.seed).answers(checked.stop_ids)
        else:
            drawn = workers.student.sample(some, [samples] * len(some), config.seed)
            both = Answers(drawn, {r.sample_id: {} for r in drawn}), Answers([], {})
        for whole, piece in zip((student, teacher), both, strict=True):
            whole.rollouts.extend(piece.rollouts)
            whole.measured.update(piece.measured)
        print(f"  {name}: {low + len(some)} of {len(prompts)} prompts", flush=True)
    if not with_teacher:
        return {name: ModelOutputs(student)}
    return {"teacher": ModelOutputs(teacher), name: ModelOutputs(student, teacher)}


def measured(
    written: Mapping[str, ModelOutputs], checked: Checked, asked: Request, bart: BartScorer | None
) -> dict[str, Any]:
    """All figures, as plain data."""
    from seqkd.evaluation import table

    prompts = list(checked.heldout)
    references = [checked.references.get(p.prompt_id, ()) for p in prompts]
    with_reference = sum(map(bool, references))
    if not with_reference:
        asked.problems.append(
            "no prompt has an answer to compare with: ROUGE and BARTScore are left out. Name "
            "prompts with answers, or set data.reference_key to their column."
        )
    figures = {
        name: table.figures(of, prompts, references, decoder(checked), bart)
        for name, of in written.items()
    }
    changed = {}
    if {"initial", "student"} <= figures.keys():
        changed["initial -> student"] = table.changes(figures["initial"], figures["student"])
    if {"teacher", "student"} <= figures.keys():
        changed["teacher -> student"] = table.changes(figures["teacher"], figures["student"])
    source = asked.config.data
    return {
        "prompts": len(prompts),
        "with_references": with_reference,
        "source": source.heldout_path or source.path,
        "samples_per_prompt": asked.config.evaluation.samples_per_prompt,
        "models": asked.models,
        "interval": "95 % percentile bootstrap over prompts",
        "figures": {n: {k: asdict(v) for k, v in f.table().items()} for n, f in figures.items()},
        "changes": {
            key: {pair: asdict(of[key]) for pair, of in changed.items() if key in of}
            for key in table.FIGURES
            if any(key in of for of in changed.values())
        },
        "per_prompt": {n: {k: v.plain() for k, v in f.ratios.items()} for n, f in figures.items()},
        "curves": {n: table.curves(w, prompts) for n, w in written.items() if w.on_teacher},
        "problems": asked.problems,
    }


def decoder(checked: Checked) -> Callable[[Any], str]:
    """Token ids to text."""
    return lambda ids: str(checked.tokenizer.decode(ids, skip_special_tokens=True))


def write(
    out: Path, evaluation: dict[str, Any], written: Mapping[str, ModelOutputs], checked: Checked
) -> None:
    """evaluation.json, and the texts as generations.jsonl."""
    from seqkd.evaluation.table import by_prompt
    from seqkd.evaluation.text import without_eos

    decode, prompts = decoder(checked), list(checked.heldout)
    groups = {name: by_prompt(of.answers.rollouts, prompts) for name, of in written.items()}
    with (out / "generations.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            row = {
                "prompt": prompt.text,
                "references": list(checked.references.get(prompt.prompt_id, ())),
                **{name: [decode(without_eos(r)) for r in of[i]] for name, of in groups.items()},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    text = json.dumps(evaluation, indent=2, ensure_ascii=False)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")


def show(evaluation: dict[str, Any], asked: Request) -> None:
    """The table, what has changed, and what could not be done."""
    from seqkd.evaluation.catalog import labeled
    from seqkd.evaluation.intervals import Interval
    from seqkd.evaluation.table import aligned, render

    named = {
        name: {key: Interval(**value) for key, value in figures.items()}
        for name, figures in evaluation["figures"].items()
    }
    print(
        f"\n{evaluation['prompts']} prompts, {evaluation['with_references']} with references, "
        f"{evaluation['samples_per_prompt']} completions each; mean [95 % interval over prompts]\n"
    )
    print(render(named))
    changes = evaluation["changes"]
    for pair in dict.fromkeys(pair for of in changes.values() for pair in of):
        intervals = {key: Interval(**of[pair]) for key, of in changes.items() if pair in of}
        rows = [[f"  {labeled(key)}", str(of), of.verdict] for key, of in intervals.items()]
        print(f"\n{pair}, paired over prompts:\n{aligned(rows)}")
    for name, curves in evaluation["curves"].items():
        print("\n" + "\n".join(f"{name}: {line}" for line in about(curves)))
    print(f"\n{asked.out / 'evaluation.json'}\n{asked.out / 'generations.jsonl'}")
    for problem in asked.problems:
        print_message("error", problem)


def about(curves: dict[str, Any]) -> Iterator[str]:
    """What the curves say, in a line each."""
    from seqkd.evaluation.intervals import Interval

    ends = curves["ends"]
    yield (
        f"longer than the teacher's by {Interval(**ends['mean_difference'])} tokens "
        f"(up to {ends['horizon']}; share still going on {ends['largest_gap']:+.3g} at "
        f"{ends['largest_gap_at']} tokens)"
    )
    if "end_calibration" in curves:
        found = curves["end_calibration"]
        yield (
            f"on the teacher's text it expects {found['expected_ends']:.3g} ends where there are "
            f"{found['observed_ends']} (calibration error {found['calibration_error']:.3g})"
        )
    if "exposure_bias" in curves and (last := curves["exposure_bias"]["at"][-1])["percent"]:
        yield (
            f"excess accumulated error on its own text {Interval(**last['percent'])} % at "
            f"{last['length']} tokens"
        )


if __name__ == "__main__":
    sys.exit(main())
