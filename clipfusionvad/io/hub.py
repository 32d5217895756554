"""Files of the HuggingFace Hub: ``hf:owner/name/file`` in place of a path, downloaded by ``huggingface_hub``."""

import functools
import re
from pathlib import Path

from clipfusionvad.io.errors import UserError, nearest

HUB = "hf:"
# [datasets/]owner/name[@revision][/file or folder], in the order of the Hub's own addresses.
_NAME = re.compile(HUB + "/*(datasets/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+?))?/*")


def local_path(name: str | Path) -> Path:
    """Return the path of a file or folder; one that is named ``hf:…`` is downloaded into the Hub's cache."""
    return _find(str(name))[1] if str(name).startswith(HUB) else Path(name)


def pinned(name: str) -> str:
    """Return a name ``hf:…`` with the commit that it stands for now, as records need it; any other as it is."""
    return _find(name)[0] if name.startswith(HUB) else name


@functools.cache
def _find(name: str) -> tuple[str, Path]:
    """Return the pinned name and the path of a file or folder of the Hub; ``UserError`` if it cannot be had."""
    parts = _NAME.fullmatch(name)
    if not parts or not (parts[1] or parts[4]):
        raise UserError(f"{name}: write hf:owner/name/file, hf:owner/name@revision/file or hf:datasets/owner/name")
    datasets, repo, revision, inner = parts.groups(default="")
    try:
        from huggingface_hub import errors, utils
    except ImportError as error:
        raise UserError(f"{name} needs a package that is not installed: pip install huggingface_hub") from error
    # It reports every attempt to reach the Hub; the error at the end is enough.
    utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    place = f"{datasets}{repo}"
    reasons = {
        errors.GatedRepoError: f"ask for access at https://huggingface.co/{place}, then run 'hf auth login'",
        errors.RepositoryNotFoundError: f"no repository {place}, or a private one: check the name, or 'hf auth login'",
        errors.RevisionNotFoundError: f"{place} has no revision {revision}",
        errors.LocalEntryNotFoundError: "not in the Hub's cache, and the Hub cannot be reached: check the network",
    }
    try:
        path = _download(repo, "dataset" if datasets else "model", revision or None, inner)
    # The errors of its HTTP client, which is another one in other versions, have no common base.
    except Exception as error:
        known = (reason for kind, reason in reasons.items() if isinstance(error, kind))
        raise UserError(f"{name}: {next(known, ' '.join(str(error).split())[:300])}") from error
    # The cache holds a file at snapshots/COMMIT/inner.
    commit = path.parts[-1 - len(Path(inner).parts)]
    return f"{HUB}{place}@{commit}/{inner}".rstrip("/"), path


def _download(repo: str, kind: str, revision: str | None, inner: str) -> Path:
    """Return the path of a file, else of a folder with all that is in it; without a network, what the cache holds."""
    from huggingface_hub import errors, hf_hub_download, list_repo_files, snapshot_download

    offline = False
    try:
        if inner:
            return Path(hf_hub_download(repo, inner, repo_type=kind, revision=revision))
    except errors.EntryNotFoundError as error:
        offline = isinstance(error, errors.LocalEntryNotFoundError)
    wanted = f"{inner}/*" if inner else None
    path = snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=wanted, local_files_only=offline)
    if Path(path, inner).is_dir():
        return Path(path, inner)
    if offline:
        raise errors.LocalEntryNotFoundError(path)
    files = list_repo_files(repo, repo_type=kind, revision=revision)
    raise FileNotFoundError(f"no such file{nearest(inner, files)}; the repository holds {', '.join(files[:5])}")
