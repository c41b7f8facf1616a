"""The pre-LN transformer encoder that the image and text towers share.

`x += MHA(LN(x)); x += W2 act(W1 LN(x))` with a bias in every linear layer. Parameters are float32; matrix work runs in
`dtype`; layer norms and softmax in float32.
"""

import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.common import ACTIVATIONS, shard_batch, torch_uniform

WEIGHT_INITS = ("clip_image", "clip_text", "xavier", "bert")


@dataclass(frozen=True)
class Init:
    """Initialisers of one block's kernels and biases, by layer."""

    qkv: Any
    attn_out: Any
    fc1: Any
    fc2: Any
    mlp_bias_1: Any = nn.initializers.zeros
    mlp_bias_2: Any = nn.initializers.zeros


def block_init(scheme, width, mlp_dim, depth):
    """Initialisers of a block.

    `clip_image`: OpenAI's vision transformer, which keeps PyTorch's defaults (attention Xavier-uniform on the fused
    `[3D, D]` matrix, the rest uniform in 1/sqrt(fan_in)). `clip_text`: OpenAI's text transformer (normal, residual
    branches scaled by depth). `xavier`: big_vision (Xavier-uniform, MLP biases normal with 1e-6). `bert`: truncated normal.
    """
    if scheme == "clip_image":
        fused_xavier = nn.initializers.variance_scaling(
            0.5, "fan_avg", "uniform"
        )  # bound sqrt(6 / 4D) on a [D, D] slice
        return Init(
            fused_xavier,
            torch_uniform(width),
            torch_uniform(width),
            torch_uniform(mlp_dim),
            torch_uniform(width),
            torch_uniform(mlp_dim),
        )
    if scheme == "clip_text":
        residual = nn.initializers.normal(width**-0.5 * (2 * max(depth, 1)) ** -0.5)
        return Init(
            nn.initializers.normal(width**-0.5), residual, nn.initializers.normal((2 * width) ** -0.5), residual
        )
    if scheme == "xavier":
        xavier, small = nn.initializers.xavier_uniform(), nn.initializers.normal(1e-6)
        return Init(xavier, xavier, xavier, xavier, small, small)
    assert scheme == "bert", scheme
    return Init(*[nn.initializers.truncated_normal(0.02)] * 4)


def attend(q, k, v, mask=None, causal=False, attention="plain"):
    """Softmax attention of `q[b, t, H, d]` to `k, v[b, s, H, d]`, `[b, t, H, d]`; `mask` as of `Attention`.

    `attention` is `model.attention`. With `auto` cuDNN's fused one where backend, dtype and `d` allow it; but not with a mask other
    than the causal one, which it would take for a bias, and not for a single query.
    """
    fits = (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
    )
    if attention == "auto" and fits and mask is None and q.shape[1] > 1:
        return attend_in_pairs(q, k, v, causal, "cudnn")
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="xla")


def attend_in_pairs(q, k, v, causal, implementation):
    """Attention with one more query and key where their number is odd, which JAX does not let cuDNN train with; the result has none.

    Nothing attends to the key: by its place behind all others if `causal`, else by the keys' number.
    """
    t, s = q.shape[1], k.shape[1]
    lengths = {}
    if not causal and (t % 2 or s % 2):
        lengths = {
            "query_seq_lengths": jnp.full(len(q), t, jnp.int32),
            "key_value_seq_lengths": jnp.full(len(q), s, jnp.int32),
        }
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation, **lengths)[:, :t]


class Attention(nn.Module):
    """Multi-head attention from `x_q[b, q, D]` to `x_kv[b, k, D]`.

    The bool `mask`, broadcast to `[b, H, q, k]`, is True where attention is allowed. With `qk_norm_eps` each head's queries and
    keys go through layer norms, whose weights the heads share (Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion
    Parameters"; LaCLIP's image towers).
    """

    heads: int
    inits: Init
    dtype: Any = jnp.float32
    attention: str = "plain"
    qk_norm_eps: float | None = None

    @nn.compact
    def __call__(self, x_q, x_kv, mask=None, causal=False):
        width = x_q.shape[-1]

        def project(name, x):
            return nn.DenseGeneral(
                (self.heads, width // self.heads), dtype=self.dtype, kernel_init=self.inits.qkv, name=name
            )(x)

        q, k, v = project("query", x_q), project("key", x_kv), project("value", x_kv)
        if self.qk_norm_eps is not None:
            q, k = (
                nn.LayerNorm(epsilon=self.qk_norm_eps, dtype=self.dtype, name=f"{n}_norm")(x)
                for n, x in (("query", q), ("key", k))
            )
        x = attend(q, k, v, mask, causal, self.attention)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, kernel_init=self.inits.attn_out, name="out")(x)


class Mlp(nn.Module):
    """`W2 act(W1 x + b1) + b2`."""

    mlp_dim: int
    act: str
    inits: Init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = nn.Dense(
            self.mlp_dim, dtype=self.dtype, kernel_init=self.inits.fc1, bias_init=self.inits.mlp_bias_1, name="fc1"
        )(x)
        x = ACTIVATIONS[self.act](x)
        return nn.Dense(
            width, dtype=self.dtype, kernel_init=self.inits.fc2, bias_init=self.inits.mlp_bias_2, name="fc2"
        )(x)


