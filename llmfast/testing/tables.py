"""The tables of cases: `TEST_CASES` for tests, `BENCHMARK_CASES` and `CPU_BENCHMARK_CASES` for benchmarks."""

from .cases import (
    ROW_INPUTS,
    ActivationLinearCase,
    AttentionCase,
    Case,
    CrossEntropyCase,
    DecodeAttentionCase,
    EmbeddingCase,
    Fp8LinearCase,
    Fp8LinearCrossEntropyCase,
    Fp8MLPCase,
    LinearCase,
    LinearCrossEntropyCase,
    MLPCase,
    RopeCase,
    RowCase,
    VarlenAttentionCase,
)


def _rows(op: str, *shapes: tuple[int, int]) -> list[Case]:
    return [RowCase(op, *shape) for shape in shapes]


# Ragged, prime, one below and above a power of two, length one, empty; the last column counts take the long-row path.
_ROW_SHAPES = [
    (1, 1),
    (3, 1),
    (4, 7),
    (33, 64),
    (5, 127),
    (2, 1023),
    (3, 1025),
    (17, 768),
    (0, 16),
    (2, 9001),
    (2, 33000),
]

# (B, Tq, Tk, H, Hkv, D): lengths around the tile sizes, one query, one key, no query, no key, more queries than keys
# (causal rows that see nothing), grouped and single key heads, head dimensions that are no power of two.
_ATTENTION_SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 3, 3, 2, 2, 64),
    (1, 64, 1, 1, 1, 64),
    (1, 1, 70, 4, 2, 64),
    (1, 64, 32, 2, 1, 32),
    (2, 65, 127, 2, 2, 64),
    (1, 113, 203, 4, 1, 64),
    (1, 128, 128, 2, 2, 128),
    (1, 129, 65, 6, 3, 40),
    (1, 90, 90, 3, 1, 96),
    (1, 33, 50, 2, 2, 256),
    (2, 40, 17, 2, 2, 8),
    (0, 8, 8, 2, 2, 64),
    (1, 0, 8, 2, 2, 64),
    (2, 5, 0, 2, 1, 64),
]

# (Tq, Tk) of FlashAttention's own tests (https://github.com/Dao-AILab/flash-attention/blob/main/tests/test_flash_attn.py),
# for a GPU: parts of a tile, one, many, with and without a rest.
FLASH_ATTENTION_LENGTHS = [
    (1, 1), (3, 3), (64, 1), (64, 32), (64, 128), (239, 1), (799, 3), (113, 203), (113, 128), (128, 217), (113, 211),
    (108, 256), (255, 256), (256, 512), (384, 256), (640, 128), (1023, 1024), (1024, 1023), (2048, 2048), (4224, 4224),
]  # fmt: skip

# (B, Tq, capacity, H, Hkv, D, page size): capacities around the tile sizes, more queries than keys, grouped and single
# key heads, more rows than a tile, pages smaller and larger than a tile and of no power of two, nothing at all.
_DECODE_SHAPES = [
    (1, 1, 1, 1, 1, 16, 0),
    (4, 1, 300, 8, 1, 64, 0),
    (3, 1, 129, 4, 4, 128, 0),
    (3, 4, 200, 6, 3, 96, 0),
    (4, 16, 190, 8, 1, 32, 0),
    (3, 5, 3, 2, 2, 40, 0),
    (2, 2, 70, 2, 1, 256, 0),
    (4, 1, 304, 8, 2, 64, 16),
    (3, 3, 256, 4, 4, 128, 256),
    (5, 2, 70, 4, 2, 24, 7),
    (0, 1, 8, 2, 2, 64, 0),
    (2, 0, 8, 2, 2, 64, 0),
    (2, 1, 0, 2, 1, 64, 0),
]

_ROPE_SHAPES = [(1, 1, 1, 2), (2, 7, 3, 6), (1, 33, 2, 64), (3, 5, 1, 128), (0, 4, 2, 8), (2, 0, 2, 8)]

