"""Which runs may train on cached features. Loads no framework, so flags are checked at once."""

from core.config import Config
from core.errors import UsageError

PLACES = ("auto", "off", "memory", "disk")  # values of --cache_features
DTYPES = ("float32", "float16")  # values of --cache_dtype


def check(cfg: Config, bn_stats: str | None = None) -> None:
    """Checks that the caching flags go together.

    Args:
        cfg: Config.
        bn_stats: str or None, as in `models.Network`; None before the network is built.

    Raises:
        UsageError: if features are asked for that cannot stand for the frozen layers, or
            if `--cached_views` has nothing to act on.
    """
    is_asked_for = cfg.cache_features in ("memory", "disk")
    if cfg.cached_views is not None and not (is_asked_for and cfg.augment):
        raise UsageError(
            f"--cached_views needs --cache_features memory or disk, and --augment. Received: --cached_views "
            f"{cfg.cached_views} with --cache_features {cfg.cache_features} and --augment {cfg.augment}; leave it out."
        )
    if cfg.cached_views is not None and cfg.cached_views > cfg.num_epochs:
        raise UsageError(
            f"--cached_views must be at most --num_epochs: an epoch uses one view. Received: {cfg.cached_views} with "
            f"{cfg.num_epochs} epochs; lower it."
        )
    obstacle = obstacle_to_caching(cfg, bn_stats)
    if is_asked_for and obstacle:
        raise UsageError(
            f"--cache_features must not change the computation. Received: {cfg.cache_features}, but {obstacle}; "
            "change that, or use --cache_features off."
        )


def obstacle_to_caching(cfg: Config, bn_stats: str | None) -> str | None:
    """Returns why features cannot stand for the frozen layers, or None if they can.

    Args:
        cfg: Config.
        bn_stats: str or None, as in `models.Network`.
    """
    obstacles = (
        (
            cfg.augment and cfg.cached_views is None,
            "augmentation draws new images in every epoch (--augment False or --cached_views avoids that)",
        ),
        (cfg.strategy != "none", f"--strategy {cfg.strategy} shares batches among devices"),
        (cfg.warmup_epochs > 0, "the selection comes after --warmup_epochs"),
        (cfg.interval is not None, f"{cfg.train_type} selects again every --interval epochs"),
        (
            bn_stats == "batch",
            "batch normalization uses batch statistics, which change with each batch (--bn_stats stored avoids that)",
        ),
    )
    return next((reason for applies, reason in obstacles if applies), None)
