"""From the command line's arguments to one frozen Config.

Defaults that depend on the data set or the scheme come from the rows of their tables.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from core.config import Config
from core.errors import UsageError
from core.log import log
from core.strategy import check as check_strategy
from data import dataset_row
from models import check_flags, default_input_size, keras_file
from run import folder as run_folder
from run.parser import INTERVAL, NUM_BETTI_BATCHES, TIMINGS, TRUE, make_parser
from selection import ALIASES, SCHEMES, SELECTION_FLAGS
from training import caching, segments

LITERT_FLAGS = ("litert_momentum", "litert_batch", "litert_frozen")
AUTO_NAME = "auto"  # a --run_name that asks for a generated name, as in the published program


def parse(argv: Sequence[str]) -> Config:
    """Returns the Config of a command line.

    Args:
        argv: list of str, without the program's name.

    Raises:
        SystemExit: after --help or --version, or if argparse refuses a flag and has
            explained that in one line on stderr.
        UsageError: if flags contradict each other, the tables, or the run to resume.
    """
    argv = without_doubled_flags(argv)
    args = make_parser().parse_args(argv)
    if args.run_name == AUTO_NAME:
        args.run_name = None
    if args.evaluate is not None:
        return resolve(_evaluation(argv, args))
    if args.resume is False:
        return resolve(args)
    folder = _folder_to_resume(args)
    record = run_folder.recorded(folder)
    recorded = _flags_of(record)
    if record and record.get("bn_stats") is None:
        recorded.pop("bn_stats", None)  # a network without normalization
    # The run's own flags are the defaults. Flags of this command line override them.
    location = {"log_dir": str(folder.parent), "run_name": folder.name}
    args = make_parser().parse_args(argv, argparse.Namespace(**{**recorded, **location}))
    if args.run_name == AUTO_NAME:
        args.run_name = folder.name
    args.resume = True
    cfg = resolve(args)
    if os.path.abspath(Path(cfg.log_dir, cfg.run_name or "")) != os.path.abspath(folder):
        raise UsageError(
            f"--resume RUN_FOLDER names the run. Received: {folder}, and --run_name {cfg.run_name} in --log_dir "
            f"{cfg.log_dir}; leave these out."
        )
    changed = run_folder.differing_flags(cfg, record) if record else []
    if record and changed:
        received = ", ".join(f"--{name} {getattr(cfg, name)} (was {record.get(name)})" for name in changed)
        raise UsageError(
            f"a resumed run must keep every flag that changes its results. Received: {received}; leave "
            "that out, or start a new run under another --run_name."
        )
    return cfg


def _flags_of(record: dict | None) -> dict:
    """Returns the flags in the content of a config.json, {} for None."""
    return {field.name: record[field.name] for field in fields(Config) if field.name in record} if record else {}


def _evaluation(argv, args) -> argparse.Namespace:
    """Returns the arguments of `--evaluate`: the network is the model file, and a run's data are the defaults."""
    model, recorded = args.evaluate, {}
    if not keras_file.is_path(args.evaluate):
        folder = Path(os.path.abspath(args.evaluate))
        recorded = _flags_of(run_folder.recorded(folder))
        if not recorded:
            raise UsageError(
                "--evaluate takes the folder of a run, with its config.json, or the path of a .keras file. Received: "
                f"{args.evaluate}; check the path."
            )
        model = str(folder / "model.keras")
        if not os.path.exists(model):
            raise UsageError(
                f"--evaluate needs a saved model. Received: {args.evaluate}, without model.keras; train it with "
                "--save_model."
            )
        recorded |= {"log_dir": str(folder.parent), "run_name": None, "preprocessing": None}
    network = {"model_name": model, "weights": "auto", "model_alpha": None, "keep_head": False, "resume": False}
    args = make_parser().parse_args(argv, argparse.Namespace(**{**recorded, **network}))
    extra = [name for name, value in network.items() if getattr(args, name) != value]
    if extra:
        raise UsageError(
            f"--evaluate names the network and trains nothing. Received: --{extra[0]} too; leave out one of them."
        )
    if args.run_name == AUTO_NAME:
        args.run_name = None
    return args


