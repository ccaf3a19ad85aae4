"""What only a process on a CPU runs: faster kernels and a heap that keeps its pages.

Nothing of it is used where a process has a GPU.

Read: log_probs, shared_prefix, attention, projection, memory.

It knows torch alone: neither bases nor trainers.
"""
