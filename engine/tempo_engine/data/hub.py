"""Files of data sets on the Hugging Face Hub, of one commit. They are downloaded and read, no code of theirs is ever run."""

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tempo_engine.data.rows import is_readable
from tempo_engine.errors import UserError, first_sentence

# tempo-engine keeps transformers from looking for a hub by HF_HUB_OFFLINE=1; this is what the user said before that.
OFFLINE = "TEMPO_HUB_OFFLINE"


@dataclass(frozen=True)
class Where:
    """Where rows lie: a file, or files of a config and split of a data set on the Hub."""

    file: Path | None = None
    hub: str = ""
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Files of a data set at a commit: Snapshot("org/name", "65877096c2...", {"data/train.parquet": Path(...)})."""

    repo: str
    commit: str
    files: dict[str, Path]


def fetch(place: Where) -> Snapshot:
    """Download the files of a config and split, or those that match `files`, or find them in the cache of the Hub's library.

    Raises UserError when there is no such data set, commit, config or split, or no way to the Hub and nothing in the cache.
    """
    repo, revision = place.hub, place.revision
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"data of the Hub needs huggingface_hub: pip install 'tempo-engine[hub]' (for {repo})"
        ) from error

    def download(patterns: Sequence[str], at: str | None) -> Path:
        options: dict[str, Any] = {"repo_type": "dataset", "revision": at, "allow_patterns": list(patterns)}
        return Path(huggingface_hub.snapshot_download(repo, **options, local_files_only=_is_offline()))

    try:
        with _network():
            folder = download(["README.md"], revision)
            commit = folder.name  # the cache keeps a folder a commit
            there = _cached(folder) if _is_offline() else _listed(huggingface_hub.HfApi(), repo, folder)
            chosen = choose_files(repo, there, _card(folder), place.config, place.split, place.files)
            folder = download([glob_of(name) for name in chosen], commit)
    except UserError:
        raise
    except Exception as error:  # the library's connection errors are those of whatever it connects by
        at = f" at {revision}" if revision else ""
        raise UserError(
            f"the data set {repo}{at} could not be fetched: {first_sentence(error)}; check its name and revision, if it is gated "
            f"accept its terms on https://huggingface.co/datasets/{repo} and set HF_TOKEN, or give its files as jsonl: or parquet:"
        ) from error
    return Snapshot(repo, commit, {name: folder / name for name in chosen})


def choose_files(
    repo: str, there: Sequence[str], card: Mapping[str, Any], config: str | None, split: str, files: Sequence[str] = ()
) -> list[str]:
    """Which of a data set's files hold a config and split: those its card names, else those whose path says so.

    Raises UserError when that is none.
    """
    readable = sorted(name for name in there if is_readable(name))
    patterns = list(files) or _patterns_of_card(card, config, split)
    chosen = [name for name in readable if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not patterns:
        chosen = _by_path(readable, config, split)
    if not chosen:
        wanted = f"files {', '.join(patterns)}" if files else f"config {config or 'default'}, split {split}"
        raise UserError(
            f"the data set {repo} has no {wanted}; its readable files are {', '.join(readable[:12]) or 'none'}: name some in files:"
        )
    return chosen


def _patterns_of_card(card: Mapping[str, Any], config: str | None, split: str) -> list[str]:
    configs = [c for c in card.get("configs") or [] if isinstance(c, dict)]
    names = (config,) if config else ("default", configs[0].get("config_name") if len(configs) == 1 else "default")
    found = next((c for c in configs if c.get("config_name") in names), {})
    data_files = found.get("data_files", [])
    if isinstance(data_files, dict):
        data_files = [{"split": name, "path": path} for name, path in data_files.items()]
    patterns: list[str] = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        # A path without a split is a training set.
        part = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        if part.get("split") == split:
            path = part.get("path", [])
            patterns += [str(p) for p in (path if isinstance(path, list) else [path])]
    return [pattern.removeprefix("./").replace("**/", "*") for pattern in patterns]


def _by_path(names: Sequence[str], config: str | None, split: str) -> list[str]:
    """Files whose path has the config's name in it, and the split's if any has one."""
    if config and config != "default":
        names = [name for name in names if _says(name, config)]
    splits = [name for name in names if _says(name, split)]
    return splits or (list(names) if len(names) == 1 else [])


def _says(name: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", name) is not None


def glob_of(name: str) -> str:
    """A pattern that matches this name only."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _card(folder: Path) -> dict[str, Any]:
    """The YAML at the top of a data set's README."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    head = re.match(r"\ufeff?---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        card = yaml.safe_load(head.group(1)) if head else {}
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def _listed(api: Any, repo: str, folder: Path) -> list[str]:
    try:
        return list(api.list_repo_files(repo, repo_type="dataset", revision=folder.name))
    except Exception:
        if any(map(is_readable, there := _cached(folder))):  # the Hub is down, but this commit is in the cache
            return there
        raise


def _cached(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _is_offline() -> bool:
    said = os.environ.get(OFFLINE, os.environ.get("HF_HUB_OFFLINE", ""))
    return said.upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def _network() -> Iterator[None]:
    """The Hub's library goes to the network as the user wants it to, whatever keeps transformers away from it."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, _is_offline()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
