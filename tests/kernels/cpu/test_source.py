"""The C++ source: headers that compile alone, and structures that agree with those in Python."""

import ctypes
import re
import shutil
import subprocess

import pytest
from carafepp.kernels.cpu.backend import DTYPES, Call, Problem, TensorView
from carafepp.kernels.cpu.build import COMPILERS, HEADERS, SOURCE
from carafepp.kernels.geometry import BORDERS, NORMALIZERS

FOUND = [compiler for compiler in ("g++", "clang++") if shutil.which(compiler)] or list(filter(shutil.which, COMPILERS))[:1]
EACH_COMPILER = pytest.mark.parametrize("each_compiler", FOUND or [pytest.param("none", marks=pytest.mark.skip(reason="no C++ compiler"))])

# standard header by the names that it declares
STANDARD = {
    "algorithm": "clamp fill fill_n max min",
    "array": "array",
    "atomic": "atomic",
    "cmath": "isinf log",
    "cstddef": "ptrdiff_t size_t",
    "cstdint": "int32_t int64_t uint16_t uint32_t uintptr_t",
    "cstdlib": "abs aligned_alloc free",
    "cstring": "memcpy",
    "initializer_list": "initializer_list",
    "limits": "numeric_limits",
    "map": "map",
    "memory": "unique_ptr",
    "new": "bad_alloc",
    "system_error": "system_error",
    "thread": "thread",
    "type_traits": "conditional_t integral_constant is_same_v",
    "utility": "index_sequence make_index_sequence pair",
    "vector": "vector",
}
DECLARED_IN = {name: header for header, names in STANDARD.items() for name in names.split()}


def check(compiler: str, source: str) -> None:
    """Fail with the compiler's errors and warnings about `source`."""
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{SOURCE.parent}", "-x", "c++", "-"]
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_headers_compile_alone_without_warnings(path, compiler):
    check(compiler, f'#include "{path.name}"\n')


@EACH_COMPILER
def test_the_kernel_compiles_without_warnings(each_compiler):
    """It includes every header."""
    check(each_compiler, f'#include "{SOURCE.name}"\n')


@pytest.mark.parametrize("path", [*HEADERS, SOURCE], ids=lambda path: path.name)
def test_includes_the_standard_headers_that_it_uses(path):
    text = path.read_text()
    used = {DECLARED_IN[name] for name in re.findall(r"std::(\w+)", text)}
    assert used == set(re.findall(r"#include <(\w+)>", text))


def test_structures_agree_with_python(compiler):
    lines = ["#include <cstddef>", '#include "call.h"', "using namespace carafepp;"]
    for structure, name in ((Problem, "Problem"), (TensorView, "Tensor"), (Call, "Call")):
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for field, _ in structure._fields_:
            lines.append(f"static_assert(offsetof({name}, {field}) == {getattr(structure, field).offset});")
    for numbers in ([str(dtype).removeprefix("torch.") for dtype in DTYPES], BORDERS, NORMALIZERS):
        lines += [f"static_assert({name.upper()} == {number});" for number, name in enumerate(numbers)]
    check(compiler, "\n".join(lines) + "\n")
