"""Peak memory: measured; without running anything, by the traced step, simulated; and the published convention.

    measure      the allocator's own count, over any block and over a training step
    scheme       all figures of one training scheme, measured in a fresh process
    step_graph   the training step as TensorFlow will run it: traced, optimised, every size known
    kernels      what each operation does with buffers: allocates, reuses, passes on
    allocator    TensorFlow's allocator: which chunk a request gets, and how much of it is waste
    executor     the order in which TensorFlow's executor runs the operations
    estimate     the three together: a predicted peak and what it is made of
    budget       the longest prefix of a ranking that fits a number of bytes
    convention   the figure of the published plot, computed its way
    figure       the published plot, drawn by convention and as measured

memory_utils.py, one folder up, is the command line.
"""