_CROSS_ENTROPY_OPTIONS = [
    CrossEntropyCase(9, 300, label_smoothing=0.1),
    CrossEntropyCase(9, 300, z_loss=0.01),
    CrossEntropyCase(9, 300, reduction="sum"),
    CrossEntropyCase(9, 300, reduction="none"),
    CrossEntropyCase(9, 320, padding=47),
    CrossEntropyCase(9, 300, in_place=True),
    CrossEntropyCase(7, 9001, 0.2, 0.001, "none", 100, True),
    CrossEntropyCase(0, 16, reduction="none"),
    CrossEntropyCase(0, 16, 0.1, 0.1, "sum"),
]

# Windows shorter and longer than a tile, one that ends a tile, one that is everything; keys before any query; caps that
# hardly bend and that flatten.
_ATTENTION_OPTIONS = [
    *(AttentionCase(1, 200, 200, 2, 1, 16, True, window=w) for w in (1, 7, 64, 100, 200, 999)),
    AttentionCase(2, 70, 190, 4, 2, 64, True, window=33),
    AttentionCase(1, 190, 70, 2, 2, 64, True, window=33),
    AttentionCase(1, 5, 300, 2, 1, 40, True, window=3),
    AttentionCase(1, 130, 130, 2, 1, 128, True, window=65, softcap=5.0),
    *(AttentionCase(1, 70, 90, 4, 2, 64, causal, softcap=c) for causal in (False, True) for c in (0.5, 50.0)),
    AttentionCase(1, 70, 140, 2, 1, 128, True, window=30),
]

# Sequences shorter and longer than a tile, without queries, without keys, without either, and none at all.
_VARLEN_LENGTHS = (
    ((70, 70),),
    ((5, 5), (0, 4), (130, 130), (3, 0), (0, 0), (1, 70)),
    tuple((n % 7, n % 5) for n in range(20)),
    ((33, 90), (90, 33)),
    (),
)

# What sm_90's own kernels do beside whole and causal attention, for a GPU: of their tiles (64 or 128 keys; 64, 128 or
# 192 queries) one and several, with and without a rest; windows, and sequences, that are shorter, as long, and longer.
_TILES = ((200, 200), (0, 7), (130, 0), (0, 0), (128, 128), (70, 257), (129, 5), (700, 1000))
HOPPER_ATTENTION_CASES: list[Case] = [
    *(
        AttentionCase(2, *lengths, 4, 2, d, True, window=w)
        for d in (64, 128, 256)
        for lengths in ((130, 257), (257, 257), (300, 140), (5, 700), (2100, 2300))
        for w in (1, 40, 128, 130, 500)
    ),
    *(
        AttentionCase(2, 300, 450, 4, 2, d, causal, window=w, softcap=c)
        for d in (64, 128, 256)
        for causal, w in ((False, None), (True, None), (True, 100))
        for c in (0.5, 50.0)
    ),
    *(
        VarlenAttentionCase(lengths, 4, 2, d, causal, w, c)
        for d in (64, 128, 256)
        for lengths in (_TILES, ((1500, 1500), (900, 900)), tuple((n % 7, n % 5) for n in range(300)))
        for causal, w, c in (
            (False, None, 0.0),
            (True, None, 0.0),
            (True, 128, 0.0),
            (True, 300, 20.0),
            (False, None, 5.0),
        )
    ),
    AttentionCase(1, 300, 300, 3, 1, 40, True, window=70),
    VarlenAttentionCase(_TILES, 3, 1, 80, True, 70, 5.0),
    AttentionCase(1, 300, 300, 3, 1, 136, True, window=70),
    AttentionCase(1, 300, 450, 4, 2, 192, False, softcap=5.0),
    VarlenAttentionCase(_TILES, 3, 1, 160, True, 70, 5.0),
]

