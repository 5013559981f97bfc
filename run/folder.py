"""The run folder: its name, its files, and that each of them is whole at any moment."""

import csv
import fcntl
import hashlib
import io
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

log = logging.getLogger("adabet")

# What a run was told only about where to write or how much to say.
_WITHOUT_EFFECT = {
    "log_dir", "run_name", "resume", "checkpoint_minutes", "save_model", "save_txt", "save_litert", "litert_momentum",
    "litert_batch", "litert_frozen", "select_only", "list_layers", "debug",
    "data_dir", "prepare_only",
}  # fmt: skip
MAX_NAME_BYTES = 200  # file systems take 255; a temporary file of RUN_NAME.txt has a longer name
_LIBRARIES = ("tensorflow", "keras", "keras-hub", "tensorflow-datasets", "gudhi", "numpy", "scipy", "scikit-learn")


def set_up_logging():
    """Sends the program's log to stderr, and keeps it for the run folder's log.txt.

    Returns:
        logging.Handler that `create` empties into log.txt.
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
    """The message alone, with its level where that is more than a note."""

    def format(self, record):
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.capitalize()}: {message}"


def check_place(cfg):
    """Refuses a log folder or run name that can't be had, before any work.

    Raises:
        UsageError: the folder can't be made, the name has a path in it, or the
            run exists already.
    """
    log_dir = Path(cfg.log_dir)
    nearest = log_dir.absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:  # a link to nothing is there, too
        nearest = nearest.parent
    if cfg.log_dir == "" or "\0" in cfg.log_dir or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(
            f"--log_dir must be a folder that can be made and written to. Received: {cfg.log_dir!r} ({nearest} is no "
            "such folder); name another."
        )
    if cfg.run_name is None:
        return
    if not _plain_name(cfg.run_name):
        shown = cfg.run_name if len(cfg.run_name) <= MAX_NAME_BYTES else cfg.run_name[:40] + "..."
        raise UsageError(
            f"--run_name must be a plain folder name: printable, without separators, of 1 to {MAX_NAME_BYTES} bytes, and "
            f"not beginning with a dot or a dash. Received: {shown!r}; the folder around it is --log_dir."
        )
    if not cfg.resume and exists(cfg):
        raise UsageError(
            f"--run_name must be new in --log_dir. Received: {cfg.run_name!r}, which {cfg.log_dir} has already; choose "
            "another name, remove that run, or go on with it by --resume."
        )


def _plain_name(name):
    """Says whether a folder of this name lies in its parent, on any system, and is no option to other programs."""
    return (
        name.isprintable()  # which NUL, line ends and bytes that are no Unicode are not
        and not set(name) & set("/\\")
        and not name.startswith((".", "-"))
        and 0 < len(name.encode()) <= MAX_NAME_BYTES
    )


def exists(cfg):
    """Says whether the folder of `--run_name` is there."""
    return os.path.lexists(Path(cfg.log_dir, cfg.run_name))


def recorded(folder):
    """Returns a run folder's config.json, or None where the run ended before it had one.

    Args:
        folder: pathlib.Path.

    Raises:
        UsageError: there is something else.
    """
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"a run folder has a readable config.json. Received: {folder} ({error}); start a new run."
        ) from None
    if not isinstance(record, dict):
        raise UsageError(
            f"a run folder has a config.json of flags. Received: {folder} with another one; start a new run."
        )
    return record


def finished_summary(folder):
    """Returns a run folder's summary.json where it says done, else None."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return summary if summary["status"] == "done" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, or something else's


