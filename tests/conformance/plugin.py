"""The pytest plugin that puts our methods into PEFT's tests and keeps them off the network."""

from __future__ import annotations

import fnmatch
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from . import data
from .rows import FAMILIES, METHODS
from .translate import Method, method_of, stand_in, translated_rows

QUICK = os.environ.get("CONFORMANCE_QUICK") == "1"
COLLECTED = Path(os.environ["CONFORMANCE_REPORT"])

_lost: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    """Take the network away, and the helpers of PEFT's tests that would use it."""
    _forbid_network()
    from tests import testing_utils

    testing_utils.hub_online_once = lambda model_id: nullcontext()
    testing_utils.load_cat_image = data.image
    testing_utils.load_dataset_english_quotes = data.quotes


def _forbid_network() -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise OSError(f"the conformance tests run offline, no connection to {address}")
        connect(self, address)

    socket.socket.connect = local_only  # type: ignore[method-assign]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the built-in configs in a test's parameters by ours."""
    definition = metafunc.definition
    for place, mark in enumerate(definition.own_markers):
        if mark.name != "parametrize" or not mark.args:
            continue
        names = mark.args[0]
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",")]
        rows = mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"]
        found, lost, concerned = translated_rows(list(names), rows, mark.kwargs.get("ids"), METHODS)
        _lost.update(f"{_family(definition)}: {reason}" for reason in lost)
        if concerned:
            definition.own_markers[place] = pytest.mark.parametrize(names, found).mark
    if _matches(definition, FAMILIES[_family(definition)].bodies):
        metafunc.fixturenames.append("graftune_method")
        metafunc.parametrize("graftune_method", METHODS, ids=[m.name for m in METHODS])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of our methods, without those that are deselected by name."""
    stale = _stale(items)
    collected: Counter[str] = Counter()
    deselected: dict[str, list[str]] = {}
    kept, others = [], []
    for item in items:
        family = _family(item)
        if _method(item) is None or _is_crossed(item):
            others.append(item)
            continue
        reasons = FAMILIES[family].deselected
        reason = next((why for why, names in reasons.items() if _matches(item, names)), None)
        if QUICK and not _matches(item, FAMILIES[family].quick):
            others.append(item)
            continue
        collected[family] += 1
        if reason is None:
            kept.append(item)
        else:
            others.append(item)
            deselected.setdefault(family, []).append(f"{_name(item)}: {reason}")
    items[:] = kept
    config.hook.pytest_deselected(items=others)
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        report = {"collected": collected, "deselected": deselected, "lost": sorted(_lost)}
        report["stale"] = stale
        COLLECTED.write_text(json.dumps(report))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let our config class stand for a built-in one where the test names that one."""
    method = _method(item)
    assert method is not None
    from tests import testing_common

    theirs = {t.config_cls.__name__: stand_in(t, method) for t in method.templates}
    theirs |= dict.fromkeys(("LoraLayer", "LoKrLayer"), method.layer_cls)
    names = {(testing_common, "LoKrConfig")}
    family = FAMILIES[_family(item)]
    if _matches(item, family.bodies):
        names |= {(item.module, name) for name in family.names if name in theirs}
    elif method.mixed_batches and "mixed_adapter_batches" in item.name:
        names |= {(item.module, "LoraConfig"), (testing_common, "LoraConfig")}
    for pattern, name in method.treated_as.items():
        if _matches(item, (pattern,)):
            theirs[name] = method.config_cls
            names.add((item.module, name))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in names:
            if hasattr(module, name):
                patch.setattr(module, name, theirs[name])
        return (yield)


def _stale(items: list[pytest.Item]) -> list[str]:
    """Return the patterns of `rows.py` that no test answers to any more."""
    nodes: dict[str, list[pytest.Item]] = {}
    for item in items:
        nodes.setdefault(_family(item), []).append(item)
    stale = []
    for family, found in nodes.items():
        settings = FAMILIES[family]
        named = (*settings.bodies, *settings.quick, *sum(settings.deselected.values(), ()))
        stale += [
            f"{family}: {pattern}"
            for pattern in named
            if not any(_matches(item, (pattern,)) for item in found)
        ]
    return stale


def _family(node: pytest.Item) -> str:
    return node.path.stem


def _name(node: pytest.Item) -> str:
    return node.nodeid.partition("::")[2]


def _method(item: pytest.Item) -> Method | None:
    callspec = getattr(item, "callspec", None)
    return method_of(callspec.params.values(), METHODS) if callspec else None


def _is_crossed(item: pytest.Item) -> bool:
    """Say whether a test stands in for one method and is given the config of another."""
    callspec: Any = getattr(item, "callspec", None)
    stand_for = callspec.params.get("graftune_method")
    others = [value for name, value in callspec.params.items() if name != "graftune_method"]
    given = method_of(others, METHODS)
    return stand_for is not None and given is not None and given is not stand_for


def _matches(node: pytest.Item, patterns: tuple[str, ...]) -> bool:
    name = _name(node)
    return any(
        fnmatch.fnmatchcase(text, pattern)
        for pattern in patterns
        for text in (name, name.partition("[")[0])
    )
