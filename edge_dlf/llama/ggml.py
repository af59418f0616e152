"""Functions of ggml that llama-cpp-python does not declare, called by name."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from typing import Any

from llama_cpp._ggml import libggml


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def call(name: str, result: Any, *arguments: Any) -> Any:
    """Call the function `name`, which returns `result`, a type of ctypes. An int is passed as C's int, None as NULL."""
    function = ctypes.CFUNCTYPE(result, *(_kind(argument) for argument in arguments))((name, libggml))
    return function(*arguments)


def handle(name: str, *arguments: Any) -> ctypes.c_void_p:
    """Call a function that returns a pointer."""
    return ctypes.c_void_p(call(name, ctypes.c_void_p, *arguments))


def owned(stack: ExitStack, free: str, made: ctypes.c_void_p) -> ctypes.c_void_p:
    """Let `stack` free the handle `made` by the function `free`; returns the handle."""
    stack.callback(call, free, None, made)
    return made


def _kind(argument: Any) -> Any:
    if isinstance(argument, bytes):
        return ctypes.c_char_p
    return {int: ctypes.c_int, type(None): ctypes.c_void_p}.get(type(argument), type(argument))
