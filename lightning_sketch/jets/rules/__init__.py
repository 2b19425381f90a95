"""Taylor rules, one file per family of operators; importing this package registers them."""

from lightning_sketch.jets.rules import (  # noqa: F401
    attention,
    constants,
    convolution,
    indexing,
    linear,
    matmul,
    normalization,
    pointwise,
    pooling,
    products,
    reductions,
    views,
    writes,
)
