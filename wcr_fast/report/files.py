"""results.json as text, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from wcr_fast.errors import UsageError
from wcr_fast.report.statistics import Results

SCHEMA = 1


def write_file(path: Path, content: bytes) -> None:
    """Write a file through a synced temporary neighbour and a rename; replaces an existing one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are private
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def digest(results: Results) -> str:
    """Return the SHA-256 of all that repeats between two runs of one plan: durations and the machine don't count."""
    durations = ("seconds", "train_seconds")
    runs = [{key: value for key, value in row.items() if key not in durations} for row in results["runs"]]
    text = json.dumps([results["plan"], results["data"], runs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def dump_results(results: Results) -> str:
    """Return results.json's text: one line for each run, so that two files can be compared line by line."""
    head = {key: value for key, value in results.items() if key != "runs"}
    runs = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in results["runs"])
    return f'{json.dumps(head, indent=1, ensure_ascii=False)[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'


def load_results(path: Path) -> Results:
    """Read a results.json.

    Raises:
        UsageError: the file is missing, not JSON, of another version of the format, or doesn't match its digest.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not a whole results.json: {error}") from None
    parts = {"made", "machine", "plan", "data", "magnitude_edges", "runs", "digest"}
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or not parts <= set(results):
        raise UsageError(f"{path} is not a results.json of format {SCHEMA}: make one with wcr-fast demo")
    if digest(results) != results.get("digest"):
        raise UsageError(f"{path} doesn't match its own digest: it was edited; make a new one with wcr-fast demo")
    return results
