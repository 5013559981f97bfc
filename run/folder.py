"""The run folder: its name, its files, and the log.

Every file is complete at any time: a reader never finds a part of it.
"""

import csv
import fcntl
import hashlib
import io
import itertools
import json
import logging
import logging.handlers
import os
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

from core.config import Config
from core.errors import RunError, UsageError
from core.files import CHECKPOINTS, PARTIAL, write_whole
from core.log import log
from data import path_name
from models import keras_file, short_name

# What runs did that are older than a flag, where this is not the flag's default.
_BEFORE_THE_FLAG = {"head_init": "glorot"}
# Flags that do not change the results of training.
_WITHOUT_EFFECT = {
    "log_dir", "run_name", "resume", "checkpoint_minutes", "save_model", "save_txt", "select_only", "list_layers",
    "list_models", "debug", "data_dir", "prepare_only", "cache_dir", "cache_limit_gb", "clear_cache", "evaluate",
    "save_litert", "litert_momentum", "litert_batch", "litert_frozen",
}  # fmt: skip
MAX_NAME_BYTES = 200  # file systems take 255; a temporary file of RUN_NAME.txt has a longer name
_LIBRARIES = ("tensorflow", "keras", "keras-hub", "tensorflow-datasets", "gudhi", "numpy", "scipy", "scikit-learn")


def set_up_logging() -> logging.Handler:
    """Sends the program's log to stderr, and keeps it for the run folder's log.txt.

    Returns:
        logging.Handler that `RunFolder` empties into log.txt.
    """
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):  # from an earlier call of main() in this process
        log.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(_PlainFormatter())
    early = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    log.addHandler(console)
    log.addHandler(early)
    return early


class _PlainFormatter(logging.Formatter):
    """Formats a message alone, or with its level from a warning on."""

    def format(self, record):
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.capitalize()}: {message}"


def check_place(cfg: Config) -> None:
    """Checks that the log folder can be written to and that the run name is valid and new.

    Raises:
        UsageError: if the folder cannot be created, the name is not a plain folder
            name, or the run exists already.
    """
    log_dir = Path(cfg.log_dir)
    nearest = log_dir.absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:  # a dangling link exists too
        nearest = nearest.parent
    if cfg.log_dir == "" or "\0" in cfg.log_dir or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(
            f"--log_dir must be a folder that can be created and written to. Received: {cfg.log_dir!r} ({nearest} is "
            "not a writable folder); choose another folder."
        )
    if cfg.run_name is None:
        return
    if not _plain_name(cfg.run_name):
        shown = cfg.run_name if len(cfg.run_name) <= MAX_NAME_BYTES else cfg.run_name[:40] + "..."
        raise UsageError(
            f"--run_name must be a plain folder name: printable, without separators, of 1 to {MAX_NAME_BYTES} bytes, "
            f"and not starting with a dot or a dash. Received: {shown!r}; --log_dir sets the folder that contains it."
        )
    if not cfg.resume and exists(cfg):
        raise UsageError(
            f"--run_name must be new in --log_dir. Received: {cfg.run_name!r}, which exists in {cfg.log_dir}; choose "
            "another name, delete that run, or resume it with --resume."
        )


def _plain_name(name):
    """Returns whether a name is a folder's own name on every system, and not an option to other programs."""
    return (
        name.isprintable()  # excludes NUL, line ends and bytes that are not Unicode
        and not set(name) & set("/\\")
        and not name.startswith((".", "-"))
        and 0 < len(name.encode()) <= MAX_NAME_BYTES
    )


def exists(cfg: Config) -> bool:
    """Returns whether the folder of `--run_name` exists."""
    return os.path.lexists(Path(cfg.log_dir, cfg.run_name))


def recorded(folder: Path) -> dict | None:
    """Returns the content of a run folder's config.json, or None if there is no such file.

    Raises:
        UsageError: if the file is unreadable or holds something else.
    """
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"a run folder must have a readable config.json. Received: {folder} ({error}); start a new run."
        ) from None
    if not isinstance(record, dict):
        raise UsageError(
            f"a run folder's config.json must hold the flags. Received: {folder}, whose file does not; start a new run."
        )
    return record and {**_BEFORE_THE_FLAG, **record}


