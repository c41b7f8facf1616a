"""The pre-LN transformer encoder that the image and text towers share.

A block is `x += MHA(LN(x)); x += W2 act(W1 LN(x))` with a bias in every linear layer. Parameters are float32. Matrix
products run in `dtype`, the reductions of layer norms and softmax in float32.
"""

import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clip_jax.models import attention_tpu
from clip_jax.models.common import ACTIVATIONS, KEPT, platform, row_major, shard_batch, torch_uniform
from clip_jax.models.layers import Dense, add, multiply

WEIGHT_INITS = ("clip_image", "clip_text", "xavier", "bert", "declip", "flip", "timm_qk_norm", "unicl")

PROJ_INITS = ("clip", "glorot")


@dataclass(frozen=True)
class Init:
    """Initialisers of the kernels and biases of a block, by layer."""

    qkv: Any
    attn_out: Any
    fc1: Any
    fc2: Any
    mlp_bias_1: Any = nn.initializers.zeros
    mlp_bias_2: Any = nn.initializers.zeros
    qkv_bias: Any = nn.initializers.zeros
    attn_out_bias: Any = nn.initializers.zeros


def block_init(scheme, width, mlp_dim, depth):
    """Returns the initialisers `Init` of a block.

    Args:
      scheme: one of `WEIGHT_INITS`.
        `clip_image`: OpenAI's vision transformer, which keeps PyTorch's defaults. The fused `[3D, D]` matrix of the
          attention is Xavier-uniform, the other kernels and the MLP biases are U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
        `clip_text`: OpenAI's text transformer, normal; the depth scales the outputs of the residual branches. The MLP
          biases are PyTorch's default, as in `clip_image`.
        `declip`: the image towers of Sense-GVT/DeCLIP, whose blocks start as those of `clip_text`.
        `xavier`: big_vision, Xavier-uniform; the MLP biases are normal with standard deviation 1e-6.
        `flip`: facebookresearch/flip. The fused `[3D, D]` matrix and the other kernels are Xavier-uniform, biases 0.
        `unicl`: the text tower of microsoft/UniCL. The fused `[3D, D]` matrix is Xavier-uniform, the other kernels are
          normal with standard deviation 0.02, biases 0. Its truncation at +-2 changes nothing.
        `timm_qk_norm`: LaCLIP's blocks with `qk_norm`, which PyTorch initialises: all kernels and biases are
          U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
        `bert`: truncated normal with standard deviation 0.02.
      width, mlp_dim: widths of the block and of the hidden layer of its MLP.
      depth: number of blocks.
    """
    xavier, normal = nn.initializers.xavier_uniform(), nn.initializers.normal
    # Xavier's bound for the fused matrix is sqrt(6 / 4D). This gives the same bound on its [D, D] slices.
    fused_xavier = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
    wide, narrow = torch_uniform(width), torch_uniform(mlp_dim)
    if scheme == "clip_image":
        return Init(fused_xavier, wide, wide, narrow, wide, narrow)
    if scheme in ("clip_text", "declip"):
        residual = normal(width**-0.5 * (2 * max(depth, 1)) ** -0.5)
        return Init(normal(width**-0.5), residual, normal((2 * width) ** -0.5), residual, wide, narrow)
    if scheme == "xavier":
        return Init(xavier, xavier, xavier, xavier, normal(1e-6), normal(1e-6))
    if scheme == "flip":
        return Init(fused_xavier, xavier, xavier, xavier)
    if scheme == "unicl":
        return Init(fused_xavier, *[normal(0.02)] * 3)
    if scheme == "timm_qk_norm":
        return Init(wide, wide, wide, narrow, wide, narrow, wide, wide)
    assert scheme == "bert", scheme
    return Init(*[nn.initializers.truncated_normal(0.02)] * 4)


def attend(q, k, v, mask=None, causal=False, attention="plain", bias=None, drop_weights=None):
    """Returns softmax attention of the queries to the keys, `[b, t, H, d]`.

    Args:
      q: queries `[b, t, H, d]`.
      k, v: keys and values `[b, s, H, d]`.
      mask: bool, broadcast to `[b, H, t, s]`, True where attention is allowed. None allows all.
      causal: allows attention to the same and earlier positions only.
      bias: float32, broadcast to `[b, H, t, s]`, added to the scaled products. None adds nothing.
      attention: `model.attention`. `plain` uses XLA. `auto` uses cuDNN's fused attention on GPUs for bfloat16 or
        float16 and d a multiple of 8, at most 128. It falls back to XLA for a `mask`, which cuDNN would treat as a
        bias, for a `bias`, for a single query, and for `drop_weights`.
      drop_weights: None, or the dropout of the attention weights, a function `[b, H, t, s] -> [b, H, t, s]`. It needs
        `causal=False`.
    """
    if drop_weights is not None:
        assert not causal, "dropout of attention weights has no causal mask"
        logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        logits = logits if bias is None else logits + bias
        logits = logits if mask is None else jnp.where(mask, logits, jnp.finfo(jnp.float32).min / 2)
        weights = drop_weights(jax.nn.softmax(logits).astype(v.dtype))
        return jnp.einsum("bhts,bshd->bthd", weights, v)
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    fits = fits and mask is None and bias is None and q.shape[1] > 1
    # The devices are asked last: shapes of a model in float32 need none.
    if attention == "auto" and fits and platform() == "gpu":
        return attend_even(q, k, v, causal, "cudnn")
    if q.dtype == jnp.float16 and platform() != "gpu":  # JAX's float16 attention runs on GPUs only
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        return jax.nn.dot_product_attention(*wide, bias, mask, is_causal=causal, implementation="xla").astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, bias, mask, is_causal=causal, implementation="xla")


