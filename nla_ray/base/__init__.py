"""The frozen base: where it comes from, where its parts are, what layer K means, its prompts.

Nouns: a base (model and tokenizer), an adapter (LoRA weights over it), a prompt.

Read: sources, config_files, families, gpus, load, spread, layers, self_check, adapters,
adapter_files, conversation, prompts, encoding, identity, pretrained, reference (what a checkpoint
of the reference implementation says of itself).

It trains nothing and knows no activation.
"""
