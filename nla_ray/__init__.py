"""nla_ray: natural language autoencoders on Ray. Reads a language model's activations in plain
words, and checks them."""

__version__ = "0.1.0"
