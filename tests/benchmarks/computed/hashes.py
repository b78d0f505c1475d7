"""Hashes of results: numbers as bytes, sentences apart from them."""

import hashlib
import re
from typing import Any

import numpy as np
import pandas as pd
import torch

import basin_lens as bl

UNSTABLE = re.compile("^(run|run_[ab]|time|memory|.*seconds|.*peak_bytes|.*_per_second)$")  # columns
DIGITS = re.compile(r"\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def of_array(values: Any) -> str:
    array = np.array(values.detach().cpu().contiguous() if isinstance(values, torch.Tensor) else values)
    if array.dtype.kind in "biu":
        array = array.astype(np.int64)
    if array.dtype.kind == "f":
        array[np.isnan(array)] = np.nan
    assert array.dtype.kind in "if", array.dtype
    return sha(np.ascontiguousarray(array).tobytes())


def of_arrays(arrays: Any) -> str:
    """Of several arrays, whatever their order."""
    return sha("".join(sorted(map(of_array, arrays))).encode())


def of_text(*lines: Any) -> str:
    return sha("\n".join(map(str, lines)).encode())


def of_figures(*lines: str) -> str:
    return of_text(*(figure for line in lines for figure in DIGITS.findall(line)))


def as_numbers(column: pd.Series) -> np.ndarray | None:
    """A column as numbers, or None if it holds anything else. Missing numbers are NaN."""
    if column.dtype.kind in "biuf" and not pd.api.types.is_extension_array_dtype(column.dtype):
        return column.to_numpy()
    kinds = {type(value) for value in column if not pd.api.types.is_scalar(value) or not pd.isna(value)}
    if kinds and all(issubclass(kind, int | float | np.number | np.bool_) for kind in kinds):
        return np.array([np.nan if pd.isna(value) else float(value) for value in column])
    return None


def of_table(table: pd.DataFrame) -> dict[str, str]:
    numbers, words = [], []
    for name in table.columns:
        if UNSTABLE.match(str(name)):
            continue
        values = as_numbers(table[name])
        if values is None:
            words.append(of_text(name, *table[name]))
        else:
            numbers.append(values)
            words.append(of_text(name, of_array(values)))
    return {"": of_arrays(numbers), ".words": of_text(*sorted(words))}


def of_study(study: Any) -> dict[str, str]:
    found = {}
    tables = {**study.tables, "findings": study.findings, "flags": study.flags, "tokens": study.tokens}
    for name, table in tables.items():
        if table is not None:
            found |= {f"/{name}{ending}": digest for ending, digest in of_table(table).items()}
    said = {"verdict": study.verdict, "about": study.about, "not tested": study.not_tested}
    said |= {"declared": (study.title, study.hypothesis, study.decision)}
    for name, lines in said.items():
        found |= {f"/{name}.figures": of_figures(*lines), f"/{name}.words": of_text(*lines)}
    return found | {"/figures": of_text(*sorted(study.figures)), "/decision": of_text(study.decision)}


def floats(value: Any) -> list[float]:
    if isinstance(value, dict | list | tuple):
        return [found for part in (value.values() if isinstance(value, dict) else value) for found in floats(part)]
    return [value] if isinstance(value, float) else []


def digests(value: Any) -> dict[str, str]:
    """By ending of the name."""
    if isinstance(value, pd.DataFrame):
        return of_table(value)
    if isinstance(value, bl.studies.Study):
        return of_study(value)
    if isinstance(value, dict):
        return {f"/{name}{ending}": found for name, part in value.items() for ending, found in digests(part).items()}
    if isinstance(value, bytes):
        return {"": sha(value)}
    if isinstance(value, str) or (isinstance(value, list | tuple) and value and isinstance(value[0], str)):
        return {"": of_text(*([value] if isinstance(value, str) else value))}
    if isinstance(value, torch.nn.Module):
        return {"": of_arrays(value.state_dict().values())}
    return {"": of_array(value)}
