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
        for old in (out / "figures").glob("*.*"):  # an earlier analysis may have had more of them
            if old.stem in report.FIGURES:
                old.unlink()
        (out / "figures").mkdir(exist_ok=True)
        for path in sorted(partial.rglob("*.*"), key=lambda path: path.name == "report.html"):
            os.replace(path, out / path.relative_to(partial))
    except OSError as error:
        raise ValueError(
            f"--output {out}: the analysis cannot be written there ({error.strerror or error}); make room, or choose another"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_parquet(path: Path, table: dict[str, np.ndarray], definitions: dict[str, str], data_name: str) -> None:
    """One row a latent. Each field's metadata, and the key `definitions` of the schema's, say what the columns are."""
    columns = pa.table(table)
    fields = [field.with_metadata({"definition": definitions[field.name]}) for field in columns.schema]
    described = {"definitions": json.dumps(definitions), "data": data_name}
    pq.write_table(columns.cast(pa.schema(fields, metadata=described)), path)
