"""Rankings that look at no image: what AdaBet has to beat.

The last two ask whether it is the topology, or only the small activations near
the output.
"""

import numpy as np

from selection.ranking import select_top

_DRAW = 7  # keeps these random numbers apart from those of the data


def at_random(network, batches, cfg):
    """Ranks the layers by random numbers, which the seed decides."""
    rng = np.random.default_rng([cfg.seed, _DRAW])
    return select_top(network, cfg, rng.random(len(network.candidates)).tolist())


def nearest_the_output(network, batches, cfg):
    """Ranks the layers by their place in the forward pass, the last first."""
    return select_top(network, cfg, list(range(len(network.candidates))))


def smallest_activation(network, batches, cfg):
    """Ranks the layers by the elements of their output, the fewest first."""
    return select_top(network, cfg, [-candidate.activation_size for candidate in network.candidates])
