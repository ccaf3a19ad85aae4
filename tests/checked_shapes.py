"""Shapes of tensors are checked in the tests and nowhere else.

Importing this module, before nla_ray is imported, makes the modules named below check every
annotation at each call. A use outside the tests pays nothing for them, and Ray's workers do not.
"""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""A function or class whose annotations are checked; an int is a float, as for type checkers."""

install_import_hook(
    ["nla_ray.activation.vectors", "nla_ray.score", "nla_ray.reinforce.credit"],
    "checked_shapes.checked",
)