def _folder_to_resume(args) -> Path:
    """Returns the run folder that `--resume` refers to."""
    if args.list_layers or args.prepare_only:
        raise UsageError(
            "--resume continues a run. Received: --list_layers or --prepare_only too; leave out one of them."
        )
    if args.resume is True:
        if args.run_name is None:
            raise UsageError("--resume needs a run. Received: neither RUN_FOLDER nor --run_name; give one of them.")
        return Path(args.log_dir, args.run_name)
    folder = Path(os.path.abspath(args.resume)) if Path(args.resume).name in ("", "..") else Path(args.resume)
    if not (folder / "config.json").exists():
        advice = (
            "a run that ended before that file was written can be started again with its own flags, --run_name and "
            "--resume."
            if folder.is_dir()
            else "there is no such folder, check the path."
        )
        raise UsageError(f"--resume takes the folder of a run, with its config.json. Received: {args.resume}; {advice}")
    return folder


def is_debug(argv: Sequence[str]) -> bool:
    """Returns whether the arguments ask for tracebacks, also if other arguments are wrong."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--debug", nargs="?", const="true", default="false")
    return parser.parse_known_args(argv)[0].debug.lower() in TRUE


def without_doubled_flags(argv: Sequence[str]) -> list[str]:
    """Returns the arguments without flags that are directly followed by themselves, as in the published example."""
    return [
        word for word, following in zip(argv, [*argv[1:], None]) if not (word.startswith("--") and word == following)
    ]


def resolve(args: argparse.Namespace) -> Config:
    """Fills in the defaults that depend on the data set and the scheme, and checks flags against each other.

    Raises:
        UsageError: if flags contradict each other or the tables.
    """
    given = dict(vars(args))
    given["train_type"] = ALIASES.get(args.train_type, args.train_type)
    scheme, dataset = SCHEMES[given["train_type"]], dataset_row(args.dataset_name)
    if args.layers is not None and "layers" not in scheme.reads:
        raise UsageError(
            f"--layers needs --train_type listed_layers. Received: --train_type {given['train_type']}; change one of "
            "them."
        )
    if args.layers is None and "layers" in scheme.reads:
        raise UsageError(
            f"--train_type {given['train_type']} needs --layers. Received: no --layers; give a regular expression or "
            "@FILE."
        )
    unread = sorted(flag for flag in SELECTION_FLAGS - scheme.reads if given[flag] is not None)
    if unread:
        log.warning(
            "%s does not use %s, which is ignored.", given["train_type"], ", ".join(f"--{flag}" for flag in unread)
        )
    defaults = {
        "rho": scheme.rho,
        "num_betti_batches": NUM_BETTI_BATCHES,
        "interval": INTERVAL,
        "timing": TIMINGS[0],
        "learning_rate": scheme.learning_rate,
        "input_size": default_input_size(args.model_name, dataset.input_size),
        "preprocessing": "none" if keras_file.is_path(args.model_name) else None,
        "num_epochs": dataset.num_epochs,
    }
    for flag in SELECTION_FLAGS - scheme.reads:
        given[flag] = defaults[flag] = None
    if given["memory_budget_mb"] is not None:
        defaults["rho"] = None  # the memory budget takes its place
    given.update({flag: value for flag, value in defaults.items() if given[flag] is None})
    litert = [f"--{flag}" for flag in LITERT_FLAGS if given[flag] != getattr(Config, flag)]
    if litert and not args.save_litert:
        raise UsageError(f"{', '.join(litert)} needs --save_litert. Received: no --save_litert; add it.")
    cfg = Config(**given)
    check_flags(cfg)
    segments.check(cfg)
    check_strategy(cfg, reselects=segments.selects_while_training(cfg))
    caching.check(cfg)
    return cfg
