"""A step as CUDA would run it, counted without a card: it stays what docs/speed.md says, and what takes more is noticed."""

import re

import pytest
import torch
from helpers import ROOT, run_script

pytest.importorskip("triton", reason="the kernels need triton")
import train
from benchmarks import roofline
from benchmarks.roofline import CARDS, HEADER, Case, count, line
from ops import sparse

WITHIN = 0.01  # beside the rounding of the table
ROWS = [
    row.strip("| ").split(" | ")
    for row in (ROOT / "docs" / "speed.md").read_text().split(HEADER)[1].split("\n\n")[0].split("\n")[1:]
]


def recorded(row: list[str]) -> Case:
    return Case(row[0], int(row[1].replace(",", "")), row[2])


def differing(row: list[str]) -> list[str]:
    """Columns of the table in which a step as it is now is not what the row says."""
    case = recorded(row)
    now = line(case, count(case), CARDS["H100"]).strip("| ").split(" | ")
    names = [name.strip() for name in HEADER.split("\n")[0].strip("| ").split(" | ")]
    found = []
    for name, said, is_now in list(zip(names, row, now, strict=True))[3:]:
        said, is_now = (float(re.sub("[,%]", "", value)) for value in (said, is_now))
        rounding = 10.0 ** -len(row[names.index(name)].partition(".")[2]) if name != "of the floor" else 1
        if abs(is_now - said) > WITHIN * said + rounding:
            found.append(f"{name}: {is_now} and not {said}")
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:3]))
def test_the_step_is_what_the_page_says(row):
    """Otherwise: is the change meant? Then put what `python benchmarks/roofline.py` prints into docs/speed.md."""
    assert differing(row) == []


def test_the_page_has_both_variants_sizes_and_auxiliary_losses():
    assert len({tuple(row[:3]) for row in ROWS}) == len(ROWS) == 12


def test_the_page_holds_the_bars():
    """At a card's full rates at most 1.25 times the floor, and the auxiliary loss with all places used in 1.5 ms at 32k."""
    took = {tuple(row[:3]): (float(row[7]), float(row[9].rstrip("%"))) for row in ROWS}
    assert all(share >= 80 for (_, _, aux), (_, share) in took.items() if aux == "off")
    for variant in ("batch_topk", "vanilla"):
        assert took[variant, "32,768", "all used"][0] - took[variant, "32,768", "off"][0] <= 1.5
        assert took[variant, "32,768", "none dead"][0] - took[variant, "32,768", "off"][0] < 0.1


def test_adam_moves_28_bytes_a_parameter_and_2_for_a_copy():
    case = Case("vanilla", 1024, d_model=64, batch=64)
    moved = [operation.bytes for operation in count(case).operations if operation.name == "_adam"]
    weight = 1024 * 2 * 64
    assert sorted(moved) == [28 * 2 * 64, 28 * 1024, 30 * weight, 30 * weight]


def test_what_takes_more_is_noticed(monkeypatch):
    """One more pass over one of the weights, an activation kept for the backward pass, a product in float32."""
    row = ROWS[0]
    norm, encode, losses = train.norm_of_gradient, sparse.encode, train.CrossCoder.losses
    with monkeypatch.context() as fault:
        fault.setattr(train, "norm_of_gradient", lambda model: norm(model) + model.W_dec.grad.sum() * 0)
        assert {"GB moved", "ms"} <= {found.split(":")[0] for found in differing(row)}
    with monkeypatch.context() as fault:
        kept = []
        fault.setattr(train.CrossCoder, "losses", lambda *args: kept.append(out := losses(*args)) or out)
        fault.setattr(sparse, "encode", lambda *args: kept.append(out := encode(*args)) or out)
        assert any(found.startswith("peak GB") for found in differing(row))
    with monkeypatch.context() as fault:
        fault.setattr(sparse, "encode", lambda x, rows, dtype, out=None: encode(x, rows, torch.float32))
        assert "ms" in {found.split(":")[0] for found in differing(row)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", ["batch_topk", "vanilla"])
@pytest.mark.parametrize("d_hidden, batch", [(32_768, 4096), (131_072, 4096), (131_072, 1024), (16_384, 16_384)])
def test_the_formula_of_memory_is_what_is_counted(variant, d_hidden, batch, dtype):
    case = Case(variant, d_hidden, batch=batch, dtype=dtype)
    assert count(case).peak == pytest.approx(roofline.memory(case), rel=0.08)


def test_a_kernel_of_unknown_traffic_is_named(monkeypatch):
    monkeypatch.delitem(roofline.KERNELS, "_count")
    with pytest.raises(ValueError, match="say in KERNELS what the kernel _count moves"):
        count(Case("batch_topk", 1024, d_model=64, batch=64, k=4))


def test_the_command(monkeypatch, capsys):
    small = ["--d-model", 64, "--d-hidden", 1024, "--batch-size", 64, "--k", 4]
    shown = run_script("benchmarks/roofline.py", *small, "--card", "4090", check=True).stdout
    assert shown.startswith("4090, 2 x 64, batches of 64, k 4, bfloat16: counted, not measured\n\n" + HEADER)
    assert shown.count("\n") == 2 + 2 + 6
    monkeypatch.setattr("sys.argv", ["roofline.py", *map(str, small), "--operations"])
    roofline.main()
    shown = capsys.readouterr().out
    assert re.search(r"launches  _adam +ops/kernels.py:\d+\n", shown) and "ops/sparse.py" in shown


def test_the_guide_says_the_hours_and_gigabytes_of_the_page_on_speed():
    speed, guide = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("speed", "guide"))
    rows = re.findall(r"^\| (Gemma-2-2b|an 8B model) \| batch_topk \| ([\d,]+) \| (.*?) \|$", speed, re.MULTILINE)
    known = {(model, latents): cells.split(" | ") for model, latents, cells in rows}
    said = re.findall(r"^\| ([\d,]+) \| ([\d.]+) GB \| ([\d.]+) GB \| (.*?) \|$", guide, re.MULTILINE)
    assert len(said) == 5
    for latents, gemma, eight, hours in said:
        small, large = (known[model, latents] for model in ("Gemma-2-2b", "an 8B model"))
        assert [gemma, eight] == [small[0], large[0]]
        both = zip(small[1:], large[1:], strict=True)
        assert hours.split(" | ") == ["; ".join(filter(None, cells)) for cells in both], latents
