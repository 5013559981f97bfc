"""The paper's plot of peak memory, drawn twice: by its convention, and as measured."""

from dataclasses import replace

from core import environment
from core.config import Config
from core.units import MB
from memory import convention, fresh_process
from selection import SCHEMES

MODELS = {"resnet50": "ResNet50", "vit": "ViT-B/16", "mobilenetv2": "MobileNetV2", "vgg16": "VGG16"}
BARS = {"inference": "inference", "act_norm_betti_train": "AdaBet, rho 0.1", "full_training": "full training"}

# MB, read off the published plot (37 classes, ImageNet weights), +-3.
PUBLISHED = {
    "resnet50": (243, 263, 777),
    "vit": (84, 91, 387),
    "mobilenetv2": (315, 319, 375),
    "vgg16": (935, 935, 987),
}


def draw(cfg: Config, path: str) -> str:
    """Computes, measures and draws all four backbones.

    Args:
        cfg: Config. Batch size, input size, optimizer, weights and seed of all bars; the
            plot sets model and scheme.
        path: str. The image to write.

    Returns:
        str. The figures as text.
    """
    environment.load_tensorflow()
    rows = {}
    for model_name in MODELS:
        own = replace(cfg, model_name=model_name, rho=0.1, num_betti_batches=cfg.num_betti_batches or 4)
        rows[model_name] = {
            bar: _figures(replace(own, train_type=bar if bar in SCHEMES else "full_training"), bar) for bar in BARS
        }
    _plot(cfg, rows, path)
    return _text(cfg, rows, path)


def _figures(cfg, bar):
    """Returns (MB by convention, measured MB) of one bar."""
    network = fresh_process.build(cfg, cfg.num_classes)
    if bar == "inference":
        trained = ()
        peak = fresh_process.measure_peak(cfg, cfg.num_classes, "inference")
    else:
        trained = fresh_process.select(network, cfg).trained_weights
        peak = fresh_process.measure_peak(cfg, cfg.num_classes, "training", trained)
    return convention.megabytes(network, trained), None if peak.bytes is None else peak.bytes / MB


def _plot(cfg, rows, path):
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4), layout="tight")
    axes = drawing.subplots(1, 2)
    titles = (
        "published convention (always of batch 8)",
        f"measured (batch {cfg.batch_size}, {cfg.input_size} px, {cfg.optimizer})",
    )
    for column, (axis, title) in enumerate(zip(axes, titles)):
        heights = {label: [rows[model_name][bar][column] or 0 for model_name in MODELS] for bar, label in BARS.items()}
        for bars in axis.grouped_bar(heights, tick_labels=list(MODELS.values())).bar_containers:
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_ylabel("peak memory (MB)")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    drawing.savefig(path, dpi=150)


def _text(cfg, rows, path):
    lines = [f"{'':<12} {'':<16} {'published':>10} {'convention':>10} {'measured':>10}  MB"]
    for model_name, bars in rows.items():
        for published, (bar, (by_convention, measured)) in zip(PUBLISHED[model_name], bars.items()):
            shown = "-" if measured is None else f"{measured:.0f}"
            lines.append(f"{model_name:<12} {BARS[bar]:<16} {published:>10} {by_convention:>10.0f} {shown:>10}")
    lines.append("The published figures of AdaBet depend on ImageNet weights: other weights select other layers.")
    note = convention.note(cfg.batch_size)
    return "\n".join([*lines, *([note] if note else []), f"Figure: {path}"])
