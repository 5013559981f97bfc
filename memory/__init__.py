"""Peak memory of selection and training.

measure         what TensorFlow's allocator counts
fresh_process   the same in a process of its own
estimate        the same before a step runs, by simulation (simulator/)
budget          the longest prefix of a ranking that fits a number of bytes
convention      the figure that the paper's plot shows
figure          the paper's plot, by convention and as measured
"""