TEST_CASES: dict[str, list[Case]] = {
    # A row of one element has a norm whose gradient is a true zero: beside the sum's gradient its rounding would show.
    **{op: _rows(op, *(s for s in _ROW_SHAPES if s[1] > 1 or not op.startswith("add_"))) for op in ROW_INPUTS},
    "cross_entropy": [*(CrossEntropyCase(*shape) for shape in _ROW_SHAPES), *_CROSS_ENTROPY_OPTIONS],
    "linear": [
        *(LinearCase(1, *shape) for shape in ((1, 1), (300, 71), (5001, 33), (2048, 9), (70000, 2))),
        LinearCase(1, 2048, 40, bias=False),
        LinearCase(33, 70, 300),
        LinearCase(1000, 16, 33),
        LinearCase(9, 20, 5, bias=False),
        LinearCase(0, 16, 8),
    ],
    "fp8_linear": [
        Fp8LinearCase(1, 16, 16),
        Fp8LinearCase(33, 80, 304),
        Fp8LinearCase(300, 128, 48, bias=False),
        Fp8LinearCase(160, 272, 400),
        Fp8LinearCase(0, 16, 32),
    ],
    "fp8_mlp": [
        Fp8MLPCase(1, 16, 16),
        Fp8MLPCase(33, 80, 304, "gelu"),
        Fp8MLPCase(300, 48, 128, bias=False),
        Fp8MLPCase(130, 80, 272, "silu", gated=True, bias=False),
        Fp8MLPCase(40, 48, 80, "gelu_tanh", gated=True),
        Fp8MLPCase(0, 16, 32),
    ],
    "mlp": [
        MLPCase(1, 1, 1),
        MLPCase(33, 70, 16, "gelu"),
        MLPCase(9, 33, 300, bias=False),
        MLPCase(130, 40, 70, "silu", gated=True, bias=False),
        MLPCase(33, 30, 66, "gelu_tanh", gated=True),
        MLPCase(33, 30, 66, "silu"),
        MLPCase(0, 16, 8),
    ],
    "activation_linear": [
        ActivationLinearCase(1, 1, 1),
        ActivationLinearCase(33, 70, 16, bias=True),
        ActivationLinearCase(9, 1030, 33),
        ActivationLinearCase(33, 70, 16, activation="gelu"),
        ActivationLinearCase(33, 70, 16, True, "gelu_tanh"),
        ActivationLinearCase(33, 70, 16, True, "gelu", gated=False),
        ActivationLinearCase(130, 1030, 16, True, "gelu_tanh", gated=False),
        ActivationLinearCase(33, 70, 16, activation="silu", gated=False),
        ActivationLinearCase(0, 16, 8, bias=True),
    ],
    "rope": [
        RopeCase(*shape, interleaved, by_row)
        for shape in _ROPE_SHAPES
        for interleaved in (False, True)
        for by_row in (False, True)
    ],
    "linear_cross_entropy": [
        LinearCrossEntropyCase(1, 1, 1),
        LinearCrossEntropyCase(70, 16, 33, bias=True),
        LinearCrossEntropyCase(70, 16, 33, bias=True, reduction="sum"),
        LinearCrossEntropyCase(9, 48, 300),
        LinearCrossEntropyCase(0, 4, 8, bias=True),
    ],
    "fp8_linear_cross_entropy": [
        Fp8LinearCrossEntropyCase(1, 16, 1),
        Fp8LinearCrossEntropyCase(70, 16, 33),
        Fp8LinearCrossEntropyCase(300, 48, 304, reduction="sum"),
        Fp8LinearCrossEntropyCase(0, 16, 8),
    ],
    "embedding": [
        EmbeddingCase(*s) for s in ((1, 1, 1), (7, 3, 5), (300, 40, 300), (0, 5, 8), (100, 1000, 64), (700, 3, 40))
    ],
    "attention": [
        *(AttentionCase(*shape, causal) for shape in _ATTENTION_SHAPES for causal in (False, True)),
        *_ATTENTION_OPTIONS,
    ],
    "attention_varlen": [
        *(VarlenAttentionCase(n, 4, 2, 16, causal) for n in _VARLEN_LENGTHS for causal in (False, True)),
        *(
            VarlenAttentionCase(n, 2, 1, 64, True, w, c)
            for n in _VARLEN_LENGTHS[1:4]
            for w, c in ((9, 0.0), (None, 2.0))
        ),
        VarlenAttentionCase(((33, 40), (0, 3), (20, 0), (70, 70)), 2, 1, 128, True, 30),
    ],
    "decode_attention": [
        *(DecodeAttentionCase(*shape, ragged=ragged) for shape in _DECODE_SHAPES for ragged in (False, True)),
        DecodeAttentionCase(3, 2, 300, 8, 2, 64, counted=False),
        *(
            DecodeAttentionCase(4, 3, 300, 8, 2, 64, ragged=ragged, window=w)
            for ragged in (False, True)
            for w in (1, 7, 128, 299)
        ),
        DecodeAttentionCase(4, 1, 304, 4, 4, 128, 16, True, window=33),
        DecodeAttentionCase(3, 2, 300, 8, 1, 96, counted=False, window=100, softcap=5.0),
        *(DecodeAttentionCase(3, 2, 300, 8, 2, 256, ragged=True, softcap=c) for c in (0.5, 50.0)),
    ],
}


