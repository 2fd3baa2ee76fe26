"""llama.cpp on the CPU: its library as the llama-cpp-python package binds it, and its server as xllamacpp has it."""

from __future__ import annotations

import ctypes
import json
import os
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Engine:
    """A GGUF file, and maybe an adapter on it, in llama.cpp.

    Args:
        exact: attention and its cache in fp32; else as llama.cpp does it by default (a cache in fp16).
        weights: False: only the vocabulary.
    """

    def __init__(
        self, file: Path, *, adapter: Path | None = None, exact: bool = True, weights: bool = True, context: int = 512
    ) -> None:
        import llama_cpp as lib

        self._lib, self._context = lib, None
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        options = lib.llama_model_default_params()
        options.n_gpu_layers, options.vocab_only = 0, not weights
        self._model = lib.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {file.name}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.size = lib.llama_vocab_n_tokens(self._vocab)
        if not weights:
            return
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", "1"))
        if exact:
            settings.type_k = settings.type_v = lib.GGML_TYPE_F32
            settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = lib.llama_init_from_model(self._model, settings)
        if adapter is not None:
            loaded = lib.llama_adapter_lora_init(self._model, str(adapter).encode())
            if not loaded:
                raise RuntimeError(f"llama.cpp does not load {adapter.name}")
            pointers, scales = (lib.llama_adapter_lora_p_ctypes * 1)(loaded), (ctypes.c_float * 1)(1.0)
            if lib.llama_set_adapters_lora(self._context, pointers, 1, scales) != 0:
                raise RuntimeError(f"llama.cpp does not take {adapter.name}")

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
        self._lib.llama_log_set(ctypes.cast(None, self._lib.llama_log_callback), ctypes.c_void_p(0))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        given = text.encode()
        found = (self._lib.llama_token * (2 * len(given) + 8))()
        count = self._lib.llama_tokenize(self._vocab, given, len(given), found, len(found), add_special, parse_special)
        assert count >= 0, "there was room enough"
        return list(found[:count])

    def text(self, ids: Sequence[int], *, special: bool = True) -> bytes:
        pieces = b""
        for token in ids:
            room = ctypes.create_string_buffer(1024)
            count = self._lib.llama_token_to_piece(self._vocab, token, room, len(room), 0, special)
            pieces += room.raw[:count]
        return pieces

    def logits(self, ids: Sequence[int]) -> Any:
        """(T, V) of a sequence that begins anew."""
        import numpy as np
        import torch

        self._forget()
        self._decode(ids, at=0, all_logits=True)
        pointer = self._lib.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(len(ids), self.size)).copy())

    def answer(self, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest token each time, until one ends the answer."""
        self._forget()
        self._decode(ids, at=0)
        found: list[int] = []
        while len(found) < count:
            pointer = self._lib.llama_get_logits_ith(self._context, -1)
            token = max(range(self.size), key=pointer.__getitem__)
            found.append(token)
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                break
            self._decode([token], at=len(ids) + len(found) - 1)
        return found

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], *, at: int, all_logits: bool = False) -> None:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, at + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = all_logits or index == len(ids) - 1
        failed = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        assert failed == 0, f"llama_decode: {failed}"


@contextmanager
def serving(file: Path) -> Iterator[Callable[..., Any]]:
    """llama.cpp's server with this file; gives a function that asks it something, `(path, **body) -> object`."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.port, options.n_ctx, options.n_parallel, options.n_gpu_layers, options.warmup = 0, 512, 1, 0, False
    options.use_jinja, options.verbosity = True, -1
    options.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    server = xllamacpp.Server(options)
    address = server.listening_address

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    yield ask
