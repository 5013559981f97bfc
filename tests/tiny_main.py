"""main.py with a tiny network in place of the backbone, for tests that need a process of their own."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import models
from core import environment  # noqa: F401  before anything imports TensorFlow
from main import main


def assemble(cfg, num_classes):
    from networks import network_of, tiny_model

    return network_of(tiny_model(input_size=cfg.input_size, num_classes=num_classes))


def load_weights(network, cfg):
    from dataclasses import replace

    from models import batchnorm

    batchnorm.MODES["batch"](network.model)
    return replace(network, provenance={"source": "none"}, bn_stats="batch")


models.assemble, models.load_weights = assemble, load_weights

if __name__ == "__main__":
    sys.exit(main())
