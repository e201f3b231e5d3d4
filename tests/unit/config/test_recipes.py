"""All recipes pass --dry-run with a local hub that has the published configs of their models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from transformers import Qwen2Config, Qwen3Config

from seqkd.checks.memory import size_of
from seqkd.checks.preflight import check
from seqkd.config.run import Config, load
from tests import stand_ins
from tests.conftest import ROOT
from tests.hub import serving

RECIPES = sorted(file.stem for file in (ROOT / "configs" / "recipes").glob("*.yaml"))
PAGE = (ROOT / "docs" / "recipes.md").read_text()
PARAMETERS = {
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
}
"""Number of parameters in the safetensors files, as the hub reports it. (Qwen3-1.7B also stores its
tied head.)"""
DRIVER = """
import contextlib, io, json, sys
sys.path.insert(0, ROOT)
from seqkd.cli.main import main
from tests.stand_ins import record
results = {}
for name, file, *overrides in RUNS:
    out = io.StringIO()
    if name == "two_step, recorded":
        record(file, overrides)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["train", file, "--dry-run", "cluster=auto", *overrides])
    results[name] = code, out.getvalue()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory):
    """Exit code and output by recipe, from one process that uses the local hub, and the requests
    that the hub received."""
    folder = tmp_path_factory.mktemp("recipes")
    repos = {f"models/{name}": stand_ins.model(name) for name in stand_ins.QWEN}
    repos |= {f"datasets/{name}": files for name, files in stand_ins.data_sets().items()}
    with serving(repos) as hub, stand_ins.endpoint() as base_url:
        common = [f"runs_dir={folder}/runs"]
        own = {
            "black_box": [f"teacher_cache.path={folder}/black", f"teacher.base_url={base_url}"],
            "two_step": [f"teacher_cache.path={folder}/two"],
        }
        runs = [
            (name, str(ROOT / f"configs/recipes/{name}.yaml"), *common, *own.get(name, ()))
            for name in RECIPES
        ]
        two_step = next(run[1:] for run in runs if run[0] == "two_step")
        runs.append(("two_step, live", *two_step, "sampler=teacher"))
        runs.append(("two_step, recorded", *two_step, "steps=2"))
        code = DRIVER.replace("ROOT", repr(str(ROOT))).replace("RUNS", repr(runs))
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=folder, text=True,
            capture_output=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), hub.asked


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "two_step"] + ["two_step, recorded"])
def test_a_recipe_passes_dry_run(dry_runs, name):
    """The dry run reads the hub's files and prints the plan. All warnings are about the stand-in
    models and data."""
    runs, asked = dry_runs
    code, output = runs[name]
    findings = output[output.index("findings:") :]
    assert code == 0, findings
    expected = ("fewer than evaluation.prompts", "the rest is padding")
    assert all(any(e in line for e in expected) for line in findings.splitlines()[1:]), findings
    recipe = yaml.safe_load((ROOT / f"configs/recipes/{name.split(',')[0]}.yaml").read_text())
    for path in (recipe["student"]["model"], f"datasets/{recipe['data']['path']}"):
        assert any(f"/{path}/resolve/" in request for request in asked), path


def test_the_two_step_recipe_requires_a_recorded_cache(dry_runs):
    """Without a cache, --dry-run prints the command that records it. With a live teacher, all other
    keys are checked."""
    runs, _ = dry_runs
    code, output = runs["two_step"]
    findings = output[output.index("findings:") :]
    assert code == 2 and findings.count("error:") == 1 and "seqkd precompute" in findings
    assert runs["two_step, live"][0] == 0


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_stand_ins_have_as_many_parameters_as_the_published_models(name):
    config = json.loads(stand_ins.model(name)["config.json"])
    kind = Qwen3Config if config["model_type"] == "qwen3" else Qwen2Config
    assert size_of(kind(**config)).parameters == PARAMETERS[name]


def test_the_page_has_the_planners_figures(dry_runs):
    """Recipe, role, number of processes, GPUs per process and GiB per GPU, for roles with GPUs."""
    runs, _ = dry_runs
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\d+) x ([\d.]+) \| ([\d.]+) \|", PAGE, re.M)
    assert {row[0] for row in rows} == set(RECIPES)
    expected = set()
    for name in RECIPES:
        _, output = runs["two_step, live" if name == "two_step" else name]
        plan = re.findall(r"^  (\w+) \d+: \d+ threads, ([\d.]+) GPUs", output, re.M)
        gpus = {role: float(number) for role, number in plan}
        for role, many, each in re.findall(r"^    (\w+) +(\d+) x +([\d.]+)", output, re.M):
            if role in gpus:
                share = float(each) / max(1.0, gpus[role])
                expected.add((name, role, many, f"{gpus[role]:g}", f"{share:.1f}"))
    assert set(rows) == expected


def test_every_recipe_is_on_the_page():
    assert set(re.findall(r"\(\.\./configs/recipes/(\w+)\.yaml\)", PAGE)) == set(RECIPES)


def test_the_files_of_the_tutorial_are_read_as_shown(tiny, tmp_path):
    page = (ROOT / "docs" / "tutorial.md").read_text()
    files = dict(re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", page, re.MULTILINE | re.DOTALL))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    overrides = [f"{role}.model={tiny[role]}" for role in ("student", "teacher")]
    overrides.append(f"data.path={tmp_path}/flowers.jsonl")
    plan = check(load(tmp_path / "flowers.yaml", overrides))
    assert not plan.warnings
    shown = f"  {len(plan.train)} training prompts, {len(plan.heldout)} held-out prompts\n"
    assert shown in page
    (real,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert Config.model_validate(yaml.safe_load(real)).steps == 300
