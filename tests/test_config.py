import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, one_line_error, run_script

from config import FIRST, LR_FACTOR, PLANTED, REAL, TOPK, AnalyzeConfig, CollectConfig, FormatsConfig, TrainConfig, model_flags
from run.flags import parse, read_flags, resolve_sizes

ENTRIES = {"train.py": TrainConfig, "collect.py": CollectConfig}
ALL = {**ENTRIES, "analyze.py": AnalyzeConfig, "formats.py": FormatsConfig}


@pytest.mark.parametrize("script", ENTRIES)
def test_help_explains_every_flag_without_loading_torch(script):
    result = run_script(script, "--help", check=True)
    for field in dataclasses.fields(ENTRIES[script]):
        assert f"--{field.name.replace('_', '-')}" in result.stdout
    code = (
        f"import sys, runpy; sys.argv = [{script!r}, '--help']\ntry: runpy.run_path({script!r}, run_name='__main__')\nfinally: "
    )
    code += "print('LOADED', sorted({'torch', 'datasets', 'wandb', 'nnsight', 'transformers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout
    assert "LOADED []" in shown


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("script", ALL)
def test_help_begins_with_an_example_and_the_flags_that_most_runs_need_on_one_screen(script, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = run_script(script, "--help", check=True).stdout
    rows, first = shown.splitlines(), FIRST[ALL[script].__name__].split()
    command = shlex.split(rows[4])
    assert command[:2] == ["python", script] and parse(ALL[script], command[2:])
    ends = [i for i, row in enumerate(rows) if row.startswith("╰")]
    end = ends[1] if rows[6].startswith("╭─ positional") else ends[0]  # below the last line of the last of them
    named = [re.sub("^│ (--)?", "", row).split(" ")[0].strip(",").lower().replace("-", "_") for row in rows[:end]]
    assert set(first) <= set(named) and len(first) <= 11
    assert end <= 24 and max(map(len, rows)) <= columns
    assert "None" not in shown and "planted" not in shown.lower()


def test_help_says_which_default_is_used(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    shown = run_script("train.py", "--help", check=True).stdout
    for flag, default in {
        "--d-hidden": f"{REAL['d_hidden']:_} on your data, {PLANTED['d_hidden']:_} in the demonstration",
        "--log-every": str(REAL["log_every"]),
        "--l1-coeff": f"{REAL['l1_coeff']:g}; {TOPK['l1_coeff']:g} for batch_topk",
        "--l1-warmup": f"{REAL['l1_warmup']:g}, or 0 with --init-from",
        "--k-start": f"{REAL['k_start']:g}, or 1 with --init-from",
        "--lr ": f"{LR_FACTOR} / sqrt(d_model * d_hidden)",
        "--lr-decay": "0.8",
    }.items():
        assert re.search(rf"│ {flag}.*\(default: {re.escape(default)}", shown), flag


@pytest.mark.parametrize("script", ENTRIES)
def test_every_field_has_a_comment_and_is_used(script):
    """A field that is declared and never read would be a knob that does nothing."""
    source = (ROOT / "config.py").read_text()
    entry = (ROOT / script).read_text()
    if script == "train.py":
        entry += "".join((ROOT / f"{room}.py").read_text() for room in ("run/flags", "run/monitor", "sources/opening"))
    assert "**model_flags(config)" in entry  # these are read by name in paired_rows.py
    required = {
        f.name: "" for f in dataclasses.fields(ENTRIES[script]) if f.default is f.default_factory is dataclasses.MISSING
    }
    for field in dataclasses.fields(ENTRIES[script]):
        assert re.search(rf"    # [^\n]+\n    {field.name}: ", source), f"{field.name} has no comment above it"
        if field.name in model_flags(ENTRIES[script](**required)):
            assert len(re.findall(rf"\b{field.name}\b", (ROOT / "collecting/paired_rows.py").read_text())) > 1
            continue
        used = rf"(config|given)\.{field.name}\b|\"{field.name}\"" if field.name != "config" else "config"
        assert re.search(used, entry), f"{script} never reads {field.name}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train.py --lr abc", "--lr abc: must be a number"),
        ("train.py --epochs 1.5", "--epochs 1.5: must be a whole number"),
        ("train.py --l1-coef 3", "Unrecognized options: --l1-coef, 3; did you mean --l1-coeff?"),
        ("train.py --nonsense", "Unrecognized options: --nonsense"),
        (
            "train.py --variant topk",
            "invalid choice 'topk' for argument '--variant'. Expected one of ('vanilla', 'batch_topk')",
        ),
        ("train.py --lr", "Missing value for argument '--lr'"),
        ("train.py --seq-len x", "--seq-len x: must be a whole number"),
        ("collect.py --hook x", "missing: --output"),
        ("formats.py", "missing: SRC, DST, --to"),
        ("formats.py a b --to saelens --activation-scale 1 x", "--activation-scale 1 x: must be a number"),
        ("analyze.py", "missing: RUN"),
    ],
)
def test_wrong_flags_are_one_line(command, message):
    script, *flags = command.split()
    result = run_script(script, *flags)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert one_line_error(result, script).startswith(f"{script}: error: {message}")


