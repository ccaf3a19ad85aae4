"""How settings name a teacher that is asked over the network, and what its tokens cost.

`openai:MODEL`, `anthropic:MODEL`, `endpoint:MODEL@URL`; any other is an offline teacher's name.
It knows no SDK. Protects the rule that a name goes into files: no key may stand in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args
from urllib.parse import urlsplit

Provider = Literal["openai", "anthropic", "endpoint"]
TEACHER_FORMS = "`openai:MODEL`, `anthropic:MODEL` or `endpoint:MODEL@http://HOST:PORT/v1`"
_ENDPOINT = re.compile(r"(?P<model>.+?)@(?P<url>https?://.+)")


@dataclass(frozen=True, kw_only=True)
class TeacherName:
    """A teacher that is asked over the network.

    Example: TeacherName(name="endpoint:qwen3@http://localhost:8000/v1", provider="endpoint",
    model="qwen3", base_url="http://localhost:8000/v1")
    """

    name: str
    """As settings say it; the teacher's name in files."""
    provider: Provider
    model: str
    base_url: str | None = None
    """None: the provider's own, or what its SDK reads from the environment."""

    @classmethod
    def of(cls, name: str, setting: str = "label.teachers") -> TeacherName:
        """Raises ValueError that names the setting: another form, or an address that holds a key.

        >>> TeacherName.of("openai:gpt-6-sol").model
        'gpt-6-sol'
        """
        provider, _, rest = name.partition(":")
        if provider not in get_args(Provider) or not rest:
            raise ValueError(
                f"{setting}: got {name!r}, expected {TEACHER_FORMS}. Correct the name."
            )
        if provider != "endpoint":
            return cls(name=name, provider=cast(Provider, provider), model=rest)
        found = _ENDPOINT.fullmatch(rest)
        if found is None:
            raise ValueError(
                f"{setting}: got an endpoint of model {rest.partition('@')[0]!r} without an"
                " address, expected `endpoint:MODEL@http://HOST:PORT/v1`. Add the address."
            )
        parts = urlsplit(found["url"])
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"{setting}: got an address of model {found['model']!r} that holds a user, a"
                " password or parameters, expected one without: names of teachers are written into"
                " files. Put the key into the environment variable ENDPOINT_API_KEY."
            )
        return cls(
            name=name, provider="endpoint", model=found["model"], base_url=found["url"].rstrip("/")
        )


def is_asked(name: str) -> bool:
    """Whether a teacher of this name is asked over the network.

    >>> is_asked("openai:gpt-6-sol"), is_asked("offline-content-first")
    (True, False)
    """
    return name.partition(":")[0] in get_args(Provider) and ":" in name


@dataclass(frozen=True)
class TokenPrice:
    """What a teacher's tokens cost, in US dollars for a million."""

    input: float
    output: float

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        """What a request costs.

        >>> TokenPrice(2.0, 10.0).usd(1_000, 100)
        0.003
        """
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


PRICES: Mapping[str, TokenPrice] = {
    # https://developers.openai.com/api/docs/models
    "openai:gpt-6.2-astra": TokenPrice(8.0, 40.0),
    "openai:gpt-6.2-sol": TokenPrice(2.0, 10.0),
    "openai:gpt-6.1-terra": TokenPrice(1.0, 5.0),
    # https://docs.litellm.ai/blog/gpt_6_sol_luna
    "openai:gpt-6-sol": TokenPrice(2.0, 10.0),
    "openai:gpt-6-luna": TokenPrice(0.10, 0.50),
    # https://platform.claude.com/docs/about-claude/models/whats-new-opus-5, table of the line-up.
    # Claude Haiku 5.5 is not here: the page says "from", and no fixed price.
    "anthropic:claude-fable-5-1": TokenPrice(10.0, 50.0),
    "anthropic:claude-opus-5-5": TokenPrice(4.0, 20.0),
    "anthropic:claude-sonnet-5-5": TokenPrice(2.0, 10.0),
}
"""Name of a teacher -> the price of its tokens, with the page that says so.

Read in November 2026: the standard price of short prompts, without discounts for batches and
caches. `label.prices` replaces it, and adds other models.
"""


def given_prices(settings: Sequence[str]) -> dict[str, TokenPrice]:
    """`label.prices` by teacher's name. Raises ValueError for another form.

    >>> given_prices(["endpoint:qwen3@http://localhost:8000/v1=0.1/0.4"])
    {'endpoint:qwen3@http://localhost:8000/v1': TokenPrice(input=0.1, output=0.4)}
    """
    prices: dict[str, TokenPrice] = {}
    for setting in settings:
        name, _, figures = setting.rpartition("=")
        found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)/(\d+(?:\.\d*)?|\.\d+)", figures)
        if not name or found is None:
            raise ValueError(
                f"label.prices: got {setting!r}, expected `TEACHER=INPUT/OUTPUT`, US dollars for a"
                " million tokens. Say openai:gpt-6-sol=2/10, for example."
            )
        prices[name] = TokenPrice(float(found[1]), float(found[2]))
    return prices


def price_of(name: str, settings: Sequence[str]) -> TokenPrice | None:
    """The price of a teacher's tokens, as `label.prices` or else PRICES say; None: neither does."""
    return given_prices(settings).get(name, PRICES.get(name))