def _attention_benchmark() -> list[Case]:
    """16k tokens a batch and hidden size 2048, as FlashAttention's papers measure."""
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    return [
        AttentionCase(16384 // t, t, t, 2048 // d, 2048 // d, d, causal)
        for d in (64, 128)
        for causal in (False, True)
        for t in lengths
    ]


_NORM_SHAPES = ((32768, 768), (32768, 2048), (32768, 4096), (32768, 8192), (8192, 32768))
_VERY_LONG_ROWS = ((4096, 65536), (2048, 131072))

BENCHMARK_CASES: dict[str, list[Case]] = {
    "softmax": _rows(
        "softmax", (32768, 1024), (32768, 4096), (16384, 8192), (8192, 32768), (8192, 50304), *_VERY_LONG_ROWS
    ),
    "layer_norm": _rows("layer_norm", *_NORM_SHAPES, *_VERY_LONG_ROWS),
    "rms_norm": _rows("rms_norm", *_NORM_SHAPES, *_VERY_LONG_ROWS),
    "gelu": _rows("gelu", (32768, 3072)),
    "bias_gelu": _rows("bias_gelu", (32768, 3072), (16384, 8192)),
    "add_layer_norm": _rows("add_layer_norm", *_NORM_SHAPES),
    "add_rms_norm": _rows("add_rms_norm", *_NORM_SHAPES),
    "swiglu": _rows("swiglu", (32768, 3072), (16384, 8192)),
    "geglu": _rows("geglu", (32768, 3072), (16384, 8192)),
    "cross_entropy": [CrossEntropyCase(32768, 4096), CrossEntropyCase(16384, 50304), CrossEntropyCase(4096, 131072)],
    "linear": [
        LinearCase(65536, 768, 2304),
        LinearCase(65536, 768, 768),
        *(LinearCase(1, *shape, bias=False) for shape in ((2048, 2048), (2048, 16384), (8192, 2048), (2048, 128256))),
    ],
    "fp8_linear": [Fp8LinearCase(65536, 768, 2304), Fp8LinearCase(16384, 4096, 4096)],
    "fp8_mlp": [Fp8MLPCase(65536, 768, 3072), Fp8MLPCase(16384, 2048, 8192, "silu", gated=True, bias=False)],
    "mlp": [
        *(MLPCase(65536, 768, 3072, activation) for activation in ("gelu_tanh", "gelu")),
        MLPCase(16384, 1024, 4096),
        MLPCase(16384, 2048, 8192, "silu", gated=True, bias=False),
    ],
    "activation_linear": [
        ActivationLinearCase(65536, 3072, 768, True, "gelu_tanh", gated=False),
        ActivationLinearCase(8192, 8192, 2048),
        ActivationLinearCase(16384, 14336, 4096),
    ],
    "rope": [RopeCase(16, 1024, 12, 64), RopeCase(4, 4096, 16, 128)],
    "linear_cross_entropy": [LinearCrossEntropyCase(32768, 768, 50304), LinearCrossEntropyCase(8192, 4096, 128256)],
    "fp8_linear_cross_entropy": [Fp8LinearCrossEntropyCase(32768, 768, 50304)],
    "embedding": [EmbeddingCase(65536, 50304, 768), EmbeddingCase(16384, 128256, 4096), EmbeddingCase(65536, 256, 768)],
    "attention": _attention_benchmark(),
    "attention_varlen": [
        VarlenAttentionCase(((n, n),) * (16384 // n), 2048 // d, 2048 // d, d, True)
        for d in (64, 128)
        for n in (512, 4096)
    ],
    "decode_attention": [
        *(DecodeAttentionCase(batch, 1, 16384, 64, 8, 128) for batch in (1, 4, 16, 64)),
        *(DecodeAttentionCase(16, tokens, 16384, 64, 8, 128) for tokens in (4, 8)),
        DecodeAttentionCase(4, 1, 16384, 32, 32, 128),
        *(DecodeAttentionCase(16, 1, 16384, 64, 8, 128, page) for page in (16, 256)),
        DecodeAttentionCase(16, 1, 16384, 64, 8, 128, ragged=True),
    ],
}

# One small call of each op, which takes longer to launch than to run.
SMALL_CASES: dict[str, Case] = {
    **{op: RowCase(op, 64, 768) for op in ROW_INPUTS},
    "cross_entropy": CrossEntropyCase(64, 768),
    "linear": LinearCase(64, 768, 768),
    "fp8_linear": Fp8LinearCase(64, 768, 768),
    "fp8_mlp": Fp8MLPCase(64, 256, 768),
    "mlp": MLPCase(64, 256, 768),
    "activation_linear": ActivationLinearCase(64, 768, 256),
    "rope": RopeCase(1, 64, 12, 64),
    "linear_cross_entropy": LinearCrossEntropyCase(64, 64, 768),
    "fp8_linear_cross_entropy": Fp8LinearCrossEntropyCase(64, 64, 768),
    "embedding": EmbeddingCase(64, 768, 64),
    "attention": AttentionCase(1, 64, 64, 12, 12, 64, True),
    "attention_varlen": VarlenAttentionCase(((40, 40), (24, 24)), 12, 12, 64, True),
    "decode_attention": DecodeAttentionCase(1, 1, 1024, 12, 12, 64),
}

# What a machine without a GPU runs instead.
_CPU_SHAPES = ((4096, 768), (1024, 4096))
CPU_BENCHMARK_CASES: dict[str, list[Case]] = {
    "softmax": _rows("softmax", (1024, 768), (256, 50304)),
    **{op: _rows(op, *_CPU_SHAPES) for op in ROW_INPUTS if op != "softmax"},
    "cross_entropy": [CrossEntropyCase(4096, 768), CrossEntropyCase(1024, 4096), CrossEntropyCase(256, 50304)],
    "linear": [LinearCase(1024, 192, 768)],
    "fp8_linear": [Fp8LinearCase(1024, 192, 768)],
    "fp8_mlp": [Fp8MLPCase(1024, 192, 768)],
    "mlp": [MLPCase(1024, 192, 768)],
    "activation_linear": [ActivationLinearCase(1024, 768, 256)],
    "rope": [RopeCase(4, 512, 12, 64)],
    "linear_cross_entropy": [LinearCrossEntropyCase(1024, 192, 8192)],
    "fp8_linear_cross_entropy": [Fp8LinearCrossEntropyCase(1024, 192, 8192)],
    "embedding": [EmbeddingCase(4096, 8192, 768)],
    "attention": [
        *(AttentionCase(1, 1024, 1024, 12, 12, 64, c) for c in (False, True)),
        AttentionCase(8, 128, 128, 3, 3, 64, True),
    ],
    "decode_attention": [DecodeAttentionCase(1, 1, 4096, 16, 2, 128), DecodeAttentionCase(4, 1, 1024, 12, 12, 64)],
}
