"""Runs a step without computing: TensorFlow's order of operations, and their buffers.

The order determines the peak: whether a gradient is used before the next one is
computed, and whether a weight is read again after its decay. TensorFlow's executor has
one queue per thread. Operations that become ready go to the front of their thread's
queue, and the last of them runs at once; an idle thread takes from the back of another
queue. This describes a CPU. A GPU has another order, and no estimate has been compared
with a measurement there.
"""

import heapq
from collections import deque

from memory.simulator import kernels


class Buffer:
    """Memory that tensors share, released with its last reference.

    Attributes:
        chunk: allocator.Chunk or None.
        num_bytes: int. The requested size.
        references: int.
        part: str. Its part in the split of the peak.
    """

    __slots__ = ("chunk", "num_bytes", "part", "references")

    def __init__(self, chunk, num_bytes, part):
        self.chunk, self.num_bytes, self.part, self.references = chunk, num_bytes, part, 1

    @property
    def size(self):
        return self.chunk.size if self.chunk else 0


class Memory:
    """The buffers of a device: their allocator, their parts, and the peak.

    Attributes:
        parts: dict from part to bytes in use.
        peak: int. The largest number of bytes in use since `forget_peak`.
        peak_parts: dict. The parts at the peak.
        peak_op: step_graph.Op or None. The operation that reached the peak.
        variables: dict from a variable's key to its Buffer.
    """

    def __init__(self, allocator):
        self.allocator = allocator
        self.parts = {}
        self.variables = {}
        self.forget_peak()

    def forget_peak(self):
        self.peak, self.peak_parts, self.peak_op = self.allocator.in_use, dict(self.parts), None

    def allocate(self, num_bytes, part, op=None):
        """Returns a Buffer with one reference."""
        buffer = Buffer(self.allocator.allocate(num_bytes), num_bytes, part)
        self.parts[part] = self.parts.get(part, 0) + buffer.size
        if self.allocator.in_use > self.peak:
            self.peak, self.peak_parts, self.peak_op = self.allocator.in_use, dict(self.parts), op
        return buffer

    def hold(self, buffer, times=1):
        buffer.references += times

    def drop(self, buffer):
        buffer.references -= 1
        if buffer.references == 0:
            self.parts[buffer.part] -= buffer.size
            self.allocator.release(buffer.chunk)

    def relabel(self, buffer, part):
        """Changes the part of a buffer."""
        self.parts[buffer.part] -= buffer.size
        self.parts[part] = self.parts.get(part, 0) + buffer.size
        buffer.part = part


def run(step, memory, num_threads):
    """Applies all operations of a step to `memory`, in order.

    Args:
        step: step_graph.Step.
        memory: Memory that holds the step's variables.
        num_threads: int. Threads that run operations.
    """
    _Run(step, memory, num_threads).all()


class _Run:
    def __init__(self, step, memory, num_threads):
        self.ops, self.memory = step.ops, memory
        self.waiting_for = [op.num_in_edges for op in step.ops]
        self.held = {}  # (op, port) -> Buffer of running operations
        self.inputs = [[None] * len(op.inputs) for op in step.ops]
        self.queues = [deque() for _ in range(num_threads)]
        self.inline = [deque() for _ in range(num_threads)]
        self.idle = list(range(num_threads))
        self.events = []  # (time, number, thread, op)
        self.now, self.count = 0.0, 0

    def all(self):
        for position, op in enumerate(op for op in self.ops if op.num_in_edges == 0):
            self.queues[position % len(self.queues)].append(op.index)
        self.wake()
        while self.events:
            self.now, _, thread, index = heapq.heappop(self.events)
            self.finish(index, thread)
            self.next(thread)
            self.wake()

    def wake(self):
        for thread in self.idle[:]:
            self.idle.remove(thread)
            self.next(thread)

    def next(self, thread):
        """Starts a thread's next operation, or makes the thread idle."""
        if self.inline[thread]:
            index = self.inline[thread].popleft()
        elif self.queues[thread]:
            index = self.queues[thread].popleft()
        else:
            others = [queue for queue in self.queues if queue]
            if not others:
                self.idle.append(thread)
                return
            index = others[0].pop()
        self.start(index)
        self.count += 1
        heapq.heappush(self.events, (self.now + self.ops[index].seconds, self.count, thread, index))

    def start(self, index):
        """Creates an operation's output buffers."""
        op, inputs, memory = self.ops[index], self.inputs[index], self.memory
        if op.type == "ReadVariableOp":
            outputs = [self.take(memory.variables[op.variable])]
        elif op.variable is not None:
            outputs = []
            self.change_variable(op, inputs)
        elif op.type in kernels.PASSES_ON:
            outputs = [self.take(inputs[port]) for port in range(len(op.outputs))]
        elif op.resident is not None:  # the batch, constants
            outputs = [self.take(memory.variables[op.resident])]
        else:
            outputs = [memory.allocate(tensor.num_bytes, op.part, op) for tensor in op.outputs[1:]]
            if op.outputs:
                outputs.insert(
                    0, self.written_over(op, inputs) or memory.allocate(op.outputs[0].num_bytes, op.part, op)
                )
        for port, buffer in enumerate(outputs):
            self.held[index, port] = buffer

    def take(self, buffer):
        self.memory.hold(buffer)
        return buffer

    def written_over(self, op, inputs):
        """Returns the input buffer that a kernel reuses for its first output, or None."""
        output = op.outputs[0]
        for port in kernels.WRITES_OVER.get(op.type, ()):
            if port >= len(inputs):
                break
            source = op.inputs[port]
            if (
                inputs[port].references == 1
                and source.num_bytes == output.num_bytes
                and source.dtype == output.dtype
                and output.num_bytes
            ):
                self.memory.relabel(inputs[port], op.part)
                return self.take(inputs[port])
        return None

    def change_variable(self, op, inputs):
        """Assigns to a variable: takes the new buffer, or changes in place if nothing else reads the old one."""
        memory, before = self.memory, self.memory.variables[op.variable]
        if op.type == "AssignVariableOp":
            after = self.take(inputs[1])
            memory.relabel(after, before.part)
        elif before.references > 1:
            after = memory.allocate(before.num_bytes, before.part, op)
            memory.relabel(before, "temporary")
        else:
            return
        memory.variables[op.variable] = after
        memory.drop(before)

    def finish(self, index, thread):
        """Passes an operation's outputs on, releases its inputs, and queues the operations that are ready."""
        op, memory = self.ops[index], self.memory
        for port, consumers in enumerate(op.consumers):
            buffer = self.held.pop((index, port), None)
            if buffer is None:
                continue
            memory.hold(buffer, len(consumers))
            for consumer, slot in consumers:
                self.inputs[consumer][slot] = buffer
            memory.drop(buffer)
        for buffer in self.inputs[index]:
            if buffer is not None:
                memory.drop(buffer)
        self.inputs[index] = None

        chosen = None
        for consumer in op.out_edges:
            self.waiting_for[consumer] -= 1
            if self.waiting_for[consumer]:
                continue
            if self.ops[consumer].type in kernels.INEXPENSIVE:
                self.inline[thread].append(consumer)
                continue
            if chosen is not None:
                self.queues[thread].appendleft(chosen)
            chosen = consumer
        if chosen is not None:
            if self.inline[thread]:
                self.queues[thread].appendleft(chosen)
            else:
                self.inline[thread].append(chosen)
