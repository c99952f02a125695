"""What llama.cpp makes of an image before its language model reads it: libmtmd of the package xllamacpp, by ctypes."""

import ctypes
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int, c_size_t, c_uint32, c_void_p
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

IMAGE_CHUNK = 1
NO_FLASH, AUTO_FLASH = 0, -1


class _Opaque(ctypes.Structure):
    """Any struct that is given by value and is longer than two registers: what is read of it is its beginning."""

    _fields_ = (("content", ctypes.c_uint8 * 512),)


class _Params(ctypes.Structure):
    """The beginning of ``mtmd_context_params``."""

    _fields_ = (
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attn_type", c_int),
        ("rest", ctypes.c_uint8 * 512),
    )


class _Text(ctypes.Structure):
    _fields_ = (("text", c_char_p), ("add_special", c_bool), ("parse_special", c_bool))


def _library() -> ctypes.CDLL:
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    for name, kind in {
        "llama_model_default_params": _Opaque,
        "llama_model_load_from_file": c_void_p,
        "mtmd_context_params_default": _Params,
        "mtmd_init_from_file": c_void_p,
        "mtmd_bitmap_init": c_void_p,
        "mtmd_input_chunks_init": c_void_p,
        "mtmd_input_chunks_get": c_void_p,
        "mtmd_input_chunks_size": c_size_t,
        "mtmd_input_chunk_get_n_tokens": c_size_t,
        "mtmd_get_output_embd": POINTER(c_float),
        "mtmd_default_marker": c_char_p,
    }.items():
        getattr(library, name).restype = kind
    return library


class Mtmd:
    """An mmproj over a base, on the CPU."""

    def __init__(self, base: Path, mmproj: Path, dim: int, flash: int = NO_FLASH):
        self.library, self.dim = _library(), dim
        default = self.library.llama_model_default_params()
        self.model = c_void_p(self.library.llama_model_load_from_file(str(base).encode(), default))
        params = self.library.mtmd_context_params_default()
        assert (params.n_threads, params.flash_attn_type) == (4, AUTO_FLASH), "other fields than here"
        params.n_threads, params.use_gpu, params.print_timings = 1, False, False
        params.flash_attn_type = flash
        self.context = c_void_p(self.library.mtmd_init_from_file(str(mmproj).encode(), self.model, params))
        assert all((self.model, self.context)), "llama.cpp did not load the files"

    def embeddings(self, image: Image.Image) -> Tensor:
        """(tokens, dim) of an RGB image."""
        pixels = image.tobytes()
        bitmap = self.library.mtmd_bitmap_init(c_uint32(image.width), c_uint32(image.height), pixels)
        chunks = c_void_p(self.library.mtmd_input_chunks_init())
        text = _Text(self.library.mtmd_default_marker(), False, True)
        found = self.library.mtmd_tokenize(
            self.context, chunks, byref(text), byref(c_void_p(bitmap)), c_size_t(1)
        )
        assert found == 0, f"mtmd_tokenize says {found}"
        for number in range(self.library.mtmd_input_chunks_size(chunks)):
            chunk = c_void_p(self.library.mtmd_input_chunks_get(chunks, c_size_t(number)))
            if self.library.mtmd_input_chunk_get_type(chunk) == IMAGE_CHUNK:
                assert self.library.mtmd_encode_chunk(self.context, chunk) == 0
                tokens = self.library.mtmd_input_chunk_get_n_tokens(chunk)
                values = self.library.mtmd_get_output_embd(self.context)[: tokens * self.dim]
                return torch.tensor(values).view(tokens, self.dim)
        raise AssertionError("no chunk is an image")
