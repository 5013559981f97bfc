"""The text of docs/results.md and of its tasks' pages: what scripts/results.py makes of the runs."""

import statistics
from collections import Counter

import comparing
from scipy.stats import binom
from table import METRICS, Cell, Metric, bar

from core.config import Config

ADABET, SIZE_ONLY, B1_ONLY, HEAD = Config.train_type, "smallest_activations", "betti_train", "traditional_tl_training"
ELASTIC = "elastic_training"  # its rho is a share of time
OPPONENTS = ("random_layers", "last_layers", SIZE_ONLY, "fisher", ELASTIC)
RHO = 0.1  # where one rho stands for all
QUICK_NAME = "_quick"  # ends the names of small copies: their figures must not pass for a task's
# What a reader has to know of a task's history.
NOTES = {
    "digits": "Single runs on this set (seed 0, 30 epochs) were seen before its learning rates and epochs were fixed."
}
COMPARED = ("against", "at the same", "difference (points)", "95 % interval", "seeds", "AdaBet is", "runs compared")
COLUMNS = (*METRICS, Metric("Trained weights (thousands)", "num_trained_weights", 1e3, 1, "trained_weights"))
ACCURACY, MEMORY, *TIMES = METRICS


def report(tasks):
    """Returns the page on all tasks, which needs what results.csv holds."""
    compared = {task.name: comparisons(task) for task in tasks}
    overall = [
        [name, *comparison_row(*row)]
        for name, rows in compared.items()
        for row in rows
        if row[1] in ("rho", "memory")  # the page of the task has each rho
    ]
    parts = [
        "# Results", "", verdict(compared), "", *rule(), "", "## In short", "", *in_short(tasks), "",
        "## AdaBet against the others", "",
        *markdown(["task", *COMPARED], overall), "",
        f"{B1_ONLY} is AdaBet's score without the activation's size. It does not count in the first sentence.", "",
        *other_scores(tasks),
        "## Accuracy", "", *accuracies(tasks), "",
        "## Each task", "",
        "Each task has a page with its curves, memory, times, learning rates, what decides the score, and the "
        "stability of the choice: " + ", ".join(f"[{task.name}](results/{task.name}.md)" for task in tasks) + ".", "",
        "## Reproduce", "",
        *(line for task in tasks for line in commands(task)),
        "    python scripts/results.py logs/accuracy", "",
        "Each task's page has the SHA-256 of its WEIGHTS.h5, its device and its date. [results.csv](results.csv) lists "
        "every run folder with the fingerprint of its config.json.",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def commands(task):
    """Returns the lines that run a task."""
    name = task.name.removesuffix(QUICK_NAME)
    quick = " --quick" if name != task.name else ""
    programs = ["accuracy.py", *(["other_scores.py"] if task.scores else [])]
    return [f"    python benchmarks/{program} --weights WEIGHTS.h5 --task {name}{quick}" for program in programs]


def other_scores(tasks):
    """Returns the section on other scores, or nothing without one."""
    rows = []
    for task in tasks:
        ours = task.cells.get((ADABET, RHO), {})
        by_score = {name: {run.seed: run for run in runs if run.status == "done"} for name, runs in task.scores.items()}
        if by_score and (B1_ONLY, RHO) in task.cells:
            by_score = {B1_ONLY: task.cells[B1_ONLY, RHO], **by_score}
        for name, by_seed in by_score.items():
            if seeds := sorted(ours.keys() & by_seed.keys()):
                values = [by_seed[seed].summary[ACCURACY.key] - ours[seed].summary[ACCURACY.key] for seed in seeds]
                texts = difference_texts(comparing.Difference(tuple(values)))
                rows.append([task.name, name, spread(by_seed[seed] for seed in seeds), *texts])
    head = ["task", "score", ACCURACY.title, "over AdaBet (points)", "95 % interval", "seeds", "the score is"]
    text = (
        f"Each run trains the layers with the highest score, as many as AdaBet at rho {RHO:g}, with AdaBet's learning "
        f"rate. {B1_ONLY} has its own rate. benchmarks/other_scores.py defines the scores. They are compared on the "
        "test split among many, which favours the best."
    )
    return ["## Other scores", "", text, "", *markdown(head, rows), ""] if rows else []


def accuracies(tasks):
    """Returns the table of all schemes and tasks: mean and standard deviation over seeds."""
    places = dict.fromkeys(place for task in tasks for place in task.cells)
    schemes = list(dict.fromkeys(scheme for scheme, _ in places))
    rows = [
        [scheme, number(rho), *(accuracy_text(task, (scheme, rho)) for task in tasks)]
        for scheme, rho in sorted(places, key=lambda place: (schemes.index(place[0]), place[1] or 0))
    ]
    return markdown(["scheme", "rho", *(task.name for task in tasks)], rows)


def comparisons(task):
    """Returns [(opponent, what is equal, Difference, runs of AdaBet that were compared)] on a task.

    What is equal is `rho R`, `rho` for the mean over all, or `memory`.
    """
    ours, found = task.curve(ADABET), []
    for opponent in (*OPPONENTS, B1_ONLY):
        theirs = task.curve(opponent)
        for rho, difference in comparing.at_same_rho(ours, {} if opponent == ELASTIC else theirs).items():
            found.append((opponent, "rho" if rho is None else f"rho {rho:g}", difference, None))
        # Every scheme trains the head, which is its point at rho 0.
        difference, count = comparing.at_same_memory(ours, {**theirs, **task.curve(HEAD)}) if theirs else (None, 0)
        if difference:
            found.append((opponent, "memory", difference, f"{count} of {sum(map(len, ours.values()))}"))
    return found


def verdict(compared):
    """Returns the first sentence: whether AdaBet is ahead by more than the spread."""
    counts = {
        equal: Counter(
            d.verdict
            for rows in compared.values()
            for opponent, what, d, _ in rows
            if what == equal and opponent in OPPONENTS
        )
        for equal in ("rho", "memory")
    }
    always = all(set(count) == {"ahead"} for count in counts.values())
    texts = [
        f"at the same {equal} it is ahead in {count['ahead']}, behind in {count['behind']} and undecided in "
        f"{count['undecided']} of {count.total()} comparisons"
        for equal, count in counts.items()
    ]
    return (
        f"**AdaBet ({ADABET}) is {'' if always else 'not '}ahead of the simpler choices by more than the spread over "
        f"seeds: {'; '.join(texts)}.**"
    )


def rule():
    """Returns the lines that explain the first sentence."""
    return [
        f"A comparison is one task and one of {', '.join(OPPONENTS)}. AdaBet is ahead if the "
        f"{100 * comparing.CONFIDENCE:.0f} % confidence interval of the mean paired difference over seeds "
        f"(percentile bootstrap, {comparing.RESAMPLES:,} resamples) is above 0, behind if it is below 0. With three "
        "seeds the interval is their range, which leaves out 0 for one in four pairs of equal schemes; with fewer "
        "there is none, and the comparison is undecided. AdaBet counts as ahead overall if every comparison is ahead. "
        "At the same rho, a seed's differences are averaged over the common rhos. At the same memory, the opponent's "
        "accuracy is interpolated over the measured peak along rho, with the head alone as rho 0; runs of AdaBet "
        f"more than {100 * comparing.SAME_MEMORY:g} % outside the opponent's peaks are left out, and the last column "
        f"counts the others. A comparison without a common rho or peak is missing. {ELASTIC} is compared at the same "
        "memory only: its rho is a share of time. ± is the sample standard deviation over seeds. The test accuracy of "
        "a run at chance is one that guessing reaches with a probability over 5 % (binomial)."
    ]


def in_short(tasks):
    """Returns the table that answers which scheme, which rho, what accuracy, at what cost, and how sure."""
    rows = []
    for task in tasks:
        for title, place in choices(task).items():
            rows.append([task.name, title, *row_of(task, place)])
    return [
        *markdown(["task", "", *row_head()], rows),
        "",
        "The most accurate is chosen on the test split among many, which favours it. Times are those of one seed, "
        "whose runs had the machine to themselves; `-` where two runs shared it. The peak is that of a training step "
        "or of the pass over the frozen layers, whichever is higher.",
    ]


def choices(task):
    """Returns {title: (scheme, rho)} of the cells that a reader looks for first."""
    found = {"most accurate": max(task.cells, key=lambda place: task.mean(place, ACCURACY))}
    if (ADABET, RHO) in task.cells:
        memory = task.mean((ADABET, RHO), MEMORY)
        cheap = [place for place in task.cells if task.mean(place, MEMORY) <= (1 + comparing.SAME_MEMORY) * memory]
        found[f"most accurate within AdaBet's memory + {100 * comparing.SAME_MEMORY:g} %"] = max(
            cheap, key=lambda p: task.mean(p, ACCURACY)
        )
        found["AdaBet"] = (ADABET, RHO)
    return found


def row_head():
    return ["scheme", "rho", "learning rate", "seeds", *(metric.title for metric in COLUMNS)]


def row_of(task, place):
    """Returns the texts of a cell (scheme, rho)."""
    scheme, rho = place
    runs = list(task.cells[place].values())
    planned = sum(run.scheme == place for run in task.runs)
    seeds = f"{len(runs)}" if len(runs) == planned else f"{len(runs)} of {planned}"
    figures = (accuracy_text(task, place), *(figure(task, place, metric) for metric in COLUMNS[1:]))
    return [scheme, number(rho), number(runs[0].config["learning_rate"]), seeds, *figures]


def figure(task, place, metric):
    """Returns the text of a mean over seeds."""
    mean = task.mean(place, metric)
    return number(mean and mean / metric.unit, metric.digits)


def accuracy_text(task, place):
    """Returns the text of an accuracy: mean and standard deviation over seeds."""
    return spread(task.cells[place].values()) if place in task.cells else "-"


def spread(runs):
    """Returns the text of the accuracy of some runs: mean, sample standard deviation, and runs at chance."""
    cell = Cell(list(runs), "")
    sd, guesses = cell.sd(ACCURACY), sum(map(at_chance, cell.runs))
    text = number(cell.mean(ACCURACY), ACCURACY.digits) + ("" if sd is None else f" ± {sd:.{ACCURACY.digits}f}")
    return text + (f" ({guesses} at chance)" if guesses else "")


def at_chance(run):
    """Returns whether guessing gives a test accuracy as high as this with a probability over 5 % (binomial)."""
    images = run.config["split_sizes"]["test"]
    correct = round(run.summary[ACCURACY.key] * images / 100)
    return binom.sf(correct - 1, images, 1 / run.config["num_classes"]) > 0.05


def task_page(task):
    """Returns the page on one task, which needs its run folders."""
    seeds = sorted({run.seed for run in task.runs})
    config = next(run.config for run in task.runs if run.status == "done")
    days = [day for run in task.runs if (day := date(run))]
    dates = " to ".join(dict.fromkeys((min(days), max(days))))
    undone = Counter(run.status for run in task.runs if run.status != "done")
    weights = {found["sha256"] for run in task.runs if (found := run.config.get("weights_provenance"))}
    parts = [
        f"# {task.name}",
        "",
        f"{config['model_name']} on {config['dataset_name']}, input {config['input_size']} px, "
        f"{sum(config['split_sizes'][name] or 0 for name in ('train', 'validation'))} training images, "
        f"{config['split_sizes']['test']} test images, {config['num_epochs']} epochs; seeds "
        f"{', '.join(map(str, seeds))}; {config['device']}, {config['cpu_count']} cores; {dates}. "
        + (f"Not finished: {', '.join(f'{n} {status}' for status, n in undone.items())}. " if undone else "")
        + (
            "Times are not reported: two runs shared the machine."
            if task.timed_seed is None
            else f"Times are those of seed {task.timed_seed}, whose runs had the machine to themselves."
        )
        + (f" {NOTES[task.name]}" if task.name in NOTES else ""),
        "",
        f"![accuracy over memory and over rho]({task.name}.svg)",
        "",
        *markdown(row_head(), [row_of(task, place) for place in task.cells]),
        "",
        "## AdaBet against the others",
        "",
        "[results.md](../results.md) explains the comparisons.",
        "",
        *markdown(COMPARED, [comparison_row(*row) for row in comparisons(task)]),
        "",
        "## What decides the score",
        "",
        *what_decides(task),
        "",
        "## Stability of the choice",
        "",
        *stability(task),
        "",
        "## Learning rates",
        "",
        *rates_table(task),
        "",
        f"SHA-256 of WEIGHTS.h5: {', '.join(map(str, weights))}. Nothing is augmented, and frozen first layers are "
        "computed once ([caching.md](../caching.md)): the peak is that of a training step or of that pass, "
        "whichever is higher, and the time per epoch is without it.",
    ]
    return "\n".join(parts) + "\n"


def comparison_row(opponent, equal, difference, count):
    """Returns the texts of a comparison, in the columns of `COMPARED`."""
    return [opponent, equal, *difference_texts(difference), count or "all"]


def difference_texts(difference):
    low, high = difference.interval or (None, None)
    return [
        f"{difference.mean:+.2f}", f"{low:+.2f} to {high:+.2f}" if low is not None else "-",
        str(len(difference.values)), difference.verdict,
    ]  # fmt: skip


def what_decides(task):
    """Returns the correlations of b1 and of activation size with AdaBet's ranking, and the accuracy without each."""
    places = [place for place in task.cells if place[0] == ADABET]
    if not places:
        return ["No run of AdaBet is finished."]
    # The ranking is the same at every rho.
    rankings = [run.selection()["layers"] for run in task.cells[places[0]].values()]
    b1 = [comparing.spearman([r["betti_1"] for r in rows], [-r["rank"] for r in rows]) for rows in rankings]
    size = [comparing.spearman([-r["activation_size"] for r in rows], [-r["rank"] for r in rows]) for rows in rankings]
    rows = [
        [number(rho), *(accuracy_text(task, (scheme, rho)) for scheme in (ADABET, B1_ONLY, SIZE_ONLY)),
         *(number(common(task, scheme, rho), 2) for scheme in (B1_ONLY, SIZE_ONLY))]
        for _, rho in places
    ]  # fmt: skip
    return [
        "Spearman correlation with AdaBet's ranking, mean over seeds (range): "
        f"b1 {with_range(b1)}, small activation {with_range(size)}.",
        "",
        *markdown(["rho", "b1 / size (AdaBet)", "b1 alone", "size alone", "layers shared with b1 alone (Jaccard)",
                   "layers shared with size alone (Jaccard)"], rows),
    ]  # fmt: skip


def common(task, scheme, rho):
    """Returns the mean over seeds of the Jaccard index of AdaBet's and another scheme's layers, or None."""
    ours, theirs = task.cells[ADABET, rho], task.cells.get((scheme, rho), {})
    shared = [
        comparing.jaccard([run.selection()["selected"] for run in (ours[seed], theirs[seed])])
        for seed in ours.keys() & theirs.keys()
    ]
    return statistics.fmean(shared) if shared else None


def stability(task):
    """Returns how much selections agree over seeds and batches, and whether that goes with accuracy."""
    rows, shared, accuracies, spreads = [], [], [], []
    for (scheme, rho), by_seed in task.cells.items():
        records = [run.selection() for run in by_seed.values()]
        if len(records) < 2 or any(row["rank"] is None for record in records for row in record["layers"]):
            continue  # not a ranking of layers
        overlap = comparing.jaccard([record["selected"] for record in records])
        cell = Cell(list(by_seed.values()), "")
        shared.append(overlap)
        accuracies.append(cell.mean(ACCURACY))
        spreads.append(cell.sd(ACCURACY))
        if rho == RHO:
            ranks = comparing.mean_spearman([[row["rank"] for row in record["layers"]] for record in records])
            taus = [record["stability"] for record in records if record["stability"] is not None]
            batches = statistics.fmean(taus) if taus else None
            rows.append([scheme, *(number(v, 2) for v in (overlap, ranks, batches)), f"{spreads[-1]:.2f}"])
    return [
        *markdown([f"scheme, rho {RHO:g}", "layers shared by two seeds (Jaccard)", "ranking over seeds (Spearman)",
                   "ranking over batches (Kendall)", "sd of accuracy"], rows),
        "",
        f"Over {len(shared)} pairs of scheme and rho, the layers shared by two seeds correlate (Spearman) "
        f"{number(comparing.spearman(shared, accuracies), 2)} with the mean accuracy and "
        f"{number(comparing.spearman(shared, spreads), 2)} with its standard deviation.",
    ]  # fmt: skip


def rates_table(task):
    """Returns the validation losses of the search for learning rates."""
    grid = sorted({rate for row in task.rates.values() for rate in row["val_loss"]}, key=float)
    row = {"rhos": [RHO], **next(iter(task.rates.values()))}  # a file without rhos is from a search at that one
    seeds, rhos = (", ".join(map(str, row[name])) for name in ("seeds", "rhos"))
    rows = [
        [scheme, *(number(row["val_loss"].get(rate), 3) for rate in grid), f"{row['learning_rate']:g}"]
        for scheme, row in task.rates.items()
    ]
    return [
        f"Validation loss, mean over seeds {seeds} and rho {rhos} (elastic schemes: their default; a "
        "scheme that is reported at fewer rhos: those); the lowest is "
        "chosen. A rate without a figure diverged, or was not tried, since a better one lay between. The test split "
        "plays no role.",
        "",
        *markdown(["scheme", *grid, "chosen"], rows),
    ]


def with_range(values):
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2f} ({min(known):.2f} to {max(known):.2f})" if known else "undefined"


def number(value, digits=None):
    return "-" if value is None else f"{value:g}" if digits is None else f"{value:.{digits}f}"


def markdown(head, rows):
    """Returns the lines of a Markdown table."""
    return [bar(head), bar(["---"] * len(head)), *map(bar, rows)]


def date(run):
    """Returns the day on which a run began, from its log, or an empty text."""
    try:
        with open(run.folder / "log.txt") as file:
            return file.readline()[:10]
    except OSError:
        return ""
