"""Codecs: how an update becomes a message and back, and what the message costs."""

from fedkd_jax.codecs.base import (
    chain,
    encode,
    error_feedback,
    identity_codec,
    init_codec,
    payload_bytes,
    payload_floats,
)
from fedkd_jax.codecs.low_rank import compressible_by_rank, max_factored_rank, svd_codec, view_by_shape
from fedkd_jax.codecs.power import power_codec
from fedkd_jax.codecs.quantised import quantise
from fedkd_jax.codecs.sparse import server_sketch_codec, sketch, sketch_codec, top_k, unsketch
from fedkd_jax.codecs.spectrum import cumulative_energy, spectrum_codec

__all__ = [
    "chain",
    "compressible_by_rank",
    "cumulative_energy",
    "encode",
    "error_feedback",
    "identity_codec",
    "init_codec",
    "max_factored_rank",
    "payload_bytes",
    "payload_floats",
    "power_codec",
    "quantise",
    "server_sketch_codec",
    "sketch",
    "sketch_codec",
    "spectrum_codec",
    "svd_codec",
    "top_k",
    "unsketch",
    "view_by_shape",
]
