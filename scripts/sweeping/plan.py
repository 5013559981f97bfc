"""What a sweep runs: its flags, its runs, and which of them are finished."""

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from core.config import Config
from core.errors import UsageError
from core.log import log
from data import DATASETS, path_name
from models import BACKBONES, short_name
from run import flags
from run.folder import decisive, differing_flags, finished_summary, recorded
from selection import ALIASES, SCHEMES

ADABET_AND_BASELINES = (
    "act_norm_betti_train", "full_training", "traditional_tl_training", "bn_plus_bias_training", "fisher",
    "elastic_training", "prunetrain",
)  # fmt: skip
# Flags that the sweep sets for each run, with its own flag for them, and flags that leave no
# finished run.
NOT_PASSED_ON = {
    "--model_name": "--models", "--dataset_name": "--datasets", "--train_type": "--train_types", "--rho": "--rhos",
    "--seed": "--seeds", "--run_name": None, "--select_only": None, "--list_layers": None, "--list_models": None,
    "--prepare_only": None, "--clear_cache": None, "--resume": None, "--evaluate": None,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of main.py.

    Attributes:
        cfg: Config of the arguments.
        arguments: tuple of str. Arguments of main.py without --log_dir and --run_name.
    """

    cfg: Config
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run folder's name. Its last part is a digest of the flags."""
        cfg, plain = self.cfg, Config()
        differing = {key: value for key, value in decisive(asdict(cfg)).items() if value != getattr(plain, key)}
        digest = hashlib.sha256(json.dumps(differing, sort_keys=True, default=str).encode()).hexdigest()[:6]
        rho = [] if cfg.rho is None else [f"rho{cfg.rho:g}"]
        return "_".join([short_name(cfg), path_name(cfg.dataset_name), cfg.train_type, *rho, f"seed{cfg.seed}", digest])

    @property
    def argv(self) -> list[str]:
        """All arguments of main.py."""
        return [*self.arguments, "--log_dir", self.cfg.log_dir, "--run_name", self.name]

    @property
    def folder(self) -> Path:
        return Path(self.cfg.log_dir) / self.name


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the sweep's own flags. Other flags are main.py's."""
    parser = argparse.ArgumentParser(
        prog="sweep.sh",
        description="Run models x data sets x schemes x rhos x seeds. Other flags go to every run.",
        allow_abbrev=False,
    )
    photos = [name for name, row in DATASETS.items() if row.tfds and name != Config.dataset_name]
    names = [name for name in ADABET_AND_BASELINES if name in SCHEMES]
    common = f"{SCHEMES[Config.train_type].rho:g}"
    own = ", ".join(f"{name} {rho:g}" for name, rho in _own_rhos().items())
    parser.add_argument("--models", default=",".join(BACKBONES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--datasets", default=",".join(photos), help="comma-separated (default: %(default)s)")
    parser.add_argument("--train_types", default=",".join(names), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--rhos",
        default=common,
        help="comma-separated, for the schemes that read rho. Those with a default of their own "
        f"({own or 'none'}) keep it unless they are named, as in 0.1,0.2,SCHEME=0.5 (default: %(default)s)",
    )
    parser.add_argument("--seeds", default="0", help="comma-separated (default: %(default)s)")
    parser.add_argument("--weights", default="imagenet", help="as in main.py (default: %(default)s)")
    parser.add_argument(
        "--log_dir", default=Config.log_dir, help="folder that contains the run folders (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        help="runs at a time, each on a GPU of its own if there are GPUs (default: 1; on Slurm: its own choice)",
    )
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), default="local", help="slurm: one array job, by submitit"
    )
    parser.add_argument(
        "--slurm_parameters",
        default="",
        metavar="NAME=VALUE,...",
        help="for submitit, e.g. slurm_partition=gpu,timeout_min=600",
    )
    parser.add_argument("--skip_prepare", action="store_true", help="do not check that data sets and weights are ready")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the runs that are not finished")
    return parser


def plan(args: argparse.Namespace, extra: Sequence[str]) -> list[Run]:
    """Returns the runs of a sweep, each checked by main.py's own parser.

    All runs with the first seed come before those with the second.

    Args:
        args: argparse.Namespace.
        extra: list of str. Flags for every run.

    Raises:
        UsageError: if a flag is not for sweeps, or main.py refuses it.
        SystemExit: if argparse refuses a flag and has explained it.
    """
    for word in extra:
        if word.split("=")[0] in NOT_PASSED_ON:
            instead = NOT_PASSED_ON[word.split("=")[0]]
            raise UsageError(f"a sweep sets {word} by itself. {f'Use {instead}.' if instead else 'Leave it out.'}")
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs must be at least 1. Received: {args.jobs}.")
    schemes = [ALIASES.get(name, name) for name in _listed("train_types", args)]
    unknown = [name for name in schemes if name not in SCHEMES]
    if unknown:
        raise UsageError(f"--train_types takes {', '.join(SCHEMES)}. Received: {unknown[0]!r}.")
    rhos = _rhos_by_scheme(schemes, _listed("rhos", args))
    runs = {}
    with quiet():  # each run's own log has the warnings of main.py
        for seed, dataset, model, scheme in itertools.product(
            _listed("seeds", args), _listed("datasets", args), _listed("models", args), schemes
        ):
            for rho in rhos[scheme]:
                arguments = ["--model_name", model, "--dataset_name", dataset, "--train_type", scheme]
                arguments += [] if rho is None else ["--rho", rho]
                arguments += ["--seed", seed, "--weights", args.weights, *extra]
                run = Run(flags.parse([*arguments, "--log_dir", args.log_dir]), tuple(arguments))
                runs.setdefault(run.name, run)
    return list(runs.values())


def _listed(flag, args):
    values = [value.strip() for value in getattr(args, flag).split(",") if value.strip()]
    if not values:
        raise UsageError(f"--{flag} needs a comma-separated list. Received: nothing.")
    return values


def _own_rhos():
    """Returns {scheme: rho} of the schemes with a default of their own."""
    common = SCHEMES[Config.train_type].rho
    return {name: row.rho for name, row in SCHEMES.items() if "rho" in row.reads and row.rho != common}


def _rhos_by_scheme(schemes, values):
    """Returns {scheme: list of rhos as text}, with [None] for schemes that do not read rho."""
    own, common, named = _own_rhos(), [], {}
    for value in values:
        scheme, equals, rho = value.rpartition("=")
        scheme = ALIASES.get(scheme, scheme)
        if equals and (scheme not in SCHEMES or "rho" not in SCHEMES[scheme].reads):
            readers = ", ".join(name for name, row in SCHEMES.items() if "rho" in row.reads)
            raise UsageError(f"--rhos takes RHO or SCHEME=RHO, SCHEME one of {readers}. Received: {value!r}.")
        (named.setdefault(scheme, []) if equals else common).append(rho)
    rhos = {}
    for scheme in schemes:
        if "rho" not in SCHEMES[scheme].reads:
            rhos[scheme] = [None]
        elif scheme in named:
            rhos[scheme] = named[scheme]
        elif scheme in own:
            rhos[scheme] = [f"{own[scheme]:g}"]
        elif common:
            rhos[scheme] = common
        else:
            raise UsageError(f"--rhos must have a value for {scheme}. Received: {','.join(values)}; add one.")
    return rhos


@contextlib.contextmanager
def quiet():
    """Keeps main.py's warnings out of this process's output."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def finished_records(log_dir: str) -> list[dict]:
    """Returns the content of config.json of every finished run in a log folder."""
    return [record for folder in sorted(Path(log_dir).glob("*/")) if (record := _finished_record(folder))]


def _finished_record(folder):
    """Returns the content of a run folder's config.json if its summary says done, else None."""
    try:
        return recorded(folder) if finished_summary(folder) else None
    except UsageError:
        return None  # not a run folder


def is_finished(cfg: Config, records: list[dict]) -> bool:
    """Returns whether a finished run had the same flags, apart from those without effect on results."""
    return any(not differing_flags(cfg, record) for record in records)


def is_done(run: Run) -> bool:
    """Returns whether the run's own folder holds a finished run."""
    return _finished_record(run.folder) is not None