def test_flags_as_an_agent_of_wandb_writes_them():
    config = parse(TrainConfig, ["--l1_coeff=4", "--variant=batch_topk", "--dataset=data/gemma"])
    assert (config.l1_coeff, config.variant, config.dataset) == (4.0, "batch_topk", "data/gemma")


def test_config_file_first_then_flags(tmp_path):
    saved = dataclasses.asdict(TrainConfig(lr=0.5, k=7, beta1=0.5))
    (tmp_path / "c.json").write_text(json.dumps({"given": saved, "resolved": {"lr": 1.0}}))
    config = parse(TrainConfig, ["--config", str(tmp_path / "c.json"), "--lr", "1e-4"])
    assert (config.lr, config.k, config.beta1, config.d_hidden) == (1e-4, 7, 0.5, None)
    (tmp_path / "plain.json").write_text('{"k": 9, "l1_coeff": 2}')
    assert parse(TrainConfig, ["--config", str(tmp_path / "plain.json")]).k == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"l1_coef": 1}', "unknown field 'l1_coef', did you mean 'l1_coeff'?"),
        ('{"lr": "fast"}', "lr = 'fast' is not of type float | None"),
        ('{"variant": "topk"}', "variant = 'topk' is not of type"),
        ('{"k": true}', "k = True is not of type"),
        ("{", "cannot be read as JSON"),
        ("[1]", "expected a JSON object"),
        pytest.param("[" * 100_000 + "]" * 100_000, "cannot be read as JSON (maximum recursion depth exceeded", id="deep"),
        pytest.param('{"lr": ' + "[" * 900 + "]" * 900 + "}", f"lr = {'[' * 40} is not of type", id="deep value"),
        pytest.param('{"lr": 1' + "0" * 400 + "}", "--lr 10000000000000000000: must be a finite number", id="400 digits"),
        pytest.param('{"batch_size": 1' + "0" * 5000 + "}", "cannot be read as JSON (Exceeds the limit", id="5000 digits"),
    ],
)
def test_bad_config_files_are_refused(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    result = run_script("train.py", "--config", tmp_path / "c.json", "--output-dir", tmp_path / "runs")
    assert message in one_line_error(result, "train.py") and not (tmp_path / "runs").exists()


def test_missing_config_file_is_refused():
    assert "cannot be read" in one_line_error(run_script("train.py", "--config", "nowhere.json"), "train.py")


def test_sizes_come_from_the_block_unless_given():
    config = resolve_sizes(TrainConfig(k=3, dataset="x", variant="batch_topk"), None, None, "float32")
    assert config.k == 3 and config.d_hidden == REAL["d_hidden"] and TrainConfig(k=3).d_hidden is None
    assert resolve_sizes(TrainConfig(), None, None, "float32").num_tokens == PLANTED["num_tokens"]


def documented(pages) -> list[tuple[str, str]]:
    """(entry, its flags) of every command in the blocks and sentences of the pages."""
    found = []
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        lines = [
            line.split(" #")[0] for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
        ]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for part in (part for line in lines for part in line.split("&&")):
            if match := re.search(r"(?:python|torchrun|uv run)\b.* ?\b((?:train|collect|analyze|formats)\.py)(.*)", part):
                found.append(match.groups())
    return found


def test_every_documented_command_is_one_that_its_entry_understands():
    """Flags, types and choices. `...` stands for a value or for more flags, $NAME for a number."""
    commands = documented([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))])
    assert len(commands) > 40
    needed = {"collect.py": ["--output", "data"], "analyze.py": ["run"], "formats.py": ["a", "b", "--to", "saelens"]}
    for script, flags in commands:
        said = re.sub(r"\$\w+", "1", flags.partition(";")[0])
        words = shlex.split(
            re.sub(r"(--num-tokens) \.\.\.", r"\1 1", said.replace("--to ...", "--to saelens").replace("--text ...", ""))
        )
        left_out = needed.get(script, []) if "..." in words or not words else []
        assert read_flags(ALL[script], [word for word in words if word != "..."] + left_out), flags


def test_help_into_a_pipe_that_closes_early_says_nothing_more():
    command = f"{sys.executable} train.py --help | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.startswith("usage: train.py") and not result.stderr


def test_a_resumed_run_of_an_earlier_version_does_not_begin_to_resample():
    saved = {"d_hidden": 64, "k": 4, "k_start": 1.0, "compute_dtype": "float32"}
    given = TrainConfig()
    assert resolve_sizes(given, saved, None, "float32").resample_until == 0
    for variant in ("vanilla", "batch_topk"):
        assert resolve_sizes(TrainConfig(variant=variant), None, None, "float32").resample_until == 0.6
