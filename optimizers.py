"""The optimizers of a run; the loop trains with them, and ElasticTrainer looks one step ahead."""

import keras

import distribution


def make_optimizer(cfg, total_steps):
    """Returns the optimizer: cosine decay to 0, decoupled weight decay, clipped gradients."""
    schedule = keras.optimizers.schedules.CosineDecay(cfg.learning_rate, decay_steps=total_steps)
    common = {
        "learning_rate": schedule,
        "weight_decay": cfg.weight_decay or None,
        "global_clipnorm": cfg.global_clipnorm or None,
    }
    optimizer = OPTIMIZERS[cfg.optimizer](common)
    return optimizer if cfg.strategy == "none" else distribution.clip_the_sum(optimizer)


OPTIMIZERS = {
    "sgd": lambda common: keras.optimizers.SGD(momentum=0.9, **common),
    "adam": lambda common: keras.optimizers.Adam(**common),
}
