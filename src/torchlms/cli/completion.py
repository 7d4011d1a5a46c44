"""Completion: what a shell may offer as the value of an option. Imports nothing before it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Completer = Callable[[str], list[str]]


def one_of(*words: str) -> Completer:
    """Any of ``words``."""

    def complete(incomplete: str) -> list[str]:
        return _beginning(words, incomplete)

    return complete


def models(incomplete: str) -> list[str]:
    """The names of the networks; a user's own ``module:factory`` is not known."""
    from torchlms.bench.networks import NETWORKS

    return _beginning(NETWORKS, incomplete)


def ways(incomplete: str) -> list[str]:
    """The ways to make a step fit."""
    from torchlms.bench.options import Way

    return _beginning([way.value for way in Way], incomplete)


def several_ways(incomplete: str) -> list[str]:
    """The same after the last comma, without those that stand before it."""
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [f"{before}{comma}{way}" for way in ways(last) if way not in taken]


def rules(incomplete: str) -> list[str]:
    """The names of the rules, ready for a value."""
    from dataclasses import fields

    from torchlms.core.rules import Rules

    return _beginning([f"{field.name}=" for field in fields(Rules)], incomplete)


def _beginning(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