class RunFolder:
    """One run's folder, made when the first file is due, and this process's alone as long as it lives.

    Attributes:
        path: pathlib.Path.
        name: str.
    """

    def __init__(self, cfg, early_log):
        """Makes the folder, or takes up the one that is there, and opens log.txt.

        Args:
            cfg: Config. Its run_name is used as it is, or made from the run's main
                settings with a number where that exists.
            early_log: logging.Handler that has what was logged so far.

        Raises:
            UsageError: a given name exists by now, or another process is at that run.
            RunError: the folder can't be made.
        """
        log_dir = Path(cfg.log_dir)
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self.path = next(path for path in _candidate_paths(cfg, log_dir) if _made(path) or cfg.resume)
            self.name = self.path.name
            handler = _FileHandler(self.path / "log.txt", encoding="utf-8")
            fcntl.flock(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it with the process
        except StopIteration:
            raise UsageError(f"--run_name must be new in --log_dir. Received: {cfg.run_name!r}.") from None
        except BlockingIOError:
            handler.close()
            raise UsageError(
                f"a run is one process's at a time. Received: {self.path}, at which another process is at work; wait for "
                "that, or choose another --run_name."
            ) from None
        except OSError as error:
            raise RunError(f"the run folder can't be made in {cfg.log_dir}: {error}") from error
        for partial in [*self.path.glob(f"{PARTIAL}*"), *self.path.glob(f"{CHECKPOINTS}/{PARTIAL}*")]:
            partial.unlink()  # what SIGKILL left of a file that was being written
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        early_log.setTarget(handler)
        early_log.close()
        log.removeHandler(early_log)
        log.addHandler(handler)

    def write_json(self, name, content):
        """Writes `content` as NAME, whole or not at all. NaN is an error: undefined is null."""
        write_whole(self.path / name, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def write_metrics(self, rows):
        """Writes metrics.csv with one row an epoch.

        Args:
            rows: list of dict with the same keys, the columns in order.
        """
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path / "metrics.csv", table.getvalue())

    def write_txt(self, summary):
        """Writes RUN_NAME.txt beside the folder: hours of training and accuracy, one a line."""
        write_whole(self.path.parent / f"{self.name}.txt", f"{summary['train_s'] / 3600}\n{summary['accuracy']}\n")

    def save_model(self, model):
        """Writes model.keras: raw images to logits, loadable by plain Keras."""
        import keras

        temporary = self.path / f"{PARTIAL}model.keras"
        try:
            # The same layers, not compiled: without optimizer and metrics of ours to load.
            keras.Model(model.inputs, model.outputs, name=model.name).save(temporary)
            os.replace(temporary, self.path / "model.keras")
        finally:
            temporary.unlink(missing_ok=True)
        log.info("Model: %s", self.path / "model.keras")

    def finish(self):
        """Removes the checkpoints, which a finished run needs no more."""
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)


class _FileHandler(logging.FileHandler):
    """A log file that may fail: a full disk ends the run by the first result that it can't take, not by a note."""

    def handleError(self, record):
        pass


def fingerprint(cfg, facts):
    """Returns a short digest of all that changes a run's results.

    Two runs with the same fingerprint and device give the same numbers: what a
    sweep calls the same run.

    Args:
        cfg: Config.
        facts: dict. What else decides: versions of libraries, data and weights.
    """
    text = json.dumps({**decisive(asdict(cfg)), **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def decisive(settings):
    """Returns those of a dict of flags that change a run's results."""
    return {key: value for key, value in settings.items() if key not in _WITHOUT_EFFECT}


def differing_flags(cfg, record):
    """Returns the names of the flags that change results and differ from a config.json, in order.

    Args:
        cfg: Config.
        record: dict. The content of config.json.
    """
    plain = asdict(Config())  # a record from before a flag existed had its default
    had = {field.name: record.get(field.name, plain[field.name]) for field in fields(Config)}
    wanted = decisive(asdict(cfg))
    if wanted["bn_stats"] == "auto":
        pretrained = (record.get("weights_provenance") or {}).get("source") != "none"
        wanted["bn_stats"] = had["bn_stats"] and ("stored" if pretrained else "batch")  # None: nothing to normalise
    if wanted["num_classes"] is None:
        wanted["num_classes"] = had["num_classes"]  # it only checks the data, whose count is recorded
    return [name for name, value in wanted.items() if value != had[name]]


def library_versions():
    """Returns {name: version} of Python and the libraries that results depend on."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0], **{name: version(name) for name in _LIBRARIES}}


def _candidate_paths(cfg, log_dir):
    if cfg.run_name is not None:
        yield log_dir / cfg.run_name
        return
    parts = [cfg.model_name, cfg.dataset_name.replace("/", "-").replace(":", "-"), cfg.train_type]
    if cfg.rho is not None:
        parts.append(f"rho{cfg.rho:g}")
    name = "_".join([*parts, f"seed{cfg.seed}"])
    yield log_dir / name
    number = 2
    while True:
        yield log_dir / f"{name}_{number}"
        number += 1


def _made(path):
    """Makes the folder; False where it exists. The system decides between two runs of one name."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True
