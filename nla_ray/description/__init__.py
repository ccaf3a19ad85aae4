"""From an activation to its description: the verbalizer and the generation engines.

Nouns: a description (text, and how it was sampled), a verbalizer (activation -> description), an
engine (what generates for it), a generation protocol (how the descriptions of a file came about).

Read: record, verbalizer, protocol (what two verbalizers must share to be compared), files,
reference (verbalizers of others), engines/interface (what an engine is, and which one generates),
sampling, engines/slots (who decodes when), engines/slot_cache (what a row has seen),
engines/decoder (what that asks of a base), engines/plain (every base, by the library's own
modules), engines/compact and engines/projection (Llama-like bases, from their weights alone),
engines/factors (an adapter's tensors), engines/graphed (a step as a CUDA graph), engines/requests,
engines/self_check; engines/vllm, which shares none of that.

It trains nothing and scores nothing, and no file of it knows a run directory.
"""
