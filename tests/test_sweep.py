"""The sweep: what it plans, what it skips, how it fails, and that its children die with it.

The runs are those of a stand-in for main.py that takes a fraction of a second.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sweep
from sweeping import launch
from sweeping.board import Board, read_failures
from sweeping.plan import ADABET_AND_BASELINES, finished_records, is_finished, make_parser, plan

import selection
from core.config import Config
from data import DATASETS
from models import BACKBONES
from run import flags

pytestmark = pytest.mark.slow

ROOT = Path(sweep.__file__).parent.parent

# Behaves as files beside it say: it notes each start in `calls`, fails at seeds
# in `fail`, waits to be ended at seeds in `hang`, having said so through the
# pipe `at_work`, and has no data set called lost.
STAND_IN = f"""
import json, os, signal, sys
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from run import flags

here = Path(__file__).parent
cfg = flags.parse(sys.argv[1:])
seeds = lambda name: (here / name).read_text().split() if (here / name).exists() else []
if cfg.prepare_only:
    (here / "prepared").open("a").write(cfg.dataset_name + "\\n")
    sys.exit("Error: lost is unavailable" if cfg.dataset_name == "lost" else 0)
(here / "calls").open("a").write(cfg.run_name + "\\n")
(here / "gpus").open("a").write(os.environ.get("CUDA_VISIBLE_DEVICES", "unset") + "\\n")
if str(cfg.seed) in seeds("fail"):
    sys.exit("first line\\nError: the disk is full")
folder = Path(cfg.log_dir) / cfg.run_name
folder.mkdir(parents=True, exist_ok=cfg.resume)
(folder / "config.json").write_text(json.dumps({{**asdict(cfg), "weights_provenance": {{"source": "none"}}, "bn_stats": "batch", "num_classes": 10}}))
if str(cfg.seed) in seeds("hang"):
    def interrupted(*_):
        (folder / "summary.json").write_text('{{"status": "interrupted"}}')
        os._exit(143)
    signal.signal(signal.SIGTERM, interrupted)
    at_work = open(here / "at_work", "w")
    print(os.getpid(), file=at_work, flush=True)
    while True:
        signal.pause()
if (here / "meet").exists():
    open(here / "meet", "w" if cfg.seed == 0 else "r").close()  # returns when both are there
(folder / "summary.json").write_text(json.dumps({{"status": "done", "accuracy": 50.0 + cfg.seed, "train_s": 1.5}}))
"""

SWEEP = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import sweep
from sweeping import launch
from sweeping.board import Board, read_failures
from sweeping.plan import ADABET_AND_BASELINES, finished_records, is_finished, make_parser, plan
from pathlib import Path
here = Path(__file__).parent
if __name__ == "__main__":
    sys.exit(sweep.main(sys.argv[1:], program=[str(here / "main.py")], itself=[sys.executable, __file__], cluster="local"))
"""


class Bench:
    """A folder with the stand-in, a sweep of it, and what they left behind."""

    def __init__(self, folder):
        self.folder, self.logs = folder, folder / "logs"
        (folder / "main.py").write_text(STAND_IN)
        (folder / "sweep_it.py").write_text(SWEEP)

    def words(self, *words, datasets="digits", seeds="0,1"):
        return ["--models", "mobilenetv2", "--datasets", datasets, "--train_types", "full_training", "--seeds", seeds,
                "--weights", "none", "--log_dir", str(self.logs), *words]  # fmt: skip

    def sweep(self, *words, **axes):
        return sweep.main(self.words(*words, **axes), program=[str(self.folder / "main.py")])

    def start(self, *words, **axes):
        command = [sys.executable, str(self.folder / "sweep_it.py"), *self.words(*words, **axes)]
        # Tests that run in the background have SIGINT ignored, and so would the sweep.
        listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)

    def tell(self, name, text):
        (self.folder / name).write_text(text)

    @property
    def calls(self):
        """Seeds of the runs that were started, in order."""
        path = self.folder / "calls"
        return [line.split("_seed")[1][0] for line in path.read_text().split()] if path.exists() else []

    def folders(self):
        return sorted(path.name for path in self.logs.iterdir() if path.name != "sweep")


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def time_limit():
    """Ends a test that waits for a process which never comes."""

    def give_up(*_):
        raise TimeoutError("waited for two minutes")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- planning


