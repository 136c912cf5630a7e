"""llama.cpp as both sides use it: a model file, and a context that holds several sequences."""

from shared.llama.context import DecodeAborted, Extension, LlamaContext
from shared.llama.model import LlamaModel

__all__ = ["DecodeAborted", "Extension", "LlamaContext", "LlamaModel"]
