"""The files of an analysis: the table of latents, the examples, and how all of them replace an earlier analysis together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis import report
from analysis.data import Text
from analysis.examples import RANGE_NAMES, Example


def require_writable(out: Path) -> None:
    """ValueError where a later `put_in_place` could not write, so that it is known before the measuring."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / ".partial", ignore_errors=True)  # of an analysis that was killed
        (out / ".partial").mkdir()  # only writing shows that a disk is read-only: root has every permission
        (out / ".partial").rmdir()
    except OSError as error:
        raise ValueError(f"--output {out}: cannot be written to ({error.strerror}); choose another folder") from None


@contextlib.contextmanager
def put_in_place(out: Path) -> Iterator[Path]:
    """A folder to write an analysis to, whose files are moved to `out` when the block ends without an error.

    The old page is removed first and the new one moved last: where there is a page, all files are of the same analysis.
    ValueError where they cannot be written.
    """
    partial = out / ".partial"
    try:
        (partial / "figures").mkdir(parents=True)
        yield partial
        (out / "report.html").unlink(missing_ok=True)
        for name in report.CAPTIONS:  # an earlier analysis may have had more of them
            for suffix in (".png", ".svg"):
                (out / "figures" / f"{name}{suffix}").unlink(missing_ok=True)
        (out / "figures").mkdir(exist_ok=True)
        for path in sorted(partial.glob("*.*")) + sorted(partial.glob("figures/*")):
            if path.name != "report.html":
                os.replace(path, out / path.relative_to(partial))
        os.replace(partial / "report.html", out / "report.html")
    except OSError as error:
        raise ValueError(
            f"--output {out}: the analysis cannot be written there ({error.strerror or error}); make room, or choose another"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_parquet(path: Path, table: dict[str, np.ndarray], definitions: dict[str, str], data_name: str) -> None:
    """One row a latent. Each field's metadata, and the key `definitions` of the schema's, say what the columns are."""
    arrays = [pa.array(column) for column in table.values()]
    fields = [
        pa.field(name, array.type, metadata={"definition": definitions[name]})
        for name, array in zip(table, arrays, strict=True)
    ]
    schema = pa.schema(fields, metadata={"definitions": json.dumps(definitions), "data": data_name})
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


def example_line(latent: int, found: list[Example], text: Text | None, token_texts: dict[int, str]) -> dict:
    """A latent's line of examples.jsonl: token texts, and activations with three digits, null where none was stored."""
    return {
        "latent": latent,
        "examples": [
            {
                "range": RANGE_NAMES[e.window.kind],
                "text": text.names[text.text_of[e.window.sequence]],
                "sequence": e.window.sequence,
                "position": e.window.peak,
                "peak": e.window.peak - e.window.start,
                "tokens": [token_texts[int(t)] for t in e.tokens],
                "values": [None if np.isnan(v) else float(f"{v:.3g}") for v in e.values],
            }
            for e in found
        ],
    }
