"""The manifest beside extracted features: what was made of which video, with what, and how it went."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from clipfusionvad.extraction.jobs import Job
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable, open_own, read_text, without_nan, writing

MANIFEST = "manifest.jsonl"
State = Literal["begun", "done", "failed"]


class Manifest:
    """The JSON lines ``manifest.jsonl`` of a feature folder; each shard writes its own ``manifest-i-of-n.jsonl``.

    A line is about one video: "begun" before its files may appear, then "done" or "failed". All manifests of the
    folder are read, and what was written last about a video counts.
    """

    def __init__(self, folder: str | Path, shard: tuple[int, int] | None = None):
        """Raises ``UserError`` for a folder that cannot be written and for a file that is no manifest."""
        self.folder = Path(folder)
        self.path = self.folder / (MANIFEST if shard is None else f"manifest-{shard[0]}-of-{shard[1]}.jsonl")
        check_writable(self.path)
        self.records: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("manifest*.jsonl")):
            for record in _read(path):
                known = self.records.get(record["video"])
                if known is None or known["time"] <= record["time"]:
                    self.records[record["video"]] = record

    def append(self, name: str, state: State, facts: Mapping[str, Any]) -> None:
        """Add a line about the video of that name. Lines are appended whole; one cut off by a crash is no line."""
        time = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        record = {"video": name, "state": state, "time": time, **facts}
        line = json.dumps(without_nan(record)).encode() + b"\n"
        with writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b", opener=open_own) as file:
                if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self.records[name] = record

    def is_done(self, job: Job, fingerprint: str) -> bool:
        """Whether a job's files are there already, made in the same way.

        Raises ``UserError`` where they were made in another way, of another video, or by something else.
        """
        record, present = self.records.get(job.name), [path for path in job.paths if path.exists()]
        if record is None and present:
            raise UserError(f"{present[0]} is there, but no manifest says how it was made")
        if record is None or record["state"] != "done" or not present:
            return False
        if other := _differences(record, job, fingerprint):
            raise UserError(f"features of {job.name} in {self.folder} were made with other options: {other}")
        return len(present) == len(job.paths)


def _differences(record: Mapping[str, Any], job: Job, fingerprint: str) -> str:
    """What was different, in words; empty where nothing was."""
    before, now = record["options"], job.recipe()
    changed = [
        f"{key} ({before.get(key)}, now {now.get(key)})" for key in now | before if before.get(key) != now.get(key)
    ]
    if record["model"]["fingerprint"] != fingerprint:
        changed.append(f"model ({record['model']['clip']}, now {job.model.clip})")
    if record["bytes"] != job.bytes:
        changed.append(f"video ({record['source']} of {record['bytes']} bytes, now {job.source} of {job.bytes})")
    return ", ".join(changed)


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("video", "state", "time")):
        return False
    if record["state"] != "done":
        return True
    model, options = record.get("model"), record.get("options")
    if not isinstance(model, dict) or not isinstance(options, dict):
        return False
    return {"clip", "fingerprint"} <= model.keys() and {"bytes", "source"} <= record.keys()


def _read(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(read_text(path, "manifest").splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            # It was being written when the machine or the program stopped.
            continue
        if not _is_record(record):
            raise UserError(f"{path}, line {number}, is not from a manifest of features: move the file elsewhere")
        records.append(record)
    return records
