"""The run folder: its name, its files, and that each of them is whole at any moment."""

import csv
import hashlib
import io
import json
import logging
import logging.handlers
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from errors import RunError, UsageError

log = logging.getLogger("adabet")

# What a run was told only about where to write or how much to say.
_WITHOUT_EFFECT = {"log_dir", "run_name", "save_model", "save_txt", "select_only", "list_layers", "debug", "data_dir", "prepare_only"}
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
    if os.path.lexists(log_dir / cfg.run_name):
        raise UsageError(
            f"--run_name must be new in --log_dir. Received: {cfg.run_name!r}, which {cfg.log_dir} has already; choose "
            "another name or remove that run."
        )


def _plain_name(name):
    """Says whether a folder of this name lies in its parent, on any system, and is no option to other programs."""
    return (
        name.isprintable()  # which NUL, line ends and bytes that are no Unicode are not
        and not set(name) & set("/\\")
        and not name.startswith((".", "-"))
        and 0 < len(name.encode()) <= MAX_NAME_BYTES
    )


class RunFolder:
    """One run's folder, made when the first file is due.

    Attributes:
        path: pathlib.Path.
        name: str.
    """

    def __init__(self, cfg, early_log):
        """Makes the folder and opens log.txt.

        Args:
            cfg: Config. Its run_name is used as it is, or made from the run's main
                settings with a number where that exists.
            early_log: logging.Handler that has what was logged so far.

        Raises:
            UsageError: a given name exists by now.
            RunError: the folder can't be made.
        """
        log_dir = Path(cfg.log_dir)
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self.path = next(path for path in _candidate_paths(cfg, log_dir) if _made(path))
        except StopIteration:
            raise UsageError(f"--run_name must be new in --log_dir. Received: {cfg.run_name!r}.") from None
        except OSError as error:
            raise RunError(f"the run folder can't be made in {cfg.log_dir}: {error}") from error
        self.name = self.path.name
        handler = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
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

        temporary = self.path / ".model.keras"
        try:
            # The same layers, not compiled: without optimizer and metrics of ours to load.
            keras.Model(model.inputs, model.outputs, name=model.name).save(temporary)
            os.replace(temporary, self.path / "model.keras")
        finally:
            temporary.unlink(missing_ok=True)
        log.info("Model: %s", self.path / "model.keras")


def write_whole(path, text):
    """Writes a text file so that a reader finds the old content or the new, never a part.

    Args:
        path: pathlib.Path.
        text: str.

    Raises:
        OSError: as the system has it; the old content stays.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