def attend_even(q, k, v, causal, implementation):
    """Returns the attention of `attend`, computed on sequences padded to even lengths.

    JAX refuses the gradient of cuDNN attention for odd lengths. No query attends to the padding: with `causal` it
    follows all real keys, otherwise the sequence lengths exclude it. The padded query is cut off.
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
    """Multi-head attention from `x_q[b, q, D]` to `x_kv[b, k, D]`, `[b, q, D]`.

    The bool `mask`, broadcast to `[b, H, q, k]`, is True where attention is allowed. `bias` and `drop_weights` are
    those of `attend`.

    Attributes:
      heads: number of heads H.
      inits: initialisers of the kernels.
      dtype: dtype of the matrix products.
      attention: `model.attention`. `auto` uses fused attention: on TPUs where `attention_tpu.fits` the shapes, for
        bfloat16, no mask of single pairs, no `bias` and no `drop_weights`; on GPUs see `attend`.
      qk_norm_eps: epsilon of the layer norms of each head's queries and keys, whose weights the heads share (Dehghani
        et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters"; LaCLIP's image towers). None omits them.
      looped: whether it runs in a loop over blocks. XLA would give the gradients of its kernels the layout of the
        stacked ones and copy the gradients of queries, keys and values for that: 5 % of a step of ViT-L/14 on TPUs, by
        the compiler's estimate.
    """

    heads: int
    inits: Init
    dtype: Any = jnp.float32
    attention: str = "plain"
    qk_norm_eps: float | None = None
    looped: bool = False

    @nn.compact
    def __call__(self, x_q, x_kv, mask=None, causal=False, bias=None, drop_weights=None):
        b, t, width = x_q.shape
        split = self.heads, width // self.heads

        def project(name, x, flat=False):
            inits = dict(kernel_init=self.inits.qkv, bias_init=self.inits.qkv_bias)
            y = Dense(split, dtype=self.dtype, apart=flat and self.looped, **inits, name=name)(x, flat)
            if self.qk_norm_eps is None or name == "value":
                return y
            y = add(*y).reshape(*x.shape[:2], *split) if flat else y
            # Fused attention scales the queries before it rounds them.
            dtype = jnp.float32 if flat and name == "query" else self.dtype
            y = nn.LayerNorm(epsilon=self.qk_norm_eps, dtype=dtype, name=f"{name}_norm")(y)
            return (y.reshape(x.shape), None) if flat else y

        plain = bias is not None or drop_weights is not None or self.attention != "auto" or self.dtype != jnp.bfloat16
        if not plain and attention_tpu.fits(b, t, x_kv.shape[1], *split, mask) and platform() == "tpu":
            inputs = {"query": x_q, "key": x_kv, "value": x_kv}
            products, biases = zip(*(project(name, x, True) for name, x in inputs.items()), strict=True)
            keys = None if mask is None else jnp.broadcast_to(mask[:, 0, 0], x_kv.shape[:2])
            x = attention_tpu.attention(*products, biases, self.heads, keys, causal).reshape(b, t, *split)
        else:
            q, k = project("query", x_q), project("key", x_kv)
            x = attend(q, k, project("value", x_kv), mask, causal, self.attention, bias, drop_weights)
        inits = dict(kernel_init=self.inits.attn_out, bias_init=self.inits.attn_out_bias)
        return Dense(width, axes=2, dtype=self.dtype, **inits, name="out")(x)


class Mlp(nn.Module):
    """The MLP of a block, `W2 act(W1 x + b1) + b2`, `[..., D] -> [..., D]`."""

    mlp_dim: int
    act: str
    inits: Init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = Dense(
            self.mlp_dim, dtype=self.dtype, kernel_init=self.inits.fc1, bias_init=self.inits.mlp_bias_1, name="fc1"
        )(x)
        # Kept in a loop: a product that computes its operand on the way is slow on TPUs.
        x = checkpoint_name(ACTIVATIONS[self.act](x), KEPT)
        return Dense(width, dtype=self.dtype, kernel_init=self.inits.fc2, bias_init=self.inits.mlp_bias_2, name="fc2")(
            x
        )


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor (Touvron et al. 2021, "Going Deeper with Image Transformers")."""

    start: float

    @nn.compact
    def __call__(self, x):
        return multiply(x, self.param("scale", nn.initializers.constant(self.start), x.shape[-1:]))


