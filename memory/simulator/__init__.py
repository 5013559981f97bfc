"""Simulates a training step on TensorFlow's executor and allocator, to predict its peak memory.

    step_graph   the step as TensorFlow will run it: traced, optimized, with the size of every tensor
    kernels      which operations allocate, reuse or pass on a buffer, and how long they take
    executor     the order in which TensorFlow's executor runs the operations
    allocator    the chunks that TensorFlow's allocator hands out

`memory/estimate.py` is its only user.

TensorFlow has an estimate of its own, `Cluster.DeterminePeakMemoryUsage` of grappler. It
sums the sizes of live tensors in a schedule of its cost model. It does not know that
elementwise kernels write over their input, that the allocator hands out chunks up to
twice the request, or the order in which gradients are used up, and it names neither the
layer of the peak nor its parts. In 27 cases of benchmarks/memory.py (four backbones, 224
pixels, oneDNN on) its median error was 9.1 % and its worst -27.3 %, with 12 cases beyond
10 %. The median error of this simulation was 0.5 % and its worst +4.0 %.
"""