def lines_of(capsys, *argv):
    assert sweep.main([*argv, "--dry_run"]) == 0
    return capsys.readouterr().out.splitlines()


def test_dry_run_prints_sixteen_pairs_that_main_accepts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without logs
    lines = lines_of(capsys)
    schemes = [name for name in ADABET_AND_BASELINES if name in selection.SCHEMES]
    assert len(lines) == len(set(lines)) == 4 * 4 * len(schemes)
    configs = []
    for line in lines:
        assert line.startswith("python main.py --model_name ")
        configs.append(flags.parse(shlex.split(line)[2:]))
    assert {cfg.model_name for cfg in configs} == set(BACKBONES)
    assert {cfg.dataset_name for cfg in configs} == set(DATASETS) - {"digits", "image_folder"}
    assert {cfg.train_type for cfg in configs} == set(schemes) and {cfg.weights for cfg in configs} == {"imagenet"}
    assert len({cfg.run_name for cfg in configs}) == len(lines)
    assert list(tmp_path.iterdir()) == []


def rhos_of(capsys, *argv):
    configs = [
        flags.parse(shlex.split(line)[2:])
        for line in lines_of(capsys, "--models", "vgg16", "--datasets", "digits", *argv)
    ]
    found = {}
    for cfg in configs:
        found.setdefault(cfg.train_type, []).append(cfg.rho)
    return found


def test_rhos_apply_only_to_schemes_that_read_rho(capsys, monkeypatch):
    monkeypatch.setitem(selection.SCHEMES, "own", replace(selection.SCHEMES["betti_train"], rho=0.533))
    types = ["--train_types", "bettitrain,full_training,own", "--rhos"]
    assert rhos_of(capsys, *types, "0.1,0.2") == {
        "act_norm_betti_train": [0.1, 0.2], "full_training": [None], "own": [0.533],
    }  # fmt: skip
    assert rhos_of(capsys, *types, "0.3,own=0.5,own=0.9") == {
        "act_norm_betti_train": [0.3], "full_training": [None], "own": [0.5, 0.9],
    }  # fmt: skip


def test_run_names_differ_only_by_decisive_flags(capsys):
    def names(*argv):
        return [flags.parse(shlex.split(line)[2:]).run_name for line in lines_of(capsys, *argv)]

    assert len(set(names("--seeds", "0,0,1"))) == len(names("--seeds", "0,1"))
    assert names() == names("--save_txt", "--data_dir", "/elsewhere") == names("--train_types", "--train_types", ",".join(
        name for name in ADABET_AND_BASELINES if name in selection.SCHEMES))  # fmt: skip
    assert not set(names()) & set(names("--num_epochs", "3"))