class Block(nn.Module):
    """One pre-LN block, `[b, n, D] -> [b, n, D]`.

    `mask` is that of `Attention`. With a position `only`, see `at`, the output is that of this position alone, `[b, 1,
    D]`. A `layer_scale` above 0 is the first value of a `LayerScale` of both branches.
    """

    heads: int
    mlp_dim: int
    act: str
    ln_eps: float
    inits: Init
    causal: bool = False
    dtype: Any = jnp.float32
    attention: str = "plain"
    qk_norm: bool = False
    layer_scale: float = 0.0
    looped: bool = False

    @nn.compact
    def __call__(self, x, mask=None, only=None):
        def scaled(x, name):
            return LayerScale(self.layer_scale, name=name)(x) if self.layer_scale else x

        x = row_major(shard_batch(x))
        y = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln1")(x)
        queries, causal = y, self.causal
        if only is not None:
            x, queries = at(x, only), at(y, only)
            if causal:
                before = (jnp.arange(y.shape[1]) <= jnp.reshape(only, (-1, 1)))[:, None, None, :]
                mask, causal = before if mask is None else before & mask, False
        qk_norm_eps = self.ln_eps if self.qk_norm else None
        fields = self.heads, self.inits, self.dtype, self.attention, qk_norm_eps, self.looped
        attention = Attention(*fields, name="attn")
        x = x + scaled(attention(queries, y, mask, causal), "ls1")
        y = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln2")(x)
        return x + scaled(Mlp(self.mlp_dim, self.act, self.inits, self.dtype, name="mlp")(y), "ls2")


def _products_saveable(primitive, *_, **params):
    """Stores the results of products, convolutions and fused attention, and the values named `KEPT`."""
    name = primitive.name
    if name == "name":
        return params["name"] == KEPT
    return name in ("dot_general", "conv_general_dilated", "pallas_call") or name.startswith("dot_product_attention")


#: Policies: what a block stores for the backward pass. The rest is recomputed.
REMAT = {
    # `model.remat=dots`: the outputs of the linear layers, not the attention weights.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # `model.remat=full`
    "full": jax.checkpoint_policies.nothing_saveable,
    # Blocks in a loop with `model.remat=none`. The loop writes each stored array into a stack and reads it again.
    # Without a loop XLA chooses: it repeats much of the element-wise work where it is needed.
    "loop": _products_saveable,
    # For `preflight.kept_bytes`, which traces one block in a loop and asks what blocks store without one.
    "all": jax.checkpoint_policies.everything_saveable,
}


def rematerialized(call, remat, **options):
    """Returns `call` with rematerialisation in the backward pass.

    Args:
      call: a module class, or a function whose first argument is a module.
      remat: `none` or a key of `REMAT`.
      options: further arguments of `flax.linen.remat`.
    """
    return call if remat == "none" else nn.remat(call, policy=REMAT[remat], **options)


def apply_blocks(tower, block, x, mask=None, only=None):
    """Applies `tower.depth` blocks inside the compact method of `tower` and returns their output.

    Parameters are `block_0`, `block_1`, ... With `tower.scan` they are stacked, `[depth, ...]` under `block`, and the
    blocks are a loop. With `only` the last one stands behind the loop.

    Args:
      tower: the calling module, with the fields `depth`, `scan` and `remat`.
      block: a function of the fields `name` and `looped` that returns a `Block`.
      x: `[b, n, D]`, or any pytree that a block maps to the same structure.
      mask: attention mask of `Block`, or any pytree that every block takes.
      only: None, or the position from `only_at`. The last block computes the output there alone.
    """
    remat = "loop" if tower.scan and tower.remat == "none" else tower.remat

    def maybe_remat(call):
        return rematerialized(call, remat, prevent_cse=not tower.scan)

    call = maybe_remat(lambda block, x, mask: block(x, mask))
    last = maybe_remat(lambda block, x, mask: block(x, mask, only))
    if not (tower.scan and tower.depth):
        for i in range(tower.depth):
            apply = last if i == tower.depth - 1 and only is not None else call
            x = apply(block(name=f"block_{i}"), x, mask)
        return x

    def loop(depth):
        return nn.scan(
            lambda block, x, mask: (call(block, x, mask), None), variable_axes={"params": 0},
            split_rngs={"params": True}, in_axes=nn.broadcast, length=depth,
        )  # fmt: skip

    def rows(layers, of):
        return nn.map_variables(layers, "params", lambda params: jax.tree.map(lambda x: x[of], params))

    layers = block(name="block", looped=True)
    if only is None or tower.is_initializing():  # the whole loop makes the parameters
        x = loop(tower.depth)(layers, x, mask)[0]
        return x if only is None else at(x, only)
    x = rows(loop(tower.depth - 1), slice(-1))(layers, x, mask)[0]
    # XLA may keep what this block computes instead of computing it again: it is little, and needed first.
    return rows(last, -1)(layers, x, mask)