class Block(nn.Module):
    """One pre-LN block, `[b, n, D] -> [b, n, D]`; with a position `only` (see `at`) the output there alone, `[b, 1, D]`."""

    heads: int
    mlp_dim: int
    act: str
    ln_eps: float
    inits: Init
    causal: bool = False
    dtype: Any = jnp.float32
    attention: str = "plain"
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x, mask=None, only=None):
        x = shard_batch(x)
        y = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln1")(x)
        queries, causal = y, self.causal
        if only is not None:
            x, queries = at(x, only), at(y, only)
            if causal:
                before = (jnp.arange(y.shape[1]) <= jnp.reshape(only, (-1, 1)))[:, None, None, :]
                mask, causal = before if mask is None else before & mask, False
        qk_norm_eps = self.ln_eps if self.qk_norm else None
        x = x + Attention(self.heads, self.inits, self.dtype, self.attention, qk_norm_eps, name="attn")(
            queries, y, mask, causal
        )
        y = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln2")(x)
        return x + Mlp(self.mlp_dim, self.act, self.inits, self.dtype, name="mlp")(y)


#: What of a block is kept for the backward pass, by the name of `model.remat`; the rest is computed again.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of the linear layers, not the attention weights
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialized(call, remat, **options):
    """A block, or a function of one, recomputed in the backward pass as `config.model.remat` says; options of `flax.linen.remat`."""
    return call if remat == "none" else nn.remat(call, policy=REMAT[remat], **options)


def apply_blocks(tower, block, x, mask=None, only=None):
    """Runs `block` `tower.depth` times inside the compact method of `tower`, as its fields `scan` and `remat` say.

    Parameters are `block_0`, `block_1`, ...; with `scan` they are stacked, `[depth, ...]` under `block`.

    Args:
      tower: the calling module.
      block: function `name -> Block`.
      x: `[b, n, D]`, or whatever pytree a block takes and gives.
      mask: as `Block` takes it, or whatever pytree every block takes.
      only: the position of which alone the output is wanted, see `only_at`: of the last block the rest is not computed.
    """

    def maybe_remat(call):
        return rematerialized(call, tower.remat, prevent_cse=not tower.scan)

    call = maybe_remat(lambda block, x, mask: block(x, mask))
    if not tower.scan:
        for i in range(tower.depth):
            if i == tower.depth - 1 and only is not None:
                call = maybe_remat(lambda block, x, mask: block(x, mask, only))
            x = call(block(f"block_{i}"), x, mask)
        return x
    layers = nn.scan(
        lambda block, x, mask: (call(block, x, mask), None), variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=nn.broadcast, length=tower.depth,
    )  # fmt: skip
    return layers(block("block"), x, mask)[0]


def at(x, position):
    """The token of `x[b, n, D]` at a position, an int for all or int32 `[b]`: `[b, 1, D]`."""
    if isinstance(position, int):
        return x[:, position : position + 1]
    return jnp.take_along_axis(x, position[:, None, None], axis=1)


def only_at(tower, position):
    """`position` if nothing but the output there is asked of a tower, so that its last block need not compute the rest; or None.

    Of 12 blocks that is 7 % of the work: the queries, the MLP and the output projection of all tokens but one.
    """
    return None if tower.tokens or tower.scan or not tower.depth else position


#: Finds the name under which `model.scan` stacks layers in a path: `block`, or some in a row, `mbconv_3_to_5`.
STACKED = r"(?:^|/)(?:block|mbconv_\d+_to_\d+)(?=/|$)"


def layers_of(stack, tree):
    """The names of the layers that a tree has under the name `stack`: `block_0`, ... or `mbconv_3`, `mbconv_4`, `mbconv_5`."""
    kind, *ends = re.fullmatch(r"([a-z]+)(?:_(\d+)_to_(\d+))?", stack).groups()
    first, last = (0, len(jax.tree.leaves(tree)[0]) - 1) if ends[0] is None else map(int, ends)
    return [f"{kind}_{i}" for i in range(first, last + 1)]


def stack_layers(tree, like):
    """Parameters, or running statistics, with those layers stacked that `like` has stacked."""
    if not isinstance(like, dict):
        return tree

    def stacked(name, x):
        if not re.fullmatch(STACKED, name):
            return stack_layers(tree[name], x)
        return jax.tree.map(lambda *layers: jnp.stack(layers), *(tree[layer] for layer in layers_of(name, x)))

    return {name: stacked(name, x) for name, x in like.items()}


def unstack_layers(tree):
    """The reverse of `stack_layers`."""
    if not isinstance(tree, dict):
        return tree
    found = {}
    for name, x in tree.items():
        layers = layers_of(name, x) if re.fullmatch(STACKED, name) else None
        found |= (
            {layer: jax.tree.map(lambda x, i=i: x[i], x) for i, layer in enumerate(layers)}
            if layers
            else {name: unstack_layers(x)}
        )
    return found


class MapHead(nn.Module):
    """Multi-head attention pooling with one learned query and an MLP (big_vision's MAP head), `[b, n, D] -> [b, D]`."""

    heads: int
    mlp_dim: int
    act: str
    ln_eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None):
        width = x.shape[-1]
        init = block_init("xavier", width, self.mlp_dim, 1)
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        probe = jnp.tile(probe, (x.shape[0], 1, 1)).astype(x.dtype)
        x = Attention(self.heads, init, self.dtype, name="attn")(probe, x, mask)
        y = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln")(x)
        return (x + Mlp(self.mlp_dim, self.act, init, self.dtype, name="mlp")(y))[:, 0]


def project(pooled, embed_dim, bias, dtype):
    """The linear map `proj` of the calling tower into the shared space, float32 `[b, embed_dim]`; none when `embed_dim` is 0."""
    if embed_dim:
        init = nn.initializers.normal(pooled.shape[-1] ** -0.5)
        pooled = nn.Dense(embed_dim, use_bias=bias, dtype=dtype, kernel_init=init, name="proj")(pooled)
    return pooled.astype(jnp.float32)
