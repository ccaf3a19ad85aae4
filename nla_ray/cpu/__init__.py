"""What only a process on a CPU runs: faster kernels and a heap that keeps its pages.

Nothing of it is used where a process has a GPU: whoever wants something of it asks `door` first.

Nouns: a kernel (the library's arithmetic, faster), a kind (of process, which books a GPU or none).

Read: door, environment, memory, log_probs, shared_prefix, attention, projection.

It knows torch and the configuration alone: neither bases nor trainers.
"""
