"""Damage to files: of their bytes, and of the values in JSON and YAML."""

import copy
import json
import math
from typing import Any

import numpy as np

# lengths, offsets and sizes that a reader may believe
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1]

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e9, -1e9, 1e308, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**40),
    *(math.nan, math.inf, -math.inf, "", "0", "1.0", "-", "=1+1", "nan", "..", "../x", "/etc/passwd", "\x00", "\n", "\ud800", "é" * 50),
    *("a" * 5000, "{}", "${x}", "pipe:true", "http://a/b", [], {}, [[]], [{}], {"": ""}, [0], ["a"], [1, [2]], {"a": {"b": [1]}}),
    *([0.5] * 7, [1e300] * 8, [None] * 6, list(range(500))),
]


def damage_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, insert, repeat, move or overwrite some bytes, half of the time near the beginning."""
    changed = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 1, 1, 2, 3, 20]))):
        if not changed:
            break
        end = min(len(changed), 96) if rng.random() < 0.5 else len(changed)
        place, count = int(rng.integers(end)), int(rng.choice([1, 2, 4, 16, 200]))
        way = rng.integers(9)
        if way == 0:
            changed[place] ^= 1 << rng.integers(8)
        elif way == 1:
            changed[place] = int(rng.choice([0, 1, 127, 128, 255]))
        elif way == 2:
            changed[place : place + count] = rng.bytes(count)
        elif way == 3:
            del changed[place:]
        elif way == 4:
            del changed[place : place + count]
        elif way == 5:
            changed[place:place] = rng.bytes(count)
        elif way == 6:
            changed[place:place] = changed[place : place + count]
        elif way == 7:
            other = int(rng.integers(len(changed)))
            changed[place : place + count] = changed[other : other + count]
        else:
            size = int(rng.choice([2, 4]))
            number = int(rng.choice([n for n in NUMBERS if n < 256**size]))
            changed[place : place + size] = number.to_bytes(size, "big" if rng.random() < 0.5 else "little")
    return bytes(changed)


def list_places(value: Any) -> list[tuple[Any, Any]]:
    """List (container, key) of every value below a value of JSON."""
    found, left = [], [value]
    while left:
        node = left.pop()
        places = [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
        found += places
        left += [child[key] for child, key in places if isinstance(child[key], dict | list)]
    return found


def damage_values(value: Any, rng: np.random.Generator) -> Any:
    """Return a copy of a value of JSON in which some values are replaced, missing, renamed, nested or repeated."""
    changed = copy.deepcopy(value)
    for _ in range(int(rng.choice([1, 1, 2, 4, 12]))):
        places = list_places(changed)
        if not places:
            break
        node, key = places[rng.integers(len(places))]
        way = rng.random()
        if way < 0.5:
            node[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        elif way < 0.6:
            del node[key]
        elif way < 0.65 and isinstance(node, dict):
            node[str(rng.choice(["", "id ", key.upper() if isinstance(key, str) else "a", "__class__", "_target_"]))] = node.pop(key)
        elif way < 0.75:
            other, name = places[rng.integers(len(places))]
            node[key] = copy.deepcopy(other[name])
        elif way < 0.85:
            for _ in range(int(rng.choice([1, 2, 30]))):
                node[key] = [node[key]] if rng.random() < 0.5 else {"a": node[key]}
        elif isinstance(node, list):
            node.insert(int(rng.integers(len(node) + 1)), copy.deepcopy(node[key]))
        elif isinstance(node[key], int | float) and not isinstance(node[key], bool) and math.isfinite(node[key]):
            node[key] = [str(node[key]), -node[key], node[key] * 10**6, node[key] + 0.5, float(node[key])][rng.integers(5)]
    return changed


def damage_json(value: Any, rng: np.random.Generator) -> bytes:
    """Write a value as damaged JSON: damaged in its values, and sometimes in a repeated key or in its text."""
    text = json.dumps(damage_values(value, rng), ensure_ascii=bool(rng.random() < 0.9), indent=int(rng.integers(3)) or None)
    if rng.random() < 0.1 and (starts := [i for i, character in enumerate(text) if character == "{"]):
        start = starts[rng.integers(len(starts))] + 1
        key = str(rng.choice(["id", "images", "annotations", "metrics", "seed", "bbox"]))
        text = f'{text[:start]}"{key}": {json.dumps(VALUES[rng.integers(len(VALUES))])}, {text[start:]}'
        text = text.replace(", }", "}")
    data = text.encode(errors="surrogatepass")
    return damage_bytes(data, rng) if rng.random() < 0.15 else data