def at(x, position):
    """Returns the token of `x[b, n, D]` at a position, `[b, 1, D]`. The position is one int, or int32 `[b]`."""
    if isinstance(position, int):
        return x[:, position : position + 1]
    return jnp.take_along_axis(x, position[:, None, None], axis=1)


def only_at(tower, position):
    """Returns `position` if the last block of a tower may compute the output there alone, otherwise None.

    It may if the tower returns no tokens and has blocks. In a tower of 12 blocks this saves 7 % of the work: the
    queries, the MLP and the output projection of all other tokens in the last block.
    """
    return None if tower.tokens or not tower.depth else position


#: Matches in a parameter path the name under which `model.scan` stacks layers: `block`, or a range, `mbconv_3_to_5`.
STACKED = r"(?:^|/)(?:block|mbconv_\d+_to_\d+)(?=/|$)"


def layers_of(stack, tree):
    """Returns the names of the layers stacked under the name `stack`.

    Args:
      stack: a name that `STACKED` matches.
      tree: the stacked arrays; their first axis gives the number of layers of `block`.

    Returns:
      `["block_0", "block_1", ...]`, or for `mbconv_3_to_5` `["mbconv_3", "mbconv_4", "mbconv_5"]`.
    """
    kind, *ends = re.fullmatch(r"([a-z]+)(?:_(\d+)_to_(\d+))?", stack).groups()
    first, last = (0, len(jax.tree.leaves(tree)[0]) - 1) if ends[0] is None else map(int, ends)
    return [f"{kind}_{i}" for i in range(first, last + 1)]


def stack_layers(tree, like):
    """Returns parameters or running statistics with the same layers stacked as in `like`.

    Args:
      tree: nested dict of arrays with every layer under its own name.
      like: nested dict with the wanted structure. Its stacked arrays give the number of layers.
    """
    if not isinstance(like, dict):
        return tree

    def stacked(name, x):
        if not re.fullmatch(STACKED, name):
            return stack_layers(tree[name], x)
        return jax.tree.map(lambda *layers: jnp.stack(layers), *(tree[layer] for layer in layers_of(name, x)))

    return {name: stacked(name, x) for name, x in like.items()}


def unstack_layers(tree):
    """Returns parameters or running statistics with every layer under its own name; the inverse of `stack_layers`."""
    if not isinstance(tree, dict):
        return tree
    unstacked = {}
    for name, x in tree.items():
        layers = layers_of(name, x) if re.fullmatch(STACKED, name) else []
        for i, layer in enumerate(layers):
            unstacked[layer] = jax.tree.map(lambda x, i=i: x[i], x)
        if not layers:
            unstacked[name] = unstack_layers(x)
    return unstacked


class MapHead(nn.Module):
    """Attention pooling with one learned query, then a residual MLP (big_vision's MAP head), `[b, n, D] -> [b, D]`.

    The bool `mask`, broadcast to `[b, H, 1, n]`, is True at the tokens that are pooled.
    """

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


def project(pooled, embed_dim, bias, dtype, scheme=""):
    """Projects `pooled[b, D]` by the linear layer `proj` of the calling tower, float32 `[b, embed_dim]`.

    With `embed_dim` 0 there is no layer, and the result is `pooled` in float32. `scheme` is a tower's `weight_init` or
    `proj_init`. The kernel is Xavier-uniform for `flip` and `glorot`, normal with standard deviation 0.02 for `unicl`,
    and otherwise normal with `D ** -0.5`. For `torch`, kernel and bias are U(-1/sqrt(D), 1/sqrt(D)); otherwise the bias
    is 0.
    """
    if embed_dim:
        width = pooled.shape[-1]
        init, bias_init = nn.initializers.normal(0.02 if scheme == "unicl" else width**-0.5), nn.initializers.zeros
        if scheme in ("flip", "glorot"):
            init = nn.initializers.xavier_uniform()
        elif scheme == "torch":
            init = bias_init = torch_uniform(width)
        layer = Dense(embed_dim, use_bias=bias, dtype=dtype, kernel_init=init, bias_init=bias_init, name="proj")
        pooled = layer(pooled)
    return pooled.astype(jnp.float32)