def finished_summary(folder: Path) -> dict | None:
    """Returns the content of a run folder's summary.json if its status is done, else None."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return summary if summary["status"] == "done" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class RunFolder:
    """A run's folder. It is locked while this process lives.

    Attributes:
        path: pathlib.Path.
        name: str.
    """

    def __init__(self, cfg: Config, early_log: logging.Handler):
        """Creates the folder, or opens that of a run to resume, and starts log.txt.

        Args:
            cfg: Config. Without a run_name, the name is made from the run's main
                settings, with a number if that exists.
            early_log: logging.Handler that holds the log so far.

        Raises:
            UsageError: if a given name exists, or another process uses the run.
            RunError: if the folder cannot be created.
        """
        log_dir = Path(cfg.log_dir)
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self.path = next(path for path in _candidate_paths(cfg, log_dir) if _created(path) or cfg.resume)
            self.name = self.path.name
            handler = _FileHandler(self.path / "log.txt", encoding="utf-8")
            fcntl.flock(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when the process ends
        except StopIteration:
            raise UsageError(
                f"--run_name must be new in --log_dir. Received: {cfg.run_name!r}; choose another name."
            ) from None
        except BlockingIOError:
            handler.close()
            raise UsageError(
                f"one process at a time may use a run folder. Received: {self.path}, which another process is using; "
                "wait for it, or choose another --run_name."
            ) from None
        except OSError as error:
            raise RunError(f"the run folder cannot be created in {cfg.log_dir}: {error}") from error
        for partial in [*self.path.glob(f"{PARTIAL}*"), *self.path.glob(f"{CHECKPOINTS}/{PARTIAL}*")]:
            partial.unlink()  # SIGKILL has interrupted its writing
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        early_log.setTarget(handler)
        early_log.close()
        log.removeHandler(early_log)
        log.addHandler(handler)

    def write_json(self, name: str, content) -> None:
        """Writes `content` to the file `name`. Undefined values must be None: NaN raises ValueError."""
        write_whole(self.path / name, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def write_csv(self, name: str, rows: list[dict]) -> None:
        """Writes a table to the file `name`. The keys, equal in all rows, are the columns."""
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path / name, table.getvalue())

    def write_txt(self, summary: dict) -> None:
        """Writes RUN_NAME.txt beside the folder: hours of training and accuracy, one per line."""
        write_whole(self.path.parent / f"{self.name}.txt", f"{summary['train_s'] / 3600}\n{summary['accuracy']}\n")

    def save_model(self, model) -> None:
        """Writes model.keras, from raw images to logits, which plain Keras loads."""
        import keras

        temporary = self.path / f"{PARTIAL}model.keras"
        try:
            # The same layers, not compiled: the file needs no optimizer or metric of ours.
            keras.Model(model.inputs, model.outputs, name=model.name).save(temporary)
            os.replace(temporary, self.path / "model.keras")
        finally:
            temporary.unlink(missing_ok=True)
        log.info("Model: %s", self.path / "model.keras")

    def finish(self) -> None:
        """Deletes the checkpoints of a finished run."""
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)


class _FileHandler(logging.FileHandler):
    """A log file whose errors are ignored: a full disk ends the run when a result cannot be written."""

    def handleError(self, record):
        pass


def fingerprint(cfg: Config, facts: dict) -> str:
    """Returns a short digest of all that changes a run's results.

    Two runs with the same fingerprint on the same device, with the same oneDNN setting,
    give the same numbers. A sweep regards them as the same run.

    Args:
        cfg: Config.
        facts: dict. The versions of libraries, data and weights, and whether features are
            cached, which stands in place of `cache_features`: memory and disk give the same bits.
    """
    settings = {**decisive(asdict(cfg)), **facts}
    text = json.dumps({**settings, "cache_features": None}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def decisive(settings: dict) -> dict:
    """Returns the entries of a dict of flags that change a run's results."""
    return {key: value for key, value in settings.items() if key not in _WITHOUT_EFFECT}


def differing_flags(cfg: Config, record: dict) -> list[str]:
    """Returns the names of the flags that change results and differ from a config.json.

    Args:
        cfg: Config.
        record: dict. The content of config.json.
    """
    plain = asdict(Config())  # a record without the flag is older than it, and did what is its default
    had = {field.name: record.get(field.name, plain[field.name]) for field in fields(Config)}
    wanted = decisive(asdict(cfg))
    if wanted["bn_stats"] == "auto":
        pretrained = (record.get("weights_provenance") or {}).get("source") != "none"
        wanted["bn_stats"] = had["bn_stats"] and ("stored" if pretrained else "batch")  # None: no normalization
    if wanted["num_classes"] is None:
        wanted["num_classes"] = had["num_classes"]  # the flag only checks the data, whose count is recorded
    return [name for name, value in wanted.items() if value != had[name]]


def library_versions() -> dict[str, str]:
    """Returns {name: version} of Python and the libraries that results depend on."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0], **{name: version(name) for name in _LIBRARIES}}


def _candidate_paths(cfg, log_dir):
    if cfg.run_name is not None:
        yield log_dir / cfg.run_name
        return
    if cfg.evaluate is not None:
        folder = Path(os.path.abspath(cfg.evaluate)).name
        parts = [short_name(cfg) if keras_file.is_path(cfg.evaluate) else folder, "evaluation"]
        yield from _numbered(log_dir / "_".join(parts))
    parts = [short_name(cfg), path_name(cfg.dataset_name), cfg.train_type]
    if cfg.rho is not None:
        parts.append(f"rho{cfg.rho:g}")
    yield from _numbered(log_dir / "_".join([*parts, f"seed{cfg.seed}"]))


def _numbered(path):
    """Yields a path, and then the path with a number, from 2 on."""
    yield path
    yield from (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))


def _created(path):
    """Creates the folder and returns True, or returns False if it exists: one of two runs gets the name."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True