@pytest.mark.parametrize(
    "words, says",
    [("--run_name x", "--run_name"), ("--seed 3", "--seeds"), ("--select_only", "Leave it out"), ("--jobs 0", "at least 1"),
     ("--train_types betti", "betti"), ("--models resnet", "resnet"), ("--seeds x", "'x'"), ("--rhos 2", "at most 1"),
     ("--rhos full_training=0.1", "full_training=0.1"), ("--seeds ,", "--seeds"), ("--no_such_flag", "--no_such_flag")],
)  # fmt: skip
def test_wrong_use_gives_one_line_before_anything_runs(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- running


def test_second_sweep_skips_finished_runs(bench, capsys):
    assert bench.sweep() == 0
    out, err = capsys.readouterr()
    assert "2 of 2 runs are done" in out and "\x1b" not in err
    assert "accuracy 51.00 %, 1.5 s of training" in err.splitlines()[-1]
    assert bench.calls == ["0", "1"] and (bench.folder / "prepared").read_text() == "digits\n"
    assert bench.sweep() == 0 and bench.calls == ["0", "1"]
    assert bench.sweep(seeds="0,1,2") == 0 and bench.calls == ["0", "1", "2"]
    assert bench.sweep("--num_epochs", "3", seeds="0") == 0 and bench.calls == ["0", "1", "2", "0"]
    assert len(bench.folders()) == 4


def test_failed_run_is_recorded_and_others_continue(bench, capsys):
    bench.tell("fail", "0")
    assert bench.sweep() == 1
    assert bench.calls == ["0", "1"] and "failed, Error: the disk is full" in capsys.readouterr().err
    (name, failure), = read_failures(bench.logs).items()  # fmt: skip
    assert "_seed0_" in name and (failure["exit_code"], failure["last_line"]) == (1, "Error: the disk is full")
    assert "first line" in Path(failure["log"]).read_text() and flags.parse(failure["arguments"]).seed == 0
    bench.tell("fail", "")
    assert bench.sweep() == 0 and bench.calls == ["0", "1", "0"]
    assert read_failures(bench.logs) == {}


def test_unavailable_data_set_fails_only_its_runs(bench, capsys):
    assert bench.sweep(datasets="lost,digits") == 1
    assert "2 of 4 runs are done" in capsys.readouterr().out
    assert (bench.folder / "prepared").read_text().split() == ["lost", "digits"]  # each once
    failures = read_failures(bench.logs)
    assert len(failures) == 2 and all("_lost_" in name for name in failures)
    assert {failure["last_line"] for failure in failures.values()} == {"Error: lost is unavailable"}


def test_only_unfinished_runs_are_resumed(bench):
    assert bench.sweep() == 0
    first, second = [bench.logs / name for name in bench.folders()]
    consoles = [bench.logs / "sweep" / f"{folder.name}.log" for folder in (first, second)]
    (first / "summary.json").unlink()  # as after SIGKILL
    before = {path: path.stat().st_mtime_ns for path in second.rglob("*")}
    assert bench.sweep() == 0 and bench.calls == ["0", "1", "0"]
    assert before == {path: path.stat().st_mtime_ns for path in second.rglob("*")}
    assert ["--resume" in console.read_text().splitlines()[0] for console in consoles] == [True, False]


def test_finished_runs_are_recognized_by_flags_not_name(bench):
    assert bench.sweep() == 0
    for folder in bench.folders():
        (bench.logs / folder).rename(bench.logs / f"mine_{folder}")
    assert bench.sweep() == 0 and bench.calls == ["0", "1"]
    assert bench.sweep("--bn_stats", "batch") == 0 and bench.calls == ["0", "1"]  # what auto came to
    assert bench.sweep("--bn_stats", "stored", seeds="0") == 0 and bench.calls == ["0", "1", "0"]


def test_run_of_another_sweep_is_left_alone(bench, capsys):
    assert bench.sweep() == 0
    (name, _) = bench.folders()
    (bench.logs / name / "summary.json").unlink()
    with open(bench.logs / "sweep" / f"{name}.log", "a") as console:
        fcntl.flock(console, fcntl.LOCK_EX)
        assert bench.sweep() == 1
    assert bench.calls == ["0", "1"] and "another sweep is running it" in capsys.readouterr().err
    assert (bench.logs / name / "config.json").exists()


def test_jobs_run_at_the_same_time(bench):
    os.mkfifo(bench.folder / "meet")  # a run alone would wait for ever
    assert bench.sweep("--jobs", "2") == 0 and sorted(bench.calls) == ["0", "1"]


@pytest.mark.parametrize(
    "jobs, visible, expected",
    [("2", "3,5", {"3", "5"}), ("1", "3,5", {"3,5"}), ("2", "", {""}), ("2", "0,1,2", {"0", "1"})],
)
def test_each_job_gets_a_gpu_of_its_own(jobs, visible, expected, bench, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if jobs == "2":
        os.mkfifo(bench.folder / "meet")  # both run at the same time
    assert bench.sweep("--jobs", jobs) == 0
    assert set((bench.folder / "gpus").read_text().split("\n")[:-1]) == expected


def test_more_jobs_than_gpus_are_refused(bench, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert bench.sweep("--jobs", "3") == 2 and "2 visible GPUs" in capsys.readouterr().err


def test_gpus_are_counted_by_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU 0: A (UUID: x)"\necho "GPU 1: B (UUID: y)"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.visible_gpus() == ["0", "1"]


@pytest.mark.parametrize("deadly, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_children_end_with_the_sweep_which_resumes(bench, deadly, code):
    bench.tell("hang", "1")
    os.mkfifo(bench.folder / "at_work")
    process = bench.start()
    with open(bench.folder / "at_work") as at_work:  # opens when a run is at work
        child = int(at_work.readline())
        os.kill(process.pid, deadly)
        assert at_work.read() == ""  # ends when it is dead, and its end of the pipe closed
    assert process.wait() == code and child != process.pid
    process.communicate()
    first, second = bench.folders()
    assert (bench.logs / second / "summary.json").exists() == (deadly != signal.SIGKILL)  # gently, where it can be
    before = (bench.logs / first / "summary.json").stat().st_mtime_ns
    bench.tell("hang", "")
    assert bench.sweep() == 0 and bench.calls == ["0", "1", "1"]
    assert (bench.logs / first / "summary.json").stat().st_mtime_ns == before


def test_slurm_runs_one_array_job_of_single_runs(bench):
    pytest.importorskip("submitit", reason="submitit, an optional dependency, is not installed")
    bench.tell("fail", "1")
    process = bench.start("--launcher", "slurm", "--num_epochs", "2", seeds="0,1")
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert "1 of 2 runs are done" in out and "array job of 2 tasks" in err
    assert sorted(bench.calls) == ["0", "1"] and (bench.folder / "prepared").read_text() == "digits\n"
    (failure,) = read_failures(bench.logs).values()
    assert failure["last_line"] == "Error: the disk is full" and "first line" in Path(failure["log"]).read_text()
    (done,) = bench.folders()
    assert json.loads((bench.logs / done / "config.json").read_text())["num_epochs"] == 2


def test_slurm_without_submitit_names_the_package(bench, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert bench.sweep("--launcher", "slurm") == 2
    assert "pip install submitit" in capsys.readouterr().err


def test_slurm_is_refused_where_it_is_not_installed(bench, capsys, monkeypatch):
    pytest.importorskip("submitit", reason="submitit, an optional dependency, isn't installed")
    (run,) = plan(make_parser().parse_args(bench.words(seeds="0")), [])
    (bench.logs / "sweep" / "slurm").mkdir(parents=True)
    (bench.logs / "sweep" / "slurm" / f"{run.name}.job").write_text("7_0\n")  # of an earlier sweep
    monkeypatch.setenv("PATH", "/nowhere")
    argv = bench.words("--launcher", "slurm", "--skip_prepare", seeds="0")
    assert sweep.main(argv, program=[str(bench.folder / "main.py")]) == 2
    assert "srun" in capsys.readouterr().err.splitlines()[-1] and bench.calls == []


def test_live_table_counts_by_network_and_data_set(bench):
    from rich.console import Console

    runs = plan(make_parser().parse_args(bench.words(seeds="0,1,2")), [])
    board = Board(runs, runs[1:])
    board.states[runs[1]] = "running"
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    console.print(board.table())
    (row,) = [line for line in console.export_text().splitlines() if "mobilenetv2" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "mobilenetv2", "digits", "1", "1", "", "1", "full_training seed 1",
    ]  # fmt: skip


def test_runs_older_than_head_init_count_as_glorot(tmp_path):
    """Runs with another start of the head are never taken for those of today's default."""
    record = {key: value for key, value in vars(Config(bn_stats="stored")).items() if key != "head_init"}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(record))
    (tmp_path / "old" / "summary.json").write_text(json.dumps({"status": "done"}))
    records = finished_records(tmp_path)
    assert len(records) == 1
    assert not is_finished(Config(), records) and is_finished(Config(head_init="glorot"), records)
